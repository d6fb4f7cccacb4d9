"""How the benchmarks measure time, spread and peak memory, and what they record beside every figure."""

from __future__ import annotations

import functools
import multiprocessing
import os
import platform
import re
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

PACKAGES = (
    "torch",
    "triton",
    "transformers",
    "tokenizers",
    "numpy",
    "liger-kernel",
    "cut-cross-entropy",
    "quack-kernels",
    "nvidia-cutlass-dsl",
    "trl",
)

WARM_UP_SECONDS = 0.5
"""How long a step is repeated before it is timed: one of milliseconds gets faster for a while, as the allocator learns its sizes."""


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def package_version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


@functools.cache
def surroundings() -> dict:
    """The machine, the versions and the commit, which are the same for a whole run."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--exclude=*"]
    try:
        commit = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        commit = os.environ.get("PROFUSER_COMMIT")  # for a checkout that came without its history
    return {
        "command": "python -m " + shlex.join(["pytest", *sys.argv[1:]]),
        "commit": commit,
        "cpu": cpu_name(),
        "cpus": os.cpu_count(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "python": platform.python_version(),
        **{name: package_version(name) for name in PACKAGES},
    }


def cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    found = (
        re.search(r"^model name\s*:\s*(.+)$", info.read_text(encoding="utf-8"), re.MULTILINE)
        if info.is_file()
        else None
    )
    return found[1] if found else platform.processor()


def timed(benchmark, step: Callable[[], object], floor: Callable[[], object], rounds: int, **info) -> None:
    """Times `step` until the GPU too has finished, and records median, p20, p80, `info` and the surroundings.

    Before each round `floor` is timed, the work that no implementation can do without. So both are measured under the same
    load of the machine.
    """
    floors = []

    def time_floor():
        begin = time.perf_counter()
        floor()
        synchronize()
        floors.append(time.perf_counter() - begin)

    def run():
        step()
        synchronize()

    info |= {"threads": torch.get_num_threads(), "load_1_min": round(os.getloadavg()[0], 2)}
    benchmark.extra_info.update(surroundings(), **info)
    warm_until = time.perf_counter() + WARM_UP_SECONDS
    while time.perf_counter() < warm_until:
        run()
    benchmark.pedantic(run, setup=time_floor, rounds=rounds, warmup_rounds=1)
    data = benchmark.stats.stats.data
    p20, *_, p80 = statistics.quantiles(data, n=5, method="inclusive") if rounds > 1 else data * 4
    seconds = {"median": statistics.median(data), "p20": p20, "p80": p80, "floor": statistics.median(floors[-rounds:])}
    benchmark.extra_info.update({f"{name}_ms": round(value * 1e3, 3) for name, value in seconds.items()})
    benchmark.extra_info["times_floor"] = round(seconds["median"] / seconds["floor"], 2)


def gemms(N: int, D: int, V: int, count: int, dtype: torch.dtype, device: str) -> Callable[[], None]:
    """The floor of the loss: hidden Wᵀ alone, or also g W and gᵀ hidden for the gradients, each in one call."""
    hidden, weight = (torch.randn(rows, D, device=device).to(dtype) for rows in (N, V))
    logits = torch.empty(N, V, dtype=dtype, device=device)
    dhidden, dweight = torch.empty_like(hidden), torch.empty_like(weight)

    def run():
        torch.mm(hidden, weight.t(), out=logits)
        if count == 3:
            torch.mm(logits, weight, out=dhidden)
            torch.mm(logits.t(), hidden, out=dweight)

    return run


def resident_mib(field: str) -> float:
    """The memory of this process in MiB: `field` is VmRSS for the resident set, or VmHWM for its high-water mark."""
    found = re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text(encoding="utf-8"))
    assert found is not None
    return int(found[1]) / 1024


def cuda_peak_mib(step: Callable[[], object]) -> float:
    """How many MiB `step` allocates at most beyond what was allocated before it."""
    synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    step()
    synchronize()
    return round((torch.cuda.max_memory_allocated() - before) / 2**20, 1)


def process_peaks_mib(make_step: Callable[..., Callable[[], object]], arguments: list[tuple]) -> list[float | None]:
    """How many MiB `make_step(*each)()` adds at most to the resident set of a process, for each of the arguments.

    All are measured in one process of their own. The second call of each step counts, because the first loads libraries and
    compiles. Without /proc the results are None.
    """
    if platform.system() != "Linux":
        return [None] * len(arguments)
    return in_process(_peaks, make_step, arguments)


def in_process(function: Callable[..., Any], *arguments: Any) -> Any:
    """Returns what a function returns in a process of its own with one thread, in which malloc returns freed memory at once."""
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    os.environ["MALLOC_MMAP_THRESHOLD_"] = "65536"
    try:
        process = context.Process(target=_put, args=(queue, function, arguments))
        process.start()
    finally:
        del os.environ["MALLOC_MMAP_THRESHOLD_"]
    result = queue.get(timeout=900)
    process.join()
    return result


def _put(queue, function, arguments):
    torch.set_num_threads(1)
    queue.put(function(*arguments))


def _peaks(make_step, arguments):
    peaks = []
    for each in arguments:
        step = make_step(*each)
        step()
        reset_peak()
        before = resident_mib("VmRSS")
        step()
        peaks.append(round(resident_mib("VmHWM") - before, 1))
    return peaks


def reset_peak() -> None:
    """Lets the high-water mark of this process, VmHWM, begin anew at what is resident now."""
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")
