"""What a run survives, in every script: SIGKILL, signals, wrong arguments, damaged files, numbers gone wrong.

KILLS=200 python -m pytest -s tests/test_trust.py -k sigkill     kills a run 200 times instead of 3
"""

import builtins
import math
import os
import pickle
import random
import re
import signal
import time
from contextlib import nullcontext

import helpers
import numpy as np
import pytest
import torch
from gymnasium.spaces import Box
from helpers import Lengths, assert_refused, checkpoint_of, contents, control, each, each_script, flags, load, outcome
from helpers import scalars
from torch.utils._pytree import tree_leaves
from torch.utils.tensorboard import SummaryWriter

import dqn_sbb
import dqn_tbb
import ppo_tbb
import sac_tbb

KILLS = int(os.environ.get("KILLS", 3))
play, trained = helpers.play, helpers.trained


def once_saved(folder, do):
    """For Lengths.trouble: do(checkpoint, *results) as soon as there is a checkpoint."""

    def trouble(*results):
        paths = [*folder.glob("runs/*/checkpoint.pt")]
        return do(paths[0], *results) if paths else results

    return staticmethod(trouble)


# ---------------------------------------------------------------------------------------------------------------------
# Processes killed and interrupted


@each(helpers.SCRIPTS if "KILLS" in os.environ else [dqn_tbb])  # the code that saves and resumes is the same in each
def test_resumed_run_is_bit_identical_after_sigkill(script, play, tmp_path):
    kills = KILLS if script is dqn_tbb else math.ceil(KILLS * 0.15)
    rng = random.Random(kills)
    fresh = flags(script, "--env-id", control(script), "--max-episode-steps", 30, "--eval-frequency", 150)
    fresh += ["--eval-episodes", 4, "--total-timesteps", 500 * kills + 300]
    assert play(script, *fresh, folder="whole")[0] == 0
    killed = tmp_path / "killed"
    killed.mkdir()
    newest, gap, resume = 0, math.inf, []

    def start():
        time.sleep(1 - time.time() % 1)  # TensorBoard tells files apart by the second
        life = helpers.forked(script.__file__, resume or fresh, killed)
        life.start()
        return life

    for _ in range(kills):
        # its first checkpoint, and then any moment up to the third: no further on a fast machine than on a slow one
        saves, end, life = [], math.inf, start()
        try:
            while len(saves) < 3 and time.monotonic() < end:
                time.sleep(0.002)
                assert life.is_alive(), f"it ended before it was killed, with status {life.exitcode}"
                for path in killed.glob("runs/*/checkpoint.pt"):
                    if path.stat().st_mtime_ns != newest:
                        newest, resume = path.stat().st_mtime_ns, ["--resume", path]
                        saves.append(time.monotonic())
                        gap = min([gap, *np.diff(saves)])
                        end = saves[0] + rng.uniform(0, 2 * gap)
        finally:
            life.kill()
            life.join()
        newest = path.stat().st_mtime_ns
    print(f"{script.__name__}: killed {kills} times up to step {load(path)['counters'][1]:,}")
    life = start()
    life.join()
    assert life.exitcode == 0 and (killed / "out").read_text().splitlines()[-1].startswith("final: ")
    assert outcome(path) == outcome(checkpoint_of(tmp_path / "whole"))
    assert scalars(killed) == scalars(tmp_path / "whole")


@each_script
def test_resumed_run_is_bit_identical_after_signals(script, play, trained, tmp_path, monkeypatch):
    assert trained(script, "whole")[0] == 0
    steps, resume = [], []

    def interrupt(*results):
        steps.append(results)
        if len(steps) == 50:
            signal.raise_signal(number)
        return results

    with monkeypatch.context() as patch:
        patch.setattr(Lengths, "trouble", staticmethod(interrupt))
        for number in helpers.SIGNALS:
            steps.clear()
            status, out, err = play(script, *(resume or flags(script)), folder="stopped")
            assert (status, err) == (128 + number, "") and "final" not in out
            step, path = re.search(r"checkpoint of step ([\d,]+): (\S+) \(--resume", out).groups()
            resume = ["--resume", path]  # by the very words
            assert load(path)["counters"][1] == int(step.replace(",", ""))
    status, out, _ = play(script, *resume, folder="stopped")
    assert status == 0 and "final: " in out
    assert outcome(path) == outcome(checkpoint_of(tmp_path / "whole"))
    assert scalars(tmp_path / "stopped") == scalars(tmp_path / "whole")


@each_script
def test_signal_saves_though_stdout_is_closed(script, play, tmp_path, monkeypatch):
    """In `python dqn_tbb.py | tee log` Ctrl-C ends tee first."""
    steps, clock = [], time.time

    def closed(*args, **kwargs):
        raise BrokenPipeError

    def interrupt(*results):
        steps.append(results)
        if len(steps) == 50:
            signal.raise_signal(signal.SIGINT)
            patch.setattr(builtins, "print", closed)
            patch.setattr(time, "time", lambda: clock() + 10)  # the next line of progress is due
        return results

    with monkeypatch.context() as patch, pytest.raises(BrokenPipeError):
        patch.setattr(Lengths, "trouble", staticmethod(interrupt))
        play(script, *flags(script, "--eval-frequency", 1000))
    assert 0 < load(checkpoint_of(tmp_path))["counters"][1] < helpers.TOTAL


# ---------------------------------------------------------------------------------------------------------------------
# Disks and checkpoints


@each_script
@pytest.mark.parametrize("broken", ["file", "torch.save", "SummaryWriter.add_scalar"])
def test_full_disk_leaves_the_checkpoint_before(script, broken, play, tmp_path, monkeypatch):
    seen = []

    def save(*args):
        raise RuntimeError("unexpected pos 64\nC++")

    def add_scalar(*args):
        raise OSError("No space left on device")

    def fill(path, *results):
        if not seen:
            seen.append(path.read_bytes())
            os.symlink("/dev/full", f"{path}.tmp")
            if broken == "torch.save":
                patch.setattr(torch, "save", save)
            if broken == "SummaryWriter.add_scalar":
                patch.setattr(SummaryWriter, "add_scalar", add_scalar)
        return results

    with monkeypatch.context() as patch:
        patch.setattr(Lengths, "trouble", once_saved(tmp_path, fill))
        assert_refused(play(script, *flags(script)), "/checkpoint.pt: ", "unchanged")
    path = checkpoint_of(tmp_path)
    assert path.read_bytes() == seen[0]
    if broken == "file":
        os.unlink(f"{path}.tmp")
        assert play(script, "--resume", path)[0] == 0


@each_script
def test_directory_that_cannot_be_written_is_refused(script, play, tmp_path):
    (tmp_path / "runs").write_text("a file where the directory should be")
    assert_refused(play(script, *flags(script)), "runs/")


@each(helpers.OFF_POLICY)
@pytest.mark.parametrize("size", [10**15, 10**18, 10**30], ids=["bytes", "overflow", "not_int64"])
def test_buffer_larger_than_memory_is_refused(script, size, play, tmp_path):
    assert_refused(play(script, *flags(script), "--buffer-size", size))
    assert not [*tmp_path.iterdir()]


class Malicious:
    def __reduce__(self):
        return os.mkdir, ("it_ran",)


@each_script
@pytest.mark.parametrize("flag", ["--resume", "--evaluate"])
def test_invalid_checkpoint_is_refused(script, flag, play, trained, tmp_path):
    trained(script)
    good = checkpoint_of(tmp_path)
    whole, path = good.read_bytes(), tmp_path / "broken.pt"
    name = next(name for name in load(good)["learners"] if name != "optimizer")

    def changed(**changes):
        return {key: value for key, value in (load(good) | changes).items() if value is not None}

    objects = {f"without {key}": changed(**{key: None}) for key in load(good)}
    objects |= {"other script": changed(script="other.py"), "other args": changed(args={"lstm": True})}
    objects |= {"few counters": changed(counters=(1, 2)), "a counter": changed(counters=3)}
    objects |= {"no learners": changed(learners={}), "odd learners": changed(learners={name: 5})}
    objects |= {"odd optimizer": changed(learners=load(good)["learners"] | {"optimizer": 5})}
    objects |= {"malicious": changed(args=Malicious()), "list": [1, 2], "weights": {"weights": torch.ones(3)}}
    files = {f"the first {n} bytes": whole[:n] for n in (0, 1, 100, len(whole) // 2, len(whole) - 1)}
    files |= {"text": b"hello", "a bare pickle": pickle.dumps(Malicious())}
    for kind, content in (objects | files).items():
        torch.save(content, path) if kind in objects else path.write_bytes(content)
        before = contents(tmp_path)
        assert_refused(play(script, flag, path), str(path), "other.py" if kind == "other script" else "")
        assert contents(tmp_path) == before and not (tmp_path / "it_ran").exists(), kind
    for nowhere in ("nowhere.pt", ".", ""):  # "": of a variable that is not set
        assert_refused(play(script, flag, nowhere), f"'{nowhere}'")


@each_script
@pytest.mark.parametrize("flag", ["--resume", "--evaluate"])
def test_checkpoint_of_another_network_is_refused(script, flag, play, trained, tmp_path, monkeypatch):
    trained(script)
    path, before = checkpoint_of(tmp_path), contents(tmp_path)
    for change in ("--d-model 32", "--memory gru", f"--env-id {control(script)}", "--no-previous-action"):
        assert_refused(play(script, flag, path, *change.split()), str(path))
    monkeypatch.setattr(Lengths, "observation_space", Box(0, np.inf, (3,)))  # changed in the meantime
    monkeypatch.setattr(Lengths, "observe", lambda env: np.zeros(3, dtype=np.float32))
    assert_refused(play(script, flag, path), str(path))
    assert contents(tmp_path) == before


@each_script
def test_checkpoint_with_arguments_of_other_types_is_refused(script, play, trained, tmp_path):
    trained(script)
    path = checkpoint_of(tmp_path)
    checkpoint = load(path)
    for wrong in (dict(gamma="x"), dict(seed=None), dict(env_id=3), dict(memory_kwargs=3)):
        torch.save(checkpoint | {"args": checkpoint["args"] | wrong}, path)
        assert_refused(play(script, "--resume", path), str(path), "not a complete checkpoint")


@each_script
@pytest.mark.parametrize("flag", ["--resume", "--evaluate"])
def test_checkpoint_imports_no_module_unasked(script, flag, play, trained, tmp_path, monkeypatch):
    trained(script)
    path, module = checkpoint_of(tmp_path), f"imported_{script.__name__}_{flag[2:]}"
    (tmp_path / f"{module}.py").write_text("import os\nos.mkdir('it_ran')")
    monkeypatch.syspath_prepend(tmp_path)
    checkpoint, env_id = load(path), f"{module}:{helpers.lengths(script)}"
    checkpoint["args"]["env_id"] = env_id
    torch.save(checkpoint, path)
    assert_refused(play(script, flag, path), str(path), f"--env-id {env_id}")
    assert play(script, flag, path, "--env-id", helpers.lengths(script))[0] == 0  # another that is known
    assert not (tmp_path / "it_ran").exists()
    assert play(script, flag, path, "--env-id", env_id)[0] == 0
    assert (tmp_path / "it_ran").exists()


# ---------------------------------------------------------------------------------------------------------------------
# Arguments


EVERYWHERE = """seed=-1 seed=4294967296 seed=one max-episode-steps=-1 total-timesteps=0 num-envs=0 num-envs=-3 d-model=0
    eval-frequency=0 eval-episodes=0 gamma=2 gamma=-1 gamma=nan learning-rate=-1 learning-rate=0 learning-rate=nan
    learning-rate=inf max-grad-norm=0 max-grad-norm=-1 max-grad-norm=nan memory=lstm memory= no-such-thing=1
    capture-video="""
OFF_POLICY = f"""tau=2 tau=nan learning-starts=-5 learning-starts={helpers.TOTAL} batch-size=0 batch-size=600
    buffer-size=0 train-frequency=0"""
DQN = OFF_POLICY + " start-e=5 end-e=-1 exploration-fraction=-0.1 exploration-fraction=2"
WRONG = {
    dqn_tbb: DQN,
    dqn_sbb: DQN + " segment-length=0 segment-length=101 burn-in=-1 burn-in=50",
    ppo_tbb: """gae-lambda=2 num-minibatches=0 update-epochs=0 clip-coef=-1 clip-coef=nan ent-coef=-1 ent-coef=inf
        vf-coef=-1 target-kl=-1 target-kl=nan""",
    sac_tbb: OFF_POLICY,
}
TABLE = [(script, wrong) for script in WRONG for wrong in (EVERYWHERE + " " + WRONG[script]).split()]


@pytest.mark.parametrize("script, wrong", TABLE, ids=lambda x: getattr(x, "__name__", x))
def test_wrong_argument_is_refused_before_anything_is_written(script, wrong, play, tmp_path):
    name, value = wrong.split("=")
    result = play(script, *flags(script), f"--{name}", *value.split())
    assert_refused(result, f"--{name}", value, lines=0)
    assert result[1] == "" and not [*tmp_path.iterdir()]


@each_script
def test_arguments_that_exclude_each_other_are_refused(script, play, trained, tmp_path):
    trained(script)
    path, before = checkpoint_of(tmp_path), contents(tmp_path)
    for more in (["--resume", path, "--evaluate", path], ["--resume", path, "--capture-video"]):
        assert_refused(play(script, *more), "--evaluate", lines=0)
    assert_refused(play(script, "--resume", path, "--gamma", 2), "--gamma 2", lines=0)
    assert contents(tmp_path) == before


@each_script
def test_memory_kwargs_reach_the_memory_and_its_checkpoint(script, play, tmp_path):
    for wrong in ("horizn 3", "horizon 0", "d_state -3"):
        assert_refused(play(script, *flags(script), "--memory-kwargs", *wrong.split()))
    assert_refused(play(script, *flags(script), *"--memory-kwargs min_horizon 5000".split()), "must not exceed horizon")
    assert_refused(play(script, *flags(script), *"--memory s5 --memory-kwargs blocks 0".split()))
    assert_refused(play(script, *flags(script), *"--memory none --memory-kwargs horizon 5".split()), "none has no")
    assert not [*tmp_path.iterdir()]
    play(script, *flags(script), *"--memory-kwargs horizon 5000 d_state 12 num_layers 1".split())
    path = checkpoint_of(tmp_path)
    checkpoint = load(path)
    name = next(name for name in checkpoint["learners"] if name != "optimizer")
    states = [x.shape for key, x in checkpoint["learners"][name].items() if "nu_log" in key]
    assert states == [(12,)] and checkpoint["args"]["memory_kwargs"]["horizon"] == 5000
    assert play(script, "--evaluate", path, "--memory-kwargs", "horizon", 5000)[0] == 0
    for other in ("horizon 7", "d_state 13", "min_horizon 2"):  # the decays are those that were saved
        assert_refused(play(script, "--evaluate", path, "--memory-kwargs", *other.split()), "cannot change")


@pytest.mark.parametrize("script", [dqn_tbb, dqn_sbb])
def test_exploration_may_end_at_once(script, play, tmp_path):
    assert play(script, *flags(script), "--exploration-fraction", 0)[0] == 0
    assert {epsilon for _, epsilon in scalars(tmp_path)["charts/epsilon"]} == {repr(float(np.float32(0.05)))}


# ---------------------------------------------------------------------------------------------------------------------
# Values that are not finite


TROUBLES = {  # what an environment returns for obs, (reward, terminated, truncated,) info
    "observation": lambda obs, *rest: (obs * np.nan if len(rest) > 1 else obs, *rest),
    "first observation": lambda obs, *rest: (obs * np.nan if len(rest) == 1 else obs, *rest),
    "reward": lambda obs, *rest: (obs, np.inf, *rest[1:]) if len(rest) > 1 else (obs, *rest),
    "exception": lambda *results: 1 // 0,
}


@each_script
@pytest.mark.parametrize("what", TROUBLES)
def test_broken_environment_leaves_a_checkpoint_that_resumes(script, what, play, trained, tmp_path, monkeypatch):
    seen = []

    def spoil(path, *results):
        seen.append(path.read_bytes())
        return TROUBLES[what](*results)

    assert trained(script, "whole")[0] == 0
    with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError) if what == "exception" else nullcontext():
        patch.setattr(Lengths, "trouble", once_saved(tmp_path / "broken", spoil))
        assert_refused(play(script, *flags(script), folder="broken"), "Lengths-v0", "not finite")
    path = checkpoint_of(tmp_path / "broken")
    assert path.read_bytes() == seen[0] == seen[-1]
    if what == "exception":  # once is enough: all leave the first checkpoint as it was
        assert play(script, "--resume", path)[0] == 0 and outcome(path) == outcome(checkpoint_of(tmp_path / "whole"))


def test_final_observation_that_is_not_finite_is_refused(monkeypatch):
    final = lambda obs, *rest: (obs * np.nan if obs[0] == obs[1] else obs, *rest)
    monkeypatch.setattr(Lengths, "trouble", staticmethod(final))
    envs, network, act = helpers.make(dqn_tbb, num_envs=1)  # `collect` is the same in each script
    with pytest.raises(SystemExit) as stop:
        dqn_tbb.collect(envs, network, act, 0)
    assert stop.value.code == 2


@each_script
def test_network_that_is_not_finite_is_refused(script, play, tmp_path):
    off_policy = f"--learning-starts {helpers.TOTAL - 1} --train-frequency 999"
    one = "--num-minibatches 1 --update-epochs 1" if script is ppo_tbb else off_policy
    more = ["--learning-rate", 1e30, "--eval-frequency", 1000, *one.split()]  # one update, so that no loss follows
    assert_refused(play(script, *flags(script, *more)), "the network's output is not finite", "unchanged")
    assert not [*tmp_path.glob("runs/*/checkpoint.pt")]


@each_script
@pytest.mark.parametrize("why", ["rewards", "learning rate", "gradient"])
def test_run_that_diverges_stops_before_the_step(script, why, play, tmp_path, monkeypatch):
    steps, more, step, clip = [], [], torch.optim.Adam.step, torch.nn.utils.clip_grad_norm_

    def checked_step(optimizer):
        parameters = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        assert all(p.grad.isfinite().all() for p in parameters)
        steps.append(step(optimizer))

    def clip_one_that_is_infinite(parameters, norm):
        parameters = [*parameters]
        parameters[-1].grad[0] = math.inf if len(steps) == 7 else 0
        return clip(parameters, norm)

    monkeypatch.setattr(torch.optim.Adam, "step", checked_step)
    if why == "rewards":  # finite ones whose mean is not
        large = lambda path, obs, *rest: (obs, 3e38, *rest[1:]) if len(rest) > 1 else (obs, *rest)
        monkeypatch.setattr(Lengths, "trouble", once_saved(tmp_path, large))
    elif why == "gradient":
        monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", clip_one_that_is_infinite)
    else:
        more = ["--learning-rate", 1e30, "--eval-frequency", 1]
    words = ["unchanged"] if why == "learning rate" else ["the loss is", "unchanged"]  # an action of NaN may come first
    assert_refused(play(script, *flags(script), *more), *words)
    assert steps
    for path in tmp_path.glob("runs/*/checkpoint.pt"):
        assert all(x.isfinite().all() for x in tree_leaves(load(path)["learners"]) if torch.is_tensor(x))
