"""Discounted returns and advantages of many episodes: one scan over a tape, beside the loops that people write.

    pip install -r benchmarks/requirements.txt && python benchmarks/returns.py

The table of the paper's section on returns: 10 to 10,000 episodes, their lengths uniform on 1 to 10, 100 and 1,000
steps. Discounted returns:

    ours                   `discounted_return` over the tape
    episode by episode     a loop over episodes, as the paper's baseline (jitted JAX); each is vectorised (NumPy)
    row by row             a loop over all rows, backwards, in Python numbers
    reversed loop, (T, N)  as in CleanRL's ppo.py, over time, vectorised over episodes, zero-padded to the longest

and generalised advantage estimates:

    ours                   `gae` over the tape
    reversed loop, (T, N)  as above
    TorchRL, tape          `vec_generalized_advantage_estimate` on a tape, (1, rows, 1)
    TorchRL, (N, T)        the same on padded episodes, (N, T, 1)

With a scalar gamma and lambda TorchRL's function does not scan: whatever it is given, it cuts it wherever it is done,
zero-pads the pieces to the longest and convolves them with the powers of gamma lambda above 1e-7, 262 of them here
(`_fast_vec_gae`). So a tape works, and costs what padded episodes cost, and the padding; on padded ones the padding is
pieces too. Padding is done beforehand for those that want it and not timed. Results are checked against ours. Writes
benchmarks/returns.csv.
"""

import importlib.util

import numpy as np
import torch

import measure
from monoids import discounted_return, gae

GAMMA, LAMBDA = 0.99, 0.95


def episode_by_episode(rewards):
    out = []
    for reward in rewards:
        powers = GAMMA ** np.arange(len(reward))
        out.append(np.cumsum((powers * reward)[::-1])[::-1] / powers)
    return np.concatenate(out)


def row_by_row(reward, done):
    out, total = [], 0.0
    for r, d in zip(reversed(reward), reversed(done)):
        total = r + GAMMA * total * (not d)
        out.append(total)
    return out[::-1]


def reversed_loop(reward, done):
    going, total, out = 1.0 - done.float(), torch.zeros_like(reward[0]), torch.empty_like(reward)
    for t in reversed(range(len(reward))):
        out[t] = total = reward[t] + GAMMA * going[t] * total
    return out


def reversed_loop_gae(value, next_value, reward, done):
    going, total, out = 1.0 - done.float(), torch.zeros_like(reward[0]), torch.empty_like(reward)
    for t in reversed(range(len(reward))):
        delta = reward[t] + GAMMA * going[t] * next_value[t] - value[t]
        out[t] = total = delta + GAMMA * LAMBDA * going[t] * total
    return out


def compare(episodes, longest):
    """One size: a table row for each contestant."""
    rng = np.random.default_rng(0)
    lengths = rng.integers(1, longest + 1, episodes)
    real = np.arange(longest)[:, None] < lengths  # (longest, episodes)
    at = np.stack((real.T.nonzero()[1], real.T.nonzero()[0]))  # where the tape's rows are when padded
    columns = rng.standard_normal((3, lengths.sum()), dtype=np.float32)
    ends = np.zeros(lengths.sum(), dtype=bool)
    ends[lengths.cumsum() - 1] = True

    def pad(x):
        padded = np.zeros(real.shape, dtype=x.dtype)
        padded[*at] = x
        return torch.as_tensor(padded, device=measure.DEVICE)

    tape = [torch.as_tensor(x, device=measure.DEVICE) for x in (*columns, ends)]  # value, next_value, reward, done
    padded = [pad(x) for x in (*columns, ends)]
    reward, done = columns[2], ends
    pieces, numbers = np.split(reward, lengths.cumsum()[:-1]), (reward.tolist(), done.tolist())
    unpad = lambda x: x[torch.as_tensor(at[0]), torch.as_tensor(at[1])]
    returns = {
        "ours": lambda: discounted_return(GAMMA, *tape[2:]),
        "episode by episode": lambda: episode_by_episode(pieces),
        "row by row": lambda: row_by_row(*numbers),
        "reversed loop, (T, N)": lambda: reversed_loop(*padded[2:]),
    }
    advantages = {
        "ours": lambda: gae(GAMMA, LAMBDA, *tape),
        "reversed loop, (T, N)": lambda: reversed_loop_gae(*padded),
    }
    if importlib.util.find_spec("torchrl"):
        from torchrl.objectives.value.functional import vec_generalized_advantage_estimate as torchrl

        theirs, theirs_padded = [x[None, :, None] for x in tape], [x.T[..., None].contiguous() for x in padded]
        advantages["TorchRL, tape"] = lambda: torchrl(GAMMA, LAMBDA, *theirs)[0][0, :, 0]
        advantages["TorchRL, (N, T)"] = lambda: torchrl(GAMMA, LAMBDA, *theirs_padded)[0][..., 0].T
    rows = []
    for what, contestants in (("returns", returns), ("GAE", advantages)):
        expected = contestants["ours"]().cpu()
        for name, f in contestants.items():
            result = unpad(f().cpu()) if name.endswith("T)") or name.endswith("N)") else torch.as_tensor(f()).cpu()
            assert (result - expected).abs().max() < 1e-3, (what, name, episodes, longest)
        seconds = measure.interleaved(contestants, seconds=0.4)
        for name, s in seconds.items():
            ratio = s / seconds["ours"]
            rows.append((what, episodes, longest, int(lengths.sum()), name, 1000 * s, 1e9 * s / lengths.sum(), ratio))
    return rows


if __name__ == "__main__":
    rows = [
        row for longest in (10, 100, 1000) for episodes in (10, 100, 1000, 10_000) for row in compare(episodes, longest)
    ]
    rows.sort(key=lambda row: row[0] == "GAE")
    missing = not importlib.util.find_spec("torchrl")
    notes = ["torchrl: not installed, left out (benchmarks/requirements.txt)"] if missing else []
    header = "what,episodes,up to,rows,contestant,ms,ns a row,x ours".split(",")
    measure.report(__file__, header, rows, notes)
