"""Cutting a conversation to a length: no item is ever split, and nothing that opened one is left dangling."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from rollout_core.errors import TruncationError
from rollout_core.multimodal.deltas import Delta
from rollout_core.multimodal.positions import PositionRule
from rollout_core.multimodal.steps import follow, placed

_SIDES, _POLICIES = ("right", "left"), ("drop_item", "drop_message", "error")


def truncated(rule: PositionRule, tip: Delta, max_length: Any, side: str, policy: str) -> Delta:
    """The tip of a conversation of at most ``max_length`` tokens. A conversation that is short enough is returned as it is.

    On the right, deltas before the cut are shared; on the left, positions begin at 0 again, as recomputing them would give.
    """
    if isinstance(max_length, bool) or not isinstance(max_length, (int, np.integer)) or max_length < 1:
        raise TruncationError(f"max_length is {max_length!r}; it is a whole number of tokens, at least 1")
    if side not in _SIDES or policy not in _POLICIES:
        raise TruncationError(f"side is one of {_SIDES} and policy one of {_POLICIES}, not {side!r} and {policy!r}")
    if tip.length <= max_length:
        return tip
    path = tip.path()
    wanted = int(max_length) if side == "right" else tip.length - int(max_length)
    at = _cut(path, wanted, side, policy)
    if at in (0, tip.length):
        raise TruncationError(
            f"no whole {'message' if policy == 'drop_message' else 'part'} fits in {max_length} of {tip.length} tokens"
        )
    return _head(rule, path, at) if side == "right" else _tail(rule, path, at)


def _cut(path: Sequence[Delta], wanted: int, side: str, policy: str) -> int:
    """Where to cut, at ``wanted`` or on the side where less is kept."""
    if policy == "drop_message":
        ids = np.concatenate([delta.tokens.message for delta in path])
        starts = [0, *(np.flatnonzero(np.diff(ids)) + 1).tolist(), len(ids)]
        return max(s for s in starts if s <= wanted) if side == "right" else min(s for s in starts if s >= wanted)
    for delta in path:
        for item in delta.items:
            start, stop = item.envelope
            if start < wanted < stop:
                if policy == "error":
                    raise TruncationError(
                        f"token {wanted}, where the cut would be, is inside {item.modality} {item.modality_index} "
                        f"(tokens {start} to {stop})"
                    )
                return start if side == "right" else stop
    return wanted


def _head(rule: PositionRule, path: Sequence[Delta], at: int) -> Delta:
    last = next(delta for delta in path if delta.length >= at)
    if last.length == at:
        return last
    before, compact_before = _starts(last)
    tokens = last.tokens.sliced(0, at - before, 0, _compact(last, at) - compact_before)
    kept = tuple(item for item in last.items if item.envelope[1] <= at)
    finish = "length" if last.kind == "sampled" else None
    return replace(last, **follow(rule, last.parent, tokens, kept), kind="truncated", finish=finish)


def _tail(rule: PositionRule, path: Sequence[Delta], at: int) -> Delta:
    tip: Delta | None = None
    compact_at = next(_compact(delta, at) for delta in path if delta.length >= at)
    for delta in path:
        if delta.length <= at and delta is not path[-1]:
            continue
        before, compact_before = _starts(delta)
        tokens = delta.tokens
        if before < at:
            tokens = tokens.sliced(at - before, len(tokens), compact_at - compact_before, len(tokens.compact_ids))
        items = placed(tip, (item for item in delta.items if item.envelope[0] >= at), -at, -compact_at)
        tip = replace(delta, **follow(rule, tip, tokens, items))
    assert tip is not None
    return tip


def _starts(delta: Delta) -> tuple[int, int]:
    """How many tokens come before a delta, on each track."""
    return delta.length - len(delta.tokens), delta.compact_length - len(delta.tokens.compact_ids)


def _compact(delta: Delta, at: int) -> int:
    """The place on the compact track of a cut at ``at``, which lies in ``delta`` and in no region."""
    earlier = [item for item in delta.items if item.region.stop <= at]
    if not earlier:
        before, compact_before = _starts(delta)
        return at - before + compact_before
    return at - earlier[-1].region.stop + earlier[-1].region.compact_stop
