"""ppo_tbb.py beside sb3-contrib's RecurrentPPO: steps and seconds until the training return passes 0.99, in one run.

    pip install -r benchmarks/requirements.txt && python benchmarks/ppo.py

They train on popgym-RepeatPreviousEasy-v0, one after the other, each in a process of its own with one torch thread;
RecurrentPPO twice, the second time with the scale of rewards, the learning rate and the entropy coefficient of
ppo_tbb.py. The training return is that of the latest episodes played to learn from: those of an iteration (16) for
ppo_tbb.py, the last 100 for RecurrentPPO. Seconds count from the start of the process, imports included. Writes
benchmarks/ppo.csv.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

os.environ["CUDA_VISIBLE_DEVICES"] = ""  # both on the CPU
import measure  # noqa: E402

ENV_ID, GOAL = "popgym-RepeatPreviousEasy-v0", 0.99


def ours(seed):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with tempfile.TemporaryDirectory() as folder:
        begin = time.time()
        command = [sys.executable, measure.ROOT / "ppo_tbb.py", "--env-id", ENV_ID, "--seed", str(seed)]
        subprocess.run(command, cwd=folder, check=True, stdout=subprocess.DEVNULL)
        (run,) = Path(folder, "runs").iterdir()
        events = EventAccumulator(str(run)).Reload().Scalars("charts/episodic_return")
    reached = next((e for e in events if e.value >= GOAL), None)
    return (reached.step, reached.wall_time - begin, True) if reached else (events[-1].step, time.time() - begin, False)


def theirs(seed, total_timesteps, like_ours):
    """In a process of its own, see below: prints steps, and whether the goal was reached."""
    import popgym  # noqa: F401  registers popgym-*
    from sb3_contrib import RecurrentPPO
    from stable_baselines3.common.callbacks import BaseCallback
    from stable_baselines3.common.env_util import make_vec_env
    from stable_baselines3.common.vec_env import VecNormalize

    class StopAtGoal(BaseCallback):
        def _on_step(self):
            returns = [episode["r"] for episode in self.model.ep_info_buffer]
            return len(returns) < 100 or sum(returns) / len(returns) < GOAL

    envs = make_vec_env(ENV_ID, n_envs=16, seed=seed)
    kwargs = dict(n_steps=128, batch_size=512, n_epochs=4, gamma=0.99, seed=seed, device="cpu")
    if like_ours:
        envs = VecNormalize(envs, norm_obs=False, gamma=0.99)
        kwargs |= dict(learning_rate=1e-3, ent_coef=0.01)
    model = RecurrentPPO("MlpLstmPolicy", envs, **kwargs).learn(total_timesteps, callback=StopAtGoal())
    print(model.num_timesteps, int(model.num_timesteps < total_timesteps))


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--sb3-timesteps", type=int, default=600_000, help="when to give RecurrentPPO up")
    parser.add_argument("--only-sb3", choices=["defaults", "like_ours"], help="used by the benchmark itself")
    args = parser.parse_args()
    if args.only_sb3:
        theirs(args.seed, args.sb3_timesteps, args.only_sb3 == "like_ours")
        sys.exit()
    os.environ |= {"OMP_NUM_THREADS": str(measure.THREADS), "MKL_NUM_THREADS": str(measure.THREADS)}
    found = [ours(args.seed)]
    for only in ("defaults", "like_ours"):
        begin, flags = time.time(), [f"--seed={args.seed}", f"--sb3-timesteps={args.sb3_timesteps}"]
        command = [sys.executable, __file__, "--only-sb3", only, *flags]
        steps, reached = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-2:]
        found.append((int(steps), time.time() - begin, reached == "1"))
    names = ["ppo_tbb.py", "sb3-contrib RecurrentPPO", "sb3-contrib RecurrentPPO, like ppo_tbb.py"]
    rows = [
        (name, steps, seconds, "yes" if reached else "no", steps / found[0][0], seconds / found[0][1])
        for name, (steps, seconds, reached) in zip(names, found)
    ]
    note = f"{ENV_ID}, until the training return is {GOAL} or more; seed {args.seed}"
    measure.report(__file__, "algorithm,steps,seconds,reached,x steps,x seconds".split(","), rows, [note])
