"""What there is to see of a conversation: its turns, where their tokens come from, their items, and what each had to process.

Everything here follows from the conversation alone: nothing is rendered, encoded or processed again.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from rollout_core.multimodal.conversation import Conversation
from rollout_core.multimodal.deltas import ORIGINS, SAMPLED, Delta, Item, Tokens
from rollout_core.multimodal.media import Media, Picture, Sound, Video
from rollout_core.multimodal.messages import texts

#: Characters of a turn's text that are kept.
TEXT = 200


@dataclass(frozen=True, slots=True)
class Run:
    """Tokens ``[start, stop)`` of one origin, on the expanded track of their segment."""

    origin: str
    start: int
    stop: int


@dataclass(frozen=True, slots=True)
class ShownItem:
    """An item at its place.

    Attributes:
        name: modality and number within it, such as ``image 0``.
        start, stop: its tokens on the expanded track; ``compact`` is how many stand for it on the compact one.
        spans: the runs of feature tokens among them.
        what: its size in words.
        identity: of the content (hex).
        same_as: the name of the first item with the same payload, if that is another: this one was not processed again.
        media: the picture, video or sound; None where it was not stored.
    """

    name: str
    modality: str
    start: int
    stop: int
    compact: int
    spans: tuple[tuple[int, int], ...]
    what: str
    identity: str
    same_as: str | None
    media: Media | None

    @property
    def tokens(self) -> int:
        return self.stop - self.start


@dataclass(frozen=True, slots=True)
class Turn:
    """What one call added: messages together, or one turn of the policy with the prompt that opened it.

    Attributes:
        number: counted from 0 over all segments; ``segment`` from 0.
        title: who spoke; how a sampled turn ended, if it did not stop by itself.
        text: the beginning of what was said.
        start, stop: tokens on the expanded track of the segment; ``compact`` is how many it added to the compact one.
        rendered: compact tokens that came from the template and the messages: what the tokenizer had to encode.
        loss: sampled tokens; ``logprobs`` is how many of them have one.
        prompt: whether messages were added here, so that others would render everything again.
        runs: the tokens by origin, in order and without gaps.
        marks: places of sampled ids that are placeholders.
    """

    number: int
    segment: int
    title: str
    text: str
    start: int
    stop: int
    compact: int
    rendered: int
    loss: int
    logprobs: int
    prompt: bool
    runs: tuple[Run, ...]
    items: tuple[ShownItem, ...]
    marks: tuple[int, ...]
    warnings: tuple[str, ...]

    @property
    def tokens(self) -> int:
        """On the expanded track."""
        return self.stop - self.start

    @property
    def processed(self) -> int:
        """Items that went through the processor in this turn."""
        return sum(item.same_as is None for item in self.items)

    @property
    def reused(self) -> int:
        """Items whose payload was there already."""
        return len(self.items) - self.processed


@dataclass(frozen=True, slots=True)
class View:
    """All turns of all segments, in order."""

    turns: tuple[Turn, ...]

    @property
    def segments(self) -> int:
        return self.turns[-1].segment + 1

    @property
    def rendered(self) -> int:
        return sum(turn.rendered for turn in self.turns)

    @property
    def loss(self) -> int:
        return sum(turn.loss for turn in self.turns)

    @property
    def processed(self) -> int:
        return sum(turn.processed for turn in self.turns)

    @property
    def reused(self) -> int:
        return sum(turn.reused for turn in self.turns)

    def whole(self) -> tuple[int, int]:
        """Compact tokens encoded and items processed if everything so far were done again whenever messages are added."""
        tokens = items = all_tokens = all_items = 0
        for before, turn in zip((None, *self.turns), self.turns, strict=False):
            if before is None or before.segment != turn.segment:
                tokens = items = 0
            tokens, items = tokens + turn.compact, items + len(turn.items)
            if turn.prompt:
                all_tokens, all_items = all_tokens + tokens, all_items + items
        return all_tokens, all_items


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
            turn = _turn(steps, len(turns), segment, known, placeholders or {})
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
    steps: Sequence[Delta], number: int, segment: int, known: dict[str, tuple[int, str]], placeholders: Mapping[int, str]
) -> Turn:
    tokens = Tokens.concatenate([step.tokens for step in steps])
    start = steps[0].length - len(steps[0].tokens)
    loss = int(tokens.loss_mask.sum())
    prompt = steps[0].kind in ("messages", "truncated")
    messages = steps[-1].messages
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
