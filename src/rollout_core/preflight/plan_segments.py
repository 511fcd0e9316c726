"""What a plot of a plan shows, without drawing it: rows of coloured segments in bytes, and the colour of each kind."""

from __future__ import annotations

import itertools
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Final, Literal, NamedTuple, TypeAlias

import matplotlib
from matplotlib.colors import to_rgb

from rollout_core.bucketing import BucketPlan, Slot, TensorSpec
from rollout_core.bucketing.dtypes import label
from rollout_core.preflight.plan_report import format_size, printable

Colour: TypeAlias = Literal["dtype", "layer"]
#: What shares a colour: a dtype's label, a layer's number, or the name of a part that is no layer of the main stack.
Kind: TypeAlias = str | int
RGB: TypeAlias = tuple[float, float, float]

#: More rows than this are unreadable at any height; above it neighbouring buckets share a row.
MAX_ROWS: Final = 400

EMBEDDINGS, HEAD, OTHER = "embeddings", "head", "no layer"
OTHER_STACKS: Final = "other stacks"
#: Stacks beside the main one that get a colour; the rest shares one.
_STACKS: Final = 6
#: The matplotlib scale for the layers of the main stack; no colour of its own below is on it.
SCALE: Final = "viridis"
_DTYPES: Final = {"bf16": "#4c78a8", "f16": "#72b7b2", "f32": "#f58518", "f64": "#e45756", "f8e4m3": "#54a24b", "f8e5m2": "#9bca6b"}
_PARTS: Final = {EMBEDDINGS: "#d1363b", HEAD: "#ff8c1a", OTHER: "#e377c2", OTHER_STACKS: "#a0a0a0"}
_SPARE: Final = ("#b279a2", "#9d755d", "#eeca3b", "#ff9da6", "#6b5b95", "#8c6d31", "#ad494a", "#a55194")
_LAYER: Final = re.compile(r"(.*?)(?:^|\.)([0-9]{1,9})(?:\.|$)")
_EMBEDDING: Final = re.compile(r"embed|(?:^|\.)w[tp]e(?:\.|$)")
_HEAD: Final = re.compile(r"(?:^|\.|_)head(?:\.|$)")


class Segment(NamedTuple):
    """A coloured run of one row: one slot, or neighbours of one kind that are each too thin to see. Bytes from the left."""

    row: int
    start: float
    nbytes: float
    kind: Kind
    slots: tuple[Slot, ...] = ()
    piece: bool = False


@dataclass
class Rows:
    """All rows of a plot. ``per_row`` consecutive buckets share a row, which then shows their mean.

    ``nbytes``: bytes of each kind in the whole plan, the most first. ``gaps``: padding as (row, start, nbytes).
    """

    count: int
    per_row: int
    nbytes: dict[Kind, int]
    segments: list[Segment] = field(default_factory=list)
    gaps: list[tuple[int, float, float]] = field(default_factory=list)


def rows_of(plan: BucketPlan, colour: Colour, pixel: float) -> Rows:
    """Lay out the rows; ``pixel``: bytes that one pixel shows, below which neighbours of one kind become one segment."""
    kind_of = kinds(plan, colour)
    per_row = -(-len(plan.buckets) // MAX_ROWS) or 1
    nbytes: Counter[Kind] = Counter()
    for spec in plan.specs:
        if spec.alias_of is None and spec.nbytes:
            nbytes[kind_of(spec)] += spec.nbytes
    rows = Rows(-(-len(plan.buckets) // per_row), per_row, dict(nbytes.most_common()))
    for row in range(rows.count):
        if per_row == 1:
            layout = plan.buckets[row]
            rows.segments += _segments(row, layout.slots, kind_of, pixel)
            rows.gaps += [(row, start, nbytes) for start, nbytes in layout.gaps()]
        else:
            _add_mean(rows, row, plan, kind_of)
    return rows


def _segments(row: int, slots: Sequence[Slot], kind_of: Callable[[TensorSpec], Kind], pixel: float) -> list[Segment]:
    segments: list[Segment] = []
    run: list[Slot] = []

    def flush() -> None:
        if run:
            start = run[0].offset
            segments.append(Segment(row, start, run[-1].end - start, kind_of(run[0].spec), tuple(run), run[0].is_piece))
            run.clear()

    for slot in slots:
        if slot.nbytes == 0:
            continue  # nothing to see, and it must not part its neighbours
        thin = slot.nbytes < pixel and not slot.is_piece
        if run and not (
            thin and run[-1].nbytes < pixel and run[-1].end == slot.offset and kind_of(run[0].spec) == kind_of(slot.spec)
        ):
            flush()
        run.append(slot)
        if slot.is_piece:
            flush()
    flush()
    return segments


def _add_mean(rows: Rows, row: int, plan: BucketPlan, kind_of: Callable[[TensorSpec], Kind]) -> None:
    """One row for several buckets: the mean bytes of each kind, in order of appearance, then the mean padding."""
    layouts = plan.buckets[row * rows.per_row : (row + 1) * rows.per_row]
    shares: Counter[tuple[Kind, bool]] = Counter()
    for layout in layouts:
        for slot in layout.slots:
            shares[kind_of(slot.spec), slot.is_piece] += slot.nbytes
    end = 0.0
    for (kind, piece), nbytes in shares.items():
        if nbytes:
            rows.segments.append(Segment(row, end, nbytes / len(layouts), kind, (), piece))
            end += nbytes / len(layouts)
    padding = sum(layout.padding for layout in layouts) / len(layouts)
    if padding:
        rows.gaps.append((row, end, padding))


def kinds(plan: BucketPlan, colour: Colour) -> Callable[[TensorSpec], Kind]:
    """What each tensor is coloured by.

    By layer: the number of its layer in the stack with the most bytes ("model.layers"). Another stack, such as a vision tower's
    blocks, counts from 0 again and is one kind by its name; what is in no stack is the embeddings, the head or neither.
    """
    if colour == "dtype":
        return lambda spec: label(spec.dtype)
    found = {spec.name: stack_and_layer(spec.name) for spec in plan.specs}
    sizes: Counter[str] = Counter()
    for spec in plan.specs:
        stack = found[spec.name]
        if stack is not None and spec.alias_of is None:
            sizes[stack[0]] += spec.nbytes
    stacks = [stack for stack, _ in sizes.most_common(1 + _STACKS)]

    def kind_of(spec: TensorSpec) -> Kind:
        stack = found[spec.name]
        if stack is not None:
            if stack[0] not in stacks:
                return OTHER_STACKS
            return stack[1] if stack[0] == stacks[0] else stack[0]
        if _EMBEDDING.search(spec.name):
            return EMBEDDINGS
        return HEAD if _HEAD.search(spec.name) else OTHER

    return kind_of


def stack_and_layer(name: str) -> tuple[str, int] | None:
    """``model.layers.7.mlp.experts.3.up_proj`` is in layer 7 of ``model.layers``; None for a name without a number."""
    match = _LAYER.match(name)
    return (match[1] or "layers", int(match[2])) if match else None


def colours_of(present: Iterable[Kind]) -> dict[Kind, RGB]:
    """A colour for each kind: layers along a scale in order of their number, the rest one of their own."""
    present = list(present)
    spare = itertools.cycle(_SPARE)
    layers = sorted(kind for kind in present if isinstance(kind, int))
    scale = matplotlib.colormaps[SCALE]
    named = {kind: _DTYPES.get(kind) or _PARTS.get(kind) or next(spare) for kind in present if isinstance(kind, str)}
    return {**{kind: to_rgb(name) for kind, name in named.items()}, **{n: scale(n / max(1, layers[-1]))[:3] for n in layers}}


class Label(NamedTuple):
    """Words over a stretch of a row."""

    row: int
    start: float
    nbytes: float
    text: str
    kind: Kind | None  # None over several


def labels_of(segments: Sequence[Segment], room: Callable[[str], float]) -> list[Label]:
    """What can be written into segments: a tensor's name where it fits, else the layer over neighbours too narrow for names.

    ``room``: bytes that a text takes up at the scale of the plot.
    """
    labels: list[Label] = []
    run: list[Segment] = []

    def flush() -> None:
        stack = stack_and_layer(run[0].slots[0].name) if run else None
        if stack is not None:
            text, nbytes = f"layer {stack[1]}", run[-1].start + run[-1].nbytes - run[0].start
            if room(text) <= nbytes:
                same = all(segment.kind == run[0].kind for segment in run)
                labels.append(Label(run[0].row, run[0].start, nbytes, text, run[0].kind if same else None))
        run.clear()

    for segment in segments:
        if not segment.slots:
            continue
        names = short_names(segment.slots[0]) if len(segment.slots) == 1 else []
        text = next((name for name in names if room(name) <= segment.nbytes), None)
        if text is not None:
            flush()
            labels.append(Label(segment.row, segment.start, segment.nbytes, text, segment.kind))
            continue
        if run and (run[0].row, stack_and_layer(run[0].slots[0].name)) != (
            segment.row,
            stack_and_layer(segment.slots[0].name),
        ):
            flush()
        run.append(segment)
    flush()
    return labels


def short_names(slot: Slot) -> list[str]:
    """The name of what lies in a slot and shorter ways to write it, the longest first."""
    plain = drawable(slot.name)
    short = plain.removesuffix(".weight")
    names = [plain, short, short.removeprefix("model."), short.rsplit(".", 1)[-1]]
    return [f"{plain} from {format_size(slot.start)}", *names] if slot.start else names


def drawable(text: str) -> str:
    """Text in ASCII, the rest as escapes: matplotlib warns of every glyph that its font lacks."""
    return printable(text).encode("ascii", "backslashreplace").decode("ascii")


def plan_words(plan: BucketPlan) -> str:
    """The totals of a plan on one line."""
    tied = sum(len(names) for names in plan.tied.values())
    extras = ((len(plan.split), "split"), (len(plan.oversized), "over capacity"), (tied, "tied"))
    return ", ".join(
        [
            _count(len(plan.specs), "tensor"),
            f"{format_size(plan.nbytes)} in {_count(len(plan.buckets), 'bucket')} of {format_size(plan.capacity)}",
            f"padding {format_size(plan.padding)} ({plan.padding / max(1, plan.nbytes + plan.padding):.2%})",
            *(f"{count:,} {words}" for count, words in extras if count),
        ]
    )


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"
