"""sb3-contrib's RecurrentPPO (an LSTM trained on segments), for comparison; evaluates and logs as the scripts here do.

    python experiments/recurrent_ppo.py --env-id popgym-RepeatPreviousMedium-v0 --total-timesteps 250000

Batches of 512 and 4 epochs; all else that is not an argument here is its default. Observations are flattened, because
it takes no tuples. With --like-ppo-tbb they include the previous action, rewards are divided by the standard deviation
of returns (VecNormalize), and the learning rate, its annealing and the entropy coefficient are the defaults of
ppo_tbb.py. Tags in TensorBoard: charts/eval_return (greedy episodes on a fresh environment) and charts/episodic_return
(the last 100 training episodes); both are of unscaled rewards.
"""

import argparse
import sys
import time
from functools import partial
from pathlib import Path

import gymnasium as gym
import numpy as np
import popgym  # noqa: F401  registers popgym-*
from gymnasium import spaces
from sb3_contrib import RecurrentPPO
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.vec_env import VecNormalize
from torch.utils.tensorboard import SummaryWriter


class PreviousAction(gym.Wrapper):
    """Appends the previous action, one-hot if it is discrete, to a flat observation; zeros at an episode's start.

    POPGym's own wrapper refuses environments of `gym.make`.
    """

    def __init__(self, env):
        super().__init__(env)
        self.observation_space = spaces.flatten_space(spaces.Tuple((env.observation_space, env.action_space)))
        self.no_action = np.zeros_like(spaces.flatten_space(env.action_space).low)

    def reset(self, **kwargs):
        obs, info = self.env.reset(**kwargs)
        return np.concatenate((obs, self.no_action)), info

    def step(self, action):
        obs, *others = self.env.step(action)
        return np.concatenate((obs, spaces.flatten(self.env.action_space, action))), *others


class Evaluate(BaseCallback):
    """Evaluates before a rollout if an evaluation is due, and when it is called."""

    def __init__(self, envs, args):
        super().__init__()
        self.envs, self.args, self.evaluated = envs, args, 0
        self.writer = SummaryWriter(f"runs/{args.env_id}__{Path(sys.argv[0]).stem}__{args.seed}__{int(time.time())}")
        self.writer.add_text("hyperparameters", str(vars(args)))

    def _on_step(self):
        return True

    def _on_rollout_start(self):
        if self.evaluated // self.args.eval_frequency < self.num_timesteps // self.args.eval_frequency:
            self.evaluate()

    def evaluate(self):
        returns, _ = evaluate_policy(self.model, self.envs, self.args.eval_episodes, return_episode_rewards=True)
        self.evaluated = self.num_timesteps
        recent = [episode["r"] for episode in self.model.ep_info_buffer]
        self.writer.add_scalar("charts/eval_return", np.mean(returns), self.num_timesteps)
        if recent:
            self.writer.add_scalar("charts/episodic_return", np.mean(recent), self.num_timesteps)
        return np.mean(returns)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--env-id", default="popgym-RepeatPreviousMedium-v0")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--total-timesteps", type=int, default=250_000)
    parser.add_argument("--gamma", type=float, default=0.99)
    parser.add_argument("--gae-lambda", type=float, default=0.95)
    parser.add_argument("--like-ppo-tbb", action="store_true")
    parser.add_argument("--num-envs", type=int, default=16)
    parser.add_argument("--num-steps", type=int, default=128)
    parser.add_argument("--eval-frequency", type=int, default=10_000)
    parser.add_argument("--eval-episodes", type=int, default=32)
    args = parser.parse_args()
    flatten = gym.wrappers.FlattenObservation
    wrapper = (lambda env: PreviousAction(flatten(env))) if args.like_ppo_tbb else flatten
    make_envs = partial(make_vec_env, args.env_id, wrapper_class=wrapper)
    envs = make_envs(args.num_envs, args.seed)
    callback = Evaluate(make_envs(args.eval_episodes, args.seed + 1_000_000), args)
    sizes = dict(n_steps=args.num_steps, batch_size=512, n_epochs=4)  # with these it solves Easy: benchmarks/ppo.py
    kwargs = sizes | dict(gamma=args.gamma, gae_lambda=args.gae_lambda, seed=args.seed)
    if args.like_ppo_tbb:
        envs = VecNormalize(envs, norm_obs=False, gamma=args.gamma)
        kwargs |= dict(learning_rate=lambda remaining: 1e-3 * remaining, ent_coef=0.01)
    model = RecurrentPPO("MlpLstmPolicy", envs, **kwargs, device="cpu")
    start_time = time.time()
    model.learn(args.total_timesteps, callback)
    eval_return = callback.evaluate()
    callback.writer.close()
    global_step, seconds = model.num_timesteps, time.time() - start_time
    print(f"final: {global_step=} {eval_return=:.4f} eval_episodes={args.eval_episodes} {seconds=:.1f}")
