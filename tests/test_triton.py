"""The Triton kernel of linear_recurrence beside a loop in float64, in values and in gradients.

Without a GPU it runs in Triton's interpreter, which is slow and takes tensors on the CPU. Tiles are made small, so that
a few rows are many tiles and chunks.
"""

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.testing import assert_close

import monoids
from monoids import MEMORIES, linear_recurrence

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def interpret(patch):
    """The tests' environment. Triton reads it when it is imported, when a kernel is made, and when one first runs."""
    if DEVICE == "cpu":
        patch.setenv("TRITON_INTERPRET", "1")


with pytest.MonkeyPatch.context() as patch:
    interpret(patch)
    pytest.importorskip("triton")
    if not monoids.HAS_TRITON:
        pytest.skip('no triton', allow_module_level=True)

ON_GPU, TILING = monoids._on_gpu, monoids._tiling
ROWS, CHANNELS, CHUNK = 4, 4, 8  # of 6 channels mostly, in two programs
# a row, a tile, a chunk, chunks whose maps fill a tile (40), or more than a chunk (75)
LENGTHS = [1, 3, 4, 5, 8, 9, 17, 41, 75]
REAL, COMPLEX = torch.float64, torch.complex128
each_dtype = pytest.mark.parametrize("dtype", [REAL, COMPLEX], ids=["real", "complex"])
either_way = pytest.mark.parametrize("reverse", [False, True])


@pytest.fixture(autouse=True)
def kernel(monkeypatch):
    interpret(monkeypatch)
    torch.manual_seed(0)
    monkeypatch.setattr(monoids, "_on_gpu", lambda x: True)
    monkeypatch.setattr(monoids, "_tiling", lambda T, N, itemsize: (ROWS, CHANNELS, CHUNK))


def normal(*shape, std=1.0, dtype=REAL):
    return (std * torch.randn(shape, dtype=dtype, device=DEVICE)).requires_grad_()


def starts(*shape, p=0.1):
    return (torch.rand(shape) < p).to(DEVICE)


def loop(decay, x, initial=None, reverse=False, start=None):
    """linear_recurrence, one row after the other."""
    h = torch.zeros_like(x[0]) if initial is None else initial
    decay, out = decay.expand(x.shape), [None] * len(x)
    for t in range(len(x))[:: -1 if reverse else 1]:
        a = decay[t]
        if start is not None:
            a = torch.where(start[t].reshape(start[t].shape + (1,) * (a.ndim - start[t].ndim)), 0, a)
        h = out[t] = a * h + x[t]
    return torch.stack(out)


def same(fast, slow, inputs, **tolerance):
    """Equal values, and equal gradients of one random projection."""
    assert_close(fast, slow, **tolerance)
    projection = torch.randn_like(slow)
    gradients = [torch.autograd.grad(y, inputs, projection, materialize_grads=True) for y in (fast, slow)]
    assert_close(*gradients, **tolerance)


@each_dtype
@either_way
@pytest.mark.parametrize("T", LENGTHS)
def test_kernel_is_the_loop(T, reverse, dtype):
    decay, x = [normal(T, 3, 2, std=0.7, dtype=dtype) for _ in range(2)]
    inputs = decay, x, normal(3, 2, dtype=dtype)
    start = starts(T, 3)
    same(linear_recurrence(*inputs, reverse, start), loop(*inputs, reverse, start), inputs)


@each_dtype
@either_way
@pytest.mark.parametrize("flags", ["", "T", "TB"])
@pytest.mark.parametrize("decay", ["", "D", "T11", "1B1", "T1D", "TB1", "1BD", "TBD"])
def test_kernel_broadcasts(decay, flags, reverse, dtype):
    T = 9  # two chunks
    size = {"T": T, "B": 3, "D": 2, "1": 1}
    decay = normal(*(size[letter] for letter in decay), std=0.7, dtype=dtype)
    x = normal(T, 3, 2, dtype=dtype)
    start = starts(*(size[letter] for letter in flags)) if flags else None
    inputs = decay, x, normal(2, dtype=dtype)
    same(linear_recurrence(*inputs, reverse, start), loop(*inputs, reverse, start), inputs)


@either_way
@pytest.mark.parametrize(
    "x, decay, initial",
    [((), (), ()), ((), (9,), ()), ((5,), (5,), ()), ((3,), (9, 1), (3,)), ((2, 3, 2), (3, 1), (2, 1, 2))]
    + [((2, 3, 2), (9, 1, 1, 2), ()), ((2, 3, 2), (9, 2, 3, 1), (2, 3, 2))],
    ids=str,
)
def test_kernel_of_any_shape(x, decay, initial, reverse):
    inputs = normal(*decay, std=0.7, dtype=COMPLEX), normal(9, *x, dtype=COMPLEX), normal(*initial, dtype=COMPLEX)
    start = starts(9, *x[:1])
    same(linear_recurrence(*inputs, reverse, start), loop(*inputs, reverse, start), inputs)
    same(linear_recurrence(*inputs[:2], reverse=reverse), loop(*inputs[:2], reverse=reverse), inputs[:2])


@either_way
def test_kernel_of_views(reverse):
    """Lazy conjugates and negatives, transposed and repeated memory."""
    base = normal(2, 20, 3, dtype=COMPLEX), normal(2, 20, 3, dtype=COMPLEX), normal(3, dtype=COMPLEX)
    views = base[0].conj().transpose(0, 1), base[1].conj().transpose(0, 1), base[2].conj().expand(2, 3)
    same(linear_recurrence(*views, reverse), loop(*views, reverse), base)
    imag = [view.imag for view in views]
    assert imag[0].is_neg()
    same(linear_recurrence(*imag, reverse), loop(*imag, reverse), base)
    fast, slow = [
        path(*base[:2], reverse=reverse).conj().sum(0, keepdim=True).expand(2, 20, 3).imag
        for path in (linear_recurrence, loop)
    ]
    same(fast, slow, base[:2])


@each_dtype
@either_way
@pytest.mark.parametrize("T", [1, 7, 9])
def test_kernel_reads_nothing_around_its_rows(T, reverse, dtype):
    inputs = []
    for shape in (T, 3, 2), (T, 3, 2), (3, 2):
        base = torch.full((shape[0] + 2, *shape[1:]), torch.nan, dtype=dtype, device=DEVICE)
        base[1:-1].normal_()
        inputs.append(base[1:-1].requires_grad_())
    same(linear_recurrence(*inputs, reverse), loop(*inputs, reverse), inputs)


@either_way
def test_kernel_counts_the_decay_as_zero_at_a_start(reverse):
    decay, x, start = normal(9, 2), normal(9, 2), starts(9, 2)
    wild = torch.where(start, torch.nan, decay)
    inputs = decay, x
    same(linear_recurrence(wild, x, reverse=reverse, start=start), loop(decay, x, None, reverse, start), inputs)


@each_dtype
@either_way
@pytest.mark.parametrize("needed", [(0,), (1,), (2,)], ids=str)
def test_kernel_gives_the_gradients_that_are_needed(needed, reverse, dtype):
    decay, x = [normal(20, 2, std=0.7, dtype=dtype) for _ in range(2)]
    inputs = [y.requires_grad_(i in needed) for i, y in enumerate((decay, x, normal(2, dtype=dtype)))]
    start = starts(20)
    needed = [inputs[i] for i in needed]
    same(linear_recurrence(*inputs, reverse, start), loop(*inputs, reverse, start), needed)


@each_dtype
@either_way
@pytest.mark.parametrize("decay", [(), (9, 2)], ids=str)
def test_kernel_can_be_differentiated_twice(decay, reverse, dtype):
    inputs = normal(*decay, dtype=dtype), normal(9, 2, dtype=dtype), normal(2, dtype=dtype)
    start = starts(9, p=0.3)
    projection = torch.randn(9, 2, dtype=dtype, device=DEVICE)
    gradients = []
    for path in linear_recurrence, loop:
        first = torch.autograd.grad(path(*inputs, reverse, start), inputs, projection, create_graph=True)
        gradients.append(torch.autograd.grad(sum(x.abs().square().sum() for x in first), inputs))
    assert_close(*gradients)


@either_way
def test_kernel_under_func_grad(reverse):
    inputs, start = (normal(20, 2), normal(20, 2), normal(2)), starts(20)
    loss = lambda path: lambda *inputs: path(*inputs, reverse, start).square().sum()
    slow = torch.autograd.grad(loss(loop)(*inputs), inputs)
    assert_close(torch.func.grad(loss(linear_recurrence), (0, 1, 2))(*inputs), slow)


@each_dtype
def test_kernel_at_its_own_size(dtype, monkeypatch):
    """In single precision, with the tiles that it has in use."""
    monkeypatch.setattr(monoids, "_tiling", TILING)
    decay, x = [normal(130, 3, 3, std=0.5, dtype=dtype) for _ in range(2)]
    initial, start = normal(3, 3, dtype=dtype), starts(130, 3, p=0.02)
    single = [y.to({REAL: torch.float32, COMPLEX: torch.complex64}[y.dtype]) for y in (decay, x, initial)]
    fast, slow = linear_recurrence(*single, start=start), loop(decay, x, initial, start=start)
    same(fast.to(slow.dtype), slow, (decay, x, initial), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("itemsize", [4, 8, 16])
@pytest.mark.parametrize("N", [1, 2, 3, 128, 4096, 100_000])
@pytest.mark.parametrize("T", [1, 1000, 1_000_000])
def test_tiles(T, N, itemsize):
    rows, channels, chunk = TILING(T, N, itemsize)
    assert rows * channels * itemsize == 8192 and channels * itemsize <= 64
    assert rows & (rows - 1) == channels & (channels - 1) == chunk % rows == 0
    programs = -(-N // channels) * -(-T // chunk)
    assert programs <= 256 or chunk >= T  # x is read twice only where that fills the GPU
    if T == 1_000_000:
        assert programs > 100


SIZES = {  # of small memories
    "lru": {"d_state": 3},
    "s5": {"d_state": 2, "blocks": 1},
    "ffm": {"num_traces": 2, "num_frequencies": 2},
    "linear_transformer": {"num_heads": 1, "d_key": 4, "d_value": 1},
}


@pytest.mark.parametrize("name", SIZES)
def test_memories_are_the_same_on_the_kernel(name, monkeypatch):
    memory = MEMORIES[name](4, num_layers=1, **SIZES[name]).double().to(DEVICE)
    x, start = normal(11, 2, 4), starts(11, 2, p=0.3)
    state = memory.initial_state(2)
    fast = memory(x, state, start)[0]
    monkeypatch.setattr(monoids, "_on_gpu", lambda x: False)
    slow = memory(x, state, start)[0]
    same(fast, slow, [x, *memory.parameters()])


def test_compiler_takes_the_kernel_as_one_step():
    memory = MEMORIES["lru"](4, num_layers=1, d_state=3).double().to(DEVICE)
    x, start, state = normal(11, 2, 4), starts(11, 2, p=0.3), memory.initial_state(2)
    compiled = torch.compile(memory, backend="aot_eager", fullgraph=True, dynamic=False)
    same(compiled(x, state, start)[0], memory(x, state, start)[0], [x, *memory.parameters()])


def test_who_gets_the_kernel(monkeypatch):
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    monkeypatch.setattr(monoids, "HAS_TRITON", True)
    tensor = lambda dtype, is_cuda=True, index=1: SimpleNamespace(
        is_cuda=is_cuda, dtype=dtype, get_device=lambda: index
    )
    assert all(ON_GPU(tensor(dtype)) for dtype in (torch.float32, torch.complex64, REAL, COMPLEX))
    assert not ON_GPU(tensor(torch.float16))
    assert not ON_GPU(tensor(torch.float32, is_cuda=False))
    assert not ON_GPU(tensor(torch.float32, index=0))
    monkeypatch.setattr(monoids, "HAS_TRITON", False)
    assert not ON_GPU(tensor(torch.float32))


@pytest.mark.skipif(DEVICE == "cuda", reason="with a GPU, monoids imports Triton")
def test_triton_is_not_imported_without_a_gpu(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET")
    code = "import sys, torch, monoids; monoids.linear_recurrence(torch.ones(2), torch.ones(3, 2)); "
    code += "assert 'triton' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(monoids.__file__).parent)
