"""The sending end of one update, to any number of receivers: when to pack, move, commit, and when to give up.

    greeting -> streaming -> ending -> committing -> done
        (any of the first three) -> aborting -> done

Two phases, as in any atomic commit (Gray 1978): no receiver's version advances before all have said that they are ready. What
cannot be known, whether a receiver that vanished after ``Commit`` was sent has it, is reported as such and never as success.
"""

from __future__ import annotations

from typing import Literal, TypeAlias

import msgspec
from msgspec.structs import replace

from rollout_core.errors import TransferError
from rollout_core.transfer.protocol.line import BEATS, Line, Patience
from rollout_core.transfer.protocol.messages import (
    Abort,
    Aborted,
    Beat,
    Body,
    Cause,
    Commit,
    Committed,
    End,
    Filled,
    Free,
    Hello,
    Ready,
    Welcome,
)
from rollout_core.transfer.protocol.steps import (
    Begin,
    Came,
    Done,
    Failed,
    Gone,
    Pack,
    Packed,
    Post,
    Push,
    Pushed,
    SenderAction,
    SenderEvent,
    SourceEnded,
    Tick,
)

Phase: TypeAlias = Literal["new", "greeting", "streaming", "ending", "committing", "aborting", "done"]
#: Where a receiver is. The last four are final: it has nothing more to say in this update.
Standing: TypeAlias = Literal["greeted", "streaming", "ready", "committed", "aborted", "gone", "silent"]
_FINAL = ("committed", "aborted", "gone", "silent")


class Peer(msgspec.Struct, frozen=True):
    """A receiver. ``holds``: the buckets that it was told of and has not freed. ``version``: of its weights at the start."""

    line: Line
    standing: Standing = "greeted"
    holds: frozenset[int] = frozenset()
    version: int = 0
    timeout: float = float("inf")

    @property
    def is_final(self) -> bool:
        return self.standing in _FINAL


class Slot(msgspec.Struct, frozen=True):
    """``index``: the bucket in it, None if it is free. ``pushed``: whether this end has done its part in moving it."""

    index: int | None = None
    pushed: bool = False


class Sender(msgspec.Struct, frozen=True):
    """The state of a sending end. ``step`` gives the next one, and what is to be done; nothing else changes it."""

    attempt: int
    hello: Hello
    patience: Patience
    peers: tuple[Peer, ...]
    slots: tuple[Slot, ...]
    phase: Phase = "new"
    since: float = 0.0  # when this phase began
    packing: int | None = None  # the slot being filled
    packed: int = 0
    filled: tuple[Filled, ...] = ()  # packed, and still in their slots
    announced: int = 0
    exhausted: bool = False
    cause: Cause | None = None

    @classmethod
    def new(cls, attempt: int, hello: Hello, patience: Patience, receivers: int, now: float) -> Sender:
        peers = tuple(Peer(Line(now, now)) for _ in range(receivers))
        return cls(attempt, hello, patience, peers, (Slot(),) * hello.slots, since=now)

    def step(self, event: SenderEvent, now: float) -> tuple[Sender, tuple[SenderAction, ...]]:
        """The state after ``event`` at time ``now``, and what is to be done."""
        turn = _Turn(self, now)
        if self.phase != "done":
            turn.take(event)
            turn.advance()
        return turn.state, tuple(turn.actions)

    @property
    def wake_at(self) -> float:
        """When this end has to be ticked, unless something happens before."""
        if self.phase == "done":
            return float("inf")
        live = [peer for peer in self.peers if not peer.is_final]
        times = [peer.line.posted + self.beat for peer in live]
        if self.phase == "aborting":
            times.append(self.since + self.patience.drain)
        else:
            times += [peer.line.heard + self.patience.silence for peer in live]
            times.append(self.patience.until)
        return min(times, default=float("inf"))

    @property
    def beat(self) -> float:
        """Seconds after which an end that has said nothing says that it is there."""
        return min((self.patience.timeout, *(peer.timeout for peer in self.peers))) / BEATS


class _Turn:
    """One step in the making."""

    def __init__(self, state: Sender, now: float) -> None:
        self.state = state
        self.now = now
        self.actions: list[SenderAction] = []

    def take(self, event: SenderEvent) -> None:
        """Note what happened."""
        match event:
            case Begin():
                self._enter("greeting")
                self._post_all(self.state.hello)
            case Came(envelope, place):
                if envelope.attempt == self.state.attempt:  # else of an update that is over
                    self._came(place, envelope.number, envelope.body)
            case Gone(reason, place):
                peer = self.state.peers[place]
                self._set(place, replace(peer, line=replace(peer.line, cut=True)))
                self._lost(place, "gone", reason)
            case Failed(cause):
                self._fail(cause)
            case Packed(filled):
                self._packed(filled)
            case SourceEnded():
                self.state = replace(self.state, packing=None, exhausted=True)
            case Pushed(index, digest):
                self._pushed(index, digest)
            case Tick():
                self._look_at_the_clock()
            case _:
                raise AssertionError(f"no event of a sender: {event}")

    def advance(self) -> None:
        """Do what has become possible."""
        state = self.state
        live = [peer for peer in state.peers if not peer.is_final]
        if state.phase == "greeting" and all(peer.standing == "streaming" for peer in state.peers):
            self._enter("streaming")
        if self.state.phase == "streaming":
            self._stream()
        if self.state.phase == "ending" and all(peer.standing == "ready" for peer in state.peers):
            self._enter("committing")
            self._post_all(Commit())
        if (self.state.phase == "committing" and not live) or (
            self.state.phase == "aborting" and not (live or self._is_pushing() or state.packing is not None)
        ):
            self._finish()

    def _stream(self) -> None:
        free = [place for place, slot in enumerate(self.state.slots) if slot.index is None]
        if self.state.exhausted and not self._is_pushing():
            self._enter("ending")
            self._post_all(End(self.state.packed))
        elif free and self.state.packing is None and not self.state.exhausted:
            self.state = replace(self.state, packing=free[0])
            self.actions.append(Pack(self.state.packed, free[0]))

    def _packed(self, filled: Filled) -> None:
        state = self.state
        self.state = replace(state, packing=None)
        if state.phase != "streaming":
            return  # given up while it was packed: it is not announced, and nobody will read it
        slots = _put(state.slots, filled.slot, Slot(filled.index))
        self.state = replace(self.state, packed=state.packed + 1, filled=(*state.filled, filled), slots=slots)
        if state.hello.rendezvous:
            self._announce(filled)
        self.actions.append(Push(filled.index, filled.slot, filled.nbytes))

    def _pushed(self, index: int, digest: bytes | None) -> None:
        filled = next(filled for filled in self.state.filled if filled.index == index)
        if digest is not None:
            sealed = replace(filled, digest=digest)
            rest = tuple(sealed if other is filled else other for other in self.state.filled)
            self.state, filled = replace(self.state, filled=rest), sealed
        self.state = replace(self.state, slots=_put(self.state.slots, filled.slot, Slot(index, pushed=True)))
        if not self.state.hello.rendezvous and self.state.phase == "streaming":
            for other in self.state.filled:  # in their order, whichever move was over first
                if other.index == self.state.announced and self.state.slots[other.slot].pushed:
                    self._announce(other)
                    self._vacate(other)
        else:
            self._vacate(filled)

    def _announce(self, filled: Filled) -> None:
        """From here on the receivers read the slot."""
        self.state = replace(self.state, announced=self.state.announced + 1)
        for place, peer in enumerate(self.state.peers):
            self._set(place, replace(peer, holds=peer.holds | {filled.index}))
            self._post(place, filled)

    def _vacate(self, filled: Filled) -> None:
        """Take a slot back once nobody has anything to do with it (clause T1)."""
        state = self.state
        if state.slots[filled.slot].pushed and not any(filled.index in peer.holds for peer in state.peers):
            rest = tuple(other for other in state.filled if other is not filled)
            self.state = replace(state, filled=rest, slots=_put(state.slots, filled.slot, Slot()))

    def _came(self, place: int, number: int, body: Body) -> None:
        peer = self.state.peers[place]
        if peer.is_final:
            return None
        try:
            line, due = peer.line.take(number, body, self.now)
        except TransferError as error:
            return self._fail(Cause("TransferError", f"{self._name(place)}: {error}"))
        self._set(place, replace(peer, line=line))
        for message in due:
            if not self.state.peers[place].is_final:
                self._hear(place, message)
        return None

    def _hear(self, place: int, body: Body) -> None:
        """Take in a message whose turn it is."""
        state, peer = self.state, self.state.peers[place]
        match body:
            case Beat():
                pass
            case Abort(cause):  # after Commit: it gave up before it heard of that, and keeps to it
                self._fail(self._from(place, cause))
            case Aborted(cause) if state.phase in ("committing", "aborting"):
                self._set(place, replace(peer, standing="aborted"))
                self._blame(self._from(place, cause or Cause("TransferError", "gave the update up")))
            case _ if state.phase == "aborting":
                pass  # said before it heard of the abort
            case Welcome(version, timeout) if peer.standing == "greeted":
                self._set(place, replace(peer, standing="streaming", version=version, timeout=timeout))
            case Free(index) if index in peer.holds:
                self._set(place, replace(peer, holds=peer.holds - {index}))
                self._vacate(next(filled for filled in state.filled if filled.index == index))
            case Ready() if state.phase == "ending" and peer.standing == "streaming" and not peer.holds:
                self._set(place, replace(peer, standing="ready"))
            case Committed(version) if state.phase == "committing" and version == state.hello.version:
                self._set(place, replace(peer, standing="committed"))
            case _:
                self._fail(Cause("TransferError", f"{self._name(place)} said {body} when it was not its turn"))

    def _look_at_the_clock(self) -> None:
        """Only when told that time has passed: before that, what has come is heard, and nobody's silence is this end's own."""
        state = self.state
        if state.phase == "aborting":
            if self.now >= state.since + state.patience.drain:
                return self._finish()
        else:
            for place, peer in enumerate(state.peers):
                if not peer.is_final and self.now >= peer.line.heard + state.patience.silence:
                    hint = "; is it in receive()?" if peer.standing == "greeted" and not peer.line.early else ""
                    self._lost(place, "silent", peer.line.complaint(self.now) + hint)
            if self.now >= state.patience.until:
                self._overdue()
        for place, peer in enumerate(self.state.peers):
            if not peer.is_final and self.now >= peer.line.posted + state.beat:
                self._post(place, Beat())
        return None

    def _overdue(self) -> None:
        waiting = [place for place, peer in enumerate(self.state.peers) if not peer.is_final]
        if self.state.phase == "committing":
            for place in waiting:
                self._lost(place, "silent", "not heard from before the deadline")
        else:
            self._fail(Cause("TransferError", f"the update was not complete at its deadline; {self._present()}"))

    def _lost(self, place: int, standing: Standing, reason: str) -> None:
        """A receiver will not be heard from again."""
        peer = self.state.peers[place]
        if peer.is_final:
            return
        self._set(place, replace(peer, standing=standing, holds=frozenset()))
        doubt = "; it was told to commit, and nobody can know here whether it did" if self.state.phase == "committing" else ""
        cause = Cause("TransferError", f"{self._name(place)}: {reason}{doubt}")
        if self.state.phase == "committing":
            self._blame(cause)
        else:
            self._fail(cause)

    def _blame(self, cause: Cause) -> None:
        if self.state.cause is None:
            self.state = replace(self.state, cause=cause)

    def _fail(self, cause: Cause) -> None:
        """Give the update up. After ``Commit`` it cannot be: the receivers that have it keep it."""
        self._blame(cause)
        if self.state.phase in ("committing", "aborting", "done"):
            return
        self._enter("aborting")
        assert self.state.cause is not None
        for place, peer in enumerate(self.state.peers):
            if peer.standing != "gone":
                self._post(place, Abort(self.state.cause, self.state.announced))

    def _finish(self) -> None:
        quiet = not self._is_pushing() and self.state.packing is None
        reusable = quiet and all(peer.standing in ("committed", "aborted") and not peer.line.cut for peer in self.state.peers)
        self._enter("done")
        self.actions.append(Done(self.state.cause, reusable))

    def _is_pushing(self) -> bool:
        return any(slot.index is not None and not slot.pushed for slot in self.state.slots)

    def _enter(self, phase: Phase) -> None:
        self.state = replace(self.state, phase=phase, since=self.now)

    def _set(self, place: int, peer: Peer) -> None:
        self.state = replace(self.state, peers=_put(self.state.peers, place, peer))

    def _post(self, place: int, body: Body) -> None:
        peer = self.state.peers[place]
        line, envelope = peer.line.say(self.state.attempt, body, self.now)
        self._set(place, replace(peer, line=line))
        self.actions.append(Post(envelope, place))

    def _post_all(self, body: Body) -> None:
        for place in range(len(self.state.peers)):
            self._post(place, body)

    def _from(self, place: int, cause: Cause) -> Cause:
        return Cause(cause.kind, f"{self._name(place)}: {cause.message}", cause.trace)

    def _name(self, place: int) -> str:
        return "the receiver" if len(self.state.peers) == 1 else f"receiver {place}"

    def _present(self) -> str:
        return f"it was {self.state.phase}, with {self.state.packed} buckets packed"


def _put(items: tuple, place: int, item: object) -> tuple:  # type: ignore[type-arg]
    return (*items[:place], item, *items[place + 1 :])
