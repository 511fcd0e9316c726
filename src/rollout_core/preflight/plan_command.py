"""``rollout-core plan``: the buckets of a model, before any weight is loaded."""

from __future__ import annotations

import json
import os
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

if TYPE_CHECKING:
    from rich.console import Console

# torch, transformers and matplotlib are imported when the command runs: the help of all commands imports this module.


class Order(StrEnum):
    """``rollout_core.bucketing.Options.order``, for the command line."""

    GIVEN = "given"
    PACKED = "packed"


class Oversize(StrEnum):
    """``rollout_core.bucketing.Options.oversize``, for the command line."""

    SPLIT = "split"
    OWN = "own"
    ERROR = "error"


class PlotColour(StrEnum):
    """What the plot's colours stand for."""

    DTYPE = "dtype"
    LAYER = "layer"


def plan_command(
    model_dir: Annotated[
        Path,
        typer.Argument(help="A directory with safetensors files or a config.json, or one safetensors file.", show_default=False),
    ],
    capacity: Annotated[str, typer.Option(help="Bytes of a bucket: 512MiB, 1.5GiB, 2GB or a plain number.")] = "512MiB",
    order: Annotated[Order, typer.Option(help="Order within a bucket; packed needs no padding while --align is 1.")] = Order.GIVEN,
    oversize: Annotated[Oversize, typer.Option(help="What becomes of a tensor larger than a bucket.")] = Oversize.SPLIT,
    align: Annotated[int, typer.Option(help="Every offset is a multiple of this, a power of two.")] = 1,
    plot: Annotated[Path | None, typer.Option(help="Draw the buckets into this .png, .svg or .pdf.", show_default=False)] = None,
    colour: Annotated[PlotColour, typer.Option(help="What the plot's colours stand for.")] = PlotColour.DTYPE,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Write the plan as JSON to this file.", show_default=False)
    ] = None,
    show_all: Annotated[bool, typer.Option("--all", help="Show every bucket, not the first and last few.")] = False,
) -> None:
    """Show how a model's tensors are laid out into buckets. Reads safetensors headers or the config, never weights."""
    from rollout_core.bucketing import Options, plan_buckets
    from rollout_core.errors import RolloutCoreError
    from rollout_core.preflight.model_dir import specs_from_dir
    from rollout_core.preflight.plan_report import parse_size, plan_json, plan_table

    console = _console()
    try:
        # All that is wrong with the options first: reading a model may take a while.
        options: dict[str, Any] = {
            "capacity": parse_size(capacity),
            "oversize": oversize.value,
            "order": order.value,
            "align": align,
        }
        Options(**options)
        if plot is not None:
            from rollout_core.preflight.plan_plot import check_ending, plot_plan

            check_ending(plot)
    except ValueError as error:
        _fail(error)
    try:
        specs, source = specs_from_dir(model_dir)
        plan = plan_buckets(specs, **options)
    except RolloutCoreError as error:
        _fail(error)
    console.print(plan_table(plan, source=source, show_all=show_all))
    try:
        if json_file is not None:
            json_file.write_text(json.dumps(plan_json(plan)) + "\n", encoding="utf-8")
            console.print(f"plan written to {json_file}", markup=False, highlight=False, soft_wrap=True)
        if plot is not None:
            plot_plan(plan, plot, colour.value, title=model_dir.resolve().name)
            console.print(f"plot written to {plot}", markup=False, highlight=False, soft_wrap=True)
    except OSError as error:
        _fail(error)


def _console() -> Console:
    from rich.console import Console

    console = Console(highlight=False)
    if not console.is_terminal and "COLUMNS" not in os.environ:
        console.width = 160  # in a file or pipe nothing has to fit 80 columns, and tensors' names do not
    return console


def _fail(error: Exception) -> NoReturn:
    """One line on stderr and exit code 2, as for any other wrong argument."""
    from rich.console import Console

    message = " ".join(str(error).split())
    Console(stderr=True).print(f"error: {message}", style="red", markup=False, highlight=False, soft_wrap=True)
    raise typer.Exit(2)
