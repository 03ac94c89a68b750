"""Measures alternatives in turns: times, ratios, and peak memory in fresh processes."""

from __future__ import annotations

import ctypes
import gc
import multiprocessing
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import ceil, floor, log
from pathlib import Path

import torch

Step = Callable[[], object]


@dataclass(frozen=True)
class Spread:
    """Median and quartiles."""

    middle: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{digits(self.middle)} ({digits(self.low)} to {digits(self.high)})"


def digits(value: float) -> str:
    """A number with three significant digits, but with all digits before the point."""
    decimals = 2 if abs(value) < 10 else 1 if abs(value) < 100 else 0
    return f"{value:.{decimals}f}"


def quantile(values: Sequence[float], share: float) -> float:
    """The quantile of the values at ``share``, with linear interpolation."""
    ordered = sorted(values)
    place = share * (len(ordered) - 1)
    low, high = ordered[floor(place)], ordered[ceil(place)]
    return low + (high - low) * (place - floor(place))


def spread(values: Sequence[float]) -> Spread:
    """Median and quartiles of the values."""
    return Spread(*(quantile(values, share) for share in (0.5, 0.25, 0.75)))


def ratio(ours: Sequence[float], theirs: Sequence[float]) -> Spread:
    """Our time divided by theirs in each round, so that load on the machine affects both alike."""
    return spread([a / b for a, b in zip(ours, theirs, strict=True)])


def difference(ours: Sequence[float], theirs: Sequence[float]) -> list[float]:
    """Our time minus theirs in each round."""
    return [a - b for a, b in zip(ours, theirs, strict=True)]


def exponent(sizes: Sequence[float], values: Sequence[float]) -> float:
    """The exponent e of ``values = constant * sizes ** e``, by least squares of the logarithms."""
    x, y = [log(size) for size in sizes], [log(value) for value in values]
    mean_x, mean_y = sum(x) / len(x), sum(y) / len(y)
    along = sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True))
    return along / sum((a - mean_x) ** 2 for a in x)


def alternate(
    steps: dict[str, Step],
    rounds: int,
    *,
    least: float = 0.02,
    device: str = "cpu",
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float]]:
    """Milliseconds per call of each step. The steps take turns: A B C A B C ...

    Args:
        steps: the steps to time; each is first called twice to warm up.
        rounds: number of turns of each step.
        least: minimum seconds of a turn; short steps are called several times in it.
        device: device that the steps run on.
        clock: returns seconds; ``time.process_time`` does not count other processes.
    """
    calls = {name: _calls(step, least, device) for name, step in steps.items()}
    times: dict[str, list[float]] = {name: [] for name in steps}
    gc.collect()
    for _ in range(rounds):
        for name, step in steps.items():
            seconds = _seconds(step, calls[name], device, clock)
            times[name].append(1000 * seconds / calls[name])
    return times


def _calls(step: Step, least: float, device: str) -> int:
    _seconds(step, 1, device)
    return max(1, ceil(least / max(_seconds(step, 1, device), 1e-7)))


def _seconds(
    step: Step, calls: int, device: str, clock: Callable[[], float] = time.perf_counter
) -> float:
    _wait(device)
    start = clock()
    for _ in range(calls):
        step()
    _wait(device)
    return clock() - start


def _wait(device: str) -> None:
    if device != "cpu":
        torch.cuda.synchronize()


def peak_memory(build: Callable[..., Step], *args: object, device: str = "cpu") -> float | None:
    """Peak memory in MiB of a step, including the memory in use before it.

    On the CPU this is the peak resident memory of a fresh process, without program code, while the
    step runs for the second time. It contains more than tensors, so subtract the value of another
    step. On a GPU it is the peak of the sum of all tensors.

    Args:
        build: a module-level function that creates the step.
        args: arguments of ``build``.
        device: device that the step runs on.

    Returns:
        The peak, or ``None`` if it cannot be measured: on a CPU without Linux.
    """
    if device != "cpu":
        return _cuda_peak(build, args)
    if not Path("/proc/self/clear_refs").exists():
        return None
    context = _fresh_processes()
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_child, args=(theirs, build, args, torch.get_num_threads()))
    process.start()
    theirs.close()
    try:
        return ours.recv()
    except EOFError:
        raise SystemExit("the process that measures memory failed; see its error above") from None
    finally:
        process.join()


def _fresh_processes() -> multiprocessing.context.ForkServerContext:
    # Return freed memory to the system at once, so that resident memory is memory in use.
    os.environ.setdefault("MALLOC_MMAP_THRESHOLD_", "65536")
    os.environ.setdefault("MALLOC_TRIM_THRESHOLD_", "65536")
    context = multiprocessing.get_context("forkserver")
    # Each process is forked from one that has only imported these modules.
    context.set_forkserver_preload(["torch", "torchvision.models", "kdlayers"])
    return context


def _child(pipe: object, build: Callable[..., Step], args: Sequence[object], threads: int) -> None:
    torch.set_num_threads(threads)
    step = build(*args)
    step()  # not measured: the first call includes work that is done only once
    before = forget_peak()
    step()
    pipe.send(resident()["VmHWM"] - before["VmRSS"] + before["RssAnon"])


def forget_peak() -> dict[str, float]:
    """Reset the peak memory of this process (Linux); returns its present memory in MiB."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    return resident()


def resident() -> dict[str, float]:
    """The memory of this process in MiB, by name as in /proc/self/status."""
    lines = [line.split() for line in Path("/proc/self/status").read_text().splitlines()]
    return {line[0][:-1]: int(line[1]) / 1024 for line in lines if line[-1] == "kB"}


def _cuda_peak(build: Callable[..., Step], args: Sequence[object]) -> float:
    gc.collect()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    step = build(*args)
    step()
    torch.cuda.reset_peak_memory_stats()
    step()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**20
