"""Bugs of trackers in merged outputs, positions, loss mask and logprobs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from typing import Any

import numpy as np

from rollout_core.multimodal import Conversation, Family, HFRenderer, PositionRule
from rollout_core.multimodal.deltas import BOUNDARY, SAMPLED
from rollout_core.multimodal.families.family import Support
from rollout_core.multimodal.merge import Cat, OutputRule, PadCat
from rollout_core.testing.mutants.registry import tracker_mutant
from rollout_core.testing.mutants.tracker_base import Joined
from rollout_core.testing.own_tracker import ConversationTracker


@tracker_mutant("M7-joins", "concatenation of Idefics3's and SmolVLM's outputs")
class JoinsAlongDimensionZero(Joined):
    """Concatenates all outputs along dimension 0."""

    def family(self, known: Family) -> Family:
        return replace(known, outputs={key: replace(rule, dim=0) for key, rule in known.outputs.items()})


@tracker_mutant("M7-joins", "concatenation of LLaVA-NeXT's and Pixtral's outputs")
class PadsNothing(Joined):
    """Concatenates outputs that have to be padded."""

    def family(self, known: Family) -> Family:
        return replace(known, outputs={key: Cat(rule.dim) for key, rule in known.outputs.items()})


@tracker_mutant("M8-after-item")
class ForgetsFrameRates(ConversationTracker):
    """Gives frames to the processor without what is known of their video."""

    def start(self, messages: Sequence[Any]) -> Conversation:
        return super().start(_without_metadata(messages))

    def extend(self, state: Conversation, messages: Sequence[Any]) -> Conversation:
        return super().extend(state, _without_metadata(messages))


def _without_metadata(messages: Sequence[Any]) -> list[Any]:
    """The messages with bare frames."""
    bare = []
    for message in messages:
        content = message["content"]
        if isinstance(content, list):
            content = [{key: value for key, value in part.items() if key != "metadata"} for part in content]
        bare.append({**message, "content": content})
    return bare


@tracker_mutant("M7-whole")
class PadsWithOnes(Joined):
    """Pads with a value that the processor does not pad with."""

    def family(self, known: Family) -> Family:
        rules = {key: replace(rule, value=1.0) if isinstance(rule, PadCat) else rule for key, rule in known.outputs.items()}
        return replace(known, outputs=rules)


@tracker_mutant("M7-coupled", "transformers#34585: LLaVA-OneVision")
class MergesWhatDependsOnOthers(Joined):
    """Puts single items together where a picture becomes something else beside another."""

    def family(self, known: Family) -> Family:
        if known.refuse is None:
            return known
        support = Support(lambda processor: str(processor.image_token), lambda processor: str(processor.image_token))
        return replace(known, modalities={"image": support}, outputs={"pixel_values": Cat()}, refuse=None)


@tracker_mutant("M7-payload", "slime#1847, #1803: later pictures never reach the model")
class KeepsTheFirstPayload(ConversationTracker):
    """Has the outputs of the first turn that shows something."""

    def multi_modal_inputs(self, state: Conversation) -> dict[str, Any]:
        first = next((delta.items for delta in state.tip.path() if delta.items), ())
        per_token = {key: value for key, value in super().multi_modal_inputs(state).items() if key in self.renderer.family.sequence}
        return self.renderer.merged(first, state.input_ids) | per_token


class _Guessed(dict[str, OutputRule]):
    """A rule for every key."""

    texts = frozenset({"input_ids", "attention_mask", "text_replacement_offsets", "mm_token_type_ids", "token_type_ids"})

    def __contains__(self, key: object) -> bool:
        return key not in self.texts

    def __missing__(self, key: str) -> OutputRule:
        return Cat()


@tracker_mutant("M7-unknown-key", "concatenation of whatever the processor gives")
class JoinsUnknownOutputs(Joined):
    """Joins an output that it has no rule for along dimension 0."""

    def family(self, known: Family) -> Family:
        return replace(known, outputs=_Guessed(known.outputs))


@tracker_mutant("M7-unknown-key", "lists of keys")
class DropsUnknownOutputs(JoinsUnknownOutputs):
    """Drops an output that it has no rule for."""

    def multi_modal_inputs(self, state: Conversation) -> dict[str, Any]:
        known: Mapping[str, Any] = {**self.renderer.family.outputs, **self.renderer.family.sequence}
        return {key: value for key, value in super().multi_modal_inputs(state).items() if key in known}


class _Short(PositionRule):
    def _place(self, part: Any, position: int, grid: Any) -> int:
        return super()._place(part, position, grid) - 1


@tracker_mutant("M8-recompute")
class GoesOnOneShort(ConversationTracker):
    """Gives the text after an item the last position of the item."""

    def __init__(self, processor: Any) -> None:
        super().__init__(processor)
        rule = self.renderer.rule
        short = _Short(**{field.name: getattr(rule, field.name) for field in fields(rule)})
        self.renderer = HFRenderer(processor, positions=short)


@tracker_mutant("M8-recompute", "verl and SGLang beside transformers 5.23")
class GoesOnAfterTheLargest(ConversationTracker):
    """Goes on after a video at its largest position, as transformers 4 does, where the processor is of 5."""

    def __init__(self, processor: Any) -> None:
        super().__init__(processor)
        rule = self.renderer.rule
        self.renderer = HFRenderer(processor, positions=replace(rule, resume="largest"))


@tracker_mutant("M8-recompute")
class FreezesTextInsideItems(ConversationTracker):
    """Gives all text that the processor writes inside an item the item's first position."""

    def position_ids(self, state: Conversation) -> np.ndarray[Any, Any]:
        found = super().position_ids(state).copy()
        for item in state.items:
            inside = {token for start, stop in item.spans for token in range(start, stop)}
            for token in range(item.region.start, item.region.stop):
                if token not in inside:
                    found[:, token] = found[:, item.region.start]
        return found


@tracker_mutant("M8-after-item", "verl, xtuner#2097")
class CountsPerAxis(ConversationTracker):
    """Moves a delta's positions by the last position before it, axis by axis."""

    def position_ids(self, state: Conversation) -> np.ndarray[Any, Any]:
        found: list[Any] = []
        for delta in state.tip.path():
            if not len(delta.tokens):
                continue
            new, _ = self.renderer.rule.advance(0, delta.segments)
            found.append(new + found[-1][:, -1:] + 1 if found else new)
        return np.concatenate(found, axis=1)


@tracker_mutant("M8-text")
class BeginsAtZeroAgain(ConversationTracker):
    """Counts the positions of every delta from 0."""

    def position_ids(self, state: Conversation) -> np.ndarray[Any, Any]:
        return np.concatenate([self.renderer.rule.advance(0, delta.segments)[0] for delta in state.tip.path()], axis=1)


@tracker_mutant("M12-lengths")
class MasksTheCompactTrack(ConversationTracker):
    """Makes the loss mask of the ids with one placeholder per item."""

    def loss_mask(self, state: Conversation) -> Any:
        return [int(delta.kind == "sampled") for delta in state.tip.path() for _ in delta.tokens.compact_ids]


@tracker_mutant("M12-mask")
class TrainsOnClosings(ConversationTracker):
    """Counts what ends a turn, and was not sampled, as sampled."""

    def loss_mask(self, state: Conversation) -> Any:
        return np.isin(state.origin, (SAMPLED, BOUNDARY)).astype(np.int64)


@tracker_mutant("M12-mask")
class TrainsOnPrompts(ConversationTracker):
    """Counts the generation prompt as sampled."""

    def loss_mask(self, state: Conversation) -> Any:
        kinds = ("generation_prompt", "sampled")
        return [int(delta.kind in kinds) for delta in state.tip.path() for _ in delta.tokens.input_ids]


@tracker_mutant("M12-logprobs")
class HasZeroForNone(ConversationTracker):
    """Has 0.0 where there is no logprob."""

    def logprobs(self, state: Conversation) -> list[float | None]:
        return [value or 0.0 for value in super().logprobs(state)]


@tracker_mutant("M12-logprobs", "strands-sglang#33")
class PlacesLogprobsBeforeExpansion(ConversationTracker):
    """Puts logprobs where their tokens stand before placeholders are expanded."""

    def logprobs(self, state: Conversation) -> list[float | None]:
        given = super().logprobs(state)
        placed: list[float | None] = [None] * len(given)
        for delta in state.tip.path():
            if delta.kind == "sampled":
                start, compact = delta.length - len(delta.tokens), delta.compact_length - len(delta.tokens)
                placed[compact : compact + len(delta.tokens)] = given[start : delta.length]
        return placed
