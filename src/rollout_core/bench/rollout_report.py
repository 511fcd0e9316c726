"""A bench of rollouts as a table, as JSON and as a picture."""

from __future__ import annotations

from pathlib import Path
from typing import Final

import msgspec
from rich.console import Console
from rich.table import Table

from rollout_core.bench.report import hardware
from rollout_core.bench.rollout import RolloutBench, to_builtins
from rollout_core.bench.timing import Timing

ENDINGS: Final = (".png", ".svg", ".pdf")


def print_rollout(bench: RolloutBench, console: Console) -> None:
    versions = ", ".join(f"{name} {version}" for name, version in bench.versions.items())
    console.print(f"{hardware()}, {versions}; model {bench.model}; {_setting(bench)}", highlight=False, soft_wrap=True)
    loads = Table(title=f"rollouts, {bench.worker} beside the engine's own loop", title_justify="left")
    names = ("requests", "tokens", "worker ms", "min to max", "own loop ms", "min to max", "tokens/s", "overhead", "repeats'")
    for name in ("at once", *names, "first token ms", "other tokens"):
        loads.add_column(name, justify="right")
    for load in bench.loads:
        loads.add_row(
            str(load.concurrency),
            str(load.requests),
            f"{load.prompt_tokens} + {load.response_tokens}",
            f"{load.worker.median:.0f}",
            _spread(load.worker),
            f"{load.own.median:.0f}",
            _spread(load.own),
            f"{1e3 * load.tokens / load.worker.median:.0f}",
            f"{100 * load.overhead:+.1f}%",
            " ".join(f"{100 * (ratio - 1):+.0f}" for ratio in load.ratios),
            f"{load.first_token.median:.0f} ({_spread(load.first_token)})",
            str(load.differing),
        )
    console.print(loads)
    sync = bench.sync
    table = Table(title=f"updates of {sync.nbytes / 1e6:.0f} MB in {sync.buckets} buckets", title_justify="left")
    for name in ("", "median ms", "min to max", "against a plain copy"):
        table.add_column(name, justify="right" if name else "left")
    rows = {
        "pack, with digests": sync.pack,
        "apply in the engine, with digests": sync.apply,
        "whole update, in which they overlap": sync.whole,
        "read back, every tensor": sync.reading,
        "plain copy, one thread": sync.copy,
    }
    for name, timing in rows.items():
        table.add_row(name, f"{timing.median:.1f}", _spread(timing, 1), f"{timing.median / sync.copy.median:.2f} x")
    console.print(table)


def _setting(bench: RolloutBench) -> str:
    setting = bench.setting
    device = setting.device
    if device != "cpu":
        import torch

        device = torch.cuda.get_device_name(device)
    return f"{device}, {setting.dtype}" + (", CUDA graphs" if setting.graphs else "")


def _spread(timing: Timing, digits: int = 0) -> str:
    return f"{timing.low:.{digits}f} to {timing.high:.{digits}f}"


def write_json(bench: RolloutBench, file: Path) -> None:
    whole = {"hardware": hardware(), **to_builtins(bench)}
    file.write_bytes(msgspec.json.format(msgspec.json.encode(whole), indent=2) + b"\n")


def check_ending(file: Path) -> None:
    if file.suffix.lower() not in ENDINGS:
        raise ValueError(f"--plot: {file} ends in none of {', '.join(ENDINGS)}")


def write_plot(bench: RolloutBench, file: Path) -> None:
    """Tokens per second over the concurrency, both loops, with the spread over the repeats; and the parts of an update."""
    from matplotlib.figure import Figure

    check_ending(file)
    figure = Figure(figsize=(11.0, 4.2), dpi=130, layout="constrained")
    left, right = figure.subplots(1, 2)
    places = range(len(bench.loads))
    for shift, name, label in ((-0.2, "worker", f"rollout_core, {bench.worker}"), (0.2, "own", "the engine's own loop")):
        timings: list[Timing] = [getattr(load, name) for load in bench.loads]
        speeds = [1e3 * load.tokens / timing.median for load, timing in zip(bench.loads, timings, strict=True)]
        below = [s - 1e3 * load.tokens / t.high for s, load, t in zip(speeds, bench.loads, timings, strict=True)]
        above = [1e3 * load.tokens / t.low - s for s, load, t in zip(speeds, bench.loads, timings, strict=True)]
        left.bar([place + shift for place in places], speeds, 0.4, yerr=[below, above], capsize=3, label=label)
    left.set_xticks(list(places), [f"{load.concurrency} at once\n{100 * load.overhead:+.1f}%" for load in bench.loads])
    left.set_ylabel("tokens per second, median; bars from slowest to fastest repeat")
    left.legend()
    sync = bench.sync
    parts = {"pack": sync.pack, "apply": sync.apply, "whole": sync.whole, "read back": sync.reading, "plain copy": sync.copy}
    medians = [timing.median for timing in parts.values()]
    spread = [[t.median - t.low for t in parts.values()], [t.high - t.median for t in parts.values()]]
    right.barh(list(parts), medians, xerr=spread, capsize=3, color="#7a9e7e")
    right.invert_yaxis()
    right.set_xlabel(f"ms for {sync.nbytes / 1e6:.0f} MB of weights, median and spread")
    figure.suptitle(
        f"{bench.model}; {_setting(bench)}; {', '.join(f'{name} {version}' for name, version in bench.versions.items())}",
        fontsize=8,
    )
    figure.savefig(file, format=file.suffix[1:].lower())
