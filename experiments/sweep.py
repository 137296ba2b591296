"""Runs the experiments: every script x task x memory x segment length x variant x seed of a table, in parallel.

    pip install -r experiments/requirements.txt
    python experiments/sweep.py sample_efficiency sensitivity      # on this machine, a run on each core
    python experiments/sweep.py ablations --ray auto               # or on the Ray cluster that is running

Appends to experiments/results/NAME.csv, one row an evaluation. A run's rows are written when it has finished: started
again, a sweep skips what is there and redoes what was killed. Seconds are comparable with no more --jobs than idle
cores.

    run               script, task and all else that tells a run from others
    script, env_id, memory, segment_length (empty: TBB), seed, variant, total_timesteps     the same, one by one;
                      a memory of several names is a stack of layers
    step, seconds     of the evaluation, since the start
    eval_return       mean undiscounted return of greedy episodes
    episodic_return, td_loss, padding, q_values     means of what was logged since the evaluation before
    sensitivity       |d Q(s_n, a_n) / d o_i| by age n - i = 0, 1, 2, ..., separated by spaces (variant sensitivity)
"""

import argparse
import contextlib
import csv
import io
import itertools
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from pathlib import Path
from typing import NamedTuple

import gymnasium as gym
import numpy as np
import popgym  # noqa: F401  registers popgym-*
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.util.tensor_util import make_ndarray
from tqdm import tqdm

ROOT = Path(__file__).parent.parent.absolute()

# ---------------------------------------------------------------------------------------------------------------------
# What is run. Each line of an experiment is a cross product; a task's number is its total_timesteps

TBB, SBB, PPO, SAC = "dqn_tbb.py", "dqn_sbb.py", "ppo_tbb.py", "sac_tbb.py"
RECURRENT_PPO, SB3_SAC = "experiments/recurrent_ppo.py", "experiments/sb3_sac.py"
MONOIDS = ["lru", "s5", "ffm", "linear_transformer"]
MEMORIES = [*MONOIDS, "mingru", "lru mingru", "gru", "none"]
LENGTHS = [10, 20, 50, 100]
TASKS = {
    "RepeatPreviousEasy": 8_000,
    "RepeatPreviousMedium": 15_000,
    "RepeatFirstEasy": 20_000,
    "CountRecallEasy": 10_000,
    "PositionOnlyCartPoleEasy": 20_000,
    "AutoencodeEasy": 10_000,
}
MORE_TASKS = TASKS | {"HigherLowerEasy": 10_000, "NoisyPositionOnlyCartPoleEasy": 20_000}
EASY_GAMES = ["HigherLowerEasy", "MineSweeperEasy", "BattleshipEasy"]
CONTROL = ["PositionOnlyCartPoleEasy", "NoisyPositionOnlyCartPoleEasy", "PositionOnlyPendulumEasy"]
POPGYM = [name[len("popgym-") : -len("-v0")] for name in gym.registry if name.startswith("popgym-")]  # Easy first
POPGYM = [task for task in POPGYM if "Labyrinth" not in task]  # only with mazelib
HIDDEN = [task for task in POPGYM if "Only" in task]  # control with hidden velocities or positions
CARTPOLES = [task for task in HIDDEN if "Pendulum" not in task]  # those with discrete actions
MINES = [task for task in POPGYM if "MineSweeper" in task]  # episodes of six or seven steps with random actions
BANDITS = [task for task in POPGYM if "Bandit" in task]  # episodes of 200 to 600 steps
GAMES = [task for task in POPGYM if task.startswith(("Battle", "Concentration"))]
PREDICTION = [task for task in POPGYM if task not in (*HIDDEN, *MINES, *BANDITS, *GAMES)]  # actions change only rewards
FIRST = [task for task in PREDICTION if task.startswith("RepeatFirst")]  # each step asks for the first card
MORE_PREDICTION = [task for task in MORE_TASKS if task in PREDICTION]
PENDULUMS = [f"{noise}PositionOnlyPendulum{level}" for noise in ("", "Noisy") for level in ("Easy", "Medium", "Hard")]
FULL_PENDULUMS = [f"experiments.full_pendulum:FullPendulum{level}" for level in ("Easy", "Medium", "Hard")]
ROBOTS = [f"experiments.partial_mujoco:{robot}" for robot in ("Hopper", "Walker2d", "HalfCheetah")]
MUJOCO = [f"{robot}{what}" for what in ("Positions", "Velocities") for robot in ROBOTS]
FULL = [f"{robot}Full" for robot in ROBOTS]
FAR = {"RepeatPreviousMedium": 15_000, "RepeatFirstEasy": 20_000}  # the answer is an observation of long ago
NEAR = {"RepeatPreviousEasy": 8_000}  # it is three steps old
HALF = ["--d-model", "64"]  # hundreds of runs: half the width, a third of the time
SMALL = [*HALF, "--learning-rate", "1e-3"]
IMMEDIATE = ["--gamma", "0"]  # an action changes only its own reward
SHORT = ["--gae-lambda", "0.5"]
HALVED = ["--gamma", "0.5"]
SHORTER = [*HALVED, *SHORT]
ONE_EACH = ["--num-minibatches", "16"]  # one episode in each minibatch of PPO
FEW = ["--num-envs", "4", "--num-minibatches", "4"]  # likewise, but four times as many iterations: long episodes
MANY = ["--num-envs", "128"]  # where episodes have a handful of steps
FOUR_EACH = ["--num-envs", "64", "--num-minibatches", "16", "--learning-rate", "5e-4"]  # for longer runs
FRESH = ["--num-envs", "1", "--train-frequency", "5"]  # episodes of 1,000 steps: the policy changes after each
RARE_UPDATES = ["--train-frequency", "100"]  # of DQN, which otherwise overfits random rewards
SHORT_MEMORY = ["--memory-kwargs", "horizon", "2", "num_layers", "1"]  # enough for velocities: see sac.md
LONG_MEMORY = ["--memory-kwargs", "horizon", "10000"]  # for episodes of up to 831 steps
LONG = [*SMALL, "--batch-size", "1000", "--train-frequency", "50"]  # for episodes of 104 and 156 steps


def t_maze(script, n, memory, episodes, updates=1, **kwargs):
    """A corridor of n steps that moves the agent. DQN makes so many updates, of eight episodes each, per episode."""
    flags = ["--env-kwargs", "corridor_length", n, "walk", "False", "--no-previous-action"]
    flags += ["--d-model", 32, "--learning-rate", 1e-3, "--gamma", 0.5 if script == TBB else 0]
    if script == TBB:
        flags += ["--num-envs", 16, "--batch-size", 8 * n, "--train-frequency", n // updates]
        flags += ["--learning-starts", 8 * n, "--buffer-size", 400 * n, "--exploration-fraction", 0.5]
    flags += ["--memory-kwargs", *itertools.chain(*kwargs.items())] if kwargs else []
    task = {"experiments.tmaze:TMaze": episodes * n}
    return dict(script=[script], task=task, memory=memory, flags=[*map(str, flags)])


def t_mazes(script, n, episodes):
    """Corridors of n steps for every memory, with horizons of up to 100 n."""
    return [
        t_maze(script, n, ["lru"], episodes, horizon=100 * n, min_horizon=n, d_state=64),
        t_maze(script, n, ["s5", "mingru", "lru mingru"], episodes, horizon=100 * n, d_state=64),
        t_maze(script, n, ["ffm"], episodes, horizon=100 * n),
        t_maze(script, n, ["linear_transformer", "gru", "none"], episodes),
    ]


def popgym_ppo(steps, memory, prediction, bandits, first=()):
    """All tasks of POPGym, with the arguments of each family; first: what FIRST has in addition to `prediction`."""
    families = [
        (HIDDEN, []),
        ([task for task in PREDICTION if task not in FIRST], [*IMMEDIATE, *prediction]),
        (FIRST, [*IMMEDIATE, *prediction, *first]),
        (MINES, [*SHORT, *MANY]),
        (BANDITS, [*SHORTER, *bandits]),
        (GAMES, [*SHORTER, *ONE_EACH]),
    ]
    return [dict(script=[PPO], task=dict.fromkeys(x, steps), memory=memory, flags=flags) for x, flags in families]


def popgym_recurrent_ppo(steps, tasks):
    """RecurrentPPO, with the inputs, scale of rewards, learning rate, entropy, discounts and lambdas of ppo_tbb.py."""
    families = [(HIDDEN, []), (PREDICTION, IMMEDIATE), (MINES, SHORT), (GAMES, SHORTER)]
    return [
        dict(script=[RECURRENT_PPO], flags=["--like-ppo-tbb", *flags])
        | dict(task={task: steps for task in family if task in tasks})
        for family, flags in families
    ]


LRU = dict(script=[TBB], task=TASKS, memory=["lru"], flags=SMALL)

EXPERIMENTS = {
    "sample_efficiency": [
        dict(script=[TBB], task=TASKS, memory=MONOIDS, flags=SMALL),
        dict(script=[SBB], task=TASKS, memory=MONOIDS, segment_length=LENGTHS[-1:], variant=["", "large_batch"])
        | dict(flags=SMALL),
        dict(script=[SBB], task=TASKS, memory=MONOIDS, segment_length=LENGTHS[:-1], flags=SMALL),
    ],
    "sensitivity": [
        dict(script=[TBB], task=FAR | NEAR, memory=MONOIDS, variant=["sensitivity"], flags=SMALL),
        dict(script=[SBB], task=FAR | NEAR, memory=MONOIDS, segment_length=[10], variant=["sensitivity"], flags=SMALL),
    ],
    "wall_clock": [
        dict(script=[TBB], task=FAR, memory=["lru", "gru"], flags=SMALL),
        dict(script=[SBB], task=FAR, memory=["lru"], segment_length=LENGTHS, flags=SMALL),
    ],
    "recall": [
        LRU | dict(task={"RepeatPreviousMedium": 50_000, "RepeatPreviousHard": 200_000}, flags=LONG),
        dict(script=[RECURRENT_PPO], task={"RepeatPreviousMedium": 200_000, "RepeatPreviousHard": 200_000}),
    ],
    "ablations": [
        LRU | dict(variant=["", "authors_next_value", "cut_last_episode", "prioritised", "no_previous_action"]),
        dict(script=[SBB], task=TASKS, memory=["lru"], segment_length=[20], variant=["", "burn_in"], flags=SMALL),
    ],
    "memories": [
        LRU | dict(task=MORE_TASKS, memory=MEMORIES),
        dict(script=[PPO], task=dict.fromkeys(CONTROL[:2], 50_000), memory=MEMORIES, flags=HALF),
        dict(script=[PPO], task=dict.fromkeys(MORE_PREDICTION, 50_000), memory=MEMORIES, flags=[*HALF, *IMMEDIATE]),
    ],
    "t_maze": [
        *(run for n in (50, 250, 1000) for run in (*t_mazes(TBB, n, 300), *t_mazes(PPO, n, 600))),
        *(t_maze(x, 4000, ["lru"], 400, horizon=400_000, min_horizon=4000, d_state=64) for x in (TBB, PPO)),
        *(t_maze(x, 10_000, ["lru"], 300, 2, horizon=1_000_000, min_horizon=10_000, d_state=64) for x in (TBB, PPO)),
    ],
    "defaults": [
        dict(script=[TBB], task=dict.fromkeys([*TASKS, *EASY_GAMES], 40_000), memory=["lru"]),
        dict(script=[PPO], task=dict.fromkeys(["RepeatPreviousEasy", *CONTROL], 250_000), memory=["lru", "none"]),
    ],
    "popgym": [
        *popgym_ppo(250_000, ["none", "lru", "mingru", "lru mingru", "lru lru mingru"], ONE_EACH, FEW),
        *popgym_ppo(1_000_000, ["lru mingru"], FOUR_EACH, ONE_EACH),
        *popgym_ppo(1_000_000, ["lru lru mingru"], FOUR_EACH, ONE_EACH, LONG_MEMORY),
        dict(script=[PPO], task=dict.fromkeys(HIDDEN, 1_000_000), memory=["mingru"]),
        dict(script=[PPO], task=dict.fromkeys(PREDICTION, 1_000_000), memory=["lru"])
        | dict(flags=[*IMMEDIATE, *FOUR_EACH]),
        dict(script=[TBB], task=dict.fromkeys(PREDICTION, 100_000), memory=["lru mingru"])
        | dict(flags=[*IMMEDIATE, *RARE_UPDATES]),
        dict(script=[TBB], task=dict.fromkeys(CARTPOLES, 100_000), memory=["lru mingru"]),
        dict(script=[TBB], task=dict.fromkeys([*MINES, *BANDITS, *GAMES], 100_000), memory=["lru mingru"])
        | dict(flags=HALVED),
        *popgym_recurrent_ppo(250_000, [*MORE_TASKS, *EASY_GAMES, *CONTROL]),
    ],
    "sac": [
        dict(script=[SAC], task={PENDULUMS[0]: 50_000}, memory=["lru"], variant=["", "separate_memories"]),
        dict(script=[SAC], task=dict.fromkeys(PENDULUMS[1:], 50_000), memory=["lru"]),
        dict(script=[SAC], task=dict.fromkeys([*PENDULUMS, *FULL_PENDULUMS], 50_000), memory=["none"]),
        dict(script=[SB3_SAC], task=dict.fromkeys(FULL_PENDULUMS, 10_000), flags=["--reward-scale", "1000"]),
        dict(script=[PPO], task=dict.fromkeys(PENDULUMS, 250_000), memory=["lru", "none"]),
    ],
    "mujoco": [
        dict(script=[SAC], task=dict.fromkeys(MUJOCO, 100_000), memory=["lru"], flags=[*FRESH, *SHORT_MEMORY]),
        dict(script=[SAC], task=dict.fromkeys([*MUJOCO, *FULL], 100_000), memory=["none"], flags=FRESH),
        dict(script=[SB3_SAC], task=dict.fromkeys(FULL, 100_000)),
        dict(script=[PPO], task=dict.fromkeys(MUJOCO, 250_000), memory=["lru", "none"], flags=FEW),
    ],
}
EVALUATIONS = 10  # in a run
SMOKE_TIMESTEPS = 250
SMOKE = ["--num-envs", "1", "--eval-episodes", "4", "--eval-frequency", "100"]
SMOKE_MORE = {TBB: ["--d-model", "16", "--learning-starts", "100"], PPO: ["--d-model", "16"]}
SMOKE_MORE |= {SBB: SMOKE_MORE[TBB], SAC: SMOKE_MORE[TBB], RECURRENT_PPO: ["--num-steps", "16"], SB3_SAC: []}

# A variant of a script is more flags, or the patch experiments/variants/NAME.patch
FLAGS = {"no_previous_action": ["--no-previous-action"], "burn_in": ["--burn-in", "10"]}
FLAGS |= {"large_batch": ["--batch-size", "1000"]}  # half of it is padding


# ---------------------------------------------------------------------------------------------------------------------
# One run


class Run(NamedTuple):
    script: str
    task: str
    memory: str = ""
    segment_length: int | str = ""
    variant: str = ""
    seed: int = 1
    total_timesteps: int = 0
    flags: tuple = ()

    @property
    def key(self):
        length = f"L={self.segment_length}" if self.segment_length else ""
        parts = (Path(self.script).stem, self.task, self.memory, length, self.variant, *self.flags)
        return " ".join(part for part in (*parts, f"{self.total_timesteps} steps", f"seed {self.seed}") if part)

    @property
    def env_id(self):
        return f"{self.task if ':' in self.task else f'popgym-{self.task}'}-v0"

    @property
    def columns(self):
        named = dict(run=self.key, script=Path(self.script).stem, env_id=self.env_id, memory=self.memory)
        named |= dict(segment_length=self.segment_length, seed=self.seed, variant=self.variant)
        return named | dict(total_timesteps=self.total_timesteps)


MEANS = ["charts/episodic_return", "losses/td_loss", "losses/padding", "losses/q_values"]
COLUMNS = [*Run("", "").columns, "step", "seconds", "eval_return", *(tag.split("/")[1] for tag in MEANS), "sensitivity"]


def command(run):
    """The script's arguments, itself excluded."""
    flags = ["--env-id", run.env_id, "--seed", run.seed, "--total-timesteps", run.total_timesteps]
    flags += ["--eval-frequency", max(1, run.total_timesteps // EVALUATIONS)]
    flags += ["--memory", *run.memory.split()] if run.memory else []
    flags += ["--segment-length", run.segment_length] if run.segment_length else []
    return [*map(str, flags), *FLAGS.get(run.variant, []), *run.flags]


def place(run, root, folder):
    """Copies the run's script into a folder and applies its variant's patch to the copy. Returns the copy's path.

    Raises RuntimeError where the patch doesn't fit: the script has changed.
    """
    script = Path(shutil.copy(Path(root, run.script), folder))
    if run.variant and run.variant not in FLAGS:
        patch = Path(root, "experiments", "variants", f"{run.variant}.patch").read_text()
        patch = patch.replace(Path(TBB).name, script.name)  # `sensitivity` fits both DQN scripts
        env = os.environ | {"GIT_CEILING_DIRECTORIES": str(script.parent.parent)}  # else git may skip the file
        git = subprocess.run(["git", "apply"], input=patch, cwd=folder, env=env, capture_output=True, text=True)
        if git.returncode:
            raise RuntimeError(f"{run.variant}.patch: {git.stderr}")
    return script


def play(run, root, processes):
    """One run of a script, as a subprocess in a folder of its own. root: of the repository; processes: a list of those
    that were started, to which it adds its own.

    Returns the rows that it adds to the CSV. Raises RuntimeError, with the last line of stderr, where it fails.
    """
    with tempfile.TemporaryDirectory() as folder:
        arguments = [sys.executable, place(run, root, folder), *command(run)]
        env = os.environ | {"PYTHONPATH": str(Path(root).absolute()), "OMP_NUM_THREADS": "1"}
        env |= {"CUDA_VISIBLE_DEVICES": ""}
        pipes = dict(stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        # in a session of its own: Ctrl-C is for the sweep, which then ends its processes
        with subprocess.Popen(arguments, cwd=folder, env=env, start_new_session=True, **pipes) as process:
            processes.append(process)
            _, err = process.communicate()
        if process.returncode:
            last = (err.strip().splitlines() or ["nothing on stderr"])[-1]
            raise RuntimeError(f"exit status {process.returncode}: {last}")
        (log,) = Path(folder, "runs").iterdir()
        return read_log(run, log)


def read_log(run, folder):
    """A run's TensorBoard log as rows, one an evaluation; numbers are rounded, because the CSVs are kept in git."""
    log = EventAccumulator(str(folder), size_guidance={"scalars": 0, "tensors": 0}).Reload()
    tags = log.Tags()
    tensors = log.Tensors("charts/sensitivity") if "charts/sensitivity" in tags["tensors"] else []
    sensitivity = {e.step: make_ndarray(e.tensor_proto) for e in tensors}
    rows, before = [], -1
    for e in log.Scalars("charts/eval_return"):
        row = run.columns | {"step": e.step, "seconds": f"{e.wall_time - log.FirstEventTimestamp():.1f}"}
        row["eval_return"] = f"{e.value:.5g}"
        for tag in set(MEANS) & set(tags["scalars"]):
            values = [x.value for x in log.Scalars(tag) if before < x.step <= e.step]
            row[tag.split("/")[1]] = f"{np.mean(values):.4g}" if values else ""
        row["sensitivity"] = " ".join(f"{x:.3g}" for x in sensitivity.get(e.step, []))
        rows.append(row)
        before = e.step
    return rows


# ---------------------------------------------------------------------------------------------------------------------
# All of them


def runs_of(name, seeds, tasks=None, smoke=False):
    """The runs of an experiment's table, seed by seed, so that those of the first seed are a whole table early.

    A smoke test's are short, and of each script's first line, task, memory and length, and of the first seed.
    """
    runs, lines = [], EXPERIMENTS[name]
    if smoke:
        seeds, lines = seeds[:1], {line["script"][0]: line for line in reversed(lines)}.values()
    for seed, line in itertools.product(seeds, lines):
        axes = {axis: list(line.get(axis, [""])) for axis in Run._fields[:5]}
        flags = line.get("flags", [])
        if smoke:
            axes |= {axis: axes[axis][:1] for axis in ("task", "memory", "segment_length")}
            flags = [*flags, *SMOKE, *SMOKE_MORE[line["script"][0]]]
        for script, task, *rest in itertools.product(*axes.values()):
            if not tasks or task in tasks:
                steps = SMOKE_TIMESTEPS if smoke else line["task"][task]
                runs.append(Run(script, task, *rest, seed, steps, tuple(flags)))
    return runs


def finished(path, mend):
    """The runs that a CSV holds whole, {key: rows}. mend: remove unfinished runs and a line cut off."""
    if not path.exists():
        return {}
    text = path.read_text()
    rows = csv.DictReader(io.StringIO(text[: text.rfind("\n") + 1]))
    rows = [row for row in rows if row["step"] != "step"]  # the header of a CSV that was appended to this one
    done = {row["run"]: [] for row in rows if int(row["step"]) >= int(row["total_timesteps"])}
    rows = [row for row in rows if row["run"] in done]
    for row in rows:
        done[row["run"]].append(row)
    whole = io.StringIO()
    append(whole, rows)
    if mend and whole.getvalue() != text:
        path.with_suffix(".tmp").write_text(whole.getvalue())
        os.replace(path.with_suffix(".tmp"), path)
    return done


def append(file, rows):
    writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
    if not file.tell():
        writer.writeheader()
    writer.writerows(rows)


def outcome(play):
    """What play() returns, or the exception that it raises."""
    try:
        return play()
    except Exception as error:
        return error


def here(runs, jobs, signals):
    """Plays runs on this machine, `jobs` at a time. Yields (run, rows or exception), whichever is finished.

    Ends within a second when there is something in `signals`: then nothing more is started, and what runs is killed.
    """
    processes = []
    with ThreadPoolExecutor(jobs) as pool:
        waiting = futures = {pool.submit(play, run, ROOT, processes): run for run in runs}
        try:
            while waiting and not signals:
                ended, waiting = wait(waiting, 1, FIRST_COMPLETED)
                for future in ended:
                    yield futures[future], outcome(future.result)
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
            while not all(future.done() for future in futures):
                for process in processes:
                    process.kill()
                time.sleep(0.1)


def on_ray(runs, address, signals):
    """The same on a Ray cluster, whose workers get the repository and need the packages."""
    import ray

    excludes = [".git", ".venv", "runs", "videos", "/experiments/results", "/experiments/figures"]
    ray.init(address, runtime_env={"working_dir": str(ROOT), "excludes": excludes}, log_to_driver=False)
    task = ray.remote(num_cpus=1)(play)
    waiting = {task.remote(run, ".", []): run for run in runs}
    try:
        while waiting and not signals:
            ended, _ = ray.wait(list(waiting), timeout=1)
            for future in ended:
                yield waiting.pop(future), outcome(lambda: ray.get(future))
    finally:
        ray.shutdown()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="+", choices=EXPERIMENTS, metavar="NAME", help=", ".join(EXPERIMENTS))
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="runs at a time")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3, 4, 5])
    parser.add_argument("--tasks", nargs="+", help="only these, named as in the table")
    parser.add_argument("--ray", metavar="ADDRESS", help="run on this Ray cluster")
    parser.add_argument("--smoke", action="store_true", help="tiny runs; their results go to a temporary folder")
    parser.add_argument("--results", type=Path, help="another folder for the CSVs")
    args = parser.parse_args()
    known = {task for name in args.names for line in EXPERIMENTS[name] for task in line["task"]}
    if wrong := set(args.tasks or []) - known:
        parser.error(f"--tasks {' '.join(wrong)}: there are {' '.join(sorted(known))}")
    if args.jobs < 1:
        parser.error("--jobs: at least 1")
    folder = args.results or (Path(tempfile.mkdtemp()) if args.smoke else ROOT / "experiments" / "results")
    folder.mkdir(parents=True, exist_ok=True)
    if not os.access(folder, os.W_OK):
        parser.error(f"{folder} cannot be written")

    paths = {}  # of each run's CSV; two experiments may have a run in common
    done = {name: finished(folder / f"{name}.csv", mend=name in args.names) for name in EXPERIMENTS}
    played = {key: rows for runs in done.values() for key, rows in runs.items()}
    for name in dict.fromkeys(args.names):
        path = folder / f"{name}.csv"
        for run in runs_of(name, [*dict.fromkeys(args.seeds)], args.tasks, args.smoke):
            if run.key in done[name]:
                continue
            if run.key in played and name != "wall_clock":  # where seconds are what counts
                with open(path, "a", newline="") as file:
                    append(file, played[run.key])
            else:
                paths.setdefault(run, []).append(path)
    failures, signals = [], []
    hangup = [signal.SIGHUP] * (signal.getsignal(signal.SIGHUP) != signal.SIG_IGN)  # nohup ignores it
    for number in (signal.SIGINT, signal.SIGTERM, *hangup):  # no exceptions: one within wait() leaves locks taken
        signal.signal(number, lambda number, _: signals.append(number))
    results = on_ray(paths, args.ray, signals) if args.ray else here(paths, args.jobs, signals)
    steps = sum(run.total_timesteps for run in paths)
    with contextlib.closing(results), tqdm(total=steps, unit="step", unit_scale=True, smoothing=0) as bar:
        for run, rows in results:
            if isinstance(rows, Exception):
                failures.append(f"{run.key}: {(str(rows).strip() or repr(rows)).splitlines()[-1]}")
                bar.write(failures[-1])
            else:
                for path in paths[run]:
                    with open(path, "a", newline="") as file:
                        append(file, rows)
            bar.update(run.total_timesteps)
    if signals:
        print("stopped; what had finished is kept, the same command goes on", file=sys.stderr)
        sys.exit(128 + signals[0])
    print(f"{len(paths) - len(failures)} runs finished, results in {folder}")
    if failures:
        sys.exit("\n".join([f"{len(failures)} failed:", *failures]))


if __name__ == "__main__":
    main()
