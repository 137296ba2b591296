"""recipes/: every patch applies to the scripts, and does what recipes/README.md says of it."""

import copy
import importlib.util
import multiprocessing
import os
import random
import re
import shutil
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

import gymnasium as gym
import helpers
import numpy as np
import pytest
import torch
from gymnasium.spaces import Box, Discrete
from helpers import Lengths, assert_refused, checkpoint_of, flags, load, outcome

import dqn_tbb
import monoids
import ppo_tbb
import sac_tbb

ROOT = Path(__file__).parent.parent
RECIPES = ROOT / "recipes"
sys.path.insert(0, str(RECIPES))

import environments  # noqa: E402

play, trained = helpers.play, helpers.trained
MISSING = "pip install -r recipes/requirements.txt"


def load_module(path, recipe):
    spec = importlib.util.spec_from_file_location(f"{recipe}_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def patched(tmp_path_factory):
    """The scripts that a recipe changes, as modules."""

    def patched(recipe):
        folder = tmp_path_factory.mktemp(recipe)
        return [load_module(path, recipe) for path in environments.apply(recipe, folder)]

    return patched


def make(module, **kwargs):
    """(envs, network, act): as a script makes them; act plays at random, as its training does at first."""
    args = module.Args(**{"env_id": "Lengths-v0", "num_envs": 3, "d_model": 16, **kwargs})
    envs = module.make_envs(args, args.num_envs)
    torch.manual_seed(0)
    if hasattr(module, "Agent"):
        return args, envs, module.Agent(envs, args), partial(module.policy, greedy=False)
    return args, envs, module.QNetwork(envs, args), partial(module.policy, epsilon=0.5)


def apply_async_envs(script, folder):
    """To the copy of a script in a folder, as the page says."""
    patch = RECIPES.joinpath("async_envs.patch").read_text().replace("dqn_tbb", script)
    env = os.environ | {"GIT_CEILING_DIRECTORIES": str(folder.parent)}  # else git may skip the file
    subprocess.run(["git", "apply"], input=patch, text=True, cwd=folder, env=env, check=True)


def rows_of(module, episodes):
    return module.Rows(*(torch.as_tensor(np.concatenate(x))[:, None] for x in zip(*episodes)))


def test_a_recipe_is_short_and_explained():
    names = {path.stem for path in RECIPES.glob("*.patch")}
    assert names == {"pixels", "action_mask", "data_parallel", "async_envs", "export"}
    page = RECIPES.joinpath("README.md").read_text()
    for name in names:
        patch = RECIPES.joinpath(f"{name}.patch").read_text()
        assert len(re.findall(r"^[+-](?!\+\+|--)", patch, re.M)) <= 60, name
        assert f"git apply recipes/{name}.patch" in page


# ---------------------------------------------------------------------------------------------------------------------
# pixels


class Pictures(gym.Env):
    """Episodes of n steps; every pixel of an observation is a function of the step and of where it is."""

    observation_space, action_space = Box(0, 255, (20, 24, 3), np.uint8), Discrete(3)
    n = 9

    def observe(self):
        return ((np.arange(20 * 24 * 3) * 7 + 50 * self.steps) % 256).astype(np.uint8).reshape(20, 24, 3)

    def reset(self, *, seed=None, options=None):
        self.steps = 0
        return self.observe(), {}

    def step(self, action):
        self.steps += 1
        return self.observe(), float(action == self.steps % 3), self.steps == self.n, False, {}


gym.register("Pictures-v0", Pictures)


def test_pixels_stay_uint8(patched):
    (module,) = patched("pixels")
    args, envs, network, act = make(module, env_id="Pictures-v0", buffer_size=25)
    episodes = module.collect(envs, network, act, (1, 0))
    env = Pictures()
    for env.steps, image in enumerate(episodes[0].obs):
        assert image.dtype == np.uint8 and (image == env.observe()).all()
    tape = module.Tape(args, envs, "cpu")
    for episode in episodes:
        tape.add(episode)
    rows, _ = tape.sample(5, np.random.default_rng(0))
    for images in (tape.rows.obs, rows.obs, tape.state_dict()["rows"][0]):
        assert images.dtype == torch.uint8
    assert (rows.obs[:10, 0].numpy() == episodes[0].obs).all()


def test_pixels_are_encoded_the_same_while_playing_and_over_the_tape(patched):
    (module,) = patched("pixels")
    _, envs, network, act = make(module, env_id="Pictures-v0")
    torch.nn.init.normal_(network.head[-1].weight)
    rows = rows_of(module, module.collect(envs, network, act, (1, 0)))
    inputs = rows.obs, rows.action.roll(1, 0), rows.start
    encoded = []
    network.encoder.register_forward_pre_hook(lambda _, args: encoded.append(args[0]))
    with torch.no_grad():
        q, _ = network(*inputs, network.memory.initial_state(1))
        image = encoded[0][..., : -network.num_actions]  # the rest is the previous action
        torch.testing.assert_close(image.var(-1, correction=0), torch.ones_like(q[..., 0]), rtol=0.1, atol=0)
        state = network.memory.initial_state(1)
        for t in range(len(rows.start)):
            one, state = network(*(x[t : t + 1] for x in inputs), state)
            torch.testing.assert_close(one[0], q[t], rtol=1e-4, atol=1e-5)
        blank = network(torch.zeros_like(rows.obs), *inputs[1:], network.memory.initial_state(1))[0]
    assert (q - blank).abs().max() > 1e-2  # the network sees them


def test_pixels_trains(patched, play, tmp_path):
    (module,) = patched("pixels")
    assert play(module, *flags(dqn_tbb, "--env-id", "Pictures-v0"))[0] == 0
    assert load(checkpoint_of(tmp_path))["learners"]["buffer"]["rows"][0].dtype == torch.uint8
    assert_refused(play(module, "--env-id", "CartPole-v1"), "observations are not images")


def test_tasks_are_images_of_the_size_they_say():
    for package in ("minigrid", "ale_py"):
        pytest.importorskip(package, reason=MISSING)
    for env_id in ("ImageMemory-v0", "FlickerBreakout-v0"):
        env = gym.make(f"tasks:{env_id}")
        first, _ = env.reset(seed=1)
        again, _ = env.reset(seed=1)
        assert (first == again).all()
        for action in [0, 1, 2] * 30:
            obs, _, terminated, truncated, _ = env.step(action)
            assert env.observation_space.contains(obs)
            if terminated or truncated:
                env.reset()
    assert gym.make("tasks:ImageMemory-v0").action_space == Discrete(3)
    obs, _ = env.reset(seed=1)  # of Breakout: one life, of frames half of which are black
    black, over = [not obs.any()], False
    while not over:
        obs, _, terminated, truncated, _ = env.step(0)  # the ball flies without FIRE, and is lost
        black.append(not obs.any())
        over = terminated or truncated
    assert terminated and env.unwrapped.ale.lives() == 4 and 0.3 < np.mean(black) < 0.7
    for env_id in [env_id for env_id in gym.registry if env_id.startswith("ALE/")]:
        del gym.registry[env_id]  # as other tests expect it


# ---------------------------------------------------------------------------------------------------------------------
# action_mask


class Masked(gym.Env):
    """Of four actions, two are allowed; in the terminal state none, nor where episodes of four steps are truncated."""

    observation_space, action_space = Box(0, 9, (1,)), Discrete(4, start=2)

    def observe(self, over=False):
        self.mask = np.zeros(4, dtype=np.int8)
        if not over:
            self.mask[self.np_random.choice(4, 2, replace=False)] = 1
        return np.float32([self.steps]), {"action_mask": self.mask}

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.steps, self.length = 0, int(self.np_random.integers(1, 7))
        return self.observe()

    def step(self, action):
        assert self.mask[action - 2], "a masked action was taken"
        self.steps += 1
        terminated, truncated = ((self.steps == self.length) & (self.length % 2 == i) for i in (1, 0))
        obs, info = self.observe(over=terminated or truncated and self.steps == 4)
        return obs, 1.0, terminated, truncated, info


gym.register("Masked-v0", Masked)


@pytest.mark.parametrize("which", [0, 1], ids=["dqn_tbb", "ppo_tbb"])
def test_masked_actions_are_never_taken(which, patched, play, tmp_path):
    """Not while exploring, greedily, or where an environment waits for the longest episode; the others are."""
    module = patched("action_mask")[which]
    _, envs, network, _ = make(module, env_id="Masked-v0", num_envs=100)
    act = partial(module.policy, **({"greedy": False} if which else {"epsilon": 1.0}))
    rows = rows_of(module, module.collect(envs, network, act, (1, 0)))
    t = ppo_tbb.transitions(rows)
    mask, action = rows.obs[t, 0, -4:], rows.action[t].reshape(-1, 1)
    assert (mask.sum(-1) == 2).all() and (mask.gather(-1, action) == 1).all()
    for a in range(4):  # both allowed actions are tried as often
        assert ((action == a).sum() / (mask[:, a] == 1).sum()).item() == pytest.approx(0.5, abs=0.25)
    assert play(module, *flags([dqn_tbb, ppo_tbb][which], "--env-id", "Masked-v0"))[0] == 0
    assert_refused(play(module, "--env-id", "CartPole-v1"), "CartPole-v1", "action_mask")


def test_last_rows_hold_zeros_though_actions_are_masked(patched):
    for module, kwargs in zip(patched("action_mask"), ({"epsilon": 1.0}, {"greedy": False})):
        _, envs, network, _ = make(module, env_id="Masked-v0", num_envs=20)
        episodes = module.collect(envs, network, partial(module.policy, **kwargs), (1, 0))
        assert not any(e.action[-1].any() for e in episodes) and any(e.action[:-1].any() for e in episodes)


def test_mask_of_another_size_is_refused(patched, play, monkeypatch):
    monkeypatch.setattr(Masked, "action_space", Discrete(5, start=2))
    for module in patched("action_mask"):
        assert_refused(play(module, "--env-id", "Masked-v0"), "not an array of 5 numbers")


def test_masked_actions_are_not_bootstrapped_from(patched):
    """Double DQN's target against a loop that knows the masks, where a masked action has the largest value."""
    module, _ = patched("action_mask")
    args, envs, network, act = make(module, env_id="Masked-v0", num_envs=20)
    rows = rows_of(module, module.collect(envs, network, act, (1, 0)))
    torch.nn.init.normal_(network.head[-1].weight, 0, 2)
    (target := copy.deepcopy(network)).head[-1].bias.data += torch.randn(5)
    t = ppo_tbb.transitions(rows)
    inputs = rows.obs, rows.action.roll(1, 0), rows.start, network.memory.initial_state(1)
    with torch.no_grad():
        q, q_target = (net(*inputs)[0][:, 0].double() for net in (network, target))
    assert (q[t].min(-1).values == -1e9).all() and (q.max(-1).values.abs() < 1e3).all()
    loss = 0.0
    for i in t.tolist():
        allowed = rows.obs[i + 1, 0, -4:].nonzero().flatten().tolist() or range(4)
        best = max(allowed, key=lambda a: q[i + 1, a].item())
        next_value = 0 if rows.terminated[i] else q_target[i + 1, best].item()
        error = abs(rows.reward[i].item() + args.gamma * next_value - q[i, rows.action[i]].item())
        loss += (0.5 * error**2 if error < 1 else error - 0.5) / len(t)
    optimizer = torch.optim.SGD(network.parameters(), 0.0)
    assert module.update(network, target, optimizer, (rows, t), args)["losses/td_loss"].item() == pytest.approx(loss)


def test_masked_actions_have_probability_0_in_ppo(patched):
    _, module = patched("action_mask")
    args, envs, agent, act = make(module, env_id="Masked-v0", num_envs=20)
    rows = rows_of(module, module.collect(envs, agent, act, (1, 0)))
    torch.nn.init.normal_(agent.actor[-1].weight)
    t = ppo_tbb.transitions(rows)
    (dist,), logprob, _ = module.forward_tape(agent, rows)
    assert (dist.probs[t, 0][rows.obs[t, 0, -4:] == 0] == 0).all() and logprob[t].isfinite().all()
    assert (dist.entropy()[t] <= np.log(2) + 1e-6).all()
    batch, optimizer = module.compute_advantages(agent, rows, args), torch.optim.SGD(agent.parameters(), 0.0)
    metrics = module.update(agent, optimizer, batch, args)  # fails where the gradient is not finite
    assert abs(metrics["losses/approx_kl"]) < 1e-6


def test_mask_of_zeros_has_no_effect(patched):
    """With equal values or probabilities for all actions, nothing could be learned."""
    for module in patched("action_mask"):
        _, envs, network, _ = make(module, env_id="Masked-v0")
        head = network.head if hasattr(network, "head") else network.actor
        torch.nn.init.normal_(head[-1].weight)
        obs, start = torch.zeros(1, 1, 5), torch.ones(1, 1, dtype=torch.bool)
        action = torch.zeros(1, 1, *envs.single_action_space.shape, dtype=torch.long)
        out, *_ = network(obs, action, start, network.memory.initial_state(1))
        values = out[0].logits if isinstance(out, list) else out
        assert values.min() > -100 and len(values.unique()) == 4


# ---------------------------------------------------------------------------------------------------------------------
# data_parallel

UPDATES = 3


def agent_and_batch(module, ranks):
    """The agent of seed 0, and one batch of what the processes of these ranks play, in float64."""
    args, envs, agent, act = make(module, num_envs=4, max_grad_norm=0.01)
    episodes = [e for rank in ranks for e in module.collect(envs, agent, act, (1, 0, 0, rank))]
    rows = rows_of(module, episodes)
    rows = rows._replace(obs=rows.obs.double(), reward=rows.reward.double())
    return args, agent.double(), module.compute_advantages(agent, rows, args)


def gradients(module, args, agent, batch):
    """Of each update; the last entry is its approx_kl."""
    optimizer, grads = torch.optim.SGD(agent.parameters(), lr=1.0), []
    for _ in range(UPDATES):
        kl = module.update(agent, optimizer, batch, args)["losses/approx_kl"]
        grads.append([p.grad.clone() for p in agent.parameters() if p.grad is not None] + [kl])
    return grads


def process_of(rank, path, folder):
    torch.set_num_threads(1)
    module = load_module(path, "data_parallel")
    torch.distributed.init_process_group("gloo", f"file://{folder}/rendezvous", rank=rank, world_size=2)
    args, agent, batch = agent_and_batch(module, [rank])
    grads = gradients(module, args, agent, batch)
    torch.save((grads, len(module.transitions(batch[0]))), folder / f"{rank}.pt")


def test_two_processes_have_the_gradients_of_one(tmp_path):
    (path,) = environments.apply("data_parallel", tmp_path)
    context = multiprocessing.get_context("forkserver" if torch.cuda.is_available() else "fork")  # the latter is faster
    processes = [context.Process(target=process_of, args=(rank, path, tmp_path)) for rank in (0, 1)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
        assert process.exitcode == 0
    (a, n_a), (b, n_b) = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    expected = gradients(ppo_tbb, *agent_and_batch(ppo_tbb, [0, 1]))
    assert n_a != n_b
    for step in range(UPDATES):
        for x, y, z in zip(a[step], b[step], expected[step], strict=True):
            assert torch.equal(x, y)
            torch.testing.assert_close(x, z, rtol=1e-6, atol=1e-9)


def test_torchrun_of_two_processes_is_one_run(tmp_path):
    """With the same weights at its end, though `async_envs` seeds torch's generator in each process."""
    (path,) = environments.apply("data_parallel", tmp_path)
    apply_async_envs("ppo_tbb", tmp_path)
    path.write_text(path.read_text() + '    torch.save(agent.state_dict(), f"{rank}.pt")\n')
    argv = flags(ppo_tbb, "--env-id", "CartPole-v1", "--target-kl", 0.02)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", path, *argv]
    env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    run = subprocess.run([*map(str, command)], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert run.stdout.count("final: ") == 1
    _, global_step, *_ = load(checkpoint_of(tmp_path))["counters"]
    assert global_step >= helpers.TOTAL and f"global_step={global_step} " in run.stdout
    assert len([*tmp_path.glob("runs/*")]) == 1  # one process logs
    steps = [step for step, _ in helpers.scalars(tmp_path)["charts/SPS"]]
    assert (np.diff(steps, prepend=0) % 2).any()  # the other plays other episodes
    a, b = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    assert all(torch.equal(a[name], b[name]) for name in a)


# ---------------------------------------------------------------------------------------------------------------------
# async_envs


def test_environments_play_in_processes_of_their_own(patched, monkeypatch):
    """The same episodes as in this process; Ctrl-C, which reaches all processes of a terminal, does not end them."""
    (module,) = patched("async_envs")
    _, envs, network, act = make(module)
    pids = [process.pid for process in envs.processes]
    assert len({*pids, os.getpid()}) == 4
    for pid in pids:
        os.kill(pid, signal.SIGINT)
    here = make(dqn_tbb)
    for a, b in zip(module.collect(envs, network, act, (1, 0)), dqn_tbb.collect(*here[1:], (1, 0)), strict=True):
        for x, y in zip(a, b):
            np.testing.assert_array_equal(x, y)
    envs.close()


def test_episodes_in_processes_are_a_function_of_the_seed(patched, monkeypatch):
    """Whatever generator of its process an environment uses. In their constructors no two draw the same."""
    noise = lambda *_: np.array([random.random() + np.random.rand(), torch.rand(()).item()], dtype=np.float32)
    monkeypatch.setattr(Lengths, "__init__", lambda env, **_: setattr(env, "offset", noise()))
    monkeypatch.setattr(Lengths, "observe", noise)
    (module,) = patched("async_envs")
    _, envs, network, act = make(module)
    assert all(len({*x}) == 3 for x in np.transpose(envs.get_attr("offset")))
    a, b = (module.collect(envs, network, act, (1, 0)) for _ in range(2))
    envs.close()
    for x, y in zip(sum(a, ()), sum(b, ()), strict=True):
        np.testing.assert_array_equal(x, y)


def test_async_envs_leave_the_handler_of_ctrl_c(patched):
    (module,) = patched("async_envs")
    before = signal.getsignal(signal.SIGINT)
    make(module)[1].close()
    assert signal.getsignal(signal.SIGINT) == before


def test_async_envs_same_seed_same_run(patched, play, tmp_path, monkeypatch):
    """Even where an environment draws from global generators, which each process has for itself, in its constructor."""
    noise = lambda *_: np.array([random.random() + np.random.rand(), torch.rand(()).item()], dtype=np.float32)
    monkeypatch.setattr(Lengths, "__init__", lambda env, **_: setattr(env, "offset", noise()))
    monkeypatch.setattr(Lengths, "observe", lambda env: env.offset)
    (module,) = patched("async_envs")
    for folder in "ab":
        assert play(module, *flags(dqn_tbb, "--eval-episodes", 2), folder=folder)[0] == 0
    assert outcome(checkpoint_of(tmp_path / "a")) == outcome(checkpoint_of(tmp_path / "b"))
    assert_refused(play(module, "--env-id", "CartPol-v1"), "CartPole")


# ---------------------------------------------------------------------------------------------------------------------
# export


def test_exported_policy_takes_the_same_actions(patched, tmp_path):
    """Step by step in ONNX Runtime, with states that it returned itself; a second episode begins in the middle."""
    onnxruntime = pytest.importorskip("onnxruntime", reason=MISSING)
    (module,) = patched("export")
    _, envs, network, _ = make(module, memory=("lru", "mingru"))
    torch.nn.init.normal_(network.head[-1].weight)
    module.export(network, envs, tmp_path / "policy.onnx")
    policy, state = onnxruntime.InferenceSession(tmp_path / "policy.onnx"), network.memory.initial_state(1)
    onnx_state = {i.name: np.ones(i.shape, dtype=np.float32) for i in policy.get_inputs() if "state" in i.name}
    rng, action, actions = np.random.default_rng(0), np.zeros(1, dtype=np.int64), set()
    for step in range(40):
        obs, start = rng.normal(size=(1, 2)).astype(np.float32), np.array([step in (0, 20)])
        with torch.no_grad():
            inputs = (torch.as_tensor(x)[None] for x in (obs, action, start))
            expected, state = module.policy(network, *inputs, state, epsilon=0.0)
        action, *states = policy.run(None, {"obs": obs, "previous_action": action, "start": start} | onnx_state)
        onnx_state = dict(zip(onnx_state, states))
        assert action == expected.numpy()
        for x, y in zip(states, state, strict=True):
            np.testing.assert_allclose(x, torch.view_as_real(y) if y.is_complex() else y, rtol=1e-3, atol=1e-4)
        actions.add(action.item())
    assert len(actions) > 1


def test_export_of_a_checkpoint(patched, play, tmp_path):
    pytest.importorskip("onnxscript", reason=MISSING)
    (module,) = patched("export")
    play(module, *flags(dqn_tbb, "--memory", "none"))
    path = checkpoint_of(tmp_path)
    assert play(module, "--evaluate", path, "--export", "policy.onnx")[0] == 0 and (tmp_path / "policy.onnx").exists()
    assert play(dqn_tbb, "--evaluate", path)[0] == 0  # without the patch
    assert_refused(play(module, *flags(dqn_tbb, "--export", "policy.onnx")), "--evaluate")
    for memory in ("gru", "s5"):
        argv = "--evaluate", path, "--export", "x.onnx", "--memory", memory
        assert_refused(play(module, *argv), "lru, mingru and none")


# ---------------------------------------------------------------------------------------------------------------------
# Other people's environments


def test_table_of_environments_is_what_comes_out(tmp_path):
    for package in ("minigrid", "ale_py", "mujoco", "Box2D"):
        pytest.importorskip(package, reason=MISSING)
    page = RECIPES / "README.md"
    copy = Path(shutil.copy(page, tmp_path))
    subprocess.run([sys.executable, RECIPES / "environments.py", copy], check=True)
    assert copy.read_text() == page.read_text()
    assert "Traceback" not in page.read_text() and page.read_text().count("| accepted") > 30


MODULES = [(".", "my_module", "MyEnv-v0", dqn_tbb), ("recipes", "my_minigrid", "Memory-v0", dqn_tbb)]
MODULES += [("recipes", "my_pendulum", "Scaled-v0", sac_tbb)]


@pytest.mark.parametrize("page, module, env_id, script", MODULES)
def test_environments_of_the_pages(page, module, env_id, script, play, tmp_path, monkeypatch):
    """The code that a README shows, as it says where to write it and how to run it."""
    text = ROOT.joinpath(page, "README.md").read_text()
    code = re.search(r"```python\n(.*?)```", text.split(module, 1)[1], re.S).group(1)
    if module == "my_minigrid":
        pytest.importorskip("minigrid", reason=MISSING)
    (tmp_path / f"{module}.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    assert f"--env-id {module}:{env_id}" in " ".join(text.split())
    argv = ["--env-id", f"{module}:{env_id}", "--max-episode-steps", 20]
    status, out, err = play(script, *flags(script, *argv))
    assert (status, err) == (0, "") and "final: " in out


def test_info_of_changing_shapes_is_left_out(play, monkeypatch):
    """By the page's wrapper, without which the run ends in an exception of Gymnasium."""
    page = RECIPES.joinpath("README.md").read_text()
    code = re.search(r"```python\n([^`]*class NoInfo.*?)```", page, re.S)[1]
    exec(code, names := {})
    trouble = lambda obs, *rest: (obs, *rest[:-1], {"legal": np.arange(2 + obs[0])})
    monkeypatch.setattr(Lengths, "trouble", staticmethod(trouble))
    gym.register("NoInfo-v0", lambda: names["NoInfo"](Lengths()))
    assert play(dqn_tbb, *flags(dqn_tbb, "--env-id", "NoInfo-v0"))[0] == 0
    with pytest.raises(ValueError, match="shape"):
        play(dqn_tbb, *flags(dqn_tbb))


def test_a_memory_of_your_own():
    """The cell on the page against a loop, with resets, and one row at a time."""
    code = re.search(r"```python\n(class EMACell.*?)```", RECIPES.joinpath("README.md").read_text(), re.S)[1]
    exec(code, names := dict(vars(monoids)))
    torch.manual_seed(0)
    memory = monoids.Memory(8, [names["EMACell"](8, d_state=5)]).double()
    (cell,), x, start = memory.cells, torch.randn(9, 2, 8).double(), torch.rand(9, 2) < 0.3
    a, h, slow = cell.rate.sigmoid(), torch.zeros(2, 5).double(), []
    for row, begins in zip(x, start):
        h = torch.where(begins[:, None], 0, h) * a + (1 - a) * cell.input(row)
        slow.append(cell.output(h))
    torch.testing.assert_close(cell(x, cell.initial_state(2), start)[0], torch.stack(slow))
    y, state, rows = memory(x, memory.initial_state(2), start)[0], memory.initial_state(2), []
    for t in range(9):
        row, state = memory(x[t : t + 1], state, start[t : t + 1])
        rows.append(row)
    torch.testing.assert_close(y, torch.cat(rows))


@pytest.mark.parametrize("script", ["dqn_sbb", "ppo_tbb", "sac_tbb"])
def test_async_envs_fits_every_script(script, tmp_path):
    shutil.copy(ROOT / f"{script}.py", tmp_path)
    apply_async_envs(script, tmp_path)
    assert "AsyncVectorEnv" in tmp_path.joinpath(f"{script}.py").read_text()


@pytest.mark.parametrize("skipped", ["pixels", "action_mask"])
def test_recipes_combine(skipped, tmp_path):
    for script in ROOT.glob("*.py"):
        shutil.copy(script, tmp_path)
    env = os.environ | {"GIT_CEILING_DIRECTORIES": str(tmp_path.parent)}
    for patch in sorted(RECIPES.glob("*.patch")):
        if patch.stem != skipped:
            subprocess.run(["git", "apply", patch], cwd=tmp_path, env=env, check=True)
    for script in tmp_path.glob("*.py"):
        compile(script.read_text(), script, "exec")


@helpers.each([dqn_tbb, ppo_tbb, sac_tbb])
def test_acting_in_a_loop_of_your_own(script, trained, tmp_path):
    """The code on the page plays the episode that `collect` plays."""
    _, code = RECIPES.joinpath("README.md").read_text().split("## Acting in a loop of your own")
    code = re.search(r"```python\n(.*?)```", code, re.S).group(1)
    if script is not dqn_tbb:
        names = {"dqn_tbb": script.__name__, "QNetwork": "Agent", '"q_network"': '"agent"', "epsilon=0": "greedy=True"}
        names["torch.tensor([0])"] = "torch.as_tensor(envs.action_space.sample())"
        for old, new in names.items():
            assert old in code
            code = code.replace(old, new)
    trained(script)
    code = code.replace("runs/NAME/checkpoint.pt", str(checkpoint_of(tmp_path)))
    rng = np.random.default_rng(7)  # `collect` seeds the environment with its fourth number
    for _ in range(3):
        rng.integers(2**32)
    seed = rng.integers(2**31, size=1).tolist()
    played = {}
    exec(code.replace("envs.reset()", f"envs.reset(seed={seed})"), played)
    greedy = {"epsilon": 0.0} if script is dqn_tbb else {"greedy": True}
    (episode,) = script.collect(played["envs"], played["q_network"], partial(script.policy, **greedy), 7)
    assert played["episodic_return"] == pytest.approx(episode.reward.sum())
