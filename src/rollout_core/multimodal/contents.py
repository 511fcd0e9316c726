"""Which characters of rendered text came from the messages, and which from the template; and what only looks like a placeholder.

Both are found by rendering again with characters of Unicode's private use area in place of the text in question.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from rollout_core.errors import RolloutCoreError

#: Renders messages; gives their text, in one piece or by message.
Write = Callable[[Sequence[Mapping[str, Any]]], tuple[str, ...]]
#: Characters ``[start, stop)`` of a text, and the message that they belong to.
Owned = tuple[int, int, int]
#: Three characters that stand nowhere in the texts: around a guard's number, and in place of a text.
Marks = tuple[str, str, str]


def marks_for(given: Iterable[str]) -> Marks:
    """Three characters of Unicode's private use area that stand nowhere in the texts."""
    used = {c for text in given for c in text if "\ue000" <= c <= "\uf8ff"}
    free = (chr(c) for c in range(0xE100, 0xF8FF) if chr(c) not in used)
    return next(free), next(free), next(free)


def guard(text: str, literals: re.Pattern[str], guards: dict[str, str], marks: Marks) -> str:
    def stand_in(match: re.Match[str]) -> str:
        made = f"{marks[0]}{len(guards)}{marks[1]}"
        guards[made] = match.group()
        return made

    return literals.sub(stand_in, text)


def contents_of(
    pieces: Sequence[str],
    messages: Sequence[Mapping[str, Any]],
    write: Write,
    marks: Marks,
) -> tuple[list[tuple[int, int]], list[Owned]]:
    """The character ranges that came from the messages' contents; and the same with the message of each, where that is known.

    The same messages are written again with a mark in place of each text. Where a template alters texts so that the two do not fit
    together, everything counts as content, of no message in particular.
    """
    whole = "".join(pieces)
    said: list[tuple[str, int]] = []
    marked = []
    for index, message in enumerate(messages):
        content = message.get("content")
        if isinstance(content, str) and content:
            said.append((content, index))
            marked.append({**message, "content": marks[2]})
        elif isinstance(content, list):
            spoken = [p.get("text") if p.get("type") == "text" else None for p in content]
            said += [(text, index) for text in spoken if text]
            parts = [{**p, "text": marks[2]} if text else p for p, text in zip(content, spoken, strict=True)]
            marked.append({**message, "content": parts})
        else:
            marked.append(dict(message))
    everything: tuple[list[tuple[int, int]], list[Owned]] = [(0, len(whole))], []
    try:
        literals = "".join(write(marked)).split(marks[2])
    except RolloutCoreError:
        return everything
    if len(literals) != len(said) + 1 or not whole.startswith(literals[0]):
        return everything
    at, owned = len(literals[0]), []
    for (text, owner), literal in zip(said, literals[1:], strict=True):
        shown = next((t for t in (text, text.strip(), text.rstrip(), text.lstrip()) if whole.startswith(t + literal, at)), None)
        if shown is None:
            return everything
        owned.append((at, at + len(shown), owner))
        at += len(shown) + len(literal)
    return ([(start, stop) for start, stop, _ in owned], owned) if at == len(whole) else everything


def bounds_of(pieces: Sequence[str], count: int, owned: Sequence[Owned], closing: str) -> tuple[int, ...]:
    """Where the text of each of ``count`` messages begins.

    In text that is not kept apart by message, a message ends with what ends a turn, if the template writes that after it, else
    with its content. ``owned``: texts of messages, and media with what the template writes around them; what a message owns is
    never given to another one.
    """
    bounds = [0]
    if len(pieces) == count:
        for piece in pieces[:-1]:
            bounds.append(bounds[-1] + len(piece))
        return tuple(bounds)
    whole = "".join(pieces)
    for index in range(1, count):
        ended = max([bounds[-1], *(stop for _, stop, owner in owned if owner == index - 1)])
        begins = min((start for start, _, owner in owned if owner >= index), default=len(whole))
        found = whole.find(closing, ended, begins) if closing else -1
        bounds.append(ended if found < 0 else found + len(closing))
    return tuple(bounds)
