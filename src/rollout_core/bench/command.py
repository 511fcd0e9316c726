"""``rollout-core bench``: measurements beside their baselines. torch is imported when the command runs."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any, Final, NoReturn

import typer
from rich.console import Console

BENCHES: Final = ("planning", "host", "packing", "transfer", "conversation")
#: Asked for by name: it needs an engine.
ROLLOUT: Final = "rollout"
#: Asked for by name: it is for one device.
PACK: Final = "pack"
#: Asked for by name: it needs a GPU.
SYNC: Final = "sync"
ALONE: Final = (ROLLOUT, PACK, SYNC)


def bench_command(
    which: Annotated[
        list[str] | None,
        typer.Argument(
            help="planning, host, packing, transfer, conversation; none: all of these. Or one of rollout, pack, sync.",
            show_default=False,
        ),
    ] = None,
    repeats: Annotated[int | None, typer.Option(min=1, help="Repeats of each measurement: 21, of rollouts 5.")] = None,
    threads: Annotated[int, typer.Option(min=1, help="Threads for packing.")] = 2,
    worker: Annotated[str, typer.Option(help="rollout: hf, vllm, vllm-async or sglang.")] = "hf",
    model: Annotated[Path | None, typer.Option(help="rollout: a folder; none: a random model.", show_default=False)] = None,
    shape: Annotated[
        str, typer.Option(help="rollout, sync: whose shape the random model has: SmolLM2-135M, Qwen2.5-7B or Qwen3-30B-A3B.")
    ] = "SmolLM2-135M",
    layers: Annotated[
        int | None, typer.Option(min=1, help="rollout, sync: fewer layers than that has.", show_default=False)
    ] = None,
    capacity: Annotated[
        int | None, typer.Option(min=1, help="rollout, sync: MiB of a bucket, at most.", show_default=False)
    ] = None,
    device: Annotated[str, typer.Option(help="rollout, pack: cpu or cuda.")] = "cpu",
    dtype: Annotated[str, typer.Option(help="rollout: float32 or bfloat16.")] = "float32",
    graphs: Annotated[bool, typer.Option("--graphs", help="rollout: with CUDA graphs.")] = False,
    concurrency: Annotated[list[int] | None, typer.Option(min=1, help="rollout: requests at once; may be repeated.")] = None,
    requests: Annotated[int, typer.Option(min=1, help="rollout: requests for each concurrency.")] = 8,
    prompt_tokens: Annotated[int, typer.Option(min=1, help="rollout: tokens of a prompt.")] = 64,
    response_tokens: Annotated[int, typer.Option(min=1, help="rollout: tokens of a response.")] = 32,
    plot: Annotated[Path | None, typer.Option(help="rollout, pack: draw it into a PNG, SVG or PDF.", show_default=False)] = None,
    json: Annotated[Path | None, typer.Option(help="rollout, pack, sync: write the figures as JSON.", show_default=False)] = None,
) -> None:
    """Measure planning, an update's host time, packing, updates between processes and growing conversations on the CPU, each beside
    its baseline. Or, by itself: a worker's rollouts beside its engine's own loop; packing and unpacking on one device, or updates
    of a model by CUDA IPC, beside a plain copy."""
    unknown = [name for name in which or () if name not in (*BENCHES, *ALONE)]
    if unknown:
        _refuse(f"no bench is named {unknown[0]!r}; there are {', '.join((*BENCHES, *ALONE))}")
    alone = next((name for name in which or () if name in ALONE), None)
    if alone is not None and which != [alone]:
        _refuse(f"{alone} is measured by itself: name no other bench")
    if alone == PACK:
        _pack(device, repeats or 20, plot, json)
        return
    if alone == SYNC:
        _sync(shape, layers, capacity, repeats or 10, json)
        return
    if alone == ROLLOUT:
        load = {"concurrencies": concurrency or [1, 8], "requests": requests, "prompt_tokens": prompt_tokens}
        load |= {"response_tokens": response_tokens, "repeats": repeats or 5, "shape": shape, "layers": layers}
        load |= {"capacity": capacity << 20} if capacity else {}
        _rollout(worker, model, load, {"device": device, "dtype": dtype, "graphs": graphs}, plot, json)
        return
    repeats = repeats or 21
    from rollout_core.bench.report import bench

    console = _console()
    bench(tuple(which or BENCHES), repeats=repeats, threads=threads, console=console)


def _pack(device: str, repeats: int, plot: Path | None, json: Path | None) -> None:
    from rollout_core.bench.pack import bench_pack
    from rollout_core.bench.pack_report import check_plot, print_pack, write_pack_json, write_pack_plot

    _check_files(plot, json)
    console = _console()
    try:
        if plot is not None:
            check_plot(plot)
        with console.status("starting") as status:
            bench = bench_pack(device, repeats=repeats, progress=lambda words: status.update(words))
        print_pack(bench, console)
        if json is not None:
            write_pack_json(bench, json)
        if plot is not None:
            write_pack_plot(bench, plot)
    except (ValueError, OSError) as error:
        _refuse(str(error))


def _rollout(
    worker: str, model: Path | None, load: dict[str, Any], setting: dict[str, Any], plot: Path | None, json: Path | None
) -> None:
    from rollout_core.bench.rollout import KINDS, Setting, bench_rollout
    from rollout_core.bench.rollout_report import check_ending, print_rollout, write_json, write_plot
    from rollout_core.errors import RolloutCoreError

    if worker not in KINDS:
        _refuse(f"--worker is {worker!r}; it is one of {', '.join(KINDS)}")
    if model is not None and not (model / "config.json").is_file():
        _refuse(f"--model: {model} has no config.json; pass a folder as save_pretrained writes it")
    _check_files(plot, json)
    console = _console()
    try:
        if plot is not None:
            check_ending(plot)
        with console.status("starting") as status:
            bench = bench_rollout(
                worker,
                model,
                **load,
                setting=Setting(**setting),
                progress=lambda words: status.update(words),
            )
        print_rollout(bench, console)
        if json is not None:
            write_json(bench, json)
        if plot is not None:
            write_plot(bench, plot)
    except (RolloutCoreError, ValueError, OSError) as error:
        _refuse(str(error))
    except ImportError as error:
        _refuse(f"{error}: install the engine, and 'rollout-core[cli,hf]'")


def _sync(shape: str, layers: int | None, capacity: int | None, repeats: int, json: Path | None) -> None:
    import torch

    from rollout_core.bench.sync import CAPACITY, bench_sync
    from rollout_core.bench.sync_report import print_sync, write_sync_json
    from rollout_core.errors import RolloutCoreError

    _check_files(None, json)
    if not torch.cuda.is_available():
        _refuse("sync is measured on a GPU, and torch sees none")
    console = _console()
    try:
        with console.status(f"updates of {shape}"):
            bench = bench_sync(shape, layers=layers, capacity=capacity << 20 if capacity else CAPACITY, repeats=repeats)
    except RolloutCoreError as error:
        _refuse(str(error))
    print_sync(bench, console)
    if json is not None:
        write_sync_json(bench, json)


def _check_files(plot: Path | None, json: Path | None) -> None:
    for option, file in (("--plot", plot), ("--json", json)):
        if file is not None and not file.absolute().parent.is_dir():
            _refuse(f"{option}: {file} is in no folder that exists")


def _console() -> Console:
    console = Console()
    if not console.is_terminal and "COLUMNS" not in os.environ:
        console.width = 160  # in a file or pipe nothing has to fit 80 columns
    return console


def _refuse(message: str) -> NoReturn:
    Console(stderr=True).print(message, style="bold red", markup=False, highlight=False, soft_wrap=True)
    raise typer.Exit(2)
