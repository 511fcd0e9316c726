"""A plan as a picture: a bar per bucket, a segment per tensor."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Final, get_args

import numpy as np
from matplotlib.cm import ScalarMappable
from matplotlib.collections import LineCollection, PolyCollection
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator

from rollout_core.bucketing import BucketPlan
from rollout_core.preflight.plan_report import format_size
from rollout_core.preflight.plan_segments import (
    RGB,
    SCALE,
    Colour,
    Kind,
    Rows,
    Segment,
    colours_of,
    drawable,
    labels_of,
    plan_words,
    rows_of,
)

ENDINGS: Final = (".png", ".svg", ".pdf")

# Inches. The margins are fixed, so that the bytes of a pixel are known before anything is laid out.
_WIDTH, _LEFT, _RIGHT, _BOTTOM, _TOP, _LEGEND_ROW = 13.0, 0.75, 0.65, 0.55, 0.45, 0.2
_DPI: Final = 130
_FONT, _SMALLEST_FONT = 7.0, 5.0
_AXES_PIXELS: Final = (_WIDTH - _LEFT - _RIGHT) * _DPI
#: A bucket over capacity may be any size; past this many capacities its bar is cut, or the others would be slivers.
_MOST_CAPACITIES: Final = 6
#: Pixels below which a line between two segments, or a hatch, would be all that one sees.
_EDGE_PIXELS, _HATCH_PIXELS = 5.0, 6.0

_PADDING: Final = "#c9c9c9"


def plot_plan(plan: BucketPlan, file: Path, colour: Colour = "dtype", *, title: str = "") -> None:
    """Draw the plan into ``file``, a PNG, SVG or PDF by its ending. ``colour`` and ``title``: see ``draw_plan``.

    Raises ``ValueError`` for another ending or colour, ``OSError`` if the file cannot be written.
    """
    check_ending(file)
    draw_plan(plan, colour, title=title).savefig(file, format=file.suffix[1:].lower())


def check_ending(file: Path) -> None:
    """Raise ``ValueError`` unless ``plot_plan`` can write a file of this name."""
    if file.suffix.lower() not in ENDINGS:
        raise ValueError(f"the plot is to go to {str(file)!r}; its name must end in {', '.join(ENDINGS)}")


def draw_plan(plan: BucketPlan, colour: Colour = "dtype", *, title: str = "") -> Figure:
    """The plan as a figure: a horizontal bar per bucket, x in bytes, a segment per slot coloured by its dtype or its layer.

    Neighbours of one colour that are thinner than a pixel are one segment; over 400 buckets, neighbouring ones share a row that
    shows their mean. ``title`` stands before the totals. Artists carry gids: ``segments``, ``pieces`` (of split tensors),
    ``padding`` and ``capacity``. Raises ``ValueError`` for another ``colour``.
    """
    if colour not in get_args(Colour):
        raise ValueError(f"colour is {colour!r}; it is one of {', '.join(get_args(Colour))}")
    widest = max((layout.nbytes for layout in plan.buckets), default=plan.capacity)
    extent = max(1, min(widest, _MOST_CAPACITIES * plan.capacity))
    if plan.capacity <= 4 * extent:  # else the line would be alone far to the right
        extent = max(extent, plan.capacity)
    right = extent * 1.004
    rows = rows_of(plan, colour, right / _AXES_PIXELS)
    colours = colours_of(rows.nbytes)
    handles = _handles(plan, rows, right, colours)
    scale_room = 3.0 if any(isinstance(kind, int) for kind in colours) else 0.0  # the scale of the layers stands at the right
    columns = _columns([len(handle.get_label()) for handle in handles], _WIDTH - _LEFT - _RIGHT - scale_room)
    top = _TOP + _LEGEND_ROW * max(1, -(-len(handles) // columns))
    row_inches = min(0.4, max(0.07, 16 / max(1, rows.count)))
    height = max(1.0, rows.count * row_inches) + top + _BOTTOM
    figure = Figure(figsize=(_WIDTH, height), dpi=_DPI)
    axes = figure.add_axes(
        (_LEFT / _WIDTH, _BOTTOM / height, (_WIDTH - _LEFT - _RIGHT) / _WIDTH, (height - top - _BOTTOM) / height)
    )
    axes.set_xlim(0, right)
    axes.set_ylim(max(1, rows.count) - 0.5, -0.5)
    thick = 0.41 if row_inches > 0.1 else 0.5
    _draw_bars(axes, rows, colours, thick, right)
    if not plan.buckets:
        axes.text(right / 2, 0, "nothing to send", ha="center", va="center", fontsize=10)
    if plan.capacity <= right:
        axes.axvline(plan.capacity, color="black", linestyle=(0, (4, 2)), linewidth=1.1, gid="capacity", zorder=5)
    font = min(_FONT, 0.75 * row_inches * 72 * 2 * thick)
    if font >= _SMALLEST_FONT:
        _write_labels(axes, rows.segments, colours, right, font)
    _label_axes(axes, plan, rows, row_inches, right)
    words = f"{title}: {plan_words(plan)}" if title else plan_words(plan)
    figure.text(
        _LEFT / _WIDTH,
        1 - 0.12 / height,
        drawable(words),
        va="top",
        fontsize=10,
        parse_math=False,
    )
    _draw_legend(figure, handles, colours, columns, height)
    return figure


def _draw_bars(axes: Any, rows: Rows, colours: dict[Kind, RGB], thick: float, right: float) -> None:
    pixel = right / _AXES_PIXELS
    faces = [colours[segment.kind] for segment in rows.segments]
    boxes = _boxes(((s.row, s.start, s.nbytes) for s in rows.segments), thick)
    # Without antialiasing, neighbours meet without a seam of background between them.
    axes.add_collection(PolyCollection(boxes, facecolors=faces or "none", linewidths=0, antialiaseds=False, gid="segments"))
    gaps = [gap for gap in rows.gaps if gap[2] > 0]
    axes.add_collection(PolyCollection(_boxes(gaps, thick), facecolors=_PADDING, linewidths=0, antialiaseds=False, gid="padding"))
    wide = [gap for gap in gaps if gap[2] >= _HATCH_PIXELS * pixel]
    hatch = PolyCollection(_boxes(wide, thick), facecolors="none", edgecolors="#7d7d7d", linewidths=0, hatch="//////")
    axes.add_collection(hatch)
    pieces = [(s.row, s.start, s.nbytes) for s in rows.segments if s.piece]
    axes.add_collection(
        PolyCollection(
            _boxes(pieces, thick), facecolors="none", edgecolors=(0, 0, 0, 0.6), linewidths=1.0, hatch="\\\\", gid="pieces"
        )
    )
    _draw_edges(axes, rows.segments, thick, _EDGE_PIXELS * pixel)


def _draw_edges(axes: Any, segments: Sequence[Segment], thick: float, least: float) -> None:
    """White lines between segments at least ``least`` bytes apart, thicker ones between layers, whose colours are close."""
    lines: dict[float, list[Any]] = {0.4: [], 1.6: []}
    last = {0.4: 0.0, 1.6: 0.0}
    for before, after in itertools.pairwise(segments):
        if before.row != after.row:
            last = dict.fromkeys(last, 0.0)
            continue
        layers = before.kind != after.kind and isinstance(before.kind, int) and isinstance(after.kind, int)
        width = 1.6 if layers else 0.4
        if after.start - last[width] >= least:
            lines[width].append([(after.start, after.row - thick), (after.start, after.row + thick)])
            last[width] = after.start
    for width, ends in lines.items():
        axes.add_collection(LineCollection(ends, colors="white", linewidths=width))


def _boxes(extents: Iterable[tuple[int, float, float]], thick: float) -> Any:
    """The corners of boxes around their rows, as PolyCollection takes them."""
    array = np.array(list(extents), dtype=np.float64).reshape(-1, 3)
    row, start, end = array[:, 0], array[:, 1], array[:, 1] + array[:, 2]
    low, high = row - thick, row + thick
    return np.stack([np.stack(pair, axis=1) for pair in ((start, low), (end, low), (end, high), (start, high))], axis=1)


def _write_labels(axes: Any, segments: Sequence[Segment], colours: dict[Kind, RGB], right: float, font: float) -> None:
    pixel = right / _AXES_PIXELS
    for label in labels_of(segments, lambda text: (len(text) * 0.6 * font * _DPI / 72 + 6) * pixel):
        face = (1.0, 1.0, 1.0) if label.kind is None else colours[label.kind]
        bright = 0.299 * face[0] + 0.587 * face[1] + 0.114 * face[2]
        axes.text(
            label.start + min(label.nbytes, right - label.start) / 2,
            label.row,
            label.text,
            color="black" if bright > 0.5 else "white",
            bbox={"facecolor": face, "edgecolor": "none", "pad": 0.6},  # over the lines between segments
            ha="center",
            va="center_baseline",
            fontsize=font,
            parse_math=False,
            zorder=4,
        )


def _label_axes(axes: Any, plan: BucketPlan, rows: Rows, row_inches: float, right: float) -> None:
    step = 1 << max(0, math.ceil(math.log2(right / 10)))  # ticks at powers of two: 64 MiB, 128 MiB
    ticks = range(0, int(right) + 1, step)
    axes.set_xticks(ticks, [format_size(nbytes) for nbytes in ticks])
    axes.set_xlabel("bytes in the bucket" if rows.per_row == 1 else f"mean bytes of {rows.per_row} buckets")
    every = math.ceil(1.5 * _FONT / (row_inches * 72))
    shown = range(0, rows.count, every)
    axes.set_yticks(list(shown), [str(row * rows.per_row) for row in shown])
    axes.set_ylabel("bucket")
    axes.tick_params(labelsize=_FONT + 0.5)
    axes.spines[["top", "right"]].set_visible(False)
    for row in shown if rows.per_row == 1 else ():
        nbytes = plan.buckets[row].nbytes
        ink = "black" if nbytes <= plan.capacity else "#c00000"
        words = f"{nbytes / plan.capacity:.1%}" if nbytes <= right else f"\u2192 {format_size(nbytes)}"
        axes.text(1.006, row, words, transform=axes.get_yaxis_transform(), va="center", fontsize=_FONT, color=ink)


def _handles(plan: BucketPlan, rows: Rows, right: float, colours: dict[Kind, RGB]) -> list[Any]:
    """What the legend explains; layers have a scale of their own."""
    handles: list[Any] = [
        Patch(color=colours[kind], label=f"{drawable(kind)} ({format_size(nbytes)})")
        for kind, nbytes in rows.nbytes.items()
        if isinstance(kind, str)
    ]
    if any(segment.piece for segment in rows.segments):
        handles.append(Patch(facecolor="white", edgecolor="black", hatch="\\\\\\", label="piece of a split tensor"))
    if rows.gaps:
        handles.append(Patch(facecolor=_PADDING, edgecolor="#7d7d7d", hatch="//////", label="padding"))
    where = "" if plan.capacity <= right else f" ({format_size(plan.capacity)}, off the scale)"
    handles.append(Line2D([], [], color="black", linestyle=(0, (4, 2)), linewidth=1.1, label=f"capacity{where}"))
    return handles


def _columns(lengths: Sequence[int], room: float) -> int:
    """The most columns of legend entries, by the lengths of their texts, that fit into ``room`` inches."""
    for columns in range(len(lengths), 1, -1):
        parts = np.array_split(np.array(lengths), columns)  # as the legend itself fills its columns
        if sum(0.44 + 0.062 * int(part.max()) for part in parts) <= room:
            return columns
    return 1


def _draw_legend(figure: Figure, handles: list[Any], colours: dict[Kind, RGB], columns: int, height: float) -> None:
    legend = figure.legend(
        handles=handles,
        loc="upper left",
        bbox_to_anchor=(_LEFT / _WIDTH, 1 - 0.33 / height),
        ncols=columns,
        fontsize=8,
        frameon=False,
        borderaxespad=0,
        borderpad=0,
        handlelength=1.6,
        columnspacing=1.4,
    )
    for text in legend.get_texts():
        text.set_parse_math(False)
    layers = [kind for kind in colours if isinstance(kind, int)]
    if layers:
        place = ((_WIDTH - _RIGHT - 2.4) / _WIDTH, 1 - 0.46 / height, 2.4 / _WIDTH, 0.12 / height)
        scale = ScalarMappable(Normalize(0, max(1, max(layers))), SCALE)
        bar = figure.colorbar(scale, cax=figure.add_axes(place), orientation="horizontal")
        bar.ax.tick_params(labelsize=_FONT, length=2, pad=1)
        bar.ax.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        bar.ax.set_title("layer", fontsize=8, loc="left", x=-0.13, y=-0.4)
