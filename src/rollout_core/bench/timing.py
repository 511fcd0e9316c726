"""Interleaved timing: one repeat runs every candidate once, so that noise of the machine falls on all alike."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import msgspec


class Timing(msgspec.Struct, frozen=True):
    """Wall milliseconds over the repeats."""

    median: float
    low: float
    high: float


def measure(
    candidates: Mapping[str, Callable[[], Any]],
    *,
    repeats: int,
    warmup: int = 2,
    before: Callable[[], Any] = lambda: None,
) -> dict[str, Timing]:
    """Time each candidate ``repeats`` times, in turns, after ``warmup`` turns that do not count. ``before`` is called before each
    and not timed. The garbage collector is off."""
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    gc.collect()
    gc.disable()
    try:
        for turn in range(warmup + repeats):
            for name, run in candidates.items():
                before()
                start = time.perf_counter()
                result = run()
                taken = time.perf_counter() - start
                del result
                if turn >= warmup:
                    seconds[name].append(1e3 * taken)
    finally:
        gc.enable()
    return {name: Timing(statistics.median(taken), min(taken), max(taken)) for name, taken in seconds.items()}


def keep_busy(seconds: float = 0.05) -> None:
    """Have the GPU in use compute, as it does in training. On one machine what an H200 computed first after 10 ms and more without
    work took 1.3 to 1.6 times as long; on another no longer."""
    import torch

    end = time.perf_counter() + seconds
    factor = torch.ones(4096, 4096, dtype=torch.bfloat16, device="cuda")
    while time.perf_counter() < end:
        factor @ factor
        torch.cuda.synchronize()
