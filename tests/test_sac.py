"""SAC over tapes: the losses against slow ones that feed every history on its own, the policy, the spaces of actions."""

import copy

import gymnasium as gym
import helpers
import numpy as np
import pytest
import torch
from gymnasium.spaces import Box
from helpers import Still, assert_refused, checkpoint_of, flags, load, make, scalars
from torch.distributions import Normal, TanhTransform, TransformedDistribution

import sac_tbb
from monoids import MEMORIES
from sac_tbb import Rows

play, trained = helpers.play, helpers.trained
K = 2  # components of an action


class Spaces(gym.Env):
    """Never steps: tests make their own episodes."""

    observation_space, action_space = Box(-np.inf, np.inf, (4,)), Box(-1, 1, (K,))


gym.register("Spaces-v0", Spaces)


def make_args(**kwargs):
    return sac_tbb.Args(**{"env_id": "Spaces-v0", "d_model": 8, "learning_rate": 0.0, "max_grad_norm": 1e9, **kwargs})


def make_agents(**kwargs):
    """Two of different weights, in float64, with outputs that are not near 0."""
    args = make_args(**kwargs)
    torch.manual_seed(1)
    agents = [sac_tbb.Agent(sac_tbb.make_envs(args, 1), args).double() for _ in range(2)]
    for agent in agents:
        for head in (agent.actor, *agent.critics):
            torch.nn.init.normal_(head[-1].weight, 0, 0.3)
        agent.log_alpha.fill_(np.log(0.3))
        agent.reward_scale.fill_(0.7)
    return args, *agents


def make_episode(rng, n, terminated):
    obs, action, reward = rng.normal(size=(n + 1, 4)), rng.uniform(-1, 1, (n + 1, K)), rng.normal(size=n + 1)
    reward[-1] = 0  # the last action is no zero either: it must not reach the next episode
    rows = np.arange(n + 1)
    return Rows(*map(torch.as_tensor, (obs, action, reward, terminated & (rows == n - 1), rows == 0)))


def make_batch(episodes):
    rows = Rows(*(torch.cat(x)[:, None] for x in zip(*episodes)))
    last = np.cumsum([len(e.start) for e in episodes]) - 1
    return rows, torch.as_tensor(np.delete(np.arange(len(rows.start)), last))


def metrics_and_gradient(args, agent, target_agent, batch):
    still = Still(agent)
    torch.manual_seed(2)  # of the noise
    metrics = sac_tbb.update(agent, copy.deepcopy(target_agent), still, batch, args)
    return metrics, still.gradient


@pytest.mark.parametrize("memory", MEMORIES)
@pytest.mark.parametrize("previous_action", [True, False])
def test_targets_see_the_true_history(memory, previous_action):
    """Features of each history from an agent that is fed o_0 ... o_t on its own, row by row; losses row by row."""
    args, agent, target_agent = make_agents(memory=(memory,), previous_action=previous_action, gamma=0.9)
    rng = np.random.default_rng(0)
    episodes = [make_episode(rng, n, terminated) for n, terminated in [(3, True), (1, False), (6, False), (1, True)]]
    batch = make_batch(episodes)
    metrics, gradient = metrics_and_gradient(args, agent, target_agent, batch)
    torch.manual_seed(2)
    noises = torch.randn_like(batch[0].action)[:, 0].split([len(e.start) for e in episodes])

    def features(network, episode, t):  # of the history up to row t
        state = network.memory.initial_state(1)
        for i in range(t + 1):
            previous = episode.action[i - 1] if i else torch.zeros(K)
            x, state = network(episode.obs[None, None, i], previous[None, None], torch.tensor([[i == 0]]), state)
        return x[0, 0]

    def drawn(x, noise):  # the policy's action, and its log-probability
        mean, log_std = agent.actor(x).split(K)
        u = mean + log_std.exp() * noise
        return u.tanh(), (Normal(mean, log_std.exp()).log_prob(u) - torch.log(1 - u.tanh() ** 2)).sum()

    def values(network, x, action):
        return [critic(torch.cat((x, action * (8 / K) ** 0.5))) for critic in network.critics]

    alpha, q_losses, actor_losses, logprobs = 0.3, [], [], []
    for episode, noise in zip(episodes, noises):
        for t in range(len(episode.start) - 1):
            with torch.no_grad():
                target = episode.reward[t] / 0.7
                if not episode.terminated[t]:  # a truncated episode bootstraps
                    action, logprob = drawn(features(agent, episode, t + 1), noise[t + 1])
                    next_value = min(values(target_agent, features(target_agent, episode, t + 1), action))
                    target = target + args.gamma * (next_value - alpha * logprob)
            x = features(agent, episode, t)
            q_losses.append(sum((q - target) ** 2 for q in values(agent, x, episode.action[t])) / 2)
            action, logprob = drawn(x.detach(), noise[t])
            actor_losses.append(alpha * logprob - min(values(agent, x.detach(), action)))
            logprobs.append(logprob.detach())
    q_loss, actor_loss, entropy = (torch.stack(x).mean() for x in (q_losses, actor_losses, [-x for x in logprobs]))
    torch.testing.assert_close(metrics["losses/td_loss"], q_loss.detach())
    torch.testing.assert_close(metrics["losses/entropy"], entropy)

    # the critics' loss is about all but the actor, and the actor's about nothing but the actor
    others = {name: p for name, p in agent.named_parameters() if not name.startswith("actor")}
    actor = {name: p for name, p in agent.named_parameters() if name.startswith("actor")}
    slow = {}
    for loss, parameters in ((q_loss, others), (actor_loss, actor)):
        slow |= zip(parameters, torch.autograd.grad(loss, parameters.values(), allow_unused=True))
    for name, expected in slow.items():
        if expected is not None:
            torch.testing.assert_close(gradient[name], expected, rtol=1e-5, atol=1e-9, msg=name)
    assert {*gradient} == {name for name, x in slow.items() if x is not None}


@pytest.mark.parametrize("scale", [1.0, 100.0])
def test_log_probability_is_that_of_a_squashed_gaussian(scale):
    """Against torch.distributions; with outputs so large that tanh rounds to 1 as well."""
    _, agent, _ = make_agents()
    x, noise = scale * torch.randn(50, 7, 8).double(), torch.randn(50, 7, K).double()
    action, logprob = agent.sample(x, noise)
    mean, log_std = agent.actor(x).chunk(2, -1)
    base = Normal(mean, log_std.clamp(-20, 2).exp())
    u = base.mean + base.stddev * noise
    squashed = TransformedDistribution(base, TanhTransform(cache_size=1))
    expected = squashed.log_prob(squashed.transforms[0](u))  # the cache remembers u
    torch.testing.assert_close(action, u.tanh())
    torch.testing.assert_close(logprob, expected.sum(-1))
    assert (scale == 1) == (action.float().abs() < 1).all() and logprob.isfinite().all()
    grad = torch.autograd.grad(logprob.sum(), agent.actor.parameters())
    assert all(g.isfinite().all() for g in grad)


@pytest.mark.parametrize("log_std", [0.0, -9.0])
def test_alpha_moves_towards_the_target_entropy(log_std):
    """By gradient descent on log_alpha * (entropy - target), the target being -1 for each component of an action."""
    args, agent, target_agent = make_agents(learning_rate=0.1)
    batch = make_batch([make_episode(np.random.default_rng(0), 9, True)])
    with torch.no_grad():
        agent.actor[-1].bias[K:] = log_std
    before = agent.log_alpha.clone().requires_grad_()
    metrics, _ = metrics_and_gradient(args, agent, target_agent, batch)
    (gradient,) = torch.autograd.grad(before * (metrics["losses/entropy"] + K), before)
    torch.testing.assert_close(agent.log_alpha, before.detach() - 0.1 * gradient / K)
    assert (agent.log_alpha < before) == (log_std == 0)  # more entropy than wanted: less weight


def test_target_network_moves_by_tau():
    args, agent, target_agent = make_agents(tau=0.3)
    before, (rows, t) = copy.deepcopy(target_agent), make_batch([make_episode(np.random.default_rng(0), 9, True)])
    metrics = sac_tbb.update(agent, target_agent, Still(agent), (rows, t), args)
    for old, new, own in zip(before.parameters(), target_agent.parameters(), agent.parameters()):
        torch.testing.assert_close(new, 0.7 * old + 0.3 * own)
    x, _ = agent(rows.obs, rows.action.roll(1, 0), rows.start, agent.memory.initial_state(1))
    torch.testing.assert_close(metrics["losses/q_values"], agent.q_values(x, rows.action)[t].mean().detach())


def test_padding_does_not_affect_the_losses(monkeypatch):
    """--compile pads batches to multiples of 64 rows."""
    args, agent, target_agent = make_agents()
    noise = torch.randn(100, 1, K).double()
    monkeypatch.setattr(torch, "randn_like", lambda x: noise[: len(x)])
    rows, t = make_batch([make_episode(np.random.default_rng(n), n, True) for n in (3, 5)])
    padded = Rows(*(torch.cat((x, x[-6:])) for x in rows))
    padded.start[len(rows.start) :] = True
    plain = metrics_and_gradient(args, agent, target_agent, (rows, t))
    torch.testing.assert_close(metrics_and_gradient(args, agent, target_agent, (padded, t)), plain)


def test_critics_are_two():
    _, agent, _ = make_agents()
    q = agent.q_values(torch.randn(5, 1, 8).double(), torch.rand(5, 1, K).double())
    assert (q[..., 0] != q[..., 1]).all()


@pytest.mark.parametrize("greedy", [True, False])
def test_policy_draws_from_the_squashed_gaussian_or_takes_its_mean(greedy):
    _, agent, _ = make_agents()
    obs, start = torch.ones(1, 20_000, 4).double(), torch.ones(1, 20_000, dtype=torch.bool)
    previous, state = torch.zeros(1, 20_000, K).double(), agent.memory.initial_state(20_000)
    torch.manual_seed(0)
    with torch.no_grad():
        action, _ = sac_tbb.policy(agent, obs, previous, start, state, greedy)
        mean, log_std = agent.actor(agent(obs, previous, start, state)[0])[0, 0].chunk(2, -1)
    u = action.atanh()
    torch.testing.assert_close(u.mean(0), mean, rtol=0, atol=0.05)
    torch.testing.assert_close(u.std(0), log_std.exp() * (not greedy), rtol=0.03, atol=1e-6)


BOXES = [Box(-1, np.float32([[2, 3]])), Box(0, 10, ()), Box(np.float64([-3, 5]), 5, dtype=np.float64)]
BOXES += [Box(-2.3, 1.1, (1,))]  # in float32, -2.3 + (1.1 + 2.3) > 1.1


@pytest.mark.parametrize("space", BOXES, ids=str)
def test_actions_are_scaled_to_the_bounds(space):
    envs, network, _ = make(sac_tbb, num_envs=1, env_id="Anything-v0", env_kwargs={"action_space": space})
    size = space.low.size
    left = iter(torch.tensor([[-1.0], [0.5], [1.0]]).expand(3, size))
    (e,) = sac_tbb.collect(envs, network, lambda network, *inputs: (next(left)[None], inputs[-1]), 0)
    received = envs.envs[0].unwrapped.actions
    expected = [space.low, 0.25 * space.low + 0.75 * space.high, space.high]
    np.testing.assert_allclose(received, expected, rtol=1e-6)
    assert all(np.shape(a) == space.shape and a.dtype == space.dtype and space.contains(np.asarray(a)) for a in received)
    np.testing.assert_array_equal(e.action, np.repeat([[-1], [0.5], [1], [0]], size, 1))


UNFIT = [Box(-np.inf, np.inf, (2,)), Box(0, np.float32([1, np.inf])), Box(-3e38, 3e38, (2,))]


@pytest.mark.parametrize("space", UNFIT, ids=str)
def test_unbounded_actions_are_refused(space, play, monkeypatch):
    monkeypatch.setattr(helpers.ContinuousLengths, "action_space", space)
    assert_refused(play(sac_tbb, *flags(sac_tbb)), "SAC takes bounded Box actions", str(space))
    assert_refused(play(sac_tbb, "--env-id", "CartPole-v1"), "SAC takes bounded Box actions", "Discrete(2)")


def test_a_resumed_run_takes_a_new_learning_rate(play, trained, tmp_path):
    trained(sac_tbb)
    more = "--learning-rate", 1e-4, "--total-timesteps", 350
    assert play(sac_tbb, "--resume", checkpoint_of(tmp_path), *more)[0] == 0
    (group,) = load(checkpoint_of(tmp_path))["learners"]["optimizer"]["param_groups"]
    assert group["lr"] == 1e-4


def test_alpha_is_logged(trained, tmp_path):
    trained(sac_tbb)
    assert float(scalars(tmp_path)["losses/alpha"][0][1]) == pytest.approx(np.exp(-3))


def test_reward_scale_is_the_root_mean_square_of_the_tape(trained, tmp_path):
    trained(sac_tbb)
    learners = load(checkpoint_of(tmp_path))["learners"]
    reward = learners["buffer"]["rows"][2]
    torch.testing.assert_close(learners["agent"]["reward_scale"], reward.square().mean().sqrt())
    assert learners["agent"]["reward_scale"] > 100  # Lengths: 100 * step + action
