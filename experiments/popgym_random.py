"""The mean return of random actions on each POPGym task, from which normalised returns start: writes popgym_random.csv.

    python experiments/popgym_random.py

The tasks are in the order in which plot.py shows them.
"""

import csv
import random
from pathlib import Path

import gymnasium as gym
import numpy as np
import popgym  # noqa: F401  registers popgym-*
from tqdm import tqdm

FAMILIES = ["RepeatPrevious", "RepeatFirst", "CountRecall", "HigherLower", "MultiarmedBandit", "MineSweeper"]
FAMILIES += ["Battleship", "Concentration", "PositionOnlyCartPole", "NoisyPositionOnlyCartPole"]
FAMILIES += ["VelocityOnlyCartpole", "PositionOnlyPendulum", "NoisyPositionOnlyPendulum", "Autoencode"]
TASKS = [family + level for family in FAMILIES for level in ("Easy", "Medium", "Hard")]
EPISODES = 1000


def random_returns(task, episodes):
    env = gym.make(f"popgym-{task}-v0", disable_env_checker=True)
    for set_seed in (random.seed, np.random.seed, env.action_space.seed):  # some tasks draw from the global generators
        set_seed(1)
    returns = np.zeros(episodes)
    for episode in range(episodes):
        env.reset(seed=episode)
        done = False
        while not done:
            _, reward, terminated, truncated, _ = env.step(env.action_space.sample())
            returns[episode] += reward
            done = terminated or truncated
    return returns


if __name__ == "__main__":
    with open(Path(__file__).with_suffix(".csv"), "w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["task", "episodes", "return", "standard_error"])
        for task in tqdm(TASKS):
            returns = random_returns(task, EPISODES)
            standard_error = returns.std(ddof=1) / EPISODES**0.5
            writer.writerow([task, EPISODES, f"{returns.mean():z.2f}", f"{standard_error:.3f}"])
