"""Runs one of the protocol's machines over an end of a carrier: the only place where an update meets clocks and memory.

One thread, nothing in the background: while a bucket is packed or loaded, no message is read and no sign of life given. A timeout
has to be longer than the longest of those.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from typing import Any, Final, Generic, Protocol, TypeVar

from rollout_core.errors import TransferError
from rollout_core.transfer.carriers.contract import Moving, ReceiverEnd, SenderEnd
from rollout_core.transfer.causes import cause_of, error_of
from rollout_core.transfer.protocol import wire
from rollout_core.transfer.protocol.messages import Beat, Body, Envelope, Filled, Free
from rollout_core.transfer.protocol.receiver import Receiver
from rollout_core.transfer.protocol.sender import Sender
from rollout_core.transfer.protocol.steps import Came, Done, Failed, Gone, Post, Tick
from rollout_core.transfer.report import Observe, Step

_OURS: Final = ("rollout_core.transfer.", "rollout_core.bucketing.")
#: Seconds: a move is looked at without a nap for so long, as that of a bucket within a GPU takes a fraction of a millisecond, and
#: a nap of any length at least 50 microseconds. Then naps begin.
_AWAKE: Final = 1e-3
_FIRST_NAP: Final = 50e-6
_LONGEST_NAP: Final = 1e-3


#: ``Sender`` or ``Receiver``.
Machine = TypeVar("Machine", Sender, Receiver)


class Hands(Protocol):
    """What an end can do. ``peers``: how many there are at the other side. ``do`` carries an action out and gives the events that
    answer it, or a move that is under way and what gives the event at its end. ``instead``: the events for an action that is of no
    use once the update is given up; None if it is to be done all the same."""

    @property
    def peers(self) -> int: ...
    def do(self, action: Any) -> list[Any] | tuple[Moving, Callable[[], Any]]: ...
    def instead(self, action: Any) -> list[Any] | None: ...
    def post(self, peer: int, message: bytes) -> None: ...
    def poll(self, seconds: float | None) -> list[tuple[int, bytes | TransferError]]: ...
    def end(self) -> None: ...


class Driver(Generic[Machine]):
    """One machine at work. ``error`` is what was raised at this end, if anything was."""

    def __init__(self, machine: Machine, hands: Hands, observe: Observe | None) -> None:
        self.machine: Machine = machine
        self.error: BaseException | None = None
        self._hands = hands
        self._observe = observe
        self._done: Done | None = None
        self._events: deque[Any] = deque()  # for the machine
        self._actions: deque[Any] = deque()  # what it asked for, not yet done or kept as work
        self._work: deque[Any] = deque()
        self._moving: deque[tuple[Moving, Callable[[], Any]]] = deque()
        self._inbox: deque[tuple[int, bytes | TransferError]] = deque()
        self._nap = 0.0
        self._awake_until = 0.0

    def update(self, carrier: SenderEnd | ReceiverEnd, first: Any = None, *, remark: Callable[[], str | None]) -> None:
        """``run``, and raise what it ended with, unless it ended well. A carrier that cannot be used again is closed. ``remark``:
        what has to be said of an update that failed, once it is over."""
        done = None
        left: list[Exception] = []  # what letting go raised
        try:
            done = self.run(first)
        finally:
            # An error behind the last message says that the other side is gone, and is not said again.
            if done is None or not done.reusable or any(isinstance(message, TransferError) for _, message in self._inbox):
                left += _attempt(carrier.close)
            left += _attempt(self._hands.end)
        error, self.error = self.error, None
        if error is None and done.cause is not None:
            error = error_of(done.cause, TransferError)
        if error is None and left:
            error = left.pop(0)
        if error is not None:
            for other in left:
                error.add_note(f"and letting go raised {type(other).__name__}: {other}")
            if (note := remark()) is not None:
                error.add_note(note)
            _forget(error)
            try:
                raise error
            finally:
                del error, left  # else its traceback holds it, and with it the carrier's memory

    def run(self, first: Any = None) -> Done:
        """Until the machine is done. A second KeyboardInterrupt, while the update is being given up, comes out at once."""
        if first is not None:
            self._guarded(lambda: self._feed(first))
        while self._done is None:
            self._guarded(self._turn)
        return self._done

    def _guarded(self, work: Callable[[], None]) -> None:
        try:
            work()
        except BaseException as error:
            self._fail(error)

    def _fail(self, error: BaseException) -> None:
        if self.error is not None and not isinstance(error, Exception):
            raise error
        self.error = self.error or error
        self._feed(Failed(cause_of(error)))

    def _turn(self) -> None:
        """Take in what has come, then do one thing."""
        left = max(0.0, self.machine.wake_at - time.monotonic())
        self._listen(0.0 if self._work else min(left, self._nap) if self._moving else left)
        self._settle()
        if self._done is None and self._work:
            self._carry_out(self._work.popleft())
        self._feed(Tick())

    def _carry_out(self, action: Any) -> None:
        instead = self._hands.instead(action)
        if instead is not None and self.machine.phase == "aborting":
            return self._feed(*instead)
        try:
            self._note(Step(type(action).__name__.lower(), getattr(action, "index", None)))
        except BaseException as error:
            self._fail(error)
            if instead is not None:
                return self._feed(*instead)
        try:
            result = self._hands.do(action)
        except BaseException as error:
            self._fail(error)
            return self._feed(*(instead or ()))
        if isinstance(result, tuple):
            self._moving.append(result)
            self._nap, self._awake_until = 0.0, time.monotonic() + _AWAKE
            result = []
        try:
            self._catch_up()
        finally:
            self._feed(*result)
        return None

    def _settle(self) -> None:
        """See what has been moved; moves end in the order in which they began."""
        while self._moving and self._done is None:
            moving, event = self._moving.popleft()
            if not moving():  # if it raises instead, it is over, and nobody asks it again
                self._moving.appendleft((moving, event))
                if time.monotonic() >= self._awake_until:
                    self._nap = min(max(_FIRST_NAP, 2 * self._nap), _LONGEST_NAP)
                return
            self._feed(event())

    def _catch_up(self) -> None:
        """Hear what came while this end was busy: that it did not listen is not the other's silence."""
        if self._done is None:
            self._listen(0.0)

    def _listen(self, seconds: float) -> None:
        self._inbox += self._heard(seconds)
        while self._inbox and self._done is None:  # kept if an observer raises: the next message is not to blame
            peer, message = self._inbox.popleft()
            if isinstance(message, TransferError):
                self._feed(Gone(str(message), peer))
                continue
            try:
                envelope = wire.decode(message)
            except TransferError as error:
                self._feed(Gone(f"it sent {error}", peer))
                continue
            self._feed(Came(envelope, peer))
            self._note_message("hear", envelope)

    def _heard(self, seconds: float) -> list[tuple[int, bytes | TransferError]]:
        """What came. An end of a carrier that cannot be asked, such as one that another thread closed, has lost everybody."""
        try:
            return self._hands.poll(None if seconds == float("inf") else seconds)
        except Exception as error:
            if not isinstance(error, TransferError):
                self._fail(error)
            time.sleep(min(seconds, _LONGEST_NAP))  # moves may still be under way, and are asked about
            return [(peer, TransferError(str(error))) for peer in range(self._hands.peers)]

    def _feed(self, *events: Any) -> None:
        """Tell the machine, post what it says, and keep the rest of what it asks for as work. What an interrupt leaves undone is
        done with the next events."""
        self._events += events
        posted: list[Envelope] = []
        while self._actions or self._events:
            if not self._actions:
                event = self._events.popleft()
                self.machine, actions = self.machine.step(event, time.monotonic())
                self._actions += actions
                continue
            action = self._actions.popleft()
            if isinstance(action, Done):
                self._done = action
            elif isinstance(action, Post):
                posted.append(action.envelope)
                try:
                    self._hands.post(action.peer, wire.encode(action.envelope))
                except TransferError as error:
                    self._events.append(Gone(str(error), action.peer))
            else:
                self._work.append(action)
        for envelope in posted:
            self._note_message("say", envelope)

    def _note_message(self, verb: str, envelope: Envelope) -> None:
        body: Body = envelope.body
        if not isinstance(body, Beat):
            self._note(Step(f"{verb} {type(body).__name__}", body.index if isinstance(body, Filled | Free) else None))

    def _note(self, step: Step) -> None:
        if self._observe is None:
            return
        try:
            self._observe(step)
        except Exception:
            if self.error is None and self._done is None:  # else the update is over, or given up for another reason
                raise


def _attempt(work: Callable[[], None]) -> list[Exception]:
    try:
        work()
    except Exception as error:
        return [error]
    return []


def _forget(error: BaseException) -> None:
    """Clear what this package's functions held when the error came through them: views of slots, for as long as it is kept."""
    seen: set[int] = set()
    todo: list[BaseException | None] = [error]
    while todo:
        one = todo.pop()
        if one is None or id(one) in seen:
            continue
        seen.add(id(one))
        todo += [one.__cause__, one.__context__]
        trace = one.__traceback__
        while trace is not None:
            if trace.tb_frame.f_globals.get("__name__", "").startswith(_OURS):
                with suppress(RuntimeError):  # still running
                    trace.tb_frame.clear()
            trace = trace.tb_next
