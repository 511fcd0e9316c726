"""A view as a picture: a strip of tokens per turn, coloured by origin, thumbnails of items, and what the turn had to process."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from matplotlib.collections import LineCollection, PolyCollection
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle

from rollout_core.errors import ConversationError
from rollout_core.viewing.report import drawable, summary_words
from rollout_core.viewing.rows import EDGE, LEFT, STRIP, WIDTH, Card, Page, Row, page_of
from rollout_core.viewing.thumbs import thumbnail
from rollout_core.viewing.view import View

ENDINGS: Final = (".png", ".svg", ".pdf")
#: Apart for every kind of colour blindness, and in grey: light, middle, dark, darkest.
COLOURS: Final = {"template": "#c9ced6", "sampled": "#f08c2e", "environment": "#3b78b5", "boundary": "#22252b"}
_MEANING: Final = {
    "template": "written by the template",
    "sampled": "sampled by the policy (trained on)",
    "environment": "from messages",
    "boundary": "ends a sampled turn, not sampled",
}
_DPI: Final = 120
#: Inches of a token below which lines between tokens would be all that one sees.
_SEEN: Final = 0.045
_TOP: Final = 0.8
_WARNING, _QUIET = "#b3001b", "#5d6470"
#: Columns of numbers: heading, and the right edge in inches.
_COLUMNS: Final = (("tokens", 0.5), ("rendered", 1.05), ("sampled", 1.58), ("processed", 2.17), ("reused", 2.65))


def plot_view(view: View, file: Path, *, title: str = "") -> None:
    """Draw a view into ``file``, a PNG, SVG or PDF by its ending.

    Raises ``ConversationError`` for another ending, ``OSError`` if the file cannot be written.
    """
    check_ending(file)
    draw_view(view, title=title).savefig(file, format=file.suffix[1:].lower())


def check_ending(file: Path) -> None:
    """Raise ``ConversationError`` unless ``plot_view`` can write a file of this name."""
    if file.suffix.lower() not in ENDINGS:
        raise ConversationError(f"the plot is to go to {str(file)!r}; its name must end in {', '.join(ENDINGS)}")


def draw_view(view: View, *, title: str = "") -> Figure:
    """The view as a figure; one axes in inches covers it, y downwards.

    Long turns go on in further rows; what is all of one kind over many rows is folded. Artists carry gids: ``origin:NAME`` (a
    collection of boxes per origin), ``items`` and ``brackets`` (per item and row), ``thumbnail`` (one each), ``marks`` (sampled
    placeholders), ``warning`` (texts).
    """
    page = page_of(view, _TOP)
    figure = Figure(figsize=(WIDTH, page.height), dpi=_DPI)
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set_xlim(0, WIDTH)
    axes.set_ylim(page.height, 0)
    axes.axis("off")
    words = [drawable(title)] if title else []
    _write(axes, EDGE, 0.2, ": ".join([*words, summary_words(view)[0]]), 10)
    _write(axes, EDGE, 0.4, " ".join(summary_words(view)[1:]), 8, color=_QUIET)
    _draw_legend(axes, any(turn.items for turn in view.turns), any(turn.marks for turn in view.turns))
    for y in page.headings:
        _draw_heading(axes, page, y)
    for y, note in page.notes:
        axes.add_collection(LineCollection([[(EDGE, y + 0.02), (WIDTH - EDGE, y + 0.02)]], colors=_QUIET, linewidths=0.8))
        _write(axes, EDGE, y + 0.12, note, page.sizes.title, color=_QUIET)
    _draw_strips(axes, page)
    for before, row in zip((None, *page.rows), page.rows, strict=False):
        _write_row(axes, page, row, first=before is None or before.turn is not row.turn)
        for card in row.cards:
            _draw_card(axes, page, row, card)
    return figure


def _x(page: Page, row: Row, token: int) -> float:
    return LEFT + (min(max(token, row.start), row.stop) - row.start) * page.cell


def _boxes(page: Page, extents: Sequence[tuple[Row, int, int]]) -> list[Any]:
    boxes = []
    for row, start, stop in extents:
        left, right = _x(page, row, start), _x(page, row, stop)
        low = row.y + page.sizes.strip
        boxes.append([(left, row.y), (right, row.y), (right, low), (left, low)])
    return boxes


def _draw_strips(axes: Any, page: Page) -> None:
    drawn = [row for row in page.rows if not row.folded]
    for origin, colour in COLOURS.items():
        runs = [(row, r.start, r.stop) for row in drawn for r in row.turn.runs if r.origin == origin and _in(row, r.start, r.stop)]
        # Without antialiasing, neighbours meet without a seam of background between them.
        axes.add_collection(
            PolyCollection(_boxes(page, runs), facecolors=colour, linewidths=0, antialiaseds=False, gid=f"origin:{origin}")
        )
    shown = [(row, item) for row in drawn for item in row.turn.items if _in(row, item.start, item.stop)]
    spans = [(row, *span) for row, item in shown for span in item.spans if _in(row, *span)]
    axes.add_collection(
        PolyCollection(_boxes(page, spans), facecolors=(1, 1, 1, 0.5), linewidths=0, antialiaseds=False, gid="items")
    )
    if page.cell >= _SEEN:
        edges = [_x(page, row, token) for row in drawn for token in range(row.start + 1, row.stop)]
        rows = [row for row in drawn for _ in range(row.start + 1, row.stop)]
        lines = [[(x, row.y), (x, row.y + page.sizes.strip)] for x, row in zip(edges, rows, strict=True)]
        axes.add_collection(LineCollection(lines, colors="white", linewidths=0.5))
    below = page.sizes.strip + 0.025
    brackets = []
    for row, item in shown:
        left, right, y = _x(page, row, item.start), _x(page, row, item.stop), row.y + below
        trim = min(0.01, (right - left) / 4)
        brackets.append([(left + trim, y), (right - trim, y)])
    ink = [_ink(item.same_as is None) for _, item in shown]
    axes.add_collection(LineCollection(brackets, colors=ink or "none", linewidths=2.0, capstyle="butt", gid="brackets"))
    marks = [(row, mark) for row in drawn for mark in row.turn.marks if row.start <= mark < row.stop]
    tips = [(_x(page, row, mark) + page.cell / 2, row.y - 0.005) for row, mark in marks]
    corners = [[(x, y), (x - 0.045, y - 0.075), (x + 0.045, y - 0.075)] for x, y in tips]
    axes.add_collection(PolyCollection(corners, facecolors=_WARNING, linewidths=0, gid="marks"))


def _in(row: Row, start: int, stop: int) -> bool:
    return start < row.stop and row.start < stop


def _ink(processed: bool) -> str:
    return "#0b6e4f" if processed else "#9aa0aa"


def _write_row(axes: Any, page: Page, row: Row, *, first: bool) -> None:
    sizes, turn = page.sizes, row.turn
    middle = row.y + sizes.strip / 2
    size = sizes.small + 0.3
    for y, words in row.warnings:
        _write(axes, LEFT, y, f"! {_short(drawable(words), STRIP - 0.2, size)}", size, color=_WARNING, gid="warning")
    if row.folded:
        words = f"... {row.folded:,} rows like these, {row.stop - row.start:,} tokens, are not drawn ..."
        _write(axes, LEFT, middle, words, sizes.small + 0.5, color=_QUIET)
        return
    if not first:
        _write(axes, LEFT - 0.07, middle, f"+{row.start - turn.start:,}", sizes.small, ha="right", color=_QUIET)
        return
    title, text = drawable(f"{turn.number}  {turn.title}"), drawable(turn.text)
    room = LEFT - EDGE - 0.1
    if sizes.lines == 2:
        _write(axes, EDGE, middle, _short(f"{title}: {text}" if text else title, room, sizes.title), sizes.title)
    else:
        _write(axes, EDGE, row.y + 0.07, _short(title, 0.9 * room, sizes.title), sizes.title, weight="bold")
        _write(axes, EDGE, row.y + 0.22, _short(text, room, sizes.small), sizes.small, color=_QUIET)
    numbers = (turn.tokens, turn.rendered, turn.loss, turn.processed, turn.reused)
    for (_, right), number in zip(_COLUMNS, numbers, strict=True):
        _write(axes, LEFT + STRIP + right, middle, f"{number:,}" if number else "-", sizes.title, ha="right")


def _draw_card(axes: Any, page: Page, row: Row, card: Card) -> None:
    sizes = page.sizes
    new = card.item.same_as is None
    pixels = thumbnail(card.item.media, round(sizes.card * _DPI * 2))
    box = (card.x, card.x + card.thumb, card.y + sizes.card, card.y)
    axes.imshow(pixels, extent=box, aspect="auto", gid="thumbnail", zorder=3, alpha=1.0 if new else 0.6)
    ink = _ink(new)
    frame = Rectangle((card.x, card.y), card.thumb, sizes.card, fill=False, edgecolor=ink, linewidth=1.2, zorder=4)
    frame.set_linestyle("-" if new else (0, (2, 1)))
    axes.add_patch(frame)
    if card.tied:
        to_x = card.x + card.thumb / 2
        from_x = min(max(to_x, _x(page, row, card.item.start)), _x(page, row, card.item.stop))
        ends = [(from_x, row.y + sizes.strip + 0.03), (to_x, card.y)]
        axes.add_collection(LineCollection([ends], colors=ink, linewidths=0.6, zorder=2))
    step = sizes.card / len(card.words)
    for index, words in enumerate(card.words):
        colour = "black" if index == 0 else ink if index == len(card.words) - 1 else _QUIET
        _write(axes, card.x + card.thumb + 0.05, card.y + (index + 0.5) * step, words, sizes.small, color=colour)


def _draw_heading(axes: Any, page: Page, y: float) -> None:
    size = page.sizes.small + 0.4
    low = y + 0.24
    axes.add_collection(LineCollection([[(EDGE, low), (WIDTH - EDGE, low)]], colors="#b9bec7", linewidths=0.7))
    _write(axes, EDGE, y + 0.15, "turn", size, color=_QUIET)
    step = page.scale // 8
    for token in range(0, page.scale, step):
        _write(axes, LEFT + token * page.cell, y + 0.15, f"{token:,}" if token else "token 0", size, color=_QUIET)
    ticks = [[(LEFT + token * page.cell, low - 0.04), (LEFT + token * page.cell, low)] for token in range(0, page.scale, step)]
    axes.add_collection(LineCollection(ticks, colors="#b9bec7", linewidths=0.7))
    for name, right in _COLUMNS:
        _write(axes, LEFT + STRIP + right, y + 0.15, name, size, ha="right", color=_QUIET)


def _draw_legend(axes: Any, items: bool, marks: bool) -> None:
    handles = [Patch(facecolor=colour, label=f"{origin}: {_MEANING[origin]}") for origin, colour in COLOURS.items()]
    if items:
        handles.append(Patch(facecolor="#9dbbda", label="tokens of an item"))
        handles += [Patch(facecolor="none", edgecolor=_ink(True), label="item processed")]
        handles += [Patch(facecolor="none", edgecolor=_ink(False), linestyle=(0, (2, 1)), label="item reused")]
    if marks:
        handles.append(Patch(facecolor=_WARNING, label="sampled placeholder"))
    place = (EDGE / WIDTH, 1 - 0.54 / axes.get_ylim()[0])
    options: dict[str, Any] = {
        "loc": "upper left",
        "bbox_to_anchor": place,
        "ncols": len(handles),
        "fontsize": 7.2,
        "frameon": False,
    }
    axes.legend(handles=handles, borderaxespad=0, borderpad=0, handlelength=1.3, handleheight=0.9, columnspacing=1.1, **options)


def _write(axes: Any, x: float, y: float, words: str, size: float, **options: Any) -> None:
    axes.text(x, y, words, fontsize=size, parse_math=False, **{"va": "center", **options})


def _short(text: str, inches: float, size: float) -> str:
    """As much of the text as fits; a character of words takes 0.57 of the font's size on average."""
    room = int(inches / (0.57 * size / 72))
    return text if len(text) <= room else f"{text[: max(0, room - 3)]}..."
