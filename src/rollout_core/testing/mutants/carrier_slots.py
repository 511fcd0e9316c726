"""Bugs of carriers in slots, in moving them, in what they leave, and in what whole updates need."""

from __future__ import annotations

import contextlib
import mmap
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final

import torch

from rollout_core.errors import TransferError
from rollout_core.testing.mutants.registry import carrier_mutant
from rollout_core.testing.reference_carrier import ReferenceCarrier, ReferenceReceiver, ReferenceSender

#: What the mutants that leak leave behind, so that it can be taken away; names in /dev/shm begin so.
LEFT_NAME: Final = "rollout-core-mutant-"
_LEFT: Final[list[mmap.mmap]] = []


@carrier_mutant("T1-slots", "a stride rounded down")
class OverlappingSlots(ReferenceCarrier):
    """Cuts slots out of one buffer at multiples of 16 bytes, rounded down."""

    class sender(ReferenceSender):
        def lay_out(self, slots: int, nbytes: int) -> tuple[list[torch.Tensor], bytes]:
            super().lay_out(slots, nbytes)
            whole, stride = torch.zeros(slots * nbytes, dtype=torch.uint8), nbytes // 16 * 16
            self.slots = [whole[slot * stride : slot * stride + nbytes] for slot in range(slots)]
            return list(self.slots), b""


@carrier_mutant("T1-slots", "memory that comes in pages")
class RoundsUpToPages(ReferenceCarrier):
    """Gives whole pages."""

    class sender(ReferenceSender):
        def lay_out(self, slots: int, nbytes: int) -> tuple[list[torch.Tensor], bytes]:
            return super().lay_out(slots, max(1, -(-nbytes // 4096)) * 4096)


@carrier_mutant("T1-again", "a buffer that is made at the first use")
class OpensOnce(ReferenceCarrier):
    """Keeps a receiver's slots when the sender lays out others."""

    class sender(ReferenceSender):
        class receiver(ReferenceReceiver):
            def open(self, ticket: bytes, slots: int, nbytes: int) -> None:
                if len(self.slots) < slots:
                    super().open(ticket, slots, nbytes)

            def keep(self, slot: int, data: torch.Tensor) -> None:
                super().keep(slot, data[: self.slots[slot].numel()])


@carrier_mutant("T1-lent", "one receive buffer for all buckets")
class OneBufferForAll(ReferenceCarrier):
    """Receives every slot into the same memory."""

    class sender(ReferenceSender):
        class receiver(ReferenceReceiver):
            def open(self, ticket: bytes, slots: int, nbytes: int) -> None:
                super().open(ticket, 1, nbytes)
                self.slots *= slots


@carrier_mutant("T1-closed", "unmapping memory that a reader still has")
class TakesSlotsAway(ReferenceCarrier):
    """Clears what readers hold when the sender closes."""

    class sender(ReferenceSender):
        def close(self) -> None:
            super().close()
            for peer in self.peers:
                for slot in peer.slots:
                    slot.zero_()


@carrier_mutant("T4-bytes", "copying in words of eight bytes")
class MovesWholeWords(ReferenceCarrier):
    """Moves the bytes up to the last multiple of eight."""

    class sender(ReferenceSender):
        class receiver(ReferenceReceiver):
            def keep(self, slot: int, data: torch.Tensor) -> None:
                super().keep(slot, data[: data.numel() // 8 * 8])


@carrier_mutant("T4-bytes")
class ShowsTheWholeSlot(ReferenceCarrier):
    """Gives a view of the whole slot, whatever was pushed."""

    class sender(ReferenceSender):
        class receiver(ReferenceReceiver):
            def view(self, slot: int, nbytes: int) -> torch.Tensor:
                return self.slots[slot]


@carrier_mutant("T4-receivers", "send() to the first of several")
class ServesTheFirst(ReferenceCarrier):
    """Moves bytes to the first receiver, and to the others the news that they have come."""

    class sender(ReferenceSender):
        def push(self, slot: int, nbytes: int) -> Callable[[], bool] | None:
            over = super().push(slot, nbytes)
            for peer in self.peers[1:]:
                peer.parcels[-1].data.zero_()
            return over


@carrier_mutant("T4-apart", "payload and messages on one stream, and messages that are skipped in search of payload")
class SkipsMessagesInAMove(ReferenceCarrier):
    """Drops messages that come while it waits for payload."""

    class sender(ReferenceSender):
        class receiver(ReferenceReceiver):
            over: Callable[[], bool] | None = None

            def pull(self, slot: int, nbytes: int) -> Callable[[], bool] | None:
                self.over = super().pull(slot, nbytes)
                return self.over

            def poll(self, seconds: float | None) -> list[bytes | TransferError]:
                found = super().poll(seconds)
                waits, self.over = self.over is not None, None
                return [item for item in found if not waits or isinstance(item, TransferError)]


@carrier_mutant("T2-mid-move", "wait() on a collective that will not end")
class WaitsForTheMove(ReferenceCarrier):
    """Waits for the end of a move when it is asked whether it is over."""

    class sender(ReferenceSender):
        def push(self, slot: int, nbytes: int) -> Callable[[], bool] | None:
            over = super().push(slot, nbytes)

            def waits() -> bool:
                while over is not None and not over():
                    time.sleep(0.001)
                return True

            return waits


@carrier_mutant("T2-memory", "torch.empty() says RuntimeError")
class LetsMemoryErrorsOut(ReferenceCarrier):
    """Raises what torch raises where memory cannot be had."""

    class sender(ReferenceSender):
        def lay_out(self, slots: int, nbytes: int) -> tuple[list[torch.Tensor], bytes]:
            self.slots = [torch.zeros(nbytes, dtype=torch.uint8) for _ in range(slots)]
            return list(self.slots), b""


@carrier_mutant("T2-ticket")
class TrustsTheTicket(ReferenceCarrier):
    """Reads a number out of a ticket, whatever it is."""

    class sender(ReferenceSender):
        class receiver(ReferenceReceiver):
            def open(self, ticket: bytes, slots: int, nbytes: int) -> None:
                super().open(ticket, int(ticket.decode()), nbytes)

        def lay_out(self, slots: int, nbytes: int) -> tuple[list[torch.Tensor], bytes]:
            return super().lay_out(slots, nbytes)[0], str(slots).encode()


@carrier_mutant("T3-descriptors", "a file that an open mapping does not need, and nobody closes")
class KeepsADescriptor(ReferenceCarrier):
    """Opens a file for a layout and does not close it."""

    class sender(ReferenceSender):
        def lay_out(self, slots: int, nbytes: int) -> tuple[list[torch.Tensor], bytes]:
            os.open(os.devnull, os.O_RDONLY)
            return super().lay_out(slots, nbytes)


@carrier_mutant("T3-threads", "a reading thread of each end that waits for the next message")
class LeavesAThread(ReferenceCarrier):
    """Leaves a thread behind where it is not closed by the other side first."""

    class sender(ReferenceSender):
        class receiver(ReferenceReceiver):
            def close(self) -> None:
                if not self.closed and not self.sender.closed:
                    threading.Thread(target=time.sleep, args=(2.5,), daemon=True).start()
                super().close()


@carrier_mutant("T3-memory", "a mapping that a table keeps")
class KeepsTheMapping(ReferenceCarrier):
    """Keeps shared memory mapped after the close."""

    class sender(ReferenceSender):
        def lay_out(self, slots: int, nbytes: int) -> tuple[list[torch.Tensor], bytes]:
            _LEFT.append(mmap.mmap(-1, 1 << 16))
            return super().lay_out(slots, nbytes)


@carrier_mutant("T3-memory", "multiprocessing.shared_memory without unlink()")
class LeavesAName(ReferenceCarrier):
    """Leaves a file in /dev/shm."""

    class sender(ReferenceSender):
        def close(self) -> None:
            if not self.closed:
                Path(f"/dev/shm/{LEFT_NAME}{os.getpid()}-{time.monotonic_ns()}").touch()
            super().close()


def remove_names() -> None:
    """Take away what ``LeavesAName`` has left."""
    for path in Path("/dev/shm").glob(f"{LEFT_NAME}*"):
        with contextlib.suppress(FileNotFoundError):
            path.unlink()


@carrier_mutant("T5-updates")
class StaysAtVersionZero(ReferenceCarrier):
    """Has version 0 for ever."""

    class sender(ReferenceSender):
        class receiver(ReferenceReceiver):
            version = property(lambda self: 0, lambda self, value: None)


@carrier_mutant("T5-updates", "taking slots in turn, whatever their numbers are")
class TakesSlotsInTurn(ReferenceCarrier):
    """Pushes slots one after the other, by a count of its own that goes on over updates."""

    class sender(ReferenceSender):
        def __init__(self, receivers: int) -> None:
            super().__init__(receivers)
            self.count = 0

        def push(self, slot: int, nbytes: int) -> Callable[[], bool] | None:
            self.count += 1
            return super().push((self.count - 1) % len(self.slots), nbytes)


@carrier_mutant("T5-source", "a round that is counted where it succeeds")
class CountsGoodUpdates(ReferenceCarrier):
    """Takes another layout for a new update only after one that has advanced the version."""

    class sender(ReferenceSender):
        laid_out = -1

        def lay_out(self, slots: int, nbytes: int) -> tuple[list[torch.Tensor], bytes]:
            if self.laid_out == self.version:
                raise RuntimeError(f"version {self.version} is under way")
            self.laid_out = self.version
            return super().lay_out(slots, nbytes)


@carrier_mutant("T5-refused", "a barrier in open()")
class WantsEveryOpen(ReferenceCarrier):
    """Lays out again only if all receivers have opened the last layout."""

    class sender(ReferenceSender):
        def __init__(self, receivers: int) -> None:
            super().__init__(receivers)
            self.wanted: set[int] = set()

        class receiver(ReferenceReceiver):
            def open(self, ticket: bytes, slots: int, nbytes: int) -> None:
                super().open(ticket, slots, nbytes)
                if isinstance(self.sender, WantsEveryOpen.sender):
                    self.sender.wanted.discard(self.place)

        def lay_out(self, slots: int, nbytes: int) -> tuple[list[torch.Tensor], bytes]:
            if self.wanted:
                raise RuntimeError(f"receivers {self.wanted} have not opened the slots")
            self.wanted = set(range(self.receivers))
            return super().lay_out(slots, nbytes)


@carrier_mutant("T5-dies", "a barrier at the end")
class ClosesTogether(ReferenceCarrier):
    """Waits at its close until all receivers have closed."""

    class sender(ReferenceSender):
        def close(self) -> None:
            while not self.closed and not all(peer.closed for peer in self.peers):
                time.sleep(0.001)
            super().close()
