"""The command line: ``rollout-core preflight | plan | bench``. Heavy imports wait until a command needs them."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

try:
    import typer
    from rich.console import Console
except ImportError:  # pragma: no cover
    sys.exit("the command line needs its extra: pip install 'rollout-core[cli,hf]'")

from rollout_core.errors import RolloutCoreError
from rollout_core.preflight.plan_command import plan_command

app = typer.Typer(no_args_is_help=True, add_completion=False, help=__doc__, pretty_exceptions_enable=False)
app.command("plan")(plan_command)


@app.command("preflight")
def preflight_command(
    worker: Annotated[str, typer.Option(help="The kind of worker to check; this version has hf.")] = "hf",
    model: Annotated[Path | None, typer.Option(help="A folder with config.json and weights; none: a small model is made.")] = None,
    capacity: Annotated[str, typer.Option(help="Bucket capacity, for example 64MiB.")] = "1MiB",
    json: Annotated[Path | None, typer.Option(help="Also write the report here, for machines.")] = None,
) -> None:
    """Check a rollout worker end to end: weights in buckets to its process, digests read back, greedy tokens compared.

    Exits with 0 only if every check holds, 1 if one does not, 2 if it could not begin.
    """
    from rollout_core.preflight.plan_report import parse_size  # brings torch

    console = Console()
    if worker != "hf":
        _refuse(f"--worker is {worker!r}; this version has one kind of worker: hf")
    if model is not None and not (model / "config.json").is_file():
        _refuse(f"--model: {model} has no config.json; pass a folder as save_pretrained writes it")
    try:
        nbytes = parse_size(capacity)
    except (RolloutCoreError, ValueError) as error:
        _refuse(f"--capacity: {error}")
    try:
        from rollout_core.preflight.command import preflight

        held = preflight(model, capacity=nbytes, json_file=json, console=console)
    except ImportError as error:
        _refuse(f"{error}; pip install 'rollout-core[cli,hf]'")
    raise typer.Exit(0 if held else 1)


@app.command("bench")
def bench_command(
    which: Annotated[list[str] | None, typer.Argument(help="planning, packing; none: both.")] = None,
    repeats: Annotated[int, typer.Option(min=1, help="Repeats of each measurement.")] = 21,
    threads: Annotated[int, typer.Option(min=1, help="Threads for packing.")] = 2,
) -> None:
    """Measure planning and packing on the CPU, each beside its baseline."""
    from rollout_core.bench.command import BENCHES, bench

    unknown = [name for name in which or () if name not in BENCHES]
    if unknown:
        _refuse(f"no bench is named {unknown[0]!r}; there are {', '.join(BENCHES)}")
    bench(tuple(which or BENCHES), repeats=repeats, threads=threads, console=Console())


def _refuse(message: str) -> None:
    Console(stderr=True).print(message, style="bold red", markup=False)
    raise typer.Exit(2)


def main() -> None:
    """The entry point of the ``rollout-core`` command."""
    app()


if __name__ == "__main__":
    main()
