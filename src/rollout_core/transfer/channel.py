"""A channel of small typed messages between two processes: MessagePack, never pickle, and never waiting without an end."""

from __future__ import annotations

import select
import socket
import struct
import time
from contextlib import suppress
from typing import Any, Final, Generic, TypeVar

import msgspec

from rollout_core.errors import TransferError

Received = TypeVar("Received")
_ENCODER = msgspec.msgpack.Encoder()
#: Before each message: a mark, by which stray bytes are known at once, and the message's length.
_HEADER: Final = struct.Struct("<4sQ")
_MARK: Final = b"RCm1"
_CHUNK: Final = 1 << 16  # taken from memory at each look, before it is known what came
_LONGEST_POLL: Final = 3600.0  # seconds; poll counts milliseconds in a C int


class PeerGone(TransferError):
    """The other process closed its end of the channel, or ended."""


class Channel(Generic[Received]):
    """One end of a socket pair. ``kinds`` is the union of message types that this end receives.

    A send or receive that ends early, by its timeout or by KeyboardInterrupt, loses nothing: what is left of the message goes out,
    or comes in, with the next call. Both ends are expected to number what they send, to tell a late answer from the next one.
    """

    def __init__(self, fd: int, kinds: Any) -> None:
        self._socket = socket.socket(fileno=fd)
        self._socket.setblocking(False)
        self._decoder: msgspec.msgpack.Decoder[Received] = msgspec.msgpack.Decoder(kinds)
        self._inbox, self._outbox = bytearray(), bytearray()
        self._ended = False
        self._torn = False  # within a call to the system that moves bytes: interrupted there, nobody knows how many

    def send(self, message: Any, timeout: float | None = None) -> None:
        """Raises ``PeerGone`` if the other side is gone, ``TransferError`` if it has not taken the message in after ``timeout``
        seconds (None: no limit), and what msgspec raises for a value that it cannot encode, before anything is sent."""
        self._check_open()
        payload = _ENCODER.encode(message)
        deadline = _deadline(timeout)
        self._outbox += _HEADER.pack(_MARK, len(payload)) + payload
        while self._outbox:
            # The other side may be waiting for this one to take in what it sends.
            ready = self._wait(select.POLLOUT if self._ended else select.POLLIN | select.POLLOUT, deadline)
            if ready & select.POLLIN:
                self._fill()
            if ready & ~select.POLLIN:
                self._drain()
            if self._outbox and _is_past(deadline):
                raise TransferError(f"the other process took no message in within {timeout:g} s")

    def post(self, message: Any) -> None:
        """``send`` without waiting: what the system does not take at once goes out with ``flush``. ``PeerGone`` as for ``send``."""
        self._check_open()
        payload = _ENCODER.encode(message)
        self._outbox += _HEADER.pack(_MARK, len(payload)) + payload
        self.flush()

    def flush(self) -> None:
        """Send what is left of earlier messages, as far as the system takes it. ``PeerGone`` if the other side is gone."""
        self._check_open()
        while self._outbox and self._drain():
            pass

    @property
    def is_flushed(self) -> bool:
        return not self._outbox

    def fileno(self) -> int:
        return self._socket.fileno()

    def receive(self, timeout: float | None) -> Received:
        """The next message. Raises ``TransferError`` after ``timeout`` seconds (None: no limit), or at once if the other side is
        gone (``PeerGone``) or sends what is no message."""
        self._check_open()
        deadline = _deadline(timeout)
        late = False
        while (end := self._message_end()) is None:
            if self._ended:
                middle = " in the middle of a message" if self._inbox else ""
                raise PeerGone(f"the other process closed its end of the channel{middle}")
            if late:
                raise TransferError(f"no answer from the other process within {timeout:g} s")
            self._wait(select.POLLIN, deadline)
            self._fill()
            late = _is_past(deadline)
        try:
            with memoryview(self._inbox) as view, view[_HEADER.size : end] as payload:
                return self._decoder.decode(payload)
        except msgspec.MsgspecError as error:
            raise TransferError(f"the other process sent what is no message: {error}") from error
        finally:
            del self._inbox[:end]  # also when a value within refuses to be: the next message is not to blame

    def has_message(self) -> bool:
        """Whether a message (or the end) can be received without waiting."""
        self._check_open()
        self._fill()
        return self._ended or self._message_end() is not None

    def close(self) -> None:
        with suppress(OSError):  # somebody closed its descriptor: there is nothing left to close
            self._socket.close()

    def _check_open(self) -> None:
        if self._socket.fileno() < 0:
            raise TransferError("this end of the channel is closed")
        if self._torn:
            raise TransferError("a call was interrupted in the middle of a message, which cannot be taken up again")

    def _message_end(self) -> int | None:
        """Where the first message in the inbox ends; None if it is not all there."""
        if not _MARK.startswith(self._inbox[: len(_MARK)]):
            raise TransferError(f"the other process sent what is no message: it begins with {bytes(self._inbox[:8])!r}")
        if len(self._inbox) < _HEADER.size:
            return None
        end = _HEADER.size + int(_HEADER.unpack_from(self._inbox)[1])
        return end if end <= len(self._inbox) else None

    def _wait(self, events: int, deadline: float | None) -> int:
        """Which of these events (or the end) has come; 0 at the deadline."""
        poll = select.poll()
        poll.register(self._socket, events)
        while True:
            left = _LONGEST_POLL if deadline is None else min(max(0.0, deadline - time.monotonic()), _LONGEST_POLL)
            ready = poll.poll(left * 1000)
            if ready or _is_past(deadline):
                return ready[0][1] if ready else 0

    def _fill(self) -> None:
        """Take in what has arrived, without waiting."""
        self._torn = True
        try:
            data = self._socket.recv(_CHUNK)
            self._inbox += data
            self._ended = self._ended or not data
        except BlockingIOError:
            pass
        except OSError:  # reset by the other side
            self._ended = True
        self._torn = False

    def _drain(self) -> bool:
        """Send what the system takes, without waiting; whether it took any."""
        self._torn, count = True, 0
        try:
            with memoryview(self._outbox) as view:
                count = self._socket.send(view[:_CHUNK], socket.MSG_NOSIGNAL)
            del self._outbox[:count]
        except BlockingIOError:
            pass
        except OSError as error:
            self._torn = False
            self._outbox.clear()  # nobody will take it
            raise PeerGone("the other process closed its end of the channel") from error
        self._torn = False
        return count > 0


def _deadline(timeout: float | None) -> float | None:
    return None if timeout is None else time.monotonic() + timeout


def _is_past(deadline: float | None) -> bool:
    return deadline is not None and time.monotonic() >= deadline
