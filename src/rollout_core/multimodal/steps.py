"""How deltas follow one another: their places in the whole sequence, their positions, and the messages they tell."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from rollout_core.multimodal.deltas import Delta, Item, Tokens
from rollout_core.multimodal.layout import Laid
from rollout_core.multimodal.positions import Segment
from rollout_core.multimodal.renderer import TAIL, Past, Renderer
from rollout_core.multimodal.templates import features, united
from rollout_core.multimodal.templates.shapes import recent_of
from rollout_core.multimodal.tracks import Ids

Message = Mapping[str, Any]


def delta_of(
    renderer: Renderer,
    parent: Delta | None,
    kind: str,
    laid: Laid,
    messages: tuple[Message, ...],
    turn: str = "none",
    found: tuple[str, ...] = (),
) -> Delta:
    tokens = Tokens(laid.input_ids, laid.compact_ids, np.full(len(laid.input_ids), np.nan), laid.origin, laid.message)
    count = len(messages) + (parent.message_count if parent else 0)
    role = messages[-1]["role"] if messages else "assistant"
    found = united(found, features(messages))
    return step(
        renderer, parent, kind, tokens, laid.items, laid.segments, messages,
        message_count=count, turn=turn, finish=None, role=role, found=found,
    )  # fmt: skip


def step(
    renderer: Renderer,
    parent: Delta | None,
    kind: str,
    tokens: Tokens,
    items: Sequence[Item],
    parts: tuple[Segment, ...],
    messages: tuple[Message, ...],
    *,
    message_count: int,
    turn: str,
    finish: str | None,
    role: str,
    found: tuple[str, ...] = (),
) -> Delta:
    """A delta after another one: its items moved to their places, its positions counted on."""
    length, compact = (parent.length, parent.compact_length) if parent else (0, 0)
    counts = dict(parent.item_counts) if parent else {}
    placed = []
    for item in items:
        placed.append(item.moved(length, compact, sum(counts.values()), counts.get(item.modality, 0)))
        counts[item.modality] = counts.get(item.modality, 0) + 1
    positions, following = renderer.rule.advance(parent.next_position if parent else 0, parts)
    positions.flags.writeable = False
    found = united(parent.features if parent else (), found)
    return Delta(
        parent, kind, tokens, tuple(placed), parts, positions, messages,
        length + len(tokens), compact + len(tokens.compact_ids), counts, message_count, following,
        found, turn, finish, role,
    )  # fmt: skip


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


def refilled(message: Message, items: Mapping[str, Any]) -> Message:
    """A message with its media in it again."""
    content = message.get("content")
    if not isinstance(content, list):
        return message
    parts = []
    for part in content:
        modality = part.get("type")
        parts.append({**part, modality: next(items[modality]).payload} if modality in items else part)
    return {**message, "content": parts}


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
