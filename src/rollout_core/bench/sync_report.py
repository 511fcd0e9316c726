"""A bench of updates by CUDA IPC as a table and as JSON."""

from __future__ import annotations

from pathlib import Path

import msgspec
from rich.console import Console
from rich.table import Table

from rollout_core.bench.report import hardware
from rollout_core.bench.sync import SyncBench


def print_sync(bench: SyncBench, console: Console) -> None:
    console.print(f"{hardware()}, {bench.gpu}; random bfloat16 of the shape of {bench.model}", highlight=False, soft_wrap=True)
    title = f"{bench.nbytes / 1e9:.2f} GB, {bench.tensors} tensors in {bench.buckets} buckets of {bench.capacity >> 20} MiB"
    table = Table(title=title, title_justify="left")
    for name in ("", "median ms", "min to max", "GB/s", "against the copy"):
        table.add_column(name, justify="right" if name else "left")
    for name, timing in bench.timings.items():
        spread = f"{timing.low:.2f} to {timing.high:.2f}"
        speed = f"{bench.nbytes / timing.median / 1e6:.0f}"
        table.add_row(name, f"{timing.median:.2f}", spread, speed, f"{bench.ratio(name):.2f} x")
    console.print(table)


def write_sync_json(bench: SyncBench, file: Path) -> None:
    whole = {"hardware": hardware(), **msgspec.to_builtins(bench), "ratios": {name: bench.ratio(name) for name in bench.timings}}
    file.write_bytes(msgspec.json.format(msgspec.json.encode(whole), indent=2) + b"\n")
