"""monoids.py: each fast path against a slow and obvious one, in values and in gradients.

Shapes: T rows, B parallel sequences, D features. Everything is in float64 or complex128 unless a test says otherwise.
test_triton.py uses the helpers too.
"""

import copy
import functools
import importlib.util
import math
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close
from torch.utils._pytree import tree_leaves

import monoids
from monoids import CELLS, MEMORIES, Affine, Memory, Monoid
from monoids import discounted_return, gae, linear_recurrence, make_memory, resettable, scan, tree_map

# scan halves, linear_recurrence cuts time into blocks of 8: powers of 2 and 8, and the lengths beside them
LENGTHS = [1, 2, 3, 7, 8, 9, 31, 32, 33, 63, 64, 65, 72, 73, 100, 512, 513]
SHORT = [1, 2, 3, 8, 9, 33, 65]
REAL, COMPLEX = torch.float64, torch.complex128


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


# ---------------------------------------------------------------------------------------------------------------------
# Helpers


def normal(*shape, mean=0.0, std=1.0, dtype=REAL, device=None):
    return (mean + std * torch.randn(shape, dtype=dtype, device=device)).requires_grad_()


def starts(*shape, p=0.3, device=None):
    return torch.rand(shape, device=device) < p


def leaves(tree):
    return [x for branch in tree for x in leaves(branch)] if isinstance(tree, (tuple, list)) else [tree]


def differentiable(tree):
    return [x for x in leaves(tree) if x.requires_grad]


def same(fast, slow, inputs, **tolerance):
    """Equal structure, shapes, dtypes and values; and equal gradients of one random projection."""
    assert_close(fast, slow, **tolerance)
    if inputs:
        projection = [torch.randn_like(y) for y in differentiable(slow)]
        keep = dict(retain_graph=True, materialize_grads=True)
        gradients = [torch.autograd.grad(differentiable(y), inputs, projection, **keep) for y in (fast, slow)]
        assert_close(*gradients, **tolerance)


def loop(decay, x, initial=None, reverse=False, start=None):
    """linear_recurrence as a loop over rows."""
    decay = decay.expand(x.shape)
    start = torch.zeros(len(x), dtype=torch.bool) if start is None else start
    start = start.reshape(start.shape + (1,) * (x.ndim - start.ndim)).to(x.device)
    h = torch.zeros_like(x[0]) if initial is None else initial
    out = [None] * len(x)
    for t in range(len(x))[:: -1 if reverse else 1]:
        h = out[t] = decay[t] * torch.where(start[t], 0, h) + x[t]
    return torch.stack(out)


def episodes(start):
    """(T,) -> the slices of rows that hold one episode each. Row 0 begins one even if its start is False."""
    cuts = [0, *(t for t in range(1, len(start)) if start[t]), len(start)]
    return [slice(*ends) for ends in zip(cuts, cuts[1:])]


def alone(run, elements, start):
    """`run` on each episode separately, results concatenated: elements (T, B, ...), start (T, B) -> (T, B, ...)."""
    columns = []
    for b in range(start.shape[1]):
        pieces = [run(tree_map(lambda x: x[rows, b : b + 1], elements)) for rows in episodes(start[:, b])]
        columns.append(tree_map(lambda *p: torch.cat(p), *pieces))
    return tree_map(lambda *c: torch.cat(c, 1), *columns)


# ---------------------------------------------------------------------------------------------------------------------
# Monoids and their scan


class MatrixProduct(Monoid):
    """Square matrices (..., n, n): does not commute."""

    def identity(self, like):
        return torch.eye(like.shape[-1], dtype=like.dtype, device=like.device).expand_as(like)

    def op(self, left, right):
        return left @ right


class Max(Monoid):
    def identity(self, like):
        return torch.full_like(like, -math.inf)

    def op(self, left, right):
        return torch.maximum(left, right)


class Latest(Monoid):
    """The last value present: (value, present), int64 and bool, value 0 where absent. Does not commute."""

    def identity(self, like):
        return tree_map(torch.zeros_like, like)

    def op(self, left, right):
        (value, there), (value2, there2) = left, right
        return torch.where(there2, value2, value), there | there2


class Pair(Monoid):
    """Two monoids side by side: a nested tuple, ((a, b), sum)."""

    def identity(self, like):
        return Affine().identity(like[0]), torch.zeros_like(like[1])

    def op(self, left, right):
        return Affine().op(left[0], right[0]), left[1] + right[1]


def affine(*lead, dtype=REAL):
    return normal(*lead, 3, mean=1, std=0.3, dtype=dtype), normal(*lead, 3, dtype=dtype)


def latest(*lead):
    there = starts(*lead, p=0.5)
    return torch.where(there, torch.randint(1, 100, lead), 0), there


MONOIDS = {  # name: (monoid, leading dimensions -> random elements)
    "affine": (Affine(), affine),
    "affine_complex": (Affine(), lambda *lead: affine(*lead, dtype=COMPLEX)),
    "matrix_product": (MatrixProduct(), lambda *lead: normal(*lead, 2, 2)),
    "max": (Max(), lambda *lead: normal(*lead, 3)),
    "latest": (Latest(), latest),
    "pair": (Pair(), lambda *lead: (affine(*lead), normal(*lead, 2, 2))),
}
each_monoid = pytest.mark.parametrize("name", MONOIDS)


def chain(monoid, elements, reverse=False):
    """scan as a loop over rows."""
    T = len(leaves(elements)[0])
    row = lambda t: tree_map(lambda x: x[t], elements)
    if reverse:
        out = [row(T - 1)]
        for t in range(T - 2, -1, -1):
            out.insert(0, monoid.op(out[0], row(t)))  # (x_{T-1} • ... • x_{t+1}) • x_t
    else:
        out = [row(0)]
        for t in range(1, T):
            out.append(monoid.op(out[-1], row(t)))  # (x_0 • ... • x_{t-1}) • x_t
    return tree_map(lambda *rows: torch.stack(rows), *out)


@each_monoid
@pytest.mark.parametrize("resets", [(), ((64,),), ((64, 2),), ((64, 2), (64,))], ids=str)
def test_monoid_laws(name, resets):
    monoid, make = MONOIDS[name]
    a, b, c = make(64, 2), make(64, 2), make(64, 2)
    for shape in resets:  # none, one or two start flags around the elements
        monoid = resettable(monoid)
        a, b, c = [(x, starts(*shape, p=0.5)) for x in (a, b, c)]
    assert_close(monoid.op(monoid.op(a, b), c), monoid.op(a, monoid.op(b, c)))
    assert_close(monoid.op(monoid.identity(a), a), a)
    assert_close(monoid.op(a, monoid.identity(a)), a)


@each_monoid
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("T", LENGTHS)
def test_scan_equals_a_loop(name, T, reverse):
    monoid, make = MONOIDS[name]
    elements = make(T, 2)
    same(scan(monoid, elements, reverse), chain(monoid, elements, reverse), differentiable(elements))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.complex64, torch.complex128])
@pytest.mark.parametrize("T", [1, 2, 33])
def test_scan_keeps_dtypes(T, dtype):
    elements = affine(T, dtype=dtype)
    same(scan(Affine(), elements), chain(Affine(), elements), elements, rtol=1e-4, atol=1e-4)


class Counting(Monoid):
    def __init__(self):
        self.calls = self.products = 0

    def op(self, left, right):
        self.calls += 1
        self.products += len(right)
        return left + right


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("T", [*LENGTHS, 4096, 5000])
def test_scan_has_linear_work_and_logarithmic_depth(T, reverse):
    monoid = Counting()
    assert_close(scan(monoid, torch.ones(T), reverse).sum(), torch.tensor(T * (T + 1) / 2))
    assert monoid.calls <= 2 * math.ceil(math.log2(T)) + 1  # a loop would need T - 1
    assert monoid.products < 2 * T  # recursive doubling would need T log2(T)


@pytest.mark.parametrize("reverse", [False, True])
def test_scan_of_no_rows_is_refused(reverse):
    with pytest.raises(ValueError, match="at least one row"):
        scan(Affine(), (torch.ones(0, 2), torch.ones(0, 2)), reverse)


@pytest.mark.parametrize("elements", [(torch.ones(1), torch.ones(5)), ((torch.ones(5), torch.ones(5)), torch.ones(2))])
def test_scan_of_different_lengths_is_refused(elements):
    with pytest.raises(ValueError, match="the same length"):
        scan(Affine(), elements)


@each_monoid
@pytest.mark.parametrize("batched", [False, True])
@pytest.mark.parametrize("T", LENGTHS)
def test_resettable_equals_separate_episodes(name, T, batched):
    monoid, make = MONOIDS[name]
    elements = make(T, 2)
    start = starts(T, 2) if batched else starts(T)  # (T, B) or (T,)
    fast, seen = scan(resettable(monoid), (elements, start))
    flags = start if batched else start[:, None].expand(T, 2)
    same(fast, alone(lambda x: chain(monoid, x), elements, flags), differentiable(elements))
    assert_close(seen, start.cummax(0).values)


@pytest.mark.parametrize("name", [name for name in MONOIDS if name != "latest"])
@pytest.mark.parametrize("listen", [0.0, 1.0])
def test_nan_does_not_cross_a_start_of_resettable(name, listen):
    """Rows 5 to 11 are one episode, of NaN. `listen` is the gradient that its outputs get: 0 * NaN is NaN as well."""
    monoid, make = MONOIDS[name]
    clean = make(16, 2)
    t = torch.arange(16)
    start, bad = (t == 5) | (t == 12), (t >= 5) & (t < 12)
    poison = lambda x: x.detach().index_fill(0, t[bad], math.nan).requires_grad_()
    listened = torch.where(bad, listen, 1.0).to(REAL)

    def run(elements):
        results = differentiable(scan(resettable(monoid), (elements, start))[0])
        loss = sum(torch.einsum("t,t...->", listened.to(y.dtype), y).real for y in results)
        return [y[~bad] for y in (*results, *torch.autograd.grad(loss, differentiable(elements)))]

    assert_close(run(tree_map(poison, clean)), run(clean))


# ---------------------------------------------------------------------------------------------------------------------
# linear_recurrence


def general(decay, x, initial=None, reverse=False, start=None):
    """linear_recurrence by the general path: `initial` is a row before the first."""
    decay = decay.expand(x.shape).to(torch.promote_types(decay.dtype, x.dtype))
    initial = torch.zeros_like(x[0]) if initial is None else initial.expand(x.shape[1:])
    start = torch.zeros(len(x), dtype=torch.bool) if start is None else start
    rows = lambda first, rest: torch.cat((rest, first[None]) if reverse else (first[None], rest))  # (T + 1, ...)
    decay, x, start = rows(torch.zeros_like(decay[0]), decay), rows(initial, x), rows(~start[0], start)
    h = scan(resettable(Affine()), ((decay, x), start), reverse)[0][1]
    return h[:-1] if reverse else h[1:]


def sized(letters, T):
    """ "T1D" -> (T, 1, D)"""
    return [{"T": T, "B": 3, "D": 2}.get(letter, 1) for letter in letters]


KINDS = {  # the dtypes of decay and of x
    "real": (REAL, REAL),
    "real_complex": (REAL, COMPLEX),
    "complex_real": (COMPLEX, REAL),
    "complex": (COMPLEX, COMPLEX),
}
each_kind = pytest.mark.parametrize("kind", KINDS)
each_decay = pytest.mark.parametrize("decay", ["", "D", "T1D", "TB1", "1BD", "TBD"])  # shapes; x is TBD
either_way = pytest.mark.parametrize("reverse", [False, True])


@each_kind
@either_way
@pytest.mark.parametrize("T", LENGTHS)
def test_recurrence_equals_a_loop(T, reverse, kind):
    decay, x = [normal(T, 3, 2, std=0.7, dtype=dtype) for dtype in KINDS[kind]]
    inputs = decay, x, normal(3, 2, dtype=x.dtype)
    same(linear_recurrence(*inputs, reverse), loop(*inputs, reverse), inputs)
    single = [y.to({REAL: torch.float32, COMPLEX: torch.complex64}[y.dtype]) for y in inputs]
    fast = linear_recurrence(*single, reverse)
    assert fast.dtype == torch.promote_types(single[0].dtype, single[1].dtype)
    same(fast.to(torch.promote_types(decay.dtype, x.dtype)), loop(*inputs, reverse), inputs, rtol=1e-3, atol=1e-3)


@each_kind
@each_decay
@either_way
@pytest.mark.parametrize("initial", [None, "", "D", "B1", "BD"])
@pytest.mark.parametrize("T", [1, 11])
def test_recurrence_broadcasts(T, initial, decay, reverse, kind):
    inputs = [normal(*sized(shape, T), dtype=dtype) for shape, dtype in zip((decay, "TBD"), KINDS[kind])]
    if initial is not None:
        inputs.append(normal(*sized(initial, T), dtype=inputs[1].dtype))
    same(linear_recurrence(*inputs, reverse=reverse), loop(*inputs, reverse=reverse), inputs)


@each_kind
@each_decay
@either_way
@pytest.mark.parametrize("T", [1, 2, 8, 9, 65])
def test_recurrence_resets_at_starts(T, decay, reverse, kind):
    inputs = [normal(*sized(shape, T), dtype=dtype) for shape, dtype in zip((decay, "TBD"), KINDS[kind])]
    inputs.append(normal(3, 2, dtype=inputs[1].dtype))
    for start in starts(T), starts(T, 3):
        fast = linear_recurrence(*inputs, reverse, start)
        same(fast, loop(*inputs, reverse, start), inputs)
        same(fast, general(*inputs, reverse, start), inputs)


@each_kind
@either_way
@pytest.mark.parametrize("start", [None, torch.arange(9)[:, None] % 4 == 2], ids=["episode", "resets"])
@pytest.mark.parametrize("decay", [(), (2,), (9, 1, 2)], ids=str)
def test_recurrence_second_derivatives(decay, start, reverse, kind):
    inputs = [normal(*shape, dtype=dtype) for shape, dtype in zip((decay, (9, 1, 2)), KINDS[kind])]
    inputs.append(normal(1, 2, dtype=inputs[1].dtype))
    recurrence = lambda *inputs: linear_recurrence(*inputs, reverse, start)
    assert torch.autograd.gradgradcheck(recurrence, inputs, fast_mode=True)


@either_way
@pytest.mark.parametrize("shape", [(), (2, 1, 3)], ids=str)
@pytest.mark.parametrize("T", SHORT)
def test_recurrence_of_any_shape_with_decays_of_zero_and_one(T, shape, reverse):
    decay = torch.randint(0, 2, (T, *shape)).to(REAL).requires_grad_()
    inputs = decay, normal(T, *shape), normal(*shape)
    start = starts(T, *shape)
    same(linear_recurrence(*inputs, reverse, start), loop(*inputs, reverse, start), inputs)


@either_way
@pytest.mark.parametrize("T", [1, 8, 9, 65])
def test_recurrence_of_views(T, reverse):
    """Lazy conjugates, transposed and expanded tensors. No input is written to."""
    base = normal(2, T, 3, dtype=COMPLEX), normal(2, T, 3, dtype=COMPLEX), normal(3, dtype=COMPLEX)
    before = [x.detach().clone() for x in base]
    decay, x, initial = base[0].conj().transpose(0, 1), base[1].conj().transpose(0, 1), base[2].conj().expand(2, 3)
    copies = [x.resolve_conj().contiguous() for x in (decay, x, initial)]
    same(linear_recurrence(decay, x, initial, reverse), loop(*copies, reverse), base)
    assert_close([x.detach() for x in base], before, rtol=0, atol=0)


@either_way
@pytest.mark.parametrize("dims", [(0, 1, 0, 1), (1, None, None, 2), (None, 0, 1, None)], ids=str)
def test_recurrence_under_vmap_and_grad(dims, reverse):
    """The functions of torch.func, over all inputs or some of them."""
    shapes = (9, 3, 2), (9, 3, 2), (3, 2), (9, 3)
    sizes = [shape if dim is None else shape[:dim] + (4,) + shape[dim:] for shape, dim in zip(shapes, dims)]
    inputs = *(normal(*size) for size in sizes[:3]), starts(*sizes[3])
    each = [[x if dim is None else x.select(dim, i) for x, dim in zip(inputs, dims)] for i in range(4)]
    run = lambda path: lambda *x: path(*x[:3], reverse, x[3])
    slow = torch.stack([run(loop)(*x) for x in each])
    same(torch.vmap(run(linear_recurrence), dims)(*inputs), slow, inputs[:3])
    with torch.no_grad():
        assert_close(torch.vmap(run(linear_recurrence), dims)(*inputs), slow)
    square = lambda path: lambda *x: run(path)(*x).square().sum()
    fast = torch.vmap(torch.func.grad(square(linear_recurrence), (0, 1, 2)), dims)(*inputs)
    assert_close(fast, tuple(map(torch.stack, zip(*(torch.autograd.grad(square(loop)(*x), x[:3]) for x in each)))))


@each_decay
@either_way
@pytest.mark.parametrize("T", [100, 5000])
def test_recurrence_saves_only_decay_and_output(T, reverse, decay):
    """O(T) memory: the scan, differentiated by autograd, would save every product of its tree."""
    decay, x, initial = normal(*sized(decay, T)), normal(T, 3, 2), normal(3, 2)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x.nbytes) or x, lambda x: x):
        linear_recurrence(decay, x, initial, reverse)
    assert 0 < sum(saved) <= decay.nbytes + x.nbytes + initial.nbytes


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("first", [False, True])
@each_kind
@either_way
@pytest.mark.parametrize("T", [9, 40, 100])
def test_nan_does_not_cross_a_start(T, reverse, kind, first, bad):
    """Of three episodes, the first or the last is damaged, and so are the decays at starts, which have no effect. The
    second stays clean, and after a damaged first one the last, gradients included.
    """
    t, inputs = torch.arange(T), [normal(T, 2, dtype=dtype) for dtype in KINDS[kind]]
    inputs.append(normal(2, dtype=inputs[1].dtype))
    start, first_row = (t == T // 3) | (t == T // 2), T - 1 if reverse else 0
    after_first = t <= T // 2 if reverse else t >= T // 3
    before_last = t > T // 3 if reverse else t < T // 2
    clean = after_first if first else after_first & before_last
    damaged = [x.detach().clone() for x in inputs]
    for x in damaged[:2]:
        x[first_row if first else T - 1 - first_row] = bad
    damaged[0][start] = bad
    damaged[2][:] = bad if first else 0
    results = []
    for tensors in inputs, [x.requires_grad_() for x in damaged]:
        h = linear_recurrence(*tensors, reverse, start)
        gradients = torch.autograd.grad(h[clean].abs().square().sum(), tensors[:2])
        results.append([x[clean] for x in (h, *gradients)])
    assert not h[first_row if first else T - 1 - first_row].isfinite().any()
    assert_close(*results)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@each_kind
@either_way
@pytest.mark.parametrize("T", [1, 9, 40])
def test_first_decay_affects_no_gradient_of_x(T, reverse, kind, bad):
    """Not even if it is not finite; without an initial state it affects nothing that is finite."""
    decay, x = (normal(T, 2, dtype=dtype) for dtype in KINDS[kind])
    damaged = decay.detach().clone()
    damaged[T - 1 if reverse else 0] = bad
    outputs = (linear_recurrence(a, x, reverse=reverse) for a in (decay, damaged))
    assert_close(*(torch.autograd.grad(h.real.sum(), x)[0] for h in outputs))


def test_starts_broadcast():
    inputs, start = affine(9, 2), starts(9, 1)
    h = [linear_recurrence(*inputs, start=x) for x in (start, start.expand(9, 2))]
    assert_close(*h)
    assert_close(*(torch.autograd.grad(y.sin().sum(), inputs) for y in h))


@either_way
def test_recurrence_promotes_to_the_dtype_of_initial(reverse):
    inputs = normal(2), normal(9, 3, 2), normal(3, 2, dtype=COMPLEX)
    same(linear_recurrence(*inputs, reverse), loop(*inputs, reverse), inputs)


def test_recurrence_refuses_shapes_that_do_not_fit():
    with pytest.raises(ValueError, match="at least one row"):
        linear_recurrence(torch.ones(2), torch.ones(0, 2))
    for decay, initial in [((4,), (3,)), ((4, 3), (3,)), ((3,), (4,)), ((5, 1, 3), (3,)), ((3,), (1, 3))]:
        with pytest.raises(RuntimeError):
            linear_recurrence(torch.ones(decay), torch.ones(5, 3), torch.ones(initial))
    for shape in (1,), (4,), (1, 3), (5, 2), (5, 3, 1):
        with pytest.raises(ValueError, match="does not fit"):
            linear_recurrence(torch.ones(3), torch.ones(5, 3), start=torch.zeros(shape))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64, torch.float32])
def test_starts_of_other_dtypes_are_read_as_bool(dtype):
    inputs, start = affine(33, 2), starts(33, 2)
    other = 2 * start.to(dtype)  # nonzero is True, not only one
    assert_close(linear_recurrence(*inputs, start=other), linear_recurrence(*inputs, start=start))
    (fast, seen), (slow, seen2) = (scan(resettable(Affine()), (inputs, flags)) for flags in (other, start))
    assert_close((fast, seen.bool()), (slow, seen2))
    assert_close(discounted_return(0.9, inputs[1], other), discounted_return(0.9, inputs[1], start))
    for name in MEMORIES:
        memory = memory_of(name)
        x, state = normal(33, 2, D), memory.initial_state(2)
        assert_close(memory(x, state, other), memory(x, state, start))


# ---------------------------------------------------------------------------------------------------------------------
# Returns and advantages


def slow_return(gamma, reward, done, next_value=None):
    next_value = torch.zeros_like(reward) if next_value is None else next_value
    G = [reward[-1] + gamma * next_value[-1]]
    for t in range(len(reward) - 2, -1, -1):
        G.insert(0, reward[t] + gamma * torch.where(done[t], next_value[t], G[0]))
    return torch.stack(G)


def slow_gae(gamma, lmbda, value, next_value, reward, done, terminated=None):
    terminated = done if terminated is None else terminated
    A = [torch.zeros_like(reward[0])]
    for t in range(len(reward) - 1, -1, -1):
        delta = reward[t] + gamma * (1 - terminated[t].to(REAL)) * next_value[t] - value[t]
        A.insert(0, delta + gamma * lmbda * (1 - done[t].to(REAL)) * A[0])
    return torch.stack(A[:-1])


each_tape = pytest.mark.parametrize("shape", [(T, *N) for T in SHORT for N in [(), (3,)]], ids=str)
each_end = pytest.mark.parametrize("last", [False, True])  # is the last row done, or does its episode go on?


def ends(shape, last):
    """done, and where of these rows an episode terminated: the others were truncated."""
    done = starts(*shape)
    done[-1] = last
    return done, done & starts(*shape, p=0.5)


@each_tape
@each_end
@pytest.mark.parametrize("bootstrap", [False, True])
def test_discounted_return_equals_a_loop(shape, last, bootstrap):
    done, _ = ends(shape, last)
    gamma = normal(*shape[1:], mean=0.9, std=0.01)  # one a sequence
    inputs = [gamma, normal(*shape)] + [normal(*shape)] * bootstrap
    run = lambda path: path(*inputs[:2], done, *inputs[2:])
    same(run(discounted_return), run(slow_return), inputs)
    if not bootstrap:
        general = scan(resettable(Affine()), ((gamma.expand(shape), inputs[1]), done), reverse=True)
        same(run(discounted_return), general[0][1], inputs)


@each_tape
@each_end
@pytest.mark.parametrize("truncates", [False, True])
def test_gae_equals_a_loop(shape, last, truncates):
    done, terminated = ends(shape, last)
    inputs = [normal(*shape) for _ in range(3)]  # value, next_value, reward
    flags = (done, terminated) if truncates else (done,)
    same(gae(0.9, 0.8, *inputs, *flags), slow_gae(0.9, 0.8, *inputs, *flags), inputs)


@each_tape
@each_end
def test_next_value_is_read_only_where_it_bootstraps(shape, last):
    done, terminated = ends(shape, last)
    value, next_value, reward = [normal(*shape) for _ in range(3)]
    bootstraps = done.index_fill(0, torch.tensor(len(done) - 1), True)
    for path, reads in [
        (lambda v: discounted_return(0.9, reward, done, v), bootstraps),
        (lambda v: gae(0.9, 0.8, value, v, reward, done, terminated), ~terminated),
    ]:
        holes = torch.where(reads, next_value, math.nan).detach().requires_grad_()
        assert_close(path(holes), path(next_value))
        gradient = lambda v: torch.autograd.grad(path(v).sum(), [v, reward])
        assert_close(gradient(holes), gradient(next_value))


def test_one_done_for_all_sequences():
    value, next_value, reward = normal(5, 5), normal(5, 5), normal(5, 5)  # square: a transposed done would fit
    done, terminated = ends((5,), False)
    wide = [x[:, None].expand(5, 5) for x in (done, terminated)]
    assert_close(discounted_return(0.9, reward, done), discounted_return(0.9, reward, wide[0]))
    assert_close(*(discounted_return(0.9, reward, x, next_value) for x in (done, wide[0])))
    assert_close(*(gae(0.9, 0.8, value, next_value, reward, *x) for x in ((done, terminated), wide)))


def test_shapes_that_differ_are_refused():
    """(T, 1) beside (T,) would broadcast to (T, T), (T, N) beside (T, 1) to (T, N)."""
    flat, wide, wider = torch.zeros(4), torch.zeros(4, 1), torch.zeros(4, 3)
    refused = functools.partial(pytest.raises, ValueError)
    with refused(match="shapes differ"):
        gae(0.9, 0.8, wide, wide, flat, flat)
    for reward, next_value in (flat, wide), (wide, flat):
        with refused(match="would enlarge"):
            discounted_return(0.9, reward, flat, next_value)
    with refused(match="would enlarge"):
        discounted_return(wide, flat, flat, flat)
    with refused(match="would enlarge"):
        gae(wide, 0.8, flat, flat, flat, flat)
    for x, done, terminated in (flat, wide, None), (flat, flat, wide), (flat, wide, flat), (wide, wider, None):
        with refused(match="does not fit"):
            gae(0.9, 0.8, x, x, x, done, terminated)
    for reward, done in (flat, wide), (wide, wider):
        for next_value in reward, None:
            with refused(match="does not fit"):
                discounted_return(0.9, reward, done, next_value)
    for next_value in torch.zeros(0), None:
        with refused(match="at least one row"):
            discounted_return(0.9, torch.zeros(0), torch.zeros(0), next_value)


def test_return_leaves_its_inputs():
    reward, done, next_value = torch.ones(3), torch.tensor([True, False, False]), torch.ones(3)
    discounted_return(0.5, reward, done, next_value)
    assert done.tolist() == [True, False, False] and (reward == 1).all() and (next_value == 1).all()


def test_discounted_return_by_hand():
    reward = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0])
    done = torch.tensor([False, True, False, False, False])
    next_value = torch.tensor([9.0, 0.0, 9.0, 9.0, 8.0])  # the first episode is over, the second will bring 8 more
    assert_close(discounted_return(0.5, reward, done, next_value), torch.tensor([2.0, 2.0, 7.25, 8.5, 9.0]))
    assert_close(discounted_return(0.5, reward, done), torch.tensor([2.0, 2.0, 6.25, 6.5, 5.0]))


def test_gae_by_hand():
    value = torch.tensor([1.0, 2.0, 3.0, 4.0])
    next_value = torch.tensor([2.0, 10.0, 4.0, 6.0])
    reward = torch.tensor([1.0, 1.0, 1.0, 2.0])
    done = torch.tensor([False, True, False, True])
    terminated = torch.tensor([False, True, False, False])  # the second episode was truncated
    # delta = 1 + 1 - 1, 1 - 2, 1 + 2 - 3, 2 + 3 - 4
    advantage = gae(0.5, 0.5, value, next_value, reward, done, terminated)
    assert_close(advantage, torch.tensor([0.75, -1.0, 0.25, 1.0]))
    advantage = gae(0.5, 0.5, value, next_value, reward, done)  # the last delta is then 2 - 4
    assert_close(advantage, torch.tensor([0.75, -1.0, -0.5, -2.0]))


# ---------------------------------------------------------------------------------------------------------------------
# Memory models

D = 4
SIZES = {  # small ones; a new memory is tested with its defaults
    "lru": dict(d_state=5),
    "s5": dict(d_state=4, blocks=2),
    "ffm": dict(num_traces=3, num_frequencies=2, horizon=16),
    "linear_transformer": dict(num_heads=2, d_key=4, d_value=3),
    "mingru": dict(d_state=5),
    "gru": dict(d_state=5),
}
NAMES = [*MEMORIES, "stack"]
LEARNED = [name for name in NAMES if name != "none"]
AFFINE = [name for name in LEARNED if name != "gru"]
each_memory = pytest.mark.parametrize("name", NAMES)


def memory_of(name, dtype=REAL):
    if name == "stack":
        return Memory(D, [CELLS[name](D, **SIZES[name]) for name in ("mingru", "lru")]).to(dtype)
    return MEMORIES[name](D, **SIZES.get(name, {})).to(dtype)


def used_state(memory, B):
    """A state after some rows: an episode that starts must discard it, one that goes on depends on it."""
    _, state = memory(torch.randn(5, B, D, dtype=REAL), memory.initial_state(B), starts(5, B))
    return tree_map(lambda h: h.detach().requires_grad_(), state)


def cut(memory, x, state, start, cuts):
    """The memory applied piece by piece, its state carried over."""
    y = []
    for a, b in zip([0, *cuts], [*cuts, len(x)]):
        piece, state = memory(x[a:b], state, start[a:b])
        y.append(piece)
    return torch.cat(y), state


def test_make_memory():
    """One name is two layers, several names are one layer each, "none" adds no layer; the random draws are the same."""

    def parameters(make, *args, **sizes):
        torch.manual_seed(0)
        return make(*args, **sizes).state_dict()

    kinds = lambda *names: [type(cell) for cell in make_memory(names, D).cells]
    for name, cell in CELLS.items():
        assert kinds(name) == [cell, cell] and kinds(name, "none") == [cell]
        two = lambda d: Memory(d, [cell(d), cell(d)])
        for make in MEMORIES[name], two:
            assert_close(parameters(make_memory, [name], D), parameters(make, D), rtol=0, atol=0)
        assert len(MEMORIES[name](D, num_layers=3, **SIZES[name]).cells) == 3
    assert kinds("none") == kinds("none", "none") == []
    for names, num_layers in [(["lru"], 0), (["lru", "mingru"], 2)]:
        with pytest.raises(ValueError, match="num_layers"):
            make_memory(names, D, num_layers=num_layers)
    for names in ["none"], ["lru", "none"]:
        with pytest.raises(ValueError, match="none has no sizes"):
            make_memory(names, D, horizon=5)
    assert kinds("lru", "mingru", "lru") == [monoids.LRUCell, monoids.MinGRUCell, monoids.LRUCell]
    with pytest.raises(KeyError):
        make_memory(["lru", "lsd"], D)


@pytest.mark.parametrize("name", LEARNED)
def test_state_or_start_of_another_size_is_refused(name):
    memory = memory_of(name)
    for B in 1, 4:
        with pytest.raises(ValueError, match=r"batch sizes .* must be \[2, 2\]"):
            memory(normal(5, 2, D), memory.initial_state(B), starts(5, 2))
    with pytest.raises(ValueError, match=r"\[2, 2\], not \[2\]"):
        memory(normal(5, 2, D), memory.initial_state(2)[1:], starts(5, 2))
    for shape in (5,), (5, 1), (1, 2), (6, 2):
        with pytest.raises(ValueError, match="start"):
            memory(normal(5, 2, D), memory.initial_state(2), starts(*shape))


@each_memory
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("B", [1, 3])
@pytest.mark.parametrize("T", [1, 2, 9])
def test_memory_shapes_and_dtypes(name, T, B, dtype):
    memory = memory_of(name, dtype)
    state = memory.initial_state(B)
    x = normal(T, B, D, dtype=dtype)
    y, after = memory(x, state, starts(T, B))
    assert y.shape == x.shape and y.dtype == dtype
    assert isinstance(state, tuple) and isinstance(after, tuple)
    for h, h_after in zip(state, after, strict=True):
        assert h.shape[0] == B and (h_after.shape, h_after.dtype) == (h.shape, h.dtype)
        assert h_after.untyped_storage().nbytes() == h_after.nbytes  # no view of all rows


@pytest.mark.parametrize("name", LEARNED)
def test_every_parameter_gets_a_gradient(name):
    memory = memory_of(name)
    y, _ = memory(normal(9, 3, D), memory.initial_state(3), starts(9, 3))
    for gradient in torch.autograd.grad((y * torch.randn_like(y)).sum(), [*memory.parameters()]):
        assert gradient.isfinite().all() and gradient.count_nonzero() > 0


@each_memory
@pytest.mark.parametrize("B", [1, 3])
@pytest.mark.parametrize("T", SHORT)
def test_tape_equals_separate_episodes(name, T, B):
    memory = memory_of(name)
    x, start = normal(T, B, D), starts(T, B)
    run = lambda x: memory(x, memory.initial_state(1), torch.zeros(len(x), 1, dtype=torch.bool))[0]
    y, _ = memory(x, memory.initial_state(B), start)
    same(y, alone(run, x, start), [x, *memory.parameters()])


@each_memory
def test_no_information_crosses_a_start(name):
    """Gradients are not small but zero, and outputs stay the same to the last bit."""
    T, B = 20, 2
    memory = memory_of(name)
    x, start, state = normal(T, B, D), starts(T, B), memory.initial_state(B)
    y, _ = memory(x, state, start)
    for b in range(B):
        for rows in episodes(start[:, b]):
            inside = torch.zeros(T, B, 1, dtype=torch.bool)
            inside[rows, b] = True
            (gradient,) = torch.autograd.grad(y[rows, b].square().sum(), x, retain_graph=True)
            assert (gradient[rows, b] != 0).any() and (gradient.masked_fill(inside, 0) == 0).all()
            y2, _ = memory(torch.where(inside, x, torch.randn_like(x)), state, start)
            assert torch.equal(y2[rows, b], y[rows, b])


@each_memory
@pytest.mark.parametrize("B", [1, 3])
@pytest.mark.parametrize("T", SHORT)
def test_recurrent_mode_equals_parallel_mode(name, T, B):
    memory = memory_of(name)
    x, start, state = normal(T, B, D), starts(T, B), used_state(memory, B)
    inputs = [x, *leaves(state), *memory.parameters()]
    same(memory(x, state, start), cut(memory, x, state, start, range(1, T)), inputs)


@each_memory
@pytest.mark.parametrize("T, p", [(2, 0.3), (9, 0.0), (17, 0.3)])
def test_state_carries_over_any_split(name, T, p):
    memory = memory_of(name)
    x, start, state = normal(T, 3, D), starts(T, 3, p=p), used_state(memory, 3)
    inputs = [x, *leaves(state), *memory.parameters()]
    whole = memory(x, state, start)
    for t in range(1, T):
        same(whole, cut(memory, x, state, start, [t]), inputs)


@each_memory
@pytest.mark.parametrize("T", SHORT)
def test_start_discards_the_previous_state(name, T):
    memory = memory_of(name)
    x, start = normal(T, 3, D), starts(T, 3)
    start[0] = True
    garbage = tree_map(lambda h: 100 * torch.randn_like(h), memory.initial_state(3))
    clean = memory(x, memory.initial_state(3), start)
    for garbage in garbage, tree_map(lambda h: h * math.nan, garbage):
        assert_close(memory(x, garbage, start), clean, rtol=0, atol=0)


def test_memory_is_a_stack_of_gated_residual_blocks():
    """x + GLU(W gelu(norm(cell(norm(x))))), layer by layer."""
    memory = memory_of("stack")
    for p in memory.norms.parameters():
        torch.nn.init.normal_(p)  # they begin equal
    x, start, state = normal(9, 2, D), starts(9, 2), used_state(memory, 2)
    y, before, after = x, memory.norms[::2], memory.norms[1::2]
    for cell, norm, norm2, gate, h in zip(memory.cells, before, after, memory.gates, state):
        a, b = gate(F.gelu(norm2(cell(norm(y), h, start)[0]))).chunk(2, -1)
        y = y + a * torch.sigmoid(b)
    same(memory(x, state, start)[0], y, [x, *memory.parameters()])


@each_memory
@pytest.mark.parametrize("bad", [0, 5])
def test_nan_in_x_does_not_cross_a_start(name, bad):
    """A row is NaN. Its episode ends with row 29, there is none in the next, forward or back, nor where a GRU pads."""
    memory = memory_of(name)
    x, start = normal(50, 2, D), torch.arange(50)[:, None].expand(50, 2) == 30

    def run(x):
        y, _ = memory(x, memory.initial_state(2), start)
        return y, torch.autograd.grad(y[30:].square().sum(), x)[0]

    y, gradient = run(x.detach().index_fill(0, torch.tensor(bad), math.nan).requires_grad_())
    clean, clean_gradient = run(x)
    assert y[bad].isnan().all() and (name == "none" or y[bad:30].isnan().all())
    assert_close((y[:bad], y[30:], gradient[30:]), (clean[:bad], clean[30:], clean_gradient[30:]))


@pytest.mark.parametrize("name", CELLS)
@pytest.mark.parametrize("p", [0.0, 0.01])
def test_float32_gradients_over_a_long_tape(name, p):
    T = 2_000 if name == "gru" else 100_000  # a GRU is a loop over the longest episode
    memory = memory_of(name, torch.float32)
    x, start = normal(T, 1, D, dtype=torch.float32), starts(T, 1, p=p)

    def run(memory, x):
        y, _ = memory(x, memory.initial_state(1), start)
        (gradient,) = torch.autograd.grad(y.square().mean() * T, x)
        return y.double(), gradient.double()

    y, gradient = run(memory, x)
    y2, gradient2 = run(copy.deepcopy(memory).double(), x.detach().double().requires_grad_())
    assert_close(y, y2, rtol=0, atol=3e-4)
    assert (gradient - gradient2).norm() < 1e-4 * gradient2.norm()  # LayerNorm magnifies a row of nearly equal features


@pytest.mark.parametrize("name", CELLS)
@pytest.mark.parametrize("rows, p", [(1_000_000, 0.0), (200_000, 0.001)], ids=["one_episode", "resets"])
@torch.no_grad()
def test_float32_error_does_not_grow_over_a_million_rows(name, rows, p):
    """In 13 pieces, the state carried over: the last rows are no worse than the first."""
    memory = memory_of(name, torch.float32)
    rows = rows // 50 if name == "gru" else rows  # a GRU is a loop over the longest episode
    x, start = torch.randn(rows, 1, D), starts(rows, 1, p=p)
    cuts = range(rows // 13, rows, rows // 13)
    single, _ = cut(memory, x, memory.initial_state(1), start, cuts)
    memory.double()
    error = single - cut(memory, x.double(), memory.initial_state(1), start, cuts)[0]
    assert error.abs().max() < 1e-3  # LayerNorm magnifies a row of nearly equal features
    assert error.square().mean().sqrt() < 1e-5
    assert error[-rows // 10 :].square().mean().sqrt() < 1e-5


@pytest.mark.parametrize("name", AFFINE)
@pytest.mark.parametrize("T", SHORT)
def test_fast_path_equals_general_path(name, T, monkeypatch):
    memory = memory_of(name)
    x, start, state = normal(T, 3, D), starts(T, 3), used_state(memory, 3)
    fast = memory(x, state, start)
    monkeypatch.setattr(monoids, "linear_recurrence", general)
    same(fast, memory(x, state, start), [x, *leaves(state), *memory.parameters()])


@pytest.mark.parametrize("name", [name for name in CELLS if name != "gru"])
def test_memory_compiles_without_graph_breaks(name):
    memory = memory_of(name)
    x, start, state = normal(20, 3, D), starts(20, 3), used_state(memory, 3)
    compiled = torch.compile(memory, backend="aot_eager", fullgraph=True, dynamic=False)
    inputs = [x, *leaves(state), *memory.parameters()]
    same(compiled(x, state, start), memory(x, state, start), inputs)
    begin = lambda x: memory(x, memory.initial_state(3), start)
    same(torch.compile(begin, backend="aot_eager", fullgraph=True)(x), begin(x), inputs[:1])


@pytest.mark.parametrize("name", AFFINE)
def test_ensemble_under_vmap(name):
    """torch.func over the parameters of several memories: outputs and gradients of each."""
    memories = [memory_of(name) for _ in range(3)]
    x, start, state = normal(20, 2, D), starts(20, 2), memories[0].initial_state(2)
    stacked = torch.func.stack_module_state(memories)
    loss = lambda *state_dict: torch.func.functional_call(memories[0], state_dict, (x, state, start))[0].square().sum()
    gradients, losses = torch.vmap(torch.func.grad_and_value(loss))(*stacked)
    for i, memory in enumerate(memories):
        y, _ = memory(x, state, start)
        assert_close(losses[i], y.square().sum())
        slow = torch.autograd.grad(y.square().sum(), [*memory.parameters()])
        assert_close([gradients[name][i] for name, _ in memory.named_parameters()], [*slow])


def test_half_precision():
    """Real memories run in bfloat16, complex ones raise an error that names the dtype."""
    x, start = torch.randn(9, 2, D, dtype=torch.bfloat16), starts(9, 2)
    for name in NAMES:
        memory = memory_of(name, torch.bfloat16)
        if name in ("mingru", "gru", "none"):
            y, _ = memory(x, memory.initial_state(2), start)
            assert_close(y.double(), memory.double()(x.double(), memory.initial_state(2), start)[0], rtol=0.1, atol=0.1)
        else:
            with pytest.raises(RuntimeError, match="(?i)bfloat16"):
                memory(x, memory.initial_state(2), start)


@pytest.mark.parametrize("name", MEMORIES)
def test_memory_under_autocast_and_in_the_default_dtype(name):
    """The slowest decays of minGRU are 0.999, which bfloat16 rounds to 1."""
    memory, x, start = memory_of(name, torch.float32), torch.randn(3000, 1, D), torch.zeros(3000, 1, dtype=torch.bool)
    inputs = x, memory.initial_state(1), start
    y, state = memory(*inputs)
    with torch.autocast("cpu", torch.bfloat16):
        y16, state16 = memory(*inputs)
    assert_close(y16.float(), y, rtol=0.1, atol=0.1)
    for a, b in zip(tree_leaves(state16), tree_leaves(state)):
        assert (a - b).abs().sum() < 0.02 * b.abs().sum()
    torch.set_default_dtype(torch.float64)
    try:
        memory = memory_of(name, torch.float64)
        assert memory(x.double(), memory.initial_state(1), start)[0].dtype == torch.float64
    finally:
        torch.set_default_dtype(torch.float32)


class CudaAutocast(torch.overrides.TorchFunctionMode):
    """What autocast does on a GPU, whose list of operators that take float32 is shorter than a CPU's."""

    to_half, to_float = (F.linear, torch.matmul, torch.Tensor.matmul), (torch.addcmul, F.layer_norm)

    def __torch_function__(self, f, types, args=(), kwargs=None):
        dtype = torch.bfloat16 if f in self.to_half else torch.float32 if f in self.to_float else None
        if dtype and "out" not in (kwargs or {}):
            args = [x.to(dtype) if torch.is_tensor(x) and x.is_floating_point() else x for x in args]
        return f(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", ["lru", "s5", "ffm", "linear_transformer", "mingru"])
def test_memory_under_autocast_on_a_gpu(name):
    memory, x, start = memory_of(name, torch.float32), torch.randn(300, 2, D), starts(300, 2)
    y, _ = memory(x, memory.initial_state(2), start)
    with CudaAutocast():
        y16, _ = memory(x, memory.initial_state(2), start)
        y16.float().square().sum().backward()
    assert_close(y16.float(), y, rtol=0.1, atol=0.1)
    assert all(p.grad.isfinite().all() for p in memory.parameters())


def test_what_the_backward_pass_needs_is_saved():
    """h, for the gradient of the decay only."""
    sizes, x = [], torch.randn(100, 7, requires_grad=True)
    for decay in (torch.rand(7), torch.rand(7, requires_grad=True)):
        saved = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x.numel()) or x, lambda x: x):
            linear_recurrence(decay, x)
        sizes.append(sum(saved))
    assert sizes[0] < 100 and 700 <= sizes[1] < 800


def test_memory_copied_into_a_project():
    """pickle, torch.export with fixed shapes; and what does not work raises an error that names it."""
    memory, gru = memory_of("lru", torch.float32), memory_of("gru", torch.float32)
    x, start = torch.randn(9, 2, D), starts(9, 2)
    inputs = x, memory.initial_state(2), start
    y, _ = memory(*inputs)
    assert_close(pickle.loads(pickle.dumps(memory))(*inputs)[0], y)
    assert_close(torch.export.export(memory, inputs).module()(*inputs)[0], y)
    spec = importlib.util.spec_from_file_location("package.monoids", monoids.__file__)
    spec.loader.exec_module(importlib.util.module_from_spec(spec))  # a second copy, whose operator has its own name
    assert torch.ops.package_monoids.recur and torch.ops.monoids.recur
    with pytest.raises(NotImplementedError, match="jvp"):
        torch.func.jvp(lambda x: memory(x, *inputs[1:])[0], (x,), (x,))
    with pytest.raises(Exception, match="You marked T as dynamic"):
        T = torch.export.Dim("T")
        torch.export.export(memory, inputs, dynamic_shapes=({0: T}, ({}, {}), {0: T}))
    with pytest.raises(RuntimeError, match="gru"):
        stacked = torch.func.stack_module_state([gru, gru])
        call = lambda *state_dict: torch.func.functional_call(gru, state_dict, (x, gru.initial_state(2), start))
        torch.vmap(call)(*stacked)


# ---------------------------------------------------------------------------------------------------------------------
# Each cell against the equations it comes from, and its initialisation


def run(cell, x):
    """The outputs of a cell over one episode in each sequence."""
    return cell(x, cell.initial_state(x.shape[1]), torch.zeros(x.shape[:2], dtype=torch.bool))[0]


def test_lru_equations():
    cell = monoids.LRUCell(D, d_state=5).to(REAL)
    torch.nn.init.normal_(cell.D)  # it begins at 0
    x = normal(20, 3, D)
    lambda_ = torch.exp(-torch.exp(cell.nu_log) + 1j * cell.theta)  # (N,)
    B, C = torch.complex(*cell.B.unbind(1)), torch.view_as_complex(cell.C).conj()  # (N, D), (D, N)
    b = torch.exp(cell.gamma_log) * (x.to(COMPLEX) @ B.T)  # (T, B, N)
    h = loop(lambda_, b)
    same(run(cell, x), (h @ C.T).real + cell.D * x, [x, *cell.parameters()])


@pytest.mark.parametrize("least, horizon", [(1, 10), (1, 1000), (1000, 100_000)])
def test_lru_initial_horizons_are_log_uniform(least, horizon):
    """A state decays to 1/e in min_horizon to horizon rows: -1 / log |lambda|. The phases are uniform."""
    n = 20_000
    cell = monoids.LRUCell(D, d_state=n, horizon=horizon, min_horizon=least).to(REAL)
    decay, _ = cell.lift(torch.zeros(1, 1, D, dtype=REAL))
    rows = -1 / decay.abs().log()
    expected = torch.linspace(0, 1, n, dtype=REAL)
    assert_close(((rows / least).log() / math.log(horizon / least)).sort().values, expected, rtol=0, atol=0.02)
    assert_close((decay.angle() % (2 * math.pi)).sort().values, 2 * math.pi * expected, rtol=0, atol=0.1)


@pytest.mark.parametrize("horizon", [1000, 100_000])
def test_s5_initial_horizons(horizon):
    """A state decays to 1/e in horizon / 100 to horizon rows: -1 / log |lambda|."""
    decay, _ = monoids.S5Cell(D, d_state=4000, horizon=horizon).to(REAL).lift(torch.zeros(1, 1, D, dtype=REAL))
    rows = -1 / decay.abs().log()
    assert horizon / 100 * 0.94 < rows.min() < horizon / 100 * 1.1 and horizon * 0.5 < rows.max() < horizon * 1.01


def test_s5_initial_scales():
    cell = monoids.S5Cell(64, d_state=256)
    with torch.no_grad():
        y = cell.readout(torch.randn(200, 1, 256, dtype=torch.complex64), torch.zeros(200, 1, 64))
    assert y.square().mean() == pytest.approx(2, abs=0.2)
    assert cell.B.square().sum(1).mean().item() == pytest.approx(1 / 64, rel=0.1)


def test_lru_preserves_the_variance_of_white_noise():
    cell = monoids.LRUCell(32, d_state=256, horizon=100)
    with torch.no_grad():
        h = linear_recurrence(*cell.lift(torch.randn(4000, 4, 32)))
    assert h[1000:].abs().square().mean() == pytest.approx(1, abs=0.05)


def test_lru_has_fixed_phases_and_begins_without_d():
    """As its docstring says; the phases belong to a checkpoint all the same."""
    cell = monoids.LRUCell(D)
    assert not cell.D.any() and cell.theta.any()
    assert "theta" in cell.state_dict() and "theta" not in dict(cell.named_parameters())


def hippo_normal(n):
    """HiPPO-LegS and the rank-one correction that makes it normal: A + P P^T, (n, n)."""
    A = torch.zeros(n, n, dtype=REAL)
    for i in range(n):
        for k in range(i):
            A[i, k] = -math.sqrt((2 * i + 1) * (2 * k + 1))
        A[i, i] = -(i + 1)
    P = torch.sqrt(torch.arange(n) + 0.5).to(REAL)
    return A + torch.outer(P, P)


@pytest.mark.parametrize("dtype, rtol", [(REAL, 1e-9), (torch.float32, 1e-3)])
def test_lru_gradients_with_decays_of_zero_and_one(dtype, rtol):
    """|lambda| at its limits: exactly 1 in both precisions, 1 - 2e-9, 1/e, and exactly 0."""
    cell = monoids.LRUCell(D, d_state=4).to(REAL)
    with torch.no_grad():
        cell.nu_log.copy_(torch.tensor([-100.0, -20.0, 0.0, 10.0]))
    x, start, weight = normal(300, 2, D), starts(300, 2, p=0.01), torch.randn(300, 2, D, dtype=REAL)
    decay, b = cell.lift(x)
    slow = torch.autograd.grad((cell.readout(loop(decay, b, start=start), x) * weight).mean(), [*cell.parameters()])
    cell.to(dtype)
    decay, _ = cell.lift(x.to(dtype))
    assert decay[0].abs() == 1 and decay[3] == 0
    y, _ = cell(x.to(dtype), cell.initial_state(2), start)
    fast = torch.autograd.grad((y * weight).mean(), [*cell.parameters()])
    for a, b in zip(fast, slow):
        assert a.isfinite().all() and (a - b).norm() <= rtol * b.norm()


@pytest.mark.parametrize("d_state, blocks", [(1, 1), (16, 1), (24, 3), (128, 8)])
def test_s5_initialisation_has_hippo_eigenvalues(d_state, blocks):
    cell = monoids.S5Cell(D, d_state=d_state, blocks=blocks)
    Lambda = torch.complex(-torch.exp(cell.log_real), cell.imag).to(COMPLEX).unflatten(0, (blocks, -1))
    pairs = torch.cat((Lambda, Lambda.conj()), 1)  # (blocks, n)
    for block in pairs:
        expected = torch.linalg.eigvals(hippo_normal(len(block)))
        assert_close(block.real, expected.real, rtol=0, atol=1e-5)
        assert_close(block.imag.sort().values, expected.imag.sort().values, rtol=1e-6, atol=1e-5)


def test_s5_equals_the_real_state_space_model():
    """s_t = e^(A dt) s_{t-1} + A^-1 (e^(A dt) - 1) B u_t,  y_t = C s_t + D u_t: all real, s twice as large as h."""
    blocks, n, dts = 2, 8, [0.05, 0.3]
    cell = monoids.S5Cell(D, d_state=blocks * n // 2, blocks=blocks).to(REAL)
    cell.log_dt.data = torch.tensor(dts, dtype=REAL).log().repeat_interleave(n // 2)
    x = normal(50, 3, D)
    A = hippo_normal(n)
    values, V = torch.linalg.eig(A)  # A is normal: V is unitary
    V = V[:, values.imag.argsort()[: n // 2]]  # (n, n/2): the half that has negative imaginary parts
    B_tilde = torch.complex(*cell.B.unbind(1)).unflatten(0, (blocks, -1))  # (blocks, n/2, D) = V* B
    C_tilde = torch.view_as_complex(cell.C).conj().unflatten(1, (blocks, -1))  # (D, blocks, n/2) = C V
    y = cell.D * x
    for i, dt in enumerate(dts):
        B, C = 2 * (V @ B_tilde[i]).real, 2 * (C_tilde[:, i] @ V.mH).real  # (n, D), (D, n): the other half is conjugate
        step = torch.linalg.matrix_exp(A * dt)
        held = torch.linalg.solve(A, (step - torch.eye(n)) @ B)  # zero-order hold
        s, outputs = torch.zeros(3, n, dtype=REAL), []
        for u in x:
            s = s @ step.T + u @ held.T
            outputs.append(s @ C.T)
        y = y + torch.stack(outputs)
    same(run(cell, x), y, [x, cell.B, cell.C, cell.D], rtol=1e-5, atol=1e-5)  # the eigenvalues were float32 once


def test_sizes_are_checked():
    with pytest.raises(ValueError, match="multiple of blocks"):
        monoids.S5Cell(D, d_state=9, blocks=2)
    for d_key in (0, 7):
        with pytest.raises(ValueError, match="must be even"):
            monoids.LinearTransformerCell(D, num_heads=1, d_key=d_key)
    for horizon in (math.inf, math.nan):
        with pytest.raises(ValueError, match="must be finite"):
            make_memory(["ffm"], D, horizon=horizon)


def test_ffm_equations():
    cell = monoids.FFMCell(D, num_traces=3, num_frequencies=2, horizon=16).to(REAL)
    x = normal(20, 3, D)
    gated = cell.input(x)[..., :3] * torch.sigmoid(cell.input(x)[..., 3:])
    S, y = torch.zeros(3, 3, 2, dtype=COMPLEX), []  # (B, m, c)
    for x_t in gated:
        S = torch.exp(-cell.alpha.abs())[:, None] * torch.exp(1j * cell.omega) * S + x_t[:, :, None]
        y.append(cell.output(torch.stack((S.real, S.imag), -1).flatten(1)))
    same(run(cell, x), torch.stack(y), [x, *cell.parameters()])


def test_lru_phases_reach_max_phase():
    theta = monoids.LRUCell(D, d_state=1000, max_phase=0.1).theta
    assert 0.09 < theta.max() < 0.1


def test_lru_readout_has_the_variance_of_its_state():
    cell = monoids.LRUCell(256, d_state=256, horizon=100)
    h = torch.randn(200, 1, 256, dtype=torch.complex64)  # of variance 1
    with torch.no_grad():
        y = cell.readout(h, torch.zeros(200, 1, 256))
    assert y.square().mean() == pytest.approx(1, abs=0.1)


@pytest.mark.parametrize("horizon", [64, 500])
def test_ffm_initial_decays_and_periods(horizon):
    beta = 0.05
    cell = monoids.FFMCell(D, num_traces=8, num_frequencies=3, horizon=horizon, beta=beta)
    decay, _ = cell.lift(torch.zeros(1, 1, D))  # (m, c)
    remembered = decay.abs().double() ** horizon
    assert (remembered.diff(dim=0) > 0).all()
    assert_close(decay[0].abs(), torch.full((3,), torch.finfo(REAL).max ** (-1 / 1024)))
    assert_close(remembered[-1], torch.full((3,), beta, dtype=REAL), rtol=1e-4, atol=0)
    turns = decay.angle() * torch.tensor([1, (1 + horizon) / 2, horizon]) / (2 * math.pi)  # over one period each
    assert_close(turns, turns.round(), rtol=0, atol=1e-4)
    assert_close(turns[0].round(), torch.tensor([0.0, 1.0, 1.0]))  # a period of one row is no turn at all


def test_linear_transformer_equals_attention():
    """y_t = sum_s (R_t q_t . R_s k_s) v_s / sum_s (q_t . k_s) over s <= t, for q and k after phi: T^2 products."""
    heads, d_key, T = 2, 6, 20
    cell = monoids.LinearTransformerCell(D, num_heads=heads, d_key=d_key, d_value=3).to(REAL)
    x = normal(T, 3, D)
    phi = lambda x: F.elu(x.unflatten(-1, (heads, d_key))) + 1
    q, k, v = phi(cell.query(x)), phi(cell.key(x)), cell.value(x).unflatten(-1, (heads, -1))
    omega = cell.omega[..., 0]  # (heads, d_key / 2): how far each pair of features turns in a row
    assert_close(omega.flatten().sort().values.float(), math.pi * torch.arange(1, 7) / 6)
    angle = torch.arange(T).to(REAL)[:, None, None, None] * omega  # (T, 1, heads, d_key / 2)
    cos, sin = angle.cos(), angle.sin()

    def turn(x):
        a, b = x[..., 0::2], x[..., 1::2]
        return torch.stack((a * cos - b * sin, a * sin + b * cos), -1).flatten(-2)

    scores = lambda q, k: torch.einsum("tbhi,sbhi->bhts", q, k).tril()
    y = torch.einsum("bhts,sbhv->tbhv", scores(turn(q), turn(k)), v) / scores(q, k).sum(-1).permute(2, 0, 1)[..., None]
    same(run(cell, x), cell.output(y.flatten(-2)), [x, *cell.parameters()])


def test_mingru_equations():
    cell = monoids.MinGRUCell(D, d_state=5).to(REAL)
    x, start, state = normal(20, 3, D), starts(20, 3), normal(3, 5)
    z = 1 / (1 + torch.exp(-x @ cell.gate.weight.T - cell.gate.bias))
    candidate = x @ cell.candidate.weight.T + cell.candidate.bias
    h, y = state, []
    for t in range(20):
        h = torch.where(start[t, :, None], 0, h)
        h = (1 - z[t]) * h + z[t] * candidate[t]
        y.append(h @ cell.output.weight.T + cell.output.bias)
    same(cell(x, state, start), (torch.stack(y), h), [x, state, *cell.parameters()])


@pytest.mark.parametrize("horizon", [10, 1000])
def test_mingru_initial_horizons_are_log_uniform(horizon):
    n = 20_000
    decay, _ = monoids.MinGRUCell(D, d_state=n, horizon=horizon).to(REAL).lift(torch.zeros(1, 1, D, dtype=REAL))
    u = decay / (1 - decay)  # the forget bias is log u
    expected = torch.linspace(0, math.log(horizon), n, dtype=REAL)
    assert_close(u.log().flatten().sort().values, expected, rtol=0, atol=0.05 * math.log(horizon))


def test_gru_equals_torch_gru():
    cell = monoids.GRUCell(D, d_state=5).to(REAL)
    x, start, state = normal(20, 3, D), starts(20, 3), normal(3, 5)
    h, y = state, []
    for x_t, start_t in zip(x, start):
        h = cell.gru(x_t[None], torch.where(start_t[:, None], 0, h)[None])[1][0]
        y.append(cell.output(h))
    same(cell(x, state, start), (torch.stack(y), h), [x, state, *cell.parameters()])


def test_linear_transformer_far_below_zero():
    """In float32 elu(-18) + 1 is 0, and a mean with weights that are all 0 is NaN."""
    cell = monoids.LinearTransformerCell(D)
    torch.nn.init.constant_(cell.query.bias, -18)
    x = torch.zeros(5, 3, D)
    y, expected = run(cell, x), run(copy.deepcopy(cell).double(), x.double())
    assert_close(y.double(), expected, rtol=1e-4, atol=1e-5)
