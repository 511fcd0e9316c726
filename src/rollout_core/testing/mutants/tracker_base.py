"""What mutants of trackers are made of: the project's own tracker with another renderer, another family, or a memory of its own."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any, ClassVar

import numpy as np

from rollout_core.multimodal import Conversation, Family, HFRenderer, Item, family_of
from rollout_core.multimodal.deltas import TEMPLATE, Delta
from rollout_core.multimodal.layout import Laid
from rollout_core.multimodal.processing import process_one
from rollout_core.multimodal.tracks import Ids
from rollout_core.testing.own_tracker import ConversationTracker
from rollout_core.testing.trackers import ItemRow
from rollout_core.testing.worlds import make_world, world_names


class Rendered(ConversationTracker):
    """With a renderer of a class of its own."""

    renderer_type: ClassVar[type[HFRenderer]] = HFRenderer

    def __init__(self, processor: Any) -> None:
        self.renderer = self.renderer_type(processor)


class Joined(ConversationTracker):
    """With another family for the processor."""

    def __init__(self, processor: Any) -> None:
        self.renderer = HFRenderer(processor, family=self.family(family_of(processor)))

    def family(self, known: Family) -> Family:
        return known


class Remembering(ConversationTracker):
    """Keeps something of its own for each state."""

    def __init__(self, processor: Any) -> None:
        super().__init__(processor)
        self._kept: dict[int, tuple[Conversation, Any]] = {}

    def note(self, state: Conversation, what: Any) -> Conversation:
        self._kept[id(state)] = (state, what)  # the state is kept too, so that no other one gets its address
        return state

    def noted(self, state: Conversation) -> Any:
        """What was kept, or None."""
        return self._kept.get(id(state), (None, None))[1]


class Box:
    """A state that is changed in place. ``rows``: items that were stored aside."""

    def __init__(self, now: Conversation) -> None:
        self.now = now
        self.rows: list[ItemRow] = []


class InPlace(ConversationTracker):
    """Changes its states in place, and gives None."""

    capabilities: ClassVar[set[str]] = {"loads", "refuses", "groups tools"}

    def start(self, messages: Sequence[Any]) -> Any:
        return Box(super().start(messages))

    def extend(self, state: Any, messages: Sequence[Any]) -> Any:
        state.now = super().extend(state.now, messages)

    def append_sampled(self, state: Any, ids: Any, logprobs: Any, finish: Any) -> Any:
        state.now = super().append_sampled(state.now, ids, logprobs, finish)

    def truncate(self, state: Any, max_length: int, side: Any, policy: Any) -> Any:
        state.now = super().truncate(state.now, max_length, side, policy)

    def from_bytes(self, data: bytes) -> Any:
        return Box(super().from_bytes(data))

    def delta(self, state: Any, since: Any) -> Any:
        return super().delta(state.now, since.now)


def _unboxed(name: str) -> Callable[..., Any]:
    method = getattr(ConversationTracker, name)

    def read(self: InPlace, state: Box, *arguments: Any) -> Any:
        return method(self, state.now, *arguments)

    return read


for _name in (
    *("input_ids", "prompt_ids", "compact_ids", "expand", "compact", "loss_mask", "logprobs", "position_ids", "items"),
    *("multi_modal_inputs", "to_bytes"),
):
    setattr(InPlace, _name, _unboxed(_name))


def changed(state: Conversation, change: Callable[[Delta], Delta]) -> Conversation:
    """The conversation with every delta changed."""
    tip: Delta | None = None
    for delta in state.tip.path():
        tip = replace(change(delta), parent=tip)
    assert tip is not None
    return replace(state, tip=tip)


def with_items(state: Conversation, change: Callable[[Item], Item]) -> Conversation:
    """The conversation with every item changed."""
    return changed(state, lambda delta: replace(delta, items=tuple(map(change, delta.items))))


def inserted(laid: Laid, at: int, ids: Ids) -> Laid:
    """With more template tokens before any item."""
    count = len(ids)
    return replace(
        laid,
        input_ids=np.insert(laid.input_ids, at, ids),
        compact_ids=np.insert(laid.compact_ids, at, ids),
        origin=np.insert(laid.origin, at, np.full(count, TEMPLATE, np.uint8)),
        message=np.insert(laid.message, at, np.full(count, laid.message[-1])),
        items=tuple(item.moved(count, count, item.index, item.modality_index) for item in laid.items),
    )


def processed_again(tracker: ConversationTracker, state: Conversation) -> None:
    """Run the processor over every item."""
    for item in state.items:
        media: Any = item.payload.media
        process_one(tracker.renderer.processor, tracker.renderer.family, item.modality, media)


def probe_templates() -> None:
    """Probe the templates of all fakes now, so that processes forked later need not: it is most of what a check takes."""
    for world in world_names("sums"):
        _ = HFRenderer(make_world(world).processor).verdict


def parts_of(messages: Sequence[Any]) -> Iterator[Any]:
    """The parts of messages that hold media, as they are."""
    for message in messages:
        content = message["content"]
        yield from (part for part in content if part["type"] != "text") if isinstance(content, list) else ()
