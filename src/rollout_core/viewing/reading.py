"""From a conversation to its `View`. Nothing is rendered, encoded or processed again; sampled ids are decoded."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from rollout_core.multimodal.conversation import Conversation
from rollout_core.multimodal.deltas import ORIGINS, SAMPLED, Delta, Item, Tokens
from rollout_core.multimodal.media import Media, Picture, Sound, Video
from rollout_core.multimodal.messages import texts
from rollout_core.multimodal.renderer import Renderer
from rollout_core.viewing.view import Run, ShownItem, Turn, View

#: Characters of a turn's text that are kept.
TEXT = 200


def view_of(conversation: Conversation, placeholders: Mapping[int, str] | None = None) -> View:
    """What there is to see of a conversation and the segments before it.

    Args:
        conversation: any, of any renderer.
        placeholders: ids of placeholder and feature tokens with their text; sampled ones, and such text in messages, are warned of.
    """
    known: dict[str, tuple[int, str]] = {}
    turns: list[Turn] = []
    for segment, part in enumerate((*conversation.segments, conversation)):
        groups = _groups(part.tip.path())
        for index, steps in enumerate(groups):
            turn = _turn(part.renderer, steps, len(turns), segment, known, placeholders or {})
            more = []
            if segment and index == 0:
                more.append("the template changed earlier messages: a new segment begins, with everything rendered anew")
            if part.cut and index == len(groups) - 1:
                more.append("truncated here: nothing can follow")
            turns.append(replace(turn, warnings=(*more, *turn.warnings)))
    scored = any(turn.logprobs for turn in turns)
    return View(tuple(_with_logprobs(turn) if scored else turn for turn in turns))


def _groups(path: Sequence[Delta]) -> list[list[Delta]]:
    """The steps of each turn: a generation prompt and what was sampled after it are one."""
    groups: list[list[Delta]] = []
    for step in path:
        goes_on = step.kind == "sampled" and groups and groups[-1][-1].kind in ("generation_prompt", "sampled")
        if goes_on:
            groups[-1].append(step)
        else:
            groups.append([step])
    return groups


def _turn(
    renderer: Renderer,
    steps: Sequence[Delta],
    number: int,
    segment: int,
    known: dict[str, tuple[int, str]],
    placeholders: Mapping[int, str],
) -> Turn:
    tokens = Tokens.concatenate([step.tokens for step in steps])
    start = steps[0].length - len(steps[0].tokens)
    loss = int(tokens.loss_mask.sum())
    prompt = steps[0].kind in ("messages", "truncated")
    messages = steps[-1].messages
    if steps[-1].kind == "sampled" and not messages:
        messages = (renderer.said(tokens.input_ids[tokens.origin == SAMPLED]),)
    wanted = np.asarray(sorted(placeholders), np.int64)
    marks = np.flatnonzero((tokens.origin == SAMPLED) & np.isin(tokens.input_ids, wanted))
    warnings = [
        f"{count} sampled {placeholders[token]}: kept as sampled, and no item stands there"
        for token, count in zip(*(a.tolist() for a in np.unique(tokens.input_ids[marks], return_counts=True)), strict=True)
    ]
    if prompt:
        said = "\n".join(text for message in messages for text in texts(message))
        literal = [text for text in dict.fromkeys(placeholders.values()) if text in said]
        warnings += [f"a message holds the text {text}: encoded as ordinary text" for text in literal]
    elif steps[-1].kind == "sampled" and not loss:
        warnings.append("nothing was sampled")
    return Turn(
        number,
        segment,
        _title(steps),
        _text(messages),
        start,
        steps[-1].length,
        len(tokens.compact_ids),
        len(tokens.compact_ids) - loss,
        loss,
        int((~np.isnan(tokens.logprobs)).sum()),
        prompt,
        _runs(tokens, start),
        tuple(_shown(item, segment, known) for step in steps for item in step.items),
        tuple((marks + start).tolist()),
        tuple(warnings),
    )


def _title(steps: Sequence[Delta]) -> str:
    last = steps[-1]
    if last.kind == "truncated":
        return "truncated"
    if last.kind == "generation_prompt":
        return "assistant (to be sampled)"
    if last.kind == "sampled":
        words = {"stop": "", "length": " (cut by length)"}.get(str(last.finish), f" ({last.finish})")
        return f"assistant{words}"
    grouped = [(role, len(list(group))) for role, group in itertools.groupby(str(m["role"]) for m in last.messages)]
    return ", ".join(role if count == 1 else f"{role} x{count}" for role, count in grouped)


def _text(messages: Sequence[Mapping[str, object]]) -> str:
    """What was said last in the messages, on one line; calls of tools by their JSON's strings."""
    for message in reversed(messages):
        content = message.get("content")
        parts = [content] if isinstance(content, str) else [p.get("text", "") for p in content] if isinstance(content, list) else []
        calls = [text for text in texts(message.get("tool_calls")) if text != "function"]
        found = " ".join(" ".join([*(part for part in parts if part), *calls]).split())
        if found:
            return found if len(found) <= TEXT else found[: TEXT - 3] + "..."
    return ""


def _runs(tokens: Tokens, start: int) -> tuple[Run, ...]:
    origin = tokens.origin
    edges = [0, *(np.flatnonzero(np.diff(origin)) + 1).tolist(), len(origin)] if len(origin) else []
    return tuple(Run(ORIGINS[int(origin[a])], a + start, b + start) for a, b in itertools.pairwise(edges))


def _shown(item: Item, segment: int, known: dict[str, tuple[int, str]]) -> ShownItem:
    name = f"{item.modality} {item.modality_index}"
    first = known.setdefault(item.artifact, (segment, name))
    before = None if first == (segment, name) else first[1] if first[0] == segment else f"{first[1]} of segment {first[0]}"
    region = item.region
    return ShownItem(
        name,
        item.modality,
        region.start,
        region.stop,
        region.compact_stop - region.compact_start,
        item.spans,
        _what(item.payload.media),
        item.identity,
        before,
        item.payload.media,
    )


def _what(media: Media | None) -> str:
    if isinstance(media, Picture):
        return f"{media.size[0]} x {media.size[1]}"
    if isinstance(media, Video):
        frames, height, width, _ = media.frames.shape
        return f"{frames} frames, {width} x {height}"
    if isinstance(media, Sound):
        return f"{len(media.samples) / media.sampling_rate:.2f} s at {media.sampling_rate} Hz"
    return "not stored"


def _with_logprobs(turn: Turn) -> Turn:
    """A warning for sampled tokens without a logprob, in a conversation that has some."""
    if turn.logprobs == turn.loss:
        return turn
    return replace(turn, warnings=(*turn.warnings, f"logprobs for {turn.logprobs} of {turn.loss} sampled tokens"))
