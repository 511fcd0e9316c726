"""``rollout-core preflight``: run the checks and print their table."""

from __future__ import annotations

import tempfile
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Final

import msgspec
from rich.console import Console, Group
from rich.padding import Padding
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from rollout_core.preflight.runner import Report
    from rollout_core.workers.worker import Worker

_COLOURS: Final = {"pass": "green", "fail": "bold red", "skip": "yellow"}
#: Columns of a terminal in which a figure has room beside the rest.
_WIDE: Final = 110


#: The kinds of worker, with the shape of a small model's attention that their kernels take.
KINDS: Final = {"hf": {"heads": 6, "head_dim": 20}, "vllm": {"heads": 4, "head_dim": 32}}


def preflight(model: Path | None, *, worker: str, capacity: int, json_file: Path | None, console: Console) -> bool:
    """Run every check on a worker of one of ``KINDS`` and the model in a folder (a small one is made if None), print the table,
    write JSON. True if all hold."""
    with tempfile.TemporaryDirectory(prefix="rollout-core-") as scratch:
        with _progress(console) as bar:
            task = bar.add_task("loading torch and transformers", total=None)
            import torch
            from transformers.utils import logging

            from rollout_core.preflight import models
            from rollout_core.preflight.checks import CHECKS, Check, Context
            from rollout_core.preflight.runner import Outcome, run_checks

            logging.disable_progress_bar()
            folder = model
            if folder is None:
                folder = Path(scratch) / "model"
                models.make_small_model(folder, **KINDS[worker])
            bar.update(task, total=len(CHECKS))

            def show(check: Check, outcome: Outcome | None) -> None:
                bar.update(task, description=check.id, advance=0 if outcome is None else 1)

            threads = torch.get_num_threads()
            if model is None:  # so small that threads would only wait for each other
                threads = 1
                torch.set_num_threads(1)
            context = Context(folder, partial(_make_worker, worker, threads=threads), capacity)
            words = str(model) if model else "small random Qwen2"
            report = run_checks(context, worker=worker, model=words, progress=show)
        console.print(table_of(report, console.width))
        for outcome in report.checks:
            if outcome.trace:
                console.print(Text(f"{outcome.id}\n{outcome.trace}", style="dim"))
        console.print(Text(verdict_of(report), style="green" if report.ok else "bold red"))
        if json_file is not None:
            json_file.write_bytes(msgspec.json.format(msgspec.json.encode(report), indent=2) + b"\n")
    return report.ok


def _make_worker(kind: str, folder: Path, *, threads: int) -> Worker:
    if kind == "vllm":
        from rollout_core.workers.vllm.worker import VLLMWorker

        return VLLMWorker(str(folder), environment={"OMP_NUM_THREADS": str(threads)})
    from rollout_core.workers.hf.worker import HFWorker

    return HFWorker(str(folder), threads=threads)


def verdict_of(report: Report) -> str:
    """The report in one line."""
    total, seconds = len(report.checks), f"in {report.seconds:.1f} s"
    if report.ok:
        return f"all {total} checks hold {seconds}"
    failed = sum(outcome.result == "fail" for outcome in report.checks)
    skipped = sum(outcome.result == "skip" for outcome in report.checks)
    return f"{failed} of {total} checks do not hold{f', {skipped} could not be judged' if skipped else ''} {seconds}"


def table_of(report: Report, width: int) -> Table:
    """The report as a table: check, clause, result, time, figure. Where ``width`` leaves no room for a column of figures, each
    stands under its check."""
    environment = report.environment
    title = f"worker {report.worker}, {report.model}, torch {environment['torch']}, transformers {environment['transformers']}"
    wide = width >= _WIDE
    table = Table(title=Text(title), title_justify="left", expand=False)  # Text: a folder's name may look like markup
    table.add_column("check" if wide else "check, figure", overflow="fold", no_wrap=wide)
    for name in ("clause", "result"):
        table.add_column(name, no_wrap=True)
    table.add_column("time", justify="right", no_wrap=True)
    if wide:
        table.add_column("figure", overflow="fold")
    for outcome in report.checks:
        result, seconds = Text(outcome.result, style=_COLOURS[outcome.result]), f"{outcome.seconds:.2f} s"
        figure = Text(outcome.figure, style="" if outcome.result == "fail" else "dim")
        if wide:
            table.add_row(outcome.id, outcome.clause, result, seconds, figure)
        else:
            table.add_row(Group(outcome.id, Padding(figure, (0, 0, 0, 2))), outcome.clause, result, seconds)
    return table


def _progress(console: Console) -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    return Progress(*columns, console=console, transient=True)
