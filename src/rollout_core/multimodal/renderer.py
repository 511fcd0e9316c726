"""What a conversation needs of a renderer, and the values that pass between them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from rollout_core.multimodal.deltas import Item, Payload
from rollout_core.multimodal.layout import Laid
from rollout_core.multimodal.messages import Messages
from rollout_core.multimodal.positions import PositionRule
from rollout_core.multimodal.tracks import Ids

#: Sampled ids at the end of a turn among which the tokens that end it are looked for.
TAIL = 16

Tools = Sequence[Mapping[str, Any]] | None


@dataclass(frozen=True, slots=True)
class Past:
    """What new messages follow.

    Attributes:
        role: of the last message.
        features: `templates.features` of all messages.
        messages: gives all messages; called only where a template is not known to be stable.
        recent: gives those from the last answer on.
        message_count: how many there are.
        sampled: whether the last message was sampled.
        tail: the last sampled ids of a turn, (k,) int64, k at most `TAIL`; empty where the last message was not sampled.
    """

    role: str
    features: tuple[str, ...]
    messages: Callable[[], Sequence[Mapping[str, Any]]]
    recent: Callable[[], Sequence[Mapping[str, Any]]]
    message_count: int
    sampled: bool
    tail: Ids


class Renderer(Protocol):
    """Turns messages into tokens and items. `rollout_core.multimodal.HFRenderer` is the one for transformers.

    Attributes:
        fingerprint: identity (hex) of all that ids depend on: template, tokenizer, processor and their settings.
        vocab_size: sampled ids are below it.
        rule: how positions are counted.
    """

    @property
    def fingerprint(self) -> str: ...
    @property
    def vocab_size(self) -> int: ...
    @property
    def rule(self) -> PositionRule: ...

    def begin(self, messages: Messages, tools: Tools) -> Laid:
        """The first tokens of a conversation."""
        ...

    def add(self, past: Past, messages: Messages, tools: Tools) -> Laid:
        """Tokens that messages add, with those that end a sampled turn before them."""
        ...

    def generation_prompt(self, past: Past, tools: Tools) -> Laid:
        """Tokens that open an assistant's turn."""
        ...

    def said(self, ids: Ids) -> Mapping[str, Any]:
        """Sampled ids as an assistant's message, for a template that must see it; without the tokens that end a turn."""
        ...

    def adopt(self, payloads: Iterable[Payload]) -> None:
        """Know these payloads, so that their items are not processed again."""
        ...

    def checking(self) -> Renderer:
        """The same renderer, which compares every addition with the whole past and trusts no probing."""
        ...

    def merged(self, items: Sequence[Item], input_ids: Ids) -> dict[str, Any]:
        """The processor's outputs for a whole sequence, from those of its items."""
        ...
