"""A stretch of text with its items through a processor's own call, and where the items came to stand: the ground of the oracles."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from rollout_core.testing.tracker_cases import SAMPLING_RATE, MediumCase
from rollout_core.testing.worlds import World
from rollout_core.testing.worlds.making import Grid

#: Outputs of a processor that are the text's.
TEXT_KEYS = frozenset({"input_ids", "attention_mask", "text_replacement_offsets", "video_metadata"})


@dataclass(frozen=True)
class ExpectedItem:
    """An item at its place. ``spans``: of feature tokens. ``region``: of everything that the processor wrote for it.
    ``envelope``: with what the template wrote around it. All on expanded tokens."""

    medium: MediumCase
    spans: tuple[tuple[int, int], ...]
    region: tuple[int, int]
    envelope: tuple[int, int]
    rows: int | None = None
    grids: tuple[Grid, ...] = ()

    def moved(self, by: int) -> ExpectedItem:
        def move(span: tuple[int, int]) -> tuple[int, int]:
            return span[0] + by, span[1] + by

        return ExpectedItem(
            self.medium, tuple(map(move, self.spans)), move(self.region), move(self.envelope), self.rows, self.grids
        )


def given(media: Sequence[MediumCase]) -> dict[str, Any]:
    """The arguments of a processor call for these media."""
    arguments: dict[str, Any] = {}
    if images := [m.image().convert("RGB") for m in media if m.modality == "image"]:
        arguments["images"] = images
    if videos := [m for m in media if m.modality == "video"]:
        arguments["videos"] = [m.pixels() for m in videos]
        decided: dict[str, Any] = {"do_sample_frames": False}
        if any(m.fps for m in videos):
            known = [{"fps": m.fps or None, "frames_indices": [*range(m.frames)], "total_num_frames": m.frames} for m in videos]
            decided["video_metadata"] = [{**entry, "duration": None} for entry in known]
        arguments["videos_kwargs"] = decided
    if sounds := [m.samples() for m in media if m.modality == "audio"]:
        arguments["audio"] = sounds
        arguments["audio_kwargs"] = {"sampling_rate": SAMPLING_RATE}
    return arguments


@dataclass
class Part:
    """Ids on both tracks, and the items among the expanded ones."""

    ids: list[int]
    compact: list[int]
    items: list[ExpectedItem]


def encode(world: World, text: str, waiting: Mapping[str, Iterator[MediumCase]], *, first: bool) -> Part:
    """A stretch of text with its placeholders through the processor."""
    options: dict[str, Any] = {} if first else {"add_special_tokens": False}
    media = [next(waiting[modality]) for modality in placeholders(world, text)]
    called = world.processor(text=[text], return_text_replacement_offsets=True, return_tensors="pt", **given(media), **options)
    ids = [int(token) for token in called["input_ids"][0]]
    entries = sorted(called["text_replacement_offsets"][0], key=lambda entry: entry["span"][0]) if media else []
    grown, at = "", 0
    ranges = []
    for entry in entries:
        grown += text[at : entry["span"][0]]
        ranges.append((len(grown), len(grown) + len(entry["replacement"])))
        grown, at = grown + entry["replacement"], entry["span"][1]
    grown += text[at:]
    encoded = world.tokenizer(grown, return_offsets_mapping=True, add_special_tokens=first, verbose=False)
    if list(encoded["input_ids"]) != ids:
        raise AssertionError(f"the processor of {world.name} does not encode the text that it says it makes")
    places = encoded["offset_mapping"]
    by_modality = {modality: iter([m for m in media if m.modality == modality]) for modality in world.shown}
    items: list[ExpectedItem] = []
    for entry, span in zip(entries, ranges, strict=True):
        item = _item(world, next(by_modality[entry["type"]]), span, ids, places)
        if items:  # a token made of the ends of two neighbours belongs to the first
            start = items[-1].region[1]
            item = replace(
                item, region=(max(item.region[0], start), item.region[1]), envelope=(max(item.envelope[0], start), item.envelope[1])
            )
        items.append(item)
    compact = list(world.tokenizer(text, add_special_tokens=first, verbose=False)["input_ids"])
    return Part(ids, compact, items)


def placeholders(world: World, text: str) -> list[str]:
    """The modalities of the placeholders in a text, in order."""
    found = []
    for modality, shown in world.shown.items():
        at = text.find(shown.placeholder)
        while at >= 0:
            found.append((at, modality))
            at = text.find(shown.placeholder, at + len(shown.placeholder))
    return [modality for _, modality in sorted(found)]


def _item(
    world: World, medium: MediumCase, span: tuple[int, int], ids: Sequence[int], places: Sequence[tuple[int, int]]
) -> ExpectedItem:
    shown = world.shown[medium.modality]
    feature = world.token(shown.feature)
    inside = [at for at, (start, stop) in enumerate(places) if start < span[1] and stop > span[0]]
    around = [
        at for at, (start, stop) in enumerate(places) if start < span[1] + len(shown.after) and stop > span[0] - len(shown.before)
    ]
    spans: list[tuple[int, int]] = []
    for at in inside:
        if ids[at] != feature:
            continue
        if spans and spans[-1][1] == at:
            spans[-1] = (spans[-1][0], at + 1)
        else:
            spans.append((at, at + 1))
    rows, grids = world.measure(medium) if world.measure else (None, ())
    return ExpectedItem(medium, tuple(spans), (inside[0], inside[-1] + 1), (around[0], around[-1] + 1), rows, grids)


def is_control(world: World, token: int) -> bool:
    """Whether an id is a control token, which a tokenizer never merges."""
    return token in getattr(world.tokenizer, "added_tokens_decoder", {})
