"""Memory for reinforcement learning, from one idea: a monoid, scanned over time.

A *monoid* (H, •, e) is a set H with an associative operation • and an identity e. Because • is associative, all its
prefixes x_0, x_0 • x_1, x_0 • x_1 • x_2, ... can be computed as a tree instead of a chain, in O(log T) steps. A *memory
monoid* ("Revisiting Recurrent Reinforcement Learning with Memory Monoids", Morad et al. 2024, arXiv 2402.09900) is a
memory model written as

    lift f: O -> H          maps one observation to an element of the monoid
    scan of • over time     combines all elements up to now: the state
    readout g: H x O -> S   maps the state and the observation to the output

Any monoid can be made *resettable*: one scan then runs over many concatenated episodes, a *tape*, and no information
passes between them. Discounted returns and advantages are scans of the same kind, backwards in time.

Time is dimension 0, as in `torch.nn.GRU`. Shapes: T rows (time steps), B parallel sequences, D features.
"""

import cmath
import functools
import importlib.util
import math
import os

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor


# ---------------------------------------------------------------------------------------------------------------------
# Monoids and their scan


class Monoid:
    """A set with an associative operation and an identity. To add one, subclass this and define the two methods.

    An element is a tensor or a (nested) tuple of tensors, with any number of leading (time, batch) dimensions. Laws:
        (a • b) • c = a • (b • c)        and        e • a = a = a • e
    """

    def identity(self, like):
        """Identity elements with the structure, shapes, dtype and device of the elements `like`."""
        raise NotImplementedError

    def op(self, left, right):
        """left • right, elementwise over the leading dimensions, maybe over no rows; `left` is the earlier in time. Not
        in place.
        """
        raise NotImplementedError


class Affine(Monoid):
    """The maps h -> a h + b under composition; elements (a, b), two tensors of the same shape.

    (a, b) • (a', b') = (a a', a' b + b'), e = (1, 0). A scan's second component is h_t = a_t h_{t-1} + b_t, h_{-1} = 0.
    """

    def identity(self, like):
        return torch.ones_like(like[0]), torch.zeros_like(like[1])

    def op(self, left, right):
        (a, b), (a2, b2) = left, right
        return a * a2, a2 * b + b2


class resettable(Monoid):  # in lower case: it is used as a function from monoid to monoid
    """Any monoid, with a flag that starts a new episode. Section 4 of the paper:

        (A, b) o (A', b') = (A • A', b or b')  where b' = 0
                            (e • A', 1)        where b' = 1

    Elements are (elements of `monoid`, start): start is bool (in other dtypes, nonzero is True), (T,) or (T, B), the
    leading dimensions of the elements. In a scan, no value and no gradient crosses a start, not even NaN.
    """

    def __init__(self, monoid):
        self.monoid = monoid

    def identity(self, like):
        return self.monoid.identity(like[0]), torch.zeros_like(like[1])

    def op(self, left, right):
        (A, b), (A2, b2) = left, right
        A = tree_map(lambda x, e: torch.where(_expand(b2.bool(), x), e, x), A, self.monoid.identity(A))
        return self.monoid.op(A, A2), (b.bool() | b2.bool()).to(b2.dtype)


def _expand(start, x):
    """start (T,) or (T, B) -> with as many dimensions as x (T, B, ...)"""
    fits = start.shape[:1] == x.shape[:1] and all(n in (1, m) for n, m in zip(start.shape, x.shape))
    if start.ndim > x.ndim or not fits:
        raise ValueError(f"start or done {tuple(start.shape)} does not fit {tuple(x.shape)}")
    return start.reshape(start.shape + (1,) * (x.ndim - start.ndim))


def tree_map(f, *trees):
    """f over the tensors of (nested) tuples of equal structure."""
    if isinstance(trees[0], tuple):
        return tuple(tree_map(f, *branches) for branches in zip(*trees, strict=True))
    return f(*trees)


def scan(monoid, elements, reverse=False):
    """All prefixes of •: result_t = x_0 • x_1 • ... • x_t.

    elements: a tensor or a (nested) tuple of tensors, (T, ...) each; ValueError if T is 0 or not the same for all. The
    result has the same structure and shapes. reverse: result_t = x_{T-1} • ... • x_{t+1} • x_t instead (flip, scan,
    flip).

    A scan over the products of adjacent pairs gives the prefixes that end on odd rows; one more call of `op` gives
    those that end on even rows: fewer than 2T products, in at most 2 log2(T) calls (Blelloch 1990, "Prefix sums and
    their applications").
    """
    if reverse:
        flip = lambda x: x.flip(0)
        return tree_map(flip, scan(monoid, tree_map(flip, elements)))
    lengths = set()
    tree_map(lambda x: lengths.add(len(x)), elements)
    T, *others = lengths
    if T < 1 or others:
        raise ValueError(f"scan: all elements must have the same length, at least one row; here {sorted(lengths)}")
    if T == 1:
        return elements
    rows = lambda tree, *index: tree_map(lambda x: x[slice(*index)], tree)
    odd = scan(monoid, monoid.op(rows(elements, 0, T - 1, 2), rows(elements, 1, T, 2)))  # rows 1, 3, 5, ...
    later = monoid.op(rows(odd, (T - 1) // 2), rows(elements, 2, T, 2))  # rows 2, 4, 6, ...
    even = tree_map(lambda *x: torch.cat(x), rows(elements, 0, 1), later)

    def interleave(even, odd):
        pairs = torch.stack((even[: len(odd)], odd), 1).flatten(0, 1)
        return torch.cat((pairs, even[len(odd) :]))  # if T is odd, there is one more even row

    return tree_map(interleave, even, odd)


# ---------------------------------------------------------------------------------------------------------------------
# The scan of the affine monoid: linear recurrences


def linear_recurrence(decay, x, initial=None, reverse=False, start=None):
    """h_t = decay_t h_{t-1} + x_t, the recurrence in every memory and return of this file.

    x:       (T, ...), T >= 1, real or complex
    decay:   broadcasts to x, as in (D,), (T, 1, D) or (T, B, D)
    initial: h before the first row (after the last row if reverse), broadcasts to (...). None: zero
    reverse: h_t = decay_t h_{t+1} + x_t instead
    start:   bool (in other dtypes, nonzero is True), (T,) or (T, B): the leading dimensions of x. h_t = x_t where it is
             True: not even NaN passes from the state before. None: no resets
    Returns h (T, ...), in the dtype of torch.promote_types of decay, x and initial. ValueError if T is 0, ValueError or
    RuntimeError if shapes do not broadcast.

    Decays are multiplied over many rows: where such a product overflows, which none does if |decay| <= 1, h may be NaN
    where a loop over time gives a number. (On a GPU, NaN does not pass a decay of exactly 0 either.) With initial None
    h equals `scan(Affine(), (decay, x))[1]`, with start `scan(resettable(Affine()), ((decay, x), start))[0][1]`.
    The backward pass is the same recurrence, reversed, and saves only decay and, for its gradient, h, in O(T) memory:
        dL/dx_t = dL/dh_t + conj(decay_{t+1}) dL/dx_{t+1}        dL/ddecay_t = dL/dx_t conj(h_{t-1})
    Works with higher derivatives and with torch.func's grad, jacrev and vmap, not with forward-mode derivatives (jvp)
    nor with `is_grads_batched` of torch.autograd.grad.
    """
    if len(x) < 1:
        raise ValueError("linear_recurrence: a sequence of at least one row is needed, got none")
    initial = x.new_zeros(()) if initial is None else initial
    dtype = torch.promote_types(torch.promote_types(decay.dtype, x.dtype), initial.dtype)
    decay = decay.reshape((1,) * (x.ndim - decay.ndim) + decay.shape)
    start = start if start is None else start.bool()
    return _LinearRecurrence.run(decay.to(dtype), x.to(dtype), initial.to(dtype).expand(x.shape[1:]), start, reverse)


class _LinearRecurrence(torch.autograd.Function):
    @classmethod
    def run(cls, *inputs):  # without gradients no `apply`: for one row it costs more than the recurrence
        transformed = torch._C._are_functorch_transforms_active()  # torch.func
        return cls.apply(*inputs) if torch.is_grad_enabled() or transformed else cls.forward(*inputs)

    @staticmethod
    def forward(decay, x, initial, start, reverse):
        return (_recur_op if torch.compiler.is_compiling() else _recur)(decay, x, initial, start, reverse)

    @staticmethod
    def setup_context(ctx, inputs, output):
        decay, _, initial, start, ctx.reverse = inputs
        ctx.save_for_backward(decay, initial, start, output if ctx.needs_input_grad[0] else None)

    @staticmethod
    def backward(ctx, grad):
        decay, initial, start, h = ctx.saved_tensors
        first, last, shift = (-1, 0, 1) if ctx.reverse else (0, -1, -1)
        next_decay = decay.roll(shift, 0).conj().resolve_conj()
        next_start = None if start is None else start.roll(shift, 0)
        if len(decay) == len(grad):
            next_decay[last] = 0  # nothing follows it; what was rolled there is the first row's decay, maybe NaN
        grad_x = _LinearRecurrence.run(next_decay, grad, torch.zeros_like(initial), next_start, not ctx.reverse)
        grad_initial, grad_decay = grad_x[first] * decay[first].conj(), None
        if start is not None:
            grad_initial = torch.where(_expand(start, grad)[first], 0, grad_initial)
        if ctx.needs_input_grad[0]:
            previous = torch.cat((h[1:], initial[None]) if ctx.reverse else (initial[None], h[:-1]))  # h_{t-1}
            if start is not None:
                previous.masked_fill_(_expand(start, h), 0)
            grad_decay = (previous.conj() * grad_x).sum_to_size(decay.shape)
        return grad_decay, grad_x, grad_initial, None, None

    @staticmethod
    def vmap(info, in_dims, decay, x, initial, start, reverse):  # the mapped dimension comes after time: x (T, V, ...)
        move = lambda y, dim, to: y if y is None else y.unsqueeze(to) if dim is None else y.movedim(dim, to)
        decay, x, initial, start = map(move, (decay, x, initial, start), in_dims, (1, 1, 0, 1))
        x = x.expand(-1, info.batch_size, *x.shape[2:])
        return _LinearRecurrence.run(decay, x, initial.expand(x.shape[1:]), start, reverse), 1


# ---------------------------------------------------------------------------------------------------------------------
# Returns and advantages: the same recurrence, backwards over a tape


def discounted_return(gamma, reward, done, next_value=None):
    """Discounted returns of every row of a tape of many episodes, in one reverse scan.

        G_t = r_t + gamma * next_value_t    where done_t or t = T-1
        G_t = r_t + gamma * G_{t+1}         elsewhere

    gamma: the discount, a float or a tensor that broadcasts; reward (T, ...) float; done bool, of the shape of reward
    or its leading dimensions: the episode ended here, terminated or truncated; next_value (T, ...): the value of the
    state that follows, read only where a row is done or the last (None: zero). Pass 0 there for a terminal state.
    Returns G (T, ...). ValueError or RuntimeError if another argument would enlarge reward. Section 4 of the paper.
    """
    if next_value is not None:
        ends = _expand(done, reward).bool().clone()
        ends[-1:] = True
        bootstrap = gamma * torch.where(ends, next_value, 0)
        if torch.broadcast_shapes(bootstrap.shape, reward.shape) != reward.shape:
            raise ValueError(f"discounted_return: gamma or next_value, {bootstrap.shape}, would enlarge {reward.shape}")
        reward = reward + bootstrap
    # backwards in time, an episode starts where it is done
    return linear_recurrence(gamma * reward.new_ones(1), reward, reverse=True, start=done)


def gae(gamma, lmbda, value, next_value, reward, done, terminated=None):
    """Generalised advantage estimates of every row of a tape of many episodes, in one reverse scan.

        delta_t = r_t + gamma * (1 - terminated_t) * next_value_t - value_t
        A_t = delta_t + gamma * lmbda * (1 - done_t) * A_{t+1}        (Schulman et al. 2016, arXiv 1506.02438)

    gamma, lmbda: floats or tensors that broadcast; value, next_value, reward (T, ...) float: next_value is the value of
    the state that follows row t, read only where not terminated; done bool, of their shape or its leading dimensions:
    the episode ended here, terminated or truncated; terminated, likewise: it ended in a terminal state (None: wherever
    done). The last row bootstraps from next_value unless terminated. Returns A (T, ...); the targets of the values,
    lambda-returns, are A + value. ValueError or RuntimeError if the shapes of value, next_value and reward differ or
    other arguments would enlarge them.
    """
    if not value.shape == next_value.shape == reward.shape:
        raise ValueError(f"gae: shapes differ: {value.shape}, {next_value.shape} and {reward.shape}")
    terminated = _expand(done if terminated is None else terminated, reward).bool()
    delta = reward + gamma * torch.where(terminated, 0, next_value) - value
    if delta.shape != reward.shape:
        raise ValueError(f"gae: gamma would enlarge {reward.shape} to {delta.shape}")
    return linear_recurrence(gamma * lmbda * delta.new_ones(1), delta, reverse=True, start=done)


# ---------------------------------------------------------------------------------------------------------------------
# Memory models: lift, affine monoid, readout


class Cell(nn.Module):
    """A memory model. Subclasses define how a row is lifted and how the state is read. To add one, put it into CELLS.

    lift(x):       x (T, B, D) -> (decay, b), arguments of `linear_recurrence`: b (T, B, ...), decay broadcasts to it
    readout(h, x): h (T, B, ...), x (T, B, D) -> y (T, B, D)
    state_shape:   the dimensions of the state, `...` above
    is_complex:    whether the state is complex (then no half precision: PyTorch has no complex bfloat16)

    A model of another monoid overrides initial_state and forward, with `scan(resettable(monoid), (elements, start))`
    over T + 1 rows, the state, whose start is False, and the lifted rows, and drops the first result; or with a loop,
    as the GRU.
    """

    is_complex = False

    def initial_state(self, B):
        p = next(self.parameters())
        dtype = torch.promote_types(p.dtype, torch.complex32) if self.is_complex else p.dtype
        return torch.zeros(B, *self.state_shape, device=p.device, dtype=dtype)

    def forward(self, x, state, start):
        decay, b = self.lift(x)
        state = torch.where(_expand(start[0], state), 0, state)  # else NaN in it would make linear_recurrence slow
        h = linear_recurrence(decay, b, state, start=start)
        return self.readout(h, x), h[-1].clone()  # a view would keep all of h in memory


class LRUCell(Cell):
    """Linear Recurrent Unit (Orvieto et al. 2023, arXiv 2303.06349, section 3 and appendix A).

        h_t = lambda h_{t-1} + exp(gamma_log) B x_t        y_t = Re(C h_t) + D x_t            (their eq. 1 and 7)
        lambda = exp(-exp(nu_log) + i theta),              so that |lambda| < 1               (stable)

    gamma = sqrt(1 - |lambda|^2) initially, which gives the state the variance of its input, and B and C are
    Glorot-initialised. Three things differ from the paper, the last two for delays of thousands of rows:
    1. States decay to 1/e in min_horizon to horizon rows, log-uniformly. The paper's ring (Lemma 3.2) is uniform in
       area: depending on its radii, few are slow or few are fast.
    2. theta is not trained (log theta is, there): a change of 1e-3 turns what was written 1,000 rows ago by a radian.
    3. D begins at 0, not at random: D x_t would drown what a state holds, which is written with a gain of gamma, 0.045
       at a horizon of 1,000.
    """

    def __init__(self, d_model, d_state=128, horizon=1000, max_phase=2 * math.pi, min_horizon=1):
        super().__init__()
        if min_horizon > horizon:
            raise ValueError(f"LRU: min_horizon ({min_horizon}) must not exceed horizon ({horizon})")
        self.state_shape, self.is_complex = (d_state,), True
        self.nu_log = nn.Parameter(torch.empty(d_state).uniform_(-math.log(horizon), -math.log(min_horizon)))
        self.register_buffer("theta", max_phase * torch.rand(d_state))
        self.gamma_log = nn.Parameter(0.5 * torch.log(-torch.expm1(-2 * self.nu_log.detach().exp())))
        self.B = nn.Parameter(torch.randn(d_state, 2, d_model) * (2 * d_model) ** -0.5)  # (Re B, Im B)
        self.C = nn.Parameter(torch.randn(d_model, d_state, 2) * d_state**-0.5)  # (Re C, -Im C)
        self.D = nn.Parameter(torch.zeros(d_model))

    def lift(self, x):
        decay = torch.exp(-torch.exp(self.nu_log) + 1j * self.theta)
        B = torch.exp(self.gamma_log)[:, None, None] * self.B
        b = F.linear(x, B.flatten(0, 1)).to(B.dtype).unflatten(-1, (-1, 2))  # autocast gives bfloat16, never complex
        return decay, torch.view_as_complex(b)  # (N,), (T, B, N)

    def readout(self, h, x):  # Re(C h) as one real product
        return torch.addcmul(F.linear(torch.view_as_real(h).flatten(-2), self.C.flatten(1)), self.D, x)


class S5Cell(Cell):
    """Simplified state space layer (Smith et al. 2022, arXiv 2208.04933, sections 3 and 4.3).

        h_t = exp(Lambda Delta) h_{t-1} + Lambda^-1 (exp(Lambda Delta) - 1) B x_t    (zero-order hold, their eq. 6)
        y_t = 2 Re(C h_t) + D x_t                                       (one of each conjugate pair is kept)

    At initialisation Lambda holds the eigenvalues of `blocks` HiPPO-N matrices, B and C are rotated into their
    eigenvectors V (B~ = V* B, C~ = C V), and the time steps Delta, one for each state, are log-uniform, such that
    states decay to 1/e in horizon/100 to horizon rows. Re Lambda = -exp(.) < 0 keeps the state stable on long tapes
    (as in S4D, Gu et al. 2022, arXiv 2206.11893).
    """

    def __init__(self, d_model, d_state=128, blocks=8, horizon=2000):
        super().__init__()
        if d_state % blocks:
            raise ValueError(f"S5: d_state ({d_state}) must be a multiple of blocks ({blocks})")
        self.state_shape, self.is_complex = (d_state,), True
        n = 2 * d_state // blocks  # the size of one HiPPO matrix; one eigenvalue of each conjugate pair is kept
        p = torch.sqrt(torch.arange(n, dtype=torch.float64) + 0.5)
        skew = torch.tril(-2 * torch.outer(p, p), -1)
        skew = (skew - skew.T) / 2  # HiPPO-N = -1/2 I + skew: the normal part of HiPPO-LegS
        imag, V = torch.linalg.eigh(-1j * skew)
        dtype = torch.get_default_dtype()
        imag, V = imag[: n // 2].to(dtype), V[:, : n // 2].to(dtype.to_complex())  # (n/2,), (n, n/2)
        B = torch.randn(blocks, n, d_model) * d_model**-0.5
        C = torch.view_as_complex(torch.randn(d_model, blocks, n, 2)) * (blocks * n) ** -0.5
        self.log_real = nn.Parameter(torch.full((d_state,), math.log(0.5)))
        self.imag = nn.Parameter(imag.repeat(blocks))
        self.log_dt = nn.Parameter(torch.empty(d_state).uniform_(math.log(2 / horizon), math.log(200 / horizon)))
        self.B = nn.Parameter(torch.view_as_real((V.mH @ B.to(V.dtype)).flatten(0, 1)).transpose(1, 2).contiguous())
        self.C = nn.Parameter(torch.view_as_real((C @ V).flatten(1).conj().resolve_conj()))
        self.D = nn.Parameter(torch.randn(d_model))

    def lift(self, x):
        Lambda, dt = torch.complex(-torch.exp(self.log_real), self.imag), torch.exp(self.log_dt)
        decay = torch.exp(Lambda * dt)
        B = torch.view_as_real((torch.expm1(Lambda * dt) / Lambda)[:, None] * torch.complex(*self.B.unbind(1)))
        b = F.linear(x, B.transpose(1, 2).flatten(0, 1)).to(B.dtype).unflatten(-1, (-1, 2))
        return decay, torch.view_as_complex(b)  # (N,), (T, B, N)

    def readout(self, h, x):
        return torch.addcmul(F.linear(torch.view_as_real(h).flatten(-2), (2 * self.C).flatten(1)), self.D, x)


class FFMCell(Cell):
    """Fast and Forgetful Memory (Morad et al. 2023, arXiv 2310.04128, sections 3 and 4).

        x~_t = l1(x_t) * sigmoid(l2(x_t))                    (input gate)
        S_t  = gamma * S_{t-1} + x~_t 1^T                    (an m x c matrix: m traces, each at c frequencies)
        gamma_jk = exp(-|alpha_j|) exp(i omega_k)
        z_t  = l3(Re S_t, Im S_t)

    At initialisation exp(-|alpha|) ranges from 1/2 to beta^(1 / horizon), which leaves beta = 1% after `horizon` rows;
    the periods 2 pi / omega range from 1 row to `horizon`. The authors' runs on POPGym have 32 traces with 4 periods
    (1, 342, 683 and 1,024 rows), with which recent rows are harder to tell apart and old ones are remembered longer.
    The residual block of `Memory` replaces the paper's last step (normalise, gate, skip).
    """

    def __init__(self, d_model, num_traces=4, num_frequencies=32, horizon=64, beta=0.01):
        super().__init__()
        self.state_shape, self.is_complex = (num_traces, num_frequencies), True
        fastest = math.log(torch.finfo(torch.float64).max) / 1024  # theirs: exp(1024 alpha) must be finite
        self.alpha = nn.Parameter(torch.linspace(fastest, -math.log(beta) / horizon, num_traces))
        self.omega = nn.Parameter(2 * math.pi / torch.linspace(1, horizon, num_frequencies))
        self.input = nn.Linear(d_model, 2 * num_traces)
        self.output = nn.Linear(2 * num_traces * num_frequencies, d_model)

    def lift(self, x):
        decay = torch.exp(-self.alpha.abs()[:, None] + 1j * self.omega)  # (m, c)
        return decay, F.glu(self.input(x))[..., None].expand(*x.shape[:2], *self.state_shape)

    def readout(self, h, x):
        return self.output(torch.view_as_real(h).flatten(2))


class LinearTransformerCell(Cell):
    """Linear transformer (Katharopoulos et al. 2020, arXiv 2006.16236, section 3.4), of `num_heads` heads.

        S_t = S_{t-1} + R_t phi(k_t) v_t^T    z_t = z_{t-1} + phi(k_t)    phi(x) = elu(x) + 1    (their eq. 7, 18, 19)
        y_t = (R_t phi(q_t))^T S_t / phi(q_t)^T z_t                                              (their eq. 20)

    A sum ignores order, so positions are encoded: R_t rotates pairs of features by omega_j t (rotary embeddings; in
    linear attention only in the numerator, Su et al. 2021, arXiv 2104.09864, eq. 19). Only the angle between q_t and
    k_s matters, so S_t can be kept in the frame of the query, S_t = R_1^-1 S_{t-1} + phi(k_t) v_t^T: the affine monoid
    with decay exp(-i omega_j). z is one more column, with decay 1. The omega_j are evenly spaced up to pi.
    """

    def __init__(self, d_model, num_heads=2, d_key=32, d_value=8):
        super().__init__()
        if d_key < 2 or d_key % 2:
            raise ValueError(f"linear transformer: d_key ({d_key}) must be even and at least 2")
        self.state_shape, self.is_complex = (num_heads, d_key // 2, d_value + 1), True  # (S, z) in complex pairs
        self.num_heads = num_heads
        self.query = nn.Linear(d_model, num_heads * d_key)
        self.key = nn.Linear(d_model, num_heads * d_key)
        self.value = nn.Linear(d_model, num_heads * d_value)
        self.output = nn.Linear(num_heads * d_value, d_model)
        pairs = num_heads * d_key // 2
        omega = math.pi * torch.arange(1, pairs + 1).reshape(-1, num_heads).T / pairs
        self.register_buffer("omega", F.pad(omega[..., None].repeat(1, 1, d_value), (0, 1)))  # state_shape

    @staticmethod
    def phi(x):  # elu(x) + 1, computed so that it does not round to 0 where x is far below 0: 0 / 0 would be NaN
        return F.relu(x) + torch.exp(x.clamp(max=0))

    def lift(self, x):
        k = self.phi(self.key(x).to(self.key.weight.dtype)).unflatten(-1, (self.num_heads, -1, 2))
        k = torch.view_as_complex(k)  # (T, B, heads, d_key / 2)
        v = F.pad(self.value(x).unflatten(-1, (self.num_heads, -1)), (0, 1), value=1.0)  # (T, B, heads, d_value + 1)
        return torch.exp(-1j * self.omega), k[..., :, None] * v[..., None, :]

    def readout(self, h, x):
        q = self.phi(self.query(x)).unflatten(-1, (self.num_heads, 1, -1))  # (T, B, heads, 1, d_key)
        h = torch.view_as_real(h).transpose(-1, -2).flatten(-3, -2)  # (T, B, heads, d_key, d_value + 1)
        y = (q @ h).squeeze(-2)  # (T, B, heads, d_value + 1)
        return self.output((y[..., :-1] / y[..., -1:]).flatten(2))


class MinGRUCell(Cell):
    """minGRU (Feng et al. 2024, "Were RNNs All We Needed?", arXiv 2410.01201, section 3.1).

        h_t = (1 - z_t) h_{t-1} + z_t h~_t        z_t = sigmoid(W_z x_t + b_z)        h~_t = W_h x_t + b_h

    The decay depends on the input: the cell can hold a state until the input replaces it. As in chrono initialisation
    (Tallec & Ollivier 2018, arXiv 1804.11188), the forget bias -b_z is initialised to log u, but with u log-uniform in
    [1, horizon] instead of uniform: where the input is 0, a state decays to 1/e in about u rows.
    """

    def __init__(self, d_model, d_state=192, horizon=1000):
        super().__init__()
        self.state_shape = (d_state,)
        self.gate = nn.Linear(d_model, d_state)
        self.candidate = nn.Linear(d_model, d_state)
        self.output = nn.Linear(d_state, d_model)
        nn.init.uniform_(self.gate.bias, -math.log(horizon), 0)

    def lift(self, x):
        z = torch.sigmoid(self.gate(x).to(self.gate.weight.dtype))  # (T, B, d_state); autocast would round 1 - z to 1
        return 1 - z, z * self.candidate(x)

    def readout(self, h, x):
        return self.output(h)


class GRUCell(nn.Module):
    """`torch.nn.GRU`, a baseline that is not a monoid: it loops over as many time steps as the longest episode has,
    and pads the others to that length, so memory is O(longest episode x number of episodes).
    """

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
        b, t = begins.T.nonzero(as_tuple=True)  # the first row of each episode (or rest of one), sequence by sequence
        first = b * T + t
        lengths = torch.diff(first, append=b.new_tensor([B * T]))
        step = torch.arange(int(lengths.max()), device=x.device)[:, None]
        rows = first + torch.minimum(step, lengths - 1)  # (longest, episodes): repeats of its last row fill a short one
        h = torch.where(start[t, b][:, None], 0, state[b])  # (episodes, d_state)
        # not packed: on a CPU the backward pass of a packed sequence takes time quadratic in its length
        y, _ = self.gru(x.transpose(0, 1).flatten(0, 1)[rows], h[None])
        y = y.transpose(0, 1)[(step < lengths).T].unflatten(0, (B, T)).transpose(0, 1)  # (T, B, d_state)
        return self.output(y), y[-1].clone()


class Memory(nn.Module):
    """A stack of cells, each in a residual block with a GLU, as in LRU, and norms before and after the cell:

        x <- x + GLU(W gelu(norm(cell(norm(x)))))

    Memory(d, [LRUCell(d), MinGRUCell(d)]) is a stack of two layers. A list of no cells is no memory: y = x.

    initial_state(B): the state before any row: a tuple with one tensor (B, ...) for each cell
    memory(x, state, start): x (T, B, d_model) float, T >= 1; start (T, B) bool (in other dtypes, nonzero is True) -> y
        (T, B, d_model), the state after row T-1. A row whose start is True sees the initial state instead of what came
        before it, NaN included. All rows at once, one row at a time with the state carried over, or any other split
        give the same y. Raises ValueError if the shape of start or the state's batch size or number of layers is wrong.
    Mixed precision: torch.autocast to bfloat16, not to float16, in which products with the linear transformer's sums
        overflow after some 1,500 rows. Parameters in bfloat16 cannot express decays near 1.
    """

    def __init__(self, d_model, cells):
        super().__init__()
        self.cells = nn.ModuleList(cells)
        self.norms = nn.ModuleList(nn.LayerNorm(d_model) for _ in range(2 * len(self.cells)))
        self.gates = nn.ModuleList(nn.Linear(d_model, 2 * d_model) for _ in self.cells)

    def initial_state(self, B):
        return tuple(cell.initial_state(B) for cell in self.cells)

    def forward(self, x, state, start):
        if (sizes := [*map(len, state)]) != (expected := [x.shape[1]] * len(self.cells)):
            raise ValueError(f"memory: the batch sizes of the layers' states must be {expected}, not {sizes}")
        if start.shape != x.shape[:2]:
            raise ValueError(f"memory: start must be {tuple(x.shape[:2])}, not {tuple(start.shape)}")
        start, after = start.bool(), []
        for i, (cell, gate, h) in enumerate(zip(self.cells, self.gates, state)):
            y, h = cell(self.norms[2 * i](x), h, start)
            x = x + F.glu(gate(F.gelu(self.norms[2 * i + 1](y))))
            after.append(h)
        return x, tuple(after)


CELLS = {"lru": LRUCell, "s5": S5Cell, "ffm": FFMCell, "linear_transformer": LinearTransformerCell}
CELLS |= {"mingru": MinGRUCell, "gru": GRUCell}


def make_memory(names, d_model, num_layers=None, **sizes):
    """A Memory with num_layers (None: 2) layers of a single name, or one layer of each of several (keys of MEMORIES).

    ValueError if num_layers is below 1 or given with several names, if a size is not finite, or if "none" is given
    sizes.
    """
    if num_layers is not None and (num_layers < 1 or len(names) > 1):
        raise ValueError("num_layers: at least 1, and of a single memory")
    if sizes and "none" in names:
        raise ValueError(f"none has no sizes: {sizes}")
    if not all(map(math.isfinite, sizes.values())):
        raise ValueError(f"sizes of a memory must be finite: {sizes}")
    names = names * (num_layers or 2) if len(names) == 1 else names
    return Memory(d_model, [CELLS[name](d_model, **sizes) for name in names if name != "none"])


MEMORIES = {name: functools.partial(make_memory, [name]) for name in [*CELLS, "none"]}


# ---------------------------------------------------------------------------------------------------------------------
# Fast paths of linear_recurrence: blocks on a CPU, a Triton kernel on a GPU. You may stop reading here: they compute
# the same function, only faster.


def _recur(decay: Tensor, x: Tensor, initial: Tensor, start: Tensor | None, reverse: bool) -> Tensor:
    """linear_recurrence without its gradient; decay and start broadcast to x (T, ...), initial (...)."""
    if _on_gpu(x):
        return _triton(decay, x, initial, start, reverse)
    if start is None:
        return _blocked(decay.expand(x.shape), x, initial, reverse)
    start = _expand(start, x)
    h = _blocked(((~start).to(x.dtype) * decay).expand(x.shape), x, initial, reverse)
    # a product is faster than a selection, but 0 * NaN is NaN: once in h, it stays there until the last row
    if cmath.isfinite(h[0 if reverse else -1].sum().item()):
        return h
    decay = torch.where(start, 0, decay).expand(x.shape)
    (a, b), started = scan(resettable(Affine()), ((decay, x), start), reverse)
    return (b + torch.where(started, 0, a * initial)).contiguous()


# torch.compile cannot fuse a loop over time of complex numbers: for it, the recurrence is one operator, named after the
# module, as a program may import two copies of it
_recur_op = torch.library.custom_op(f"{__name__.replace('.', '_')}::recur", _recur, mutates_args=())
_recur_op.register_fake(lambda decay, x, initial, start, reverse: x.new_empty(x.shape))


def _blocked(decay, x, initial, reverse, K=8):
    """decay and x (T, ...), initial (...) -> h (T, ...), in O(T) work and O(log T) steps.

    Time is cut into C blocks of K rows; the T % K rows that fill no block come first. The effect of a block on the
    state is one affine map (a, b). K steps over all blocks at once give these maps, recursion gives the states after
    all blocks, and K more steps give the state of every row. Row k of all blocks is a strided view: nothing is copied.
    """

    def steps(h, decays, xs, outs):
        for a, x, out in zip(decays, xs, outs):
            h = torch.addcmul(x, a, h, out=out)
        return h

    out = x.new_empty(x.shape)
    C, order = len(x) // K, slice(None, None, -1 if reverse else 1)
    if C < 2:
        steps(initial, *(y.unbind()[order] for y in (decay, x, out)))
        return out
    sizes = [len(x) % K, C * K][order]
    rest, blocks = zip(*(y.split(sizes)[order] for y in (decay, x, out)))
    initial = steps(initial, *(y.unbind()[order] for y in rest))
    blocks = [y.unflatten(0, (C, K)) for y in blocks]  # (C, K, ...)
    decays, xs, outs = (y.unbind(1)[order] for y in blocks)  # K of (C, ...)
    a, b = blocks[0].prod(1), torch.empty_like(xs[0])
    steps(xs[0], decays[1:], xs[1:], [b] * (K - 1))
    h = _blocked(a, b, initial, reverse)
    h = torch.cat((h[1:], initial[None]) if reverse else (initial[None], h[:-1]))  # the state that enters each block
    steps(h, decays, xs, outs)
    return out


# the kernel is defined only where it can run (a GPU or Triton's interpreter), as importing Triton takes half a second
HAS_TRITON = importlib.util.find_spec("triton") and (torch.cuda.is_available() or os.getenv("TRITON_INTERPRET") == "1")
BLOCK_ROWS, LANES = 64, 128

if HAS_TRITON:
    import triton
    import triton.language as tl

    # A number is a pair (real part, imaginary part) in the kernel; in memory, the parts of complex numbers alternate.

    @triton.jit
    def _load(pointer, offset, mask, COMPLEX: tl.constexpr):
        if COMPLEX:
            pointer += 2 * offset
            return tl.load(pointer, mask, other=0.0), tl.load(pointer + 1, mask, other=0.0)
        else:
            real = tl.load(pointer + offset, mask, other=0.0)
            return real, tl.zeros_like(real)

    @triton.jit
    def _store(pointer, offset, value, mask, COMPLEX: tl.constexpr):
        tl.store(pointer + (2 * offset if COMPLEX else offset), value[0], mask)
        if COMPLEX:
            tl.store(pointer + 2 * offset + 1, value[1], mask)

    @triton.jit
    def _multiply(a, h, COMPLEX: tl.constexpr):  # 0 where a is 0, even if h is NaN
        real = a[0] * h[0] - a[1] * h[1] if COMPLEX else a[0] * h[0]
        imag = a[0] * h[1] + a[1] * h[0] if COMPLEX else h[1]
        nonzero = (a[0] != 0) | (a[1] != 0)
        return tl.where(nonzero, real, 0.0), tl.where(nonzero, imag, 0.0)

    @triton.jit
    def _kernel(
        decay, x, enter, out, product, start, decay_stride, T, C, N, D, K,
        REVERSE: tl.constexpr, COMPLEX: tl.constexpr, LANES: tl.constexpr,
    ):  # fmt: skip
        """The K rows of LANES of the C x N pairs (block, channel), sequentially: from the states that enter the blocks,
        enter (C, N), to the states of all rows, out (T, N), or to the affine maps of blocks, product and out (C, N).
        """
        lane = tl.program_id(0).to(tl.int64) * LANES + tl.arange(0, LANES)  # 64 bits: x may have 2^31 elements
        block, n = lane // N, lane % N
        zero = tl.zeros((LANES,), out.dtype.element_ty)
        h, total = (zero, zero), (zero + 1, zero)
        if enter is not None:
            h = _load(enter, lane, block < C, COMPLEX)
        for k in tl.range(K, num_stages=4):  # the next rows are loaded while this one is computed
            s = block * K + k
            t = T - 1 - s if REVERSE else s
            inside = (block < C) & (s < T)
            keep = inside if start is None else inside & ~tl.load(start + t * (N // D) + n // D, inside, other=0)
            a, b = _load(decay, t * decay_stride + n, keep, COMPLEX), _load(x, t * N + n, inside, COMPLEX)
            h = _multiply(a, h, COMPLEX)
            h = h[0] + b[0], h[1] + b[1]
            if product is None:
                _store(out, t * N + n, h, inside, COMPLEX)
            else:
                total = _multiply(a, total, COMPLEX)
        if product is not None:
            _store(product, lane, total, block < C, COMPLEX)
            _store(out, lane, h, block < C, COMPLEX)


def _on_gpu(x):
    """Whether the kernel takes x. Triton launches on the current device, whichever device x is on."""
    dtypes = torch.float32, torch.float64, torch.complex64, torch.complex128
    return HAS_TRITON and x.is_cuda and x.dtype in dtypes and x.get_device() == torch.cuda.current_device()


def _triton(decay, x, initial, start, reverse):
    """As `_recur`, in blocks like `_blocked`: one thread computes one channel of one block."""
    shape, T, N = x.shape, len(x), math.prod(x.shape[1:])
    wide = lambda y: y.expand(1 if len(y) == 1 else T, *shape[1:])
    flat = lambda y: wide(y).reshape(-1, N).resolve_conj().resolve_neg().contiguous()  # (T or 1, N)
    decay, x, enter = flat(decay), flat(x), flat(initial[None])
    D = 1 if start is None else math.prod(shape[start.ndim :])  # the channels that share a start
    start = start if start is None else start.expand(shape[: start.ndim]).contiguous()
    K = min(T, max(BLOCK_ROWS, T * N // 2**17))  # fewer blocks where channels alone keep a GPU busy
    C = math.ceil(T / K)

    def launch(C, *tensors):
        tensors = [y if y is None or not y.is_complex() else torch.view_as_real(y) for y in (decay, x, *tensors)]
        sizes = N * (len(decay) > 1), T, C, N, D, K
        _kernel[(math.ceil(C * N / LANES),)](*tensors, start, *sizes, reverse, x.is_complex(), LANES)

    if C > 1:
        product, b = x.new_empty(2, C - 1, N)
        launch(C - 1, None, b, product)
        enter = torch.cat((enter, _triton(product, b, enter[0], None, False)))
    out = torch.empty_like(x)
    launch(C, enter, out, None)
    return out.view(shape)
