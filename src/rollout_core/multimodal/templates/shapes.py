"""The conversations that a chat template is probed with, and short stand-ins for a history."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

from rollout_core.multimodal.messages import Message
from rollout_core.multimodal.templates.verdict import formed

_CALL = {"type": "function", "id": "c0", "function": {"name": "look", "arguments": {"where": "left"}}}
_ASSISTANTS: tuple[dict[str, Any], ...] = (
    {"role": "assistant", "content": "a plain answer"},
    {"role": "assistant", "content": "<think>\nfirst this, then that\n</think>\n\nan answer"},
    {"role": "assistant", "content": "an answer", "reasoning_content": "first this, then that"},
    {"role": "assistant", "content": "", "tool_calls": [_CALL]},
    {"role": "assistant", "content": "<think>\nlet me look\n</think>\n\n", "tool_calls": [_CALL]},
)
_USERS: tuple[dict[str, Any], ...] = (
    {"role": "user", "content": "a question"},
    {"role": "user", "content": [{"type": "text", "text": "parts\nof text"}]},
)
_LATER = {"role": "user", "content": "and then?"}
_TOOL = {"role": "tool", "content": "a result"}
_OPENINGS: tuple[tuple[dict[str, Any], ...], ...] = ((), ({"role": "system", "content": "be brief"},))


def shapes(modalities: Sequence[str]) -> Iterator[tuple[Message, ...]]:
    """Conversations of up to nine messages.

    Every kind of assistant turn, tools, media early and late, with and without a system message.
    """
    shown = {role: [_pictured(role, modality) for modality in modalities] for role in ("user", "tool")}
    plain = _ASSISTANTS[0]
    for opening, first in itertools.product(_OPENINGS, (_USERS[0], *shown["user"][:1])):
        for turn in _ASSISTANTS:
            called = bool(turn.get("tool_calls"))
            # A tool's result may follow a plain answer too: the call was sampled, and nobody has parsed it.
            tools, users = [_TOOL, *shown["tool"]], [_LATER, _USERS[1], *shown["user"]]
            for message in tools if called else [*tools, *users]:
                for second in _ASSISTANTS[:3] if message in (_TOOL, _LATER) else (plain,):
                    yield (*opening, first, turn, message, second, _LATER, plain, _LATER)
                if message["role"] == "tool":
                    yield (*opening, first, turn, message, message, plain, _LATER)
                    yield (*opening, first, turn, message, _LATER, plain)
            yield (*opening, first, turn, _TOOL, turn, _TOOL, turn, _TOOL)
            for message in (shown["user"] or [_LATER])[:1]:
                yield (*opening, first, turn, message, turn, message, plain, message)
                yield (*opening, first, turn, _TOOL, message, turn, _TOOL, message, message)
        for message in (_LATER, *shown["user"]):
            yield (*opening, first, message, message, plain, message, _LATER)


def _pictured(role: str, modality: str) -> Message:
    return {"role": role, "content": [{"type": modality}, {"type": "text", "text": f"what of this {modality}?"}]}


def recent_of(messages: Sequence[Message]) -> tuple[Message, ...]:
    """The messages from the last answer on; all of them where there is none."""
    last = next((n for n in range(len(messages) - 1, -1, -1) if messages[n]["role"] == "assistant"), 0)
    return tuple(messages[last:])


def stand_in(recent: Sequence[Message], parts: bool) -> tuple[Message, ...]:
    """A short history that ends with these messages. ``parts``: whether the template takes contents only as lists of parts."""
    user: Message = {"role": "user", "content": "x"}
    call: Message = {"role": "assistant", "content": "", "tool_calls": [_CALL]}
    front = {"assistant": (user,), "tool": (user, call)}.get(recent[0]["role"], ())
    return (*(formed(message, parts) for message in front), *recent)
