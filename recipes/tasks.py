"""Tasks from images, for the recipe `pixels`: PYTHONPATH=recipes python dqn_tbb.py --env-id tasks:ImageMemory-v0

    ImageMemory-v0      MiniGrid-MemoryS7-v0 as the agent sees it, in 28 x 28 pixels, without the actions for objects
    FlickerBreakout-v0  one life of ALE/Breakout-v5, from single grey frames of 40 x 40 pixels, each black with
                        probability `flicker` (Hausknecht & Stone 2015, arXiv 1507.06527)
"""

import ale_py  # noqa: F401  registers ALE/*
import gymnasium as gym
import minigrid.wrappers
import numpy as np
from gymnasium.spaces import Box, Discrete


def memory(**kwargs):
    env = minigrid.wrappers.RGBImgPartialObsWrapper(gym.make("MiniGrid-MemoryS7-v0", **kwargs), tile_size=4)
    env = minigrid.wrappers.ImgObsWrapper(env)  # without the text
    return gym.wrappers.TransformAction(env, lambda action: action, Discrete(3))  # left, right, forward


class OneLife(gym.Wrapper):
    """An episode is one life, in which the ball is already flying."""

    def reset(self, **kwargs):
        self.env.reset(**kwargs)
        obs, _, _, _, info = self.env.step(1)  # FIRE
        self.lives = info["lives"]
        return obs, info

    def step(self, action):
        obs, reward, terminated, truncated, info = self.env.step(action)
        return obs, reward, terminated or info["lives"] < self.lives, truncated, info


def breakout(flicker=0.5, **kwargs):
    env = OneLife(gym.make("ALE/Breakout-v5", obs_type="grayscale", max_episode_steps=1000, **kwargs))
    small = lambda obs: obs[34:194].reshape(40, 4, 40, 4).max((1, 3))[..., None]  # the court; the ball stays visible
    see = lambda obs: small(obs) * np.uint8(env.unwrapped.np_random.random() >= flicker)
    return gym.wrappers.TransformObservation(env, see, Box(0, 255, (40, 40, 1), np.uint8))


gym.register("ImageMemory-v0", entry_point=memory)
gym.register("FlickerBreakout-v0", entry_point=breakout)
