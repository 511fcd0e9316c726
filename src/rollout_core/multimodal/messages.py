"""Messages as the caller writes them, made into private values: text checked, media taken out, everything else copied.

A message is a mapping with a ``role`` and, mostly, a ``content``: a string, or a list of parts ``{"type": "text", "text": ...}``,
``{"type": "image", "image": picture}``, ``{"type": "video", "video": frames, "metadata": {...}}``,
``{"type": "audio", "audio": samples, "sampling_rate": 16000}``. Other keys (``tool_calls``, ``reasoning_content``, ``name``, ...)
are JSON values and reach the template unchanged. A part of OpenAI's form (``image_url``) is taken as an image.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from rollout_core.errors import ConversationError

#: A message as a template sees it.
Message: TypeAlias = Mapping[str, Any]

MODALITIES = ("image", "video", "audio")
#: Keys of a media part that hold the medium or say how to read it; they never reach the template.
_SOURCES = {"image": ("image", "url", "path", "base64"), "video": ("video", "url", "path"), "audio": ("audio", "url", "path")}
_OPTIONS = {"image": (), "video": ("metadata",), "audio": ("sampling_rate",)}
#: How deep a message may be nested.
_MOST_DEPTH = 64
_SURROGATE = re.compile("[\ud800-\udfff]")


@dataclass(frozen=True, slots=True)
class MediaSource:
    """One medium of a message, not yet loaded: what the caller gave, and where it stood."""

    modality: str
    source: Any
    options: Mapping[str, Any]
    message: int
    part: int

    def where(self) -> str:
        return f"message {self.message}, part {self.part} ({self.modality})"


@dataclass(frozen=True, slots=True)
class Messages:
    """Checked messages: what a template sees (media parts are bare markers), and the media in their order."""

    items: tuple[dict[str, Any], ...]
    media: tuple[MediaSource, ...]


def take(messages: Iterable[Mapping[str, Any]], *, first: int = 0) -> Messages:
    """Check and copy ``messages``; ``first`` is the number of the first one, for errors.

    Raises:
        ConversationError: no messages; a message that is no mapping or has no role; a part without a type or without its medium;
            text with a lone surrogate (no tokenizer can encode it); a value that is not JSON.
    """
    if isinstance(messages, (str, bytes, Mapping)) or not isinstance(messages, Iterable):
        raise ConversationError(f"messages must be a list of mappings with 'role' and 'content', not {type(messages).__name__}")
    taken: list[dict[str, Any]] = []
    media: list[MediaSource] = []
    for number, message in enumerate(messages, start=first):
        if not isinstance(message, Mapping):
            raise ConversationError(
                f"message {number} is a {type(message).__name__}; it must be a mapping with 'role' and 'content'"
            )
        role = message.get("role")
        if not isinstance(role, str) or not role:
            raise ConversationError(f"message {number} has role {role!r}; it must be a non-empty string such as 'user' or 'tool'")
        copy = {str(key): _plain(value, f"message {number}, {key!r}") for key, value in message.items() if key != "content"}
        copy = {key: value for key, value in copy.items() if value is not None}
        if message.get("content") is not None:
            copy["content"] = _content(message["content"], number, media)
        taken.append(copy)
    if not taken:
        raise ConversationError("there are no messages to add")
    return Messages(tuple(taken), tuple(media))


def texts(value: Any) -> Iterator[str]:
    """Every string in a message, keys left out."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for entry in value.values():
            yield from texts(entry)
    elif isinstance(value, (list, tuple)):
        for entry in value:
            yield from texts(entry)


def replaced(value: Any, replace: Any) -> Any:
    """A copy of a message with ``replace`` applied to every string in it, keys too."""
    if isinstance(value, str):
        return replace(value)
    if isinstance(value, Mapping):
        return {replace(key): replaced(entry, replace) for key, entry in value.items()}
    if isinstance(value, list):
        return [replaced(entry, replace) for entry in value]
    return value


def plain_tools(tools: Any) -> tuple[dict[str, Any], ...] | None:
    """A private copy of tool schemas. ``ConversationError`` for anything but a list of JSON schemas."""
    if tools is None:
        return None
    if isinstance(tools, (str, bytes, Mapping)) or not isinstance(tools, Iterable):
        raise ConversationError(f"tools must be a list of JSON schemas, not {type(tools).__name__}")
    found = list(tools)
    for number, tool in enumerate(found):
        if not isinstance(tool, Mapping):
            raise ConversationError(
                f"tool {number} is a {type(tool).__name__}; give its JSON schema "
                "(transformers.utils.get_json_schema makes one of a function)"
            )
    return tuple(_plain(tool, f"tool {number}") for number, tool in enumerate(found))


def _content(content: Any, number: int, media: list[MediaSource]) -> Any:
    if isinstance(content, str):
        return _text(content, f"message {number}")
    if not isinstance(content, Sequence) or isinstance(content, (bytes, bytearray)):
        raise ConversationError(
            f"message {number} has content of type {type(content).__name__}; it must be a string or a list of parts"
        )
    return [_part(part, number, index, media) for index, part in enumerate(content)]


def _part(part: Any, number: int, index: int, media: list[MediaSource]) -> dict[str, Any]:
    where = f"message {number}, part {index}"
    if isinstance(part, str):
        return {"type": "text", "text": _text(part, where)}
    if not isinstance(part, Mapping) or not isinstance(part.get("type"), str):
        raise ConversationError(
            f"{where} must be a mapping with a 'type' ('text', {', '.join(map(repr, MODALITIES))}), not {part!r:.80}"
        )
    kind = "image" if part["type"] == "image_url" else part["type"]
    if kind == "text":
        if not isinstance(part.get("text"), str):
            raise ConversationError(f"{where} is of type 'text' and has no string under 'text'")
        return {str(key): _plain(value, f"{where}, {key!r}") for key, value in part.items()}
    if kind not in MODALITIES:
        # Templates leave out parts that they do not know, without a word.
        raise ConversationError(f"{where} is of type {kind!r}; a part is of type 'text', {', '.join(map(repr, MODALITIES))}")
    given = {key: value for key, value in part.items() if value is not None}  # as tables have them for what a row lacks
    if part["type"] == "image_url":
        url = part.get("image_url")
        given = {"type": "image", "url": url.get("url") if isinstance(url, Mapping) else url}
    found = [key for key in _SOURCES[kind] if given.get(key) is not None]
    if len(found) != 1:
        what = f"{len(found)} of them" if found else "none"
        raise ConversationError(f"{where} is of type {kind!r} and must hold one of {', '.join(_SOURCES[kind])}; it has {what}")
    options = {key: given[key] for key in _OPTIONS[kind] if key in given}
    source = f"data:;base64,{given['base64']}" if found == ["base64"] and isinstance(given["base64"], str) else given[found[0]]
    media.append(MediaSource(kind, source, options, number, index))
    rest = {str(key): value for key, value in given.items() if key not in (*_SOURCES[kind], *_OPTIONS[kind], "type")}
    return {"type": kind, **{key: _plain(value, f"{where}, {key!r}") for key, value in rest.items()}}


def _plain(value: Any, where: str, depth: int = 0) -> Any:
    """A deep copy of a JSON value."""
    if depth > _MOST_DEPTH:
        raise ConversationError(f"{where} is nested more than {_MOST_DEPTH} deep, or holds itself")
    if isinstance(value, str):
        return _text(str(value), where)
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, int):
        if not -(1 << 63) <= value < 1 << 64:
            raise ConversationError(f"{where} holds a whole number beyond 64 bits; give it as text")
        return int(value)
    if isinstance(value, float):
        return float(value)
    if isinstance(value, Mapping):
        return {str(key): _plain(entry, where, depth + 1) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(entry, where, depth + 1) for entry in value]
    raise ConversationError(f"{where} holds a {type(value).__name__}; only JSON values reach a template")


def _text(text: str, where: str) -> str:
    lone = _SURROGATE.search(text)
    if lone:
        raise ConversationError(
            f"{where} holds the lone surrogate {lone.group()!r} at character {lone.start()}: no tokenizer encodes it"
        )
    return text
