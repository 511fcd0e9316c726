"""Cases of carriers: how many receivers, and a program of steps on the ends, as plain data."""

from __future__ import annotations

from typing import Final, Literal, TypeAlias

import msgspec

#: ``post``: ``end`` sends a message to ``to``. ``take``: all ends poll until everything posted has come. ``poll``: ``end`` polls
#: where nothing is due. ``wait``: ``end`` polls, and ``to`` posts to it, or closes if ``nbytes`` is -1, while it does, or before
#: with ``at`` 1. ``lay out``: slots, which all receivers open. ``move``: ``moves`` are filled, pushed and pulled, and held until
#: their slots are used again; with ``nbytes`` every end posts a message of so many bytes to its peers in the middle of it.
#: ``stall``: a move that only the ends in ``ends`` begin, and in the middle of which ``end`` closes. ``close``: ``end`` closes.
#: ``ticket``: receiver ``end`` is given a ticket that is damaged by ``how``. ``too large``: memory is asked for that no machine
#: has. ``update``: a whole update with ``send`` and ``receive``.
Do: TypeAlias = Literal["post", "take", "poll", "wait", "lay out", "move", "stall", "close", "ticket", "too large", "update"]
#: What is wrong with an update: its source raises at tensor ``at``; receiver ``to`` expects another plan; or it is interrupted
#: twice, so that its end is closed.
Fault: TypeAlias = Literal["", "source", "refuse", "dies"]
Into: TypeAlias = Literal["staged", "direct", "collected"]
Damage: TypeAlias = Literal["empty", "cut", "longer", "flipped", "more slots", "more bytes"]

SENDER: Final = -1
#: More than any machine has, and less than what a C long holds.
TOO_LARGE: Final = 1 << 60


def end_name(end: int) -> str:
    return "the sender" if end == SENDER else f"receiver {end}"


class Step(msgspec.Struct, frozen=True, omit_defaults=True):
    """One step. Ends are receivers by number, or -1 for the sender; ``seconds`` of a poll, -1 for as long as it takes."""

    do: Do
    end: int = SENDER
    to: int = 0
    nbytes: int = 0
    seconds: float = 0.0
    slots: int = 1
    moves: tuple[tuple[int, int], ...] = ()  # (slot, nbytes)
    ends: tuple[int, ...] = ()
    pull_first: bool = False
    how: Damage = "empty"
    fault: Fault = ""
    at: int = 0
    stream: bool = False

    def __str__(self) -> str:
        end, to = end_name(self.end), end_name(self.to)
        match self.do:
            case "post":
                return f"{end} posts {self.nbytes} bytes to {to}"
            case "take":
                return "all take what was posted"
            case "poll":
                return f"{end} polls for {self.seconds:g} s"
            case "wait":
                words = "for as long as it takes" if self.seconds < 0 else f"for {self.seconds:g} s"
                done = "closes" if self.nbytes < 0 else f"posts {self.nbytes} bytes"
                return f"{end} polls {words}, and {to} {done} {'before' if self.at else 'meanwhile'}"
            case "lay out":
                return f"lay out {self.slots} slots of {self.nbytes} bytes"
            case "move":
                words = " and ".join(f"{nbytes} bytes of slot {slot}" for slot, nbytes in self.moves)
                talk = f", and all post {self.nbytes} bytes meanwhile" if self.nbytes else ""
                return f"move {words}{', the pulls first' if self.pull_first else ''}{talk}"
            case "stall":
                begin = " and ".join(end_name(end) for end in self.ends) or "nobody"
                return f"{begin} begin{'' if len(self.ends) > 1 else 's'} to move slot 0, and {end} closes"
            case "close":
                return f"{end} closes"
            case "ticket":
                return f"{end} opens with {'a ticket that is ' if ' ' not in self.how else ''}{self.how}"
            case "too large":
                return f"lay out 2 slots of {TOO_LARGE} bytes"
            case "update":
                faults = {
                    "": "",
                    "source": f" whose source fails at tensor {self.at}",
                    "refuse": f" that {to} refuses",
                    "dies": f" in which {to} dies",
                }
                return f"{'stream' if self.stream else 'update'}{faults[self.fault]}"


class CarrierCase(msgspec.Struct, frozen=True, omit_defaults=True):
    """A program on the ends of one carrier. ``times``: made, used and closed so many times. ``sizes``: of the tensors of updates,
    which are float32, bfloat16 and uint8 in turn; they go in buckets of ``capacity`` bytes, in ``slots`` slots. ``into``: what each
    receiver loads into, the last for those that are left."""

    receivers: int = 1
    steps: tuple[Step, ...] = ()
    times: int = 1
    sizes: tuple[int, ...] = ()
    capacity: int = 64
    slots: int = 2
    into: tuple[Into, ...] = ("staged",)

    def __str__(self) -> str:
        words = [f"{self.receivers} receiver{'s' if self.receivers != 1 else ''}", *map(str, self.steps)]
        if any(step.do == "update" for step in self.steps):
            sizes = ", ".join(map(str, self.sizes)) or "no"
            words.insert(1, f"{sizes} elements in buckets of {self.capacity} bytes and {self.slots} slots, {', '.join(self.into)}")
        if self.times > 1:
            words.append(f"all of it {self.times} times")
        return "; ".join(words)
