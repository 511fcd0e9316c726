"""The receiving end of one update: what to fetch, load and apply, and when to give up.

    waiting -> examining -> streaming -> preparing -> ready -> applying -> done
        (any but applying) -> aborting -> done

The weight version advances only in ``applying``: after everything was verified and loaded, and the sender said ``Commit``
(clause T5).
"""

from __future__ import annotations

from typing import Literal, TypeAlias

import msgspec
from msgspec.structs import replace

from rollout_core.errors import TransferError
from rollout_core.transfer.protocol.line import BEATS, SILENCE, Line, Patience
from rollout_core.transfer.protocol.messages import (
    PROTOCOL,
    Abort,
    Aborted,
    Beat,
    Body,
    Cause,
    Commit,
    Committed,
    End,
    Envelope,
    Filled,
    Free,
    Hello,
    Ready,
    Welcome,
)
from rollout_core.transfer.protocol.steps import (
    Applied,
    Apply,
    Came,
    Done,
    Examine,
    Examined,
    Failed,
    Gone,
    Load,
    Loaded,
    Post,
    Prepare,
    Prepared,
    Pull,
    Pulled,
    ReceiverAction,
    ReceiverEvent,
    Tick,
)

Phase: TypeAlias = Literal["waiting", "examining", "streaming", "preparing", "ready", "applying", "aborting", "done"]
_ENDLESS = Patience(float("inf"), float("inf"))
_MAX_WAITING = 256  # messages kept until the Hello that they belong to


class Receiver(msgspec.Struct, frozen=True):
    """The state of a receiving end. ``step`` gives the next one, and what is to be done; nothing else changes it.

    ``wait_until``: when to stop waiting for an update to begin. ``deadline``: seconds from its beginning that it may take.
    """

    timeout: float
    wait_until: float
    deadline: float
    line: Line
    phase: Phase = "waiting"
    since: float = 0.0  # when this phase began
    early: tuple[Envelope, ...] = ()  # what came before the Hello
    attempt: int = 0
    hello: Hello | None = None
    patience: Patience = _ENDLESS  # from the Hello on
    held: tuple[Filled, ...] = ()  # announced, and not freed
    pulled: int = 0  # buckets whose bytes are here, or left where they are
    here: frozenset[int] = frozenset()  # which of those are still to be loaded: moves may be over in any order
    loading: bool = False
    loaded: int = 0
    announced: int = 0
    buckets: int | None = None  # of the whole update, once the sender said so
    cause: Cause | None = None
    drain_to: int | None = None  # while aborting: how many buckets the sender announced, once it said so

    @classmethod
    def new(cls, *, timeout: float, wait: float, deadline: float, now: float) -> Receiver:
        return cls(timeout, now + wait, deadline, Line(now, now), since=now)

    def step(self, event: ReceiverEvent, now: float) -> tuple[Receiver, tuple[ReceiverAction, ...]]:
        """The state after ``event`` at time ``now``, and what is to be done."""
        turn = _Turn(self, now)
        if self.phase != "done":
            turn.take(event)
            turn.advance()
        return turn.state, tuple(turn.actions)

    @property
    def wake_at(self) -> float:
        """When this end has to be ticked, unless something happens before."""
        beat = self.line.posted + self.beat
        match self.phase:
            case "done":
                return float("inf")
            case "waiting":
                return self.wait_until
            case "aborting":
                return min(beat, self.since + self.patience.drain)
            case "applying":  # the commit counts, whoever is silent
                return beat
        return min(beat, self.line.heard + self.silence, self.patience.until)

    @property
    def silence(self) -> float:
        """Seconds that the sender may say nothing. Before it has the ``Welcome`` it cannot know how long this end waits, and speaks
        as often as its own timeout asks for."""
        if self.phase == "examining" and self.hello is not None:
            return max(self.patience.silence, self.hello.timeout * SILENCE)
        return self.patience.silence

    @property
    def beat(self) -> float:
        """Seconds after which an end that has said nothing says that it is there."""
        return min(self.timeout, self.hello.timeout if self.hello else self.timeout) / BEATS


class _Turn:
    """One step in the making."""

    def __init__(self, state: Receiver, now: float) -> None:
        self.state = state
        self.now = now
        self.actions: list[ReceiverAction] = []

    def take(self, event: ReceiverEvent) -> None:
        """Note what happened."""
        state = self.state
        match event:
            case Came(envelope):
                self._came(envelope)
            case Gone(reason):
                self.state = replace(state, line=replace(state.line, cut=True))
                self._lost(reason)
            case Failed(cause):
                self._failed(cause)
            case Examined(version) if state.phase == "examining":
                self.state = replace(state, line=replace(state.line, heard=self.now))
                self._enter("streaming")
                self._post(Welcome(version, state.timeout))
            case Pulled(index):
                self.state = replace(state, pulled=state.pulled + 1, here=state.here | {index})
            case Loaded():
                self._loaded()
            case Prepared() if state.phase == "preparing":
                self._enter("ready")
                self._post(Ready())
            case Applied() if state.phase == "applying":
                assert state.hello is not None
                self._post(Committed(state.hello.version))
                self._finish(reusable=True)
            case Tick():
                self._look_at_the_clock()
            case Examined() | Prepared() | Applied():
                pass
            case _:
                raise AssertionError(f"no event of a receiver: {event}")

    def advance(self) -> None:
        """Do what has become possible."""
        state = self.state
        if state.phase == "streaming":
            if state.loaded == state.buckets:
                self._enter("preparing")
                self.actions.append(Prepare())
            elif not state.loading and state.loaded in state.here:
                self.state = replace(state, loading=True, here=state.here - {state.loaded})
                self.actions.append(Load(next(filled for filled in state.held if filled.index == state.loaded)))
        elif state.phase == "aborting" and self._is_drained():
            self._post(Aborted())
            self._finish(reusable=True)

    def _is_drained(self) -> bool:
        """Whether the sender knows that the update is given up, and nothing is under way here."""
        state = self.state
        if state.drain_to is None or state.loading:
            return False
        moving = state.hello is not None and state.hello.rendezvous
        return state.pulled >= state.drain_to if moving else state.pulled >= state.announced

    def _came(self, envelope: Envelope) -> None:
        state = self.state
        if state.phase == "waiting":
            return self._wait_for_hello(envelope)
        if envelope.attempt == state.attempt:  # else of an update that is over
            self._in_turn(envelope)
        return None

    def _wait_for_hello(self, envelope: Envelope) -> None:
        """Until it comes, messages may be its followers, out of order, or left over from an update before."""
        if not isinstance(envelope.body, Hello):
            self.state = replace(self.state, early=(*self.state.early, envelope)[-_MAX_WAITING:])
            return
        hello, early = envelope.body, self.state.early
        patience = Patience(self.state.timeout, self.now + self.state.deadline)
        self.state = replace(
            self.state, attempt=envelope.attempt, hello=hello, patience=patience, early=(), line=Line(self.now, self.now)
        )
        self._enter("examining")
        self._in_turn(envelope)
        for other in early:
            if other.attempt == envelope.attempt:
                self._in_turn(other)

    def _in_turn(self, envelope: Envelope) -> None:
        try:
            line, due = self.state.line.take(envelope.number, envelope.body, self.now)
        except TransferError as error:
            return self._failed(Cause("TransferError", f"the sender: {error}"))
        self.state = replace(self.state, line=line)
        for body in due:
            self._hear(body)
        return None

    def _hear(self, body: Body) -> None:
        """Take in a message whose turn it is."""
        state = self.state
        if state.phase == "applying":
            return  # the commit counts, whatever else is said
        match body:
            case Beat():
                pass
            case Abort(cause, announced):
                self._given_up(cause, announced)
            case Commit() if state.phase == "ready":
                assert state.hello is not None
                self._enter("applying")
                self.actions.append(Apply(state.hello.version))
            case Commit() if state.phase == "aborting":
                # The sender had committed before it heard that this end gave up: all was pulled by then.
                self.state = replace(state, drain_to=state.announced)
            case Hello(protocol) if state.phase == "examining" and state.line.next_in == 1:
                if protocol != PROTOCOL:
                    self._failed(Cause("TransferError", f"the sender speaks protocol {protocol}, this end {PROTOCOL}"))
                else:
                    self.actions.append(Examine(body))
            case Filled() if state.phase in ("streaming", "aborting") and state.buckets is None:
                self._announced(body)
            case End(buckets) if state.phase == "streaming" and state.buckets is None and buckets == state.announced:
                self.state = replace(state, buckets=buckets)
            case End() if state.phase == "aborting":
                pass
            case _:
                self._failed(Cause("TransferError", f"the sender said {_brief(body)} when it was not its turn"))

    def _announced(self, filled: Filled) -> None:
        """A bucket is in its slot. The sender lent the slot: if it is still in use here, it was written while it was read (T1)."""
        state, hello = self.state, self.state.hello
        assert hello is not None
        free = 0 <= filled.slot < hello.slots and all(filled.slot != other.slot for other in state.held)
        if filled.index != state.announced or not free or not 0 <= filled.nbytes <= hello.slot_nbytes:
            return self._failed(
                Cause("TransferError", f"the sender filled {_brief(filled)} with buckets {[f.index for f in state.held]} in use")
            )
        self.state = replace(state, held=(*state.held, filled), announced=state.announced + 1)
        if state.phase == "streaming" or hello.rendezvous:
            self.actions.append(Pull(filled.index, filled.slot, filled.nbytes))
        else:
            self.state = replace(self.state, pulled=self.state.pulled + 1)  # left where it is
        return None

    def _loaded(self) -> None:
        state = self.state
        self.state = replace(state, loading=False)
        if state.phase == "streaming":
            self.state = replace(self.state, loaded=state.loaded + 1, held=tuple(f for f in state.held if f.index != state.loaded))
            self._post(Free(state.loaded))

    def _given_up(self, cause: Cause, announced: int) -> None:
        """The sender has given the update up, by itself or because it was told."""
        self._blame(Cause(cause.kind, f"the sender gave the update up: {cause.message}", cause.trace))
        if self.state.phase != "aborting":
            self._enter("aborting")
        self.state = replace(self.state, drain_to=announced)

    def _failed(self, cause: Cause) -> None:
        """Something went wrong here."""
        self._blame(cause)
        if self.state.phase == "applying":  # too late to give up: the others may have applied
            self._post(Aborted(cause))
            self._finish(reusable=True)
        elif self.state.phase == "waiting":
            self._finish(reusable=True)
        elif self.state.phase != "aborting":
            self._enter("aborting")
            self._post(Abort(cause))

    def _lost(self, reason: str, *, tell: bool = False) -> None:
        """The sender will not be heard from again; ``tell`` it, should it be there after all. If it had said ``Commit`` before, the
        commit counts."""
        if self.state.phase == "applying":
            return
        where = {"waiting": "before an update began", "ready": "after all was sent, and before it said to commit"}
        when = where.get(self.state.phase, "in the middle of an update")
        cause = Cause("TransferError", f"the sender was lost {when}: {reason}")
        self._blame(cause)
        if tell:
            self._post(Abort(cause))
        self._finish(reusable=False)

    def _look_at_the_clock(self) -> None:
        """Only when told that time has passed, as at the sender."""
        state = self.state
        if state.phase == "waiting" and self.now >= state.wait_until:
            self._blame(Cause("TransferError", f"no update began within {self.now - state.since:.3g} s"))
            self._finish(reusable=True)
        elif state.phase == "aborting" and self.now >= state.since + state.patience.drain:
            self._finish(reusable=False)
        elif state.phase not in ("waiting", "aborting", "applying", "done"):
            if self.now >= state.line.heard + state.silence:
                self._lost(state.line.complaint(self.now), tell=True)
            elif self.now >= state.patience.until:
                self._failed(Cause("TransferError", f"the update was not complete at its deadline; {self._progress()}"))
        if self.state.phase not in ("waiting", "done") and self.now >= self.state.line.posted + self.state.beat:
            self._post(Beat())

    def _progress(self) -> str:
        state = self.state
        return f"it was {state.phase}, with {state.loaded} buckets loaded of {state.announced} that were announced"

    def _blame(self, cause: Cause) -> None:
        if self.state.cause is None:
            self.state = replace(self.state, cause=cause)

    def _enter(self, phase: Phase) -> None:
        self.state = replace(self.state, phase=phase, since=self.now)

    def _finish(self, *, reusable: bool) -> None:
        self._enter("done")
        self.actions.append(Done(self.state.cause, reusable and not self.state.line.cut))

    def _post(self, body: Body) -> None:
        line, envelope = self.state.line.say(self.state.attempt, body, self.now)
        self.state = replace(self.state, line=line)
        self.actions.append(Post(envelope))


def _brief(body: Body) -> str:
    """A message in a few words: a manifest may be long."""
    if isinstance(body, Filled):
        return f"bucket {body.index} ({body.nbytes} bytes) in slot {body.slot}"
    return type(body).__name__
