"""What an update costs: beside the matrix multiplications that it cannot avoid, and beside the authors' code.

    pip install -r benchmarks/requirements.txt && python benchmarks/update.py

First an update of DQN at its default sizes, for every memory and for the stack `lru mingru`, on a tape and on segments
of as many transitions, padding included, for the LRU compiled as well, an update of SAC of the same sizes, and a
minibatch of PPO; then DQN updates on longer and longer tapes. "bare" replays the matrix products of one update, not
compiled, alone: same shapes, strides and types in the same order, on random numbers. The rest are norms, activations,
the scan, the optimizer. "x lru" is the time divided by that of `--memory lru` at as many transitions: that of
`sac_tbb.py` or `ppo_tbb.py` for their own updates, of `dqn_tbb.py` for all others. Peak memory is what an update adds
to weights, optimizer and batch while it runs.

Last, in processes of their own with one thread and with two, our update beside the authors' (authors.py): the same
network and weights, d_model 256, as many transitions. Theirs has a row for each transition, ours one more for each
episode. That both networks give the same Q is checked first. Only on a CPU. All data are episodes of each script's
default task, played at random. Writes benchmarks/update.csv.
"""

import copy
import importlib.util
import json
import math
import os
import subprocess
import sys
from functools import partial

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

import measure
import dqn_sbb
import dqn_tbb
import ppo_tbb
import sac_tbb
from monoids import MEMORIES

STACKS = *MEMORIES, "lru mingru"
EPISODES = 400
TAPES = 1_000, 4_000, 16_000, 64_000  # transitions
aten = torch.ops.aten


class MatrixProducts(TorchDispatchMode):
    """Notes the matrix products that run under it, so that they can be run again alone."""

    kinds = {aten.mm, aten.addmm, aten.bmm, aten.baddbmm, aten.mv, aten.addmv, aten.dot}

    def __init__(self, f):
        super().__init__()
        self.calls = []
        with self:
            f()

    def __torch_dispatch__(self, f, types, args=(), kwargs=None):
        if f.overloadpacket in self.kinds:
            self.calls.append((f, tree_map_only(torch.Tensor, self.like, args)))
        return f(*args, **(kwargs or {}))

    def like(self, x):
        """Random numbers laid out like x, in memory of their own: in an update each product finds other data too."""
        size = 1 + sum((n - 1) * stride for n, stride in zip(x.shape, x.stride()))
        return torch.randn(size, dtype=x.dtype, device=x.device).as_strided(x.shape, x.stride())

    @torch.no_grad()
    def replay(self):
        for f, args in self.calls:
            f(*args)


def play(script, num_envs):
    """One episode of the default task in each environment, played at random."""
    args = script.Args(memory=("none",))
    envs = script.make_envs(args, num_envs)
    if script in (ppo_tbb, sac_tbb):
        act, network = partial(script.policy, greedy=False), script.Agent(envs, args)
    else:
        act, network = partial(script.policy, epsilon=1.0), script.QNetwork(envs, args)
    return script.collect(envs, network, act, (0, 0, 0))


def off_policy(script, episodes, memory, d_model, transitions, compile=False):
    """-> the arguments of `update`, of which the networks are not compiled; memory: names, separated by spaces"""
    args = script.Args(memory=tuple(memory.split()), d_model=d_model, batch_size=transitions, compile=compile)
    envs = script.make_envs(args, 1)
    network = (script.Agent if script is sac_tbb else script.QNetwork)(envs, args).to(measure.DEVICE)
    optimizer = torch.optim.Adam(network.parameters(), lr=args.learning_rate, fused=True)
    buffer = (script.Segments if script is dqn_sbb else script.Tape)(args, envs, measure.DEVICE)
    for episode in episodes:
        buffer.add(episode)
    batch = buffer.sample(transitions, np.random.default_rng((0, 2, 0)))
    return network, copy.deepcopy(network), optimizer, batch, args


def ppo(episodes, memory):
    args = ppo_tbb.Args(memory=tuple(memory.split()))
    agent = ppo_tbb.Agent(ppo_tbb.make_envs(args, 1), args).to(measure.DEVICE)
    optimizer = torch.optim.Adam(agent.parameters(), lr=args.learning_rate, eps=1e-5, fused=True)
    rows = (torch.as_tensor(np.concatenate(x), device=measure.DEVICE)[:, None] for x in zip(*episodes))
    batch = ppo_tbb.compute_advantages(agent, ppo_tbb.Rows(*rows), args)
    return agent, optimizer, next(ppo_tbb.minibatches(batch, args, np.random.default_rng((0, 2, 0)))), args


HEADER = "update,memory,d_model,threads,transitions,rows,ms,us a row,bare ms,x bare,peak KiB a row,x lru".split(",")


def table(contestants, seconds):
    """contestants {(name, memory, d_model, transitions): (rows, update, the same one not compiled or None)} -> rows"""
    found = []
    for key, (rows, f, plain) in contestants.items():
        name, memory, d_model, transitions = key
        script = name if name in ("sac_tbb.py", "ppo_tbb.py") else "dqn_tbb.py"
        calls = {"update": f}
        if plain:
            plain()
            calls["bare"] = MatrixProducts(plain).replay
        if lru := contestants.get((script, "lru", d_model, transitions)):
            calls["lru"] = lru[1]
        time = {"bare": math.nan, "lru": math.nan} | measure.interleaved(calls, seconds)
        head = (name, memory, d_model, measure.THREADS, transitions, rows)
        costs = (1e3 * time["update"], 1e6 * time["update"] / rows, 1e3 * time["bare"], time["update"] / time["bare"])
        found.append((*head, *costs, measure.peak_memory(f) / 1024 / rows, time["update"] / time["lru"]))
        print(*map(measure.show, found[-1]), flush=True)
    return found


def contestant(script, episodes, *sizes):
    inputs = off_policy(script, episodes, *sizes)
    f = partial(script.update, *inputs)
    return inputs[3][0].start.numel(), f, f


def compiled_contestant(episodes, *sizes):
    """As `--compile` does it."""
    inputs = off_policy(dqn_tbb, episodes, *sizes, compile=True)
    networks = [torch.compile(network, mode="reduce-overhead", dynamic=False) for network in inputs[:2]]
    f = partial(dqn_tbb.update, *networks, *inputs[2:])
    return inputs[3][0].start.numel(), f, partial(dqn_tbb.update, *inputs)


def at_default_sizes(episodes):
    contestants = {}
    for memory in STACKS:
        for script, own in {dqn_tbb: episodes, dqn_sbb: episodes, sac_tbb: play(sac_tbb, 8)}.items():
            sizes = memory, dqn_tbb.Args().d_model, dqn_tbb.Args().batch_size
            contestants[f"{script.__name__}.py", *sizes] = contestant(script, own, *sizes)
    sizes = "lru", *sizes[1:]
    contestants["dqn_tbb.py --compile", *sizes] = compiled_contestant(episodes, *sizes)
    args = ppo_tbb.Args()
    iteration = play(ppo_tbb, args.num_envs)
    for memory in STACKS:
        inputs = ppo(iteration, memory)
        rows = inputs[2][0]
        f = partial(ppo_tbb.update, *inputs)
        contestants["ppo_tbb.py", memory, args.d_model, len(ppo_tbb.transitions(rows))] = rows.start.numel(), f, f
    return table(contestants, seconds=1.0)


def on_longer_tapes(episodes):
    contestants = {}
    for memory in ("lru", "gru"):
        for transitions in TAPES:
            sizes = memory, dqn_tbb.Args().d_model, transitions
            contestants["dqn_tbb.py", *sizes] = contestant(dqn_tbb, episodes, *sizes)
    return table(contestants, seconds=1.0)


def jax_contestant(q_network, batch, args):
    """The authors' update of the same network, weights and transitions."""
    import jax
    import jax.numpy as jnp

    import authors

    rows, t = batch
    features = []
    hook = q_network.encoder.register_forward_pre_hook(lambda _, inputs: features.append(inputs[0][:, 0]))
    with torch.no_grad():
        q, _ = q_network(rows.obs, rows.action.roll(1, 0), rows.start, q_network.memory.initial_state(1))
    hook.remove()
    tape = {
        "observation": features[0][t],
        "next_observation": features[0][t + 1],
        "action": rows.action[t, 0].int(),
        "reward": rows.reward[t, 0],
        "terminated": rows.terminated[t, 0],
        "start": rows.start[t, 0],
    }
    tape = {name: jnp.asarray(x.numpy()) for name, x in tape.items()}
    p = {name: jnp.array(x.detach().numpy()) for name, x in q_network.state_dict().items()}  # a copy: ours goes on
    theirs, q = jax.jit(authors.q_values)(p, tape["observation"], tape["start"]), q[t, 0].numpy()
    assert np.abs(theirs - q).max() < 1e-4 * np.abs(q).max(), "the two networks differ"

    zeros = jax.tree.map(jnp.zeros_like, p)
    inputs = (p, p, (zeros, zeros, 0), tape, args.gamma, args.tau, args.learning_rate, args.max_grad_norm)
    update = authors.update.lower(*inputs).compile()
    f = lambda: jax.block_until_ready(update(*inputs))
    plan = update.memory_analysis()
    f.bytes = plan.temp_size_in_bytes + plan.output_size_in_bytes
    return len(t), f, None


def beside_the_authors(episodes):
    contestants = {}
    for transitions in (1_000, 4_000):
        sizes = "lru", 256, transitions
        q_network, *rest, batch, args = inputs = off_policy(dqn_tbb, episodes, *sizes)
        contestants["authors' JAX", *sizes] = jax_contestant(q_network, batch, args)
        contestants["dqn_tbb.py", *sizes] = batch[0].start.numel(), *2 * (partial(dqn_tbb.update, *inputs),)
    return table(contestants, seconds=1.0)


def in_a_process(threads):
    environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
    command = [sys.executable, __file__, "--only-authors"]
    lines = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True).stdout
    return json.loads(lines.splitlines()[-1])


if __name__ == "__main__":
    torch.manual_seed(0)
    if "--only-authors" in sys.argv:  # used by the benchmark itself
        measure.pin()
        print(json.dumps(beside_the_authors(play(dqn_tbb, EPISODES))))
        sys.exit()
    episodes = play(dqn_tbb, EPISODES)
    notes = []
    rows = at_default_sizes(episodes) + on_longer_tapes(episodes)
    if measure.DEVICE.type == "cuda" or not importlib.util.find_spec("jax"):
        notes.append("the authors' update: left out, it takes a CPU and jax (benchmarks/requirements.txt)")
    else:
        rows += [row for threads in (1, 2) for row in in_a_process(threads)]
    print()
    measure.report(__file__, HEADER, rows, notes)
