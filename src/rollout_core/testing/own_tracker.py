"""This project's own tracker, as a tracker under test."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np

from rollout_core.multimodal import Conversation, HFRenderer
from rollout_core.multimodal.deltas import Item
from rollout_core.multimodal.messages import MediaSource
from rollout_core.testing.trackers import ItemRow


class ConversationTracker:
    """``Conversation`` over an ``HFRenderer``; refuses unstable templates."""

    capabilities: ClassVar[set[str]] = {"forks", "loads", "refuses", "groups tools"}
    on_unstable: ClassVar[Any] = "refuse"

    def __init__(self, processor: Any) -> None:
        self.renderer = HFRenderer(processor)

    def start(self, messages: Sequence[Any]) -> Conversation:
        return Conversation.start(self.renderer, messages, on_unstable=self.on_unstable)

    def extend(self, state: Conversation, messages: Sequence[Any]) -> Conversation:
        return state.extend(messages)

    def append_sampled(self, state: Conversation, ids: Any, logprobs: Any, finish: Any) -> Conversation:
        return state.append_sampled(ids, logprobs=logprobs, finish=finish)

    def input_ids(self, state: Conversation) -> Any:
        return state.input_ids

    def prompt_ids(self, state: Conversation) -> Any:
        return state.with_generation_prompt().input_ids

    def compact_ids(self, state: Conversation) -> Any:
        return state.compact_ids

    def expand(self, state: Conversation, ids: Sequence[int]) -> Any:
        return state.span_map.expand(ids)

    def compact(self, state: Conversation, ids: Sequence[int]) -> Any:
        return state.span_map.compact_ids(ids)

    def loss_mask(self, state: Conversation) -> Any:
        return state.loss_mask

    def logprobs(self, state: Conversation) -> list[float | None]:
        return state.logprobs

    def position_ids(self, state: Conversation) -> np.ndarray[Any, Any]:
        return state.position_ids

    def items(self, state: Conversation) -> list[ItemRow]:
        return [_row(item) for item in state.items]

    def multi_modal_inputs(self, state: Conversation) -> dict[str, Any]:
        return state.multi_modal_inputs()

    def truncate(self, state: Conversation, max_length: int, side: Any, policy: Any) -> Conversation:
        return state.truncate(max_length, side, policy)

    def to_bytes(self, state: Conversation) -> bytes:
        return state.to_bytes()

    def from_bytes(self, data: bytes) -> Conversation:
        return Conversation.from_bytes(self.renderer, data)

    def delta(self, state: Conversation, since: Conversation) -> tuple[Any, Any, list[ItemRow]]:
        new = state.delta(since)
        return new.input_ids, new.compact_ids, [_row(item) for item in new.items]

    def identity(self, modality: str, part: Any) -> str:
        return self.renderer.load(source_of(modality, part)).identity

    def artifact(self, modality: str, part: Any) -> str:
        return self.renderer.process(source_of(modality, part)).artifact


class SegmentsTracker(ConversationTracker):
    """The same, which begins a new segment where the template changes what it wrote before."""

    capabilities: ClassVar[set[str]] = {"forks", "loads", "segments", "groups tools"}
    on_unstable: ClassVar[Any] = "segment"


def _row(item: Item) -> ItemRow:
    return item.modality, list(item.spans), item.identity


def source_of(modality: str, part: Any) -> MediaSource:
    """The medium of a part of a message."""
    options = {key: value for key, value in part.items() if key in ("metadata", "sampling_rate")}
    return MediaSource(modality, part[modality], options, 0, 0)
