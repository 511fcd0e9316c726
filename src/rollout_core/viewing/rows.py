"""A view as rows of a page, in inches: where each turn's strip, its items' cards and its words stand."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from rollout_core.viewing.thumbs import thumbnail
from rollout_core.viewing.view import ShownItem, Turn, View

#: Inches: the words at the left, the strip, the numbers at the right.
LEFT, STRIP, RIGHT, EDGE = 2.35, 8.9, 3.0, 0.15
WIDTH: Final = LEFT + STRIP + RIGHT
#: More turns than this are written small; more than MOST are not all drawn.
DENSE, MOST = 30, 400
_HEAD, _TAIL = 250, 100
#: Turns between two headings of the page's columns.
_HEADING_EVERY: Final = 40
_SCALES: Final = (32, 64, 128, 256, 512, 1024, 2048)


@dataclass(frozen=True, slots=True)
class Sizes:
    """Of one page, in inches and points. A card is a thumbnail with ``lines`` of words beside it."""

    strip: float
    gap: float
    card: float
    lines: int
    title: float
    small: float

    @property
    def line(self) -> float:
        """Inches from one line of small words to the next."""
        return 1.6 * self.small / 72

    @property
    def below(self) -> float:
        """Inches below a card."""
        return 0.22 * self.card

    def words(self, lines: Sequence[str]) -> float:
        """Inches that the widest of these lines takes, generously."""
        return max(len(line) for line in lines) * 0.62 * self.small / 72


NORMAL, SMALL = Sizes(0.24, 0.2, 0.52, 4, 8.0, 6.3), Sizes(0.15, 0.07, 0.3, 2, 6.3, 5.4)


@dataclass(frozen=True, slots=True)
class Card:
    """A thumbnail and its words below a strip: left edge, width of the thumbnail, and top, in inches.

    ``tied``: in the first line of cards, where a line to its item crosses no other card.
    """

    item: ShownItem
    words: tuple[str, ...]
    x: float
    thumb: float
    y: float
    tied: bool


@dataclass(frozen=True, slots=True)
class Row:
    """Tokens ``[start, stop)`` of a turn on one line, with its top in inches.

    ``folded``: so many rows of one kind, which are told and not drawn. ``warnings`` have their heights, below a turn's last row.
    """

    turn: Turn
    start: int
    stop: int
    y: float
    cards: tuple[Card, ...] = ()
    warnings: tuple[tuple[float, str], ...] = ()
    folded: int = 0


@dataclass(frozen=True, slots=True)
class Page:
    """Rows from the top; ``headings`` are the tops of the column headings, ``notes`` lines of words at a height."""

    sizes: Sizes
    scale: int
    rows: tuple[Row, ...]
    headings: tuple[float, ...]
    notes: tuple[tuple[float, str], ...]
    height: float

    @property
    def cell(self) -> float:
        """Inches of one token."""
        return (STRIP - EDGE) / self.scale


def page_of(view: View, top: float) -> Page:
    """The rows of a view below ``top`` inches."""
    sizes = NORMAL if len(view.turns) <= DENSE else SMALL
    scale = scale_of(view.turns)
    cell = (STRIP - EDGE) / scale
    rows: list[Row] = []
    headings: list[float] = []
    notes: list[tuple[float, str]] = []
    y, segment, left_out = top, 0, len(view.turns) > MOST
    for place, turn in enumerate(view.turns):
        if left_out and _HEAD <= place < len(view.turns) - _TAIL:
            if place == _HEAD:
                notes.append((y, f"... {len(view.turns) - _HEAD - _TAIL:,} turns are not drawn ..."))
                y += 0.3
            continue
        if place % _HEADING_EVERY == 0:
            headings.append(y)
            y += 0.3
        if turn.segment != segment:
            segment = turn.segment
            notes.append((y, f"segment {segment}"))
            y += 0.22
        added, y = _rows(turn, sizes, scale, cell, y)
        rows += added
    return Page(sizes, scale, tuple(rows), tuple(headings), tuple(notes), y + 0.1)


def scale_of(turns: Sequence[Turn]) -> int:
    """Tokens per row: the fewest with which most turns have one row."""
    for scale in _SCALES[:-1]:
        drawn = sum(len(pieces(turn, scale)) for turn in turns)
        if drawn <= max(1.3 * len(turns), len(turns) + 2):
            return scale
    return _SCALES[-1]


def pieces(turn: Turn, scale: int) -> list[tuple[int, int, int]]:
    """The rows of a turn as (start, stop, rows folded into it).

    Of four or more that lie inside one run or one item, all but the first and last are folded.
    """
    cuts = list(range(turn.start, turn.stop, scale)) or [turn.start]
    plain = [(start, min(start + scale, turn.stop), _inside(turn, start, min(start + scale, turn.stop))) for start in cuts]
    found: list[tuple[int, int, int]] = []
    at = 0
    while at < len(plain):
        inside = plain[at][2]
        end = at + 1
        while inside is not None and end < len(plain) and plain[end][2] == inside:
            end += 1
        if end - at > 3:
            found += [(*plain[at][:2], 0), (plain[at + 1][0], plain[end - 2][1], end - at - 2), (*plain[end - 1][:2], 0)]
        else:
            found += [(*entry[:2], 0) for entry in plain[at:end]]
        at = end
    return found


def card_words(item: ShownItem, lines: int) -> tuple[str, ...]:
    """What is written beside a thumbnail."""
    state = "processed" if item.same_as is None else f"reused: {item.same_as}"
    if lines == 2:
        return f"{item.name}: {item.tokens:,} tokens", state
    return item.name, item.what, f"{item.tokens:,} tokens, {item.compact} compact", state


def _inside(turn: Turn, start: int, stop: int) -> tuple[str, int] | None:
    """The run or item that all of these tokens lie in, if they do and carry no mark."""
    if any(start <= mark < stop for mark in turn.marks):
        return None
    for item in turn.items:
        if item.start < stop and start < item.stop:
            return (item.name, item.start) if item.start < start and stop < item.stop else None
    return next(((run.origin, run.start) for run in turn.runs if run.start <= start and stop <= run.stop), None)


def _rows(turn: Turn, sizes: Sizes, scale: int, cell: float, y: float) -> tuple[list[Row], float]:
    """The rows of a turn, the first at height ``y``, and the height below them."""
    rows = []
    shown = pieces(turn, scale)
    for index, (start, stop, folded) in enumerate(shown):
        top, y = y, y + sizes.strip + (sizes.gap / 2 if folded else sizes.gap)
        here = [item for item in turn.items if start <= item.start < stop]
        cards, y = _cards(here, start, sizes, cell, y)
        warnings = []
        for words in turn.warnings if index == len(shown) - 1 else ():
            warnings.append((y, words))
            y += sizes.line
        y += sizes.line / 2 if warnings else 0
        rows.append(Row(turn, start, stop, top, tuple(cards), tuple(warnings), folded))
    return rows, y


def _cards(items: Sequence[ShownItem], start: int, sizes: Sizes, cell: float, y: float) -> tuple[list[Card], float]:
    """Cards below their items, moved aside where they would overlap, in as many lines as they need; and the height below them."""
    left, right = LEFT, LEFT + STRIP - EDGE
    lines: list[list[tuple[ShownItem, tuple[str, ...], float, float]]] = [[]]
    used = 0.0
    for item in items:
        words = card_words(item, sizes.lines)
        thumb = sizes.card * _ratio(item)
        width = thumb + sizes.words(words) + 0.14
        if lines[-1] and used + width > right - left:
            lines.append([])
            used = 0.0
        lines[-1].append((item, words, thumb, width))
        used += width
    cards: list[Card] = []
    for entries in lines:
        if not entries:
            break
        places: list[float] = []
        edge = left
        for item, _, _, width in entries:
            places.append(max(edge, left + max(0, item.start - start) * cell))
            edge = places[-1] + width
        limit = right
        for index in range(len(entries) - 1, -1, -1):
            limit = places[index] = min(places[index], limit - entries[index][3])
        cards += [
            Card(item, words, x, thumb, y, entries is lines[0]) for (item, words, thumb, _), x in zip(entries, places, strict=True)
        ]
        y += sizes.card + sizes.below
    return cards, y


def _ratio(item: ShownItem) -> float:
    """Width over height of a thumbnail, from half to two, as `thumbs.thumbnail` makes it."""
    height, width, _ = thumbnail(item.media, 64).shape
    return float(width / height)
