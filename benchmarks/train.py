"""Whole runs of the default task: steps a second, and seconds until an evaluation reaches 0.99.

    python benchmarks/train.py

The DQN and PPO scripts run with their default arguments, dqn_tbb.py also with a GRU, seed 1 (or --seed), in a process
of its own, one after the other, but evaluate every 2,000 steps to see when the task is solved. Seconds count from the
start of the process, imports, evaluations and checkpoints included. Before that,
`collect` alone at 64 environments, with the untrained network, beside the same environments, Gymnasium's SyncVectorEnv,
stepped with actions drawn beforehand. Writes benchmarks/train.csv.
"""

import argparse
import math
import os
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import measure
import dqn_tbb
import ppo_tbb

RUNS = [("dqn_tbb.py", "lru"), ("dqn_tbb.py", "gru"), ("dqn_sbb.py", "lru"), ("ppo_tbb.py", "lru")]
GOAL = 0.99


def run(script, memory, seed):
    with tempfile.TemporaryDirectory() as folder:
        begin = time.time()
        arguments = f"--memory {memory} --seed {seed} --eval-frequency 2000"
        command = [sys.executable, measure.ROOT / script, *arguments.split()]
        environment = os.environ | {"OMP_NUM_THREADS": str(measure.THREADS)}
        subprocess.run(command, cwd=folder, env=environment, check=True, stdout=subprocess.DEVNULL)
        seconds = time.time() - begin
        (log,) = Path(folder, "runs").iterdir()
        events = EventAccumulator(str(log)).Reload().Scalars("charts/eval_return")
    solved = next(((e.step, e.wall_time - begin) for e in events if e.value >= GOAL), ("", math.nan))
    return script, memory, events[-1].step, seconds, events[-1].step / seconds, *solved, events[-1].value, math.nan


def collection(num_envs=64):
    """`collect` beside the same environments alone, one episode in each; all episodes of the task are equally long."""
    contestants, args = {}, dqn_tbb.Args()
    for script, name, act in (
        (dqn_tbb, "QNetwork", partial(dqn_tbb.policy, epsilon=0.5)),
        (ppo_tbb, "Agent", partial(ppo_tbb.policy, greedy=False)),
    ):
        envs = script.make_envs(args, num_envs)
        network = getattr(script, name)(envs, args).to(measure.DEVICE)
        contestants[f"collect, {script.__name__}.py"] = play = partial(script.collect, envs, network, act, (0, 0, 0))
        lengths = [len(episode.reward) - 1 for episode in play()]
    envs = dqn_tbb.make_envs(args, num_envs)
    actions = [envs.action_space.sample() for _ in range(max(lengths))]

    def random():
        envs.reset(seed=0)
        for action in actions:
            envs.step(action)

    contestants["SyncVectorEnv, random actions"] = random
    seconds = measure.interleaved(contestants, seconds=5.0)
    for name, s in seconds.items():
        memory = "" if name.startswith("Sync") else "lru"
        ratio = seconds["SyncVectorEnv, random actions"] / s
        yield name, memory, sum(lengths), s, sum(lengths) / s, "", math.nan, math.nan, ratio


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    rows = [*collection(), *(run(*which, args.seed) for which in RUNS)]
    header = "what,memory,steps,seconds,steps a second,solved at,seconds to solve,eval return,x SyncVectorEnv"
    note = f"seed {args.seed}; solved: an evaluation of {GOAL} or more, 32 episodes"
    measure.report(__file__, header.split(","), rows, [note])
