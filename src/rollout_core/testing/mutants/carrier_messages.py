"""Bugs of carriers in messages: cut, joined, lost or late, and what is said of an end that is gone."""

from __future__ import annotations

import math
import time
from typing import Any

from rollout_core.errors import TransferError
from rollout_core.testing.mutants.registry import carrier_mutant
from rollout_core.testing.reference_carrier import ReferenceCarrier, ReferenceReceiver, ReferenceSender


@carrier_mutant("T4-messages", "a single send() of a socket that does not wait")
class CutsLongMessages(ReferenceCarrier):
    """Sends as much of a message as a buffer of 64 KiB takes."""

    class sender(ReferenceSender):
        def post(self, receiver: int, message: bytes) -> None:
            super().post(receiver, message[:65_536])


@carrier_mutant("T4-messages", "a stream socket read as if it kept messages apart")
class GivesMessagesAsOne(ReferenceCarrier):
    """Gives messages that have come together as one."""

    class sender(ReferenceSender):
        def poll(self, seconds: float | None) -> list[tuple[int, Any]]:
            joined: dict[int, bytes] = {}
            rest = []
            for place, item in super().poll(seconds):
                if isinstance(item, bytes):
                    joined[place] = joined.get(place, b"") + item
                else:
                    rest.append((place, item))
            return [*joined.items(), *rest]


@carrier_mutant("T4-messages", "an empty message taken for the end of the stream")
class DropsEmptyMessages(ReferenceCarrier):
    """Drops messages of no bytes."""

    class sender(ReferenceSender):
        def post(self, receiver: int, message: bytes) -> None:
            if message:
                super().post(receiver, message)


@carrier_mutant("T4-messages")
class LastInFirstOut(ReferenceCarrier):
    """Gives the messages that have come in the opposite order."""

    class sender(ReferenceSender):
        class receiver(ReferenceReceiver):
            def poll(self, seconds: float | None) -> list[bytes | TransferError]:
                return super().poll(seconds)[::-1]


@carrier_mutant("T2-post", "sendall() of a blocking socket")
class WaitsForRoom(ReferenceCarrier):
    """Waits until the other side takes messages in, where there are more than 256 KiB of them."""

    class sender(ReferenceSender):
        def post(self, receiver: int, message: bytes) -> None:
            super().post(receiver, message)
            box = self.peers[receiver].mailbox
            while sum(len(item) for item in list(box.items) if isinstance(item, bytes)) > 262_144 and not self.closed:
                time.sleep(0.001)


@carrier_mutant("T2-poll", "a timeout in whole seconds")
class PollsInSeconds(ReferenceCarrier):
    """Polls for whole seconds."""

    class sender(ReferenceSender):
        def poll(self, seconds: float | None) -> list[tuple[int, Any]]:
            return super().poll(seconds if seconds is None else math.ceil(seconds))


@carrier_mutant("T2-poll")
class WaitsWhereItMustNot(ReferenceCarrier):
    """Takes a poll of 0 seconds for one without an end."""

    class sender(ReferenceSender):
        class receiver(ReferenceReceiver):
            def poll(self, seconds: float | None) -> list[bytes | TransferError]:
                return super().poll(seconds or (None if not self.sender.closed else 0.0))


@carrier_mutant("T2-wakes", "a loop that sleeps and then looks")
class LooksWhenTimeIsUp(ReferenceCarrier):
    """Sleeps for the time that it may wait, at most a second at once, and then looks."""

    class sender(ReferenceSender):
        def poll(self, seconds: float | None) -> list[tuple[int, Any]]:
            found = super().poll(0)
            while not found and seconds != 0:
                time.sleep(1.0 if seconds is None else min(seconds, 1.0))
                found, seconds = super().poll(0), seconds if seconds is None else max(0.0, seconds - 1.0)
            return found


@carrier_mutant("T2-close-wakes", "select() that waits for readable sockets, and a close that is told through a flag")
class SleepsThroughAClose(ReferenceCarrier):
    """Wakes a poll for messages, and not for a close."""

    class sender(ReferenceSender):
        class receiver(ReferenceReceiver):
            def close(self) -> None:
                if not self.closed:
                    self.closed = True
                    self.sender.mailbox.items.append((self.place, TransferError("the receiver has closed")))


@carrier_mutant("T2-closed", "an end of file that is read again and again")
class SaysGoneEachTime(ReferenceCarrier):
    """Says at every poll that the sender is gone."""

    class sender(ReferenceSender):
        class receiver(ReferenceReceiver):
            def poll(self, seconds: float | None) -> list[bytes | TransferError]:
                if self.sender.closed and not self.mailbox.items:
                    return [TransferError("the sender has closed")]
                return super().poll(seconds)


@carrier_mutant("T2-closed", "a reset connection, whose unread bytes are dropped")
class DropsWhatWasSaid(ReferenceCarrier):
    """Loses messages that were not taken when the other side closes."""

    class sender(ReferenceSender):
        def close(self) -> None:
            for peer in self.peers:
                peer.mailbox.items.clear()
            super().close()


@carrier_mutant("T2-closed")
class RaisesWhenGone(ReferenceCarrier):
    """Raises from poll when the other side is gone."""

    class sender(ReferenceSender):
        class receiver(ReferenceReceiver):
            def poll(self, seconds: float | None) -> list[bytes | TransferError]:
                found = super().poll(seconds)
                for item in found:
                    if isinstance(item, TransferError):
                        raise item
                return found


@carrier_mutant("T2-post-closed", "BrokenPipeError of the socket")
class RaisesBrokenPipe(ReferenceCarrier):
    """Raises the system's own error where a message is posted to an end that is gone."""

    class sender(ReferenceSender):
        def post(self, receiver: int, message: bytes) -> None:
            try:
                super().post(receiver, message)
            except TransferError as error:
                raise BrokenPipeError(32, "Broken pipe") from error


@carrier_mutant("T2-own-close")
class PostsAfterItsClose(ReferenceCarrier):
    """Drops what is posted after its own close without a word."""

    class sender(ReferenceSender):
        class receiver(ReferenceReceiver):
            def post(self, message: bytes) -> None:
                if not self.closed:
                    super().post(message)


@carrier_mutant("T2-close-twice", "os.close() of a descriptor that is closed, or by now another's")
class ClosesOnce(ReferenceCarrier):
    """Raises where it is closed again."""

    class sender(ReferenceSender):
        def close(self) -> None:
            if self.closed:
                raise OSError(9, "Bad file descriptor")
            super().close()


@carrier_mutant("T2-others", "one failed socket that fails the poll of all")
class OneGoneAllGone(ReferenceCarrier):
    """Takes all receivers for gone once one of them is."""

    class sender(ReferenceSender):
        def post(self, receiver: int, message: bytes) -> None:
            if any(peer.closed for peer in self.peers):
                raise TransferError("a receiver is gone")
            super().post(receiver, message)
