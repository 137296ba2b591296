"""The passive T-maze (Bakker 2001), as in Ni et al. 2023, "When Do Transformers Shine in RL?" (arXiv 2307.03864).

    PYTHONPATH=experiments python dqn_tbb.py --env-id tmaze:TMaze-v0 --env-kwargs corridor_length 1000 walk False

The first observation shows the side of the goal, the agent walks along a corridor that looks the same everywhere, and
at the junction it has to turn to that side: corridor_length + 1 steps, each of which must be right. The last reward is
1 at the goal and 0 elsewhere; each step on which the agent is behind an agent that has only walked to the right costs
1 / corridor_length. With walk=False the corridor walks the agent, whatever its actions: only the last one counts, and
what is left is memory. A return of 1 is a success, and guessing gives 0.5.
"""

import gymnasium as gym
import numpy as np

RIGHT, UP, LEFT, DOWN = range(4)


class TMaze(gym.Env):
    """Observations: (at the junction, side of the goal: -1 or 1 in the first row, 0 in all others)."""

    observation_space = gym.spaces.Box(-1, 1, (2,))
    action_space = gym.spaces.Discrete(4)

    def __init__(self, corridor_length=50, walk=True):
        self.corridor_length, self.walk = corridor_length, walk

    def reset(self, seed=None, options=None):
        super().reset(seed=seed)
        self.goal = int(self.np_random.choice((-1, 1)))
        self.steps, self.x = 0, 0
        return np.array((0, self.goal), dtype=np.float32), {}

    def step(self, action):
        junction = self.x == self.corridor_length
        self.steps += 1
        terminated = self.steps > self.corridor_length
        if terminated:  # the last step: a turn, if the agent stands at the junction
            side = {UP: 1, DOWN: -1}.get(int(action), 0)
            reward = float(junction and side == self.goal)
        else:
            self.x = max(0, self.x + (1 if not self.walk else {RIGHT: 1, LEFT: -1}.get(int(action), 0)))
            reward = -(self.x < self.steps) / self.corridor_length
        return np.array((self.x == self.corridor_length, 0), dtype=np.float32), reward, terminated, False, {}


gym.register("TMaze-v0", TMaze)
