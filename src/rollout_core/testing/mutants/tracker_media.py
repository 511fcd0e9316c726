"""Bugs of trackers in what a medium is: identity, loading, and whose memory it is in."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from rollout_core.multimodal import Conversation, HFRenderer, Picture, Sound, Video
from rollout_core.multimodal.messages import MediaSource
from rollout_core.testing.mutants.registry import tracker_mutant
from rollout_core.testing.mutants.tracker_base import Remembering, Rendered, parts_of
from rollout_core.testing.own_tracker import ConversationTracker, source_of


class _Hashing(ConversationTracker):
    """With a hash of its own."""

    def identity(self, modality: str, part: Any) -> str:
        media = self.renderer.load(source_of(modality, part))
        hashed = self.hashed(media)
        return media.identity if hashed is None else hashlib.sha256(repr(hashed).encode()).hexdigest()

    def hashed(self, media: Picture | Video | Sound) -> Any:
        """What is hashed, or None for all that there is."""
        return None


@tracker_mutant("M13-separates", "SGLang's older hash: 64 bits over flattened values")
class HashesWithoutShape(_Hashing):
    """Hashes the pixels without width and height."""

    def hashed(self, media: Picture | Video | Sound) -> Any:
        if isinstance(media, Video):
            return media.frames.tobytes(), media.fps
        return (media.mode, media.palette, media.pixels) if isinstance(media, Picture) else None


@tracker_mutant("M13-separates", "hashes of Image.tobytes()")
class HashesWithoutPalette(_Hashing):
    """Hashes the indices of a picture with a palette, and not the palette."""

    def hashed(self, media: Picture | Video | Sound) -> Any:
        return (media.mode, media.size, media.pixels) if isinstance(media, Picture) else None


@tracker_mutant("M13-separates", 'hashes after convert("RGB")')
class HashesWithoutAlpha(_Hashing):
    """Hashes the colours of a picture, and not its alpha."""

    def hashed(self, media: Picture | Video | Sound) -> Any:
        if not isinstance(media, Picture) or media.mode != "RGBA":
            return None
        return media.mode, media.size, np.frombuffer(media.pixels, np.uint8).reshape(-1, 4)[:, :3].tobytes()


@tracker_mutant("M13-separates")
class HashesWithoutTransparency(_Hashing):
    """Hashes a picture without the one colour that is transparent."""

    def hashed(self, media: Picture | Video | Sound) -> Any:
        return (media.mode, media.size, media.palette, media.pixels) if isinstance(media, Picture) else None


@tracker_mutant("M13-separates")
class HashesWithoutRate(_Hashing):
    """Hashes the samples of a sound, and not their rate."""

    def hashed(self, media: Picture | Video | Sound) -> Any:
        return (media.samples.tobytes(),) if isinstance(media, Sound) else None


@tracker_mutant("M13-separates")
class HashesWithoutFrameIndices(_Hashing):
    """Hashes the frames of a video, and not which they are."""

    def hashed(self, media: Picture | Video | Sound) -> Any:
        return (media.frames.shape, media.frames.tobytes(), media.fps) if isinstance(media, Video) else None


@tracker_mutant("M13-settings", "vllm#49975, sglang#25462")
class ForgetsTheSettings(ConversationTracker):
    """Names what a processor made after the content alone."""

    def artifact(self, modality: str, part: Any) -> str:
        return self.identity(modality, part)


@tracker_mutant("M13-spoiled", "arrays shared with the caller")
class ReadsLate(Remembering):
    """Keeps what the caller gave, and processes it when its outputs are asked for."""

    def start(self, messages: Sequence[Any]) -> Conversation:
        return self.note(super().start(messages), list(parts_of(messages)))

    def extend(self, state: Conversation, messages: Sequence[Any]) -> Conversation:
        return self.note(super().extend(state, messages), [*self.noted(state), *parts_of(messages)])

    def append_sampled(self, state: Conversation, ids: Any, logprobs: Any, finish: Any) -> Conversation:
        return self.note(super().append_sampled(state, ids, logprobs, finish), self.noted(state))

    def multi_modal_inputs(self, state: Conversation) -> dict[str, Any]:
        waiting = {item.modality: iter([p for p in self.noted(state) if p["type"] == item.modality]) for item in state.items}
        items = []
        for item in state.items:
            part = next(waiting[item.modality])
            items.append(replace(item, payload=self.renderer.process(source_of(item.modality, part))))
        return self.renderer.merged(items, state.input_ids)


class _AsStored(HFRenderer):
    def load(self, source: MediaSource) -> Any:
        if source.modality == "image" and isinstance(source.source, bytes):
            from PIL import Image

            stored = Image.open(io.BytesIO(source.source))
            source = replace(source, source=Image.frombytes(stored.mode, stored.size, stored.tobytes()))
        return super().load(source)


@tracker_mutant("M14-orientation", "sglang#33464")
class IgnoresTheOrientation(Rendered):
    """Takes a picture as it is stored, whatever its EXIF orientation says."""

    renderer_type = _AsStored


class _Swapping(HFRenderer):
    def load(self, source: MediaSource) -> Any:
        if source.modality == "image" and isinstance(source.source, np.ndarray):
            source = replace(source, source=source.source[..., ::-1].copy())
        return super().load(source)


@tracker_mutant("M14-forms", "arrays of OpenCV")
class TakesArraysForBGR(Rendered):
    """Takes an array's channels for blue, green, red."""

    renderer_type = _Swapping
