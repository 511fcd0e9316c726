"""The conversations that a chat template is probed with, and short stand-ins for a history."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from typing import Any

from rollout_core.multimodal.templates.verdict import Message

_CALL = {"type": "function", "id": "c0", "function": {"name": "look", "arguments": {"where": "left"}}}
_ASSISTANTS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("plain", {"role": "assistant", "content": "a plain answer"}),
    ("thinking", {"role": "assistant", "content": "<think>\nfirst this, then that\n</think>\n\nan answer"}),
    ("reasoning", {"role": "assistant", "content": "an answer", "reasoning_content": "first this, then that"}),
    ("call", {"role": "assistant", "content": "", "tool_calls": [_CALL]}),
    ("thinking call", {"role": "assistant", "content": "<think>\nlet me look\n</think>\n\n", "tool_calls": [_CALL]}),
)
_USERS: tuple[dict[str, Any], ...] = (
    {"role": "user", "content": "a question"},
    {"role": "user", "content": [{"type": "text", "text": "parts\nof text"}]},
)
_TOOL = {"role": "tool", "content": "a result"}
_OPENINGS: tuple[tuple[dict[str, Any], ...], ...] = ((), ({"role": "system", "content": "be brief"},))


def shapes(modalities: Sequence[str]) -> Iterable[tuple[Message, ...]]:
    """Conversations of up to seven messages: every kind of assistant turn, tools, pictures, with and without a system message."""
    pictured = [
        {"role": role, "content": [{"type": m}, {"type": "text", "text": f"what of this {m}?"}]}
        for m in modalities
        for role in ("user", "tool")
    ]
    user, later = _USERS[0], {"role": "user", "content": "and then?"}
    for opening in _OPENINGS:
        for _, turn in _ASSISTANTS:
            called = bool(turn.get("tool_calls"))
            follow: list[Message] = (
                [_TOOL, *(p for p in pictured if p["role"] == "tool")] if called else [later, *_USERS[1:], *pictured]
            )
            for message in follow:
                for _, second in _ASSISTANTS[:3]:
                    yield (*opening, user, turn, message, second, later, _ASSISTANTS[0][1], later)
            if called:
                yield (*opening, user, turn, _TOOL, _TOOL, _ASSISTANTS[0][1], later)
                yield (*opening, user, turn, _TOOL, later, _ASSISTANTS[0][1])
                yield (*opening, user, turn, _TOOL, turn, _TOOL, turn, _TOOL)
        yield (*opening, user, later, later)
        for first, second in itertools.product(pictured, repeat=2):
            if first["role"] == second["role"] == "user":
                yield (*opening, first, _ASSISTANTS[0][1], second, _ASSISTANTS[0][1], first)


def stand_in(role: str) -> tuple[Message, ...]:
    """A short history that ends with a message of ``role``."""
    user, answer = {"role": "user", "content": "x"}, {"role": "assistant", "content": "x"}
    ends = {
        "user": (user, answer, user),
        "assistant": (user, answer),
        "tool": (user, {"role": "assistant", "content": "", "tool_calls": [_CALL]}, {"role": "tool", "content": "x"}),
        "system": ({"role": "system", "content": "x"},),
    }
    return ends.get(role, (user, answer, {"role": role, "content": "x"}))
