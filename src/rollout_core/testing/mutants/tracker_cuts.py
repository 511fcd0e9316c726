"""Bugs of trackers in truncation."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from rollout_core.multimodal import Conversation, Item
from rollout_core.testing.mutants.registry import tracker_mutant
from rollout_core.testing.mutants.tracker_base import Remembering, with_items
from rollout_core.testing.own_tracker import ConversationTracker


def _narrowed(state: Conversation, side: str) -> Conversation:
    """With items of no width: at their first token for a cut at the right, behind their last for one at the left."""

    def narrow(item: Item) -> Item:
        at = item.region.start if side == "right" else item.region.stop
        return replace(item, envelope=(at, at))

    return with_items(state, narrow)


@tracker_mutant("M11-items", "verl-tool#145, prime-rl#2013")
class CutsThroughItems(ConversationTracker):
    """Cuts at a number of tokens, wherever that is, and drops the item."""

    def truncate(self, state: Conversation, max_length: int, side: Any, policy: Any) -> Conversation:
        return super().truncate(_narrowed(state, "left" if side == "right" else "right"), max_length, side, policy)


@tracker_mutant("M11-items")
class KeepsItemsThatWereCut(ConversationTracker):
    """Cuts at a number of tokens, wherever that is, and keeps the item."""

    def truncate(self, state: Conversation, max_length: int, side: Any, policy: Any) -> Conversation:
        return super().truncate(_narrowed(state, side), max_length, side, policy)


@tracker_mutant("M11-openers", "transformers 4: get_rope_index raises IndexError for a sequence that ends in <|vision_start|>")
class LeavesOpeners(ConversationTracker):
    """Cuts away an item and leaves what the template wrote around it."""

    def truncate(self, state: Conversation, max_length: int, side: Any, policy: Any) -> Conversation:
        bare = with_items(state, lambda item: replace(item, envelope=(item.region.start, item.region.stop)))
        return super().truncate(bare, max_length, side, policy)


@tracker_mutant("M11-payload")
class KeepsThePayload(Remembering):
    """Keeps the outputs of items that were cut."""

    def truncate(self, state: Conversation, max_length: int, side: Any, policy: Any) -> Conversation:
        return self.note(super().truncate(state, max_length, side, policy), state)

    def multi_modal_inputs(self, state: Conversation) -> dict[str, Any]:
        now, before = super().multi_modal_inputs(state), self.noted(state)
        if before is None:
            return now
        per_token = {key: value for key, value in now.items() if key in self.renderer.family.sequence}
        return super().multi_modal_inputs(before) | per_token


@tracker_mutant("M11-arrays")
class KeepsThePositions(Remembering):
    """Keeps the positions of tokens whose beginning was cut."""

    def truncate(self, state: Conversation, max_length: int, side: Any, policy: Any) -> Conversation:
        cut = super().truncate(state, max_length, side, policy)
        return self.note(cut, state) if side == "left" and cut is not state else cut

    def position_ids(self, state: Conversation) -> np.ndarray[Any, Any]:
        before = self.noted(state)
        return super().position_ids(state) if before is None else super().position_ids(before)[:, -len(state) :]


@tracker_mutant("M11-error")
class NeverComplains(ConversationTracker):
    """Takes the policy error for drop_item."""

    def truncate(self, state: Conversation, max_length: int, side: Any, policy: Any) -> Conversation:
        return super().truncate(state, max_length, side, "drop_item" if policy == "error" else policy)


@tracker_mutant("M11-messages")
class CutsInsideMessages(ConversationTracker):
    """Takes the policy drop_message for drop_item."""

    def truncate(self, state: Conversation, max_length: int, side: Any, policy: Any) -> Conversation:
        return super().truncate(state, max_length, side, "drop_item" if policy == "drop_message" else policy)


@tracker_mutant("M1-machine")
class CutsWhatItWasGiven(Remembering):
    """Truncates the state that it was given, too."""

    def truncate(self, state: Conversation, max_length: int, side: Any, policy: Any) -> Conversation:
        cut = super().truncate(state, max_length, side, policy)
        self.note(state, cut)
        return cut

    def input_ids(self, state: Conversation) -> Any:
        cut = self.noted(state)
        return super().input_ids(state if cut is None else cut)
