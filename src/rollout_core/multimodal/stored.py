"""Conversations as bytes: one MessagePack document, never pickle. Payloads are stored once each, by identity, or left out.

The document is ``[magic, version, digest, body]``; ``digest`` is xxh3-128 of ``body``, against damage. ``body`` holds the
fingerprint of the renderer, which must be the reader's, the deltas of every segment, and the payloads.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np
import torch
import xxhash

from rollout_core.errors import ConversationError
from rollout_core.multimodal.deltas import Delta, Item, Payload, Tokens
from rollout_core.multimodal.media import Media, Picture, Sound, Video
from rollout_core.multimodal.positions import Grid
from rollout_core.multimodal.renderer import Renderer, Tools
from rollout_core.multimodal.steps import follow, placed
from rollout_core.multimodal.tracks import Region

if TYPE_CHECKING:
    from rollout_core.multimodal.conversation import Conversation

MAGIC, VERSION = "rollout_core.conversation", 1


class _Step(msgspec.Struct, array_like=True, frozen=True):
    kind: str
    input_ids: bytes
    compact_ids: bytes
    logprobs: bytes
    origin: bytes
    message: bytes
    items: list[_Item]
    messages: list[dict[str, Any]]
    message_count: int
    turn: str
    finish: str | None
    role: str
    features: list[str]


class _Item(msgspec.Struct, array_like=True, frozen=True):
    modality: str
    message: int
    region: tuple[int, int, int, int]
    spans: list[tuple[int, int]]
    envelope: tuple[int, int]
    artifact: str


class _Tensor(msgspec.Struct, array_like=True, frozen=True):
    dtype: str
    shape: list[int]
    data: bytes


class _Payload(msgspec.Struct, array_like=True, frozen=True):
    artifact: str
    identity: str
    media: tuple[str, dict[str, Any]] | None
    outputs: dict[str, Any]
    replacement: str
    rows: int | None
    grids: list[tuple[str, int, int, int, float | None]]


class _Body(msgspec.Struct, array_like=True, frozen=True):
    fingerprint: str
    rule: str
    tools: list[dict[str, Any]] | None
    on_unstable: str
    segments: list[tuple[list[_Step], bool]]
    payloads: list[_Payload]


def encode(conversation: Conversation, *, payloads: bool) -> bytes:
    """The conversation and the segments before it as bytes."""
    parts = (*conversation.segments, conversation)
    found = {item.artifact: item.payload for part in parts for item in part.items} if payloads else {}
    body = msgspec.msgpack.encode(
        _Body(
            conversation.renderer.fingerprint,
            conversation.renderer.rule.name,
            None if conversation.tools is None else [dict(tool) for tool in conversation.tools],
            conversation.on_unstable,
            [([_from_delta(delta) for delta in part.tip.path()], part.cut) for part in parts],
            [_from_payload(payload) for payload in found.values()],
        )
    )
    return msgspec.msgpack.encode((MAGIC, VERSION, xxhash.xxh3_128_digest(body), body))


def decode(
    renderer: Renderer, data: bytes, payloads: Mapping[str, Payload]
) -> tuple[Delta, Tools, Any, bool, list[tuple[Delta, bool]]]:
    """The tip, tools, way with unstable templates, whether it was cut, and the same of earlier segments' tips."""
    try:
        body = _opened(data)
        stored = {p.artifact: _to_payload(p) for p in body.payloads}
        if (body.fingerprint, body.rule) != (renderer.fingerprint, renderer.rule.name):
            raise ConversationError(
                f"this conversation was made by renderer {body.fingerprint[:12]} with positions {body.rule!r}, and the one given "
                f"is {renderer.fingerprint[:12]} with {renderer.rule.name!r}: another template, tokenizer, processor or setting"
            )
        tips = [(_chain(renderer, steps, {**payloads, **stored}), cut) for steps, cut in body.segments]
        if not tips:
            raise ValueError("they hold no tokens")
    except (msgspec.MsgspecError, ValueError, TypeError, RuntimeError, LookupError, AttributeError) as error:
        if isinstance(error, ConversationError):
            raise
        raise ConversationError(f"these bytes are no stored conversation: {error}") from error
    return tips[-1][0], None if body.tools is None else tuple(body.tools), body.on_unstable, tips[-1][1], tips[:-1]


def _opened(data: bytes) -> _Body:
    magic, version, digest, packed = msgspec.msgpack.decode(data, type=tuple[str, int, bytes, bytes])
    if magic != MAGIC or version != VERSION:
        raise ConversationError(f"these bytes are {magic!r} version {version}; this reads {MAGIC!r} version {VERSION}")
    if xxhash.xxh3_128_digest(packed) != digest:
        raise ConversationError("these bytes are damaged: their digest is not the one written with them")
    return msgspec.msgpack.decode(packed, type=_Body)


def _from_delta(delta: Delta) -> _Step:
    tokens = delta.tokens
    return _Step(
        delta.kind,
        tokens.input_ids.astype("<i8").tobytes(),
        tokens.compact_ids.astype("<i8").tobytes(),
        tokens.logprobs.astype("<f8").tobytes(),
        tokens.origin.tobytes(),
        tokens.message.astype("<i8").tobytes(),
        [
            _Item(i.modality, i.message, _numbers(i.region), list(i.spans), i.envelope, i.artifact) for i in delta.items
        ],
        [dict(message) for message in delta.messages],
        delta.message_count,
        delta.turn,
        delta.finish,
        delta.role,
        list(delta.features),
    )  # fmt: skip


def _numbers(region: Region) -> tuple[int, int, int, int]:
    return region.start, region.stop, region.compact_start, region.compact_stop


def _chain(renderer: Renderer, steps: list[_Step], payloads: Mapping[str, Payload]) -> Delta:
    tip: Delta | None = None
    for step in steps:
        tokens = Tokens(
            np.frombuffer(step.input_ids, "<i8").astype(np.int64),
            np.frombuffer(step.compact_ids, "<i8").astype(np.int64),
            np.frombuffer(step.logprobs, "<f8").astype(np.float64),
            np.frombuffer(step.origin, np.uint8).copy(),
            np.frombuffer(step.message, "<i8").astype(np.int64),
        )
        if len({len(tokens.input_ids), len(tokens.logprobs), len(tokens.origin), len(tokens.message)}) != 1:
            raise ValueError("arrays of one step have different lengths")
        items = placed(tip, [_to_item(step, n, tip, payloads) for n in range(len(step.items))], 0, 0)
        _check_places(items, tip, tokens)
        tip = Delta(
            **follow(renderer.rule, tip, tokens, items),
            kind=step.kind,
            messages=tuple(step.messages),
            message_count=step.message_count,
            features=tuple(step.features),
            turn=step.turn,
            finish=step.finish,
            role=step.role,
        )
    if tip is None:
        raise ValueError("they hold no tokens")
    return tip


def _to_item(step: _Step, n: int, tip: Delta | None, payloads: Mapping[str, Payload]) -> Item:
    """The n-th item of a step after ``tip``, not yet numbered."""
    item = step.items[n]
    if item.artifact not in payloads:
        earlier = tip.item_counts.get(item.modality, 0) if tip else 0
        number = earlier + sum(other.modality == item.modality for other in step.items[:n])
        raise ConversationError(
            f"the payload of {item.modality} {number} (artifact {item.artifact}) is not stored here; give it in payloads="
        )
    payload = payloads[item.artifact]
    if payload.artifact != item.artifact:
        raise ConversationError(f"the payload given for artifact {item.artifact} is of {payload.artifact}")
    return Item(item.modality, 0, 0, item.message, Region(*item.region), tuple(item.spans), item.envelope, payload)


def _check_places(items: Sequence[Item], tip: Delta | None, tokens: Tokens) -> None:
    """Items lie in order within the step's own tokens, on both tracks."""
    at, compact_at = (tip.length, tip.compact_length) if tip else (0, 0)
    stop, compact_stop = at + len(tokens), compact_at + len(tokens.compact_ids)
    for item in items:
        region, spans = item.region, [place for span in item.spans for place in span]
        places = [at, region.start, *spans, region.stop, stop]
        compact_places = [compact_at, region.compact_start, region.compact_stop, compact_stop]
        around = [item.envelope[0], region.start, region.stop, item.envelope[1], stop]
        if any(places != sorted(places) for places in (places, compact_places, around)) or item.envelope[0] < at:
            raise ValueError(f"{item.modality} {item.modality_index} lies outside its tokens")
        at, compact_at = region.stop, region.compact_stop
    if len(tokens.compact_ids) - sum(i.region.compact_stop - i.region.compact_start for i in items) != len(tokens) - sum(
        i.region.stop - i.region.start for i in items
    ):
        raise ValueError("the two tracks of a step do not fit together")


# ------------------------------------------------------------------------------------------------ payloads


def _from_payload(payload: Payload) -> _Payload:
    grids: list[tuple[str, int, int, int, float | None]] = [
        (g.modality, g.t, g.h, g.w, g.seconds) for g in payload.grids if isinstance(g, Grid)
    ]
    outputs = {key: _from_value(value) for key, value in payload.outputs.items()}
    return _Payload(
        payload.artifact, payload.identity, _from_media(payload.media), outputs, payload.replacement, payload.rows, grids
    )


def _to_payload(stored: _Payload) -> Payload:
    grids: Any = tuple(Grid(*grid) for grid in stored.grids)  # type: ignore[arg-type]
    outputs = {key: _to_value(value) for key, value in stored.outputs.items()}
    return Payload(stored.artifact, stored.identity, _to_media(stored.media), outputs, stored.replacement, stored.rows, grids)


def _from_value(value: Any) -> Any:
    """A tensor as ``{"tensor": [dtype, shape, bytes]}``, a list or tuple as ``{"list": [...]}``, a number or text as it is."""
    if isinstance(value, torch.Tensor):
        plain = value.detach().cpu().contiguous()
        data = plain.reshape(-1).view(torch.uint8).numpy().tobytes() if plain.numel() else b""
        return {"tensor": [str(value.dtype).removeprefix("torch."), list(value.shape), data]}
    if isinstance(value, (list, tuple)):
        return {"list": [_from_value(entry) for entry in value]}
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise ConversationError(f"an output of type {type(value).__name__} cannot be stored")


def _to_value(value: Any) -> Any:
    if not isinstance(value, dict):
        return value
    if "list" in value:
        return [_to_value(entry) for entry in value["list"]]
    tensor = msgspec.convert(value["tensor"], _Tensor)
    dtype = getattr(torch, tensor.dtype, None)
    if not isinstance(dtype, torch.dtype):
        raise ValueError(f"{tensor.dtype!r} is no dtype")
    if not tensor.data:
        return torch.empty(tensor.shape, dtype=dtype)
    return torch.frombuffer(bytearray(tensor.data), dtype=dtype).reshape(tensor.shape)


def _from_media(media: Media | None) -> tuple[str, dict[str, Any]] | None:
    if media is None:
        return None
    if isinstance(media, Picture):
        names = ("mode", "size", "pixels", "palette", "transparency", "background")
        return "image", {name: getattr(media, name) for name in names}
    if isinstance(media, Video):
        return "video", {"shape": list(media.frames.shape), "frames": media.frames.tobytes(), **media.metadata()}
    return "audio", {"samples": media.samples.astype("<f4").tobytes(), "sampling_rate": media.sampling_rate}


def _to_media(stored: tuple[str, dict[str, Any]] | None) -> Media | None:
    if stored is None:
        return None
    modality, fields = stored
    if modality == "image":
        pairs = {name: tuple(fields[name]) for name in ("size", "background")}
        return Picture(**{**fields, **pairs})
    if modality == "video":
        rest = {key: value for key, value in fields.items() if key not in ("shape", "frames")}
        return Video(np.frombuffer(fields["frames"], np.uint8).reshape(fields["shape"]), **rest)
    return Sound(np.frombuffer(fields["samples"], "<f4").astype(np.float32), fields["sampling_rate"])
