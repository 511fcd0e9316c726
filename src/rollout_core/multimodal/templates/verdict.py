"""What is known of a chat template once it was probed."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from rollout_core.errors import UnstableTemplateError
from rollout_core.multimodal.messages import MODALITIES, Message

#: What of a history may change how a template renders later or earlier messages.
FEATURES = ("thinking", "tool_calls", "media")
#: Under what keys messages have thinking (transformers 5.23, chat_template_utils.py, ``_REASONING_FIELDS``), and how models write
#: it.
_THINKING_KEYS = ("reasoning_content", "reasoning", "thinking")
_THINKING_MARKS = (
    "<think>",
    "</think>",
    "[THINK]",
    "[/THINK]",
    "<reasoning>",
    "</reasoning>",
    "<thinking>",
    "</seed:think>",
    "<|channel|>",
)
#: Whether two texts, encoded one after the other, give the ids of the two together.
Joined = Callable[[str, str], bool]


class Render(Protocol):
    """Renders messages with a chat template; raises whatever the template raises."""

    def __call__(self, messages: Sequence[Message], *, generation: bool) -> str: ...


@dataclass(frozen=True, slots=True, order=True)
class Join:
    """Where two messages meet: the role before, the role after, and what the history holds."""

    before: str
    after: str
    features: tuple[str, ...] = ()

    def __str__(self) -> str:
        return f"{self.before} -> {self.after}" + (f" (history with {', '.join(self.features)})" if self.features else "")


@dataclass(frozen=True, slots=True)
class Break:
    """One probed conversation that the template did not leave as it was."""

    join: Join
    what: str


@dataclass(frozen=True, slots=True)
class Verdict:
    """What probing found: joins that always held, joins that did not, and text that is the same everywhere.

    Attributes:
        stable: joins where the new text depends on the last message's role only and the old text stays.
        breaks: an example for each join where the old text changed, or where the new text depends on more.
        closing: what the template writes after an assistant's content, e.g. ``<|im_end|>`` and a line break.
        generation: the generation prompt, e.g. ``<|im_start|>assistant`` and a line break; None where it depends on the history.
        generation_kept: whether an assistant message in a history starts with the generation prompt.
        separate: whether the tokenizer keeps the text that ends a turn apart from the answer before it.
        parts: whether the template takes contents only as lists of parts.
        envelopes: per modality, the text that the template writes before and after a placeholder and drops with the medium.
        probed: conversations rendered.
    """

    stable: frozenset[Join]
    breaks: tuple[Break, ...]
    closing: str
    generation: str | None
    generation_kept: bool
    separate: bool
    parts: bool
    envelopes: Mapping[str, tuple[str, str]]
    probed: int

    @property
    def groups_tools(self) -> bool:
        """Whether consecutive tool messages must be added together (M17's exception)."""
        return any(b.join.before == b.join.after == "tool" for b in self.breaks)


def both(one: Verdict, two: Verdict) -> Verdict:
    """What holds in two settings of one template, such as with and without tools."""
    breaks = {b.join: b for b in (*two.breaks, *one.breaks)}
    if one.closing != two.closing:
        raise UnstableTemplateError(f"what ends a turn depends on the tools: {one.closing!r} and {two.closing!r}")
    return Verdict(
        one.stable & two.stable - set(breaks),
        tuple(breaks[join] for join in sorted(breaks)),
        one.closing,
        one.generation if one.generation == two.generation else None,
        one.generation_kept and two.generation_kept,
        one.separate and two.separate,
        one.parts,
        {modality: around for modality, around in one.envelopes.items() if two.envelopes.get(modality) == around},
        one.probed + two.probed,
    )


def features(messages: Iterable[Message]) -> tuple[str, ...]:
    """Which of `FEATURES` there are in ``messages``."""
    found = set()
    for message in messages:
        content = message.get("content")
        parts = [part for part in content if isinstance(part, Mapping)] if isinstance(content, list) else []
        if any(part.get("type") in MODALITIES for part in parts):
            found.add("media")
        if message["role"] == "assistant":
            said = [content] if isinstance(content, str) else [part.get("text", "") for part in parts]
            if any(message.get(key) for key in _THINKING_KEYS) or any(mark in text for text in said for mark in _THINKING_MARKS):
                found.add("thinking")
            if message.get("tool_calls"):
                found.add("tool_calls")
    return tuple(f for f in FEATURES if f in found)


def united(one: Iterable[str], two: Iterable[str]) -> tuple[str, ...]:
    """Features that one or the other has."""
    found = {*one, *two}
    return tuple(feature for feature in FEATURES if feature in found)


def formed(message: Message, parts: bool) -> Message:
    """A message whose content is text, as text or as a list of one part."""
    if parts and isinstance(message.get("content"), str):
        return {**message, "content": [{"type": "text", "text": message["content"]}]}
    return message
