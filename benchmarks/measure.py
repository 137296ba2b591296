"""What the benchmarks share: interleaved timing, peak memory, and a table that is a CSV too.

One thread, unless OMP_NUM_THREADS says otherwise. On a GPU, time and memory are the GPU's.
"""

import csv
import ctypes
import datetime
import gc
import math
import os
import platform
import re
import statistics
import sys
import time
from pathlib import Path

import torch

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))  # for monoids.py and the scripts

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
THREADS = int(os.environ.get("OMP_NUM_THREADS", 1))
torch.set_num_threads(THREADS)
torch.empty(2**25 - 2**16, dtype=torch.uint8)  # as the scripts do: malloc then keeps what is freed


def pin():
    """Hold JAX to as many cores as PyTorch has threads. To be called before JAX is imported.

    XLA_FLAGS="--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1" does not: with jax 0.10.2 an
    associative_scan then still takes 1.7 times as much processor time as wall time on two cores. Linux only; elsewhere
    JAX has all cores.
    """
    if sys.platform == "linux":
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[-THREADS:])


def once(f):
    """Seconds that one call takes."""
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()  # the call before may still be running
    begin = time.perf_counter()
    f()
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - begin


def interleaved(contestants, seconds=2.0, rounds=100):
    """Median seconds of a call, for each of the contestants {name: function}.

    They are called in turn, so that a load on the machine affects all of them. A turn is two calls, of which the second
    counts: in use, what ran before is the same function, not another that has filled the caches. Each has at least
    three turns, at most `rounds`, and none after its calls took `seconds`.
    """
    times = {name: [] for name in contestants}
    for _ in range(rounds):
        for name, f in contestants.items():
            if len(times[name]) < 3 or sum(times[name]) < seconds:
                f()
                times[name].append(once(f))
    return {name: statistics.median(values) for name, values in times.items()}


def resident(field):
    return 1024 * int(re.search(rf"{field}:\s*(\d+) kB", Path("/proc/self/status").read_text())[1])


def peak_memory(f):
    """Bytes by which one call of f raises the peak of allocated memory, what it returns included.

    f has been called before: what it allocates once and keeps doesn't count. On a CPU, peak resident memory: Linux only
    (nan elsewhere), in whole pages. JAX's allocator keeps what it has had, so there only its largest calls would show:
    a function of JAX brings what its compiler has planned as f.bytes. Where both can be seen they agree.
    """
    if hasattr(f, "bytes"):
        return f.bytes
    gc.collect()
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        f()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    if sys.platform != "linux":
        return math.nan
    ctypes.CDLL(None).malloc_trim(0)  # give back what is free: if it were used again, nothing would rise
    Path("/proc/self/clear_refs").write_text("5")  # the peak, VmHWM, starts from here (man 5 proc_pid_clear_refs)
    before = resident("VmRSS")
    f()
    return resident("VmHWM") - before


def about():
    if DEVICE.type == "cuda":
        return f"{datetime.date.today()}, torch {torch.__version__}, {torch.cuda.get_device_name()}"
    names = re.findall("model name.*: (.*)", Path("/proc/cpuinfo").read_text()) if sys.platform == "linux" else []
    machine = f"{names[0] if names else platform.machine()} with {os.cpu_count()} cores"
    return f"{datetime.date.today()}, torch {torch.__version__}, {machine}, threads: {THREADS}"


def show(value):
    if not isinstance(value, float):
        return f"{value:,}" if isinstance(value, int) else str(value)
    return "" if math.isnan(value) else f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def report(file, header, rows, notes=()):
    """Print the table, and write it beside `file` as CSV (scan.py's is scan.csv, or scan_gpu.csv if measured on a GPU):
    numbers to four digits, then the notes and about().
    """
    notes = [*notes, about()]
    lines = [header, *([show(value) for value in row] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    left = [isinstance(value, str) for value in rows[0]]
    for line in lines:
        cells = (x.ljust(w) if flag else x.rjust(w) for x, w, flag in zip(line, widths, left))
        print("  ".join(cells).rstrip())
    print(*notes, sep="\n", flush=True)
    path = Path(file).with_name(f"{Path(file).stem}{'_gpu' * (DEVICE.type == 'cuda')}.csv")
    with open(path, "w", newline="") as out:
        digits = lambda value: f"{value:.4g}" if isinstance(value, float) else value
        csv.writer(out).writerows([header, *([digits(v) for v in row] for row in rows), *([note] for note in notes)])
