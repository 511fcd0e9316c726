"""Bugs of trackers in items: which there are, where they stand, in which order, and on which track."""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import numpy as np

from rollout_core.multimodal import Conversation, HFRenderer, Item
from rollout_core.testing.mutants.registry import tracker_mutant
from rollout_core.testing.mutants.tracker_base import Rendered
from rollout_core.testing.own_tracker import ConversationTracker
from rollout_core.testing.trackers import ItemRow


@tracker_mutant("M4-rows", "verifiers#1346")
class ForgetsEarlierItems(ConversationTracker):
    """Has the items of the last turn only."""

    def items(self, state: Conversation) -> list[ItemRow]:
        found = [delta.items for delta in state.tip.path() if delta.items]
        return super().items(state)[-len(found[-1]) :] if found else []


@tracker_mutant("M4-spans", "run lengths under Idefics' rows and Qwen3-VL's videos")
class TakesItemsForOneRun(ConversationTracker):
    """Takes an item's first and last feature token for the ends of one run."""

    def items(self, state: Conversation) -> list[ItemRow]:
        return [(modality, [(spans[0][0], spans[-1][1])], identity) for modality, spans, identity in super().items(state)]


class _Unguarded(HFRenderer):
    @cached_property
    def _literals(self) -> re.Pattern[str]:
        return re.compile("(?!)")


@tracker_mutant("M5-literal-placeholder")
class TakesTextForPlaceholders(Rendered):
    """Takes a placeholder that a user wrote for one of the template."""

    renderer_type = _Unguarded


@tracker_mutant("M5-sampled-placeholder", "verl#7038, and all who look for pad ids")
class ScansForFeatureTokens(ConversationTracker):
    """Looks for feature tokens among the ids, and gives the first to the first item."""

    def items(self, state: Conversation) -> list[ItemRow]:
        features = [token for ids in self.renderer._feature_ids.values() for token in ids]
        found = np.flatnonzero(np.isin(state.input_ids, features)).tolist()
        scanned: list[ItemRow] = []
        for modality, spans, identity in super().items(state):
            moved = []
            for start, stop in spans:
                moved.append((found[0], found[0] + stop - start))
                found = found[stop - start :]
            scanned.append((modality, moved, identity))
        return scanned


def _placeholders(renderer: HFRenderer) -> list[int]:
    """The ids of placeholders."""
    return [int(renderer.tokenizer.convert_tokens_to_ids(text)) for text in renderer._placeholders.values()]


def _region(state: Conversation, item: Item) -> list[int]:
    """The expanded ids of an item."""
    found: list[int] = state.input_ids[item.region.start : item.region.stop].tolist()
    return found


@tracker_mutant("M6-compact", "transformers 5.23 groups mm_token_type_ids so: adjacent pictures are one")
class CollapsesRuns(ConversationTracker):
    """Takes adjacent placeholders for one."""

    def compact_ids(self, state: Conversation) -> Any:
        ids, known = state.compact_ids.tolist(), _placeholders(self.renderer)
        return ids[:1] + [now for before, now in itertools.pairwise(ids) if now != before or now not in known]


@tracker_mutant("M6-round-trip", "verl#7038")
class ExpandsWhatItFinds(ConversationTracker):
    """Expands every placeholder token, sampled ones too."""

    def expand(self, state: Conversation, ids: Sequence[int]) -> Any:
        inside = {at for item in state.items for at in range(item.region.start, item.region.stop)}
        known = _placeholders(self.renderer)
        parts: list[int] = []
        for at, token in enumerate(super().expand(state, ids).tolist()):
            parts += _region(state, state.items[0]) if at not in inside and token in known and state.items else [token]
        return parts


@tracker_mutant("M6-twice", "prime-rl#1739, trl#6294, OpenRLHF#1220, vllm#57796, NeMo-RL#2360")
class ExpandsAgain(ConversationTracker):
    """Expands ids that are expanded already."""

    def expand(self, state: Conversation, ids: Sequence[int]) -> Any:
        if len(ids) == len(state.compact_ids):
            return super().expand(state, ids)
        known, waiting = _placeholders(self.renderer), iter([_region(state, item) for item in state.items])
        parts: list[int] = []
        for token in ids:
            parts += next(waiting, [token]) if token in known else [token]
        return parts


@tracker_mutant("M9-order", "lists of items by modality")
class OrdersByModality(ConversationTracker):
    """Has the pictures first, then the videos."""

    def items(self, state: Conversation) -> list[ItemRow]:
        return sorted(super().items(state), key=lambda row: row[0])


@tracker_mutant("M9-repeated")
class MergesTheSamePicture(ConversationTracker):
    """Has an item once that is shown twice."""

    def items(self, state: Conversation) -> list[ItemRow]:
        return list({row[2]: row for row in reversed(super().items(state))}.values())[::-1]


@tracker_mutant("M9-repeated", "dynamo#8340, vllm#55547")
class HasOneIdentity(ConversationTracker):
    """Has the identity of the last item for all of a modality."""

    def items(self, state: Conversation) -> list[ItemRow]:
        rows = super().items(state)
        last = {modality: identity for modality, _, identity in rows}
        return [(modality, spans, last[modality]) for modality, spans, _ in rows]


@tracker_mutant("M9-delta", "prime-rl#2751")
class SendsAllItems(ConversationTracker):
    """Sends all items with the new ids."""

    def delta(self, state: Conversation, since: Conversation) -> tuple[Any, Any, list[ItemRow]]:
        ids, compact, _ = super().delta(state, since)
        return ids, compact, self.items(state)
