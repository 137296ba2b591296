"""MuJoCo robots that see only their positions, only their velocities, or both (pip install "gymnasium[mujoco]").

    PYTHONPATH=. python sac_tbb.py --env-id experiments.partial_mujoco:HopperPositions-v0

Robots: Hopper, Walker2d, HalfCheetah; Positions, Velocities or Full.
"""

from functools import partial

import gymnasium as gym
from gymnasium.spaces import Box


def make(robot, what, **kwargs):
    env = gym.make(f"{robot}-v5", **kwargs)
    n = env.unwrapped.observation_structure["qpos"]  # positions come first, then velocities
    part = {"Positions": slice(n), "Velocities": slice(n, None), "Full": slice(None)}[what]
    low, high, dtype = env.observation_space.low[part], env.observation_space.high[part], env.observation_space.dtype
    return gym.wrappers.TransformObservation(env, lambda obs: obs[part], Box(low, high, dtype=dtype))


for robot in ("Hopper", "Walker2d", "HalfCheetah"):
    for what in ("Positions", "Velocities", "Full"):
        gym.register(f"{robot}{what}-v0", partial(make, robot, what))
