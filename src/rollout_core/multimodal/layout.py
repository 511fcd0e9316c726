"""From rendered text to tokens: placeholders found where the template wrote them, both tracks encoded, every token attributed.

Text of a user or a tool that merely looks like a placeholder has been replaced by a guard before rendering; here it is put back and
encoded as ordinary text. So whatever still looks like a placeholder was written by the template, for a medium.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from rollout_core.errors import ConversationError, UnsupportedProcessorError
from rollout_core.multimodal.deltas import BOUNDARY, ENVIRONMENT, TEMPLATE, Bytes, Item, Payload
from rollout_core.multimodal.tracks import Encoded, Ids, Region, align, overlap, runs


class Encode(Protocol):
    """Encodes text.

    ``plain`` takes control tokens in it as ordinary text; ``first`` adds what a tokenizer puts before a sequence.
    """

    def __call__(self, text: str, *, plain: bool = False, first: bool = False) -> Encoded: ...


@dataclass(frozen=True, slots=True)
class Medium:
    """One medium of the messages being added, processed."""

    modality: str
    message: int
    payload: Payload


@dataclass(frozen=True, slots=True)
class Shown:
    """A medium in a text: the characters ``[start, stop)`` of its placeholder, and ``[outer_start, outer_stop)`` with what the
    template wrote around it because of the medium."""

    medium: Medium
    start: int
    stop: int
    outer_start: int
    outer_stop: int

    def moved(self, by: int) -> Shown:
        return Shown(self.medium, self.start + by, self.stop + by, self.outer_start + by, self.outer_stop + by)


@dataclass(frozen=True, slots=True)
class Script:
    """Rendered text and what is known of it.

    Attributes:
        text: with guards in place of literal placeholders.
        guards: guard -> the literal text it stands for.
        contents: character ranges that came from the messages rather than from the template, in order, disjoint.
        bounds: per message, the character where its text begins; ascending, the first is 0 or the end of ``closing``.
        shown: the media, in the order of the text.
        first_message: number of the first of those messages.
        closing: characters at the front that end the turn before.
        first: whether this is the front of the whole sequence.
    """

    text: str
    guards: Mapping[str, str]
    contents: tuple[tuple[int, int], ...]
    bounds: tuple[int, ...]
    shown: tuple[Shown, ...]
    first_message: int
    closing: int
    first: bool


@dataclass(frozen=True, slots=True)
class Laid:
    """Tokens of a script; items and regions are counted from its first token."""

    input_ids: Ids
    compact_ids: Ids
    origin: Bytes
    message: Ids
    items: tuple[Item, ...]


def lay_out(
    script: Script, encode: Encode, features: Mapping[str, Sequence[int]], atomic: Callable[[int], bool], before: Ids
) -> Laid:
    """Encode both tracks of a script and place its items.

    Args:
        features: per modality, the ids of feature tokens.
        atomic: whether an id is a control token, which a tokenizer never merges.
        before: ids that the sequence ends with, where they were sampled; the tokens that end a turn are not written twice.

    Raises:
        ConversationError: text of a message that is one token however it is written.
        UnsupportedProcessorError: spans and feature rows differ, or the tokenizer merges expansions with the text around them.
    """
    reserved = np.asarray([token for ids in features.values() for token in ids], np.int64)
    compact, expanded, regions = _encode(script, encode, reserved)
    cut = overlap(before, compact.ids, max(int((compact.offsets[:, 1] <= script.closing).sum()), 1))
    if cut and (not atomic(int(compact.ids[0])) or (regions and regions[0].compact_start < cut)):
        cut = 0
    starts, stops = compact.offsets[:, 0], compact.offsets[:, 1]
    origin = np.full(len(compact.ids), TEMPLATE, np.uint8)
    for start, stop in script.contents:
        origin[(starts < stop) & (stops > start)] = ENVIRONMENT
    origin[(stops <= script.closing) & (script.closing > 0)] = BOUNDARY
    message = np.searchsorted(np.asarray(script.bounds, np.int64), starts, side="right") - 1 + script.first_message
    source = _sources(regions, len(expanded.ids))
    outside = source >= 0
    wide_origin = np.where(outside, origin[source], ENVIRONMENT).astype(np.uint8)
    wide_message = np.where(outside, message[source], 0).astype(np.int64)
    items = []
    counts: dict[str, int] = {}
    for index, (shown, region) in enumerate(zip(script.shown, regions, strict=True)):
        medium = shown.medium
        spans = runs(expanded.ids[region.start : region.stop], features[medium.modality], region.start)
        _check_rows(medium, spans)
        earlier, later = _around(shown, compact, region)
        envelope = (region.start - earlier, region.stop + later)
        # Also where its first token began in the text of the message before, as one that takes white space does.
        wide_message[slice(*envelope)] = medium.message
        item = Item(medium.modality, index, counts.get(medium.modality, 0), medium.message, region, spans, envelope, medium.payload)
        items.append(item.moved(-cut, -cut, item.index, item.modality_index))
        counts[medium.modality] = item.modality_index + 1
    return Laid(expanded.ids[cut:], compact.ids[cut:], wide_origin[cut:], wide_message[cut:], tuple(items))


def media_in(
    text: str, media: Sequence[Medium], placeholders: Mapping[str, str], envelopes: Mapping[str, tuple[str, str]]
) -> list[Shown]:
    """Where a rendered text shows its media, in order.

    Args:
        text: with guards in place of literal placeholders.
        media: in message order; of each modality, the n-th belongs to the n-th placeholder of that modality.
        placeholders: per modality, the placeholder as templates write it.
        envelopes: `templates.Verdict.envelopes`.

    Raises:
        ConversationError: more or fewer placeholders than media.
    """
    present = {medium.modality for medium in media}
    waiting = {modality: iter([m for m in media if m.modality == modality]) for modality in placeholders}
    by_text = {placeholders[modality]: modality for modality in present}
    pattern = re.compile("|".join(re.escape(p) for p in sorted(placeholders.values(), key=len, reverse=True)) or "(?!)")
    shown = []
    for match in pattern.finditer(text):
        modality = by_text.get(match.group(), "")
        medium = next(waiting[modality], None) if modality else None
        if medium is None:
            raise ConversationError(
                f"the chat template writes {match.group()!r} more often than there are media of that kind; a message has a "
                "placeholder without its picture, video or sound"
            )
        shown.append(Shown(medium, *match.span(), *_outer(text, *match.span(), envelopes.get(modality))))
    for modality in sorted(present):
        left = next(waiting[modality], None)
        if left is not None:
            raise ConversationError(
                f"the chat template writes no placeholder {placeholders[modality]!r} for the {modality} in message {left.message}; "
                "some templates show media only in user messages"
            )
    return shown


def _outer(text: str, start: int, stop: int, around: tuple[str, str] | None) -> tuple[int, int]:
    """The characters of a placeholder at ``[start, stop)`` with what the template wrote around it."""
    prefix, suffix = around or ("", "")
    # A template may write something that changes, such as a number, further away: what is the same next to the placeholder counts.
    before = next(len(prefix) - n for n in range(len(prefix) + 1) if text[:start].endswith(prefix[n:]))
    after = next(n for n in range(len(suffix), -1, -1) if text[stop:].startswith(suffix[:n]))
    return start - before, stop + after


def _encode(script: Script, encode: Encode, reserved: Ids) -> tuple[Encoded, Encoded, list[Region]]:
    """Both tracks. Offsets of the compact track count characters of the script's text, guards included."""
    ids: list[Ids] = []
    offsets: list[Ids] = []
    wide: list[Ids] = []
    regions: list[Region] = []
    length = wide_length = 0
    for index, (start, stop, literal) in enumerate(_parts(script)):
        if literal is not None:
            part = encode(literal, plain=True, first=script.first and index == 0)
            if np.isin(part.ids, reserved).any():
                raise ConversationError(f"the text {literal!r} in a message is one token however it is written; take it out")
            part = Encoded(part.ids, np.tile(np.asarray([[start, stop]], np.int64), (len(part.ids), 1)))
            ids, offsets, wide = [*ids, part.ids], [*offsets, part.offsets], [*wide, part.ids]
            length, wide_length = length + len(part.ids), wide_length + len(part.ids)
            continue
        inside = [shown for shown in script.shown if start <= shown.start < stop]
        text = script.text[start:stop]
        part = encode(text, first=script.first and index == 0)
        grown, chars, compact_chars = _grown(text, start, inside)
        full = encode(grown, first=script.first and index == 0) if inside else part
        regions += [r.shifted(wide_length, length) for r in align(part, full, compact_chars, chars)]
        ids, offsets, wide = [*ids, part.ids], [*offsets, part.offsets + start], [*wide, full.ids]
        length, wide_length = length + len(part.ids), wide_length + len(full.ids)
    empty, none = np.zeros(0, np.int64), np.zeros((0, 2), np.int64)
    compact = Encoded(np.concatenate([empty, *ids]), np.concatenate([none, *offsets]))
    return compact, Encoded(np.concatenate([empty, *wide]), none), regions


def _parts(script: Script) -> Iterator[tuple[int, int, str | None]]:
    """Stretches of the text between guards, and the guards with what they stand for."""
    at = 0
    if script.guards:
        found = list(re.finditer("|".join(map(re.escape, script.guards)), script.text))
        mark = next(iter(script.guards))[0]
        if script.text.count(mark) != len(found):
            raise ConversationError("the chat template changes text that looks like a placeholder; take it out of the messages")
        for match in found:
            if match.start() > at:
                yield at, match.start(), None
            yield match.start(), match.end(), script.guards[match.group()]
            at = match.end()
    if at < len(script.text) or at == 0:
        yield at, len(script.text), None


def _grown(text: str, start: int, inside: Sequence[Shown]) -> tuple[str, list[tuple[int, int]], list[tuple[int, int]]]:
    """The text with every placeholder replaced, and the characters of the replacements and of the placeholders."""
    parts: list[str] = []
    chars: list[tuple[int, int]] = []
    length = at = 0
    for shown in inside:
        before, replacement = text[at : shown.start - start], shown.medium.payload.replacement
        parts += [before, replacement]
        length += len(before)
        chars.append((length, length + len(replacement)))
        length += len(replacement)
        at = shown.stop - start
    return "".join([*parts, text[at:]]), chars, [(shown.start - start, shown.stop - start) for shown in inside]


def _sources(regions: Sequence[Region], length: int) -> Ids:
    """Per expanded token, the compact token that it equals; -1 inside regions."""
    source = np.full(length, -1, np.int64)
    at = compact_at = 0
    for region in regions:
        source[at : region.start] = np.arange(compact_at, region.compact_start)
        at, compact_at = region.stop, region.compact_stop
    source[at:] = np.arange(compact_at, compact_at + length - at)
    return source


def _check_rows(medium: Medium, spans: tuple[tuple[int, int], ...]) -> None:
    tokens = sum(stop - start for start, stop in spans)
    rows, grids = medium.payload.rows, medium.payload.grids
    if rows is not None and rows != tokens:
        raise UnsupportedProcessorError(
            f"the {medium.modality} in message {medium.message} has {rows} feature rows and {tokens} placeholder tokens: "
            "processor and tokenizer do not belong together, or the family's rule for rows is wrong"
        )
    if grids and len(grids) != len(spans):
        raise UnsupportedProcessorError(
            f"the {medium.modality} in message {medium.message} has {len(spans)} spans and {len(grids)} grids for the position rule"
        )


def _around(shown: Shown, compact: Encoded, region: Region) -> tuple[int, int]:
    """How many tokens before and after a region the template wrote because of the medium."""
    before = compact.offsets[: region.compact_start]
    after = compact.offsets[region.compact_stop :]
    # Tokens that touch it: a control token may have taken white space around it.
    touching_before = (before[:, 1] > shown.outer_start) & (before[:, 1] > before[:, 0])
    touching_after = (after[:, 0] < shown.outer_stop) & (after[:, 1] > after[:, 0])
    earlier = int(touching_before.sum()) if shown.outer_start < shown.start else 0
    return earlier, int(touching_after.sum()) if shown.outer_stop > shown.stop else 0
