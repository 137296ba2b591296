"""POPGym's pendulums with their full state, angle and velocity, and without noise: lengths and rewards as there.

    PYTHONPATH=. python sac_tbb.py --env-id experiments.full_pendulum:FullPendulumEasy-v0 --memory none

Easy, Medium or Hard: episodes of 200, 150 or 100 steps.
"""

from functools import partial

import gymnasium as gym
import popgym  # noqa: F401  registers popgym-*
from popgym.core.observability import Observability
from popgym.wrappers import Markovian


def make(level):
    return Markovian(gym.make(f"popgym-PositionOnlyPendulum{level}-v0").unwrapped, Observability.FULL)


for level in ("Easy", "Medium", "Hard"):
    gym.register(f"FullPendulum{level}-v0", partial(make, level))
