"""One end's view of the way to another: what was said and heard on it, in which order, and when."""

from __future__ import annotations

from typing import Final

import msgspec
from msgspec.structs import replace

from rollout_core.errors import TransferError
from rollout_core.transfer.protocol.messages import Body, Envelope

#: Of an end's ``timeout`` so much may pass in silence; the rest is for ending the update in order. Together they are the timeout.
SILENCE: Final = 0.75
DRAIN: Final = 0.25
#: An end with nothing to say speaks so many times within the shorter timeout of the two.
BEATS: Final = 5
_MAX_EARLY: Final = 256  # messages kept for their turn; more than any order of this protocol could put ahead of one


class Line(msgspec.Struct, frozen=True):
    """``heard``: when something came last whose turn it was, in seconds of the driver's clock. What is behind a message that never
    came does not count: an end that cannot go on is not kept waiting by signs of life. ``posted``: when something went last.
    ``cut``: whether this way is known to be lost."""

    heard: float
    posted: float
    next_in: int = 0
    next_out: int = 0
    early: tuple[tuple[int, Body], ...] = ()
    cut: bool = False

    def say(self, attempt: int, body: Body, now: float) -> tuple[Line, Envelope]:
        return replace(self, posted=now, next_out=self.next_out + 1), Envelope(attempt, self.next_out, body)

    def take(self, number: int, body: Body, now: float) -> tuple[Line, tuple[Body, ...]]:
        """The messages whose turn has come with this one: none if it is a repetition or ahead of another."""
        early = dict(self.early)
        if number >= self.next_in:
            early[number] = body
        if len(early) > _MAX_EARLY:
            raise TransferError(f"message {self.next_in} never came, and {len(early)} after it did")
        due, at = [], self.next_in
        while at in early:
            due.append(early.pop(at))
            at += 1
        heard = now if due else self.heard
        return replace(self, heard=heard, next_in=at, early=tuple(sorted(early.items(), key=lambda item: item[0]))), tuple(due)

    def complaint(self, now: float) -> str:
        """What is wrong when too long a time has passed."""
        lost = f"message {self.next_in} never came, and {len(self.early)} after it did; " if self.early else ""
        return f"{lost}silent for {now - self.heard:.3g} s"


class Patience(msgspec.Struct, frozen=True):
    """``timeout``: seconds that this end bears, from the other's last sign of life to the end of the update. ``until``: the time at
    which an update that is not complete is given up; to end it in order takes the drain at most."""

    timeout: float
    until: float

    @property
    def silence(self) -> float:
        return self.timeout * SILENCE

    @property
    def drain(self) -> float:
        return self.timeout * DRAIN
