"""Bugs of trackers in states: what a refusal leaves behind, what forks share, what is stored, and what a turn costs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from rollout_core.errors import ConversationError
from rollout_core.multimodal import Conversation, HFRenderer
from rollout_core.multimodal.deltas import Delta
from rollout_core.multimodal.messages import MediaSource
from rollout_core.testing.mutants.registry import tracker_mutant
from rollout_core.testing.mutants.tracker_base import InPlace, Remembering, changed, parts_of, processed_again
from rollout_core.testing.own_tracker import ConversationTracker
from rollout_core.testing.trackers import ItemRow


@tracker_mutant("M10-picture", "verl#4050")
class StoresPicturesFirst(InPlace):
    """Stores the pictures of messages before it knows whether it can add them."""

    def extend(self, state: Any, messages: Sequence[Any]) -> Any:
        for part in parts_of(messages):
            media = self.renderer.load(MediaSource(part["type"], part.get(part["type"]), {}, 0, 0))
            state.rows.append((part["type"], [], media.identity))
        super().extend(state, messages)
        state.rows.clear()

    def items(self, state: Any) -> list[ItemRow]:
        return [*super().items(state), *state.rows]


@tracker_mutant("M10-message")
class KeepsTheFirstMessages(InPlace):
    """Adds messages one by one, and keeps those before one that it refuses."""

    def extend(self, state: Any, messages: Sequence[Any]) -> Any:
        for message in list(messages) or [{}]:
            super().extend(state, [message])


@tracker_mutant("M10-template")
class DropsPicturesOfTools(ConversationTracker):
    """Leaves out media that the template refuses."""

    def extend(self, state: Conversation, messages: Sequence[Any]) -> Conversation:
        try:
            return super().extend(state, messages)
        except ConversationError:
            kept = [[p for p in m["content"] if p["type"] == "text"] for m in messages if isinstance(m["content"], list)]
            return super().extend(state, [{**m, "content": parts} for m, parts in zip(messages, kept, strict=True)])


@tracker_mutant("M10-sampled")
class TakesAnyId(ConversationTracker):
    """Takes sampled ids beyond the vocabulary."""

    def __init__(self, processor: Any) -> None:
        self.renderer = HFRenderer(processor, vocab_size=1 << 31)


@tracker_mutant("M10-sampled")
class PromptsBeforeItLooks(InPlace):
    """Writes the generation prompt before it knows whether it can add what was sampled."""

    def append_sampled(self, state: Any, ids: Any, logprobs: Any, finish: Any) -> Any:
        state.now = state.now.with_generation_prompt()
        super().append_sampled(state, ids, logprobs, finish)


@tracker_mutant("M15-isolated")
class SharesAList(Remembering):
    """Appends the items of a state to the list of the state that it grew from."""

    def start(self, messages: Sequence[Any]) -> Conversation:
        state = super().start(messages)
        return self.note(state, super().items(state))

    def extend(self, state: Conversation, messages: Sequence[Any]) -> Conversation:
        grown, rows = super().extend(state, messages), self.noted(state)
        rows += super().items(grown)[len(state.items) :]
        return self.note(grown, rows)

    def append_sampled(self, state: Conversation, ids: Any, logprobs: Any, finish: Any) -> Conversation:
        return self.note(super().append_sampled(state, ids, logprobs, finish), self.noted(state))

    def items(self, state: Conversation) -> list[ItemRow]:
        return list(self.noted(state))


@tracker_mutant("M15-rolled-back")
class GrowsTheLastState(ConversationTracker):
    """Grows what it made last, whatever state it is given."""

    def start(self, messages: Sequence[Any]) -> Conversation:
        self.last = super().start(messages)
        return self.last

    def extend(self, state: Conversation, messages: Sequence[Any]) -> Conversation:
        self.last = super().extend(self.last, messages)
        return self.last

    def append_sampled(self, state: Conversation, ids: Any, logprobs: Any, finish: Any) -> Conversation:
        self.last = super().append_sampled(self.last, ids, logprobs, finish)
        return self.last


@tracker_mutant("M15-shared")
class ProcessesForEachFork(Remembering):
    """Processes all items again for every fork but the first."""

    def extend(self, state: Conversation, messages: Sequence[Any]) -> Conversation:
        if self.noted(state):
            processed_again(self, state)
        self.note(state, True)
        return super().extend(state, messages)


@tracker_mutant("M15-serialise")
class StoresNoLogprobs(ConversationTracker):
    """Stores a conversation without its logprobs."""

    def to_bytes(self, state: Conversation) -> bytes:
        def bare(delta: Delta) -> Delta:
            return replace(delta, tokens=replace(delta.tokens, logprobs=np.full(len(delta.tokens), np.nan)))

        return super().to_bytes(changed(state, bare))


@tracker_mutant("M15-serialise")
class StoresItemsByIdentity(ConversationTracker):
    """Stores an item once that is shown twice."""

    def to_bytes(self, state: Conversation) -> bytes:
        seen: set[str] = set()

        def once(delta: Delta) -> Delta:
            kept = {item.identity: item for item in reversed(delta.items) if item.identity not in seen}
            seen.update(kept)
            return replace(delta, items=tuple(reversed(kept.values())))

        return super().to_bytes(changed(state, once))


@tracker_mutant("M15-serialise")
class ForgetsThatATurnIsOpen(ConversationTracker):
    """Stores a turn that was cut as one that has ended."""

    def to_bytes(self, state: Conversation) -> bytes:
        return super().to_bytes(changed(state, lambda delta: replace(delta, turn="none")))


@tracker_mutant("M16-work", "verl's Continuous Token: about 141 pictures for eleven")
class ProcessesWhenItIsRead(ConversationTracker):
    """Processes all items again whenever their outputs are asked for."""

    def multi_modal_inputs(self, state: Conversation) -> dict[str, Any]:
        processed_again(self, state)
        return super().multi_modal_inputs(state)


@tracker_mutant("M16-ten-turns", "verl's AsyncRolloutRequest: 69 pictures for eleven")
class ProcessesEachTurn(ConversationTracker):
    """Processes all items again at each turn."""

    def extend(self, state: Conversation, messages: Sequence[Any]) -> Conversation:
        processed_again(self, state)
        return super().extend(state, messages)


@tracker_mutant("M16-proportional", "trainers that apply the template to the whole history at each turn")
class EncodesTheHistory(ConversationTracker):
    """Encodes the whole history at each turn."""

    def extend(self, state: Conversation, messages: Sequence[Any]) -> Conversation:
        tokenizer = self.renderer.tokenizer
        tokenizer(tokenizer.decode(state.compact_ids.tolist()), add_special_tokens=False)
        return super().extend(state, messages)
