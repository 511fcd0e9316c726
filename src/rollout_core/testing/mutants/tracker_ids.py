"""Bugs of trackers in ids: what is kept, what the template writes around it, and how messages come in."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any, ClassVar

import numpy as np

from rollout_core.errors import UnstableTemplateError
from rollout_core.multimodal import Conversation, HFRenderer
from rollout_core.multimodal.deltas import BOUNDARY
from rollout_core.multimodal.encoding import Encoder
from rollout_core.multimodal.layout import Laid
from rollout_core.multimodal.messages import Messages
from rollout_core.multimodal.renderer import Past, Tools
from rollout_core.multimodal.tracks import Encoded
from rollout_core.testing.mutants.registry import tracker_mutant
from rollout_core.testing.mutants.tracker_base import Remembering, Rendered, inserted
from rollout_core.testing.own_tracker import ConversationTracker, SegmentsTracker


@tracker_mutant("M1-prefix", "trainers that apply the template to the whole history at each turn")
class RendersAnew(Remembering):
    """Renders the whole history anew at each extend, with what the policy said as text."""

    def start(self, messages: Sequence[Any]) -> Conversation:
        return self.note(super().start(messages), list(messages))

    def extend(self, state: Conversation, messages: Sequence[Any]) -> Conversation:
        return self.start([*self.noted(state), *messages])

    def append_sampled(self, state: Conversation, ids: Any, logprobs: Any, finish: Any) -> Conversation:
        said = self.renderer.said(np.asarray(ids, np.int64))
        return self.note(super().append_sampled(state, ids, logprobs, finish), [*self.noted(state), said])


@tracker_mutant("M1-verbatim", "sglang#12383")
class EncodesSampledText(ConversationTracker):
    """Decodes what was sampled, and encodes the text again."""

    def append_sampled(self, state: Conversation, ids: Any, logprobs: Any, finish: Any) -> Conversation:
        tokenizer = self.renderer.tokenizer
        again = tokenizer(tokenizer.decode(list(ids)), add_special_tokens=False)["input_ids"]
        return super().append_sampled(state, again, logprobs if len(again) == len(ids) else None, finish)


class _ShortEnd(HFRenderer):
    @cached_property
    def verdict(self) -> Any:
        found = super().verdict
        return replace(found, closing=found.closing.rstrip("\n"))


@tracker_mutant("M2-separator", "verl#6501, #6921, #3720")
class DropsTheSeparator(Rendered):
    """Ends a turn with its last token, without the line break that the template writes and nobody samples."""

    renderer_type = _ShortEnd


class _EndsAlways(HFRenderer):
    def add(self, past: Past, messages: Messages, tools: Tools) -> Laid:
        return super().add(replace(past, tail=past.tail[:0]), messages, tools)


@tracker_mutant("M2-splice")
class DoublesTheStop(Rendered):
    """Writes the token that ends a turn again where the policy has sampled it."""

    renderer_type = _EndsAlways


class _EndsNever(HFRenderer):
    def add(self, past: Past, messages: Messages, tools: Tools) -> Laid:
        stopped = len(past.tail) and past.tail[-1] in self.encode(self.verdict.closing).ids[:1]
        return super().add(past if stopped else replace(past, sampled=False), messages, tools)


@tracker_mutant("M2-cut-turn")
class LeavesCutTurnsOpen(Rendered):
    """Adds messages to a turn that was cut by length as if it had ended."""

    renderer_type = _EndsNever


class _Apart(Encoder):
    def __call__(self, text: str, *, plain: bool = False, first: bool = False) -> Encoded:
        pieces = [text] if plain else [piece for piece in _HEADER.split(text) if piece] or [""]
        ids: list[Any] = []
        offsets: list[Any] = []
        at = 0
        for piece in pieces:
            part = super().__call__(piece, plain=plain, first=first and not at)
            ids, offsets, at = [*ids, part.ids], [*offsets, part.offsets + at], at + len(piece)
        return Encoded(np.concatenate(ids), np.concatenate(offsets))


_HEADER = re.compile(r"(<\|[^|]*\|>[a-z]*\n)")


@tracker_mutant("M2-template", "merges of BPE across a join")
class EncodesHeadersApart(ConversationTracker):
    """Encodes the header of a message and its content apart."""

    def __init__(self, processor: Any) -> None:
        super().__init__(processor)
        self.renderer.encode = _Apart(self.renderer.tokenizer, alone=False)


class _WithFront(HFRenderer):
    def add(self, past: Past, messages: Messages, tools: Tools) -> Laid:
        laid = super().add(past, messages, tools)
        user = {"role": "user", "content": "x"}
        one, two = (self.processor.apply_chat_template(given, tokenize=False) for given in ([user], [user, user]))
        front = one[: len(one) - (len(two) - len(one))]
        return inserted(laid, int((laid.origin == BOUNDARY).sum()), self.encode(front).ids)


@tracker_mutant("M2-history", "rendering new messages alone with Qwen2.5's template")
class RepeatsTheSystemPrompt(Rendered):
    """Renders new messages alone, with the system prompt that the template writes where none is given."""

    renderer_type = _WithFront


@tracker_mutant("M2-prompt")
class PromptsInChatML(ConversationTracker):
    """Opens the assistant's turn with ChatML's header, whatever the template."""

    def prompt_ids(self, state: Conversation) -> Any:
        return np.concatenate([state.input_ids, self.renderer.encode("<|im_start|>assistant\n").ids])


class _Everything(frozenset[Any]):
    def __contains__(self, join: object) -> bool:
        return True


class _Trusting(HFRenderer):
    @cached_property
    def verdict(self) -> Any:
        return replace(super().verdict, stable=_Everything())

    def add(self, past: Any, messages: Any, tools: Any) -> Any:
        return super().add(replace(past, recent=lambda: [{"role": past.role, "content": "x"}]), messages, tools)


@tracker_mutant("M3-changed", "Qwen3's template in a trainer that does not look")
class TrustsTheTemplate(Rendered):
    """Goes on where the template strips the thinking of earlier turns."""

    renderer_type = _Trusting


@tracker_mutant("M2-splice", "verl#3960")
class ClearsToolCalls(ConversationTracker):
    """Keeps role and content of a message, and nothing else."""

    def start(self, messages: Sequence[Any]) -> Conversation:
        return super().start([{key: message[key] for key in ("role", "content")} for message in messages])


@tracker_mutant("M2-history")
class NumbersFromOneAgain(Rendered):
    """Renders new messages after a stand-in for the history, in which no picture was numbered."""

    renderer_type = _Trusting


@tracker_mutant("M3-changed", sound="rollout_core-segments")
class BeginsWithoutHistory(SegmentsTracker):
    """Begins a new segment with the new messages alone."""

    on_unstable: ClassVar[Any] = "refuse"

    def extend(self, state: Conversation, messages: Sequence[Any]) -> Conversation:
        try:
            return super().extend(state, messages)
        except UnstableTemplateError:
            return self.start(messages)


@tracker_mutant("M3-names")
class NamesNoMessage(ConversationTracker):
    """Refuses a template that changes the past without saying where."""

    def extend(self, state: Conversation, messages: Sequence[Any]) -> Conversation:
        try:
            return super().extend(state, messages)
        except UnstableTemplateError:
            raise UnstableTemplateError("the chat template is not stable") from None


@tracker_mutant("M17-together")
class JoinsMessages(ConversationTracker):
    """Makes one message of messages of one role that are added together."""

    def extend(self, state: Conversation, messages: Sequence[Any]) -> Conversation:
        joined: list[Any] = []
        for message in messages:
            content = message["content"]
            parts = content if isinstance(content, list) else [{"type": "text", "text": content}]
            if joined and joined[-1]["role"] == message["role"]:
                joined[-1]["content"] += parts
            else:
                joined.append({**message, "content": [*parts]})
        return super().extend(state, joined)


class _Reopening(HFRenderer):
    def add(self, past: Past, messages: Messages, tools: Tools) -> Laid:
        if past.role == messages.items[0]["role"] == "tool":
            past = replace(past, role="user", messages=lambda: [{"role": "user", "content": "x"}])
        return super().add(past, messages, tools)


@tracker_mutant("M17-tools", "adding tool messages as they come with Qwen's template")
class ReopensTheToolHeader(Rendered):
    """Puts each tool message under a header of its own where the template has one for all."""

    renderer_type = _Reopening
