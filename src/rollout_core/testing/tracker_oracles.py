"""What a conversation must be, computed anew from everything that was added: nothing of ``rollout_core.multimodal`` is used.

The splice oracle renders the whole conversation with a mark for each sampled turn, encodes what stands between the marks with
the processor's own call, and puts the sampled ids in, verbatim. The template oracle is one call of the processor over the whole
text. Positions are counted token by token.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from rollout_core.testing.tracker_cases import MessageCase
from rollout_core.testing.tracker_encoding import TEXT_KEYS, ExpectedItem, Part, encode, given, is_control
from rollout_core.testing.worlds import Positions, World

_MARK = "\U000f0000"


@dataclass(frozen=True)
class Turn:
    """What was added at once: messages, or ids that were sampled."""

    messages: tuple[MessageCase, ...] = ()
    ids: tuple[int, ...] | None = None
    logprobs: tuple[float | None, ...] = ()
    finish: str = "stop"

    @property
    def sampled(self) -> tuple[int, ...]:
        return self.ids or ()


@dataclass
class Expected:
    """A conversation as it must be. ``tail``: what ends a sampled turn at the end and may stand there or not. ``clean``: whether
    the ids are those of one call over the text."""

    ids: list[int] = field(default_factory=list)
    compact: list[int] = field(default_factory=list)
    mask: list[int] = field(default_factory=list)
    logprobs: list[float | None] = field(default_factory=list)
    items: list[ExpectedItem] = field(default_factory=list)
    tail: list[int] = field(default_factory=list)
    sampled_at: list[tuple[int, int]] = field(default_factory=list)
    clean: bool = True

    def ending_as(self, got: Sequence[int]) -> Expected:
        """This, with the tail if that is what came."""
        if not self.tail or len(got) != len(self.ids) + len(self.tail):
            return self
        more = len(self.tail)
        return Expected(
            [*self.ids, *self.tail], [*self.compact, *self.tail], [*self.mask, *[0] * more], [*self.logprobs, *[None] * more],
            self.items, [], self.sampled_at, self.clean,
        )  # fmt: skip


def render(world: World, turns: Sequence[Turn], *, generation: bool = False, marks: bool = False) -> str:
    """The text of the whole conversation; a mark or the decoded text for each sampled turn."""
    messages: list[dict[str, Any]] = []
    for sampled, group in _grouped(turns):
        if sampled:
            ids = [token for turn in group for token in turn.sampled]
            content = _MARK if marks else said(world, ids)
            messages.append({"role": "assistant", "content": content})
        else:
            messages += [_bare(message) for turn in group for message in turn.messages]
    return str(world.processor.apply_chat_template(messages, add_generation_prompt=generation, tokenize=False))


def said(world: World, ids: Sequence[int]) -> str:
    """The text of a sampled turn without the token that ends it."""
    ends = {world.token(stop) for stop in world.stops}
    kept = list(ids[:-1]) if ids and ids[-1] in ends else list(ids)
    return str(world.tokenizer.decode(kept, skip_special_tokens=False, clean_up_tokenization_spaces=False))


def splice(world: World, turns: Sequence[Turn]) -> Expected:
    """The conversation with sampled ids as they were sampled."""
    segments = render(world, turns, marks=True).split(_MARK)
    groups = [group for sampled, group in _grouped(turns) if sampled]
    media = [medium for turn in turns for message in turn.messages for medium in message.media()]
    if len(segments) != len(groups) + 1:
        raise AssertionError(f"the template of {world.name} shows {len(segments) - 1} of {len(groups)} sampled turns")
    expected = Expected()
    waiting = {modality: iter([m for m in media if m.modality == modality]) for modality in world.shown}
    for place, segment in enumerate(segments):
        last = expected.ids[-1] if place and expected.mask and expected.mask[-1] else None
        ends_here = place == len(groups) and bool(turns) and turns[-1].ids is not None
        part = encode(world, segment, waiting, first=place == 0)
        drop = int(last is not None and bool(part.ids) and part.ids[0] == last and is_control(world, last))
        if last is not None and not drop and last in {world.token(stop) for stop in world.stops}:
            expected.clean = False  # a turn was ended with a token that the template does not write here
        if ends_here:
            expected.tail = part.ids[drop:]
            break
        _append(expected, part, drop)
        if place < len(groups):
            _append_sampled(world, expected, groups[place])
    return expected


def whole(world: World, turns: Sequence[Turn]) -> tuple[list[int], dict[str, Any]]:
    """Ids and outputs of one call of the processor over the whole text."""
    media = [medium for turn in turns for message in turn.messages for medium in message.media()]
    called = world.processor(text=[render(world, turns)], return_tensors="pt", **given(media))
    return [int(token) for token in called["input_ids"][0]], {key: called[key] for key in called if key not in TEXT_KEYS}


def outputs(world: World, items: Sequence[ExpectedItem], length: int) -> dict[str, Any]:
    """The outputs of one call over all items, and those per token from their spans."""
    found: dict[str, Any] = {}
    if items:
        text = "".join(str(world.shown[item.medium.modality].placeholder) for item in items)
        called = world.processor(text=[text], return_tensors="pt", **given([item.medium for item in items]))
        found = {key: called[key] for key in called if key not in TEXT_KEYS and key not in world.sequence}
    for key, values in world.sequence.items():
        row = torch.zeros(1, length, dtype=torch.int64)
        for item in items:
            for start, stop in item.spans:
                row[0, start:stop] = values[item.medium.modality]
        found[key] = row
    return found


def positions(rule: Positions, length: int, items: Sequence[ExpectedItem]) -> np.ndarray[Any, Any]:
    """(axes, length), one token after the other."""
    if rule.axes == 1:
        return np.array([list(range(length))]).reshape(1, -1)
    grids = {start: (stop, grid) for item in items for (start, stop), grid in zip(item.spans, item.grids, strict=True)}
    rows: list[tuple[int, int, int]] = []
    following = 0
    while len(rows) < length:
        if len(rows) not in grids:
            rows.append((following,) * 3)
            following += 1
            continue
        stop, (_, height, width, seconds) = grids[len(rows)]
        reach = max(height, width)
        for token in range(stop - len(rows)):
            frame, inside = divmod(token, height * width)
            step = frame
            if rule.time == "seconds":
                step = int(np.float32(frame) * (np.float32(rule.rate) * np.float32(1.0 if seconds is None else seconds)))
            rows.append((following + step, following + inside // width, following + inside % width))
            if rule.resume == "largest":
                reach = max(reach, step + 1)
        following += reach
    return np.array(rows, np.int64).reshape(-1, 3).T


# ------------------------------------------------------------------------------------------------ inside


def _grouped(turns: Sequence[Turn]) -> Iterator[tuple[bool, list[Turn]]]:
    """Runs of turns: messages apart, and sampled turns together that are one turn of the policy."""
    run: list[Turn] = []
    for turn in turns:
        if run and (turn.ids is None) != (run[-1].ids is None):
            yield run[-1].ids is not None, run
            run = []
        run.append(turn)
    if run:
        yield run[-1].ids is not None, run


def _bare(message: MessageCase) -> dict[str, Any]:
    """A message as a template sees it: media are bare markers."""
    made = {"role": message.role, "content": message.content[0] if message.content else "", **message.called()}
    if len(message.content) == 1 and isinstance(message.content[0], str):
        return made
    parts = [{"type": "text", "text": p} if isinstance(p, str) else {"type": p.modality} for p in message.content]
    return {**made, "content": parts}


def _append(expected: Expected, part: Part, drop: int) -> None:
    by = len(expected.ids) - drop
    expected.ids += part.ids[drop:]
    expected.compact += part.compact[drop:]
    expected.mask += [0] * (len(part.ids) - drop)
    expected.logprobs += [None] * (len(part.ids) - drop)
    expected.items += [item.moved(by) for item in part.items]


def _append_sampled(world: World, expected: Expected, group: Sequence[Turn]) -> None:
    ids = [token for turn in group for token in turn.sampled]
    for turn in group:
        expected.sampled_at.append((len(expected.ids), len(expected.ids) + len(turn.sampled)))
        expected.ids += turn.sampled
        expected.compact += turn.sampled
        expected.mask += [1] * len(turn.sampled)
        expected.logprobs += turn.logprobs or [None] * len(turn.sampled)
    text = said(world, ids)
    canonical = list(world.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
    ends = {world.token(stop) for stop in world.stops}
    kept = ids[:-1] if ids and ids[-1] in ends else ids
    special = any(is_control(world, token) for token in kept)
    if canonical != kept or special or text != text.strip():
        expected.clean = False
