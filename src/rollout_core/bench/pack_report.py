"""A bench of packing as tables, as JSON and as a picture."""

from __future__ import annotations

from pathlib import Path
from typing import Final

import msgspec
from rich.console import Console
from rich.table import Table

from rollout_core.bench.pack import FLOOR, Case, Method, PackBench
from rollout_core.bench.report import hardware

_ENDINGS: Final = (".png", ".svg", ".pdf")


def print_pack(bench: PackBench, console: Console) -> None:
    """Tables of every case and direction: speed by the device's time, where there is one, and beyond the
    floor by the host's."""
    versions = ", ".join(f"{name} {version}" for name, version in bench.versions.items())
    console.print(f"{hardware()}, {bench.device}, {versions}; median of {bench.repeats}", highlight=False, soft_wrap=True)
    if bench.uncompiled is not None:
        console.print(f"without compiled code, so torch is asked where tensors lie: {bench.uncompiled}", highlight=False)
    for case in bench.cases:
        for direction, methods in case.methods.items():
            console.print(_table(case, direction, methods))


def _table(case: Case, direction: str, methods: dict[str, Method]) -> Table:
    title = f"{direction} {case.name}: {case.tensors} tensors, {case.nbytes / 1e6:.0f} MB"
    table = Table(title=title, title_justify="left")
    for name in (
        "",
        "device ms",
        "min to max",
        "GB/s",
        "of the floor's speed",
        "wall ms",
        "min to max",
        "us a tensor beyond",
    ):
        table.add_column(name, justify="right" if name else "left")
    floor = methods[FLOOR]
    for name, method in methods.items():
        best = method.best
        beyond = 1e3 * (method.wall.median - floor.wall.median) / case.tensors
        table.add_row(
            name,
            f"{best.median:.3f}" if method.device else "",
            f"{best.low:.3f} to {best.high:.3f}" if method.device else "",
            f"{case.nbytes / best.median / 1e6:.0f}",
            f"{100 * floor.best.median / best.median:.1f}%",
            f"{method.wall.median:.3f}",
            f"{method.wall.low:.3f} to {method.wall.high:.3f}",
            f"{beyond:.3f}",
        )
    return table


def write_pack_json(bench: PackBench, file: Path) -> None:
    whole = {"hardware": hardware(), **msgspec.to_builtins(bench)}
    file.write_bytes(msgspec.json.format(msgspec.json.encode(whole), indent=2) + b"\n")


def check_plot(file: Path) -> None:
    if file.suffix.lower() not in _ENDINGS:
        raise ValueError(f"--plot: {file} ends in none of {', '.join(_ENDINGS)}")


def write_pack_plot(bench: PackBench, file: Path) -> None:
    """For each case the methods' speed as a share of the floor's, packing on the left and unpacking on the right."""
    from matplotlib.figure import Figure

    check_plot(file)
    figure = Figure(figsize=(13.0, 2.4 * len(bench.cases)), dpi=130, layout="constrained")
    axes = figure.subplots(len(bench.cases), 2, squeeze=False)
    for case, row in zip(bench.cases, axes, strict=True):
        for axis, (direction, methods) in zip(row, case.methods.items(), strict=True):
            floor = methods[FLOOR].best.median
            names = [name for name in methods if name != FLOOR]
            shares = [100 * floor / methods[name].best.median for name in names]
            axis.barh(names, [min(share, 250.0) for share in shares], color="#7a9e7e")
            for place, share in enumerate(shares):
                axis.annotate(f"{share:.3g}%", (min(share, 250.0), place), fontsize=7, va="center")
            axis.axvline(100, color="black", linewidth=0.8)
            axis.invert_yaxis()
            axis.tick_params(labelsize=7)
            axis.set_title(f"{direction} {case.name}: {case.tensors} tensors, {case.nbytes / 1e6:.0f} MB", fontsize=8)
    figure.suptitle(f"speed in percent of one copy of the same bytes; {bench.device}, median of {bench.repeats}", fontsize=9)
    figure.savefig(file, format=file.suffix[1:].lower())
