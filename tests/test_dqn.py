"""Tape and segments, and the DQN loss over each of them against a slow one that feeds every history on its own."""

import copy
import difflib
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import Still

import dqn_sbb
import dqn_tbb
from dqn_tbb import Rows
from monoids import MEMORIES


def make_args(script, **kwargs):
    return script.Args(**{"env_id": "CartPole-v1", "num_envs": 1, "d_model": 8, "batch_size": 10, **kwargs})


def make_buffer(script, **kwargs):
    args = make_args(script, **kwargs)
    envs = script.make_envs(args, 1)
    return (script.Tape if script is dqn_tbb else script.Segments)(args, envs, "cpu")


def make_episode(rng, n, name=0, terminated=True):
    """n transitions; obs = (name, row, noise, noise)."""
    obs = rng.normal(size=(n + 1, 4)).astype(np.float32)
    obs[:, 0], obs[:, 1] = name, np.arange(n + 1)
    rows = np.arange(n + 1)
    action = np.where(rows < n, rng.integers(2, size=n + 1), 0)
    reward = np.where(rows < n, rng.normal(size=n + 1), 0).astype(np.float32)
    return Rows(obs, action, reward, terminated & (rows == n - 1), rows == 0)


def concatenate(episodes):
    """The batch of dqn_tbb that holds these episodes: rows (R, 1, ...), and those that hold a transition."""
    rows = Rows(*(torch.as_tensor(np.concatenate(x))[:, None] for x in zip(*episodes)))
    last = np.cumsum([len(e.start) for e in episodes]) - 1
    return rows, torch.as_tensor(np.delete(np.arange(len(rows.start)), last))


# ---------------------------------------------------------------------------------------------------------------------
# The tape


@pytest.mark.parametrize("capacity", [50, 64, 101])
def test_tape_holds_exactly_the_newest_whole_episodes(capacity):
    rng = np.random.default_rng(0)
    tape, added = make_buffer(dqn_tbb, buffer_size=capacity), []
    for name in range(200):  # some fifty times round
        added.append(make_episode(rng, int(rng.integers(1, 30)), name, terminated=bool(name % 2)))
        tape.add(added[-1])
        held = [*tape.index]
        newest = added[-len(held) :]
        assert [rows for _, rows in held] == [len(e.start) for e in newest]
        used = sum(rows for _, rows in held)
        assert used <= capacity
        if len(held) < len(added):
            assert used + len(added[-len(held) - 1].start) > capacity  # one more would not have fitted
        for (first, rows), episode in zip(held, newest):
            at = np.arange(first, first + rows) % capacity
            for ring, x in zip(tape.rows, episode):
                np.testing.assert_array_equal(ring[at].numpy(), x)


def test_episode_longer_than_the_tape_is_refused(capsys):
    rng = np.random.default_rng(0)
    tape = make_buffer(dqn_tbb, buffer_size=20)
    tape.add(make_episode(rng, 5))
    tape.add(make_episode(rng, 19, name=1))
    rows, t = tape.sample(1, rng)  # longer than the batch: trained on to its end
    assert len(rows.start) == 20 and len(t) == 19 and (rows.obs[..., 0] == 1).all()
    with pytest.raises(SystemExit) as stop:
        tape.add(make_episode(rng, 20))
    assert stop.value.code == 2
    assert "raise --buffer-size to 21" in capsys.readouterr().err


def test_sample_concatenates_whole_episodes():
    rng = np.random.default_rng(0)
    tape = make_buffer(dqn_tbb, buffer_size=300)
    episodes = {name: make_episode(rng, int(rng.integers(1, 40)), name) for name in range(40)}
    for episode in episodes.values():
        tape.add(episode)
    for _ in range(50):
        rows, t = tape.sample(60, rng)
        names = [int(name) for name in rows.obs[rows.start[:, 0], 0, 0]]
        expected = concatenate([episodes[name] for name in names])
        for got, wanted in zip([*rows, t], [*expected[0], expected[1]]):
            torch.testing.assert_close(got, wanted, rtol=0, atol=0)
        assert len(t) >= 60 > len(t) - (len(episodes[names[-1]].start) - 1)  # and no more than needed


def test_padding_does_not_affect_the_values():
    """--compile pads batches to multiples of 64 rows."""
    rng = np.random.default_rng(0)
    plain, padded = (make_buffer(dqn_tbb, buffer_size=150, compile=compiled) for compiled in (False, True))
    for name in range(20):  # more than once round, so that the ring's first row is no start
        episode = make_episode(rng, int(rng.integers(1, 40)), name)
        plain.add(episode), padded.add(episode)
    args, rows = make_args(dqn_tbb), 0
    q_network = dqn_tbb.QNetwork(dqn_tbb.make_envs(args, 1), args)
    for seed in range(20):
        batches = [tape.sample(50, np.random.default_rng(seed)) for tape in (plain, padded)]
        assert not padded.rows.start[0]
        torch.testing.assert_close(*(t for _, t in batches), rtol=0, atol=0)
        values = [
            q_network(rows.obs, rows.action, rows.start, q_network.memory.initial_state(1))[0] for rows, _ in batches
        ]
        torch.testing.assert_close(*(q[t + 1] for q, (_, t) in zip(values, batches)))
        assert len(batches[1][0].start) % 64 == 0
        rows += len(batches[1][0].start) - len(batches[0][0].start)
    assert rows > 0


def test_every_transition_has_the_same_expected_number_of_draws():
    rng = np.random.default_rng(0)
    tape = make_buffer(dqn_tbb, buffer_size=1000)
    lengths = [1, 2, 5, 20, 80, 200]
    for name, n in enumerate(lengths):
        tape.add(make_episode(rng, n, name))
    draws = Counter()
    for _ in range(4000):
        rows, _ = tape.sample(100, rng)
        draws.update(rows.obs[rows.start[:, 0], 0, 0].tolist())
    share = np.array([draws[name] for name in range(6)]) / sum(draws.values())
    np.testing.assert_allclose(share, 1 / 6, rtol=0.06)  # four standard deviations


# ---------------------------------------------------------------------------------------------------------------------
# The segments


def everything(segments):
    """All segments as one batch, in the order in which they were added."""

    class InOrder:
        def integers(self, n, size):
            return np.arange(n)

    return segments.sample(0, InOrder())


def test_segments_padding_and_mask_by_hand():
    segments = make_buffer(dqn_sbb, segment_length=3, buffer_size=12)
    o = np.arange(1, 6, dtype=np.float32)  # an episode of 4 transitions: o_0 ... o_4 are 1 ... 5
    action, reward = np.array([1, 0, 1, 1, 0]), np.array([10, 20, 30, 40, 0], dtype=np.float32)
    segments.add(Rows(np.repeat(o[:, None], 4, 1), action, reward, np.arange(5) == 3, np.arange(5) == 0))
    rows, played, mask = everything(segments)
    np.testing.assert_array_equal(rows.obs[..., 0].T, [[1, 2, 3, 4], [4, 5, 0, 0]])
    np.testing.assert_array_equal(rows.action[:3].T, [[1, 0, 1], [1, 0, 0]])
    np.testing.assert_array_equal(rows.reward[:3].T, [[10, 20, 30], [40, 0, 0]])
    np.testing.assert_array_equal(rows.terminated[:3].T, [[0, 0, 0], [1, 0, 0]])
    np.testing.assert_array_equal(rows.start.T, [[1, 0, 0, 0], [1, 0, 0, 0]])
    np.testing.assert_array_equal(played.T, [[1, 1, 1], [1, 0, 0]])
    np.testing.assert_array_equal(mask, played)


@pytest.mark.parametrize("n, lengths", [(1, [1]), (6, [6]), (7, [7]), (8, [7, 1]), (14, [7, 7]), (20, [7, 7, 6])])
def test_every_transition_is_in_one_segment(n, lengths):
    segments = make_buffer(dqn_sbb, segment_length=7, buffer_size=700)
    episode = make_episode(np.random.default_rng(0), n)
    segments.add(episode)
    rows, played, mask = everything(segments)
    assert played.sum(0).tolist() == lengths
    assert sorted(rows.obs[:-1, :, 1][mask].tolist()) == list(range(n))  # the row number of each transition
    for i, transitions in enumerate(lengths):
        for x, y in zip(rows[:4], episode):
            np.testing.assert_array_equal(x[: transitions + 1, i], y[7 * i : 7 * i + transitions + 1])
            assert not x[transitions + 1 :, i].any()


@pytest.mark.parametrize("n", [1, 3, 6, 7, 8, 9, 30])
def test_burn_in_carries_no_loss_and_every_transition_carries_loss_once(n):
    segments = make_buffer(dqn_sbb, segment_length=7, burn_in=2, buffer_size=700)
    segments.add(make_episode(np.random.default_rng(0), n))
    rows, played, mask = everything(segments)
    assert sorted(rows.obs[:-1, :, 1][mask].tolist()) == list(range(n))
    assert played[:, 0].sum() == min(n, 7) == mask[:, 0].sum()
    assert not mask[:2, 1:].any() and played[:2, 1:].all()


def test_oldest_segments_make_room():
    rng = np.random.default_rng(0)
    segments = make_buffer(dqn_sbb, segment_length=5, buffer_size=54)  # 10 segments
    for name in range(23):
        segments.add(make_episode(rng, 5, name))
    assert sorted(everything(segments)[0].obs[0, :, 0].tolist()) == list(range(13, 23))
    segments.add(make_episode(rng, 2))
    rows, _, _ = everything(segments)
    assert not any(x[3:, 3].any() for x in rows)  # what was there is gone
    rows, played, mask = segments.sample(54, rng)
    assert rows.obs.shape == (6, 10, 4) and played.shape == mask.shape == (5, 10)


@pytest.mark.parametrize("script, more", [(dqn_tbb, {}), (dqn_sbb, {"segment_length": 7})], ids=["tbb", "sbb"])
def test_buffer_is_restored_from_its_state(script, more):
    rng = np.random.default_rng(0)
    for episodes in (3, 40):  # before and after the ring is full
        before, after = (make_buffer(script, buffer_size=100, **more) for _ in range(2))
        for name in range(episodes):
            before.add(make_episode(rng, int(rng.integers(1, 20)), name))
        state = before.state_dict()
        saved = copy.deepcopy(state)
        after.load_state_dict(state)
        for buffer in (before, after):
            buffer.add(make_episode(np.random.default_rng(1), 9))
        torch.testing.assert_close(state, saved, rtol=0, atol=0)  # a copy, which later episodes do not change
        batches = [buffer.sample(50, np.random.default_rng(2)) for buffer in (before, after)]
        torch.testing.assert_close(*batches, rtol=0, atol=0)
    for size in (50, 200):  # positions on a full ring depend on its size
        with pytest.raises((RuntimeError, ValueError)):
            make_buffer(script, buffer_size=size, **more).load_state_dict(state)


@pytest.mark.parametrize("script, more", [(dqn_tbb, {}), (dqn_sbb, {"segment_length": 7})], ids=["tbb", "sbb"])
def test_state_holds_only_what_is_used(script, more):
    buffer = make_buffer(script, buffer_size=100, **more)
    buffer.add(make_episode(np.random.default_rng(0), 5))
    assert all(x.untyped_storage().nbytes() == x.nbytes for x in buffer.state_dict()["rows"])


# ---------------------------------------------------------------------------------------------------------------------
# The loss


def make_networks(memory="lru", **kwargs):
    args = make_args(dqn_tbb, memory=(memory,), **kwargs)
    envs = dqn_tbb.make_envs(args, 1)
    torch.manual_seed(1)
    return args, dqn_tbb.QNetwork(envs, args).double(), dqn_tbb.QNetwork(envs, args).double()


def loss_and_gradient(script, args, q_network, target_network, batch):
    as_double = Rows(*(x.double() if x.is_floating_point() else x for x in batch[0]))
    still = Still(q_network)
    metrics = script.update(q_network, copy.deepcopy(target_network), still, (as_double, *batch[1:]), args)
    return metrics["losses/td_loss"], still.gradient


@pytest.mark.parametrize("memory", MEMORIES)
@pytest.mark.parametrize("previous_action", [True, False])
def test_targets_see_the_true_history(memory, previous_action):
    """Each value and each target from a network that is fed o_0 ... o_t (... o_{t+1}) on its own, row by row."""
    kwargs = {"previous_action": previous_action, "max_grad_norm": 1e9, "gamma": 0.9}
    args, q_network, target_network = make_networks(memory, **kwargs)
    rng = np.random.default_rng(0)
    kinds = [(3, True), (1, False), (6, False), (1, True)]
    episodes = [make_episode(rng, n, terminated=terminated) for n, terminated in kinds]
    loss, gradient = loss_and_gradient(dqn_tbb, args, q_network, target_network, concatenate(episodes))

    def value(network, episode, t):  # of the history up to row t
        state = network.memory.initial_state(1)
        for i in range(t + 1):
            obs = torch.tensor(episode.obs[i], dtype=torch.float64)[None, None]
            previous = torch.tensor([[episode.action[i - 1] if i else 0]])
            q, state = network(obs, previous, torch.tensor([[i == 0]]), state)
        return q[0, 0]

    losses = []
    for episode in episodes:
        for t in range(len(episode.start) - 1):
            with torch.no_grad():
                best = value(q_network, episode, t + 1).argmax()
                target = float(episode.reward[t])
                if not episode.terminated[t]:  # a truncated episode bootstraps
                    target = target + args.gamma * value(target_network, episode, t + 1)[best]
            old_val = value(q_network, episode, t)[episode.action[t]]
            losses.append(F.smooth_l1_loss(old_val, torch.as_tensor(target, dtype=torch.float64)))
    slow = torch.stack(losses).mean()
    q_network.zero_grad()
    slow.backward()
    torch.testing.assert_close(loss, slow.detach(), rtol=1e-6, atol=1e-9)  # rewards and observations are float32
    for name, p in q_network.named_parameters():
        if p.grad is not None:
            torch.testing.assert_close(gradient[name], p.grad, rtol=1e-5, atol=1e-8, msg=name)


@pytest.mark.parametrize("memory", MEMORIES)
def test_segments_as_long_as_the_episodes_give_the_same_loss_as_the_tape(memory):
    rng = np.random.default_rng(0)
    episodes = [make_episode(rng, n, terminated=bool(n % 2)) for n in (4, 7, 1, 2, 7)]
    segments = make_buffer(dqn_sbb, segment_length=7, buffer_size=700)
    for episode in episodes:
        segments.add(episode)
    sbb = everything(segments)
    args, *networks = make_networks(memory)
    loss_tbb, gradient_tbb = loss_and_gradient(dqn_tbb, args, *networks, concatenate(episodes))
    loss_sbb, gradient_sbb = loss_and_gradient(dqn_sbb, args, *networks, sbb)
    torch.testing.assert_close(loss_sbb, loss_tbb)
    torch.testing.assert_close(gradient_sbb, gradient_tbb)


@pytest.mark.parametrize("memory", MEMORIES)
def test_padding_does_not_affect_the_loss(memory):
    rng = np.random.default_rng(0)
    segments = make_buffer(dqn_sbb, segment_length=7, burn_in=2, buffer_size=700)
    for n in (3, 9, 1, 12):
        segments.add(make_episode(rng, n))
    batch = segments.sample(70, rng)
    args, *networks = make_networks(memory)
    clean = loss_and_gradient(dqn_sbb, args, *networks, batch)
    rows, played, mask = batch
    assert 0 < played.sum() < played.numel()
    # rows after the one that holds the final observation; and what would be the final row's action, reward and end
    beyond = torch.cat((torch.zeros_like(played[:2]), ~played), 0)[: len(rows.start)]
    beyond[1:] = torch.cat((torch.zeros_like(played[:1]), ~played[:-1]), 0)
    final = torch.cat((~played, torch.ones_like(played[:1])))
    for extreme in (1e6, -1e30):
        garbage = rows._replace(
            obs=torch.where(beyond[..., None], extreme, rows.obs),
            action=torch.where(final, 1, rows.action),
            reward=torch.where(torch.cat((~mask, final[-1:])), extreme, rows.reward),  # nor do rewards of the burn-in
            terminated=rows.terminated | final,
            start=rows.start | beyond,
        )
        assert not torch.equal(garbage.obs, rows.obs)
        dirty = loss_and_gradient(dqn_sbb, args, *networks, (garbage, played, mask))
        torch.testing.assert_close(dirty, clean, rtol=1e-12, atol=1e-15)  # GRU runs its pieces in another order


def test_target_network_moves_by_tau():
    args, q_network, target_network = make_networks(tau=0.3)
    rows, t = concatenate([make_episode(np.random.default_rng(0), 9)])
    rows = Rows(*(x.double() if x.is_floating_point() else x for x in rows))
    before, after = copy.deepcopy(target_network), target_network
    dqn_tbb.update(q_network, target_network, Still(q_network), (rows, t), args)
    for old, new, q in zip(before.parameters(), after.parameters(), q_network.parameters()):
        torch.testing.assert_close(new, 0.7 * old + 0.3 * q)


def test_policy_explores_with_probability_epsilon():
    """Frequencies of 20,000 actions on the same observation: a share of epsilon is uniform, the others are the best."""
    _, q_network, _ = make_networks()
    obs, start = torch.ones(1, 20_000, 4).double(), torch.ones(1, 20_000, dtype=torch.bool)
    inputs = obs, torch.zeros(1, 20_000, dtype=torch.long), start, q_network.memory.initial_state(20_000)
    with torch.no_grad():
        q, _ = q_network(*inputs)
        action, _ = dqn_tbb.policy(q_network, *inputs, epsilon=0.3)
    expected = 0.7 * torch.eye(2)[q[0, 0].argmax()] + 0.3 / 2
    torch.testing.assert_close(torch.bincount(action, minlength=2) / 20_000, expected, rtol=0, atol=0.02)


def test_metrics_leave_out_padding():
    episodes = [make_episode(np.random.default_rng(n), n) for n in (3, 7, 2)]
    segments, metrics = make_buffer(dqn_sbb, segment_length=7, buffer_size=70), []
    for episode in episodes:
        segments.add(episode)
    for script, batch in (dqn_tbb, concatenate(episodes)), (dqn_sbb, everything(segments)):
        args, *networks = make_networks()
        metrics.append(script.update(*(x.float() for x in networks), Still(networks[0]), batch, args))
    torch.testing.assert_close(metrics[1].pop("losses/padding"), torch.tensor(1 - 12 / 21))
    torch.testing.assert_close(*metrics, rtol=1e-4, atol=1e-5)


def test_metrics_leave_out_the_burn_in():
    """Which is no padding."""
    segments = make_buffer(dqn_sbb, segment_length=7, burn_in=2, buffer_size=70)
    segments.add(make_episode(np.random.default_rng(0), 20))  # segments of 7, 7, 7 and 5 transitions
    rows, played, mask = everything(segments)
    args, *networks = make_networks()
    q_network, target_network = (x.float() for x in networks)
    metrics = dqn_sbb.update(q_network, target_network, Still(q_network), (rows, played, mask), args)
    q, _ = q_network(rows.obs, rows.action.roll(1, 0), rows.start, q_network.memory.initial_state(4))
    q = q[:-1].gather(-1, rows.action[:-1, :, None])[mask]
    torch.testing.assert_close(metrics["losses/q_values"], q.mean())
    torch.testing.assert_close(metrics["losses/padding"], torch.tensor(1 - 26 / 28))


def test_segments_loss_is_the_mean_over_the_mask():
    segments = make_buffer(dqn_sbb, segment_length=7, burn_in=2, buffer_size=70)
    segments.add(make_episode(np.random.default_rng(0), 20))
    rows, played, mask = everything(segments)
    assert (played & ~mask).any()
    args, *networks = make_networks()
    loss = lambda mask: loss_and_gradient(dqn_sbb, args, *networks, (rows, played, mask))[0]
    alone = [loss(torch.zeros_like(mask).index_put(tuple(at), torch.tensor(True))) for at in mask.nonzero()]
    torch.testing.assert_close(loss(mask), torch.stack(alone).mean())


def test_q_begins_near_0_and_its_mean_over_actions_is_the_value():
    torch.manual_seed(0)
    args = dqn_tbb.Args(env_id="CartPole-v1")
    q_network = dqn_tbb.QNetwork(dqn_tbb.make_envs(args, 1), args)
    obs, start = torch.randn(1, 50, 4), torch.ones(1, 50, dtype=torch.bool)
    q, _ = q_network(obs, torch.zeros(1, 50, dtype=torch.long), start, q_network.memory.initial_state(50))
    assert 0 < q.abs().max() < 0.2
    heads = []
    q_network.head.register_forward_hook(lambda head, inputs, y: heads.append(y))
    q, _ = q_network(obs, torch.zeros(1, 50, dtype=torch.long), start, q_network.memory.initial_state(50))
    torch.testing.assert_close(q.mean(-1), heads[0][..., 0])


# ---------------------------------------------------------------------------------------------------------------------
# The diffs: the only places where two scripts may differ, as (the last line before, the first line after)

BATCHING = [
    ('"""', "A *row*"),  # the module's docstring: what this file is
    ("    buffer_size: int", "    gamma: float"),
    ("    batch_size: int", "    start_e: float"),
    ('            (1, self.buffer_size, "batch_size")', '            (0, self.total_timesteps - 1, "learning_starts")'),
    ("    return torch.where(explore", "def update("),  # the class that stores episodes and samples batches
    ("def update(", "    inputs = "),
    ("    inputs = ", "    with torch.no_grad():"),  # shapes
    ("    old_val = ", "    optimizer.zero_grad()"),  # the loss
    ("        torch._foreach_lerp_", "def evaluate("),  # the padding is logged
    ("    path = path or", "        learners = "),  # which class stores episodes
]
ALGORITHM = [
    ('"""', "A *row*"),
    ("import", "import os"),  # copy
    ("import tyro", "from gymnasium import spaces"),
    ("from gymnasium import spaces", "@dataclass"),
    ("    env_kwargs", "    max_episode_steps: int"),  # defaults
    ("    anneal_lr", "    memory: "),
    ("        for low, high, names in [", "        ]:"),
    ("    def make_env(", "        render = "),  # actions
    ("        space = env.action_space", "    try:"),
    ("    obs: torch.Tensor", "    reward: torch.Tensor"),
    ("    return [Rows(", 'if __name__ == "__main__":'),  # network, tape, update
    ("    path = path or", "        for name, learner in"),
    ('            learner.load_state_dict(saved["learners"]', "        if not args.evaluate"),
    ('        fail(f"{path if saved', "    if finished := "),
    ("    if finished := ", "        eval_envs.close()"),
    ('        optimizer.param_groups[0]["lr"]', "        lengths = "),
    ("        iteration, global_step =", "        finished = global_step"),
    ("        if evaluated := ", "        seconds = "),
    ("                writer.flush()", "                checkpoint = "),
]

ACTOR = [
    ('"""', "A *row*"),
    ("    capture_video", '    """the id'),  # the default task
    ("    env_kwargs", "    max_episode_steps: int"),  # defaults
    ("    max_episode_steps", "    buffer_size: int"),  # the learning rate is constant
    ("    gamma", "    memory: "),
    ("    memory: ", "    previous_action: bool"),  # the width
    ("        for low, high, names in [", "        ]:"),
    ("    def make_env(", "        render = "),  # actions
    ("        space = env.action_space", "    try:"),
    ("    obs: torch.Tensor", "    reward: torch.Tensor"),
    ("    return [Rows(", "class Tape:"),  # network
    ("    def __init__(self, args, envs, device)", "        self.rows = Rows("),  # actions
    ('        self.index, self.end = [*state["index"]]', 'if __name__ == "__main__":'),  # update
    ("        q_network = ", "        for name, learner in"),
    ('        fail(f"{path if saved', "    if finished := "),
    ("    if finished := ", "        eval_envs.close()"),
    ("        # ALGO LOGIC: play whole episodes", "        for episode in episodes:"),
    ("            buffer.add(episode)", "        lengths = "),  # the scale of the rewards
    ("        iteration, global_step =", '        metrics["charts/episodic_return"]'),
    ("        if evaluated := ", "        seconds = "),
]


@pytest.mark.parametrize(
    "other, regions, most", [("dqn_sbb", BATCHING, 90), ("ppo_tbb", ALGORITHM, 400), ("sac_tbb", ACTOR, 164)]
)
def test_scripts_differ_only_where_they_must(other, regions, most):
    a = [line.rstrip() for line in Path(dqn_tbb.__file__).read_text().splitlines()]
    b = [line.rstrip() for line in Path(dqn_tbb.__file__).with_name(f"{other}.py").read_text().splitlines()]
    assert max(len(a), len(b)) <= 400
    allowed, first = [], 0
    for before, after in regions:
        first = next(i for i in range(first, len(a)) if a[i].startswith(before))
        allowed.append(range(first, next(i for i in range(first + 1, len(a)) if a[i].startswith(after))))
    changed = 0
    for tag, i, j, k, l in difflib.SequenceMatcher(None, a, b, autojunk=False).get_opcodes():
        if tag != "equal":
            changed += j - i + l - k
            assert any(lines.start <= i and j <= lines.stop for lines in allowed), "\n".join([*a[i:j], "->", *b[k:l]])
    assert changed <= most
