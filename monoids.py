"""Memory for reinforcement learning, from one idea: a monoid, scanned over time.

A *monoid* (H, •, e) is a set H with an associative operation • and an identity e. Because • is associative, all its
prefixes x_0, x_0 • x_1, x_0 • x_1 • x_2, ... can be computed as a tree instead of a chain, in O(log T) steps. A *memory
monoid* ("Revisiting Recurrent Reinforcement Learning with Memory Monoids", Morad et al. 2024, arXiv 2402.09900) is a
memory model written as

    lift f: O -> H          what one observation contributes
    scan of • over time     what all observations up to now amount to
    readout g: H x O -> S   what the agent gets to see of it

Any monoid can be made *resettable*, so that one scan runs over many episodes laid end to end and nothing passes between
them. Discounted returns and advantages are scans of the same kind, run backwards.

Time is dimension 0 everywhere, as in `torch.nn.GRU`. Shapes: T rows, B parallel sequences, D features.
"""

import functools
import importlib.util
import math

import torch
import torch.nn as nn
import torch.nn.functional as F


# ---------------------------------------------------------------------------------------------------------------------
# Monoids and their scan


class Monoid:
    """A set with an associative operation and an identity. Subclass it and fill in the two methods to add one.

    An element is a tensor or a (nested) tuple of tensors, with any number of leading (time, batch) dimensions. Laws:
        (a • b) • c = a • (b • c)        and        e • a = a = a • e
    """

    def identity(self, like):
        """Identity elements with the structure, shapes, dtype and device of the elements `like`."""
        raise NotImplementedError

    def op(self, left, right):
        """left • right, elementwise over the leading dimensions; `left` is the earlier in time. Not in place."""
        raise NotImplementedError


class Affine(Monoid):
    """The maps h -> a h + b under composition; elements (a, b), two tensors of the same shape.

    (a, b) • (a', b') = (a a', a' b + b'), with identity (1, 0). The scan's second half is h_t = a_t h_{t-1} + b_t from
    h_{-1} = 0: every linear recurrence, discounted return and advantage in this file. Its fast path is
    `linear_recurrence`.
    """

    def identity(self, like):
        a, b = like
        return torch.ones_like(a), torch.zeros_like(b)

    def op(self, left, right):
        (a, b), (a2, b2) = left, right
        return a * a2, a2 * b + b2


class _Resettable(Monoid):
    def __init__(self, monoid):
        self.monoid = monoid

    def identity(self, like):
        elements, start = like
        return self.monoid.identity(elements), torch.zeros_like(start)

    def op(self, left, right):
        (A, b), (A2, b2) = left, right
        forget = lambda x, e: torch.where(b2.reshape(b2.shape + (1,) * (x.ndim - b2.ndim)), e, x)
        return self.monoid.op(tree_map(forget, A, self.monoid.identity(A)), A2), b | b2


def resettable(monoid):
    """Any monoid, with a flag that starts a new episode. Section 4 of the paper:

        (A, b) o (A', b') = (A • A', b or b')  where b' = 0
                            (e • A', 1)        where b' = 1

    Returns a Monoid whose elements are (elements of `monoid`, start). start is bool, (T,) or (T, B): its dimensions are
    the leading ones of every tensor in the elements. In a scan, a row whose start is True sees nothing of the rows
    before it, and no gradient passes back over it, not even a NaN.
    """
    return _Resettable(monoid)


def tree_map(f, *trees):
    """f over the tensors of (nested) tuples of equal structure."""
    if isinstance(trees[0], tuple):
        return tuple(tree_map(f, *branches) for branches in zip(*trees, strict=True))
    return f(*trees)


def _length(elements):
    return _length(elements[0]) if isinstance(elements, tuple) else elements.shape[0]


def scan(monoid, elements, reverse=False):
    """All prefixes of •: result_t = x_0 • x_1 • ... • x_t.

    elements: a tensor or a (nested) tuple of tensors, (T, ...) each, T >= 1 (T = 1 comes back as it is). The result has
    the same structure and shapes. reverse runs time backwards, result_t = x_{T-1} • ... • x_{t+1} • x_t (flip, scan,
    flip). Differentiable by autograd through every application of •.

    Adjacent pairs are multiplied, the pairs are scanned by recursion, which gives the prefixes that end on odd rows,
    and one more multiplication gives those that end on even rows: fewer than 2T products, in 2 log2(T) steps (Blelloch
    1990, "Prefix sums and their applications"; jax.lax.associative_scan does the same).
    """
    if reverse:
        flip = lambda x: x.flip(0)
        return tree_map(flip, scan(monoid, tree_map(flip, elements)))
    T = _length(elements)
    if T < 1:
        raise ValueError("scan: a sequence of at least one row is needed, got none")
    if T == 1:
        return elements
    rows = lambda *index: tree_map(lambda x: x[slice(*index)], elements)
    odd = scan(monoid, monoid.op(rows(0, T - 1, 2), rows(1, T, 2)))  # rows 1, 3, 5, ...
    even = rows(0, 1)  # rows 0, 2, 4, ...
    if T > 2:
        before = tree_map(lambda x: x[: (T - 1) // 2], odd)
        even = tree_map(lambda *x: torch.cat(x), even, monoid.op(before, rows(2, T, 2)))
    return tree_map(_interleave, even, odd)


def _interleave(even, odd):
    pairs = torch.stack((even[: len(odd)], odd), 1).flatten(0, 1)
    return torch.cat((pairs, even[len(odd) :]))  # an odd T has one even row more


# ---------------------------------------------------------------------------------------------------------------------
# The fast path of the affine monoid


def linear_recurrence(decay, x, initial=None, reverse=False, start=None):
    """h_t = decay_t h_{t-1} + x_t, the recurrence under every memory and return in this file.

    x:       (T, ...), T >= 1, real or complex
    decay:   broadcasts to x, as in (D,), (T, 1, D) or (T, B, D)
    initial: (...), or what broadcasts to it: h before the first row (the last one if reverse); None is zero
    reverse: h_t = decay_t h_{t+1} + x_t instead
    start:   bool, (T,) or (T, B), its dimensions the leading ones of x: where it is True decay counts as zero, so that
             a row sees nothing before itself; None is nowhere
    Returns h (T, ...), in the dtype that decay, x and initial promote to. Raises RuntimeError where shapes don't
    broadcast.

    Equals the second half of `scan(Affine(), (decay, x))` while products of decays are finite, as they are for |decay|
    <= 1, and so is x: a NaN does not stop at a zero decay as it does at a flag of `resettable`. The backward pass is
    the same recurrence, reversed:
        dL/dx_t = dL/dh_t + conj(decay_{t+1}) dL/dx_{t+1}        dL/ddecay_t = dL/dx_t conj(h_{t-1})
    so it needs the outputs and nothing else: O(T) memory, and it can be differentiated again.
    """
    if len(x) < 1:
        raise ValueError("linear_recurrence: a sequence of at least one row is needed, got none")
    initial = x.new_zeros(()) if initial is None else initial
    dtype = torch.promote_types(torch.promote_types(decay.dtype, x.dtype), initial.dtype)
    decay = decay.reshape((1,) * (x.ndim - decay.ndim) + decay.shape)
    start = start if start is None else start.reshape(start.shape + (1,) * (x.ndim - start.ndim))
    return _LinearRecurrence.run(decay.to(dtype), x.to(dtype), initial.to(dtype).expand(x.shape[1:]), start, reverse)


class _LinearRecurrence(torch.autograd.Function):
    @classmethod
    def run(cls, *inputs):  # apply takes longer than a step of acting
        return cls.apply(*inputs) if torch.is_grad_enabled() else cls.forward(*inputs)

    @staticmethod
    def forward(decay, x, initial, start, reverse):
        recur = _opaque if torch.compiler.is_compiling() else _recur
        return recur(decay, x, initial, start, reverse)

    @staticmethod
    def setup_context(ctx, inputs, output):
        decay, _, initial, start, ctx.reverse = inputs
        ctx.save_for_backward(decay, initial, start, output)

    @staticmethod
    def backward(ctx, grad):
        decay, initial, start, h = ctx.saved_tensors
        if not (torch.is_grad_enabled() or torch.compiler.is_compiling()) and _on_gpu(grad):
            needs_decay, _, needs_initial, *_ = ctx.needs_input_grad
            return *_triton_backward(*ctx.saved_tensors, grad, ctx.reverse, needs_decay, needs_initial), None, None
        first, shift = (-1, 1) if ctx.reverse else (0, -1)
        zero = torch.zeros_like(initial)
        later = None if start is None else start.roll(shift, 0)
        grad_x = _LinearRecurrence.run(decay.roll(shift, 0).conj_physical_(), grad, zero, later, not ctx.reverse)
        grad_decay = grad_initial = None
        if ctx.needs_input_grad[0]:
            before = torch.cat((h[1:], initial[None]) if ctx.reverse else (initial[None], h[:-1]))
            before = before if start is None else before.mul_(~start)  # in place: fresh memory costs more than the sums
            grad_decay = before.conj_physical_().mul_(grad_x).sum_to_size(decay.shape)
        if ctx.needs_input_grad[2]:
            grad_initial = grad_x[first] * decay[first].conj()
            grad_initial = grad_initial if start is None else ~start[first] * grad_initial
        return grad_decay, grad_x, grad_initial, None, None


def _recur(
    decay: torch.Tensor, x: torch.Tensor, initial: torch.Tensor, start: torch.Tensor | None, reverse: bool
) -> torch.Tensor:
    """linear_recurrence without its gradient; decay and start broadcast to x (T, ...), initial (...)."""
    if _on_gpu(x):
        return _triton(decay, x, initial, start, reverse)[0]
    keep = None if start is None else (~start).to(x.dtype)
    return _blocked(decay.expand(x.shape), keep, x, initial, x.new_empty(x.shape), reverse)


# to torch.compile it is one step, not a loop over time of complex numbers, which it can't fuse
_opaque = torch.library.custom_op("monoids::recur", _recur, mutates_args=())
_opaque.register_fake(lambda decay, x, initial, start, reverse: x.new_empty(x.shape))


def _blocked(decay, keep, x, initial, out, reverse, K=8):
    """The recurrence without its gradient, in fewer than 2T affine maps and O(log T) steps, written to `out`.

    Time is cut into C blocks of K rows. What a block does to the state that enters it is one affine map (a, b): K
    steps, all blocks at once, give all the maps. They form a recurrence of their own, C rows long, which gives the
    state that enters each block, by recursion. K more steps give every row. Row k of all blocks is a strided view, so
    nothing is copied or padded; the rows that fill no block come last. decay, x and out (T, ...), initial (...); keep,
    which broadcasts to them, is 0 where an episode starts and else 1, or None.
    """
    T, order = len(x), slice(None, None, -1 if reverse else 1)
    C = T // K
    if C < 2:
        decay = decay if keep is None else keep * decay
        for a_t, x_t, out_t in zip(*(y.unbind()[order] for y in (decay, x, out))):
            initial = torch.addcmul(x_t, a_t, initial, out=out_t)
        return out
    blocks, rest = (slice(T % K, T), slice(T % K)) if reverse else (slice(C * K), slice(C * K, T))
    cut = lambda y: y[blocks].unflatten(0, (C, K))  # (C, K, ...)
    decays, xs, outs = (cut(y).unbind(1)[order] for y in (decay, x, out))  # K of (C, ...)
    a = cut(decay).prod(1)
    if keep is not None:
        decays = [k * a_k for k, a_k in zip(cut(keep).unbind(1)[order], decays)]
        a *= cut(keep).prod(1)
    b = xs[0].clone()
    for a_k, x_k in zip(decays[1:], xs[1:]):
        torch.addcmul(x_k, a_k, b, out=b)
    h = torch.empty_like(b)
    first, entered, left = (-1, slice(-1), slice(1, None)) if reverse else (0, slice(1, None), slice(-1))
    h[first] = initial
    _blocked(a[left], None, b[left], initial, h[entered], reverse)
    for a_k, x_k, out_k in zip(decays, xs, outs):
        h = torch.addcmul(x_k, a_k, h, out=out_k)
    if T % K:
        _blocked(decay[rest], keep if keep is None else keep[rest], x[rest], h[-1 - first], out[rest], reverse)
    return out


# ---------------------------------------------------------------------------------------------------------------------
# The same on a GPU: a chunked scan, in Triton


HAS_TRITON = importlib.util.find_spec("triton") is not None  # it comes with most CUDA builds of PyTorch


def _on_gpu(x):
    """Whether the kernel takes x. Triton launches on the current device, whichever x is on."""
    kinds = torch.float32, torch.float64, torch.complex64, torch.complex128
    return HAS_TRITON and x.is_cuda and x.dtype in kinds and x.get_device() == torch.cuda.current_device()


def _tiling(T, N, itemsize):
    """Rows and channels of a tile, and rows of a chunk, to walk over T rows of N channels.

    A tile is 8 KB: 128 rows of 64 bytes, which is enough side by side to read memory at full speed, or more rows of
    fewer channels. 256 programs fill a GPU. Where channels alone don't make as many, time is cut into chunks; not for 8
    tiles or fewer, which are sooner walked than another kernel is launched.
    """
    channels = min(64 // itemsize, 1 << max(0, N - 1).bit_length())
    rows = 8192 // (channels * itemsize)
    tiles, programs = math.ceil(T / rows), math.ceil(N / channels)
    chunks = 1 if tiles <= 8 else 256 // min(256, max(1, programs))
    return rows, channels, rows * math.ceil(tiles / chunks)


@functools.cache
def _triton_kernel():
    """The kernel, made when first needed: to import Triton takes half a second, and not everybody has it.

    A program walks through one chunk of time, for CHANNELS of the N = B x D channels, tile by tile. In a tile, a tree
    over its rows composes the affine maps (decay, x) of rows 0 to k into one, for every k. Applied to the state that
    enters the tile they give the state of every row; that of the last row enters the next tile.

    Step s of the walk is at row t = s, or t = T - 1 - s if REVERSE. Where `product` is given, the chunk starts from
    zero and its own map is all that is written: (product, out). Otherwise it starts from `enter`, and out gets the
    states. BACKWARD is the walk of the backward pass: step s uses the conjugate decay of step s - 1, because the decay
    that carries h_t to h_{t+1} carries the gradient back. Where `grad_decay` is given, it gets the gradient of decay,
    worked out on the way from the states h: of every row, or if decay is CONSTANT in time, the sum over the chunk.
    """
    global tl, _load, _store, _only, _multiply_add, _compose, _compose_complex  # where Triton looks for them
    import triton
    import triton.language as tl

    # A number is a tuple of tensors here, (value,) or (real part, imaginary part); in memory the two are neighbours.

    @triton.jit
    def _load(pointer, offset, mask, COMPLEX: tl.constexpr):
        if COMPLEX:
            pair = tl.expand_dims(pointer + 2 * offset, -1) + tl.arange(0, 2)
            return tl.split(tl.load(pair, tl.expand_dims(mask, -1), other=0.0))
        else:
            return (tl.load(pointer + offset, mask, other=0.0),)

    @triton.jit
    def _store(pointer, offset, value, mask):
        if len(value) == 2:
            pair = tl.expand_dims(pointer + 2 * offset, -1) + tl.arange(0, 2)
            tl.store(pair, tl.join(value[0], value[1]), tl.expand_dims(mask, -1))
        else:
            tl.store(pointer + offset, value[0], mask)

    @triton.jit
    def _only(mask, value, CONJUGATE: tl.constexpr = False):  # zero elsewhere
        if len(value) == 2:
            return tl.where(mask, value[0], 0.0), tl.where(mask, -value[1] if CONJUGATE else value[1], 0.0)
        else:
            return (tl.where(mask, value[0], 0.0),)

    @triton.jit
    def _multiply_add(a, b, c):  # a b + c
        if len(a) == 2:
            return a[0] * b[0] - a[1] * b[1] + c[0], a[0] * b[1] + a[1] * b[0] + c[1]
        else:
            return (a[0] * b[0] + c[0],)

    @triton.jit
    def _compose(a, b, a2, b2):  # Affine.op
        return a * a2, a2 * b + b2

    @triton.jit
    def _compose_complex(a, a_i, b, b_i, a2, a2_i, b2, b2_i):
        return a * a2 - a_i * a2_i, a * a2_i + a_i * a2, a2 * b - a2_i * b_i + b2, a2 * b_i + a2_i * b + b2_i

    @triton.jit
    def kernel(
        decay, x, enter, out, product, h, grad_decay, start, decay_stride, start_stride, T, N, D, CHUNK,
        REVERSE: tl.constexpr, BACKWARD: tl.constexpr, CONSTANT: tl.constexpr, COMPLEX: tl.constexpr,
        ROWS: tl.constexpr, CHANNELS: tl.constexpr,
    ):  # fmt: skip
        parts: tl.constexpr = 2 if COMPLEX else 1
        step: tl.constexpr = -1 if REVERSE else 1
        n = tl.program_id(0).to(tl.int64) * CHANNELS + tl.arange(0, CHANNELS)  # 64 bits: x may be larger than 2^31
        chunk = tl.program_id(1).to(tl.int64)
        b, d = n // D, n % D
        decay_n = b * decay_stride[1] + d * decay_stride[2]
        row = tl.arange(0, ROWS)[:, None]
        zero = (tl.zeros((CHANNELS,), out.dtype.element_ty),) * parts
        total = (zero[0] + 1,) + zero[1:]  # the product of the chunk's decays
        gradient = (tl.zeros((ROWS, CHANNELS), out.dtype.element_ty),) * parts
        carry = zero
        if enter is not None:
            carry = _load(enter, chunk * N + n, n < N, COMPLEX)
        # num_stages: the tiles that follow are on their way from memory while this one is worked on
        for s0 in tl.range(chunk * CHUNK, tl.minimum((chunk + 1) * CHUNK, T), ROWS, num_stages=3):
            s = s0 + row
            t = T - 1 - s if REVERSE else s
            here = (s < T) & (n < N)
            leads = here & (s > 0) if BACKWARD else here
            u = t - step if BACKWARD else t  # the row whose decay leads here from the step before
            if CONSTANT:
                a = _load(decay, decay_n, n < N, COMPLEX)
            else:
                a = _load(decay, u * decay_stride[0] + decay_n, leads, COMPLEX)
            if start is not None:
                leads = leads & (tl.load(start + u * start_stride[0] + b * start_stride[1], leads, other=0) == 0)
            maps = _only(leads, a, BACKWARD) + _load(x, t * N + n, here, COMPLEX)
            maps = tl.associative_scan(maps, 0, _compose_complex if COMPLEX else _compose)
            products = maps[:parts]
            states = _multiply_add(products, carry, maps[parts:])
            carry = [tl.sum(value, 0) for value in _only(row == ROWS - 1, states)]
            if product is not None:
                total = _multiply_add([tl.sum(value, 0) for value in _only(row == ROWS - 1, products)], total, zero)
            else:
                _store(out, t * N + n, states, here)
            if grad_decay is not None:
                before = here & (s + 1 < T)  # before row t as time goes: after it in this walk
                h_before = _load(h, (t + step) * N + n, before, COMPLEX)
                if start is not None:
                    before = before & (tl.load(start + t * start_stride[0] + b * start_stride[1], before, other=0) == 0)
                h_before = _only(before, h_before, True)
                if CONSTANT:
                    gradient = _multiply_add(states, h_before, gradient)
                else:
                    _store(grad_decay, t * N + n, _multiply_add(states, h_before, gradient), here)
        if product is not None:
            _store(product, chunk * N + n, total, n < N)
            _store(out, chunk * N + n, carry, n < N)
        if CONSTANT and grad_decay is not None:
            _store(grad_decay, chunk * N + n, [tl.sum(value, 0) for value in gradient], n < N)

    return kernel


def _triton(decay, x, initial, start, reverse, backward=False, h=None):
    """The kernel over all chunks: decay and x (T, ...), initial (...), start -> states (T, ...), gradient of decay.

    The chunks' maps are a recurrence of their own, C - 1 rows long, which gives the state that enters each chunk. The
    gradient is None without h. It lacks the term of the row that `initial` enters, and where decay is the same in all
    rows it is (C, ...), sums over the chunks.
    """
    shape, D = x.shape, math.prod(x.shape[2:])

    def merge(x):  # (T, B, ...) -> (T, B, D); what is broadcast over T or B stays so
        x = x.expand(*x.shape[:2], *shape[2:]).reshape(*(*x.shape, 1)[:2], D)
        return x.resolve_conj().resolve_neg()

    decay, x, enter = merge(decay), merge(x).contiguous(), merge(initial[None]).contiguous()
    T, B, _ = x.shape
    rows, channels, rows_of_chunk = _tiling(T, B * D, x.element_size())
    C = math.ceil(T / rows_of_chunk)
    start_stride = None if start is None else start.reshape((*start.shape, 1)[:2]).expand(T, B).stride()
    flags = reverse, backward, len(decay) == 1, x.is_complex()

    def run(C, *tensors):
        tensors = [y if y is None or not y.is_complex() else torch.view_as_real(y) for y in (decay, x, *tensors)]
        strides = decay.expand(T, B, D).stride(), start_stride
        kernel = _triton_kernel()[math.ceil(B * D / channels), C]
        kernel(*tensors, start, *strides, T, B * D, D, rows_of_chunk, *flags, rows, channels)

    if C > 1:
        product, last = x.new_empty(2, C - 1, B, D)
        run(C - 1, None, last, product, None, None)
        enter = torch.cat((enter, _triton(product, last, enter[0], None, False)[0]))
    out = torch.empty_like(x)
    if h is None:
        run(C, enter, out, None, None, None)
        return out.view(shape), None
    grad_decay = x.new_empty(C if len(decay) == 1 else T, B, D)
    run(C, enter, out, None, h, grad_decay)
    return out.view(shape), grad_decay.view(-1, *shape[1:])


def _triton_backward(decay, initial, start, h, grad, reverse, needs_decay, needs_initial):
    """The gradients of decay, x and initial, given that of h, in one sweep (which can't be differentiated again)."""
    zero, first = torch.zeros_like(initial), -1 if reverse else 0
    grad_x, grad_decay = _triton(decay, grad, zero, start, not reverse, True, h if needs_decay else None)
    edge = grad_x[first] if start is None else ~start[first] * grad_x[first]  # what passes into the initial state
    if needs_decay:
        grad_decay[first] += edge * initial.conj()
        grad_decay = grad_decay.sum_to_size(decay.shape)
    return grad_decay, grad_x, edge * decay[first].conj() if needs_initial else None


# ---------------------------------------------------------------------------------------------------------------------
# Returns and advantages: the same recurrence, backwards over a tape


def discounted_return(gamma, reward, done, next_value=None):
    """Discounted returns of every row of a tape of many episodes, in one reverse scan.

        G_t = r_t + gamma * next_value_t    where done_t or t = T-1
        G_t = r_t + gamma * G_{t+1}         elsewhere

    gamma: the discount, a float or a tensor that broadcasts; reward (T, ...) float; done (T, ...) bool: the episode
    ended here, terminated or truncated; next_value (T, ...): the value of the state that follows, read only where a row
    is done or the last (None means 0). Pass 0 there for a terminal state. Returns G (T, ...). Section 4.2 of the paper.
    """
    done = done.bool()
    x = reward
    if next_value is not None:
        ends = done.clone()
        ends[-1] = True
        x = x + gamma * torch.where(ends, next_value, 0)
    return linear_recurrence(gamma * (~done).to(x.dtype), x, reverse=True)


def gae(gamma, lmbda, value, next_value, reward, done, terminated=None):
    """Generalised advantage estimates of every row of a tape of many episodes, in one reverse scan (Schulman 2016).

        delta_t = r_t + gamma * (1 - terminated_t) * next_value_t - value_t
        A_t = delta_t + gamma * lmbda * (1 - done_t) * A_{t+1}

    value, next_value, reward (T, ...) float: next_value is the value of the state that follows row t, the final
    observation of its episode included; it is not read where terminated. done (T, ...) bool: nothing accumulates across
    it. terminated (T, ...) bool: nothing is bootstrapped there either; None means done. After the last row nothing
    accumulates, so an episode that goes on beyond the tape bootstraps from next_value there. Returns A (T, ...);
    returns-to-go are A + value.
    """
    terminated = done if terminated is None else terminated
    delta = reward + gamma * torch.where(terminated.bool(), 0, next_value) - value
    return linear_recurrence(gamma * lmbda * (~done.bool()).to(delta.dtype), delta, reverse=True)


# ---------------------------------------------------------------------------------------------------------------------
# Memory models: lift, monoid, readout. All four are affine monoids, so a reset is a zero in the decay.


class Cell(nn.Module):
    """What one layer of a memory remembers. Subclasses say how one row is lifted and how the state is read.

    lift(x):       x (T, B, D) -> (decay, b), elements of `Affine`: b (T, B, ...), decay broadcasts to it
    readout(h, x): h (T, B, ...), x (T, B, D) -> y (T, B, D)
    state_shape:   the dimensions of the state, `...` above; is_complex: whether it is complex
    """

    is_complex = False

    def initial_state(self, B):
        p = next(self.parameters())
        dtype = p.dtype.to_complex() if self.is_complex else p.dtype
        return torch.zeros(B, *self.state_shape, device=p.device, dtype=dtype)

    def forward(self, x, state, start):
        decay, b = self.lift(x)
        state = torch.where(start[0].reshape(-1, *(1,) * (state.ndim - 1)), 0, state)  # whatever it is, NaN included
        h = linear_recurrence(decay, b, state, start=start)
        return self.readout(h, x), h[-1]


# A complex matrix is a real parameter with a dimension of 2, so that optimizers and .to(dtype) just work. It lies as
# one real multiplication needs it: B (N, 2, D) holds Re B_n, Im B_n; C (D, N, 2) holds Re C_dn, -Im C_dn.


def _lift(x, B):
    """B x for real x (..., D) -> complex (..., N)."""
    return torch.view_as_complex(F.linear(x, B.flatten(0, 1)).unflatten(-1, (-1, 2)))


def _read(h, C):
    """Re(C h) for complex h (..., N) -> real (..., D)."""
    return F.linear(torch.view_as_real(h).flatten(-2), C.flatten(1))


class LRUCell(Cell):
    """Linear Recurrent Unit (Orvieto et al. 2023, arXiv 2303.06349, section 3 and appendix A).

        h_t = lambda h_{t-1} + exp(gamma_log) B x_t        y_t = Re(C h_t) + D x_t            (their eq. 1 and 7)
        lambda = exp(-exp(nu_log) + i exp(theta_log)),     so that |lambda| < 1               (stable)

    At the start lambda is uniform on the ring r_min <= |lambda| <= r_max (Lemma 3.2), gamma = sqrt(1 - |lambda|^2)
    keeps the state's variance that of its input, and B and C are Glorot-initialised.
    """

    is_complex = True

    def __init__(self, d_model, d_state=128, r_min=0.9, r_max=0.999, max_phase=2 * math.pi):
        super().__init__()
        self.state_shape = (d_state,)
        squared = torch.rand(d_state) * (r_max**2 - r_min**2) + r_min**2  # |lambda|^2
        self.nu_log = nn.Parameter(torch.log(-0.5 * torch.log(squared)))
        self.theta_log = nn.Parameter(torch.log(max_phase * torch.rand(d_state)))
        self.gamma_log = nn.Parameter(0.5 * torch.log(1 - squared))
        self.B = nn.Parameter(torch.randn(d_state, 2, d_model) * (2 * d_model) ** -0.5)
        self.C = nn.Parameter(torch.randn(d_model, d_state, 2) * d_state**-0.5)
        self.D = nn.Parameter(torch.randn(d_model))

    def lift(self, x):
        decay = torch.exp(torch.complex(-torch.exp(self.nu_log), torch.exp(self.theta_log)))
        return decay, _lift(x, torch.exp(self.gamma_log)[:, None, None] * self.B)

    def readout(self, h, x):
        return torch.addcmul(_read(h, self.C), self.D, x)


class S5Cell(Cell):
    """Simplified state space layer (Smith et al. 2022, arXiv 2208.04933, sections 3 and 4.3).

        h_t = exp(Lambda Delta) h_{t-1} + Lambda^-1 (exp(Lambda Delta) - 1) B x_t    (zero-order hold, their eq. 6)
        y_t = 2 Re(C h_t) + D x_t                                       (one of each conjugate pair is kept)

    At the start Lambda holds the eigenvalues of `blocks` HiPPO-N matrices on the diagonal, B and C are rotated into
    their eigenvectors V (B~ = V* B, C~ = C V), and the time steps Delta, one a state, are log-uniform in [dt_min,
    dt_max]. The real part of Lambda is kept negative as -exp(.), so that the state can't grow on long tapes (Goel et
    al. 2022).
    """

    is_complex = True

    def __init__(self, d_model, d_state=128, blocks=8, dt_min=0.001, dt_max=0.1):
        super().__init__()
        if d_state % blocks:
            raise ValueError(f"S5: d_state ({d_state}) must be a multiple of blocks ({blocks})")
        self.state_shape = (d_state,)
        n = 2 * d_state // blocks  # the size of one HiPPO matrix; half of its eigenvalues are kept
        p = torch.sqrt(torch.arange(n, dtype=torch.float64) + 0.5)
        skew = torch.tril(-2 * torch.outer(p, p), -1)
        skew = (skew - skew.T) / 2  # HiPPO-N = -1/2 I + skew: the normal part of HiPPO-LegS
        imag, V = torch.linalg.eigh(-1j * skew)
        imag, V = imag[: n // 2].float(), V[:, : n // 2].to(torch.complex64)  # (n/2,), (n, n/2)
        B = torch.randn(blocks, n, d_model) * d_model**-0.5
        C = torch.view_as_complex(torch.randn(d_model, blocks, n, 2)) * (blocks * n) ** -0.5
        self.log_real = nn.Parameter(torch.full((d_state,), math.log(0.5)))
        self.imag = nn.Parameter(imag.repeat(blocks))
        self.log_dt = nn.Parameter(torch.empty(d_state).uniform_(math.log(dt_min), math.log(dt_max)))
        self.B = nn.Parameter(torch.view_as_real((V.mH @ B.to(V.dtype)).flatten(0, 1)).transpose(1, 2).contiguous())
        self.C = nn.Parameter(torch.view_as_real((C @ V).flatten(1).conj().resolve_conj()))
        self.D = nn.Parameter(torch.randn(d_model))

    def lift(self, x):
        Lambda = torch.complex(-torch.exp(self.log_real), self.imag)
        dt = torch.exp(self.log_dt)
        decay = torch.exp(Lambda * dt)
        held = torch.expm1(Lambda * dt) / Lambda  # what a row's input amounts to, held for dt
        B = held[:, None] * torch.complex(*self.B.unbind(1))
        return decay, _lift(x, torch.view_as_real(B).transpose(1, 2))

    def readout(self, h, x):
        return torch.addcmul(_read(h, 2 * self.C), self.D, x)


class FFMCell(Cell):
    """Fast and Forgetful Memory (Morad et al. 2023, arXiv 2310.04128, sections 3 and 4).

        x~_t = l1(x_t) * sigmoid(l2(x_t))                    (input gate)
        S_t  = gamma * S_{t-1} + x~_t 1^T                    (an m x c matrix: m traces, each at c frequencies)
        gamma_jk = exp(-|alpha_j|) exp(i omega_k)
        z_t  = l3(Re S_t, Im S_t)

    At the start exp(-|alpha|) spans what halves at every row to what has faded to beta = 1% after t_e = `horizon` rows,
    and omega the periods from 1 to t_e. Theirs were 32 traces, 4 frequencies and t_e = 1024, that is one period of a
    row, which is none, and the next of 342; as many states tell recent rows apart much sooner as they are set here. The
    paper's last step, normalise, gate and skip, is what every memory here gets around it.
    """

    is_complex = True

    def __init__(self, d_model, num_traces=4, num_frequencies=32, horizon=64, beta=0.01):
        super().__init__()
        self.state_shape = (num_traces, num_frequencies)
        fastest = math.log(torch.finfo(torch.float64).max) / 1024  # they need exp(1024 alpha) finite
        self.alpha = nn.Parameter(torch.linspace(fastest, -math.log(beta) / horizon, num_traces))
        self.omega = nn.Parameter(2 * math.pi / torch.linspace(1, horizon, num_frequencies))
        self.input = nn.Linear(d_model, 2 * num_traces)
        self.output = nn.Linear(2 * num_traces * num_frequencies, d_model)

    def lift(self, x):
        decay = torch.exp(torch.complex(*torch.broadcast_tensors(-self.alpha.abs()[:, None], self.omega)))  # (m, c)
        return decay, F.glu(self.input(x))[..., None].expand(*x.shape[:2], *self.state_shape).to(decay.dtype)

    def readout(self, h, x):
        return self.output(torch.view_as_real(h).flatten(2))


class LinearTransformerCell(Cell):
    """Linear transformer (Katharopoulos et al. 2020, arXiv 2006.16236, section 3.3), of `num_heads` heads.

        S_t = S_{t-1} + R_t phi(k_t) v_t^T      z_t = z_{t-1} + phi(k_t)      phi(x) = elu(x) + 1      (their eq. 7, 18,
        19)
        y_t = (R_t phi(q_t))^T S_t / phi(q_t)^T z_t                                                    (their eq. 20)

    The monoid is the sum of (kv, k). A sum can't tell what came first, so, like any transformer, this one encodes
    positions: R_t is the rotation of rotary embeddings, which in linear attention belongs in the numerator alone (Su et
    al. 2021, arXiv 2104.09864, eq. 19), pairs of features turning by omega_j t. Only the angle between q_t and k_s
    counts, so the sum may as well be kept in the frame that turns with the query: S_t = R_1^-1 S_{t-1} + phi(k_t)
    v_t^T. That is again the affine monoid, of decay exp(-i omega_j), and needs no clock. z is one column more, of decay
    1. The omega_j are spread evenly up to pi.
    """

    is_complex = True

    def __init__(self, d_model, num_heads=2, d_key=32, d_value=8):
        super().__init__()
        self.state_shape = (num_heads, d_key // 2, d_value + 1)  # (S, z), its pairs of rows as complex numbers
        self.query = nn.Linear(d_model, num_heads * d_key)
        self.key = nn.Linear(d_model, num_heads * d_key)
        self.value = nn.Linear(d_model, num_heads * d_value)
        self.output = nn.Linear(num_heads * d_value, d_model)
        pairs = num_heads * d_key // 2
        omega = math.pi * torch.arange(1, pairs + 1).reshape(-1, num_heads).T / pairs
        self.register_buffer("omega", F.pad(omega[..., None].repeat(1, 1, d_value), (0, 1)))  # state_shape

    def heads(self, x):
        return x.unflatten(-1, (self.state_shape[0], -1))  # (T, B, heads, size)

    def lift(self, x):
        k = torch.view_as_complex((F.elu(self.heads(self.key(x))) + 1).unflatten(-1, (-1, 2)))
        v = F.pad(self.heads(self.value(x)), (0, 1), value=1.0)
        return torch.polar(torch.ones_like(self.omega), -self.omega), k[..., :, None] * v[..., None, :]

    def readout(self, h, x):
        q = F.elu(self.heads(self.query(x))) + 1
        h = torch.view_as_real(h).transpose(-1, -2).flatten(-3, -2)  # (T, B, heads, d_key, d_value + 1)
        y = (q[..., None, :] @ h).squeeze(-2)
        return self.output((y[..., :-1] / y[..., -1:]).flatten(2))


class GRUCell(nn.Module):
    """`torch.nn.GRU`, run episode by episode: a yardstick that is no monoid, so time is a loop over the longest one."""

    def __init__(self, d_model, d_state=128):
        super().__init__()
        self.gru = nn.GRU(d_model, d_state)
        self.output = nn.Linear(d_state, d_model)

    def initial_state(self, B):
        return self.gru.weight_hh_l0.new_zeros(B, self.gru.hidden_size)

    def forward(self, x, state, start):
        T, B = start.shape
        begins = start.clone()
        begins[0] = True
        b, t = begins.T.nonzero(as_tuple=True)  # where each piece of an episode begins, sequence by sequence
        lengths = torch.diff(b * T + t, append=b.new_tensor([B * T]))
        rows = torch.arange(B * T, device=x.device).split(lengths.tolist())
        rows = nn.utils.rnn.pack_sequence(rows, enforce_sorted=False)  # one gather, not a slice for each piece
        h = torch.where(start[t, b][:, None], 0, state[b])  # (pieces, d_state)
        y, h = self.gru(rows._replace(data=x.transpose(0, 1).flatten(0, 1)[rows.data]), h[None])
        y = y.data[rows.data.argsort()].unflatten(0, (B, T)).transpose(0, 1)
        last = torch.cat((b[1:] != b[:-1], b.new_ones(1, dtype=torch.bool)))
        return self.output(y), h[0, last]


# ---------------------------------------------------------------------------------------------------------------------
# What sits around a cell, the same for all of them


class Memory(nn.Module):
    """`num_layers` residual blocks around a cell, pre-normalised and gated as in S5 and LRU; the cell is all that
    differs.

        x <- x + GLU(W gelu(norm(cell(norm(x)))))

    Every class in MEMORIES that derives from this takes d_model, num_layers and the sizes of its cell.
    initial_state(B):   the state before any row: a tuple of one tensor (B, ...) a layer
    memory(x, state, start): x (T, B, d_model) float, start (T, B) bool -> y (T, B, d_model), the state after row T-1. A
    row whose start is True is consumed from the initial state, whatever state came before it. T >= 1. All rows at once,
    one row at a time with the state carried over, or any cut in between give the same y.
    """

    cell = None

    def __init__(self, d_model, num_layers=2, **sizes):
        super().__init__()
        self.cells = nn.ModuleList(self.cell(d_model, **sizes) for _ in range(num_layers))
        self.norms = nn.ModuleList(nn.LayerNorm(d_model) for _ in range(2 * num_layers))
        self.gates = nn.ModuleList(nn.Linear(d_model, 2 * d_model) for _ in range(num_layers))

    def initial_state(self, B):
        return tuple(cell.initial_state(B) for cell in self.cells)

    def forward(self, x, state, start):
        after = []
        norms = self.norms[::2], self.norms[1::2]
        for cell, norm, norm2, gate, h in zip(self.cells, *norms, self.gates, state, strict=True):
            y, h = cell(norm(x), h, start)
            x = x + F.glu(gate(F.gelu(norm2(y))))
            after.append(h)
        return x, tuple(after)


class LRU(Memory):
    cell = LRUCell


class S5(Memory):
    cell = S5Cell


class FFM(Memory):
    cell = FFMCell


class LinearTransformer(Memory):
    cell = LinearTransformerCell


class GRU(Memory):
    cell = GRUCell


class NoMemory(nn.Module):
    """Remembers nothing and passes its input through: the control of every experiment. Its state is an empty tensor."""

    def __init__(self, d_model):
        super().__init__()

    def initial_state(self, B):
        return torch.zeros(B, 0)

    def forward(self, x, state, start):
        return x, state


MEMORIES = {"lru": LRU, "s5": S5, "ffm": FFM, "linear_transformer": LinearTransformer, "gru": GRU, "none": NoMemory}
