"""``rollout-core preflight``: run the checks and print their table."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from rollout_core.preflight.runner import Report

_COLOURS = {"pass": "green", "fail": "bold red", "skip": "yellow"}


def preflight(model: Path | None, *, capacity: int, json_file: Path | None, console: Console) -> bool:
    """Run every check on the model in a folder (a small one is made if None), print the table, write JSON. True if all hold."""
    with tempfile.TemporaryDirectory(prefix="rollout-core-") as scratch:
        with _progress(console) as bar:
            task = bar.add_task("loading torch and transformers", total=None)
            import torch
            from transformers.utils import logging

            from rollout_core.preflight import models
            from rollout_core.preflight.checks import CHECKS, Check, Context
            from rollout_core.preflight.runner import Outcome, run_checks
            from rollout_core.workers.hf import HFWorker

            logging.disable_progress_bar()
            folder = model
            if folder is None:
                folder = Path(scratch) / "model"
                models.make_small_model(folder)
            bar.update(task, total=len(CHECKS))

            def show(check: Check, outcome: Outcome | None) -> None:
                bar.update(task, description=check.id, advance=0 if outcome is None else 1)

            threads = torch.get_num_threads()
            if model is None:  # so small that threads would only wait for each other
                threads = 1
                torch.set_num_threads(1)
            context = Context(folder, lambda path: HFWorker(str(path), threads=threads), capacity)
            words = str(model) if model else "small random Qwen2"
            report = run_checks(context, worker="hf", model=words, progress=show)
        console.print(table_of(report))
        for outcome in report.checks:
            if outcome.trace:
                console.print(Text(outcome.trace, style="dim"))
        failed = sum(outcome.result != "pass" for outcome in report.checks)
        verdict = f"all {len(report.checks)} checks hold" if report.ok else f"{failed} of {len(report.checks)} checks do not hold"
        console.print(f"[{'green' if report.ok else 'bold red'}]{verdict}[/] in {report.seconds:.1f} s")
        if json_file is not None:
            json_file.write_bytes(msgspec.json.format(msgspec.json.encode(report), indent=2) + b"\n")
    return report.ok


def table_of(report: Report) -> Table:
    """The report as a table: check, clause, result, time, figure."""
    environment = report.environment
    title = f"worker {report.worker}, {report.model}, torch {environment['torch']}, transformers {environment['transformers']}"
    table = Table(title=title, title_justify="left", expand=False)
    for name in ("check", "clause", "result"):
        table.add_column(name, no_wrap=True)
    table.add_column("time", justify="right", no_wrap=True)
    table.add_column("figure", overflow="fold")
    for outcome in report.checks:
        result = Text(outcome.result, style=_COLOURS[outcome.result])
        table.add_row(outcome.id, outcome.clause, result, f"{outcome.seconds:.2f} s", Text(outcome.figure))
    return table


def _progress(console: Console) -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    return Progress(*columns, console=console, transient=True)
