"""Environments for the tests, and how to run a script in this process."""

import multiprocessing
import os
import re
import runpy
import shutil
import signal
import sys
import time
from functools import partial

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.spaces import Box, Discrete
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils._pytree import tree_leaves

import dqn_sbb
import dqn_tbb
import ppo_tbb
import sac_tbb

SCRIPTS = [dqn_tbb, dqn_sbb, ppo_tbb, sac_tbb]
SIGNALS = (signal.SIGINT, signal.SIGTERM)
ON_POLICY, CONTINUOUS = [ppo_tbb], [sac_tbb]
OFF_POLICY, DISCRETE = ([script for script in SCRIPTS if script not in some] for some in (ON_POLICY, CONTINUOUS))


def each(scripts):
    return pytest.mark.parametrize("script", scripts, ids=lambda script: script.__name__)


each_script = each(SCRIPTS)


class Lengths(gym.Env):
    """Episodes of very different lengths, drawn from the seed. Odd ones terminate, even ones are truncated.

    obs = (step, length), reward = 100 * step + action: a row says where it came from.
    A test may replace trouble(*results of reset or step), which is called each time.
    """

    metadata = {"render_modes": ["rgb_array"]}
    observation_space = Box(0, np.inf, (2,))
    action_space = Discrete(3, start=5)
    lengths = [1, 2, 3, 5, 30]
    trouble = staticmethod(lambda *results: results)

    def __init__(self, render_mode=None, **kwargs):
        self.render_mode = render_mode

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.step_number, self.length = 0, int(self.np_random.choice(self.lengths))
        return self.trouble(self.observe(), {})

    def observe(self):
        return np.array([self.step_number, self.length], dtype=np.float32)

    def step(self, action):
        assert self.step_number < self.length, "stepped past the end"
        reward = float(100 * self.step_number + np.sum(action))
        self.step_number += 1
        over = self.step_number == self.length
        return self.trouble(self.observe(), reward, over and self.length % 2 == 1, over and self.length % 2 == 0, {})

    def render(self):
        return np.zeros((8, 8, 3), dtype=np.uint8)


class ContinuousLengths(Lengths):
    action_space = Box(4, 6, (1,))


class Anything(gym.Env):
    """Any spaces; the observation is always the same; actions are kept. An episode has n steps."""

    def __init__(self, observation_space=Discrete(2), action_space=Discrete(2), obs=0, n=3):
        self.observation_space, self.action_space, self.obs, self.n = observation_space, action_space, obs, n

    def reset(self, **kwargs):
        self.actions = []
        return self.obs, {}

    def step(self, action):
        self.actions.append(action)
        return self.obs, 0.0, len(self.actions) == self.n, False, {}


gym.register("Lengths-v0", Lengths)
gym.register("ContinuousLengths-v0", ContinuousLengths)
gym.register("here/Lengths-v0", Lengths)
gym.register("here/ContinuousLengths-v0", ContinuousLengths)
gym.register("Anything-v0", Anything)


def lengths(script):
    return "ContinuousLengths-v0" if script in CONTINUOUS else "Lengths-v0"


def control(script):
    return "Pendulum-v1" if script in CONTINUOUS else "CartPole-v1"


def make(script, **kwargs):
    """(envs, network, act) of a script; act plays at random, as its training does at first."""
    args = script.Args(**{"env_id": lengths(script), "num_envs": 3, "d_model": 16, **kwargs})
    envs = script.make_envs(args, args.num_envs)
    torch.manual_seed(0)
    if hasattr(script, "Agent"):
        return envs, script.Agent(envs, args), partial(script.policy, greedy=False)
    return envs, script.QNetwork(envs, args), partial(script.policy, epsilon=0.5)


class Still:
    """An optimizer that leaves the weights, so that the gradient can be looked at."""

    def __init__(self, network):
        self.network = network

    def zero_grad(self):
        self.network.zero_grad()

    def step(self):
        self.gradient = {name: p.grad.clone() for name, p in self.network.named_parameters() if p.grad is not None}


TOTAL, FREQUENCY = 240, 50  # a run of seven iterations or so, with a checkpoint after most of them


def flags(script, *more):
    common = f"--env-id {lengths(script)} --total-timesteps {TOTAL} --num-envs 4 --d-model 16 --eval-episodes 8"
    own = "--update-epochs 2" if script is ppo_tbb else "--batch-size 100 --learning-starts 50 --buffer-size 500"
    return [*f"{common} --eval-frequency {FREQUENCY} {own}".split(), *more]


def run(path, argv):
    """Runs a script as from the command line; returns its exit status."""
    sys.argv = [path, *map(str, argv)]
    try:
        runpy.run_path(path, run_name="__main__")
    except SystemExit as stop:
        return stop.code or 0
    return 0


FORKSERVER = multiprocessing.get_context("forkserver")
FORKSERVER.set_forkserver_preload(["helpers", "torch._dynamo"])  # what scripts and optimizers import


def forked(path, argv, folder):
    """A process that runs a script in a folder, its stdout in the file out.

    Saves the ten seconds of CPU time that a new Python needs for its imports.
    """
    return FORKSERVER.Process(target=in_folder, args=(path, argv, folder))


def in_folder(path, argv, folder):
    os.chdir(folder)
    os.dup2(os.open("out", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), sys.stdout.fileno())
    torch.set_num_threads(1)
    sys.exit(run(path, argv))


@pytest.fixture
def play(capsys, monkeypatch, tmp_path):
    """Runs a script in a folder: (exit status, stdout, stderr). The clock is put forward before each run."""
    clock, plays = time.time, []
    monkeypatch.setattr(time, "time", lambda: clock() + 10 * len(plays))  # TensorBoard tells files apart by the second
    monkeypatch.setattr(sys, "argv", sys.argv)

    def play(script, *argv, folder="."):
        plays.append(script)
        (tmp_path / folder).mkdir(exist_ok=True)
        monkeypatch.chdir(tmp_path / folder)
        return run(script.__file__, argv), *capsys.readouterr()

    def unhandled(number, _):
        pytest.fail(f"the script does not handle {signal.Signals(number).name}")

    handlers = [signal.signal(number, unhandled) for number in SIGNALS]
    yield play
    for number, handler in zip(SIGNALS, handlers):
        signal.signal(number, handler)  # so that Ctrl-C stops pytest again


RUNS = {}  # {script: (folder, what play returned)}


@pytest.fixture
def trained(play, monkeypatch, tmp_path, tmp_path_factory):
    """play(script, *flags(script)), which runs once in a session: after that a test gets a copy of the folder."""

    def trained(script, folder="."):
        if script not in RUNS:
            source = tmp_path_factory.mktemp(script.__name__)
            RUNS[script] = source, play(script, *flags(script), folder=source)
        source, result = RUNS[script]
        shutil.copytree(source, tmp_path / folder, dirs_exist_ok=True)
        monkeypatch.chdir(tmp_path / folder)
        return result

    return trained


def checkpoint_of(folder):
    (path,) = folder.glob("runs/*/checkpoint.pt")
    return path


def load(path):
    return torch.load(path, weights_only=True)


def bits(tree):
    """Bytes and texts, which == compares to the last bit, NaN and -0 included."""
    return [x.numpy().tobytes() if torch.is_tensor(x) else repr(x) for x in tree_leaves(tree)]


def outcome(path):
    """Weights, optimizer, buffer and counters of a checkpoint; not the seconds that it took."""
    checkpoint = load(path)
    return bits(checkpoint["learners"]), bits(checkpoint["counters"][:-1])


def scalars(folder):
    """{tag: [(step, value), ...]} as TensorBoard shows them; the speed only has its steps."""
    log = EventAccumulator(str(checkpoint_of(folder).parent), size_guidance={"scalars": 0}).Reload()
    value = lambda tag, event: 0 if tag == "charts/SPS" else repr(event.value)
    return {tag: [(e.step, value(tag, e)) for e in log.Scalars(tag)] for tag in log.Tags()["scalars"]}


def contents(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def assert_refused(result, *words, lines=1):
    """Exit status 2 and a message; of one line where the script wrote it and not tyro."""
    status, _, err = result
    assert status == 2 and "Traceback" not in err and (not lines or len(err.splitlines()) == lines), (result, err)
    message = " ".join(err.replace("│", " ").split())
    for word in words:
        assert word in message


def final(out):
    """(global_step, eval_return, eval_episodes) in the last line."""
    line = r"final: global_step=(\d+) eval_return=(-?\d+\.\d+) eval_episodes=(\d+) seconds=\d+\.\d+"
    step, eval_return, episodes = re.fullmatch(line, out.splitlines()[-1]).groups()
    return int(step), float(eval_return), int(episodes)
