"""The control half of a carrier over stream sockets: messages to and from any number of peers, without waiting for one of them."""

from __future__ import annotations

import select
import time
from collections.abc import Sequence
from contextlib import suppress
from socket import socket
from types import TracebackType
from typing import Final

from rollout_core.errors import TransferError
from rollout_core.transfer.carriers.contract import Moving
from rollout_core.transfer.channel import Channel, PeerGone

_SHORTEST_POLL: Final = 1e-3
_LONGEST_POLL: Final = 3600.0  # seconds; poll counts milliseconds in a C int

_CLOSED: Final = "this end of the carrier is closed: by close(), or by an update that lost its other side; make a new carrier"


class Links:
    """A socket to each peer; they are this object's from then on, and closed with it."""

    def __init__(self, sockets: Sequence[socket]) -> None:
        self._channels: list[Channel[bytes]] = [Channel(one.detach(), bytes) for one in sockets]
        self._gone: dict[int, TransferError] = {}
        self._is_closed = False

    def __len__(self) -> int:
        return len(self._channels)

    def check_open(self) -> None:
        """Raise ``TransferError`` after ``close``."""
        if self._is_closed:
            raise TransferError(_CLOSED)

    def post(self, peer: int, message: bytes) -> None:
        self.check_open()
        if peer in self._gone:
            raise self._gone[peer]
        with suppress(PeerGone):  # poll says so, after what it said before it went
            self._channels[peer].post(message)

    def poll(self, seconds: float | None) -> list[tuple[int, bytes | TransferError]]:
        """Messages by peer, waiting for the first at most ``seconds``; in place of one a ``TransferError``, once for a peer."""
        self.check_open()
        deadline = None if seconds is None else time.monotonic() + seconds
        while True:
            found = self._arrived()
            left = _LONGEST_POLL if deadline is None else min(deadline - time.monotonic(), _LONGEST_POLL)
            if found or left <= 0:
                return found
            self._wait(left)

    def close(self) -> None:
        self._is_closed = True
        for channel in self._channels:
            channel.close()

    def _arrived(self) -> list[tuple[int, bytes | TransferError]]:
        found: list[tuple[int, bytes | TransferError]] = []
        for peer, channel in enumerate(self._channels):
            try:
                while peer not in self._gone and channel.has_message():
                    found.append((peer, channel.receive(0)))
                if peer not in self._gone:
                    with suppress(PeerGone):
                        channel.flush()
            except TransferError as error:
                self._gone[peer] = error
                found.append((peer, error))
        return found

    def _wait(self, seconds: float) -> None:
        poll = select.poll()
        for peer, channel in enumerate(self._channels):
            if peer not in self._gone:
                poll.register(channel.fileno(), select.POLLIN | (0 if channel.is_flushed else select.POLLOUT))
        if seconds >= _SHORTEST_POLL:
            poll.poll(seconds * 1000)
        elif not poll.poll(0):  # poll would take any part of a millisecond for a whole one
            time.sleep(seconds)


class LinkedEnd:
    """What both ends of a carrier with ``Links`` have in common."""

    def __init__(self, sockets: Sequence[socket]) -> None:
        self.version = 0
        self._links = Links(sockets)

    def close(self) -> None:
        """Let go of everything. A second call is harmless."""
        self._links.close()

    def __enter__(self):  # type: ignore[no-untyped-def]  # noqa: ANN204 - Self, for the subclass
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


class LinkedSender(LinkedEnd):
    """The control half of a sender's end."""

    @property
    def receivers(self) -> int:
        return len(self._links)

    def post(self, receiver: int, message: bytes) -> None:
        self._links.post(receiver, message)

    def poll(self, seconds: float | None) -> list[tuple[int, bytes | TransferError]]:
        return self._links.poll(seconds)


class LinkedReceiver(LinkedEnd):
    """The control half of a receiver's end; its one peer is the sender. Buckets are where the sender wrote them, unless a carrier
    says how they are pulled."""

    def post(self, message: bytes) -> None:
        self._links.post(0, message)

    def poll(self, seconds: float | None) -> list[bytes | TransferError]:
        return [message for _, message in self._links.poll(seconds)]

    def pull(self, slot: int, nbytes: int) -> Moving | None:
        del slot, nbytes
        return None
