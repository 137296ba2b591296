"""h_t = decay_t h_{t-1} + x_t: `linear_recurrence` beside what people would use instead. Time and peak memory.

    pip install -r benchmarks/requirements.txt && python benchmarks/scan.py

Two rows are ours: of a full decay (T, C), which is what all the others do too, and of a constant decay (C,) and a flag
that starts an episode every 50 rows or so, as the memories use it. "copy" is the limit: a copy of as many bytes as have
to be moved (forward decay and x are read and h is written; backward the gradient, decay and h are read and two
gradients written), into memory that is there already. Forward + backward: the gradients of decay and of x. What every
contestant computes is checked against ours before it is timed. Peak memory holds the results, but not the inputs.

Inputs have the layout that an implementation expects; accelerated-scan's are (1, C, T). JAX runs on the CPU only, on as
many cores as PyTorch has threads, compiled. Most of the time that this takes is torch.compile's. Writes
benchmarks/scan.csv.
"""

import importlib.util
import math
import time

import torch
from torch._higher_order_ops import associative_scan

import measure
from monoids import Affine, linear_recurrence, scan

SIZES = [
    (1_000, 128, torch.complex64),
    (4_000, 128, torch.complex64),
    (100_000, 64, torch.float32),
    (1_000_000, 1, torch.float32),
    (8_192, 4_096, torch.float32),
]
affine = Affine().op


def loop(decay, x):
    h, out = torch.zeros_like(x[0]), []
    for a, b in zip(decay.unbind(), x.unbind()):
        h = a * h + b
        out.append(h)
    return torch.stack(out)


def generic(decay, x):
    return associative_scan(affine, (decay, x), 0, combine_mode="generic")[1]


def pointwise(decay, x):
    return associative_scan(affine, (decay, x), 0, combine_mode="pointwise")[1]


def torch_contestant(f, decay, x, grad):
    """(forward, forward + backward)"""

    def forward():
        with torch.no_grad():
            return f(decay, x)

    return forward, lambda: torch.autograd.grad(f(decay, x), (decay, x), grad)


def jax_contestants(decay, x, grad):
    import jax

    def tree(decay, x):
        return jax.lax.associative_scan(affine, (decay, x))[1]

    def fused(decay, x):
        step = lambda h, row: (row[0] * h + row[1],) * 2
        return jax.lax.scan(step, jax.numpy.zeros_like(x[0]), (decay, x))[1]

    def compiled(f, *inputs):
        f = jax.jit(f).lower(*inputs).compile()
        call = lambda: jax.block_until_ready(f(*inputs))
        plan = f.memory_analysis()
        call.bytes = plan.temp_size_in_bytes + plan.output_size_in_bytes
        return call

    def contestant(f):
        # the transpose of a complex map is not its adjoint: JAX leaves the conjugation to its user
        both = lambda d, x, g: [y.conj() for y in jax.vjp(f, d, x)[1](g.conj())]
        return compiled(f, *arrays[:2]), compiled(both, *arrays)

    arrays = [jax.numpy.asarray(y.detach().numpy()) for y in (decay, x, grad)]
    return {"jax.lax.associative_scan": contestant(tree), "jax.lax.scan": contestant(fused)}


def accelerated_contestant(decay, x, grad):
    if x.is_complex():
        from accelerated_scan.complex import scan as f
    else:
        from accelerated_scan.scalar import scan as f
    inputs = (y.detach().T[None].contiguous() for y in (decay, x, grad))
    decay, x, grad = (y.requires_grad_() for y in inputs)
    return torch_contestant(f, decay, x, grad.detach())


def copy(elements, like):
    source = torch.ones(elements, dtype=like.dtype, device=like.device)
    target = torch.zeros_like(source)
    return lambda: target.copy_(source)


def contestants(T, C, dtype, notes):
    """{name: (forward, forward + backward)}"""
    generator = torch.Generator().manual_seed(0)
    uniform = lambda *shape: torch.rand(shape, generator=generator)
    normal = lambda *shape: torch.randn(shape, generator=generator, dtype=dtype).to(measure.DEVICE)

    def ring(*shape):  # 0.9 <= |decay| <= 0.999, as an LRU starts
        size, angle = 0.9 + 0.099 * uniform(*shape), 2 * math.pi * uniform(*shape)
        return (torch.polar(size, angle) if dtype.is_complex else size).to(measure.DEVICE).requires_grad_()

    decay, constant, x, grad = ring(T, C), ring(C), normal(T, C).requires_grad_(), normal(T, C)
    start = (uniform(T) < 1 / 50).to(measure.DEVICE)
    inputs = decay, x, grad
    resets = lambda decay, x: linear_recurrence(decay, x, start=start)
    found = {
        "ours": torch_contestant(linear_recurrence, *inputs),
        "ours, constant decay, resets": torch_contestant(resets, constant, x, grad),
        "ours, general scan(Affine())": torch_contestant(lambda *ax: scan(Affine(), ax)[1], *inputs),
    }
    if T <= (10_000 if measure.DEVICE.type == "cuda" else 100_000):
        found["Python loop"] = torch_contestant(loop, *inputs)
    else:
        notes.append(f"Python loop, {T:,} rows: left out, forward + backward would take 10 s or more")
    found["torch associative_scan"] = torch_contestant(generic, *inputs)
    if measure.DEVICE.type == "cpu" or T <= 10_000:
        mode = pointwise if measure.DEVICE.type == "cuda" else generic
        found["torch associative_scan, compiled"] = torch_contestant(torch.compile(mode), *inputs)
    else:
        notes.append(f"torch associative_scan, compiled, {T:,} rows: left out, compiling takes more than a minute")
    if measure.DEVICE.type == "cuda":
        if importlib.util.find_spec("accelerated_scan"):
            found["accelerated-scan"] = accelerated_contestant(*inputs)
    elif importlib.util.find_spec("jax"):
        found |= jax_contestants(*inputs)
    found["copy"] = copy(3 * T * C // 2, x), copy(8 * T * C // 2, x)
    return found


def wrong(name, result, expected):
    """Whether a contestant computes something else than we do."""
    tensors = [torch.as_tensor(y) for y in result]
    if name == "accelerated-scan":
        tensors = [y[0].T for y in tensors]
    return any((a - b).abs().max() > 1e-4 * b.abs().max() for a, b in zip(tensors, expected, strict=True))


if __name__ == "__main__":
    if measure.DEVICE.type == "cpu":
        measure.pin()
    rows, notes = [], []
    for package, device in (("jax", "cpu"), ("accelerated_scan", "cuda")):
        if not importlib.util.find_spec(package) and measure.DEVICE.type == device:
            notes.append(f"{package}: not installed, left out (benchmarks/requirements.txt)")
    for T, C, dtype in SIZES:
        torch.compiler.reset()  # or it would stop compiling after eight shapes
        size = f"{T:,} x {C:,}{' complex' if dtype.is_complex else ''}"
        found = contestants(T, C, dtype, notes)
        expected = [f() for f in found["ours"]]
        for name, (forward, both) in list(found.items()):
            begin = time.time()
            try:
                h, gradients = forward(), both()
            except Exception as error:
                notes.append(f"{name}, {size}: fails, {type(error).__name__}: {str(error).strip().splitlines()[0]}")
                del found[name]
                continue
            if "compiled" in name:
                notes.append(f"{name}, {size}: compiling both took {time.time() - begin:.0f} s (from a cache if short)")
            if name not in ("copy", "ours, constant decay, resets"):
                assert not wrong(name, [h, *gradients], [expected[0], *expected[1]]), (name, size)
        del expected, h, gradients
        seconds = [measure.interleaved({name: f[i] for name, f in found.items()}, seconds=1.0) for i in range(2)]
        for name, f in found.items():
            ms = [1000 * s[name] for s in seconds]
            ratios = [s[name] / s[other] for other in ("ours", "copy") for s in seconds]
            memory = [math.nan if name == "copy" else measure.peak_memory(g) / 2**20 for g in f]
            rows.append((size, name, *ms, *ratios, *memory))
            print(size, *map(measure.show, rows[-1][1:]), flush=True)
    header = "T x C,contestant,ms,f+b ms,x ours,f+b x ours,x copy,f+b x copy,peak MiB,f+b MiB".split(",")
    print()
    measure.report(__file__, header, rows, notes)
