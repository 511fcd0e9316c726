"""Bugs of trackers in items: which there are, where they stand, in which order, and on which track."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import numpy as np

from rollout_core.multimodal import Conversation, HFRenderer
from rollout_core.multimodal.tracks import Ids, runs
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


@tracker_mutant("M4-spans", "run lengths counted by verl, slime: wrong for Idefics and for Qwen3-VL's videos")
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
    """Looks for feature tokens among the ids, and gives each run to the next item."""

    def items(self, state: Conversation) -> list[ItemRow]:
        rows = super().items(state)
        found = runs(state.input_ids, [token for ids in self.renderer._feature_ids.values() for token in ids], 0)
        at = 0
        scanned: list[ItemRow] = []
        for modality, spans, identity in rows:
            scanned.append((modality, list(found[at : at + len(spans)]), identity))
            at += len(spans)
        return scanned


@tracker_mutant("M6-compact", "adjacent pictures without a separator (transformers 5.23 groups mm_token_type_ids so)")
class CollapsesRuns(ConversationTracker):
    """Makes one placeholder of each run of feature tokens."""

    def compact_ids(self, state: Conversation) -> Any:
        features = [token for ids in self.renderer._feature_ids.values() for token in ids]
        ids = state.input_ids
        again = np.concatenate([[False], (ids[1:] == ids[:-1]) & np.isin(ids[1:], features)])
        return ids[~again]


def _expanded(state: Conversation, ids: Sequence[int]) -> Ids:
    """Each placeholder replaced by the next item's tokens, wherever it comes from."""
    inside = {int(token) for item in state.items for token in _compact(state, item)}
    waiting = iter([state.input_ids[item.region.start : item.region.stop] for item in state.items])
    parts: list[Any] = []
    for token in ids:
        parts.append(next(waiting, [token]) if int(token) in inside else [token])
    return np.concatenate([np.zeros(0, np.int64), *parts])


def _compact(state: Conversation, item: Any) -> Ids:
    return state.compact_ids[item.region.compact_start : item.region.compact_stop]


@tracker_mutant("M6-round-trip", "verl#7038: a sampled placeholder is expanded")
class ExpandsWhatItFinds(ConversationTracker):
    """Expands every placeholder token, sampled ones too."""

    def expand(self, state: Conversation, ids: Sequence[int]) -> Any:
        return _expanded(state, ids)


@tracker_mutant("M6-twice", "prime-rl#1739, trl#6294, OpenRLHF#1220, vllm#57796, NeMo-RL#2360")
class ExpandsAgain(ConversationTracker):
    """Expands ids that are expanded already."""

    def expand(self, state: Conversation, ids: Sequence[int]) -> Any:
        if len(ids) == len(state.compact_ids):
            return super().expand(state, ids)
        return _expanded(state, ids)


@tracker_mutant("M9-order", "processors that keep a list for each modality")
class OrdersByModality(ConversationTracker):
    """Has the pictures first, then the videos."""

    def items(self, state: Conversation) -> list[ItemRow]:
        return sorted(super().items(state), key=lambda row: row[0])


@tracker_mutant("M9-repeated")
class MergesTheSamePicture(ConversationTracker):
    """Has an item once that is shown twice."""

    def items(self, state: Conversation) -> list[ItemRow]:
        return list({row[2]: row for row in reversed(super().items(state))}.values())[::-1]


@tracker_mutant("M9-repeated", "dynamo#8340, vllm#55547: a cache key that is not bound to the content")
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
