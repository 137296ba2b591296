"""PPO over tapes: the first ratio, the advantages against a plain loop, and episodes that do not affect each other."""

from functools import partial

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.spaces import Box, Discrete, MultiDiscrete
from helpers import Still

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
    args = ppo_tbb.Args(env_id=f"Mixed{action_kind}-v0", memory=(memory,), d_model=16, num_envs=24, **kwargs)
    torch.manual_seed(0)
    envs = ppo_tbb.make_envs(args, args.num_envs)
    agent = ppo_tbb.Agent(envs, args)
    torch.nn.init.normal_(agent.actor[-1].weight)  # far from uniform, so that a wrong history would show
    episodes = ppo_tbb.collect(envs, agent, partial(ppo_tbb.policy, greedy=False), (1, 0))
    rows = Rows(*(torch.as_tensor(np.concatenate(x))[:, None] for x in zip(*episodes)))
    return args, agent, episodes, rows


@pytest.mark.parametrize("action_kind", range(3), ids=["discrete", "multidiscrete", "box"])
@pytest.mark.parametrize("memory", MEMORIES)
def test_ratio_is_1_before_the_first_step(memory, action_kind):
    args, agent, _, rows = play(memory, action_kind)
    batch, transitions = ppo_tbb.compute_advantages(agent, rows, args), 0
    for minibatch in ppo_tbb.minibatches(batch, args, np.random.default_rng(0)):
        _, newlogprob, newvalue = ppo_tbb.forward_tape(agent, minibatch[0])
        t = ppo_tbb.transitions(minibatch[0])
        torch.testing.assert_close(newlogprob[t], minibatch[1][t], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(newvalue, minibatch[2], rtol=1e-4, atol=1e-5)
        metrics = ppo_tbb.update(agent, Still(agent), minibatch, args)
        assert abs(metrics["losses/approx_kl"]) < 1e-6 and metrics["losses/clipfrac"] == 0
        transitions += len(t)
    assert transitions == len(ppo_tbb.transitions(rows))


@pytest.mark.parametrize("action_kind", range(3), ids=["discrete", "multidiscrete", "box"])
def test_log_probability_over_the_tape_is_that_of_acting(action_kind):
    args, agent, _, _ = play(action_kind=action_kind)
    envs, played = ppo_tbb.make_envs(args, 8), {}

    def act(agent, obs, previous_action, start, state):
        dists, *_ = agent(obs, previous_action, start, state)
        action, state = ppo_tbb.policy(agent, obs, previous_action, start, state, greedy=False)
        logprob = sum(dist.log_prob(a) for dist, a in zip(dists, action[None].unbind(-1)))[0]
        played.update(zip(map(tuple, obs[0].tolist()), logprob.tolist()))
        return action, state

    episodes = ppo_tbb.collect(envs, agent, act, (1, 0))
    rows = Rows(*(torch.as_tensor(np.concatenate(x))[:, None] for x in zip(*episodes)))
    _, logprob, *_ = ppo_tbb.compute_advantages(agent, rows, args)
    for t in ppo_tbb.transitions(rows):
        assert played[tuple(rows.obs[t, 0].tolist())] == pytest.approx(logprob[t].item(), abs=1e-4)


@pytest.mark.parametrize("greedy", [False, True])
def test_actions_are_drawn_from_the_policy(greedy):
    """Frequencies of 20,000 actions on the same observation against the softmax of the logits; or the mode alone."""
    args, agent, _, _ = play(action_kind=1)
    obs, start = torch.zeros(1, 20_000, 2), torch.ones(1, 20_000, dtype=torch.bool)
    previous, state = torch.zeros(1, 20_000, 2, dtype=torch.long), agent.memory.initial_state(20_000)
    torch.manual_seed(0)
    with torch.no_grad():
        dists, *_ = agent(obs, previous, start, state)
        action, _ = ppo_tbb.policy(agent, obs, previous, start, state, greedy)
    for dist, a in zip(dists, action.unbind(-1)):
        p = dist.probs[0, 0]
        expected = torch.eye(len(p))[p.argmax()] if greedy else p
        torch.testing.assert_close(torch.bincount(a, minlength=len(p)) / len(a), expected, rtol=0, atol=0.02)


def test_gae_over_a_tape_equals_a_loop_over_each_episode():
    """Rewards are divided by the root mean square of all returns, those of former iterations included."""
    args, agent, episodes, rows = play(gamma=0.9, gae_lambda=0.8)
    assert {e.terminated.any() for e in episodes} == {True, False}  # some were truncated
    agent.squares.copy_(torch.tensor([1000.0, 200.0]))
    _, _, values, advantages = ppo_tbb.compute_advantages(agent, rows, args)
    squares, at = [], 0
    for episode in episodes:
        total = 0.0
        for reward in reversed(episode.reward[:-1].tolist()):
            total = reward + args.gamma * total
            squares.append(total**2)
    scale = ((1000 + sum(squares)) / (200 + len(squares))) ** 0.5
    for episode in episodes:
        n = len(episode.start) - 1
        value = values[at : at + n + 1, 0].double().numpy()  # the final observation's included
        advantage = 0.0
        for t in reversed(range(n)):
            delta = episode.reward[t] / scale + args.gamma * (1 - episode.terminated[t]) * value[t + 1] - value[t]
            advantage = delta + args.gamma * args.gae_lambda * advantage
            assert advantages[at + t, 0].item() == pytest.approx(advantage, abs=1e-5)
        at += n + 1
    assert at == len(rows.start)


@pytest.mark.parametrize("memory", MEMORIES)
def test_episodes_of_a_batch_do_not_affect_each_others_gradient(memory):
    """The gradient of the loss on two episodes is the sum of their own, whatever the other is."""
    args, agent, episodes, _ = play(memory, norm_adv=False, max_grad_norm=1e9)
    agent.squares.fill_(1e12)  # so that they hardly change: the scale of rewards is that of all episodes

    def gradient(*episodes):
        rows = Rows(*(torch.as_tensor(np.concatenate(x))[:, None] for x in zip(*episodes)))
        agent.zero_grad()
        ppo_tbb.update(agent, Still(agent), ppo_tbb.compute_advantages(agent, rows, args), args)
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
def test_minibatches_partition_the_episodes(num_minibatches):
    args, agent, episodes, rows = play(num_minibatches=num_minibatches)
    batch, seen = ppo_tbb.compute_advantages(agent, rows, args), []
    for rows, *_ in ppo_tbb.minibatches(batch, args, np.random.default_rng(0)):
        starts = rows.start[:, 0].nonzero().squeeze(1).tolist()
        for a, b in zip(starts, [*starts[1:], len(rows.start)]):
            seen.append(tuple(rows.reward[a:b, 0].tolist()))
    assert sorted(seen) == sorted(tuple(e.reward.tolist()) for e in episodes)


def test_padding_of_a_minibatch_does_not_affect_the_loss():
    """--compile pads minibatches to multiples of 64 rows."""
    args, agent, _, rows = play()
    batch, losses = ppo_tbb.compute_advantages(agent, rows, args), []
    for args.compile in (False, True):
        minibatch = next(ppo_tbb.minibatches(batch, args, np.random.default_rng(0)))
        assert (len(minibatch[1]) % 64 == 0) == args.compile
        losses.append(ppo_tbb.update(agent, Still(agent), minibatch, args))
    torch.testing.assert_close(*losses)


@pytest.mark.parametrize("action_kind", range(3), ids=["discrete", "multidiscrete", "box"])
@pytest.mark.parametrize("norm_adv, clip_vloss", [(True, True), (False, False)])
def test_loss_equals_its_definition(action_kind, norm_adv, clip_vloss):
    """With weights that have moved since the episodes were played, so that some ratios and values are clipped."""
    flags = {"norm_adv": norm_adv, "clip_vloss": clip_vloss, "clip_coef": 0.1}
    args, agent, _, rows = play(action_kind=action_kind, ent_coef=0.1, vf_coef=0.3, max_grad_norm=1e9, **flags)
    batch = ppo_tbb.compute_advantages(agent, rows, args)
    with torch.no_grad():
        for p in agent.parameters():
            p += 0.03 * torch.randn_like(p)
    agent.zero_grad()
    metrics = ppo_tbb.update(agent, Still(agent), batch, args)
    parameters = {name: p for name, p in agent.named_parameters() if p.grad is not None}
    assert {*parameters} | {"actor_logstd"} == {*dict(agent.named_parameters())}
    assert ("actor_logstd" in parameters) == (action_kind == 2)
    gradient = {name: p.grad.clone() for name, p in parameters.items()}

    dists, logprob, value = ppo_tbb.forward_tape(agent, rows)
    t = ppo_tbb.transitions(rows)
    old_logprob, old_value, advantage = (x[t] for x in batch[1:])
    ratio, target = (logprob[t] - old_logprob).exp(), old_value + advantage
    moved = (value[t] - old_value).clamp(-0.1, 0.1)
    squares = [(value[t] - target) ** 2] + [(old_value + moved - target) ** 2] * clip_vloss
    if norm_adv:
        advantage = (advantage - advantage.mean()) / advantage.var(correction=0).sqrt()
    allowed = torch.where(advantage > 0, ratio.clamp(max=1.1), ratio.clamp(min=0.9))  # no reward for moving further
    expected = {
        "policy_loss": -(allowed * advantage).mean(),
        "value_loss": torch.stack(squares).amax(0).mean() / 2,
        "entropy": sum(dist.entropy()[t] for dist in dists).mean(),
        "old_approx_kl": -ratio.log().mean(),
        "approx_kl": (ratio - 1 - ratio.log()).mean(),
        "clipfrac": ((ratio < 0.9) | (ratio > 1.1)).float().mean(),
    }
    torch.testing.assert_close(metrics, {f"losses/{name}": x.detach() for name, x in expected.items()})
    assert 0.02 < expected["clipfrac"] < 0.98 and (moved.abs() == 0.1).any()
    loss = expected["policy_loss"] + 0.3 * expected["value_loss"] - 0.1 * expected["entropy"]
    slow = torch.autograd.grad(loss, parameters.values())
    torch.testing.assert_close(gradient, dict(zip(parameters, slow)), rtol=1e-4, atol=1e-6)


def test_policy_begins_near_uniform():
    args = ppo_tbb.Args(env_id="Mixed0-v0")
    torch.manual_seed(0)
    agent = ppo_tbb.Agent(ppo_tbb.make_envs(args, 1), args)
    obs, start = torch.randn(1, 50, 2), torch.ones(1, 50, dtype=torch.bool)
    (dist,), *_ = agent(obs, torch.zeros(1, 50, 1, dtype=torch.long), start, agent.memory.initial_state(50))
    torch.testing.assert_close(dist.probs, torch.full_like(dist.probs, 1 / 3), rtol=0, atol=0.05)


def test_minibatches_are_shuffled():
    args, agent, episodes, rows = play()
    batch, rng = ppo_tbb.compute_advantages(agent, rows, args), np.random.default_rng(0)
    first, second = ([rows.obs[0, 0, 0].item() for rows, *_ in ppo_tbb.minibatches(batch, args, rng)] for _ in range(2))
    assert first != second


def test_an_episode_of_one_step_trains_the_actor():
    """A minibatch of a single transition: its advantage minus the mean would be 0."""
    args, agent, episodes, _ = play(ent_coef=0.0)
    episode = next(episode for episode in episodes if len(episode.reward) == 2)
    rows = Rows(*(torch.as_tensor(x)[:, None] for x in episode))
    assert args.norm_adv and ppo_tbb.update(agent, Still(agent), ppo_tbb.compute_advantages(agent, rows, args), args)
    assert all(p.grad.abs().sum() > 0 for p in agent.actor.parameters())
