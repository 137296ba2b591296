"""Plays other people's environments for a few steps, and writes the table of them to README.md (or to another page).

    pip install -r recipes/requirements.txt && python recipes/environments.py [PAGE]
"""

import contextlib
import io
import os
import re
import runpy
import shutil
import signal
import subprocess
import sys
import tempfile
import textwrap
from pathlib import Path

ROOT = Path(__file__).parent.parent.absolute()
BEGIN, END = "<!-- table: environments -->\n", "<!-- end -->\n"

SCRIPTS = ["dqn_tbb.py", "ppo_tbb.py", "sac_tbb.py"]
ENVIRONMENTS = """
CartPole-v1, Acrobot-v1, MountainCarContinuous-v0, Pendulum-v1
FrozenLake-v1, Blackjack-v1, CliffWalking-v1, Taxi-v3, Taxi-v4, Taxi-v4 with action_mask
LunarLander-v3, CarRacing-v3
InvertedPendulum-v5, HalfCheetah-v5, Ant-v5
ALE/Breakout-v5, ale_py:ALE/Breakout-v5, ale_py:ALE/Breakout-v5 with pixels
minigrid:MiniGrid-MemoryS7-v0, minigrid:BabyAI-GoToRedBall-v0, tasks:ImageMemory-v0 with pixels
popgym-RepeatPreviousEasy-v0, popgym-MineSweeperEasy-v0, popgym-BattleshipEasy-v0, popgym-PositionOnlyPendulumEasy-v0
"""
FLAGS = "--total-timesteps 40 --num-envs 1 --max-episode-steps 30 --memory none --d-model 8 --eval-episodes 1".split()
MORE = {"dqn_tbb.py": "--learning-starts 20 --batch-size 10 --train-frequency 10 --buffer-size 1000".split()}
MORE |= {"ppo_tbb.py": "--update-epochs 1 --num-minibatches 1".split(), "sac_tbb.py": MORE["dqn_tbb.py"]}


def apply(recipe, folder):
    """Copies what a recipe changes into a folder and applies its patch there. Returns the paths of these scripts.

    Raises RuntimeError where the patch does not fit: a script has changed.
    """
    patch = ROOT / "recipes" / f"{recipe}.patch"
    names = re.findall(r"^\+\+\+ b/(.+)", patch.read_text(), re.M)
    scripts = [Path(shutil.copy(ROOT / name, folder)) for name in names]
    env = os.environ | {"GIT_CEILING_DIRECTORIES": str(Path(folder).parent)}  # else git may skip the files
    git = subprocess.run(["git", "apply", patch], cwd=folder, env=env, capture_output=True, text=True)
    if git.returncode:
        raise RuntimeError(f"{recipe}.patch: {git.stderr}")
    return scripts


def play(script, env_id):
    """Runs a script in this process and in the current folder. Returns "" or the message with which it refused."""
    err, sys.argv = io.StringIO(), [str(script), "--env-id", env_id, *FLAGS, *MORE[script.name]]
    handlers = [(number, signal.getsignal(number)) for number in (signal.SIGINT, signal.SIGTERM)]
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(err):
        try:
            runpy.run_path(str(script), run_name="__main__")
            return ""
        except SystemExit as stop:
            assert stop.code == 2, stop
        finally:
            for number, handler in handlers:
                signal.signal(number, handler)
    message = err.getvalue().strip().splitlines()[-1].removeprefix(f"{script.name}: --env-id {env_id}: ")
    return re.sub(r", not \w+\(.*", "", message)  # a space of some size or other


def table():
    """The table in Markdown, and below it the messages of what was refused."""
    lines, messages = [f"| environment | `{'` | `'.join(SCRIPTS)}` |", "| --- " * (1 + len(SCRIPTS)) + "|"], []
    for entry in re.split(r"[,\n] *", ENVIRONMENTS.strip()):
        env_id, _, recipe = entry.partition(" with ")
        cells = [f"`{env_id}`" + f" with `{recipe}`" * bool(recipe)]
        with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
            scripts = apply(recipe, folder) if recipe else [ROOT / name for name in SCRIPTS]
            outcomes = {script.name: play(script, env_id) for script in scripts}
        for name in SCRIPTS:
            message = outcomes.get(name)
            if message and message not in messages:
                messages.append(message)
            if name in outcomes:
                cells.append(f"refused ({messages.index(message) + 1})" if message else "accepted")
            else:  # the recipe does not change this script
                cells.append("")
        lines.append(f"| {' | '.join(cells)} |")
    lines.append("")
    for number, message in enumerate(messages, 1):
        lines += textwrap.wrap(f"{number}. {message}", 120, subsequent_indent="   ", break_on_hyphens=False)
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.path[:0] = [str(ROOT), str(ROOT / "recipes")]  # of the scripts' and of tasks.py
    page = Path(*sys.argv[1:] or [ROOT / "recipes" / "README.md"])
    before, rest = page.read_text().split(BEGIN)
    _, after = rest.split(END)
    page.write_text(before + BEGIN + table() + END + after)
