"""Two tracks of one text: compact ids, with what engines accept for each item, and expanded ids, with every run at full length.

A region is one item's stretch on both tracks; outside the regions the tracks are equal. Regions come from rendering: where a
template wrote a placeholder, and the text that the processor put there. No id is ever searched for outside a region.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from rollout_core.errors import ConversationError, UnsupportedProcessorError

Ids = npt.NDArray[np.int64]
#: How far a tokenizer may merge a placeholder's expansion with the text around it, in tokens.
_REACH = 8


@dataclass(frozen=True, slots=True)
class Encoded:
    """Token ids (n,) int64 of a text, and where each token stands in it: (n, 2) int64 character offsets, the end not included."""

    ids: Ids
    offsets: Ids


@dataclass(frozen=True, slots=True)
class Region:
    """One item's tokens: ``[start, stop)`` on the expanded track, ``[compact_start, compact_stop)`` on the compact one."""

    start: int
    stop: int
    compact_start: int
    compact_stop: int

    def shifted(self, by: int, compact_by: int) -> Region:
        return Region(self.start + by, self.stop + by, self.compact_start + compact_by, self.compact_stop + compact_by)


@dataclass(frozen=True, slots=True)
class SpanMap:
    """How the two tracks of one sequence lie beside each other.

    Attributes:
        regions: in order, disjoint on both tracks.
        compact, expanded: per region, its ids on each track.
        compact_length, expanded_length: tokens on each track.
    """

    regions: tuple[Region, ...]
    compact: tuple[Ids, ...]
    expanded: tuple[Ids, ...]
    compact_length: int
    expanded_length: int

    def expand(self, ids: Sequence[int] | Ids) -> Ids:
        """Expanded ids of compact ones.

        Raises:
            ConversationError: the ids are not this sequence's compact ids; ids that are expanded already are among those.
        """
        given = np.asarray(ids, dtype=np.int64)
        if len(given) == self.expanded_length != self.compact_length:
            raise ConversationError(f"these {len(given)} ids are expanded already; compact ones would be {self.compact_length}")
        return self._swap(given, self.compact_length, "compact")

    def compact_ids(self, ids: Sequence[int] | Ids) -> Ids:
        """Compact ids of expanded ones.

        Raises:
            ConversationError: the ids are not this sequence's expanded ids.
        """
        return self._swap(np.asarray(ids, dtype=np.int64), self.expanded_length, "expanded")

    def _swap(self, given: Ids, length: int, track: str) -> Ids:
        if given.ndim != 1 or len(given) != length:
            raise ConversationError(f"expected {length} {track} ids, got shape {given.shape}")
        here, there = (self.compact, self.expanded) if track == "compact" else (self.expanded, self.compact)
        parts, last = [], 0
        for index, region in enumerate(self.regions):
            start, stop = (region.compact_start, region.compact_stop) if track == "compact" else (region.start, region.stop)
            if not np.array_equal(given[start:stop], here[index]):
                raise ConversationError(f"{track} ids {start} to {stop} are not those of item {index}")
            parts += [given[last:start], there[index]]
            last = stop
        return np.concatenate([*parts, given[last:]]) if parts else given.copy()


def align(
    compact: Encoded, expanded: Encoded, compact_chars: Sequence[tuple[int, int]], chars: Sequence[tuple[int, int]]
) -> list[Region]:
    """The regions of items whose placeholders stand at given characters of the two texts.

    A tokenizer may merge the edge of an expansion with its neighbours; the region then takes those tokens too, so that
    everything outside is equal on both tracks.

    Raises:
        UnsupportedProcessorError: the tracks differ further away than that.
    """
    bounds = [_tokens(compact, *span) for span in compact_chars]
    wide = [_tokens(expanded, *span) for span in chars]
    regions: list[list[int]] = [[*w, *b] for w, b in zip(wide, bounds, strict=True)]
    for left, right in itertools.pairwise(regions):
        # One token made of the ends of two neighbours belongs to the first.
        right[0], right[2] = max(right[0], left[1]), max(right[2], left[3])
    for index in range(len(regions) + 1):
        before = regions[index - 1] if index else None
        after = regions[index] if index < len(regions) else None
        between = expanded.ids[before[1] if before else 0 : after[0] if after else None]
        beside = compact.ids[before[3] if before else 0 : after[2] if after else None]
        if np.array_equal(between, beside):
            continue
        for grow in _growths(before is not None, after is not None):
            a, b, c, d = grow
            if np.array_equal(between[a : len(between) - b], beside[c : len(beside) - d]):
                break
        else:
            raise UnsupportedProcessorError(
                f"the tokenizer merges the expansion of item {index} with the text around it over more than {_REACH} tokens"
            )
        if before:
            before[1], before[3] = before[1] + a, before[3] + c
        if after:
            after[0], after[2] = after[0] - b, after[2] - d
    return [Region(*region) for region in regions]


def _growths(left: bool, right: bool) -> list[tuple[int, int, int, int]]:
    """Tokens to take from the text between two regions, fewest first: on the left and right of the expanded track, then of the
    compact one."""
    reach = range(_REACH)
    return sorted(
        (
            (a, b, c, d)
            for a in (reach if left else (0,))
            for b in (reach if right else (0,))
            for c in (reach if left else (0,))
            for d in (reach if right else (0,))
        ),
        key=sum,
    )


def _tokens(encoded: Encoded, start: int, stop: int) -> tuple[int, int]:
    """The tokens that lie on characters ``[start, stop)``."""
    touching = np.flatnonzero((encoded.offsets[:, 0] < stop) & (encoded.offsets[:, 1] > start))
    if not len(touching):
        raise UnsupportedProcessorError(f"the tokenizer gives no token for the characters {start} to {stop} of a placeholder")
    return int(touching[0]), int(touching[-1]) + 1


def runs(ids: Ids, wanted: Sequence[int], offset: int) -> tuple[tuple[int, int], ...]:
    """The runs of any of ``wanted`` in a region's ids, as ``(start, stop)`` counted from ``offset``."""
    inside = np.isin(ids, np.asarray(wanted, dtype=np.int64))
    edges = np.flatnonzero(np.diff(np.concatenate([[0], inside.view(np.int8), [0]])))
    return tuple((int(a) + offset, int(b) + offset) for a, b in zip(edges[::2], edges[1::2], strict=True))


def overlap(before: Ids, after: Ids, most: int) -> int:
    """How many ids at the end of ``before``, at most ``most``, are those that ``after`` begins with."""
    longest = range(min(len(before), len(after), most), 0, -1)
    return next((n for n in longest if np.array_equal(before[len(before) - n :], after[:n])), 0)


def as_ids(values: Any, what: str) -> Ids:
    """A private int64 array (n,) of token ids given as a list, array or tensor.

    Raises:
        ConversationError: not one-dimensional, or not whole numbers (bool is none).
    """
    try:
        array = np.asarray(values.detach().cpu() if hasattr(values, "detach") else values)
    except (TypeError, ValueError, OverflowError) as error:
        raise ConversationError(f"{what} must be a one-dimensional sequence of whole numbers: {error}") from error
    if array.ndim == 1 and len(array) == 0:
        return np.zeros(0, np.int64)
    if array.ndim != 1 or array.dtype.kind not in "iu":
        raise ConversationError(
            f"{what} must be a one-dimensional sequence of whole numbers, not {array.dtype} of shape {array.shape}"
        )
    if array.dtype == np.uint64 and (array > np.iinfo(np.int64).max).any():
        raise ConversationError(f"{what} holds numbers beyond int64")
    return array.astype(np.int64)
