"""One item through a transformers processor, and the outputs of many items as one call would have given them.

The processor is only called in public: with the text of one placeholder and one item. It brings its own transformers and Pillow;
nothing of them is imported here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Final

import torch

from rollout_core.errors import ConversationError, MediaError, UnsupportedProcessorError
from rollout_core.multimodal.families import Family
from rollout_core.multimodal.fingerprint import processor_fingerprint
from rollout_core.multimodal.media import Media, Picture, Video
from rollout_core.multimodal.merge import Outputs, Spans
from rollout_core.multimodal.positions import Segment

__all__ = ["Processed", "feature_token", "merge_outputs", "placeholder", "process_one", "processor_fingerprint", "sequence_outputs"]

#: Outputs of the text itself: the conversation makes its own ids. The rest is not for the model.
_TEXT_KEYS: Final = frozenset({"input_ids", "attention_mask", "text_replacement_offsets", "video_metadata"})
#: What process_one decides, so that a caller cannot.
_RESERVED: Final = frozenset(
    {
        *("text", "images", "videos", "audio", "return_tensors", "add_special_tokens", "video_metadata", "do_sample_frames"),
        *("sampling_rate", "return_text_replacement_offsets", "return_mm_token_type_ids", "return_metadata"),
    }
)


@dataclass(frozen=True, slots=True, eq=False)
class Processed:
    """One item as its processor gives it.

    Attributes:
        outputs: output key -> tensor of this item alone, with the leading dimensions of a call for one item.
        replacement: the text that the processor puts in the place of the placeholder.
        rows: feature rows that the model will make of it; None where the family cannot say.
        grids: per span of feature tokens, its sizes for a position rule of several axes; empty for the plain rule.
    """

    outputs: Outputs
    replacement: str
    rows: int | None
    grids: tuple[Segment, ...] = ()


def placeholder(processor: Any, family: Family, modality: str) -> str:
    """The text that stands for one item in a compact prompt. ``UnsupportedProcessorError`` if the modality is not supported."""
    return str(family.support(processor, modality).placeholder(processor))


def feature_token(processor: Any, family: Family, modality: str) -> str:
    """The text of the token that stands for one feature row in an expanded prompt; for some families it is not the placeholder."""
    return str(family.support(processor, modality).feature(processor))


def process_one(
    processor: Any, family: Family, modality: str, media: Media, *, processor_kwargs: Mapping[str, Any] | None = None
) -> Processed:
    """Call a processor once, for one item.

    Args:
        processor: a transformers processor (5.23 or one that reports ``text_replacement_offsets`` like it).
        family: its family, as ``family_of`` gives it.
        modality: ``image``, ``video`` or ``audio``.
        media: a ``Picture``, ``Video`` or ``Sound``. Frames of a video are taken as they are, never sampled again.
        processor_kwargs: more keywords of the call, flat or in ``images_kwargs`` and its like.

    Raises:
        UnsupportedProcessorError: a refused family or modality, a missing setting, an output that no rule knows, a processor that
            does not say what it put in the placeholder's place.
        MediaError: a sound of another sampling rate.
        ConversationError: a keyword in ``processor_kwargs`` that is decided here.
        What the processor raises, with a note of what it was given.
    """
    support = family.support(processor, modality)
    more = dict(processor_kwargs or {})
    for pin in support.pins:
        pin.check(processor, more)
    text = support.placeholder(processor)
    arguments = _arguments(processor, modality, media, more)
    try:
        called = processor(
            text=[text],
            return_tensors="pt",
            add_special_tokens=False,
            return_text_replacement_offsets=True,
            # Made from spans instead (see PerToken): the processor finds the tokens by id.
            return_mm_token_type_ids=False,
            **arguments,
        )
    except Exception as error:
        error.add_note(f"{type(processor).__name__} was given {media!r} alone, with the text {text!r} and {sorted(arguments)}")
        raise
    outputs = MappingProxyType({key: called[key] for key in called if _is_output(processor, family, key, called[key])})
    replaced = text if support.verbatim else _replacement(processor, modality, text, called.get("text_replacement_offsets"))
    rows = support.rows(processor, outputs) if support.rows is not None else None
    grids = support.grids(processor, outputs) if support.grids is not None else ()
    return Processed(outputs, replaced, rows, grids)


def merge_outputs(family: Family, items: Sequence[tuple[str, Outputs]]) -> dict[str, torch.Tensor]:
    """The outputs of one call over all items, from those of each.

    Args:
        family: the family of the processor that made them.
        items: modality and outputs of each item, in token order; an item that stands at two places is given twice.

    Returns:
        new tensors by key; a key that no item has is absent. Outputs of the whole sequence are ``sequence_outputs``.

    Raises:
        UnsupportedProcessorError: a refused family or modality, a key without a rule, a key that only some items of a modality
            have, or tensors that do not fit each other.
    """
    _check_modalities(family, items)
    values: dict[str, list[torch.Tensor]] = {}
    for _, outputs in items:
        for key, value in outputs.items():
            values.setdefault(key, []).append(value)
    for key, found in values.items():
        if key not in family.outputs:
            raise UnsupportedProcessorError(_unknown(f"family {family.name!r}", family, key))
        having = {modality for modality, outputs in items if key in outputs}
        if len(found) != sum(modality in having for modality, _ in items):
            lacking = [index for index, (modality, outputs) in enumerate(items) if modality in having and key not in outputs]
            raise UnsupportedProcessorError(f"output {key!r} is missing in item {lacking[0]}, while others of its modality have it")
    return {key: family.outputs[key].merge(key, found) for key, found in values.items()}


def sequence_outputs(
    family: Family, length: int, items: Sequence[tuple[str, Outputs]], spans: Sequence[Spans]
) -> dict[str, torch.Tensor]:
    """The outputs that belong to the token sequence as a whole, such as ``mm_token_type_ids``, int64 with a leading 1.

    ``length`` counts the expanded tokens, ``items`` are those of ``merge_outputs``, and ``spans`` has for each of them the
    ``(start, stop)`` of every run of its feature tokens. Raises ``UnsupportedProcessorError`` as ``merge_outputs``, and for a span
    outside the sequence.
    """
    _check_modalities(family, items)
    made = {key: rule.merge(key, length, items, spans) for key, rule in family.sequence.items()}
    return {key: value for key, value in made.items() if value is not None}


def _arguments(processor: Any, modality: str, media: Media, more: dict[str, Any]) -> dict[str, Any]:
    groups = [more, *(more[group] for group in more if group.endswith("_kwargs") and isinstance(more[group], Mapping))]
    taken = sorted(_RESERVED.intersection(set().union(*groups)))
    if taken:
        raise ConversationError(f"processor_kwargs has {taken}, which are decided per item; leave them out")
    if media.modality != modality:
        raise ConversationError(f"{media!r} is of modality {media.modality!r}, not {modality!r}")
    if isinstance(media, Picture):
        return {**more, "images": [media.to_pil()]}
    if isinstance(media, Video):
        # Frames are copied and metadata is new: processors write into both.
        decided: dict[str, Any] = {"do_sample_frames": False}
        metadata = media.metadata()
        if any(value is not None for value in metadata.values()):
            decided["video_metadata"] = [_complete(metadata, len(media.frames))]
        return {**more, "videos": [media.frames.copy()], "videos_kwargs": {**more.get("videos_kwargs", {}), **decided}}
    extractor = getattr(processor, "audio_processor", None) or getattr(processor, "feature_extractor", None)
    rate = getattr(extractor, "sampling_rate", None)
    if rate != media.sampling_rate:
        raise MediaError(f"{media!r} is at {media.sampling_rate} Hz and {type(processor).__name__} takes {rate} Hz; resample it")
    audio = {**more.get("audio_kwargs", {}), "sampling_rate": media.sampling_rate}
    return {**more, "audio": [media.samples.copy()], "audio_kwargs": audio}


def _complete(metadata: dict[str, Any], frames: int) -> dict[str, Any]:
    """What transformers fills in itself when it is given no metadata (5.23, video_utils.py, ``make_batched_metadata``)."""
    if metadata["frames_indices"] is None:
        metadata["frames_indices"] = list(range(frames))
    if metadata["total_num_frames"] is None:
        metadata["total_num_frames"] = max(metadata["frames_indices"]) + 1
    return metadata


def _is_output(processor: Any, family: Family, key: str, value: Any) -> bool:
    """Whether this is an output of the item; no output goes unnoticed."""
    if key in family.outputs:
        return True
    if key in _TEXT_KEYS or key in family.sequence:
        return False
    if key == "token_type_ids" and isinstance(value, torch.Tensor) and not value.any():
        return False  # a tokenizer's segment numbers: one sequence, all zero
    raise UnsupportedProcessorError(_unknown(type(processor).__name__, family, key))


def _unknown(who: str, family: Family, key: str) -> str:
    return (
        f"{who} gives an output {key!r} that family {family.name!r} has no rule for; add one: register_family(dataclasses.replace("
        f"family, outputs={{**family.outputs, {key!r}: Cat()}}), replace=True), after comparing with one call over several items"
    )


def _replacement(processor: Any, modality: str, text: str, offsets: Any) -> str:
    """What stands in the place of the only placeholder, as the processor reports it."""
    name = type(processor).__name__
    if not offsets or len(offsets) != 1:
        raise UnsupportedProcessorError(
            f"{name} does not report text_replacement_offsets, so nobody knows what it writes for an item; use a transformers "
            "whose processors do (5.23), or register a family with Support(verbatim=True) if it leaves the placeholder alone"
        )
    entries = offsets[0]
    if len(entries) != 1 or entries[0]["type"] != modality or entries[0]["text"] != text:
        raise UnsupportedProcessorError(f"{name} was given one {modality} with the text {text!r} and reports {entries!r}")
    return str(entries[0]["replacement"])


def _check_modalities(family: Family, items: Sequence[tuple[str, Outputs]]) -> None:
    for modality in dict.fromkeys(modality for modality, _ in items):
        family.support(None, modality)
