"""The Triton kernel of linear_recurrence against a loop in float64, in values and in gradients.

Without a GPU it runs in Triton's interpreter, which is slow and takes tensors on the CPU. Blocks and programs are made
small, so that a few rows are many of them.
"""

import functools
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import test_monoids
from test_monoids import AFFINE, COMPLEX, REAL, D, either_way, loop, memory_of, same

import monoids
from monoids import linear_recurrence

if not monoids.HAS_TRITON:
    pytest.skip("Triton is not installed", allow_module_level=True)

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ON_GPU, BLOCK_ROWS, LANES = monoids._on_gpu, monoids.BLOCK_ROWS, monoids.LANES
normal = functools.partial(test_monoids.normal, device=DEVICE)
starts = functools.partial(test_monoids.starts, device=DEVICE)
each_dtype = pytest.mark.parametrize("dtype", [REAL, COMPLEX], ids=["real", "complex"])


@pytest.fixture(autouse=True)
def kernel(monkeypatch):
    """The kernel takes everything, in blocks of 4 rows and programs of 8 lanes."""
    if DEVICE == "cpu":
        monkeypatch.setenv("TRITON_INTERPRET", "1")
    torch.manual_seed(0)
    monkeypatch.setattr(monoids, "_on_gpu", lambda x: True)
    monkeypatch.setattr(monoids, "_blocked", None)  # out of reach
    monkeypatch.setattr(monoids, "BLOCK_ROWS", 4)
    monkeypatch.setattr(monoids, "LANES", 8)


@each_dtype
@either_way
@pytest.mark.parametrize("T", [1, 3, 4, 5, 8, 9, 16, 17, 21])  # up to one block, four blocks, and blocks of blocks
def test_kernel_equals_a_loop(T, reverse, dtype):
    decay, x = [normal(T, 3, 2, std=0.7, dtype=dtype) for _ in range(2)]
    inputs, start = (decay, x, normal(3, 2, dtype=dtype)), starts(T, 3, p=0.1)
    same(linear_recurrence(*inputs, reverse, start), loop(*inputs, reverse, start), inputs)
    if T < 10:  # in the interpreter longer ones take seconds
        same(linear_recurrence(decay, x, reverse=reverse), loop(decay, x, reverse=reverse), inputs[:2])


def test_kernel_refuses_a_decay_of_another_length():
    for rows in (2, 8, 10):
        with pytest.raises(RuntimeError):
            linear_recurrence(normal(rows, 1, 1), normal(9, 3, 2))


@pytest.mark.parametrize("flags", ["", "T", "TB"])
@pytest.mark.parametrize("decay", ["", "D", "T11", "1B1", "T1D", "TB1", "1BD", "TBD"])
def test_kernel_broadcasts(decay, flags):
    size = {"T": 9, "B": 3, "D": 2, "1": 1}
    decay = normal(*(size[letter] for letter in decay), std=0.7, dtype=COMPLEX)
    inputs = decay, normal(9, 3, 2, dtype=COMPLEX), normal(2, dtype=COMPLEX)
    start = starts(*(size[letter] for letter in flags)) if flags else None
    for reverse in False, True:
        same(linear_recurrence(*inputs, reverse, start), loop(*inputs, reverse, start), inputs)


@pytest.mark.parametrize(
    "x, decay, initial",
    [((), (), ()), ((), (9,), ()), ((5,), (5,), ()), ((3,), (9, 1), (3,)), ((2, 3, 2), (3, 1), (2, 1, 2))]
    + [((2, 3, 2), (9, 1, 1, 2), ()), ((2, 3, 2), (9, 2, 3, 1), (2, 3, 2))],
    ids=str,
)
def test_kernel_of_any_shape(x, decay, initial):
    inputs = normal(*decay, std=0.7), normal(9, *x), normal(*initial)
    for start in starts(9), starts(9, *x[:1]), starts(9, *x):
        same(linear_recurrence(*inputs, start=start), loop(*inputs, start=start), inputs)


def test_kernel_with_decays_of_zero_one_and_i():
    decay = torch.tensor([0, 1, 1j], device=DEVICE)[torch.randint(3, (33, 2))].to(COMPLEX).requires_grad_()
    inputs = decay, normal(33, 2, dtype=COMPLEX), normal(2, dtype=COMPLEX)
    same(linear_recurrence(*inputs), loop(*inputs), inputs)


@either_way
def test_kernel_of_views(reverse):
    """Lazy conjugates and negatives, transposed and expanded tensors."""
    base = normal(2, 20, 3, dtype=COMPLEX), normal(2, 20, 3, dtype=COMPLEX), normal(3, dtype=COMPLEX)
    views = base[0].conj().transpose(0, 1), base[1].conj().transpose(0, 1), base[2].conj().expand(2, 3)
    same(linear_recurrence(*views, reverse), loop(*views, reverse), base)
    imag = [view.imag for view in views]
    assert imag[0].is_neg()
    same(linear_recurrence(*imag, reverse), loop(*imag, reverse), base)
    expanded = lambda path: path(*base[:2], reverse=reverse).conj().sum(0, keepdim=True).expand(2, 20, 3).imag
    same(expanded(linear_recurrence), expanded(loop), base[:2])


@each_dtype
@either_way
@pytest.mark.parametrize("T", [1, 7, 9])
def test_kernel_reads_only_its_rows(T, reverse, dtype):
    inputs = []
    for shape in (T, 3, 2), (T, 3, 2), (3, 2):
        base = torch.full((shape[0] + 2, *shape[1:]), torch.nan, dtype=dtype, device=DEVICE)
        base[1:-1].normal_()
        inputs.append(base[1:-1].requires_grad_())
    same(linear_recurrence(*inputs, reverse), loop(*inputs, reverse), inputs)


@either_way
@pytest.mark.parametrize("kind", ["real", "complex"])
@pytest.mark.parametrize("first", [False, True])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.filterwarnings("ignore:invalid value")
def test_nan_does_not_cross_a_start_in_the_kernel(bad, first, kind, reverse):
    with torch.device(DEVICE):
        test_monoids.test_nan_does_not_cross_a_start(21, reverse, kind, first, bad)


def test_kernel_at_its_own_size(monkeypatch):
    """In single precision, with the blocks and programs in use."""
    monkeypatch.setattr(monoids, "BLOCK_ROWS", BLOCK_ROWS)
    monkeypatch.setattr(monoids, "LANES", LANES)
    base = normal(3, std=0.5, dtype=COMPLEX), normal(70, 30, 3, dtype=COMPLEX), normal(3, dtype=COMPLEX)
    start = starts(70, 30, p=0.02)
    fast = linear_recurrence(*(x.to(torch.complex64) for x in base), start=start)
    same(fast.to(COMPLEX), loop(*base, start=start), base, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", AFFINE)
def test_memories_on_the_kernel(name, monkeypatch):
    memory = memory_of(name).to(DEVICE)
    x, start = normal(11, 2, D), starts(11, 2)
    fast, _ = memory(x, memory.initial_state(2), start)
    monkeypatch.setattr(monoids, "linear_recurrence", lambda a, b, initial, start: loop(a, b, initial, start=start))
    same(fast, memory(x, memory.initial_state(2), start)[0], [x, *memory.parameters()])


def test_kernel_compiles_as_one_operator():
    memory = memory_of("lru").to(DEVICE)
    x, start, state = normal(11, 2, D), starts(11, 2), memory.initial_state(2)
    compiled = torch.compile(memory, backend="aot_eager", fullgraph=True, dynamic=False)
    same(compiled(x, state, start)[0], memory(x, state, start)[0], [x, *memory.parameters()])


def test_kernel_dispatch(monkeypatch):
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    tensor = lambda dtype, is_cuda=True, i=1: SimpleNamespace(is_cuda=is_cuda, dtype=dtype, get_device=lambda: i)
    assert all(ON_GPU(tensor(dtype)) for dtype in (torch.float32, torch.complex64, REAL, COMPLEX))
    assert not ON_GPU(tensor(torch.float16))
    assert not ON_GPU(tensor(torch.float32, is_cuda=False))
    assert not ON_GPU(tensor(torch.float32, i=0))
    monkeypatch.setattr(monoids, "HAS_TRITON", False)
    assert not ON_GPU(tensor(torch.float32))


@pytest.mark.skipif(DEVICE == "cuda", reason="with a GPU, monoids imports Triton")
def test_triton_is_not_imported_without_a_gpu(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET")
    code = "import sys, torch, monoids; monoids.linear_recurrence(torch.ones(2), torch.ones(3, 2)); "
    code += "assert 'triton' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(monoids.__file__).parent)
