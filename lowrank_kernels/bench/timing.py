"""Times of calls that take turns, and the two roofs of a machine, measured."""

from __future__ import annotations

import ctypes
import random
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch


@dataclass(frozen=True)
class Sample:
    """The times of one call, in seconds.

    Attributes:
        times: seconds of each round, in their order.
    """

    times: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.times)

    @property
    def spread(self) -> float:
        """Half the range between the quartiles over the median."""
        return _spread(self.times)

    def over(self, base: Sample) -> tuple[float, float]:
        """(ratio, its spread) to a call that took turns with this one.

        The median of the ratios round by round, and half the range between their quartiles over it: what else the
        machine did in a round fell on both, and a difference below the spread means nothing.
        """
        ratios = [mine / theirs for mine, theirs in zip(self.times, base.times, strict=True)]
        return statistics.median(ratios), _spread(ratios)


def _spread(values: Sequence[float]) -> float:
    low, middle, high = statistics.quantiles(values, n=4)
    return (high - low) / 2 / middle


def interleaved(calls: Mapping[str, Callable[[], object]], seconds: float, device: torch.device) -> dict[str, Sample]:
    """Time calls that take turns in a fresh random order each round, until the time is up (at least 7 rounds).

    Turns, so that whatever else the machine does falls on all of them; random, so that none always finds in the caches
    what the same other one left. On a GPU by events, each call alone on the stream.
    """
    times: dict[str, list[float]] = {name: [] for name in calls}
    once = _cuda_seconds if device.type == "cuda" else _cpu_seconds
    for call in [*calls.values()] * 2:
        call()
    order, names = random.Random(0), list(calls)
    end = time.perf_counter() + seconds
    while len(times[names[0]]) < 7 or time.perf_counter() < end:
        order.shuffle(names)
        for name in names:
            times[name].append(once(calls[name]))
    return {name: Sample(tuple(values)) for name, values in times.items()}


def keep_freed_memory() -> None:
    """Tell glibc to give no freed memory back to the system, from here on, in this process; elsewhere do nothing.

    Whether a large temporary is given back and faulted in anew at each call is a matter of what else lies on the heap:
    between two runs that made plain PyTorch's time differ by a factor of up to three.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        trim_threshold, mmap_max = -1, -4
        mallopt(trim_threshold, 2**31 - 1)
        mallopt(mmap_max, 0)


def _cpu_seconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def _cuda_seconds(call: Callable[[], object]) -> float:
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    start.record()
    call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) * 1e-3


@dataclass(frozen=True)
class Roofs:
    """What a machine reaches: bytes a second of a copy (read plus written), and FLOPs a second of a square product."""

    bytes_per_s: float
    flops_per_s: float

    def seconds(self, nbytes: float, flops: float) -> float:
        """The least time that moving so many bytes and doing so many FLOPs takes, when both go on at once."""
        return max(nbytes / self.bytes_per_s, flops / self.flops_per_s)


def measure_roofs(dtype: torch.dtype, device: torch.device, seconds: float = 1.0) -> Roofs:
    """The medians of a copy of 256 MiB and of a square product in this dtype; never a datasheet.

    The product is 8192 wide on a GPU; on a CPU 2048, or what takes no more than a tenth of a second: some processors
    multiply bfloat16 an element at a time.
    """
    size = 8192 if device.type == "cuda" else 256
    while device.type != "cuda" and size < 2048:
        square = torch.ones(size, size, dtype=dtype)
        if 8 * _cpu_seconds(partial(torch.mm, square, square)) > 0.1:
            break
        size *= 2
    source = torch.ones(1 << 28, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    a, b = (torch.ones(size, size, dtype=dtype, device=device) for _ in range(2))
    samples = interleaved({"copy": lambda: target.copy_(source), "product": lambda: a @ b}, seconds, device)
    return Roofs(2 * source.numel() / samples["copy"].median, 2 * size**3 / samples["product"].median)
