"""A carrier under test: a callable ``make(receivers)`` that gives the sender's end and a list of the receivers' ends.

The ends do what ``rollout_core.transfer.carriers.contract`` says, all in this process, each used by a thread of its own. ``make``
may be a function, a class, an instance, or a class without arguments whose instances are called. Its parameter is named
``receivers``; by that it is known from other subjects. It may have

- ``capabilities``: a set of claims (``CARRIER_CAPABILITIES``);

and what an end's attributes show (``rendezvous``) is found by itself.
"""

from __future__ import annotations

import inspect
import queue
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from contextlib import suppress
from functools import cached_property
from typing import Any, Final, Generic, TypeVar

from rollout_core.errors import TransferError
from rollout_core.testing.carrier_cases import SENDER, end_name
from rollout_core.testing.packers import Phase, Raised, calling, name_of
from rollout_core.testing.registry import Skipped, Violation

#: What a carrier may be. A claim has to be declared in ``capabilities``; what is found is found by itself.
CARRIER_CAPABILITIES: Final[dict[str, str]] = {
    "rendezvous": "found: the sender's end has rendezvous = True, and each push is met by a pull of every receiver",
    "lends": "found: the sender's end has rendezvous = False, and what was pushed is read as long as the slot is lent",
    "several": "found: the carrier does not claim to be single",
    "single": "claim: make takes one receiver and no more; what takes several is skipped",
}
_CLAIMS: Final = ("single",)
_SENDER: Final = ("lay_out", "post", "poll", "push", "close")
_RECEIVER: Final = ("open", "post", "poll", "pull", "view", "close")

#: Seconds in which a call returns that waits for nobody.
LIMIT: Final = 1.5
_CLOSING: Final = 0.5  # seconds for an end that is of no interest any more

T = TypeVar("T")


class CarrierUnderTest:
    """A kind of carrier as the checks call it: ``make(receivers)`` makes one."""

    def __init__(self, make: Any, phase: Phase | None = None) -> None:
        if inspect.isclass(make) and not _takes_receivers(make):
            make = make()
        if not callable(make):
            raise TypeError(
                f"{name_of(make)} cannot be called; a carrier under test is make(receivers), which gives the sender's end and a "
                "list of the receivers' ends (rollout_core.transfer.carriers.contract says what they do)"
            )
        self._make = make
        self.phase = phase or Phase()
        self._claims = _claims_of(make)

    @cached_property
    def capabilities(self) -> frozenset[str]:
        """What it claims, and what a carrier for one receiver shows."""
        ends = self.make(1)
        found = {"rendezvous" if ends[SENDER].it.rendezvous else "lends"}
        for end in ends.values():
            end.abandon()
        if "single" not in self._claims:
            found.add("several")
        return self._claims | found

    def make(self, receivers: int) -> dict[int, End[Any]]:
        """The ends of a new carrier, the sender's as -1; ``Violation`` for what are no such ends."""
        with calling(self.phase, "making the carrier"):
            made = self._make(receivers)
        try:
            sender, others = made
            others = list(others)
        except (TypeError, ValueError) as error:
            raise Violation(f"make({receivers}) gave {name_of(made)}, not a sender's end and a list of receivers' ends") from error
        for name, end, methods in [
            ("the sender's end", sender, _SENDER),
            *((f"receiver {i}", r, _RECEIVER) for i, r in enumerate(others)),
        ]:
            for method in methods:
                if not callable(getattr(end, method, None)):
                    raise Violation(f"{name} is {name_of(end)}, which has no method {method}")
            for attribute in ("version", "receivers", "rendezvous") if end is sender else ("version",):
                if not hasattr(end, attribute):
                    raise Violation(f"{name} is {name_of(end)}, which has no attribute {attribute}")
            if end.version != 0:
                raise Violation(f"{name} has version {end.version!r}; it is 0 before the first update")
        if len(others) != receivers or sender.receivers != receivers:
            raise Violation(
                f"make({receivers}) gave {len(others)} receivers' ends, and a sender's end with receivers = {sender.receivers!r}"
            )
        if type(sender.rendezvous) is not bool:
            raise Violation(f"rendezvous is {sender.rendezvous!r}; it is True or False")
        return {place: End(end, end_name(place), self.phase) for place, end in enumerate([sender, *others], SENDER)}


class End(Generic[T]):
    """One end of a carrier, and the thread that it serves. Every call is noted; every exception becomes ``Raised``."""

    def __init__(self, it: T, name: str, phase: Phase) -> None:
        self.it = it
        self.name = name
        self._phase = phase
        self._calls: queue.SimpleQueue[tuple[str, Callable[[], Any], Future[Any]] | None] = queue.SimpleQueue()
        self.thread = threading.Thread(target=self._serve, name=f"end of {name}", daemon=True)
        self.thread.start()

    def begin(self, what: str, call: Callable[[], Any]) -> Future[Any]:
        """Have this end's thread make a call, after those that it is asked for already."""
        future: Future[Any] = Future()
        self._calls.put((what, call, future))
        return future

    def end(self, what: str, future: Future[Any], within: float = LIMIT) -> Any:
        """What came of a call; ``Violation`` if it does not return in time, ``Raised`` if it raised."""
        try:
            return future.result(within)
        except TimeoutError:
            if future.done():  # it raised one
                raise
            raise Violation(f"{self.name}: {what} had not returned after {within:g} s") from None

    def do(self, what: str, call: Callable[[], Any], within: float = LIMIT) -> Any:
        self._phase.set(f"{self.name}: {what}")
        try:
            return self.end(what, self.begin(what, call), within)
        finally:
            self._phase.set("")

    def abandon(self) -> None:
        """Close the end, wherever it hangs, and let go of it."""
        closing = threading.Thread(target=_quietly, args=(self.it,), daemon=True)
        closing.start()
        closing.join(_CLOSING)
        self.leave()

    def leave(self) -> None:
        """End the thread, if it is in no call; one that hangs is left behind."""
        self._calls.put(None)
        self.thread.join(0.1)

    def _serve(self) -> None:
        while (item := self._calls.get()) is not None:
            what, call, future = item
            try:
                future.set_result(call())
            except (Violation, Skipped, TransferError) as error:
                future.set_exception(error)
            except BaseException as error:
                raised = Raised(f"{self.name}: {what}", error)
                raised.__cause__ = error
                future.set_exception(raised)
            del item, what, call, future  # what they refer to, such as a view of a slot


def _quietly(end: Any) -> None:
    with suppress(BaseException):
        end.close()


def looks_like_a_carrier(target: Any) -> bool:
    """Whether a target is meant for the checks of carriers: it, or an instance of it, takes ``receivers``."""
    if not callable(target):
        return False
    own = [vars(base).get("__call__") for base in target.__mro__] if inspect.isclass(target) else []
    return _takes_receivers(target) or any(_takes_receivers(call) for call in own)


def _takes_receivers(target: Any) -> bool:
    try:
        return "receivers" in inspect.signature(target).parameters
    except (TypeError, ValueError):
        return False


def _claims_of(make: Any) -> frozenset[str]:
    declared: Any = getattr(make, "capabilities", frozenset())
    if isinstance(declared, str) or not isinstance(declared, Iterable):
        raise TypeError(f"capabilities is {declared!r}; it is a set of names, for example {{'single'}}")
    claims = frozenset(declared)
    unknown = sorted(claims - set(_CLAIMS))
    if unknown:
        raise TypeError(f"capabilities has {unknown[0]!r}; a carrier may claim {', '.join(_CLAIMS)}")
    return claims
