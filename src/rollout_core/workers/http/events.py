"""Server-sent events out of pieces of bytes, cut anywhere. Pure."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

#: The data of the event by which OpenAI's interface, and the engines after it, say that a stream is complete.
DONE: Final = "[DONE]"


class EventError(ValueError):
    """Bytes that are no event stream, or end in the middle of an event, or an event beyond the bound."""


class EventParser:
    """``feed`` pieces, get the data of the events that they complete, and read on to the last of them before the next piece.
    ``limit`` bounds one event in bytes.

    Lines end with LF, CR LF or CR. Comments and the fields ``event``, ``id`` and ``retry`` are passed over; data of several lines
    is joined by LF; an event without data is none.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._line = bytearray()  # of the last piece, without its end so far
        self._data: list[bytes] = []  # of the event so far, a line each
        self._size = 0
        self._after_cr = False  # the last piece ended with CR: an LF that begins the next belongs to it
        self._is_first = True

    def feed(self, piece: bytes) -> Iterator[str]:
        """Raises ``EventError``."""
        if not piece:
            return
        if self._after_cr:
            piece = piece.removeprefix(b"\n")
        self._after_cr = piece.endswith(b"\r")
        *complete, rest = piece.replace(b"\r\n", b"\n").replace(b"\r", b"\n").split(b"\n")
        for part in complete:
            line = bytes(self._line) + part
            self._line.clear()
            event = self._take(line)
            if event is not None:
                yield event
        self._line += rest
        self._bound(len(self._line))

    def end(self) -> None:
        """Raises ``EventError`` if the stream ends in the middle of an event."""
        if self._line or self._data:
            raise EventError("ends in the middle of an event")

    def _take(self, line: bytes) -> str | None:
        if self._is_first:
            line, self._is_first = line.removeprefix(b"\xef\xbb\xbf"), False
        if not line:
            data, self._data, self._size = self._data, [], 0
            return _text(b"\n".join(data)) if data else None
        name, _, value = line.partition(b":")
        if name == b"data":
            self._data.append(value.removeprefix(b" "))
            self._size += len(value) + 1
            self._bound(0)
        return None

    def _bound(self, more: int) -> None:
        if self._size + more > self._limit:
            raise EventError(f"has an event of more than {self._limit} bytes")


def _text(data: bytes) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise EventError(f"has an event that is not UTF-8 at its byte {error.start}") from None
