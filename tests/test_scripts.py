"""What the scripts share, tested in each of them: spaces, `collect`, the command line, evaluation."""

import itertools
import os
import random
import re
import shutil
import signal
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from unittest import mock

import helpers
import numpy as np
import pytest
import torch
from gymnasium.spaces import Box, Dict, Discrete, Graph, MultiBinary, MultiDiscrete, Sequence, Text, Tuple
from helpers import CONTINUOUS, DISCRETE, OFF_POLICY, ContinuousLengths, Lengths, assert_refused, checkpoint_of
from helpers import contents, control, each, each_script, final, flags, load, make, outcome, scalars

import dqn_sbb
import dqn_tbb
import ppo_tbb
import sac_tbb
from monoids import MEMORIES

play, trained = helpers.play, helpers.trained


# ---------------------------------------------------------------------------------------------------------------------
# Episodes


@each_script
@pytest.mark.parametrize("num_envs", [1, 4, 32])
def test_collect_plays_one_whole_episode_in_each_environment(script, num_envs, monkeypatch):
    monkeypatch.setattr(Lengths, "lengths", [1, 2, 3, 10, 60, 201])
    envs, network, act = make(script, num_envs=num_envs)
    episodes = script.collect(envs, network, act, (1, 0))
    assert len(episodes) == num_envs
    for e in episodes:
        n = int(e.obs[0, 1])
        np.testing.assert_array_equal(e.obs, [[step, n] for step in range(n + 1)])
        action = e.reward[:-1] - 100 * np.arange(n)  # the environment's own, which counts from 5
        np.testing.assert_allclose(e.action[:-1].reshape(n), action - 5, atol=0.01)  # float32, far from 0
        assert e.reward[-1] == 0 and not e.action[-1].any()
        np.testing.assert_array_equal(e.terminated, np.arange(n + 1) == (n - 1 if n % 2 else -1))
        np.testing.assert_array_equal(e.start, np.arange(n + 1) == 0)
        dtype = np.float32 if script in CONTINUOUS else np.int64
        assert [x.dtype for x in e] == [np.float32, dtype, np.float32, bool, bool]


@each_script
def test_episodes_are_a_function_of_the_seed(script, monkeypatch):
    """Whatever generator the environment uses, and whatever ran before."""
    noise = lambda env: np.array([random.random() + np.random.rand(), torch.rand(()).item()], dtype=np.float32)
    monkeypatch.setattr(Lengths, "observe", noise)
    envs, network, act = make(script, num_envs=8)
    a, other, b = (script.collect(envs, network, act, seed) for seed in [(1, 0), (1, 1), (1, 0)])
    for x, y in zip(sum(a, ()), sum(b, ()), strict=True):
        np.testing.assert_array_equal(x, y)
    assert [len(e.start) for e in a] != [len(e.start) for e in other]


@each_script
@pytest.mark.parametrize("memory", MEMORIES)
def test_network_computes_the_same_while_playing_and_over_the_tape(script, memory):
    """One row at a time, and all episodes in one pass: the state is reset exactly where an episode starts."""
    envs, network, _ = make(script, memory=(memory,), num_envs=6)
    played = []

    def forward(*inputs):
        y, *_, state = network(*inputs)
        return y[0].logits if script is ppo_tbb else y, state  # of sac_tbb: the features

    def act(network, obs, previous_action, start, state):
        y, state = forward(obs, previous_action, start, state)
        played.append(y[0])
        shape = previous_action.shape[1:]
        return torch.rand(shape) * 2 - 1 if script in CONTINUOUS else torch.randint(3, shape), state

    episodes = script.collect(envs, network, act, (1, 0))
    obs, action, _, _, start = (torch.as_tensor(np.concatenate(x))[:, None] for x in zip(*episodes))
    with torch.no_grad():
        y, _ = forward(obs, action.roll(1, 0), start, network.memory.initial_state(1))
    for i, rows in enumerate(y[:, 0].split([len(e.start) for e in episodes])):
        torch.testing.assert_close(rows[:-1], torch.stack(played)[: len(rows) - 1, i], rtol=1e-4, atol=1e-5)


@each_script
def test_network_need_not_see_its_previous_action(script):
    envs, network, act = make(script, previous_action=False)
    assert network.encoder[0].in_features == 2 and len(script.collect(envs, network, act, 0)) == 3


@each_script
def test_max_episode_steps_truncates(script):
    envs, network, act = make(script, env_id=control(script), max_episode_steps=5)
    for e in script.collect(envs, network, act, (1, 0)):
        assert len(e.start) == 6 and not e.terminated.any()


@each_script
def test_evaluation_is_greedy(script, monkeypatch):
    envs, network, _ = make(script, num_envs=5)
    last = (network.actor if hasattr(script, "Agent") else network.head)[-1]
    torch.nn.init.zeros_(last.weight)
    last.bias.data = torch.arange(len(last.bias)) / 10.0 + 0.5  # the last action is a little better; a mean of 0.5
    best = np.float32(np.tanh(0.5)) if script in CONTINUOUS else 2
    episodes, collect = [], script.collect
    monkeypatch.setattr(script, "collect", lambda *args: episodes.extend(collect(*args)) or episodes)
    returns = script.evaluate(envs, network, script.Args())
    assert len(episodes) == 5 and all(np.allclose(e.action[:-1], best) for e in episodes)
    np.testing.assert_array_equal(returns, [e.reward.sum() for e in episodes])


@each_script
@pytest.mark.parametrize("lengths, num_envs", [([1], 4), ([1], 1), ([1, 1, 1, 150], 2)], ids=str)
def test_episodes_of_any_length(script, lengths, num_envs, play, monkeypatch):
    monkeypatch.setattr(Lengths, "lengths", lengths)
    status, out, err = play(script, *flags(script, "--total-timesteps", 60, "--num-envs", num_envs))
    assert (status, err) == (0, "") and (final(out)[0] == 60 or lengths != [1])


# ---------------------------------------------------------------------------------------------------------------------
# Spaces


OBSERVATIONS = [  # space, an observation, what the network sees
    (Discrete(3, start=5), 6, [0, 1, 0]),
    (MultiDiscrete([[2], [3]]), np.array([[1], [0]]), [0, 1, 1, 0, 0]),
    (MultiBinary([2, 2]), np.array([[1, 0], [0, 1]], dtype=np.int8), [1, 0, 0, 1]),
    (Box(0, 255, (2, 1, 2), np.uint8), np.array([[[0, 255]], [[3, 4]]], dtype=np.uint8), [0, 255, 3, 4]),
    (Tuple((Discrete(2), Box(-1, 1, (1,)))), (1, np.float32([0.5])), [0, 1, 0.5]),
    (  # a Dict sorts its keys
        Dict({"b": Tuple((Discrete(3, start=-1), Box(-1, 1, (2,)))), "a": MultiDiscrete([2, 4])}),
        {"b": (1, np.float32([0.5, -0.5])), "a": np.array([1, 3])},
        [0, 1, 0, 0, 0, 1, 0, 0, 1, 0.5, -0.5],
    ),
]


@each_script
@pytest.mark.parametrize("space, obs, expected", OBSERVATIONS, ids=lambda x: type(x).__name__)
def test_observations_are_flattened(script, space, obs, expected):
    kwargs = {"observation_space": space, "obs": obs}
    kwargs["action_space"] = Box(-1, 1, (1,)) if script in CONTINUOUS else Discrete(2)
    envs, network, act = make(script, env_id="Anything-v0", env_kwargs=kwargs)
    for e in script.collect(envs, network, act, 0):
        np.testing.assert_array_equal(e.obs, np.float32([expected] * 4))


ACTIONS = [Discrete(4, start=3), Discrete(4, dtype=np.uint8), MultiDiscrete([2, 3, 4], dtype=np.int32)]
ACTIONS += [MultiDiscrete([[2, 3]], start=[[1, -1]])]


@each(DISCRETE)
@pytest.mark.parametrize("space", ACTIONS, ids=str)
def test_every_discrete_action_reaches_the_environment(script, space):
    nvec = np.ravel(getattr(space, "nvec", getattr(space, "n", None)))
    n = int(nvec.prod())
    every = np.stack(np.unravel_index(np.arange(n), nvec), -1)  # (n, components)
    left = iter(torch.as_tensor(every if script is ppo_tbb else np.arange(n)))
    envs, network, _ = make(script, num_envs=1, env_id="Anything-v0", env_kwargs={"action_space": space, "n": n})
    script.collect(envs, network, lambda network, obs, action, start, state: (next(left)[None], state), 0)
    received = envs.envs[0].unwrapped.actions
    np.testing.assert_array_equal(received, every.reshape(n, *space.shape) + space.start)
    assert all(space.contains(action) for action in received)


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_box_actions_are_clipped_only_for_the_environment(dtype):
    space, actions = Box(-1, dtype([[2, 3]]), dtype=dtype), torch.tensor([[[-9.0, 9]], [[0.5, -0.5]], [[9, 2]]])
    envs, network, _ = make(ppo_tbb, num_envs=1, env_id="Anything-v0", env_kwargs={"action_space": space})
    left = iter(actions)
    (e,) = ppo_tbb.collect(envs, network, lambda network, *inputs, state=None: (next(left), inputs[-1]), 0)
    received = envs.envs[0].unwrapped.actions
    np.testing.assert_array_equal(received, [[[-1, 3]], [[0.5, -0.5]], [[2, 2]]])
    assert all(space.contains(action) for action in received)
    np.testing.assert_array_equal(e.action[:-1], actions[:, 0])


REFUSED = [("observation_space", space) for space in (Text(5), Dict(a=Text(5)), Graph(Box(0, 1), None))]
REFUSED += [("observation_space", Sequence(Discrete(2))), ("action_space", MultiBinary(3))]
REFUSED += [("action_space", Box(0, 9, (2,), np.uint8))]
REFUSED += [("action_space", Tuple((Discrete(2), Discrete(3))))]


@each_script
@pytest.mark.parametrize("which, space", REFUSED, ids=str)
def test_unsupported_spaces_are_refused(script, which, space, play, tmp_path, monkeypatch):
    monkeypatch.setattr(ContinuousLengths if script in CONTINUOUS else Lengths, which, space)
    help = "ObservationWrapper" if which == "observation_space" else "takes"
    assert_refused(play(script, *flags(script)), str(space), help)
    assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize("script", [dqn_tbb, dqn_sbb])
def test_dqn_refuses_continuous_actions(script, play):
    assert_refused(play(script, "--env-id", "popgym-PositionOnlyPendulumEasy-v0"), "DQN takes Discrete")


# ---------------------------------------------------------------------------------------------------------------------
# The command line: runs, and what goes on from their checkpoints


TASKS = ["popgym-RepeatPreviousEasy-v0", "popgym-AutoencodeEasy-v0", "CartPole-v1"]
PENDULUMS = ["popgym-PositionOnlyPendulumEasy-v0", "Pendulum-v1"]
RUNS = [*itertools.product(DISCRETE, TASKS), *itertools.product([ppo_tbb, sac_tbb], PENDULUMS)]


@pytest.mark.parametrize("script, env_id", RUNS, ids=lambda x: getattr(x, "__name__", x))
def test_run_ends_with_the_line_that_programs_read(script, env_id, play, tmp_path):
    more = ["--env-id", env_id, "--memory", "lru", "gru", "--max-episode-steps", 60]
    status, out, err = play(script, *flags(script, *more))
    assert (status, err) == (0, "")
    path = checkpoint_of(tmp_path)
    step, _, episodes = final(out)
    assert step == load(path)["counters"][1] >= helpers.TOTAL and episodes == 8
    first, *_, checkpoint, _ = out.splitlines()
    assert f"tensorboard --logdir runs/{path.parent.name}" in first
    assert f"checkpoint of step {step:,}: runs/{path.parent.name}/checkpoint.pt" in checkpoint
    # unique: no other process has this id at this second
    assert re.fullmatch(rf"{env_id}__{script.__name__}__lru_gru__1__\d+_{os.getpid()}", path.parent.name)
    tags = scalars(tmp_path)
    assert {"charts/episodic_return", "charts/episodic_length", "charts/SPS", "charts/eval_return"} < {*tags}
    assert all(events[-1][0] == step for events in tags.values())


@each_script
def test_same_seed_gives_the_same_run(script, play, trained, tmp_path):
    trained(script, "a")
    for folder, more in [("b", []), ("c", ["--seed", 2])]:
        play(script, *flags(script, *more), folder=folder)
    a, b, c = (tmp_path / folder for folder in "abc")
    assert outcome(checkpoint_of(a)) == outcome(checkpoint_of(b)) and scalars(a) == scalars(b)
    assert outcome(checkpoint_of(a))[0] != outcome(checkpoint_of(c))[0] and scalars(a) != scalars(c)


@each_script
def test_constructors_of_environments_draw_from_the_seed(script, play, monkeypatch):
    """Constructors may draw from any generator, for a maze that stays the same in all episodes."""
    drawn = []

    def draw(env, **kwargs):
        drawn.append((random.random(), np.random.rand(), torch.rand(()).item()))

    monkeypatch.setattr(Lengths, "__init__", draw)
    more = ["--total-timesteps", 60, "--eval-frequency", 1000, "--eval-episodes", 1]
    for seed in (1, 1, 2):
        assert play(script, *flags(script, *more, "--seed", seed), folder=f"{len(drawn)}")[0] == 0
    a, b, c = np.split(np.array(drawn), 3)
    np.testing.assert_array_equal(a, b)
    assert (a != c).all()


@each_script
def test_evaluations_do_not_affect_training(script, play, trained, tmp_path):
    trained(script, "often")
    play(script, *flags(script, "--eval-frequency", 1000, "--eval-episodes", 1), folder="once")
    often, once = (outcome(checkpoint_of(tmp_path / folder))[0] for folder in ("often", "once"))
    assert often == once


@each_script
def test_checkpoint_is_saved_at_each_evaluation_and_at_the_end(script, play, tmp_path, monkeypatch):
    saved, calls = [], []
    fsync, replace = os.fsync, os.replace  # the other way round, a power cut could leave an empty file
    monkeypatch.setattr(os, "fsync", lambda file: (calls.append("fsync"), fsync(file)))
    note = lambda a, b: (calls.append("replace"), saved.append(load(a)["counters"][1]), replace(a, b))
    monkeypatch.setattr(os, "replace", note)
    play(script, *flags(script))
    tags = scalars(tmp_path)
    steps = [step for step, _ in tags["charts/SPS"]]
    due = [b for a, b in zip([0, *steps], steps) if a // helpers.FREQUENCY < b // helpers.FREQUENCY or b == steps[-1]]
    assert saved == [step for step, _ in tags["charts/eval_return"]] == due and len(due) > 3
    assert calls == ["fsync", "replace"] * len(due)
    assert {*load(checkpoint_of(tmp_path))} == {"script", "args", "counters", "learners"}


@each_script
def test_environment_arguments_reach_the_environment(script, play, tmp_path, monkeypatch):
    seen, init = [], Lengths.__init__
    monkeypatch.setattr(Lengths, "__init__", lambda env, **kwargs: seen.append(kwargs) or init(env, **kwargs))
    kwargs = "--env-kwargs map_name 8x8 is_slippery False n 3 p 0.5".split()
    assert play(script, *flags(script, *kwargs, "--total-timesteps", 60))[0] == 0
    assert all(repr(x) == repr({"map_name": "8x8", "is_slippery": False, "n": 3, "p": 0.5}) for x in seen) and seen
    seen.clear()  # a checkpoint keeps them, and --env-kwargs changes some of them
    assert play(script, "--evaluate", checkpoint_of(tmp_path), "--env-kwargs", "n", 4)[0] == 0
    assert all(x == {"map_name": "8x8", "is_slippery": False, "n": 4, "p": 0.5} for x in seen) and seen


@each_script
@pytest.mark.parametrize("env_id", ["ALE/Breakout-v5", "CartPol-v1", "no_such_module:Env-v0", "CartPole-v99"])
def test_unknown_environment_is_refused_and_modules_are_mentioned(script, env_id, play, tmp_path):
    assert_refused(
        play(script, *flags(script, "--env-id", env_id)), env_id, "module:MyEnv-v0", "CartPole" * ("Pol" in env_id)
    )
    assert not [*tmp_path.iterdir()]


@each_script
def test_environment_that_cannot_be_made_is_refused(script, play, tmp_path, monkeypatch):
    assert_refused(play(script, "--env-id", "FrozenLake-v1", "--env-kwargs", "map_name", "9x9"), "FrozenLake-v1", "9x9")
    for error in AssertionError(), KeyError("n"):  # one without a message
        monkeypatch.setattr(Lengths, "__init__", mock.Mock(side_effect=error))
        assert_refused(play(script, *flags(script)), str(error) or "AssertionError")
    assert not [*tmp_path.iterdir()]


@each_script
def test_experiment_name_does_not_leave_runs(script, play, tmp_path):
    (tmp_path / "a").mkdir()
    assert play(script, *flags(script, "--exp-name", "../../../x", "--total-timesteps", 60), folder="a/b")[0] == 0
    assert len(contents(tmp_path)) == 2 and checkpoint_of(tmp_path / "a" / "b")


def test_episodes_that_never_end_are_reported_once(monkeypatch, capsys):
    monkeypatch.setattr(Lengths, "lengths", [1, 1_000_000])
    envs, network, _ = make(dqn_tbb, num_envs=3)  # `collect` is the same in each script
    printed = []

    def act(network, obs, previous_action, start, state):
        printed.append(capsys.readouterr().out)
        assert len(printed) < 10_100
        return torch.zeros_like(previous_action[0]), state

    with pytest.raises(AssertionError):
        dqn_tbb.collect(envs, network, act, 0)
    (reported,) = (i for i, out in enumerate(printed) if out)
    assert reported == 10_000 and "--max-episode-steps" in printed[reported]
    assert re.search("[12] episodes go on", printed[reported])  # that another has ended does not hide them


def test_run_that_ends_exactly_at_total_timesteps_is_finished(play, tmp_path, monkeypatch):
    monkeypatch.setattr(Lengths, "lengths", [1])
    play(dqn_tbb, *flags(dqn_tbb, "--total-timesteps", 60))
    path = checkpoint_of(tmp_path)
    before = path.read_bytes()
    assert load(path)["counters"][1] == 60
    assert play(dqn_tbb, "--resume", path)[0] == 0 and path.read_bytes() == before


@each_script
@pytest.mark.parametrize("number", helpers.SIGNALS)
def test_second_signal_stops_at_once(script, number, play, monkeypatch):
    steps = []

    def trouble(obs, *rest):
        steps.append(obs)
        assert len(steps) <= 50, "the second signal was ignored"
        if len(steps) in (40, 50):
            signal.raise_signal(number)
        return obs, *rest

    monkeypatch.setattr(Lengths, "lengths", [1_000_000])
    monkeypatch.setattr(Lengths, "trouble", staticmethod(trouble))
    status, _, err = play(script, *flags(script, "--num-envs", 1))
    assert (status, err) == (128 + number, "") and len(steps) == 50


@each_script
def test_finished_run_says_where_it_stands_and_can_be_prolonged(script, play, trained, tmp_path):
    _, first, _ = trained(script)
    path = checkpoint_of(tmp_path)
    before = path.read_bytes()
    status, out, err = play(script, "--resume", path)
    assert (status, err) == (0, "") and final(out) == final(first) and path.read_bytes() == before
    assert f"checkpoint of step {final(first)[0]:,}" in out
    status, out, err = play(script, "--resume", path, "--eval-episodes", 7)  # what it says of them, it has played
    _, evaluated, _ = play(script, "--evaluate", path, "--eval-episodes", 7)
    assert (status, err) == (0, "") and final(out) == final(evaluated) and path.read_bytes() == before
    status, out, err = play(script, "--resume", path, "--total-timesteps", 350)
    assert (status, err) == (0, "") and final(out)[0] >= 350
    assert checkpoint_of(tmp_path) == path and load(path)["counters"][1] == final(out)[0]
    for tag, events in scalars(tmp_path).items():
        steps = [step for step, _ in events]
        assert steps == sorted(set(steps)), tag
    assert play(script, "--evaluate", path)[0] == 0


@each(OFF_POLICY)
@pytest.mark.parametrize("train_frequency", [5, 100])
def test_resumed_run_may_train_more_or_less_often(script, train_frequency, play, trained, tmp_path, monkeypatch):
    trained(script)
    path, updates, step = checkpoint_of(tmp_path), [], torch.optim.Adam.step
    before = load(path)["counters"][1]
    monkeypatch.setattr(torch.optim.Adam, "step", lambda optimizer: updates.append(step(optimizer)))
    more = ["--total-timesteps", 420, "--eval-frequency", 1000]
    _, out, _ = play(script, "--resume", path, *more, "--train-frequency", train_frequency)
    due = (final(out)[0] - before) / train_frequency
    assert abs(len(updates) - due) <= 1 + script.Args.train_frequency / train_frequency


@each_script
def test_copied_checkpoint_is_continued_where_it_lies(script, play, trained, tmp_path):
    trained(script, "first")
    before = contents(tmp_path / "first")
    for folder, path in [("copy", tmp_path / "copy" / "my.pt"), ("here", "my.pt")]:
        (tmp_path / folder).mkdir(exist_ok=True)
        shutil.copy(checkpoint_of(tmp_path / "first"), tmp_path / folder / "my.pt")
        play(script, "--resume", path, "--total-timesteps", 350, folder="here")
        assert load(tmp_path / folder / "my.pt")["counters"][1] >= 350
        names = [file.name for file in contents(tmp_path / folder)]
        assert len(names) == 2 and any(name.startswith("events") for name in names)
    assert contents(tmp_path / "first") == before


@each_script
def test_evaluate_plays_the_same_episodes_and_writes_nothing(script, play, trained, tmp_path):
    _, first, _ = trained(script)
    path, before = checkpoint_of(tmp_path), contents(tmp_path)
    status, out, err = play(script, "--evaluate", path)
    assert (status, err) == (0, "") and final(out) == final(first)
    status, out, err = play(script, "--evaluate", path, "--seed", 5, "--eval-episodes", 3)
    mean = float(re.search(r"mean (\S+),", out)[1])
    assert (status, err) == (0, "") and final(out)[1:] == (mean, 3) and mean != final(first)[1]
    assert contents(tmp_path) == before


@pytest.mark.parametrize("script, episodes", [*((script, 8) for script in helpers.SCRIPTS), (dqn_tbb, 1)])
def test_video_holds_the_first_episode(script, episodes, play, tmp_path, monkeypatch):
    """The first environment's, of any length; whatever the render mode of the training."""
    # MoviePy, which the scripts do not need otherwise
    write = lambda frames: lambda path, logger: Path(path).write_text(str(len(frames)))
    clip = lambda frames, fps: SimpleNamespace(write_videofile=write(frames))
    for name in ("moviepy", "moviepy.video", "moviepy.video.io", "moviepy.video.io.ImageSequenceClip"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    sys.modules[name].ImageSequenceClip = clip
    monkeypatch.setattr(Lengths, "lengths", [2, 9])
    monkeypatch.setattr(Lengths, "metadata", {"render_modes": ["rgb_array", "ansi"], "render_fps": 4})
    other = ["--env-kwargs", "render_mode", "ansi"]  # some environments require one
    play(script, *flags(script, "--env-id", f"here/{helpers.lengths(script)}", "--total-timesteps", 60, *other))
    evaluate = ["--evaluate", checkpoint_of(tmp_path), "--eval-episodes", episodes, "--capture-video"]
    resets, seen = [], set()
    note = lambda obs, *rest: resets.append(int(obs[1])) if len(rest) == 1 else None
    monkeypatch.setattr(Lengths, "trouble", staticmethod(lambda *results: note(*results) or results))
    for seed in range(4):
        resets.clear()
        assert play(script, *evaluate, "--seed", seed)[0] == 0
        (video,) = tmp_path.glob("videos/*.mp4")
        assert int(video.read_text()) - 1 == resets[0]
        seen.add(resets[0])
        shutil.rmtree(video.parent)
    assert seen == {2, 9}
    monkeypatch.setitem(sys.modules, "moviepy", None)
    assert_refused(play(script, *evaluate), "MoviePy is not installed")
