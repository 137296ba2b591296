"""PPO on a tape: what holds before the first step, whose loss reaches whom, and the advantages against a plain loop."""

from functools import partial

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.spaces import Box, Discrete, MultiDiscrete

import ppo_tbb
from monoids import MEMORIES
from ppo_tbb import Rows

ACTIONS = [Discrete(3), MultiDiscrete([2, 3]), Box(-1, 1, (2,))]


class Mixed(gym.Env):
    """Episodes of 1 to 20 steps, half of them truncated, with any action space."""

    observation_space = Box(-np.inf, np.inf, (2,))

    def __init__(self, action_space):
        self.action_space = action_space

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.left = int(self.np_random.integers(1, 21))
        return self.np_random.normal(size=2).astype(np.float32), {}

    def step(self, action):
        assert self.action_space.contains(np.asarray(action, self.action_space.dtype))
        self.left -= 1
        end = self.np_random.random() < 0.5
        obs, reward = self.np_random.normal(size=2).astype(np.float32), float(self.np_random.normal())
        return obs, reward, self.left == 0 and end, self.left == 0 and not end, {}


for i, space in enumerate(ACTIONS):
    gym.register(f"Mixed{i}-v0", partial(Mixed, space))


def play(memory="lru", action_kind=0, **kwargs):
    args = ppo_tbb.Args(env_id=f"Mixed{action_kind}-v0", memory=memory, d_model=16, num_envs=4, **kwargs)
    torch.manual_seed(0)
    envs = ppo_tbb.make_envs(args, args.num_envs)
    agent = ppo_tbb.Agent(envs, args)
    torch.nn.init.normal_(agent.actor[-1].weight)  # decided, so that a wrong history would show
    episodes = ppo_tbb.collect(envs, agent, partial(ppo_tbb.policy, greedy=False), (1, 0), 0, 300)
    rows = Rows(*(torch.as_tensor(np.concatenate(x))[:, None] for x in zip(*episodes)))
    return args, agent, episodes, rows


class Still:
    """An optimizer that leaves the weights."""

    def zero_grad(self):
        pass

    def step(self):
        pass


@pytest.mark.parametrize("action_kind", range(3), ids=["discrete", "multidiscrete", "box"])
@pytest.mark.parametrize("memory", MEMORIES)
def test_ratio_is_1_and_kl_0_before_the_first_step(memory, action_kind):
    args, agent, _, rows = play(memory, action_kind)
    batch = ppo_tbb.assess(agent, rows, args)
    seen = 0
    for minibatch in ppo_tbb.minibatches(batch, 4, np.random.default_rng(0)):
        _, newlogprob, newvalue = ppo_tbb.run(agent, minibatch.rows)
        t = ppo_tbb.transitions(minibatch.rows)
        torch.testing.assert_close(newlogprob[t], minibatch.logprob[t], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(newvalue, minibatch.value, rtol=1e-4, atol=1e-5)
        metrics = ppo_tbb.update(agent, Still(), minibatch, args)
        assert abs(metrics["losses/approx_kl"]) < 1e-6 and metrics["losses/clipfrac"] == 0
        seen += len(t)
    assert seen == len(ppo_tbb.transitions(rows))


@pytest.mark.parametrize("action_kind", range(3), ids=["discrete", "multidiscrete", "box"])
def test_the_policy_that_played_is_the_one_that_is_assessed(action_kind):
    """The log-probability of each action as it was played, state carried along, is what `assess` finds."""
    args, agent, _, _ = play(action_kind=action_kind)
    envs, played = ppo_tbb.make_envs(args, 3), {}

    def act(agent, obs, previous_action, start, state, noise):
        heads, *_ = agent(obs, previous_action, start, state)
        action, state = ppo_tbb.policy(agent, obs, previous_action, start, state, noise, greedy=False)
        played.update(zip(map(tuple, obs[0].tolist()), ppo_tbb.log_prob(heads, action[None])[0].tolist()))
        return action, state

    episodes = ppo_tbb.collect(envs, agent, act, (1, 0), 0, 200)
    rows = Rows(*(torch.as_tensor(np.concatenate(x))[:, None] for x in zip(*episodes)))
    batch = ppo_tbb.assess(agent, rows, args)
    for t in ppo_tbb.transitions(rows):
        assert played[tuple(rows.obs[t, 0].tolist())] == pytest.approx(batch.logprob[t].item(), abs=1e-4)


def test_actions_are_drawn_from_the_policy():
    u = (torch.arange(100_000) + 0.5) / 100_000  # every quantile once
    head = torch.distributions.Categorical(probs=torch.tensor([0.2, 0.0, 0.5, 0.3]))
    heads = torch.distributions.Categorical(head.probs.expand(len(u), 4))
    share = torch.bincount(ppo_tbb.quantile(heads, u), minlength=4) / len(u)
    torch.testing.assert_close(share, head.probs, rtol=0, atol=1e-4)
    x = ppo_tbb.quantile(torch.distributions.Normal(torch.full_like(u, 3.0), 2.0), u)
    torch.testing.assert_close(torch.stack((x.mean(), x.std())), torch.tensor([3.0, 2.0]), rtol=0, atol=1e-2)
    assert ppo_tbb.quantile(torch.distributions.Normal(torch.zeros(1), 1.0), torch.zeros(1)).isfinite()


def test_gae_on_a_collected_tape_is_a_plain_loop_over_each_episode():
    args, agent, episodes, rows = play()
    assert {e.terminated.any() for e in episodes} == {True, False}  # some were truncated
    batch = ppo_tbb.assess(agent, rows, args)
    at = 0
    for episode in episodes:
        n = len(episode.start) - 1
        value = batch.value[at : at + n + 1, 0].double().numpy()  # the final observation's included
        advantage = 0.0
        for t in reversed(range(n)):
            delta = episode.reward[t] + args.gamma * (1 - episode.terminated[t]) * value[t + 1] - value[t]
            advantage = delta + args.gamma * args.gae_lambda * advantage
            assert batch.advantage[at + t, 0].item() == pytest.approx(advantage, abs=1e-5)
        at += n + 1
    assert at == len(rows.start)


@pytest.mark.parametrize("memory", MEMORIES)
def test_no_transition_of_one_episode_affects_anothers_loss_gradient(memory):
    """The gradient of the loss on two episodes is the sum of their own, whatever the other is."""
    args, agent, episodes, _ = play(memory, norm_adv=False, max_grad_norm=1e9)

    def gradient(*episodes):
        rows = Rows(*(torch.as_tensor(np.concatenate(x))[:, None] for x in zip(*episodes)))
        agent.zero_grad()
        ppo_tbb.update(agent, Still(), ppo_tbb.assess(agent, rows, args), args)
        n = len(ppo_tbb.transitions(rows))
        return {name: p.grad.clone() * n for name, p in agent.named_parameters() if p.grad is not None}

    a, b, c = sorted(episodes, key=lambda e: len(e.start))[-3:]
    alone = gradient(a)
    for other in (b, c._replace(obs=c.obs * 100, reward=c.reward + 10)):
        together, others = gradient(other, a), gradient(other)
        for name in alone:
            scale = others[name].abs().max().item() + 1
            rest = together[name] - others[name]
            torch.testing.assert_close(rest, alone[name], rtol=1e-3, atol=1e-5 * scale, msg=name)


@pytest.mark.parametrize("num_minibatches", [1, 3, 4, 1000])
def test_minibatches_are_whole_episodes_each_once(num_minibatches):
    args, agent, episodes, rows = play()
    batch = ppo_tbb.assess(agent, rows, args)
    seen = []
    for minibatch in ppo_tbb.minibatches(batch, num_minibatches, np.random.default_rng(0)):
        starts = minibatch.rows.start[:, 0].nonzero().squeeze(1).tolist()
        for a, b in zip(starts, [*starts[1:], len(minibatch.value)]):
            seen.append(tuple(minibatch.rows.reward[a:b, 0].tolist()))
    assert sorted(seen) == sorted(tuple(e.reward.tolist()) for e in episodes)


def test_padding_of_a_minibatch_is_seen_by_nobody():
    """--compile pads minibatches to few lengths."""
    args, agent, episodes, rows = play()
    batch = ppo_tbb.assess(agent, rows, args)
    plain, padded = [next(ppo_tbb.minibatches(batch, 3, np.random.default_rng(0), m)) for m in (1, 64)]
    assert len(plain.value) < len(padded.value) and len(padded.value) % 64 == 0
    t = ppo_tbb.transitions(plain.rows)
    torch.testing.assert_close(ppo_tbb.transitions(padded.rows), t, rtol=0, atol=0)
    values = [ppo_tbb.run(agent, minibatch.rows)[2][t] for minibatch in (plain, padded)]
    torch.testing.assert_close(*values)
