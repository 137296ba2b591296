"""Stable-Baselines3's SAC, which has no memory, for comparison on the full state; evaluates as recurrent_ppo.py does.

    PYTHONPATH=. python experiments/sb3_sac.py --env-id experiments.partial_mujoco:HopperFull-v0

All other arguments are its defaults.
"""

import argparse
import time

from gymnasium.wrappers import TransformReward
from stable_baselines3 import SAC
from stable_baselines3.common.env_util import make_vec_env

from experiments.recurrent_ppo import Evaluate

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--env-id", default="experiments.partial_mujoco:HopperFull-v0")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--total-timesteps", type=int, default=200_000)
    parser.add_argument("--num-envs", type=int, default=1)
    parser.add_argument("--eval-frequency", type=int, default=10_000)
    parser.add_argument("--eval-episodes", type=int, default=32)
    parser.add_argument("--reward-scale", type=float, default=1, help="factor of the rewards in training")
    args = parser.parse_args()
    callback = Evaluate(make_vec_env(args.env_id, args.eval_episodes, args.seed + 1_000_000), args)
    scaled = lambda env: TransformReward(env, lambda reward: args.reward_scale * reward)
    envs = make_vec_env(args.env_id, args.num_envs, args.seed, wrapper_class=scaled)
    model = SAC("MlpPolicy", envs, seed=args.seed, device="cpu")
    start_time = time.time()
    model.learn(args.total_timesteps, callback)
    eval_return = callback.evaluate()
    callback.writer.close()
    global_step, seconds = model.num_timesteps, time.time() - start_time
    print(f"final: {global_step=} {eval_return=:.4f} eval_episodes={args.eval_episodes} {seconds=:.1f}")
