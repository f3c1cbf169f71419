"""Clocks: interleaved medians, a time budget for one solve, peak memory in a fresh process, and what the machine is."""

from __future__ import annotations

import contextlib
import gc
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import datetime, timezone
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from .registry import BenchmarkError, Settings

__all__ = [
    *("Deadline", "OutOfTime", "Prepared", "Timing"),
    *("interleaved", "machine", "one_thread", "peak_increase", "peak_memory"),
]

PACKAGES = (
    *("proxode", "torch", "numpy", "scipy", "matplotlib", "rich"),
    *("torchdiffeq", "torchode", "scikit-sundae", "torch-scatter", "torch_geometric"),
)


def one_thread(settings: Settings, why: str) -> None:
    """Hold torch to one thread; raises BenchmarkError, with the reason `why`, where another device than the CPU is asked for."""
    if settings.device != "cpu":
        raise BenchmarkError(f"{why}; leave --device out")
    torch.set_num_threads(1)


class OutOfTime(Exception):
    """Raised inside a peer's field when its budget is spent; carries the time of the problem that was reached."""

    def __init__(self, t: float) -> None:
        super().__init__(f"stopped at t = {t:g}")
        self.t = t


class Deadline:
    """A budget of `seconds` of wall time, or of another `clock`'s, counted from `start()`."""

    def __init__(self, seconds: float, clock: Callable[[], float] = time.perf_counter) -> None:
        self.seconds = seconds
        self.clock = clock
        self.end = float("inf")

    def start(self) -> Deadline:
        self.end = self.clock() + self.seconds
        return self

    def over(self) -> bool:
        return self.clock() > self.end


@dataclass(frozen=True)
class Prepared:
    """Work in two halves, of which only `run(prepare())`'s outer one is timed."""

    prepare: Callable[[], Any]
    run: Callable[[Any], Any]

    def __call__(self) -> Any:
        return self.run(self.prepare())


@dataclass
class Timing:
    """Runs of one case: wall and process CPU seconds of each, and what the last one returned."""

    wall: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)
    value: Any = None

    @property
    def median_wall(self) -> float:
        return statistics.median(self.wall)

    @property
    def median_cpu(self) -> float:
        return statistics.median(self.cpu)


def interleaved(
    cases: Mapping[str, Callable[[], Any]],
    repeats: int,
    enough: float = float("inf"),
    warm: bool = True,
    device: str = "cpu",
    more: Callable[[], bool] = lambda: True,
) -> dict[str, Timing]:
    """Time every case in turn, `repeats` rounds: all of them see the same weather.

    A case that has used `enough` seconds sits out the remaining rounds, and all do once `more()` is false; `warm` runs
    each once, untimed, before.
    """
    timings = {name: Timing() for name in cases}
    if warm:
        for run in cases.values():
            run()
    for _ in range(repeats):
        for name, run in cases.items():
            timing = timings[name]
            if timing.wall and (sum(timing.wall) > enough or not more()):
                continue
            _time_once(run, timing, device)
    return timings


def _time_once(run: Callable[[], Any], timing: Timing, device: str) -> None:
    timing.value = None
    gc.collect()
    if isinstance(run, Prepared):
        run = partial(run.run, run.prepare())
    _settle(device)
    wall, cpu = time.perf_counter(), time.process_time()
    timing.value = run()
    _settle(device)
    timing.wall.append(time.perf_counter() - wall)
    timing.cpu.append(time.process_time() - cpu)


def _settle(device: str) -> None:
    """Wait for work that a CUDA device still has in hand."""
    if device == "cuda":
        torch.cuda.synchronize()


def _status(key: str) -> int:
    """A size from the kernel's account of this process, in kB."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key):
            return int(line.split()[1])
    raise KeyError(key)


def peak_increase(run: Callable[[], Any]) -> float:
    """MB by which the resident memory of this process peaks above its start while `run` runs (Linux only).

    `run` is called once before, so that what is allocated once and kept does not count.
    """
    run()
    gc.collect()
    _trim()
    Path("/proc/self/clear_refs").write_text("5")
    before = _status("VmRSS")
    run()
    return (_status("VmHWM") - before) / 1024


def _trim() -> None:
    """Give freed memory back to the system, where the C library can."""
    import ctypes

    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)


def peak_memory(statement: str) -> float | None:
    """`peak_increase` of the callable that `statement` builds, in a fresh interpreter; None if not measurable."""
    if not Path("/proc/self/clear_refs").exists():
        return None
    code = (
        "import torch; torch.set_num_threads(1)\nfrom benchmarks.timing import peak_increase\n"
        f"print('peak', peak_increase({statement}))"
    )
    paths = [str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False)
    words = done.stdout.split()
    return float(words[-1]) if done.returncode == 0 and len(words) >= 2 and words[-2] == "peak" else None


def machine(threads: int | None = None) -> dict[str, Any]:
    """When, on what and with which versions: what a reader needs to compare two tables."""
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = "not installed"
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "threads": threads or torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "versions": versions,
    }


def _cpu_model() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or "unknown"
