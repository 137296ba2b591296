"""The authors' update of a recurrent double DQN in JAX, for our network. benchmarks/update.py times it beside ours.

Written anew after github.com/proroklab/memory-monoids, commit 54f44bc. Theirs is how it is computed:

    memory/lru.py        `LRU.__call__`, `wrapped_associative_update`: lambda repeated for every row, a row of the given
                         state before the first, B x and C h as complex products, and one `jax.lax.associative_scan` of
                         (start, lambda, B x) with a reset that multiplies by `not start`
    losses.py            `tape_ddqn_loss`: three passes, Q of the observations and, with the same flags, Q and the
                         target network's Q of the next observations; Huber loss
    losses.py            `tape_update`: all of it, with the optimizer and `soft_update` (modules.py), in one jit
    tape_dqn.py          the optimizer: gradients clipped by their global norm, NaNs zeroed, Adam with weight decay

Ours is the network, so that the same is computed: an encoder, residual blocks with two norms, a GLU of one product and
a dueling head as in dqn_tbb.py, its parameters under the names that they have there, no dropout and no ensemble of one.
Observations come as features; theirs are one-hot in the buffer too. Plain JAX instead of Equinox and Optax.
"""

import jax
import jax.numpy as jnp


def linear(p, name, x):
    return x @ p[f"{name}.weight"].T + p[f"{name}.bias"]


def norm(p, name, x):
    x = x - x.mean(-1, keepdims=True)
    return x * jax.lax.rsqrt((x**2).mean(-1, keepdims=True) + 1e-5) * p[f"{name}.weight"] + p[f"{name}.bias"]


def gelu(x):
    return jax.nn.gelu(x, approximate=False)


def reset_or_continue(left, right):
    (start, a, b), (start2, a2, b2) = left, right
    a, b = jnp.logical_not(start2) * a, jnp.logical_not(start2) * b
    return jnp.logical_or(start, start2), a2 * a, a2 * b + b2


def lru(p, name, x, start):
    get = lambda key: p[f"{name}.{key}"]
    decay = jnp.exp(-jnp.exp(get("nu_log")) + 1j * get("theta"))  # (N,)
    B = jnp.exp(get("gamma_log"))[:, None] * (get("B")[:, 0] + 1j * get("B")[:, 1])
    C = get("C")[..., 0] - 1j * get("C")[..., 1]
    decays = jnp.concatenate((jnp.ones((1, len(decay))), jnp.repeat(decay[None], len(x), 0)))  # (T + 1, N)
    inputs = jnp.concatenate((jnp.zeros((1, len(decay)), complex), jax.vmap(lambda row: B @ row)(x)))
    start = jnp.concatenate((jnp.zeros(1, bool), start))[:, None]
    _, _, h = jax.lax.associative_scan(reset_or_continue, (start, decays, inputs))
    return jax.vmap(lambda h, x: (C @ h).real + get("D") * x)(h[1:], x)


def q_values(p, x, start, num_layers=2):
    x = linear(p, "encoder.2", gelu(linear(p, "encoder.0", x)))
    for i in range(num_layers):
        y = lru(p, f"memory.cells.{i}", norm(p, f"memory.norms.{2 * i}", x), start)
        x = x + jax.nn.glu(linear(p, f"memory.gates.{i}", gelu(norm(p, f"memory.norms.{2 * i + 1}", y))))
    head = linear(p, "head.3", gelu(linear(p, "head.1", norm(p, "head.0", x))))
    value, advantage = head[:, :1], head[:, 1:]
    return value + advantage - advantage.mean(-1, keepdims=True)  # (T, actions)


def loss(p, target, tape, gamma):
    rows = jnp.arange(len(tape["action"]))
    q = q_values(p, tape["observation"], tape["start"])[rows, tape["action"]]
    best = jax.lax.stop_gradient(q_values(p, tape["next_observation"], tape["start"])).argmax(-1)
    next_q = jax.lax.stop_gradient(q_values(target, tape["next_observation"], tape["start"]))[rows, best]
    error = q - (tape["reward"] + (1.0 - tape["terminated"]) * gamma * next_q)
    size = jnp.abs(error)
    return jnp.where(size < 1, error**2 / 2, size - 0.5).mean()


@jax.jit
def update(p, target, optimizer, tape, gamma, tau, learning_rate, max_norm):
    """-> p, target, optimizer = (first and second moments, number of steps), loss"""
    value, gradient = jax.value_and_grad(loss)(p, target, tape, gamma)
    gradient = jax.tree.map(lambda g: jnp.where(jnp.isnan(g), 0, g), gradient)
    size = jnp.sqrt(sum((g**2).sum() for g in gradient.values()))
    gradient = jax.tree.map(lambda g: g * jnp.minimum(1, max_norm / size), gradient)
    m, v, steps = optimizer
    steps += 1
    m = jax.tree.map(lambda m, g: 0.9 * m + 0.1 * g, m, gradient)
    v = jax.tree.map(lambda v, g: 0.999 * v + 0.001 * g**2, v, gradient)
    rate = learning_rate * jnp.sqrt(1 - 0.999**steps) / (1 - 0.9**steps)
    p = jax.tree.map(lambda p, m, v: p - rate * m / (jnp.sqrt(v) + 1e-8) - learning_rate * 1e-4 * p, p, m, v)
    target = jax.tree.map(lambda t, p: (1 - tau) * t + tau * p, target, p)
    return p, target, (m, v, steps), value
