"""``rollout-core bench``: measurements beside their baselines. torch is imported when the command runs."""

from __future__ import annotations

import os
from typing import Annotated, Final

import typer
from rich.console import Console

BENCHES: Final = ("planning", "packing", "transfer", "conversation")


def bench_command(
    which: Annotated[
        list[str] | None, typer.Argument(help="planning, packing, transfer, conversation; none: all.", show_default=False)
    ] = None,
    repeats: Annotated[int, typer.Option(min=1, help="Repeats of each measurement.")] = 21,
    threads: Annotated[int, typer.Option(min=1, help="Threads for packing.")] = 2,
) -> None:
    """Measure planning, packing, updates between processes and growing conversations on the CPU, each beside its baseline."""
    unknown = [name for name in which or () if name not in BENCHES]
    if unknown:
        Console(stderr=True).print(f"no bench is named {unknown[0]!r}; there are {', '.join(BENCHES)}", style="bold red")
        raise typer.Exit(2)
    from rollout_core.bench.report import bench

    console = Console()
    if not console.is_terminal and "COLUMNS" not in os.environ:
        console.width = 160  # in a file or pipe nothing has to fit 80 columns
    bench(tuple(which or BENCHES), repeats=repeats, threads=threads, console=console)
