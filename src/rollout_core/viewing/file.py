"""Conversations from files: messages in JSON, or the bytes of ``Conversation.to_bytes``. It opens files, and nothing else.

The JSON is ``{"processor": DIR, "tools": [...], "messages": [...]}``; ``on_unstable``,
``template_kwargs`` and ``positions`` go to the conversation and its renderer. Paths in it count from its folder.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np

from rollout_core.errors import ConversationError, RolloutCoreError
from rollout_core.multimodal.conversation import Conversation
from rollout_core.multimodal.hf import HFRenderer
from rollout_core.multimodal.processing import feature_token, placeholder

_KEYS: Final = ("processor", "tools", "messages", "on_unstable", "template_kwargs", "positions")
#: What an assistant's message may say of its sampling; a template never sees these.
_SAMPLING: Final = ("token_ids", "logprobs", "finish")
#: Keys of media parts that may hold a path.
_PATHS: Final = ("image", "video", "audio", "url", "path")


@dataclass(frozen=True, slots=True)
class Given:
    """A file that was read: messages with absolute paths, or the bytes of a stored conversation.

    Attributes:
        processor: the folder that the file names, if it names one.
        stored: not None for a stored conversation, which has no other field.
    """

    processor: Path | None = None
    tools: tuple[dict[str, Any], ...] | None = None
    messages: tuple[dict[str, Any], ...] = ()
    on_unstable: Any = "refuse"
    template_kwargs: Mapping[str, Any] | None = None
    positions: str | None = None
    stored: bytes | None = None


def read_file(file: Path) -> Given:
    """What a file holds.

    Raises:
        ConversationError: no such file; neither JSON nor MessagePack's first byte; JSON of another form. Media are not opened.
    """
    if not file.is_file():
        raise ConversationError(f"{file} is no file; give a conversation as JSON, or as Conversation.to_bytes wrote it")
    try:
        data = file.read_bytes()
    except OSError as error:
        raise ConversationError(f"{file} cannot be read: {error}") from error
    if data[:1] == b"\x94":  # MessagePack: an array of four, as Conversation.to_bytes begins; no JSON does
        return Given(stored=data)
    try:
        value = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise ConversationError(f"{file} is neither JSON nor a stored conversation: {error}") from error
    if not isinstance(value, dict) or not isinstance(value.get("messages"), list):
        raise ConversationError(
            f'{file} has no list of messages; its form is {{"processor": DIR, "tools": [...], "messages": [...]}}'
        )
    unknown = [key for key in value if key not in _KEYS]
    if unknown:
        raise ConversationError(f"{file} has the unknown key {unknown[0]!r}; the keys are {', '.join(_KEYS)}")
    for key, kind in (("processor", str), ("tools", list), ("template_kwargs", dict), ("positions", str)):
        if value.get(key) is not None and not isinstance(value[key], kind):
            raise ConversationError(f"{file}: {key!r} is a {type(value[key]).__name__}; it is a {kind.__name__}")
    folder = file.resolve().parent
    for index, message in enumerate(value["messages"]):
        _check(message, index)
    processor, tools = value.get("processor"), value.get("tools")
    return Given(
        None if processor is None else folder / processor,
        None if tools is None else tuple(tools),
        tuple(_found(message, folder) for message in value["messages"]),
        value.get("on_unstable") or "refuse",
        value.get("template_kwargs"),
        value.get("positions"),
    )


def load_processor(folder: Path) -> Any:
    """The processor, or else the tokenizer, that ``save_pretrained`` wrote to a folder. Nothing is fetched, no code in it is run.

    Raises:
        ConversationError: no such folder, or nothing in it that transformers can load. ImportError without transformers.
    """
    if not folder.is_dir():
        raise ConversationError(f"processor {folder} is no folder; give one that save_pretrained wrote")
    names = ("processor_config.json", "preprocessor_config.json", "video_preprocessor_config.json")
    whole = any((folder / name).is_file() for name in names)
    if not whole and not any((folder / name).is_file() for name in ("tokenizer_config.json", "tokenizer.json")):
        raise ConversationError(
            f"processor {folder} has neither {names[0]} nor tokenizer_config.json; give one that save_pretrained wrote"
        )
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # transformers reads it when it is imported
    from transformers import AutoProcessor, AutoTokenizer
    from transformers.utils import logging

    logging.set_verbosity_error()
    kind = AutoProcessor if whole else AutoTokenizer
    try:
        return kind.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
    except Exception as error:  # whatever the classes in it raise
        raise ConversationError(f"processor {folder} cannot be loaded: {type(error).__name__}: {error}") from error


def renderer_of(processor: Any, given: Given) -> HFRenderer:
    """The renderer for a file. ``ConversationError`` for a family that is unknown or refused, or a template that cannot be used."""
    try:
        return HFRenderer(processor, template_kwargs=given.template_kwargs, positions=given.positions)
    except RolloutCoreError:
        raise
    except Exception as error:  # foreign code: templates and tokenizers raise what they like
        raise ConversationError(f"{type(processor).__name__} cannot be used: {type(error).__name__}: {error}") from error


def placeholders_of(renderer: HFRenderer) -> dict[int, str]:
    """Ids and texts of the tokens that stand for items, in either track, where the tokenizer has them as one token."""
    usable = [m for m, support in renderer.family.modalities.items() if support.refuse is None]
    found = [f(renderer.processor, renderer.family, modality) for modality in usable for f in (placeholder, feature_token)]
    ids = {text: renderer.encode(text).ids for text in found}
    return {int(tokens[0]): text for text, tokens in ids.items() if len(tokens) == 1}


def conversation_from(given: Given, renderer: HFRenderer) -> Conversation:
    """The conversation: messages of the assistant as sampled turns, others that follow each other added together.

    Raises:
        ConversationError: what the conversation refuses, with the message it was about; what the template or the processor raises.
    """
    if given.stored is not None:
        return Conversation.from_bytes(renderer, given.stored)
    if not given.messages:
        raise ConversationError("the file has no messages")
    if given.messages[0]["role"] == "assistant":
        raise ConversationError(
            "message 0 is the assistant's, and there is nothing that it answers; begin with a user's or the system's"
        )
    conversation: Conversation | None = None
    waiting: list[dict[str, Any]] = []
    for index, message in enumerate((*given.messages, None)):
        if message is not None and message["role"] != "assistant":
            waiting.append(message)
            continue
        if waiting:
            with _about(index - len(waiting)):
                conversation = _added(conversation, waiting, given, renderer)
            waiting = []
        if message is not None and conversation is not None:
            with _about(index):
                conversation = _sampled(conversation, message, renderer)
    assert conversation is not None  # the first message is not the assistant's
    return conversation


@contextmanager
def _about(index: int) -> Iterator[None]:
    """Errors name a message: the one they name themselves, or the first that was being added."""
    try:
        yield
    except RolloutCoreError as error:
        words = str(error)
        raise ConversationError(words if words.startswith("message ") else f"message {index}: {words}") from error
    except Exception as error:  # templates and processors raise what they like
        raise ConversationError(f"message {index}: {type(error).__name__}: {error}") from error


def _added(conversation: Conversation | None, messages: list[dict[str, Any]], given: Given, renderer: HFRenderer) -> Conversation:
    if conversation is None:
        return Conversation.start(renderer, messages, given.tools, on_unstable=given.on_unstable)
    return conversation.extend(messages)


def _sampled(conversation: Conversation, message: dict[str, Any], renderer: HFRenderer) -> Conversation:
    plain = {key: value for key, value in message.items() if key not in _SAMPLING}
    parsed = plain if any(value for key, value in plain.items() if key not in ("role", "content")) else None
    ids = message.get("token_ids")
    if ids is None and parsed is not None:
        ids = _written(plain, conversation, renderer)
    elif ids is None:
        content = plain.get("content")
        if isinstance(content, list) and all(isinstance(p, dict) and isinstance(p.get("text"), str) for p in content):
            content = "".join(part["text"] for part in content)
        if not isinstance(content, str):
            raise ConversationError("an assistant's message has its text under 'content', or 'token_ids'; this one has neither")
        ids = renderer.encode(content).ids
    return conversation.append_sampled(
        ids, logprobs=message.get("logprobs"), finish=message.get("finish") or "stop", message=parsed
    )


def _written(message: dict[str, Any], conversation: Conversation, renderer: HFRenderer) -> Any:
    """What the template writes for an assistant's message with calls of tools and the like, without what ends its turn."""
    question = {"role": "user", "content": "?"}
    prompt = Conversation.start(renderer, [question], conversation.tools).with_generation_prompt().input_ids
    whole = Conversation.start(renderer, [question, message], conversation.tools).input_ids
    end = renderer.encode(renderer.verdict.closing).ids
    stop = len(whole) - len(end)
    if stop < len(prompt) or not np.array_equal(whole[: len(prompt)], prompt) or not np.array_equal(whole[stop:], end):
        raise ConversationError(
            "the template does not write this message as what follows its generation prompt; give its 'token_ids'"
        )
    return whole[len(prompt) : stop]


def _check(message: Any, index: int) -> None:
    if not isinstance(message, dict):
        raise ConversationError(f"message {index} is a {type(message).__name__}; it is an object with 'role' and 'content'")
    role = message.get("role")
    if not isinstance(role, str) or not role:
        raise ConversationError(f"message {index} has role {role!r}; it must be a non-empty string such as 'user' or 'tool'")
    said = [key for key in _SAMPLING if key in message]
    if role != "assistant" and said:
        raise ConversationError(f"message {index} has {said[0]!r} and role {role!r}; only the assistant's messages are sampled")


def _found(message: dict[str, Any], folder: Path) -> dict[str, Any]:
    """The message with absolute paths."""
    content = message.get("content")
    if not isinstance(content, list):
        return message
    parts = []
    for part in content:
        if isinstance(part, dict) and part.get("type") in ("image", "video", "audio"):
            part = {key: _absolute(value, folder) if key in _PATHS else value for key, value in part.items()}
        elif isinstance(part, dict) and part.get("type") == "image_url":
            url = part.get("image_url")
            part = {"type": "image", "url": _absolute(url.get("url") if isinstance(url, dict) else url, folder)}
        parts.append(part)
    return {**message, "content": parts}


def _absolute(value: Any, folder: Path) -> Any:
    if isinstance(value, list):
        return [_absolute(entry, folder) for entry in value]
    if not isinstance(value, str) or value[:5].lower() == "data:" or "://" in value[:16] or "\0" in value:
        return value
    return str(folder / value)
