"""The command line: ``rollout-core preflight | check | plan | conversation | bench``.

Heavy imports wait until a command needs them.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated, NoReturn

try:
    import typer
    from rich.console import Console
except ImportError:  # pragma: no cover
    sys.exit("the command line needs its extra: pip install 'rollout-core[cli,hf]'")

from rollout_core.bench.command import bench_command
from rollout_core.errors import RolloutCoreError
from rollout_core.preflight.plan_command import plan_command
from rollout_core.testing.command import check_command
from rollout_core.viewing.command import conversation_command

app = typer.Typer(no_args_is_help=True, add_completion=False, help=__doc__, pretty_exceptions_enable=False)
app.command("check")(check_command)
app.command("plan")(plan_command)
app.command("conversation")(conversation_command)
app.command("bench")(bench_command)


@app.command("preflight")
def preflight_command(
    worker: Annotated[
        str, typer.Option(help="The kind of worker: hf, vllm, vllm-async, vllm-server, sglang or sglang-server.")
    ] = "hf",
    url: Annotated[str | None, typer.Option(help="A server that runs, of --worker vllm or sglang; none: one is started.")] = None,
    model: Annotated[Path | None, typer.Option(help="A folder with config.json and weights; none: a small model is made.")] = None,
    pictures: Annotated[bool, typer.Option("--pictures", help="Make a small model that takes pictures, too.")] = False,
    capacity: Annotated[str, typer.Option(help="Bucket capacity, for example 64MiB.")] = "1MiB",
    json: Annotated[Path | None, typer.Option(help="Also write the report here, for machines.")] = None,
) -> None:
    """Check a rollout worker end to end: weights in buckets to its process, digests read back, greedy tokens compared, and of a
    model that takes pictures a conversation of three turns with them, whose data goes to the engine once.

    Exits with 0 only if every check holds, 1 if one does not, 2 if it could not begin.
    """
    from rollout_core.preflight.command import preflight
    from rollout_core.preflight.plan_report import parse_size  # brings torch
    from rollout_core.preflight.workers import KINDS, SERVERS

    console = Console()
    if not console.is_terminal and "COLUMNS" not in os.environ:
        console.width = 160  # in a file or pipe nothing has to fit 80 columns
    if worker not in KINDS:
        _refuse(f"--worker is {worker!r}; this version has {', '.join(KINDS)}")
    if url is not None and worker not in SERVERS:
        _refuse(f"--url: a server is of --worker {' or '.join(SERVERS)}, not {worker}")
    if pictures and (model is not None or url is not None):
        _refuse("--pictures makes a model: a folder's or a server's is checked with pictures if it takes them")
    if model is not None and not (model / "config.json").is_file():
        _refuse(f"--model: {model} has no config.json; pass a folder as save_pretrained writes it")
    if json is not None and (json.is_dir() or not json.parent.is_dir()):
        _refuse(f"--json: {json} cannot be written; pass a file in a folder that exists")
    try:
        nbytes = parse_size(capacity)
    except RolloutCoreError as error:
        _refuse(f"--capacity: {error}")
    if nbytes == 0:
        _refuse("--capacity is 0; give a number of bytes, for example 64MiB")
    try:
        held = preflight(model, worker=worker, url=url, pictures=pictures, capacity=nbytes, json_file=json, console=console)
    except ImportError as error:
        _refuse(f"{error}; pip install 'rollout-core[cli,hf]'")
    except (OSError, RolloutCoreError) as error:
        _refuse(str(error))
    raise typer.Exit(0 if held else 1)


def _refuse(message: str) -> NoReturn:
    Console(stderr=True).print(message, style="bold red", markup=False, highlight=False, soft_wrap=True)
    raise typer.Exit(2)


def main() -> None:
    """The entry point of the ``rollout-core`` command."""
    app()


if __name__ == "__main__":
    main()
