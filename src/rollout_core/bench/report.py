"""Run the measurements and print them with what they ran on."""

from __future__ import annotations

import os
import platform
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from rollout_core.bench.packing import bench_packing
from rollout_core.bench.planning import bench_planning
from rollout_core.bench.timing import Timing


def bench(which: tuple[str, ...], *, repeats: int, threads: int, console: Console) -> None:
    """Print the tables of the benches named."""
    console.print(f"{hardware()}, torch {torch.__version__}")
    if "planning" in which:
        result = bench_planning(repeats)
        sizes = (
            f"manifest {result.manifest_nbytes / result.tensors:.2f} B a tensor, pickle {result.pickle_nbytes / result.tensors:.1f}"
        )
        console.print(_table(f"planning {result.tensors} tensors; {sizes}", result.timings, "pickle loads"))
    if "host" in which:
        from rollout_core.bench.host_time import bench_host_time

        for name, timings in bench_host_time(repeats).items():
            console.print(_table(name, timings, next(iter(timings))))
    if "packing" in which:
        for name, timings in bench_packing(repeats, threads).items():
            console.print(_table(f"packing {name}, {threads} threads", timings, "plain copy"))
    if "transfer" in which:
        from rollout_core.bench.transfer import bench_transfer

        for name, timings in bench_transfer(repeats, threads).items():
            title = f"updates of 1 GiB, {name}, between two processes of one thread each"
            console.print(_table(title, timings, next(iter(timings))))
    if "conversation" in which:
        from rollout_core.bench.conversation import EARLY, LATE, bench_conversation

        for what, pictures in (("text alone", False), ("a picture a turn", True)):
            turns = bench_conversation(repeats, pictures=pictures)
            title = (
                f"a turn of a conversation, {what}; peak allocated {turns.early_bytes} B at turn {EARLY}, {turns.late_bytes} B at "
                f"turn {LATE}; one token on each of two branches {turns.fork:.1f} us"
            )
            console.print(_table(title, turns.timings, f"turn {EARLY}"))


def _table(title: str, timings: dict[str, Timing], baseline: str) -> Table:
    table = Table(title=title, title_justify="left")
    for name in ("", "median ms", "min", "max", f"speed against {baseline}"):
        table.add_column(name, justify="right" if name else "left")
    for name, timing in timings.items():
        speed = f"{100 * timings[baseline].median / timing.median:.0f}%"
        table.add_row(name, f"{timing.median:.2f}", f"{timing.low:.2f}", f"{timing.high:.2f}", speed)
    return table


def hardware() -> str:
    """What this runs on."""
    return f"{_processor()}, {os.cpu_count()} CPUs, Python {platform.python_version()}"


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())
