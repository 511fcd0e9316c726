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

from rollout_core.preflight.workers import KINDS, connect, make_worker

if TYPE_CHECKING:
    from rollout_core.preflight.runner import Report

_COLOURS: Final = {"pass": "green", "fail": "bold red", "skip": "yellow"}
#: Columns of a terminal in which a figure has room beside the rest.
_WIDE: Final = 110


def preflight(
    model: Path | None,
    *,
    worker: str,
    url: str | None = None,
    pictures: bool = False,
    capacity: int,
    json_file: Path | None,
    console: Console,
) -> bool:
    """Run every check on a worker of one of ``KINDS`` and the model in a folder, print the table, write JSON. True if all hold.

    Without a folder a small model is made, of text or, with ``pictures``, of pictures and text.
    ``url``: of a server that runs, which is checked instead of one that is started. Its weights are changed meanwhile, and are its
    folder's again after it. ``WorkerError`` or ``TransferError`` if it cannot be used at all.
    """
    with tempfile.TemporaryDirectory(prefix="rollout-core-") as scratch:
        with _progress(console) as bar:
            task = bar.add_task("loading torch and transformers", total=None)
            import torch
            from transformers.utils import logging

            from rollout_core.preflight import models, vision_models
            from rollout_core.preflight.checks import CHECKS, Check, Context, put_back
            from rollout_core.preflight.runner import Outcome, run_checks

            logging.disable_progress_bar()
            folder, connected = model, None
            if url is not None:
                connected = connect(worker, url, model)
                folder = Path(connected.model_dir)
            if folder is None:
                folder = Path(scratch) / "model"
                make_model = vision_models.make_small_vision_model if pictures else models.make_small_model
                make_model(folder, **KINDS[worker])
            *most, last = CHECKS
            again = Check("the folder's weights again", "-", put_back, "worker starts")
            checks = CHECKS if url is None else (*most, again, last)
            bar.update(task, total=len(checks))

            def show(check: Check, outcome: Outcome | None) -> None:
                bar.update(task, description=check.id, advance=0 if outcome is None else 1)

            threads = torch.get_num_threads()
            if model is None and url is None:  # so small that threads would only wait for each other
                threads = 1
                torch.set_num_threads(1)
            make = partial(make_worker, worker, threads=threads, keeps_few=pictures)
            context = Context(folder, make if connected is None else lambda folder: connected, capacity)
            words = str(folder) if model or url else f"small random {'Qwen2.5-VL' if pictures else 'Qwen2'}"
            report = run_checks(context, worker=url or worker, model=words, checks=checks, progress=show)
        console.print(table_of(report, console.width))
        for outcome in report.checks:
            if outcome.trace:
                console.print(Text(f"{outcome.id}\n{outcome.trace}", style="dim"))
        console.print(Text(verdict_of(report), style="green" if report.ok else "bold red"))
        if json_file is not None:
            json_file.write_bytes(msgspec.json.format(msgspec.json.encode(report), indent=2) + b"\n")
    return report.ok


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
