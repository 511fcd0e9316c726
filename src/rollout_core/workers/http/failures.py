"""How a request can fail, in words: what was asked, what happened, and whether it may have been carried out. Pure."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, Final

from rollout_core.errors import TransferError, WorkerError

_SHORT: Final = 300  # characters of a server's own words
#: Where servers put their words: FastAPI, OpenAI's interface, SGLang.
_WORDS: Final = ("message", "detail", "error", "msg")


class RequestError(WorkerError):
    """The server answered, and not with what was asked for; or the request is none that can be sent.

    ``status`` is that of the answer, None without one. ``sent``: whether the request may have been carried out.
    """

    def __init__(self, asked: str, happened: str, *, sent: bool, status: int | None = None) -> None:
        super().__init__(_sentence(asked, happened, sent))
        self.status, self.sent = status, sent


class NoAnswerError(TransferError):
    """No complete answer: the server is gone, or took too long. ``sent``: whether the request may have been carried out."""

    def __init__(self, asked: str, happened: str, *, sent: bool) -> None:
        super().__init__(_sentence(asked, happened, sent))
        self.sent = sent


def _sentence(asked: str, happened: str, sent: bool) -> str:
    return f"{asked}: {happened}; the request {'may have been carried out' if sent else 'was not sent'}"


def words_of(body: bytes) -> str:
    """A server's own words out of the body of a failure, on one line, shortened."""
    text = body.decode(errors="replace")
    try:
        said = _said(json.loads(text))
    except (ValueError, RecursionError):
        said = text
    line = " ".join(said.split())
    return line if len(line) <= _SHORT else line[:_SHORT] + " ..."


def _said(value: Any) -> str:
    while isinstance(value, Mapping):
        value = next((value[key] for key in _WORDS if value.get(key)), json.dumps(value))
    return value if isinstance(value, str) else json.dumps(value)
