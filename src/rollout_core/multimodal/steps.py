"""How deltas follow one another: what adds up from one to the next, and the messages they tell."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TypedDict

import numpy as np

from rollout_core.multimodal.deltas import Delta, Item, Tokens
from rollout_core.multimodal.layout import Laid
from rollout_core.multimodal.messages import Message
from rollout_core.multimodal.positions import PositionRule, Segment, Text
from rollout_core.multimodal.renderer import TAIL, Past, Renderer
from rollout_core.multimodal.templates import features, united
from rollout_core.multimodal.templates.shapes import recent_of
from rollout_core.multimodal.tracks import Ids


class Following(TypedDict):
    """The fields of a delta that follow from the one before it, its tokens and its items. See `Delta`."""

    parent: Delta | None
    tokens: Tokens
    items: tuple[Item, ...]
    segments: tuple[Segment, ...]
    positions: Ids
    length: int
    compact_length: int
    item_counts: Mapping[str, int]
    next_position: int


def follow(rule: PositionRule, parent: Delta | None, tokens: Tokens, items: tuple[Item, ...]) -> Following:
    """What ``tokens`` and ``items`` add up to after ``parent``. The items stand at their places already (`placed`)."""
    start = parent.length if parent else 0
    length = start + len(tokens)
    parts = tuple(_segments(items, start, length))
    positions, following = rule.advance(parent.next_position if parent else 0, parts)
    positions.flags.writeable = False
    return {
        "parent": parent,
        "tokens": tokens,
        "items": items,
        "segments": parts,
        "positions": positions,
        "length": length,
        "compact_length": (parent.compact_length if parent else 0) + len(tokens.compact_ids),
        "item_counts": {**_counts(parent), **{item.modality: item.modality_index + 1 for item in items}},
        "next_position": following,
    }


def placed(parent: Delta | None, items: Iterable[Item], by: int, compact_by: int) -> tuple[Item, ...]:
    """Items after ``parent``, moved by tokens on each track, and numbered on from its items."""
    counts = dict(_counts(parent))
    found = []
    for item in items:
        number = counts.get(item.modality, 0)
        found.append(item.moved(by, compact_by, sum(counts.values()), number))
        counts[item.modality] = number + 1
    return tuple(found)


def _counts(parent: Delta | None) -> Mapping[str, int]:
    return parent.item_counts if parent else {}


def _segments(items: Sequence[Item], start: int, stop: int) -> Iterator[Segment]:
    """Tokens ``[start, stop)`` as a position rule sees them."""
    at = start
    for item in items:
        if not item.payload.grids:
            continue
        for span, grid in zip(item.spans, item.payload.grids, strict=True):
            if span[0] > at:
                yield Text(span[0] - at)
            yield grid
            at = span[1]
    if stop > at:
        yield Text(stop - at)


def delta_of(
    renderer: Renderer,
    parent: Delta | None,
    kind: str,
    laid: Laid,
    messages: tuple[Message, ...],
    *,
    earlier: tuple[str, ...] = (),
    turn: str = "none",
) -> Delta:
    """A delta of what a renderer laid out. ``earlier``: the features of all messages before."""
    tokens = Tokens(laid.input_ids, laid.compact_ids, np.full(len(laid.input_ids), np.nan), laid.origin, laid.message)
    count = len(messages) + (parent.message_count if parent else 0)
    role = messages[-1]["role"] if messages else "assistant"
    found = united(earlier, features(messages))
    return step(
        renderer, parent, kind, tokens, laid.items, messages,
        message_count=count, found=found, turn=turn, finish=None, role=role,
    )  # fmt: skip


def step(
    renderer: Renderer,
    parent: Delta | None,
    kind: str,
    tokens: Tokens,
    items: Sequence[Item],
    messages: tuple[Message, ...],
    *,
    message_count: int,
    found: tuple[str, ...],
    turn: str,
    finish: str | None,
    role: str,
) -> Delta:
    """A delta after another one; ``items`` are counted from its first token. ``found``: the features of all messages, its too."""
    length, compact = (parent.length, parent.compact_length) if parent else (0, 0)
    return Delta(
        **follow(renderer.rule, parent, tokens, placed(parent, items, length, compact)),
        kind=kind,
        messages=messages,
        message_count=message_count,
        features=found,
        turn=turn,
        finish=finish,
        role=role,
    )


def _sampled_turn(tip: Delta) -> list[Delta]:
    """The pieces of the turn that ``tip`` is the end of, in order."""
    pieces: list[Delta] = []
    at: Delta | None = tip
    while at is not None and at.kind == "sampled":
        pieces.append(at)
        at = at.parent
    return pieces[::-1]


def _sampled_message(renderer: Renderer, pieces: Sequence[Delta]) -> tuple[Message, Ids]:
    """A sampled turn as a message, parsed by the caller or decoded; and its ids."""
    ids = np.concatenate([piece.tokens.input_ids for piece in pieces])
    return (pieces[-1].messages[0] if pieces[-1].messages else renderer.said(ids)), ids


def messages_of(renderer: Renderer, tip: Delta) -> Iterator[Message]:
    """All messages; the pieces of a turn that was sampled in several are one."""
    pieces: list[Delta] = []
    for delta in tip.path():
        if delta.kind == "sampled":
            pieces.append(delta)
            continue
        if pieces:
            yield _sampled_message(renderer, pieces)[0]
            pieces = []
        yield from delta.messages
    if pieces:
        yield _sampled_message(renderer, pieces)[0]


def refilled(messages: Iterable[Message], items: Sequence[Item]) -> list[Message]:
    """Messages with their media in them again; of each modality, the n-th part shows the n-th item."""
    waiting = {modality: iter([i.payload for i in items if i.modality == modality]) for modality in {i.modality for i in items}}
    found: list[Message] = []
    for message in messages:
        content = message.get("content")
        if isinstance(content, list):
            parts = [{**p, p["type"]: next(waiting[p["type"]])} if p.get("type") in waiting else p for p in content]
            found.append({**message, "content": parts})
        else:
            found.append(message)
    return found


def past_of(renderer: Renderer, tip: Delta) -> Past:
    """What new messages follow."""

    def messages() -> list[Message]:
        return list(messages_of(renderer, tip))

    def recent() -> tuple[Message, ...]:
        return recent_of(list(_since_answer(renderer, tip)))

    if tip.kind != "sampled":
        return Past(tip.role, tip.features, messages, recent, tip.message_count, False, np.zeros(0, np.int64))
    said, ids = _sampled_message(renderer, _sampled_turn(tip))
    found = united(tip.features, features((said,)))
    return Past(tip.role, found, messages, recent, tip.message_count, True, ids[-TAIL:])


def _since_answer(renderer: Renderer, tip: Delta) -> Iterator[Message]:
    """The messages of the deltas from the last one with an answer on."""
    steps: list[Delta] = []
    at: Delta | None = tip
    while at is not None and at.kind != "sampled":
        steps.append(at)
        if any(message["role"] == "assistant" for message in at.messages):
            at = None
            break
        at = at.parent
    if at is not None:
        yield _sampled_message(renderer, _sampled_turn(at))[0]
    for delta in reversed(steps):
        yield from delta.messages
