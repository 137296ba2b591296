"""What the three scripts share, tested in each of them: spaces, `collect`, the command line."""

import re
import runpy
import signal
import sys
from functools import partial

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.spaces import Box, Dict, Discrete, MultiDiscrete, Tuple

import dqn_sbb
import dqn_tbb
import ppo_tbb
from monoids import MEMORIES

SCRIPTS = [dqn_tbb, dqn_sbb, ppo_tbb]
each_script = pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.__name__)


class Lengths(gym.Env):
    """Episodes of very different lengths, drawn from the seed. Odd ones terminate, even ones are truncated.

    obs = (step, length), reward = 100 * step + action: a row says where it came from.
    """

    observation_space = Box(0, np.inf, (2,))
    action_space = Discrete(3, start=5)
    resets = []

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.step_number, self.length = 0, int(self.np_random.choice([1, 2, 3, 10, 60, 200]))
        if seed is not None:
            Lengths.resets.append(seed)
        return self.observe(), {}

    def observe(self):
        return np.array([self.step_number, self.length], dtype=np.float32)

    def step(self, action):
        assert self.step_number < self.length, "stepped past the end"
        reward = 100 * self.step_number + action
        self.step_number += 1
        over = self.step_number == self.length
        return self.observe(), float(reward), over and self.length % 2 == 1, over and self.length % 2 == 0, {}


gym.register("Lengths-v0", Lengths)


def make(script, **kwargs):
    """(envs, network, act) of a script; act plays at random, as its training does at first."""
    args = script.Args(**{"env_id": "Lengths-v0", "num_envs": 3, "d_model": 16, **kwargs})
    envs = script.make_envs(args, args.num_envs)
    torch.manual_seed(0)
    if script is ppo_tbb:
        return envs, script.Agent(envs, args), partial(script.policy, greedy=False)
    return envs, script.QNetwork(envs, args), partial(script.policy, epsilon=0.5)


@each_script
@pytest.mark.parametrize("num_envs, quota", [(1, 1), (1, 500), (3, 1), (4, 500), (16, 700)])
def test_collect_starts_finishes_and_keeps_every_episode(script, num_envs, quota):
    envs, network, act = make(script, num_envs=num_envs)
    Lengths.resets.clear()
    episodes = script.collect(envs, network, act, (1, 0), 0, quota)
    assert len(Lengths.resets) == len(episodes) >= num_envs
    assert sum(len(e.start) - 1 for e in episodes) >= quota
    if quota == 1:
        assert len(episodes) == num_envs
    for e in episodes:
        n = int(e.obs[0, 1])
        np.testing.assert_array_equal(e.obs, [[step, n] for step in range(n + 1)])
        action = e.reward[:-1] - 100 * np.arange(n)  # the environment's own, which counts from 5
        np.testing.assert_array_equal(e.action[:-1, 0], action - 5)
        assert set(action) <= {5, 6, 7}
        assert e.reward[-1] == e.action[-1, 0] == 0
        np.testing.assert_array_equal(e.terminated, np.arange(n + 1) == (n - 1 if n % 2 else -1))
        np.testing.assert_array_equal(e.start, np.arange(n + 1) == 0)


@each_script
def test_an_episode_does_not_depend_on_what_runs_beside_it(script):
    played = []
    for num_envs in (1, 5):
        envs, network, act = make(script, num_envs=num_envs)
        played.append(script.collect(envs, network, act, (1, 0), 0, 1500))
    later = script.collect(envs, network, act, (1, 0), 3, 300)  # as after a restart
    assert len({len(e.start) for e in later}) > 1
    for a, b in [*zip(*played), *zip(played[0][3:], later)]:
        for x, y in zip(a, b):
            np.testing.assert_array_equal(x, y)
    other = script.collect(envs, network, act, (2, 0), 0, 1500)
    assert [len(e.start) for e in other[:9]] != [len(e.start) for e in played[0][:9]]


@each_script
@pytest.mark.parametrize("memory", MEMORIES)
def test_the_state_is_reset_exactly_where_an_episode_starts(script, memory):
    """What the network made of a row while it played is what one pass over the whole episode makes of it."""
    envs, network, _ = make(script, memory=memory)
    outputs = []

    def act(network, obs, previous_action, start, state, noise):
        y, *_, state = network(obs, previous_action, start, state)
        y = y[0].logits if script is ppo_tbb else y
        outputs.extend((tuple(o), row) for o, row in zip(obs[0].tolist(), y[0]))
        return (noise[:, 1:] * 3).floor(), state

    episodes = script.collect(envs, network, act, (1, 0), 0, 600)
    for e in episodes:
        obs, action, start = (torch.as_tensor(x)[:-1, None] for x in (e.obs, e.action, e.start))
        with torch.no_grad():
            y, *_ = network(obs, action.roll(1, 0), start, network.memory.initial_state(1))
        y = (y[0].logits if script is ppo_tbb else y)[:, 0]
        for o, row in zip(obs[:, 0].tolist(), y):
            assert any(o == list(seen) and torch.allclose(row, out, atol=1e-4) for seen, out in outputs)


@each_script
def test_max_episode_steps_truncates(script):
    envs, network, act = make(script, env_id="CartPole-v1", max_episode_steps=5)
    for e in script.collect(envs, network, act, (1, 0), 0, 50):
        assert len(e.start) == 6 and not e.terminated.any()


SPACE = Dict({"b": Tuple((Discrete(3, start=-1), Box(-1, 1, (2,)))), "a": MultiDiscrete([2, 4])})


@each_script
def test_spaces_become_columns_and_features(script):
    assert script.columns(SPACE) == [2, 4, 3, 0, 0]  # Dict sorts its keys
    batch = {"b": (np.array([-1, 1]), np.array([[0.5, -0.5], [0.25, 1.0]])), "a": np.array([[1, 3], [0, 2]])}
    x = script.flatten(SPACE, batch)
    np.testing.assert_array_equal(x, np.float32([[1, 3, 0, 0.5, -0.5], [0, 2, 2, 0.25, 1.0]]))
    one_hot = script.OneHot(script.columns(SPACE))
    expected = [[0, 1, 0, 0, 0, 1, 1, 0, 0, 0.5, -0.5], [1, 0, 0, 0, 1, 0, 0, 0, 1, 0.25, 1.0]]
    assert one_hot.features == 11
    torch.testing.assert_close(one_hot(torch.as_tensor(x)), torch.tensor(expected))


@each_script
@pytest.mark.parametrize("space", [Discrete(4, start=3), MultiDiscrete([2, 3, 4]), Box(-2, 2, (3,))], ids=str)
def test_actions_go_to_the_environment_and_back(script, space):
    batch = gym.vector.utils.batch_space(space, 7)
    batch.seed(0)
    action = batch.sample()
    back = script.unflatten(space, script.flatten(space, action))
    np.testing.assert_allclose(back, action, rtol=1e-6)
    assert all(space.contains(a.astype(space.dtype)) for a in back)


@each_script
def test_box_actions_are_clipped_for_the_environment(script):
    np.testing.assert_array_equal(script.unflatten(Box(-1, 2, (2,)), np.float32([[-9, 9]])), [[-1, 2]])


def run(script, capsys, monkeypatch, tmp_path, *flags):
    """Runs a script as from the command line, in tmp_path: (exit status, stdout, stderr)."""
    path = script.__file__
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [path, *map(str, flags)])
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    status = 0
    try:
        runpy.run_path(path, run_name="__main__")
    except SystemExit as stop:
        status = stop.code
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)  # so that Ctrl-C stops pytest again
    return status, *capsys.readouterr()


SMALL = "--total-timesteps 400 --num-envs 4 --num-steps 16 --d-model 16 --eval-episodes 20".split()
DQN_SMALL = "--batch-size 100 --learning-starts 50 --buffer-size 500".split()
FINAL = re.compile(r"final: global_step=(\d+) eval_return=(-?\d+\.\d+) eval_episodes=20 seconds=\d+\.\d+")
TASKS = ["popgym-RepeatPreviousEasy-v0", "popgym-AutoencodeEasy-v0", "popgym-BattleshipEasy-v0", "CartPole-v1"]


@each_script
@pytest.mark.parametrize("env_id", TASKS)
def test_a_run_ends_with_the_line_that_programs_read(script, env_id, capsys, monkeypatch, tmp_path):
    small = SMALL + (DQN_SMALL if script is not ppo_tbb else [])
    status, out, err = run(script, capsys, monkeypatch, tmp_path, "--env-id", env_id, *small)
    assert status == 0 and err == ""
    final = FINAL.fullmatch(out.splitlines()[-1])
    assert final and int(final[1]) >= 400
    assert list(tmp_path.glob(f"runs/{env_id}__{script.__name__}__1__*/events*"))


@each_script
@pytest.mark.parametrize(
    "flags, message",
    [
        (["--memory", "lstm"], "lru"),
        (["--env-id", "popgym-RepeatPreviusEasy-v0"], "Did you mean: `popgym-RepeatPreviousEasy`"),
        (["--num-envs", "0"], "--num-envs must be 1 or more"),
        (["--seed", "one"], "--seed"),
        (["--no-such-thing"], "--no-such-thing"),
    ],
)
def test_wrong_input_gets_one_line_and_status_2(script, flags, message, capsys, monkeypatch, tmp_path):
    status, out, err = run(script, capsys, monkeypatch, tmp_path, *flags)
    assert status == 2 and out == ""
    assert len(err.splitlines()) == 1 and message in err
    assert not list(tmp_path.iterdir())


def test_dqn_sends_continuous_actions_to_ppo(capsys, monkeypatch, tmp_path):
    for script in (dqn_tbb, dqn_sbb):
        status, _, err = run(script, capsys, monkeypatch, tmp_path, "--env-id", "popgym-PositionOnlyPendulumEasy-v0")
        assert status == 2 and len(err.splitlines()) == 1 and "ppo_tbb.py" in err


def test_ppo_takes_continuous_actions(capsys, monkeypatch, tmp_path):
    flags = ["--env-id", "popgym-PositionOnlyPendulumEasy-v0", *SMALL]
    status, out, _ = run(ppo_tbb, capsys, monkeypatch, tmp_path, *flags)
    assert status == 0 and FINAL.fullmatch(out.splitlines()[-1])
