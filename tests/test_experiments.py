"""experiments/: what the variants of the scripts compute, the sweep on this machine and on Ray, figures and tables."""

import contextlib
import copy
import csv
import importlib.util
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import types
from pathlib import Path

import gymnasium as gym
import helpers
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import SIGNALS, checkpoint_of, flags, forked, load
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.tensorboard import SummaryWriter

import dqn_tbb
import sac_tbb
from monoids import MEMORIES

play = helpers.play
ROOT = Path(__file__).parent.parent
SWEEP = ROOT / "experiments" / "sweep.py"


@pytest.fixture(scope="module")
def sweep():
    for package in ("tqdm", "matplotlib", "scipy", "sb3_contrib"):
        pytest.importorskip(package, reason="pip install -r experiments/requirements.txt")
    sys.path.insert(0, str(SWEEP.parent))
    import sweep

    return sweep


# ---------------------------------------------------------------------------------------------------------------------
# The variants


@pytest.fixture
def patched(sweep, tmp_path, monkeypatch):
    """A script with the patch of a variant, as a module."""

    def load(variant, script=sweep.TBB):
        path = sweep.place(sweep.Run(script, "", variant=variant), ROOT, tmp_path)
        spec = importlib.util.spec_from_file_location(variant, path)
        module = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, variant, module)  # dataclasses look their module up
        spec.loader.exec_module(module)
        return module

    return load


def make_args(module, **kwargs):
    return module.Args(**{"env_id": "CartPole-v1", "num_envs": 1, "d_model": 8, "buffer_size": 1000, **kwargs})


def make_episode(rng, n, name=0):
    """n transitions; the first feature of every observation is the episode's name."""
    obs, rows = rng.normal(size=(n + 1, 4)).astype(np.float32), np.arange(n + 1)
    obs[:, 0] = name
    action = np.where(rows < n, rng.integers(2, size=n + 1), 0)
    reward = np.where(rows < n, rng.normal(size=n + 1), 0).astype(np.float32)
    return dqn_tbb.Rows(obs, action, reward, (rows == n - 1) & bool(name % 2), rows == 0)


def make_tape(module, lengths):
    rng, args = np.random.default_rng(0), make_args(module)
    tape, episodes = module.Tape(args, module.make_envs(args, 1), "cpu"), []
    for name, n in enumerate(lengths):
        episodes.append(make_episode(rng, n, name))
        tape.add(episodes[-1])
    return tape, episodes


def make_batch(episodes):
    """The episodes as a batch of dqn_tbb, in float64: rows (R, 1, ...), and those that hold a transition."""
    rows = dqn_tbb.Rows(*(torch.as_tensor(np.concatenate(x))[:, None] for x in zip(*episodes)))
    rows = rows._replace(obs=rows.obs.double(), reward=rows.reward.double())
    return rows, (~torch.cat((rows.start[1:, 0], torch.tensor([True])))).nonzero().squeeze(1)


def make_networks():
    args = make_args(dqn_tbb)
    envs = dqn_tbb.make_envs(args, 1)
    torch.manual_seed(1)
    return args, dqn_tbb.QNetwork(envs, args).double(), dqn_tbb.QNetwork(envs, args).double()


def metrics_of(module, batch):
    args, q_network, target_network = make_networks()
    return module.update(q_network, target_network, torch.optim.SGD(q_network.parameters(), 0.0), batch, args)


def test_a_patch_begins_with_its_reason_and_applies(sweep, tmp_path):
    (folder := tmp_path / "run").mkdir()
    shutil.copytree(SWEEP.parent / "variants", tmp_path / "experiments" / "variants")
    for path in (SWEEP.parent / "variants").iterdir():
        reason, diff = path.read_text().split("\n\n", 1)
        assert reason[0].isupper() and reason.endswith(".") and "+++" not in reason
        script = diff.split()[1].removeprefix("a/")
        run = sweep.Run(script, "", variant=path.stem)
        assert sweep.place(run, ROOT, folder).read_text() != ROOT.joinpath(script).read_text()
        tmp_path.joinpath(script).write_text("another script")
        with pytest.raises(RuntimeError, match=path.name):
            sweep.place(run, tmp_path, folder)
    for variant in ("", *sweep.FLAGS):
        run = sweep.Run(sweep.TBB, "", variant=variant)
        assert sweep.place(run, ROOT, folder).read_text() == ROOT.joinpath(sweep.TBB).read_text()


@pytest.mark.parametrize("memory", MEMORIES)
def test_sensitivity_is_the_gradient_of_the_last_q_value(memory, patched, monkeypatch):
    """Against central differences in float64, with every episode on its own: nothing crosses episode boundaries."""
    module = patched("sensitivity")
    args = make_args(module, memory=(memory,))
    envs = module.make_envs(args, 1)
    torch.manual_seed(0)
    network = module.QNetwork(envs, args)
    torch.nn.init.orthogonal_(network.head[-1].weight, 1.0)
    rng = np.random.default_rng(0)
    episodes = [make_episode(rng, n) for n in (4, 7, 1)]
    monkeypatch.setattr(module, "collect", lambda *args: episodes)
    fast = module.sensitivity(envs, network, args)
    assert all(p.grad is None for p in network.parameters())

    slow, precise = [[] for _ in range(7)], copy.deepcopy(network).double()
    for episode in episodes:
        rows, t = make_batch([episode])
        n = int(t[-1])

        def last_q(i, feature, by):
            obs = rows.obs.clone()
            obs[i, 0, feature] += by
            with torch.no_grad():
                q, _ = precise(obs, rows.action.roll(1, 0), rows.start, precise.memory.initial_state(1))
            return q[n, 0, rows.action[n, 0]].item()

        assert last_q(n + 1, 0, 1.0) == last_q(n + 1, 0, 0.0)  # the final observation comes after the decision
        for i in range(n + 1):
            gradient = [(last_q(i, k, 1e-5) - last_q(i, k, -1e-5)) / 2e-5 for k in range(4)]
            slow[n - i].append(np.linalg.norm(gradient))
    np.testing.assert_allclose(fast, [np.mean(x) for x in slow], rtol=2e-3, atol=1e-6)
    assert memory == "none" or (fast > 0).all()


def test_authors_next_value_does_not_see_the_first_observation(patched):
    _, episodes = make_tape(dqn_tbb, [3, 1, 6])
    args, q_network, target_network = make_networks()
    losses = []
    for episode in episodes:
        rows, t = make_batch([episode])
        state = q_network.memory.initial_state(1)
        with torch.no_grad():
            q, _ = q_network(rows.obs, rows.action.roll(1, 0), rows.start, state)
            inputs = (rows.obs[1:], rows.action[:-1], rows.start[:-1], state)
            best, value = (network(*inputs)[0][:, 0] for network in (q_network, target_network))
        for i in t:
            target = rows.reward[i, 0] + args.gamma * value[i, best[i].argmax()] * ~rows.terminated[i, 0]
            losses.append(F.smooth_l1_loss(q[i, 0, rows.action[i, 0]], target))
    batch = make_batch(episodes)
    authors = metrics_of(patched("authors_next_value"), batch)["losses/td_loss"]
    torch.testing.assert_close(authors, torch.stack(losses).mean(), rtol=1e-6, atol=1e-9)
    assert abs(metrics_of(dqn_tbb, batch)["losses/td_loss"] - authors) > 1e-6


def test_cut_last_episode_gives_batches_of_exactly_batch_size(patched):
    tape, _ = make_tape(module := patched("cut_last_episode"), [30, 17, 5])
    for seed in range(10):
        (_, cut), (_, whole) = (
            Tape.sample(tape, 40, np.random.default_rng(seed)) for Tape in (module.Tape, dqn_tbb.Tape)
        )
        assert len(cut) == 40
        torch.testing.assert_close(cut, whole[:40])


def test_prioritised_samples_and_weights_by_the_error_of_an_episode(patched):
    tape, episodes = make_tape(patched("prioritised"), [4] * 5)
    assert tape.priority == [1.0] * 5
    rng = np.random.default_rng(0)
    while len(set(tape.priority)) < 5:  # every episode gets an error of its own
        tape.sample(1, rng, 0.4)
        (name,) = tape.drawn
        tape.prioritise(torch.tensor([0.5, 1.0, 1.5, 1.0])[:, None] * (1 + name))
    assert tape.priority == pytest.approx([1, 2, 3, 4, 5])
    p = np.arange(1, 6) ** 0.6 / sum(np.arange(1, 6) ** 0.6)
    draws = np.zeros(5)
    for _ in range(300):
        rows, t, weight = tape.sample(80, rng, 1.0)
        names = rows.obs[t, 0, 0].long().numpy()
        np.testing.assert_allclose(weight[:, 0], 1 / p[names] / (1 / p[names]).max(), rtol=1e-5)
        draws += np.bincount(names, minlength=5) / len(names) / 300
    np.testing.assert_allclose(draws, p, atol=0.02)
    tape.add(episodes[0])
    assert tape.priority[-1] == pytest.approx(5)


def test_prioritised_loss_is_weighted(patched):
    module, (_, episodes) = patched("prioritised"), make_tape(dqn_tbb, [3, 1, 6])
    rows, t = make_batch(episodes)
    weight = torch.rand(len(t), 1)
    weighted = metrics_of(module, (rows, t, weight))
    losses = F.smooth_l1_loss(weighted["error"], torch.zeros(len(t), 1).double(), reduction="none")
    torch.testing.assert_close(weighted["losses/td_loss"], (losses * weight).mean())
    torch.testing.assert_close(metrics_of(dqn_tbb, (rows, t))["losses/td_loss"], losses.mean())


def test_prioritised_run_updates_its_priorities(patched, play, tmp_path):
    module = patched("prioritised")
    assert play(module, *flags(dqn_tbb))[0] == 0
    priority = load(checkpoint_of(tmp_path))["learners"]["buffer"]["priority"]
    assert len({*priority}) > 5


def test_separate_memories_are_trained_by_different_losses(patched):
    """While both are equal, all that has a gradient with one memory has the same, and the actor's memory has one too."""
    module, rng = patched("separate_memories", "sac_tbb.py"), np.random.default_rng(0)
    args = module.Args(env_id="Pendulum-v1", d_model=8, max_grad_norm=1e9)
    torch.manual_seed(0)
    separate, shared = (x.Agent(x.make_envs(args, 1), args).double() for x in (module, sac_tbb))
    for own, theirs in zip(separate.of_actor, (separate.encoder, separate.memory, separate.norm)):
        own.load_state_dict(theirs.state_dict())
    shared.load_state_dict({name: x for name, x in separate.state_dict().items() if "of_actor" not in name})
    start = torch.arange(9)[:, None] % 4 == 0
    obs, action, reward = (torch.as_tensor(rng.normal(size=(9, 1, *k))) for k in ((3,), (1,), ()))
    batch = sac_tbb.Rows(obs, action.tanh(), reward, start, start), (~start[1:, 0]).nonzero().squeeze(1)
    for x, agent in ((module, separate), (sac_tbb, shared)):
        torch.manual_seed(1)
        x.update(agent, copy.deepcopy(agent), torch.optim.SGD(agent.parameters(), 0.0), batch, args)
    of_actor = {name: x.grad for name, x in separate.named_parameters() if "of_actor" in name}
    torch.testing.assert_close(
        {name: x.grad for name, x in separate.named_parameters() if name not in of_actor},
        {name: x.grad for name, x in shared.named_parameters()},
    )
    assert all(gradient.any() for gradient in of_actor.values())


def test_separate_actor_acts_with_a_memory_of_its_own(patched):
    module = patched("separate_memories", "sac_tbb.py")
    envs, agent, _ = helpers.make(module, env_id="Pendulum-v1")
    start, state = torch.ones(1, 5, dtype=torch.bool), agent.memory.initial_state(5)
    inputs = torch.ones(1, 5, 3), torch.zeros(1, 5, 1), start, state

    def act():
        with torch.no_grad():
            return module.policy(agent, *inputs, greedy=True)[0]

    before = act()
    for part, same in (agent.encoder, True), (agent.of_actor[0], False):
        torch.nn.init.zeros_(part[-1].weight)
        assert torch.equal(act(), before) == same


# ---------------------------------------------------------------------------------------------------------------------
# The environments


@pytest.mark.parametrize("level, n", [("Easy", 200), ("Medium", 150), ("Hard", 100)])
def test_full_pendulum_is_the_task_of_popgym_with_its_velocity(level, n):
    full = gym.make(f"experiments.full_pendulum:FullPendulum{level}-v0")
    partial = gym.make(f"popgym-PositionOnlyPendulum{level}-v0")
    ends = []
    for env in (full, partial):
        env.action_space.seed(0)
    (obs, _), (position, _) = full.reset(seed=0), partial.reset(seed=0)
    while not any(ends):
        assert full.observation_space.contains(obs) and obs[:2].tolist() == position.tolist()
        assert obs[2] == pytest.approx(full.unwrapped.state[1])
        (obs, *outcome, _), (position, *expected, _) = (env.step(env.action_space.sample()) for env in (full, partial))
        assert outcome == expected
        ends, n = outcome[1:], n - 1
    assert ends == [False, True] and n == 0


@pytest.mark.parametrize("robot", ["Hopper", "Walker2d", "HalfCheetah"])
def test_parts_of_a_robot(robot):
    pytest.importorskip("mujoco", reason="pip install -r experiments/requirements.txt")
    for what in ("Positions", "Velocities", "Full"):
        env = gym.make(f"experiments.partial_mujoco:{robot}{what}-v0")
        obs, _ = env.reset(seed=0)
        data = env.unwrapped.data
        parts = {"Positions": data.qpos[1:], "Velocities": data.qvel}  # without the distance covered
        np.testing.assert_allclose(obs, parts.get(what, np.concatenate([*parts.values()])))
        assert env.observation_space.contains(obs)


def test_random_returns_are_those_of_the_csv(sweep):
    import plot
    import popgym_random

    assert [*plot.POPGYM] == popgym_random.TASKS
    for task in ("CountRecallEasy", "MineSweeperEasy", "PositionOnlyPendulumHard"):
        returns = popgym_random.random_returns(task, 50)
        assert abs(returns.mean() - plot.POPGYM[task]) < 4 * returns.std() / 50**0.5 + 0.005
        np.testing.assert_array_equal(popgym_random.random_returns(task, 50), returns)


@pytest.fixture
def t_maze(monkeypatch):
    monkeypatch.syspath_prepend(SWEEP.parent)

    def play(actions, **kwargs):
        """(observations, rewards, the side of the goal) of an episode that these actions end."""
        env = gym.make("tmaze:TMaze-v0", **kwargs)
        (first, _), steps = env.reset(seed=0), []
        for action in actions:
            assert not steps or not steps[-1][2]
            steps.append(env.step(action))
        assert steps[-1][2] and not any(truncated for *_, truncated, _ in steps)
        return [first.tolist(), *(obs.tolist() for obs, *_ in steps)], [reward for _, reward, *_ in steps], first[1]

    return play


def test_t_maze_shows_the_goal_once_and_rewards_the_turn(t_maze):
    right, up, left, down = range(4)
    obs, rewards, goal = t_maze([right, right, right, up], corridor_length=3)
    assert obs == [[0, goal], [0, 0], [0, 0], [1, 0], [1, 0]] and abs(goal) == 1
    assert rewards == [0, 0, 0, goal == 1]
    assert t_maze([right, right, right, down], corridor_length=3)[1] == [0, 0, 0, goal == -1]
    assert t_maze([right, right, right, left], corridor_length=3)[1] == [0, 0, 0, 0]
    obs, rewards, _ = t_maze([right, up, right, up], corridor_length=3)  # a step late: no junction, no goal
    assert obs == [[0, goal], [0, 0], [0, 0], [0, 0], [0, 0]] and rewards == [0, -1 / 3, -1 / 3, 0]
    assert t_maze([right, left, left, right, right, up], corridor_length=5)[1] == [0, *4 * [-1 / 5], 0]


def test_t_maze_has_goals_on_both_sides(t_maze):
    env = gym.make("tmaze:TMaze-v0")
    assert {env.reset(seed=seed)[0][1] for seed in range(20)} == {-1, 1}


def test_t_maze_that_walks_the_agent(t_maze):
    obs, rewards, goal = t_maze([0, 1, 2, 1 if goal_is_up(t_maze) else 3], corridor_length=3, walk=False)
    assert obs == [[0, goal], [0, 0], [0, 0], [1, 0], [1, 0]] and rewards == [0, 0, 0, 1]


def goal_is_up(t_maze):
    return t_maze([0, 0], corridor_length=1)[2] == 1


# ---------------------------------------------------------------------------------------------------------------------
# Scripts around Stable-Baselines3


@pytest.fixture
def made(sweep, monkeypatch, tmp_path):
    """Runs a script around Stable-Baselines3 up to where its model would learn: (environments, arguments, callback)."""
    import sb3_contrib
    import stable_baselines3

    found = []

    class Model:
        def __init__(self, policy, envs, **kwargs):
            found.extend((envs, kwargs))

        def learn(self, total_timesteps, callback):
            found.append(callback)
            callback.writer.close()
            sys.exit()

    def made(script, *argv):
        found.clear()
        monkeypatch.chdir(tmp_path)
        assert helpers.run(SWEEP.with_name(f"{script}.py"), argv) == 0
        return [*found]

    monkeypatch.setattr(sys, "argv", sys.argv)
    monkeypatch.setattr(sb3_contrib, "RecurrentPPO", Model)
    monkeypatch.setattr(stable_baselines3, "SAC", Model)
    return made


def test_recurrent_ppo_gets_its_arguments(made):
    argv = "--env-id CartPole-v1 --seed 3 --gamma 0.5 --gae-lambda 0.8 --num-envs 2 --num-steps 7 --eval-episodes 4"
    envs, kwargs, callback = made("recurrent_ppo", *argv.split())
    assert kwargs == dict(gamma=0.5, gae_lambda=0.8, seed=3, n_steps=7, batch_size=512, n_epochs=4, device="cpu")
    assert envs._seeds == [3, 4] and callback.envs._seeds == [1_000_003 + i for i in range(4)]
    assert envs.observation_space.shape == (4,)
    assert not hasattr(envs, "norm_reward")


def test_recurrent_ppo_like_ppo_tbb(made):
    """Rewards are normalised, observations and evaluations are not."""
    import ppo_tbb

    argv = "--env-id CartPole-v1 --seed 3 --gamma 0 --num-envs 2 --eval-episodes 4 --like-ppo-tbb"
    envs, kwargs, callback = made("recurrent_ppo", *argv.split())
    assert envs.observation_space.shape == callback.envs.observation_space.shape == (6,)
    rate, defaults = kwargs["learning_rate"], ppo_tbb.Args()
    assert [rate(1), rate(0.5), rate(0)] == [defaults.learning_rate, defaults.learning_rate / 2, 0]
    assert kwargs["ent_coef"] == defaults.ent_coef
    assert envs.norm_reward and not envs.norm_obs and envs.gamma == 0 and not hasattr(callback.envs, "norm_reward")


@pytest.mark.parametrize("task", ["PositionOnlyPendulumEasy", "RepeatPreviousEasy", "BattleshipEasy"])
def test_recurrent_ppo_sees_its_previous_action(task, sweep):
    from recurrent_ppo import PreviousAction

    env, other = (gym.wrappers.FlattenObservation(gym.make(f"popgym-{task}-v0")) for _ in range(2))
    env, shown = PreviousAction(env), np.zeros(gym.spaces.flatdim(env.action_space))
    (obs, _), (expected, _) = (x.reset(seed=1) for x in (env, other))
    env.action_space.seed(1)
    for _ in range(5):
        assert env.observation_space.contains(obs)
        np.testing.assert_array_equal(obs, [*expected, *shown])
        action = env.action_space.sample()
        (obs, *others), (expected, *expected_others) = env.step(action), other.step(action)
        assert others == expected_others
        shown = gym.spaces.flatten(env.action_space, action)


def test_sac_of_stable_baselines3_gets_its_arguments(made):
    argv = "--env-id Pendulum-v1 --seed 3 --reward-scale 1000 --eval-episodes 4".split()
    envs, kwargs, callback = made("sb3_sac", *argv)
    assert kwargs == dict(seed=3, device="cpu") and envs._seeds == [3] and len(callback.envs._seeds) == 4
    callback.envs.seed(3)
    for x in (envs, callback.envs):
        x.reset()
    (scaled,), (reward, *_) = (x.step(np.zeros((x.num_envs, 1)))[1] for x in (envs, callback.envs))
    assert scaled == pytest.approx(1000 * reward)


def test_evaluation_of_others_logs_means(sweep, monkeypatch, tmp_path):
    import recurrent_ppo

    monkeypatch.setattr(sys, "argv", ["script.py"])
    monkeypatch.setattr(recurrent_ppo, "evaluate_policy", lambda *_, **__: ([1.0, 4.0], [1, 1]))
    monkeypatch.chdir(tmp_path)
    args = types.SimpleNamespace(env_id="x", seed=1, eval_frequency=100, eval_episodes=2)
    callback = recurrent_ppo.Evaluate(None, args)
    callback.model = types.SimpleNamespace(ep_info_buffer=[{"r": 1.0}, {"r": 2.0}])
    for callback.num_timesteps in (64, 128, 192, 256):
        callback._on_rollout_start()
    callback.writer.close()
    (folder,) = tmp_path.glob("runs/*")
    log = EventAccumulator(str(folder)).Reload()
    assert [(e.step, e.value) for e in log.Scalars("charts/eval_return")] == [(128, 2.5), (256, 2.5)]
    assert log.Scalars("charts/episodic_return")[0].value == 1.5


# ---------------------------------------------------------------------------------------------------------------------
# The sweep


def start(folder, *flags, **kwargs):
    command = [sys.executable, SWEEP, "--smoke", "--results", folder, *flags]
    return subprocess.Popen(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, **kwargs)


def rows_of(path, *without):
    """A CSV without what differs from run to run."""
    with open(path) as file:
        return [
            {name: x for name, x in row.items() if name not in ("seconds", *without)} for row in csv.DictReader(file)
        ]


def by_run(path):
    return sorted(rows_of(path), key=lambda row: (row["run"], int(row["step"])))


def played_by(pid):
    """The runs that any thread of a sweep has started; not those that are still about to become one."""
    found = []
    for thread in Path(f"/proc/{pid}/task").iterdir():
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # git, which a run starts, ends at any time
            children = thread.joinpath("children").read_text().split()
            found += [child for child in children if b"dqn_" in Path(f"/proc/{child}/cmdline").read_bytes()]
    return found


class Forked:
    """What sweep.py needs of subprocess.Popen."""

    def __init__(self, arguments, cwd, **kwargs):
        _, path, *argv = arguments
        self.process = forked(path, argv, cwd)
        self.process.start()

    def communicate(self):
        self.process.join()
        self.returncode = self.process.exitcode
        return "", ""

    __enter__, __exit__ = lambda self: self, lambda self, *_: None


@pytest.fixture(scope="module")
def smoke(sweep, tmp_path_factory):
    """The results of every experiment's smoke test. Other tests compare runs of new processes with them."""
    folder = tmp_path_factory.mktemp("smoke") / "results"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sweep, "subprocess", types.SimpleNamespace(**vars(subprocess) | {"Popen": Forked}))
        patch.setattr(signal, "signal", lambda *_: None)  # the handlers of pytest stay
        patch.setattr(sys, "argv", ["", "--smoke", "--jobs", "1", "--results", str(folder), *sweep.EXPERIMENTS])
        sweep.main()
    return folder


def test_every_experiment_gives_its_rows(sweep, smoke):
    variants = set()
    for name in sweep.EXPERIMENTS:
        rows, runs = rows_of(smoke / f"{name}.csv"), sweep.runs_of(name, [1], smoke=True)
        assert {row["run"] for row in rows} == {run.key for run in runs}
        for run in runs:
            variants.add(run.variant)
            own = [row for row in rows if row["run"] == run.key]
            steps = [int(row["step"]) for row in own]
            assert steps == sorted(set(steps)) and len(steps) > 1 and steps[-1] >= run.total_timesteps
            assert all(-1 <= float(row["eval_return"]) <= 1 for row in own) or name == "mujoco"
            off_policy = run.script in (sweep.TBB, sweep.SBB, sweep.SAC)
            assert own[-1]["episodic_return"] and bool(own[-1]["td_loss"]) == bool(own[-1]["q_values"]) == off_policy
            assert bool(own[-1]["padding"]) == (run.script == sweep.SBB)
            ages = {len(row["sensitivity"].split()) for row in own}
            assert min(ages) > 50 if run.variant == "sensitivity" else ages == {0}
    # every patch was played, and a variant is another run
    assert variants == {"", *sweep.FLAGS, *(path.stem for path in (SWEEP.parent / "variants").glob("*.patch"))}
    columns = ["td_loss", "q_values", "eval_return"]
    finals = {row["run"]: tuple(row[name] for name in columns) for row in rows_of(smoke / "ablations.csv")}
    assert len(finals) == len(set(finals.values())) == 7


def test_sensitivity_leaves_the_run_as_it_is(smoke):
    without = ("run", "variant", "sensitivity")
    runs = [rows_of(smoke / f"{name}.csv", *without) for name in ("sensitivity", "wall_clock")]
    plain, measured = ({(row["script"], row["step"]): row for row in rows} for rows in runs)
    assert plain == measured


def test_every_experiment_gives_its_figures_and_tables(sweep, smoke):
    pages = [Path(shutil.copy(SWEEP.with_name(name), smoke.parent)) for name in ("README.md", "popgym.md", "sac.md")]
    pages.append(Path(shutil.copy(ROOT / "README.md", smoke.parent.parent)))
    for page in pages:  # without their tables
        page.write_text(re.sub("(<!-- table: .*?-->\n).*?(<!-- end -->)", r"\1\2", page.read_text(), flags=re.DOTALL))
    subprocess.run([sys.executable, SWEEP.with_name("plot.py"), "--results", smoke], check=True, capture_output=True)
    names = {"sample_efficiency", "sample_efficiency_curves", "padding", "wall_clock", "returns", "recall", "ablations"}
    names |= {"memories_dqn_tbb", "memories_ppo_tbb", "popgym", "popgym_curves", "sac_curves", "mujoco_curves"}
    names |= {f"sensitivity_{run.task}" for run in sweep.runs_of("sensitivity", [1], smoke=True)}
    assert {path.stem for path in (smoke.parent / "figures").iterdir()} == names
    tables = [x.split("<!-- end -->")[0] for page in pages for x in page.read_text().split("<!-- table: ")[1:]]
    assert len(tables) == 18 and all(table.count("\n|") > 2 for table in tables)


def test_popgym_plays_every_task_seed_by_seed(sweep):
    import plot

    runs = sweep.runs_of("popgym", [1, 2])
    assert len(runs) == len(set(runs)) == 2 * (42 * 7 + 15 + 15 + 36 + 11)
    assert [run.seed for run in runs] == sorted(run.seed for run in runs)
    assert {run.task for run in runs} == set(plot.POPGYM) and len(plot.POPGYM) == 42
    published = plot.read(SWEEP.with_name("popgym_published.csv"))
    assert {row["task"] for row in published} <= set(plot.POPGYM)
    assert all(-1 <= float(row["return"]) <= 1 and int(row["steps"]) and row["source"] for row in published)


def test_popgym_tables_of_invented_runs(sweep, tmp_path, monkeypatch):
    import plot

    monkeypatch.setattr(plot, "COMPARED", "ppo_tbb, LRU, 2,000 steps")

    returns = {  # by seed
        ("ppo_tbb.py", "RepeatPreviousEasy", "none"): [-0.5, -0.5],
        ("ppo_tbb.py", "RepeatPreviousEasy", "lru"): [0.4, 0.6],
        ("ppo_tbb.py", "MineSweeperEasy", "lru"): [0.25, 0.25],
        ("dqn_tbb.py", "MineSweeperEasy", "lru mingru"): [0.75],
        ("dqn_tbb.py", "RepeatPreviousMedium", "lru mingru"): [0.0],
        ("experiments/recurrent_ppo.py", "RepeatPreviousEasy", ""): [0.9, 0.9],
    }
    with open(tmp_path / "popgym.csv", "w") as file:
        for (*key, memory), by_seed in returns.items():
            for seed, x in enumerate(by_seed, 1):
                columns = sweep.Run(*key, memory, seed=seed, total_timesteps=2000).columns
                steps = [columns | dict(step=1000 * k, seconds=25 * k, eval_return=x * (k - 1)) for k in (1, 2)]
                sweep.append(file, steps)
    page = tmp_path / "popgym.md"
    names = ("popgym", "popgym_one_cell", "popgym_aggregate")
    page.write_text("".join(f"<!-- table: {name} -->\n<!-- end -->\n" for name in names))
    plot.popgym(plot.runs_of(plot.read(tmp_path / "popgym.csv")), tmp_path)
    tables = []
    for table in page.read_text().split("<!-- end -->")[: len(names)]:
        header, _, *rows = ([x.strip() for x in line[1:-1].split("|")] for line in table.split("\n") if "|" in line)
        tables.append({row[0]: dict(zip(header, row)) for row in rows})
    stacks, one_cell, means = tables
    assert "ppo_tbb, LRU, 2,000 steps" not in stacks["RepeatPreviousEasy"]
    tasks = {task: one_cell[task] | stacks[task] for task in stacks}
    memories = ["ppo_tbb, LRU", "ppo_tbb, none", "dqn_tbb, LRU + minGRU", "recurrent_ppo, LSTM"]
    cell = lambda row, name: row[f"{name}, 2,000 steps"]
    assert list(tasks) == list(plot.POPGYM)
    solved, unpublished, unplayed = (tasks[f"{name}Easy"] for name in ("RepeatPrevious", "MineSweeper", "RepeatFirst"))
    found = ["0.50 [0.40, 0.60] in 50 s", "-0.50 [-0.50, -0.50] in 50 s", "", "0.90 [0.90, 0.90] in 50 s"]
    assert [cell(solved, name) for name in memories] == found
    best = ["1.000", "GRU (MMER, 3 trials)", "15,000,000", "-0.50"]
    assert [solved[name] for name in ("best published", "by", "after steps", "difference")] == best
    assert [cell(unpublished, name) for name in memories] == ["0.25 [0.25, 0.25] in 50 s", "", "0.75 in 50 s", ""]
    assert not unpublished["best published"] and not unpublished["difference"]
    assert not any(cell(unplayed, name) for name in memories)
    assert unplayed["best published"] == "1.000" and not unplayed["difference"]
    # ppo_tbb.py has played both of its tasks with the LRU only, the task of recurrent_ppo.py without memory as well
    shared = ("2 tasks of ppo_tbb", "1 tasks of recurrent_ppo", "2 tasks of dqn_tbb")
    by_ppo, by_sb3, by_dqn = ([means[f"{name}, 2,000 steps"][tasks] for name in memories] for tasks in shared)
    assert by_ppo == ["0.50 [0.50, 0.56]", "", "", ""]
    assert by_sb3 == ["0.67 [0.60, 0.73]", "0.00 [0.00, 0.00]", "", "0.93 [0.93, 0.93]"]
    assert by_dqn == ["", "", "0.57", ""]


def test_means_over_tasks_compare_whole_methods_only(sweep, tmp_path):
    """While a sweep goes on: TBB alone, then SBB with L = 10 on one of two tasks, then on both, and L = 20 on one."""
    import plot

    path, page = tmp_path / "sample_efficiency.csv", tmp_path / "README.md"

    def table(*added):
        with open(path, "a") as file:
            for script, task, length in added:
                columns = sweep.Run(script, task, "lru", length, total_timesteps=2000).columns
                sweep.append(file, [columns | dict(step=step, seconds=step, eval_return=0.5) for step in (1, 2000)])
        page.write_text("<!-- table: sample_efficiency -->\n<!-- end -->\n")
        plot.sample_efficiency(plot.runs_of(plot.read(path)), tmp_path)
        return page.read_text()

    easy, medium = "RepeatPreviousEasy", "RepeatPreviousMedium"
    assert "LRU" not in table((sweep.TBB, easy, ""), (sweep.TBB, medium, ""))
    assert "LRU" not in table((sweep.SBB, easy, 10))
    assert "| LRU | 0.67 | 0.67 (L = 10) | 0.67 (L = 10) |" in table((sweep.SBB, medium, 10), (sweep.SBB, easy, 20))


@pytest.mark.parametrize("rows", [0, 10])
def test_figures_of_few_results(rows, sweep, tmp_path, monkeypatch, capsys):
    """Of one run, or of none; or without a CSV."""
    import plot

    names, results = [*sweep.EXPERIMENTS, "padding"], tmp_path / "results"
    results.mkdir()
    for path in SWEEP.with_name("results").glob("*.csv"):
        (results / path.name).write_text("".join(path.read_text().splitlines(True)[: 1 + rows]))
    (results / "recall.csv").unlink()
    monkeypatch.setattr(sys, "argv", ["plot.py", *names, "--results", str(results)])
    plot.main()
    assert capsys.readouterr().out.count("no results yet") == (1 if rows else len(names))


def test_interquartile_mean_is_that_of_the_middle_half(sweep):
    import plot

    strata = [np.random.default_rng(seed).normal(seed, size=n) for seed, n in enumerate((3, 4, 1))]
    slow = np.mean(sorted(np.concatenate(strata))[2:6])
    assert plot.interval(*strata, statistic=plot.interquartile_mean)[0] == pytest.approx(slow)


def test_interval_is_that_of_a_mean_over_tasks(sweep):
    """Of so many seeds that their means are normally distributed; a task with more seeds weighs no more."""
    import plot

    strata = [np.random.default_rng(seed).normal(seed, size=n) for seed, n in enumerate((400, 900))]
    center, error = sum(x.mean() for x in strata) / 2, sum(x.var() / len(x) for x in strata) ** 0.5 / 2
    expected = [center, center - 1.96 * error, center + 1.96 * error]
    np.testing.assert_allclose(plot.interval(*strata), expected, rtol=0, atol=0.15 * error)
    np.testing.assert_allclose(plot.errors(*expected), 1.96 * error)
    np.testing.assert_allclose(plot.errors(5, 3, 6), [2, 1])


def test_seeds_that_not_all_tasks_have_do_not_count(sweep, tmp_path):
    """In the interquartile mean, to which one more seed of an easy task would add."""
    import plot

    with open(tmp_path / "popgym.csv", "w") as file:
        for task, seed, x in ("RepeatPreviousEasy", 1, 0.0), ("RepeatFirstEasy", 1, 0.0), ("RepeatFirstEasy", 2, 1.0):
            columns = sweep.Run("ppo_tbb.py", task, "lru", seed=seed, total_timesteps=2000).columns
            sweep.append(file, [columns | dict(step=step, seconds=1, eval_return=x) for step in (1, 2000)])
    page = tmp_path / "popgym.md"
    page.write_text("<!-- table: popgym_aggregate -->\n<!-- end -->\n")
    plot.popgym(plot.runs_of(plot.read(tmp_path / "popgym.csv")), tmp_path)
    low = [plot.POPGYM[task] for task in ("RepeatPreviousEasy", "RepeatFirstEasy")]
    expected = f"| ppo_tbb, LRU, 2,000 steps | {np.mean([-x / (1 - x) for x in low]):.2f} |"
    assert expected in page.read_text() and "Seeds 1." in page.read_text()


def test_control_has_an_aggregate_of_its_own(sweep, tmp_path):
    """Once a memory has played all its tasks; one that has played nothing else has no other."""
    import plot

    page, control = tmp_path / "popgym.md", [task for task in plot.POPGYM if "Only" in task]
    for played, shown in (control[1:], False), (control, True):
        with open(tmp_path / "popgym.csv", "w") as file:
            for task, memory in [(task, "mingru") for task in played] + [(task, "lru") for task in plot.POPGYM]:
                columns = sweep.Run("ppo_tbb.py", task, memory, total_timesteps=2000).columns
                x = 1.0 if memory == "mingru" else plot.POPGYM[task]
                sweep.append(file, [columns | dict(step=step, seconds=1, eval_return=x) for step in (1, 2000)])
        page.write_text("<!-- table: popgym_aggregate -->\n<!-- end -->\n")
        plot.popgym(plot.runs_of(plot.read(tmp_path / "popgym.csv")), tmp_path)
        assert "| method | 42 tasks of ppo_tbb | 15 tasks of control |" in page.read_text()
        assert "| ppo_tbb, LRU, 2,000 steps | 0.00 | 0.00 |" in page.read_text()
        assert ("| ppo_tbb, minGRU, 2,000 steps |  | 1.00 |" in page.read_text()) == shown


def test_best_and_worst_segment_length(sweep, tmp_path):
    """Larger batches stand beside them, and are not the best."""
    import plot

    returns = {("dqn_tbb.py", "", ""): 0.4, ("dqn_sbb.py", 10, ""): 0.1, ("dqn_sbb.py", 20, ""): 0.6}
    returns |= {("dqn_sbb.py", 20, "large_batch"): 0.7}  # at the end; 0 before
    with open(tmp_path / "sample_efficiency.csv", "w") as file:
        for (script, *how), x in returns.items():
            columns = sweep.Run(script, "RepeatPreviousEasy", "lru", *how, total_timesteps=2000).columns
            steps = [columns | dict(step=1000 * k, seconds=k, eval_return=x * (k - 1)) for k in (1, 2)]
            sweep.append(file, steps)
    page = tmp_path / "README.md"
    page.write_text("<!-- table: sample_efficiency -->\n<!-- end -->\n")
    plot.sample_efficiency(plot.runs_of(plot.read(tmp_path / "sample_efficiency.csv")), tmp_path)
    low = plot.POPGYM["RepeatPreviousEasy"]
    assert "| SBB, L = 20, batches of 1,000 |\n" in page.read_text()
    for name, scale in ("final return", 1), ("mean return over training", 0.5):
        tbb, worst, best, large = (f"{(scale * x - low) / (1 - low):.2f}" for x in returns.values())
        assert f"| {name} | LRU | {tbb} | {best} (L = 20) | {worst} (L = 10) | {large} |" in page.read_text()
    assert "Seeds 1.\n" in page.read_text()


def test_share_of_sensitivity_beyond_the_segment(sweep, tmp_path):
    """Of the last decision: ages 2 and more, where a segment has two steps."""
    import plot

    ages = {("dqn_tbb.py", ""): ["1 1 1 1", "4 2 1 1"], ("dqn_sbb.py", 2): ["1 1 1", "3 1"]}
    with open(tmp_path / "sensitivity.csv", "w") as file:
        for (script, length), by_step in ages.items():
            columns = sweep.Run(script, "RepeatFirstEasy", "lru", length, total_timesteps=2000).columns
            steps = [columns | dict(step=k, seconds=k, eval_return=0, sensitivity=x) for k, x in enumerate(by_step)]
            sweep.append(file, steps)
    page = tmp_path / "README.md"
    page.write_text("<!-- table: sensitivity -->\n<!-- end -->\n")
    plot.sensitivity(plot.runs_of(plot.read(tmp_path / "sensitivity.csv")), tmp_path)
    assert "| RepeatFirstEasy | LRU | 0.25 | 0.00 |" in page.read_text()


def test_curves_are_means_where_all_seeds_have_been(sweep):
    import plot

    steps, returns = ([0, 20, 40], [10, 30]), ([0, 2, 0], [4, 8])
    runs = [dict(task="a", label="b", step=np.array(x), eval_return=np.array(y)) for x, y in zip(steps, returns)]
    (ax,) = plot.curves(runs, "step", "steps", "label").axes
    x, y = ax.lines[0].get_data()
    assert (x[0], x[-1]) == (10, 30)
    np.testing.assert_allclose(y, (np.interp(x, *zip((10, 1), (20, 2), (30, 1))) + 4 + (x - 10) / 5) / 2)


def test_batch_statistics_of_padding(sweep):
    """Without padding it changes nothing; zeros in half of a batch halve the mean of a one-hot feature."""
    import plot

    np.testing.assert_allclose(plot.batch_statistics("RepeatPreviousEasy", 51), (0, 1), atol=1e-6)  # an episode's steps
    half = [0.125 / (0.25 * 0.75) ** 0.5, (0.125 * 0.875 / (0.25 * 0.75)) ** 0.5]  # one of four suits
    np.testing.assert_allclose(plot.batch_statistics("RepeatPreviousEasy", 102), half, rtol=0.1)


def test_tables_of_the_pages_are_those_of_the_results(sweep, tmp_path, monkeypatch):
    """As plot.py writes them from the CSVs beside them, without drawing figures."""
    import plot

    (folder := tmp_path / "experiments").mkdir()
    shutil.copytree(SWEEP.with_name("results"), folder / "results")
    pages = {SWEEP.with_name(name): folder / name for name in ("README.md", "popgym.md", "sac.md")}
    pages[ROOT / "README.md"] = tmp_path / "README.md"
    for page, copied in pages.items():  # without their tables
        text = re.sub("(<!-- table: .*?-->\n).*?(<!-- end -->)", r"\1\2", page.read_text(), flags=re.DOTALL)
        copied.write_text(text)
    monkeypatch.setattr(plot, "save", lambda figure, *_: plot.plt.close(figure))
    monkeypatch.setattr(plot, "batch_statistics", lambda *_: (0, 0))  # in a figure only
    monkeypatch.setattr(sys, "argv", ["plot.py", "--results", str(folder / "results")])
    plot.main()
    for page, copied in pages.items():
        assert copied.read_text() == page.read_text(), page


def test_tables_of_the_benchmarks_are_those_of_their_csvs(tmp_path):
    folder = shutil.copytree(ROOT / "benchmarks", tmp_path / "benchmarks")
    page = (folder / "README.md").read_text()
    text = re.sub("(<!-- table: .*?-->\n).*?(<!-- end -->)", r"\1\2", page, flags=re.DOTALL)
    (folder / "README.md").write_text(text)
    subprocess.run([sys.executable, folder / "tables.py"], check=True)
    assert text != page == (folder / "README.md").read_text()


def test_a_killed_sweep_resumes(smoke, tmp_path):
    path = tmp_path / "sensitivity.csv"
    with start(tmp_path, "sensitivity", "--jobs", "1") as life:
        # the first run's rows are written, and the second is played
        while not (path.exists() and path.read_text().endswith("\n") and played_by(life.pid)):
            assert life.poll() is None
            time.sleep(0.01)
        orphans = played_by(life.pid)
        life.kill()
    for pid in orphans:
        os.kill(int(pid), signal.SIGKILL)
    first = path.read_text()
    assert len({row["run"] for row in rows_of(path)}) == 1
    # as if it had been killed in the middle of writing the second
    second = [row for row in rows_of(smoke / path.name) if row["run"] not in first][0]
    header = first.splitlines(True)[0]  # once more, as if another CSV had been appended
    path.write_text(first + header + ",".join(list(second.values())[:-1]) + "\n" + ",".join(second.values())[:70])
    assert start(tmp_path, "sensitivity", "--jobs", "1").wait() == 0
    assert path.read_text().startswith(first)
    assert by_run(path) == by_run(smoke / path.name)
    whole, changed = path.read_text(), path.stat().st_mtime_ns
    assert start(tmp_path, "sensitivity").wait() == 0
    assert path.read_text() == whole and path.stat().st_mtime_ns == changed


@pytest.mark.parametrize("number", [*SIGNALS, signal.SIGHUP])
def test_a_signal_ends_the_sweep_and_its_runs(number, sweep, tmp_path):
    handler = signal.signal(signal.SIGHUP, signal.SIG_DFL)  # it would stay ignored if pytest was started with nohup
    with start(tmp_path, "sensitivity", "--jobs", "2", stderr=subprocess.PIPE) as life:
        while len(played_by(life.pid)) < 2:
            assert life.poll() is None
            time.sleep(0.01)
        children = played_by(life.pid)
        signal.signal(signal.SIGHUP, handler)
        try:
            for pid in children:
                os.kill(int(pid), signal.SIGSTOP)  # they will never end by themselves
            life.send_signal(number)
            _, err = life.communicate(timeout=600)
        finally:
            for pid in children:
                if Path(f"/proc/{pid}").exists():
                    os.kill(int(pid), signal.SIGKILL)
                    life.kill()
    assert life.returncode == 128 + number and b"same command goes on" in err and b"Traceback" not in err
    assert not list(tmp_path.iterdir())


def test_a_failed_run_is_reported_and_stops_nothing(sweep, tmp_path, monkeypatch):
    tasks = {"RepeatPreviusEasy": 600, "RepeatPreviousEasy": 600}
    table = {"both": [dict(script=[sweep.TBB], task=tasks, memory=["lru"], flags=sweep.SMOKE_MORE[sweep.TBB])]}
    monkeypatch.setattr(sweep, "EXPERIMENTS", table)
    monkeypatch.setattr(sys, "argv", ["sweep.py", "both", "--seeds", "1", "--results", str(tmp_path)])
    monkeypatch.setattr(signal, "signal", lambda *_: None)  # the handlers of pytest stay
    with pytest.raises(SystemExit) as stop:
        sweep.main()
    assert str(stop.value.code).startswith("1 failed:\ndqn_tbb RepeatPreviusEasy lru")  # a string is exit status 1
    assert "Did you mean: `popgym-RepeatPreviousEasy`" in stop.value.code
    assert {row["env_id"] for row in rows_of(tmp_path / "both.csv")} == {"popgym-RepeatPreviousEasy-v0"}


def test_results_are_those_of_the_table(sweep):
    """The CSVs have no run that a sweep would not play, and its columns are those that a sweep would write."""
    for name in sweep.EXPERIMENTS:
        rows = rows_of(SWEEP.with_name("results") / f"{name}.csv")
        runs = {run.key: run for run in sweep.runs_of(name, {int(row["seed"]) for row in rows})}
        for row in rows:
            columns = runs[row["run"]].columns
            assert {column: row[column] for column in columns} == {column: str(x) for column, x in columns.items()}


def test_command_has_all_that_tells_a_run_from_others(sweep):
    run = sweep.Run(sweep.SBB, "RepeatPreviousEasy", "lru mingru", 20, "burn_in", 3, 1000, ("--d-model", "64"))
    expected = "--env-id popgym-RepeatPreviousEasy-v0 --seed 3 --total-timesteps 1000 --eval-frequency 100"
    expected += " --memory lru mingru --segment-length 20 --burn-in 10 --d-model 64"
    assert sweep.command(run) == expected.split()
    changed = [("script", "x"), ("task", "x"), ("memory", "x"), ("segment_length", 0), ("variant", "x"), ("seed", 0)]
    changed += [("total_timesteps", 0), ("flags", ())]
    assert len({run.key, *(run._replace(**{name: x}).key for name, x in changed)}) == 9


def test_a_row_has_the_means_since_the_evaluation_before(sweep, tmp_path, monkeypatch):
    now = [1000.0]
    monkeypatch.setattr(time, "time", lambda: now[0])
    with SummaryWriter(tmp_path) as writer:
        for step, x in (10, 1), (20, 3), (30, 5):
            now[0] = 1000 + step
            writer.add_scalar("losses/td_loss", x, step)
            if step > 10:
                writer.add_scalar("charts/eval_return", x / 4, step)
    rows = sweep.read_log(sweep.Run(sweep.TBB, "RepeatPreviousEasy"), tmp_path)
    found = [[row[name] for name in ("step", "seconds", "eval_return", "td_loss", "sensitivity")] for row in rows]
    assert found == [[20, "20.0", "0.75", "2", ""], [30, "30.0", "1.25", "5", ""]]


def test_a_run_that_two_experiments_share_is_played_once(sweep, tmp_path, monkeypatch):
    """But wall_clock plays all of its own; --tasks leaves out the others."""
    played = []

    def here(runs, *_):
        for run in runs:
            played.append(run)
            yield run, [run.columns | {"step": run.total_timesteps}]

    def runs_of(name):
        played.clear()
        argv = ["sweep.py", name, "--seeds", "1", "--tasks", "RepeatPreviousMedium", "--results", str(tmp_path)]
        monkeypatch.setattr(sys, "argv", argv)
        sweep.main()
        assert {run.task for run in played} <= {"RepeatPreviousMedium"}
        return len(played), len(rows_of(tmp_path / f"{name}.csv"))

    monkeypatch.setattr(sweep, "here", here)
    monkeypatch.setattr(signal, "signal", lambda *_: None)  # the handlers of pytest stay
    assert [runs_of(name) for name in ("sample_efficiency", "ablations", "wall_clock")] == [(24, 24), (5, 7), (6, 6)]
    assert [runs_of(name) for name in ("sample_efficiency", "ablations", "wall_clock")] == [(0, 24), (0, 7), (0, 6)]
    path = tmp_path / "ablations.csv"
    whole = path.read_text()
    path.write_text(f"{whole}cut off")
    runs_of("wall_clock")  # mends its own CSV only: another sweep may be writing the others
    assert path.read_text() == f"{whole}cut off"
    runs_of("ablations")
    assert path.read_text() == whole


@pytest.mark.parametrize("wrong", ["--tasks RepeatPreviusMedium", "--jobs 0"])
def test_wrong_arguments_of_a_sweep_are_refused(wrong, sweep, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["sweep.py", "wall_clock", *wrong.split(), "--results", str(tmp_path / "new")])
    monkeypatch.setattr(sweep, "here", None)
    with pytest.raises(SystemExit) as stop:
        sweep.main()
    assert stop.value.code == 2 and wrong.split()[0] in capsys.readouterr().err and not [*tmp_path.iterdir()]


def test_smoke_tests_leave_the_results_alone(sweep, tmp_path, monkeypatch):
    """A handler that nohup has set stays too."""
    handled = []
    monkeypatch.setattr(signal, "signal", lambda number, _: handled.append(number))
    monkeypatch.setattr(signal, "getsignal", lambda _: signal.SIG_IGN)
    monkeypatch.setattr(sweep, "here", lambda *_: (x for x in ()))
    monkeypatch.setattr(sweep, "ROOT", tmp_path)
    for more, made in (["--smoke"], False), ([], True):
        monkeypatch.setattr(sys, "argv", ["sweep.py", "wall_clock", *more])
        sweep.main()
        assert (tmp_path / "experiments" / "results").exists() == made
    assert {*handled} == {signal.SIGINT, signal.SIGTERM}


def test_two_ray_nodes_give_the_results_of_this_machine(smoke, tmp_path):
    pytest.importorskip("ray")
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    try:
        cluster.add_node(num_cpus=1)
        assert start(tmp_path, "sensitivity", "--ray", cluster.address).wait() == 0
    finally:
        cluster.shutdown()
    assert by_run(tmp_path / "sensitivity.csv") == by_run(smoke / "sensitivity.csv")
