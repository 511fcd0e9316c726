"""A channel of small typed messages between two processes: MessagePack, never pickle, and never waiting without an end."""

from __future__ import annotations

from multiprocessing.connection import Connection
from typing import Any, Generic, TypeVar

import msgspec

from rollout_core.errors import TransferError

Received = TypeVar("Received")
_ENCODER = msgspec.msgpack.Encoder()


class Channel(Generic[Received]):
    """One end of a socket pair. ``kinds`` is the union of message types that this end receives."""

    def __init__(self, fd: int, kinds: Any) -> None:
        self._connection = Connection(fd)
        self._decoder: msgspec.msgpack.Decoder[Received] = msgspec.msgpack.Decoder(kinds)

    def send(self, message: msgspec.Struct) -> None:
        """Raises ``TransferError`` if the other side is gone."""
        try:
            self._connection.send_bytes(_ENCODER.encode(message))
        except OSError as error:
            raise TransferError("the other process closed its end of the channel") from error

    def receive(self, timeout: float | None) -> Received:
        """The next message. Raises ``TransferError`` after ``timeout`` seconds (None: no limit), or at once if the other side is
        gone or sends what is no message."""
        try:
            if not self._connection.poll(timeout):
                raise TransferError(f"no answer from the other process within {timeout:g} s")
            return self._decoder.decode(self._connection.recv_bytes())
        except (EOFError, OSError) as error:
            raise TransferError("the other process closed its end of the channel") from error
        except msgspec.MsgspecError as error:
            raise TransferError(f"the other process sent what is no message: {error}") from error

    def has_message(self) -> bool:
        """Whether a message (or the end) can be received without waiting."""
        try:
            return self._connection.poll(0)
        except OSError:
            return True

    def close(self) -> None:
        self._connection.close()
