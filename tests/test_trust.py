"""What a run survives, in all three scripts: SIGKILL, signals, wrong input, environments and numbers gone wrong.

KILLS=200 python -m pytest -s tests/test_trust.py -k killed     kills a run 200 times instead of 20
"""

import math
import os
import pickle
import random
import re
import signal
import subprocess
import sys
import time
from functools import partial

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.spaces import Box, Discrete, Tuple
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from test_scripts import DQN_SMALL, FINAL, SMALL, Lengths, each_script, make, run

import dqn_sbb
import dqn_tbb
import ppo_tbb
from monoids import MEMORIES, LRUCell

KILLS = int(os.environ.get("KILLS", 20))
SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Trouble(Lengths):
    """Lengths, in which a test may do something at any step: trouble(env, steps of all of them so far, results)."""

    lengths = [1, 2, 3, 5, 30]
    steps = 0

    def reset(self, **kwargs):
        super().reset(**kwargs)
        self.length = int(self.np_random.choice(self.lengths))
        return self.trouble(Trouble.steps, self.observe(), {})

    def step(self, action):
        Trouble.steps += 1
        return self.trouble(Trouble.steps, *super().step(action))

    def trouble(self, steps, *results):
        return results


class Image(Lengths):
    observation_space = Box(0, 255, (8, 8, 3), np.uint8)


class TwoHands(Lengths):
    action_space = Tuple((Discrete(2), Discrete(3)))


for env in (Trouble, Image, TwoHands):
    gym.register(f"{env.__name__}-v0", env)


def flags(script, *more):
    """A run of five iterations or so, a checkpoint after each."""
    return ["--env-id", "Trouble-v0", "--save-frequency", 1, *SMALL, *([] if script is ppo_tbb else DQN_SMALL), *more]


@pytest.fixture
def play(capsys, monkeypatch, tmp_path):
    """Runs a script in this process: (exit status, stdout, stderr). The clock is put forward before each run."""
    clock, plays = time.time, []
    monkeypatch.setattr(time, "time", lambda: clock() + 10 * len(plays))  # TensorBoard tells files apart by the second

    def play(script, *flags, folder="."):
        plays.append(script)
        monkeypatch.setattr(Trouble, "steps", 0)
        (tmp_path / folder).mkdir(exist_ok=True)
        status, out, err = run(script, capsys, monkeypatch, tmp_path / folder, *flags)
        if isinstance(status, str):  # as Python does where it exits
            status, err = 1, f"{err}{status}\n"
        return status or 0, out, err

    def unhandled(number, _):
        pytest.fail(f"the script does not handle {signal.Signals(number).name}")

    handlers = [signal.signal(number, unhandled) for number in SIGNALS]
    yield play
    for number, handler in zip(SIGNALS, handlers):
        signal.signal(number, handler)


def checkpoint_of(folder):
    (path,) = folder.glob("runs/*/checkpoint.pt")
    return path


def opened(path):
    return torch.load(path, weights_only=True)


def bits(tree):
    """What a checkpoint holds, such that == means: to the last bit, NaN and -0 included."""
    if torch.is_tensor(tree):
        return tree.dtype, tree.shape, tree.numpy().tobytes()
    if isinstance(tree, dict):
        return {name: bits(part) for name, part in tree.items()}
    return [bits(part) for part in tree] if isinstance(tree, (list, tuple)) else repr(tree)


def outcome(path):
    checkpoint = opened(path)
    return {name: bits(checkpoint[name]) for name in ("learners", "counters", "random_states")}


def scalars(folder):
    """{tag: [(step, value), ...]} as TensorBoard shows them; the speed only has its steps."""
    (folder,) = folder.glob("runs/*")
    log = EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload()
    value = lambda tag, event: 0 if tag == "charts/SPS" else repr(event.value)
    return {tag: [(e.step, value(tag, e)) for e in log.Scalars(tag)] for tag in log.Tags()["scalars"]}


def contents(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def all_finite(path):
    def finite(tree):
        if isinstance(tree, dict):
            return all(map(finite, tree.values()))
        return not torch.is_tensor(tree) or bool(tree.isfinite().all())

    return all(finite(part) for name, part in opened(path)["learners"].items() if name != "buffer")


def assert_refused(result, *words):
    status, out, err = result
    assert (status, out) == (2, "") and len(err.splitlines()) == 1, err
    for word in words:
        assert word in err


# ---------------------------------------------------------------------------------------------------------------------
# Checkpoints and what goes on from them


@pytest.mark.parametrize(
    "script, kills",
    [(dqn_tbb, KILLS), (dqn_sbb, math.ceil(KILLS * 0.15)), (ppo_tbb, math.ceil(KILLS * 0.15))],
    ids=lambda x: getattr(x, "__name__", x),
)
def test_killed_at_random_moments_a_run_ends_as_if_nothing_had_happened(script, kills, play, tmp_path):
    rng = random.Random(kills)
    fresh = flags(script, "--env-id", "CartPole-v1", "--max-episode-steps", 30, "--save-frequency", 150)
    fresh += ["--eval-frequency", 500, "--eval-episodes", 4, "--total-timesteps", 300 * kills + 600]
    assert play(script, *fresh, folder="whole")[0] == 0
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    killed.mkdir()
    newest, gap, resume, in_a_save = 0, math.inf, [], 0

    def start(**kwargs):
        command = [sys.executable, script.__file__, *map(str, resume or fresh)]
        return subprocess.Popen(command, cwd=killed, env={**os.environ, "OMP_NUM_THREADS": "1"}, **kwargs)

    for _ in range(kills):
        # its first checkpoint, and then any moment up to the third: no further on a fast machine than on a slow one
        saves, end = [], math.inf
        with start(stdout=subprocess.DEVNULL) as life:
            try:
                while len(saves) < 3 and time.monotonic() < end:
                    time.sleep(0.01)
                    assert life.poll() is None, f"it ended before it was killed, with status {life.returncode}"
                    for path in killed.glob("runs/*/checkpoint.pt"):
                        if path.stat().st_mtime_ns != newest:
                            newest, resume = path.stat().st_mtime_ns, ["--resume", path]
                            saves.append(time.monotonic())
                            gap = min([gap, *np.diff(saves)])
                            end = saves[0] + rng.uniform(0, 2 * gap)
            finally:
                life.kill()
        newest = path.stat().st_mtime_ns
        in_a_save += any(killed.glob("runs/*/checkpoint.pt.tmp"))
    step, *_ = opened(path)["counters"]
    print(f"{script.__name__}: killed {kills} times up to step {step:,}, {in_a_save} times while it saved")
    with start(stdout=subprocess.PIPE) as life:
        out, _ = life.communicate()
    assert life.returncode == 0 and out.splitlines()[-1].startswith(b"final: ")
    assert outcome(checkpoint_of(killed)) == outcome(checkpoint_of(whole))
    assert scalars(killed) == scalars(whole)


@each_script
def test_a_signal_ends_the_iteration_and_the_run_goes_on_as_if_nothing_had_happened(
    script, play, tmp_path, monkeypatch
):
    status, *_ = play(script, *flags(script, "--save-frequency", 0), folder="whole")
    assert status == 0

    def trouble(env, steps, *results):
        if steps == 100 and len(results) > 2:
            signal.raise_signal(number)
        return results

    resume = flags(script, "--save-frequency", 0)
    with monkeypatch.context() as patch:
        patch.setattr(Trouble, "trouble", trouble)
        for number in SIGNALS:
            status, out, err = play(script, *resume, folder="stopped")
            assert (status, err) == (128 + number, "")
            step, resume = re.fullmatch(r"stopped at step ([\d,]+); go on with (.*)", out.splitlines()[-1]).groups()
            resume = resume.split()  # by the very words
            assert opened(tmp_path / "stopped" / resume[1])["counters"][0] == int(step.replace(",", ""))
    status, out, _ = play(script, *resume, folder="stopped")
    assert status == 0 and FINAL.fullmatch(out.splitlines()[-1])
    assert outcome(checkpoint_of(tmp_path / "stopped")) == outcome(checkpoint_of(tmp_path / "whole"))
    assert scalars(tmp_path / "stopped") == scalars(tmp_path / "whole")


@each_script
@pytest.mark.parametrize("frequency", [0, 150])
def test_checkpoints_come_when_they_are_due(script, frequency, play, tmp_path, monkeypatch):
    saved, replace = [], os.replace

    def note(source, path):
        saved.append(opened(source)["counters"][0])
        replace(source, path)

    monkeypatch.setattr(os, "replace", note)
    play(script, *flags(script, "--save-frequency", frequency))
    steps = [step for step, _ in scalars(tmp_path)["charts/SPS"]]
    passed = lambda a, b: frequency and a // frequency < b // frequency
    assert saved == [b for a, b in zip([0, *steps], steps) if passed(a, b) or b == steps[-1]]


@each_script
def test_a_signal_at_the_end_of_an_iteration_is_saved_for_too(script, play, tmp_path, monkeypatch):
    looks, clock = [], time.time

    def time_and_trouble():
        caller = sys._getframe(1).f_globals
        looks.extend([0] if caller["__name__"] == "__main__" and "Args" in caller else [])
        if len(looks) == 3:  # at the start, for the speed, and then for the progress line: there is nothing after that
            looks.append(0)
            signal.raise_signal(signal.SIGTERM)
        return clock()

    monkeypatch.setattr(time, "time", time_and_trouble)
    status, out, _ = play(script, *flags(script, "--save-frequency", 0))
    assert status == 143
    step = re.match(r"stopped at step ([\d,]+);", out.splitlines()[-1])[1]
    assert opened(checkpoint_of(tmp_path))["counters"][0] == int(step.replace(",", ""))


@each_script
def test_the_same_seed_gives_the_same_run(script, play, tmp_path):
    for folder, seed in [("a", 1), ("b", 1), ("c", 2)]:
        play(script, *flags(script, "--seed", seed), folder=folder)
    a, b, c = (tmp_path / folder for folder in "abc")
    assert outcome(checkpoint_of(a)) == outcome(checkpoint_of(b)) and scalars(a) == scalars(b)
    assert outcome(checkpoint_of(a))["learners"] != outcome(checkpoint_of(c))["learners"] and scalars(a) != scalars(c)


@each_script
def test_an_earlier_checkpoint_takes_back_what_was_logged_since(script, play, tmp_path, monkeypatch):
    """Also of its target network, its buffer and its generators: it is the same run again."""
    copies = []

    def trouble(env, steps, *results):
        if steps == 250 and len(results) > 2:
            copies.append(checkpoint_of(tmp_path).read_bytes())
        return results

    with monkeypatch.context() as patch:
        patch.setattr(Trouble, "trouble", trouble)
        play(script, *flags(script))
    path = checkpoint_of(tmp_path)
    expected = outcome(path), scalars(tmp_path)
    path.write_bytes(copies[0])
    assert play(script, "--resume", path)[0] == 0
    assert (outcome(path), scalars(tmp_path)) == expected


@each_script
def test_a_finished_run_can_be_prolonged(script, play, tmp_path):
    play(script, *flags(script))
    path = checkpoint_of(tmp_path)
    status, out, err = play(script, "--resume", path, "--total-timesteps", 600)
    assert (status, err) == (0, "") and int(FINAL.fullmatch(out.splitlines()[-1])[1]) >= 600
    assert checkpoint_of(tmp_path) == path and opened(path)["counters"][0] >= 600
    for tag, events in scalars(tmp_path).items():
        steps = [step for step, _ in events]
        assert steps == sorted(set(steps)), tag


@each_script
def test_save_is_all_or_nothing(script, tmp_path, monkeypatch):
    path, order = tmp_path / "checkpoint.pt", []
    script.save(path, {"good": torch.ones(3)})

    def full_disk(checkpoint, file):
        file.write(b"half of it")
        raise OSError("no space left")

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", full_disk)
        with pytest.raises(OSError):
            script.save(path, {})
    assert opened(path)["good"].sum() == 3
    for name in ("fsync", "replace"):  # the other way round, a power cut could leave an empty file under the good name
        call = getattr(os, name)
        monkeypatch.setattr(os, name, lambda *args, name=name, call=call: (order.append(name), call(*args)))
    script.save(path, {"good": torch.zeros(3)})
    assert opened(path)["good"].sum() == 0 and order == ["fsync", "replace"]
    assert [*tmp_path.iterdir()] == [path]


class Malicious:
    def __reduce__(self):
        return os.mkdir, ("it_ran",)


@each_script
def test_what_is_no_checkpoint_of_this_script_is_refused(script, play, tmp_path):
    play(script, *flags(script))
    good = checkpoint_of(tmp_path)
    whole, path = good.read_bytes(), tmp_path / "broken.pt"
    other = opened(good) | {"script": "other.py"}
    torch.save(other, tmp_path / "other.pt")
    torch.save({"weights": torch.ones(3)}, tmp_path / "weights.pt")
    torch.save([1, 2], tmp_path / "list.pt")
    torch.save(opened(good) | {"args": Malicious()}, tmp_path / "malicious.pt")
    files = {name: (tmp_path / f"{name}.pt").read_bytes() for name in ("other", "weights", "list", "malicious")}
    files |= {f"the first {n} bytes": whole[:n] for n in (0, 1, 100, len(whole) // 2, len(whole) - 1)}
    files |= {"text": b"hello", "a bare pickle": pickle.dumps(Malicious())}
    for name, file in files.items():
        path.write_bytes(file)
        before = contents(tmp_path)
        for flag in ("--resume", "--evaluate"):
            assert_refused(play(script, flag, path), "broken.pt", "other.py" if name == "other" else "not a complete")
        assert contents(tmp_path) == before and not (tmp_path / "it_ran").exists()


@each_script
@pytest.mark.parametrize("flag", ["--resume", "--evaluate"])
def test_a_checkpoint_goes_on_as_the_run_that_it_was(script, flag, play, tmp_path, monkeypatch):
    play(script, *flags(script))
    path, before = checkpoint_of(tmp_path), contents(tmp_path)
    changes = {"--d-model": "32", "--memory": "s5", "--seed": "2", "--env-id": "CartPole-v1", "--gamma": "0.5"}
    for change, value in changes.items():
        assert_refused(play(script, flag, path, change, value), change, value, "checkpoint.pt")
    # the same name, but the environment was changed in the meantime
    monkeypatch.setattr(Trouble, "observation_space", Box(0, np.inf, (3,)))
    monkeypatch.setattr(Trouble, "observe", lambda env: np.zeros(3, dtype=np.float32))
    assert_refused(play(script, flag, path))
    assert contents(tmp_path) == before


@each_script
def test_evaluate_plays_the_best_action(script, monkeypatch):
    envs, network, _ = make(script)
    last = (network.actor if script is ppo_tbb else network.head)[-1]
    torch.nn.init.zeros_(last.weight)
    last.bias.data = torch.arange(len(last.bias)) / 10.0  # the last action is a little better
    episodes, collect = [], script.collect
    monkeypatch.setattr(script, "collect", lambda *args, **more: episodes.extend(collect(*args, **more)) or episodes)
    score = script.evaluate(envs, network, script.Args())
    assert len(episodes) == 3 and all((e.action[:-1] == 2).all() for e in episodes)
    assert score == pytest.approx(np.mean([e.reward.sum() for e in episodes]))


@each_script
def test_evaluate_plays_the_same_episodes_and_writes_nothing(script, play, tmp_path):
    _, trained, _ = play(script, *flags(script))
    path, before = checkpoint_of(tmp_path), contents(tmp_path)
    status, out, err = play(script, "--evaluate", path)
    assert (status, err) == (0, "")
    score = lambda out: FINAL.fullmatch(out.splitlines()[-1]).groups()
    assert score(out) == score(trained)  # the same episodes as after the last update, the same actions
    status, out, _ = play(script, "--evaluate", path, "--eval-episodes", 3)
    assert status == 0 and "eval_episodes=3 " in out
    assert_refused(play(script, "--evaluate", path, "--capture-video"), "Trouble-v0 does not render")
    assert contents(tmp_path) == before


# ---------------------------------------------------------------------------------------------------------------------
# Wrong input


EVERYWHERE = [
    *((f"--{name}", value, f"--{name}") for name in ("num-envs", "num-steps", "total-timesteps") for value in (0, -3)),
    *((f"--{name}", 0, f"--{name}") for name in ("d-model", "eval-frequency", "eval-episodes")),
    *((f"--{name}", -1, f"--{name}") for name in ("seed", "max-episode-steps", "save-frequency")),
    ("--resume", "nowhere.pt", "nowhere.pt"),
    ("--evaluate", "nowhere.pt", "nowhere.pt"),
    ("--resume", ".", "no checkpoint"),
    ("--capture-video", "--evaluate"),
    ("--env-id", "Image-v0", "not supported"),
    ("--env-id", "TwoHands-v0", "Tuple"),
]
DQN = [
    ("--batch-size", 600, "--buffer-size"),
    ("--learning-starts", 400, "--total-timesteps"),
    *((f"--{name}", 0, f"--{name}") for name in ("batch-size", "buffer-size", "train-frequency")),
]
WRONG = [(script, *wrong) for script in (dqn_tbb, dqn_sbb, ppo_tbb) for wrong in EVERYWHERE]
WRONG += [(script, *wrong) for script in (dqn_tbb, dqn_sbb) for wrong in DQN]
WRONG += [(dqn_sbb, "--segment-length", n, "--segment-length") for n in (0, 101)]
WRONG += [(dqn_sbb, "--burn-in", n, "--burn-in") for n in (-1, 50)]
WRONG += [(ppo_tbb, f"--{name}", 0, f"--{name}") for name in ("num-minibatches", "update-epochs")]


@pytest.mark.parametrize(
    "script, wrong", [(script, wrong) for script, *wrong in WRONG], ids=lambda x: getattr(x, "__name__", str(x))
)
def test_wrong_input_is_refused_before_anything_is_written(script, wrong, play, tmp_path):
    *wrong, message = wrong
    assert_refused(play(script, *flags(script), *wrong), message)
    assert not [*tmp_path.iterdir()]


# ---------------------------------------------------------------------------------------------------------------------
# Environments gone wrong


NAN = np.float32(np.nan)
TROUBLES = {  # what an environment returns -> what it should not have
    "an observation": lambda obs, *rest: (obs * NAN, *rest),
    "an observation after a reset": lambda obs, *rest: (obs * NAN, *rest),
    "a reward": lambda obs, reward, *rest: (obs, np.inf, *rest),
}


@each_script
@pytest.mark.parametrize("what", TROUBLES)
def test_what_is_not_finite_is_refused_and_the_checkpoint_stands(script, what, play, tmp_path, monkeypatch):
    seen, bad_step = [], 0 if what.endswith("reset") else 7

    def trouble(env, steps, *results):
        if steps < 250 or env.step_number != bad_step:
            return results
        seen.append(checkpoint_of(tmp_path).read_bytes())
        return TROUBLES[what](*results)

    with monkeypatch.context() as patch:
        patch.setattr(Trouble, "trouble", trouble)
        status, _, err = play(script, *flags(script))
    assert status == 2 and len(err.splitlines()) == 1
    assert "Trouble-v0" in err and "not finite" in err and (f"step {bad_step} " in err or bad_step == 0)
    path = checkpoint_of(tmp_path)
    assert path.read_bytes() == seen[-1]
    assert play(script, "--resume", path)[0] == 0


@each_script
@pytest.mark.parametrize("where", ["step", "reset"])
def test_an_error_says_which_environment_raised_it_and_the_checkpoint_stands(
    script, where, play, tmp_path, monkeypatch
):
    seen = []

    def trouble(env, steps, *results):
        if steps < 250 or (len(results) == 2) != (where == "reset"):
            return results
        seen.append(checkpoint_of(tmp_path).read_bytes())
        raise ZeroDivisionError("a bug in the environment")

    with monkeypatch.context() as patch:
        patch.setattr(Trouble, "trouble", trouble)
        with pytest.raises(ZeroDivisionError, match="a bug in the environment") as error:
            play(script, *flags(script))
    path = checkpoint_of(tmp_path)
    assert path.read_bytes() == seen[0]
    assert play(script, "--resume", path)[0] == 0
    assert "Trouble-v0" in "".join(getattr(error.value, "__notes__", []))


EPISODES = {  # lengths of episodes, and the flags that go with them
    "one step": ([1], []),
    "one step, few of them": ([1], ["--num-envs", 1, "--num-steps", 4, "--total-timesteps", 100]),
    "one step or very many": ([1, 1, 1, 1000], ["--num-envs", 2]),
}


@each_script
@pytest.mark.parametrize("lengths", EPISODES)
def test_episodes_of_any_length(script, lengths, play, tmp_path, monkeypatch):
    lengths, more = EPISODES[lengths]
    monkeypatch.setattr(Trouble, "lengths", lengths)
    if script is not ppo_tbb:
        more = [*more, "--buffer-size", 2100, "--train-frequency", 50]
    status, out, err = play(script, *flags(script, *more, "--eval-episodes", 2))
    assert status == 0 and "final: " in out, err
    assert all_finite(checkpoint_of(tmp_path))


# ---------------------------------------------------------------------------------------------------------------------
# Numbers gone wrong


def too_much(env, steps, obs, *rest):
    """Finite rewards whose mean is not."""
    return (obs, 3e38, *rest[1:]) if len(rest) > 1 and steps > 250 else (obs, *rest)


@each_script
@pytest.mark.parametrize("why", ["the rewards", "the learning rate"])
def test_a_run_that_diverges_stops_before_the_step(script, why, play, tmp_path, monkeypatch):
    more = []
    if why == "the rewards":
        monkeypatch.setattr(Trouble, "trouble", too_much)
    else:
        more = ["--learning-rate", 1e10]
    status, _, err = play(script, *flags(script, *more))
    path = checkpoint_of(tmp_path)
    *_, num_updates, _ = opened(path)["counters"]
    last = err.splitlines()[-1]
    assert status == 1 and f"update {num_updates + 1}: " in last and str(path.relative_to(tmp_path)) in last
    assert all_finite(path)
    steps = {int(state["step"]) for state in opened(path)["learners"]["optimizer"]["state"].values()}
    assert steps == {num_updates}  # Adam has its own count
    assert num_updates > 0


@each_script
@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_an_update_that_is_not_finite_changes_nothing(script, what):
    envs, network, act = make(script)
    args = script.Args(env_id="Lengths-v0", d_model=16)
    episodes = script.collect(envs, network, act, (1, 0), 0, 300)
    if what == "loss":
        for episode in episodes:
            episode.reward[:] = 3e38
    else:
        network.encoder[0].weight.register_hook(lambda gradient: gradient * math.inf)
    optimizer = torch.optim.Adam(network.parameters())
    if script is ppo_tbb:
        rows = script.Rows(*(torch.as_tensor(np.concatenate(x))[:, None] for x in zip(*episodes)))
        step = partial(script.update, network, optimizer, script.assess(network, rows, args), args)
    else:
        buffer = (script.Tape if script is dqn_tbb else script.Segments)(args, envs, "cpu")
        for episode in episodes:
            buffer.add(episode)
        target = make(script)[1]
        batch = buffer.sample(100, np.random.default_rng(0))
        step = partial(script.update, network, target, optimizer, batch, args)
    before = bits(network.state_dict())
    with pytest.raises(FloatingPointError):
        step()
    assert bits(network.state_dict()) == before and not optimizer.state
    if script is not ppo_tbb:
        assert bits(target.state_dict()) == bits(make(script)[1].state_dict())


SIZES = {  # small ones
    "lru": dict(d_state=5),
    "s5": dict(d_state=4, blocks=2),
    "ffm": dict(num_traces=3, num_frequencies=2),
    "linear_transformer": dict(num_heads=2, d_key=4, d_value=3),
    "gru": dict(d_state=5),
}


@pytest.mark.parametrize("name", MEMORIES)
@pytest.mark.parametrize("rows, p", [(1_000_000, 0.0), (200_000, 0.001)], ids=["one_episode", "resets"])
@torch.no_grad()
def test_float32_lasts_a_million_rows(name, rows, p):
    """In 13 pieces, the state carried over. Errors do not pile up: the last rows are no worse than the first."""
    torch.manual_seed(0)
    memory = MEMORIES[name](4, **SIZES.get(name, {}))
    rows = rows // 50 if name == "gru" else rows  # a GRU is a loop over the longest episode
    x, start = torch.randn(rows, 1, 4), torch.rand(rows, 1) < p

    def feed(memory, x):
        state, y = memory.initial_state(1), []
        for piece, starts in zip(x.chunk(13), start.chunk(13)):
            out, state = memory(piece, state, starts)
            y.append(out.double())
        return torch.cat(y)

    single = feed(memory, x)
    error = single - feed(memory.double(), x.double())
    assert single.isfinite().all()
    assert error.abs().max() < 1e-3  # LayerNorm magnifies a row of nearly equal features
    assert error.square().mean().sqrt() < 1e-5
    assert error[-rows // 10 :].square().mean().sqrt() < 1e-5


@pytest.mark.parametrize("dtype, rtol", [(torch.float64, 1e-9), (torch.float32, 1e-3)])
def test_decays_of_zero_and_one_have_the_right_gradients(dtype, rtol):
    """|lambda| of the LRU at its limits: exactly 1 to any precision, 1 - 2e-9, 1/e, and exactly 0."""
    torch.manual_seed(0)
    cell = LRUCell(4, d_state=4).double()
    with torch.no_grad():
        cell.nu_log.copy_(torch.tensor([-100.0, -20.0, 0.0, 10.0]))
    x = torch.randn(300, 2, 4, dtype=torch.float64)
    start = torch.rand(300, 2) < 0.01
    weight = torch.randn(300, 2, 4, dtype=torch.float64)

    def loop(x, state, start):
        decay, b = cell.lift(x)
        h = []
        for b_t, start_t in zip(b, start):
            state = decay * state * ~start_t[:, None] + b_t
            h.append(state)
        return cell.readout(torch.stack(h), x)

    y = loop(x, cell.initial_state(2), start)
    slow = torch.autograd.grad((y * weight).mean(), [*cell.parameters()])
    cell.to(dtype)
    decay, _ = cell.lift(x.to(dtype))
    assert decay[0].abs() == 1 and decay[3] == 0
    y, _ = cell(x.to(dtype), cell.initial_state(2), start)
    fast = torch.autograd.grad((y * weight).mean(), [*cell.parameters()])
    for (name, _), a, b in zip(cell.named_parameters(), fast, slow):
        assert a.isfinite().all(), name
        assert (a - b).norm() <= rtol * b.norm(), name
