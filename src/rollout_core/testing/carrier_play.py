"""Plays a program of steps on the ends of a carrier, beside a model of what each end has to hear, hold and read."""

from __future__ import annotations

import ctypes
import threading
import time
from collections import defaultdict, deque
from collections.abc import Callable, Collection
from contextlib import suppress
from functools import lru_cache, partial
from typing import Any, Final

import torch

from rollout_core.errors import TransferError
from rollout_core.testing.carrier_cases import SENDER, TOO_LARGE, CarrierCase, Step, end_name
from rollout_core.testing.carriers import LIMIT, CarrierUnderTest
from rollout_core.testing.packers import Raised, name_of
from rollout_core.testing.registry import Violation

#: Seconds that a call may take beyond what it was told to.
MARGIN: Final = 0.5
#: A message of so many bytes arrives even if its sender closes at once; of longer ones a part may still lie with it.
_SMALL: Final = 1024
_TRIES: Final = 3  # of a poll that took too long: another process may have had the processor
_POLL: Final = 0.005  # seconds, of ends that poll until everything has come


def pattern(seed: int, nbytes: int) -> bytes:
    """Bytes in which neighbours differ, and patterns of other seeds at every place."""
    return (
        _whole_pattern(seed % 251)[:nbytes] if nbytes <= _WHOLE else (_whole_pattern(seed % 251) * (nbytes // _WHOLE + 1))[:nbytes]
    )


_WHOLE: Final = (1 << 20) + 64


@lru_cache(maxsize=32)
def _whole_pattern(seed: int) -> bytes:
    places = torch.arange(_WHOLE, dtype=torch.int64)
    return bytes(((places * 37 + places // 256 + seed) % 251).to(torch.uint8).numpy())


def raw(tensor: torch.Tensor) -> bytes:
    """The bytes of a 1-d contiguous uint8 tensor, out of its memory."""
    tensor = tensor.detach().cpu()
    return ctypes.string_at(tensor.data_ptr(), tensor.numel()) if tensor.numel() else b""


class Play:
    """One carrier, and the model of it. ``run`` plays a case; whatever happens, every end is closed after it."""

    def __init__(self, subject: CarrierUnderTest, case: CarrierCase) -> None:
        self.case = case
        self.ends = subject.make(case.receivers)
        self.closed: set[int] = set()
        self.rendezvous: bool = self.ends[SENDER].it.rendezvous
        self._lock = threading.RLock()
        self._said: dict[tuple[int, int], list[bytes]] = defaultdict(list)  # (from, to) -> messages
        self._heard: dict[tuple[int, int], int] = defaultdict(int)
        self._lost: set[tuple[int, int]] = set()  # (from, to): ``to`` has been told that ``from`` is gone
        self._refused: set[tuple[int, int]] = set()  # (from, to): posting to ``from`` has told ``to`` that it is gone
        self._slots: list[torch.Tensor] = []
        self._held: dict[tuple[int, int], tuple[torch.Tensor, bytes]] = {}  # (receiver, slot) -> what it reads, and should
        self._moving: dict[int, deque[Callable[[], bool]]] = defaultdict(deque)
        self._moves = 0

    @property
    def receivers(self) -> range:
        return range(self.case.receivers)

    @property
    def live(self) -> list[int]:
        return [place for place in self.ends if place not in self.closed]

    def run(self) -> None:
        """``Violation`` where an end does something else than the model."""
        try:
            for step in self.case.steps:
                self.play(step)
            self.finish()
        finally:
            self._abandon()

    def play(self, step: Step) -> None:
        match step.do:
            case "post":
                self.post(step.end, step.to, step.nbytes)
            case "take":
                self.take()
            case "poll":
                self.poll(step.end, step.seconds)
            case "wait":
                self.wait(step)
            case "lay out":
                self.lay_out(step.slots, step.nbytes)
            case "too large":
                self.lay_out_too_much()
            case "ticket":
                self.open_damaged(step)
            case "move":
                self.move(step)
            case "stall":
                self.stall(step)
            case "close":
                self.close(step.end)
            case "update":
                raise AssertionError("updates are played by carrier_updates")
        self._require_held(f"after {step}")

    def finish(self) -> None:
        """Take what is left, see that no more comes, and close."""
        if self.live:
            self.take()
        for place in self.live:
            self._do(place, "poll(0)", partial(self._poll, place, 0.0))
        for place in self.live:
            self.close(place)

    # Messages.

    def post(self, end: int, to: int, nbytes: int) -> None:
        if end == to or (SENDER not in (end, to)):
            return
        message = pattern(len(self._said[end, to]) + 7 * end + 13 * to, nbytes)
        it = self.ends[end].it
        call = partial(it.post, to, message) if end == SENDER else partial(it.post, message)
        words = f"post of {nbytes} bytes" + (f" to {end_name(to)}" if end == SENDER else "")
        try:
            with self._lock:
                self._said[end, to].append(message)  # before it can be heard
            self._do(end, words, call, refusal=True)
        except TransferError as error:
            self._said[end, to].pop()
            if end in self.closed:
                return
            if to not in self.closed:
                raise Raised(f"{end_name(end)}: {words}", error) from error
            self._refused.add((to, end))
        else:
            if end in self.closed:
                raise Violation(f"{end_name(end)} is closed, and its {words} raised no TransferError")
            if to in self.closed:
                self._said[end, to].pop()

    def take(self) -> None:
        """All ends poll until everything has come that was posted, and every close was told."""
        stop = threading.Event()

        def pump(place: int) -> None:
            try:
                while not stop.is_set():
                    self._poll(place, _POLL)
                    self._ask_stalled(place)
                    if self._is_all_there():
                        stop.set()
            except BaseException:
                stop.set()
                raise

        calls = {place: self.ends[place].begin("poll", partial(pump, place)) for place in self.live}
        stop.wait(LIMIT)
        stop.set()
        for place, call in calls.items():
            self._end(place, "poll", call)
        if not self._is_all_there():
            raise Violation(self._missing())

    def poll(self, end: int, seconds: float) -> None:
        """Where nothing is due."""
        if end in self.closed:
            return
        for _ in range(_TRIES):
            began = time.monotonic()
            self._do(end, f"poll({seconds:g})", partial(self._poll, end, seconds), within=seconds + 2 * LIMIT)
            if time.monotonic() - began <= seconds + MARGIN:
                return
        raise Violation(f"{end_name(end)}: poll({seconds:g}) took more than {seconds + MARGIN:g} s where nothing came")

    def wait(self, step: Step) -> None:
        """A poll that something ends."""
        end, to = step.end, step.to
        if {end, to} & self.closed or SENDER not in (end, to) or end == to:
            return
        self.take()  # what comes is then what this step posts
        seconds = None if step.seconds < 0 else step.seconds
        words = f"poll({'None' if seconds is None else f'{seconds:g}'})"

        def act() -> None:
            self.close(to) if step.nbytes < 0 else self.post(to, end, step.nbytes)

        if step.at:
            act()
            time.sleep(0.02)  # until it is there
        call = self.ends[end].begin(words, partial(self._until_heard, end, seconds))
        if not step.at:
            time.sleep(0.02)  # until it waits
            act()
        what = "closed" if step.nbytes < 0 else "posted"
        try:
            heard = self.ends[end].end(words, call, MARGIN)
        except Violation as violation:
            if isinstance(violation, Raised) or call.done():
                raise
            raise Violation(f"{end_name(end)}: {words} had not returned {MARGIN:g} s after {end_name(to)} {what}") from None
        if not heard:
            raise Violation(f"{end_name(end)}: {words} found nothing, and {end_name(to)} had {what}")

    # Slots.

    def lay_out(self, slots: int, nbytes: int) -> None:
        if self.closed:
            return
        ticket = self._lay_out(slots, nbytes)
        for place in self.receivers:
            self._do(place, "open", partial(self.ends[place].it.open, ticket, slots, nbytes))

    def lay_out_too_much(self) -> None:
        if SENDER in self.closed:
            return
        self._forget_slots()
        try:
            found = self._do(SENDER, "lay_out", partial(self.ends[SENDER].it.lay_out, 2, TOO_LARGE), refusal=True)
        except TransferError:
            return
        raise Violation(f"lay_out of 2 slots of {TOO_LARGE} bytes gave {name_of(found)}; no machine has them")

    def open_damaged(self, step: Step) -> None:
        """Refused with a TransferError, or not needed."""
        if self.closed:
            return
        ticket = self._lay_out(step.slots, step.nbytes)
        damaged = {
            "empty": b"",
            "cut": ticket[: len(ticket) // 2],
            "longer": ticket + b"\0",
            "flipped": bytes([ticket[0] ^ 0xFF]) + ticket[1:] if ticket else b"\xff",
        }.get(step.how, ticket)
        slots, nbytes = step.slots + (step.how == "more slots"), step.nbytes + (1 << 16) * (step.how == "more bytes")
        for place in self.receivers:
            if place != step.end:
                self._do(place, "open", partial(self.ends[place].it.open, ticket, step.slots, step.nbytes))
                continue
            with suppress(TransferError):
                self._do(place, "open", partial(self.ends[place].it.open, damaged, slots, nbytes), refusal=True)

    def move(self, step: Step) -> None:
        if self.closed or not self._slots:
            return
        moves = list({slot % len(self._slots): nbytes for slot, nbytes in step.moves}.items())
        moves = [(slot, min(nbytes, self._slots[slot].numel())) for slot, nbytes in moves]
        sent = {slot: self._fill(slot, nbytes) for slot, nbytes in moves}
        if self.rendezvous:
            for place in sorted(self.ends, reverse=step.pull_first):
                for slot, nbytes in moves:
                    self._begin_move(place, slot, nbytes)
        else:
            for slot, nbytes in moves:
                self._begin_move(SENDER, slot, nbytes)
                self._settle([SENDER])  # a receiver is told of a slot after that
            for place in self.receivers:
                for slot, nbytes in moves:
                    self._begin_move(place, slot, nbytes)
        if step.nbytes:
            for place in self.receivers:
                self.post(SENDER, place, step.nbytes)
                self.post(place, SENDER, step.nbytes)
        self._settle([place for place in self.ends if self._moving[place]])
        for place in self.receivers:
            for slot, nbytes in moves:
                self._look(place, slot, nbytes, sent[slot])

    def stall(self, step: Step) -> None:
        """A move that not all begin, and in which one closes."""
        if self.closed or not self._slots:
            return
        nbytes = self._slots[0].numel()
        self._fill(0, nbytes)
        begins = sorted(step.ends)
        if not self.rendezvous and SENDER not in begins:
            begins = []
        for place in begins:
            self._begin_move(place, 0, nbytes)
            if place == SENDER and not self.rendezvous:
                self._settle([SENDER])
        self.close(step.end)
        self.take()

    # Ends.

    def close(self, end: int) -> None:
        words = "a second close" if end in self.closed else "close"
        if end == SENDER:
            self._slots = []
        for key in [key for key in self._held if key[0] == end]:
            del self._held[key]  # read no more
        self._moving.pop(end, None)
        with self._lock:
            self.closed.add(end)
        self._do(end, words, self.ends[end].it.close)

    def _abandon(self) -> None:
        """Close what is still open, wherever it hangs, and let go of all."""
        self._forget_slots()
        self._moving.clear()
        for place, end in self.ends.items():
            if place in self.closed:
                end.leave()
            else:
                self.closed.add(place)
                end.abandon()

    def _do(self, place: int, words: str, call: Callable[[], Any], *, refusal: bool = False, within: float = LIMIT) -> Any:
        """What a call on an end's thread gives. Its ``TransferError`` comes out if a ``refusal`` is allowed."""
        try:
            return self.ends[place].do(words, call, within)
        except TransferError as error:
            if refusal:
                raise
            raise Raised(f"{end_name(place)}: {words}", error) from error

    def _end(self, place: int, words: str, call: Any) -> None:
        try:
            self.ends[place].end(words, call)
        except TransferError as error:
            raise Raised(f"{end_name(place)}: {words}", error) from error

    # The model of messages.

    def _poll(self, place: int, seconds: float | None) -> int:
        """Poll on this end's thread, and compare what comes with the model; how many things came."""
        found = self.ends[place].it.poll(seconds)
        if not isinstance(found, list):
            raise Violation(f"{end_name(place)}: poll gave {name_of(found)}, not a list")
        for item in found:
            if place != SENDER:
                self._hear(SENDER, place, item)
            elif isinstance(item, tuple) and len(item) == 2 and item[0] in self.receivers:
                self._hear(item[0], SENDER, item[1])
            else:
                raise Violation(f"the sender: poll gave {item!r:.80}, not (receiver, message)")
        return len(found)

    def _until_heard(self, place: int, seconds: float | None) -> bool:
        deadline = None if seconds is None else time.monotonic() + seconds
        while True:
            left = None if deadline is None else max(0.0, deadline - time.monotonic())
            if self._poll(place, left):
                return True
            if deadline is not None and time.monotonic() >= deadline:
                return False

    def _hear(self, teller: int, place: int, item: Any) -> None:
        who, whom = end_name(place), end_name(teller)
        with self._lock:
            if (teller, place) in self._lost:
                again = "so again" if isinstance(item, TransferError) else f"a message of {len(item)} bytes"
                raise Violation(f"{who}: poll said that {whom} is gone, and after that {again}")
            if isinstance(item, TransferError):
                if teller not in self.closed:
                    raise Violation(f"{who}: poll gave {type(item).__name__}: {item}, and {whom} is there")
                missing = len(self._said[teller, place]) - self._heard[teller, place]
                if missing and not self._may_be_cut(teller, place):
                    raise Violation(
                        f"{who}: poll said that {whom} is gone before the last {missing} of the messages that it had posted"
                    )
                self._lost.add((teller, place))
                return
            if not isinstance(item, bytes | bytearray | memoryview):
                raise Violation(f"{who}: poll gave {name_of(item)} where a message was due")
            number = self._heard[teller, place]
            said = self._said[teller, place]
            if number >= len(said):
                raise Violation(f"{who}: poll gave a message of {len(item)} bytes, and {whom} has posted no more than {len(said)}")
            problem = _difference(said[number], bytes(item))
            if problem:
                raise Violation(f"{who}: message {number} from {whom} {problem}")
            self._heard[teller, place] += 1

    def _may_be_cut(self, teller: int, place: int) -> bool:
        return teller in self.closed and any(len(message) > _SMALL for message in self._said[teller, place])

    def _is_all_there(self) -> bool:
        with self._lock:
            return not any(self._outstanding(place) or self._untold(place) for place in self.live)

    def _outstanding(self, place: int) -> list[int]:
        """From whom an end has still messages to come."""
        peers = self.receivers if place == SENDER else [SENDER]
        return [
            peer
            for peer in peers
            if self._heard[peer, place] < len(self._said[peer, place])
            and not (self._may_be_cut(peer, place) and (peer, place) in self._lost)
        ]

    def _untold(self, place: int) -> list[int]:
        """Of whose close an end has not heard, by poll or by a post."""
        peers = self.receivers if place == SENDER else [SENDER]
        return [peer for peer in peers if peer in self.closed and (peer, place) not in self._lost | self._refused]

    def _missing(self) -> str:
        for place in self.live:
            for peer in self._outstanding(place):
                number, all_ = self._heard[peer, place], self._said[peer, place]
                return (
                    f"{end_name(place)}: message {number} of {len(all_)} from {end_name(peer)}, {len(all_[number])} bytes, did not "
                    f"come within {LIMIT:g} s, though all ends polled"
                )
            for peer in self._untold(place):
                return f"{end_name(place)}: poll did not say within {LIMIT:g} s that {end_name(peer)} has closed"
        return "what was missing came late"

    # The model of slots.

    def _lay_out(self, slots: int, nbytes: int) -> bytes:
        self._forget_slots()
        found = self._do(SENDER, f"lay_out({slots}, {nbytes})", partial(self.ends[SENDER].it.lay_out, slots, nbytes))
        if not isinstance(found, tuple) or len(found) != 2 or not isinstance(found[1], bytes):
            raise Violation(f"lay_out gave {name_of(found)}, not a list of tensors and bytes")
        memory, ticket = list(found[0]), found[1]
        if len(memory) != slots:
            raise Violation(f"lay_out({slots}, {nbytes}) gave {len(memory)} slots")
        for place, slot in enumerate(memory):
            _require_flat(f"slot {place} of lay_out({slots}, {nbytes})", slot, nbytes)
        for place, slot in enumerate(memory):
            slot.copy_(_tensor(pattern(place, nbytes)))
        for place, slot in enumerate(memory):
            problem = _difference(pattern(place, nbytes), raw(slot))
            if problem:
                raise Violation(f"slot {place} of lay_out({slots}, {nbytes}) changed while the others were written: it {problem}")
        self._slots = memory
        return ticket

    def _forget_slots(self) -> None:
        self._held.clear()
        self._slots = []

    def _fill(self, slot: int, nbytes: int) -> bytes:
        """Write to a slot once nobody holds it; all of it, and what is beyond ``nbytes`` is of no meaning."""
        for key in [key for key in self._held if key[1] == slot]:
            del self._held[key]
        self._moves += 1
        memory = self._slots[slot]
        memory.copy_(_tensor(pattern(100 + self._moves, memory.numel())))
        memory[:nbytes].copy_(_tensor(pattern(3 * self._moves, nbytes)))
        return pattern(3 * self._moves, nbytes)

    def _begin_move(self, place: int, slot: int, nbytes: int) -> None:
        it = self.ends[place].it
        name, call = ("push", it.push) if place == SENDER else ("pull", it.pull)
        moving = self._do(place, f"{name}({slot}, {nbytes})", partial(call, slot, nbytes))
        if moving is None:
            return
        if not callable(moving):
            raise Violation(f"{end_name(place)}: {name} gave {name_of(moving)}, neither None nor what can be asked")
        self._moving[place].append(moving)

    def _settle(self, places: Collection[int]) -> None:
        """Ask until the moves of these ends are over, each end the first of its own only; all poll meanwhile."""
        if not any(self._moving[place] for place in places):
            return
        stop = threading.Event()

        def pump(place: int) -> None:
            try:
                while not stop.is_set():
                    self._poll(place, 0.001)
                    if self._moving[place] and self._ask(place):
                        self._moving[place].popleft()
                    if not any(self._moving[place] for place in places):
                        stop.set()
            except BaseException:
                stop.set()
                raise

        calls = {place: self.ends[place].begin("moving", partial(pump, place)) for place in self.live}
        stop.wait(LIMIT)
        stop.set()
        for place, call in calls.items():
            self._end(place, "moving", call)
        for place in places:
            if self._moving[place]:
                what = "push" if place == SENDER else "pull"
                raise Violation(f"{end_name(place)}: its {what} is not over after {LIMIT:g} s, though all ends have begun and poll")

    def _ask(self, place: int) -> bool:
        began = time.monotonic()
        done = self._moving[place][0]()
        if time.monotonic() - began > MARGIN:
            raise Violation(f"{end_name(place)}: asking whether a move is over took more than {MARGIN:g} s")
        return done

    def _ask_stalled(self, place: int) -> None:
        """A move that cannot end is asked for all the same: it waits for nobody, and may say that an end is gone."""
        if self._moving[place]:
            try:
                if self._ask(place):
                    self._moving[place].popleft()
            except TransferError as error:
                if not self.closed:
                    raise Raised(f"{end_name(place)}: moving", error) from error
                self._moving[place].clear()

    def _look(self, place: int, slot: int, nbytes: int, sent: bytes) -> None:
        view = self._do(place, f"view({slot}, {nbytes})", partial(self.ends[place].it.view, slot, nbytes))
        _require_flat(f"{end_name(place)}: view({slot}, {nbytes})", view, nbytes)
        problem = _difference(sent, raw(view))
        if problem:
            raise Violation(f"{end_name(place)}: what came of slot {slot} {problem}")
        self._held[place, slot] = (view, sent)

    def _require_held(self, when: str) -> None:
        for (place, slot), (view, sent) in self._held.items():
            problem = _difference(sent, raw(view))
            if problem:
                raise Violation(f"{when}, what {end_name(place)} holds of slot {slot} has changed: it {problem}")


def _require_flat(what: str, tensor: Any, nbytes: int) -> None:
    if not isinstance(tensor, torch.Tensor):
        raise Violation(f"{what} is {name_of(tensor)}, not a tensor")
    words = f"{str(tensor.dtype).removeprefix('torch.')}{list(tensor.shape)}"
    if tensor.dtype != torch.uint8 or tensor.dim() != 1 or not tensor.is_contiguous() or tensor.numel() != nbytes:
        strides = "" if tensor.is_contiguous() else f" of stride {list(tensor.stride())}"
        raise Violation(f"{what} is {words}{strides}, not contiguous uint8[{nbytes}]")


def _difference(model: bytes, actual: bytes) -> str:
    """How bytes differ from what they should be, as the end of a sentence; empty if they do not."""
    if model == actual:
        return ""
    if len(model) != len(actual):
        return f"has {len(actual)} bytes instead of {len(model)}"
    at = next(i for i, (one, other) in enumerate(zip(model, actual, strict=True)) if one != other)
    return (
        f"has other bytes, first at {at} of {len(model)} (model: {model[at : at + 8].hex()}, actual: {actual[at : at + 8].hex()})"
    )


def _tensor(data: bytes) -> torch.Tensor:
    return torch.frombuffer(bytearray(data), dtype=torch.uint8) if data else torch.empty(0, dtype=torch.uint8)
