"""Plays a case with real processes, and judges how it ended."""

from __future__ import annotations

import json
import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from faults.cases import DEADLY, LOSING, SENDER, Case, end_name

#: Seconds that an end may take longer than its timeout: for the scheduler of a busy machine, and for making the error's text.
MARGIN: Final = 0.5
_PATIENCE: Final = 30.0  # seconds until a process that says nothing counts as hanging
_WORKER: Final = Path(__file__).with_name("worker.py")


class Died(Exception):
    """The worker is not there any more."""


class Hung(Exception):
    """The worker said nothing for far too long. Its stack is on stderr."""


class Worker:
    """A process that plays ends of carriers, one case after the other."""

    def __init__(self) -> None:
        self._control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
        with theirs:
            command = [sys.executable, str(_WORKER), str(theirs.fileno())]
            self._process = subprocess.Popen(command, pass_fds=[theirs.fileno()], env=environment)
        self.pid = self._process.pid
        self._inbox: deque[dict[str, Any]] = deque()

    def ask(self, request: dict[str, Any], sockets: Iterable[socket.socket] = ()) -> None:
        try:
            socket.send_fds(self._control, [json.dumps(request).encode()], [one.fileno() for one in sockets])
        except OSError as error:
            raise Died from error

    def hear(self, seconds: float) -> dict[str, Any]:
        """The next event."""
        poll = select.poll()
        poll.register(self._control, select.POLLIN)
        if not poll.poll(seconds * 1000):
            raise Hung
        try:
            data = self._control.recv(1 << 17)
        except ConnectionError:
            data = b""
        if not data:
            raise Died
        return json.loads(data)

    def signal(self, number: int) -> None:
        os.kill(self.pid, number)  # not waited for yet, so the number is still this process's

    def is_stopped(self) -> bool:
        return " T " in Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2][:4]

    def end(self) -> int:
        """Kill it if it is there. Its exit status."""
        self._control.close()
        self._process.kill()
        return self._process.wait()

    def expect_end(self, seconds: float) -> int:
        status = self._process.wait(seconds)
        self._control.close()
        return status


class Pool:
    """Workers that stand ready, so that nobody waits for torch to be imported."""

    def __init__(self, spares: int) -> None:
        self._spares, self._lock = spares, threading.Lock()
        self._ready: deque[Worker] = deque()
        self.started = 0

    def take(self) -> Worker:
        with self._lock:
            worker = self._ready.popleft() if self._ready else self._start()
            while len(self._ready) < self._spares:
                self._ready.append(self._start())
        assert worker.hear(_PATIENCE * 4)["event"] == "ready"
        return worker

    def close(self) -> None:
        with self._lock:
            while self._ready:
                self._ready.pop().end()

    def _start(self) -> Worker:
        self.started += 1
        return Worker()


@dataclass
class Played:
    """How an end came through a case."""

    fault_at: float | None = None  # when it was hit
    result: dict[str, Any] | None = None  # None: it is dead
    ended: float = 0.0
    second: dict[str, Any] | None = None  # of the update after
    left: dict[str, Any] | None = None


@dataclass
class Verdict:
    case: Case
    problems: list[str] = field(default_factory=list)
    #: Seconds from the fault to the end of the update, by end.
    noticed: dict[int, float] = field(default_factory=dict)
    seconds: float = 0.0
    ends: list[Played] = field(default_factory=list)


class Lane:
    """Plays cases one after the other, with workers that it keeps as long as they live."""

    def __init__(self, pool: Pool, timeout: float) -> None:
        self._pool, self._timeout = pool, timeout
        self._workers: list[Worker] = []
        self._count = 0

    def close(self) -> None:
        while self._workers:
            self._workers.pop().end()

    def play(self, case: Case | None, *, carrier: str = "memory", targets: tuple[str, ...] = ("staged",)) -> Verdict:
        """``case`` None: nothing goes wrong, twice."""
        started = time.monotonic()
        verdict = Verdict(case or Case(carrier, targets, -1, "", ""))
        ends = verdict.ends = [Played() for _ in range(verdict.case.receivers + 1)]
        while len(self._workers) < len(ends):
            self._workers.append(self._pool.take())
        name = f"fault-{os.getpid()}-{id(self)}-{self._count}"
        self._count += 1
        with tempfile.TemporaryDirectory(prefix="rollout-core-faults-") as folder:
            try:
                self._play(verdict.case, ends, name, os.path.join(folder, "store"))
                verdict.problems += Judge(verdict.case, ends, self._timeout).problems()
            except Hung:
                verdict.problems.append("an end hung, and was ended")
                for worker in self._workers:
                    with suppress(ProcessLookupError):
                        worker.signal(signal.SIGCONT)
                        worker.signal(signal.SIGABRT)  # faulthandler prints where it was
                        time.sleep(0.2)
                self.close()
            except Died:
                verdict.problems.append("a worker died outside of an update")
                self.close()
            finally:
                self._clean()
        verdict.problems += self._left_behind(name)
        fault_at = ends[verdict.case.who].fault_at if case else None
        for place, end in enumerate(ends):
            if fault_at is not None and end.result is not None:
                verdict.noticed[place] = end.ended - max(fault_at, end.fault_at or 0.0)
        verdict.seconds = time.monotonic() - started
        return verdict

    def _play(self, case: Case, ends: list[Played], name: str, store: str) -> None:
        workers = self._workers[: len(ends)]
        request = {"carrier": case.carrier, "receivers": case.receivers, "large": case.large}
        request["name"] = store if case.carrier == "collective" else name
        pairs = [socket.socketpair() for _ in range(case.receivers)] if case.carrier == "memory" else []
        try:
            for place, worker in enumerate(workers):
                role = {"role": "sender", "place": 0} if place == SENDER else {"role": "receiver", "place": place - 1}
                sockets = [ours for ours, _ in pairs] if place == SENDER else [theirs for _, theirs in pairs[place - 1 : place]]
                worker.ask({"do": "open", "target": (case.targets[0], *case.targets)[place], **role, **request}, sockets)
        finally:
            for pair in pairs:
                for one in pair:
                    one.close()
        for worker in workers:
            _done(worker.hear(_PATIENCE))
        self._update(case, ends)
        # An interrupt while an update is given up already comes out at once, at the price of the carrier.
        is_lost = case.fault in LOSING or (case.before is not None and case.fault == "interrupt")
        sender = ends[SENDER].result
        is_lost = is_lost or (sender is not None and "nobody can know" in sender["message"])
        if not is_lost and not any(end.result is None for end in ends):
            self._again(ends)
        for end, worker in zip(ends, list(workers), strict=True):
            if end.result is not None:
                worker.ask({"do": "close"})
        for end, worker in zip(ends, list(workers), strict=True):
            if end.result is not None:
                end.left = _done(worker.hear(_PATIENCE))
                end.left["memfds"] = _memfds(worker.pid)
        self._workers = [worker for end, worker in zip(ends, workers, strict=True) if end.result] + self._workers[len(ends) :]

    def _update(self, case: Case, ends: list[Played]) -> None:
        """The update that goes wrong."""
        timeout = self._timeout
        seconds = {"delay": 1.25 * timeout, "overdue": 0.4 * timeout}.get(case.fault)
        for place in reversed(range(len(ends))):
            faults = []
            if case.before is not None and place == case.before[0]:
                faults.append({"step": case.before[1], "fault": "raise"})
            if place == case.who:
                faults.append({"step": case.step, "fault": case.fault, "seconds": seconds})
            deadline = 0.3 * timeout if place == case.who and case.fault == "overdue" else None
            self._workers[place].ask({"do": "update", "faults": faults, "timeout": timeout, "deadline": deadline, "seed": 2})
        waiting = dict(enumerate(self._workers[: len(ends)]))
        stopped = case.who if case.fault in ("stop", "stop, go on") else None
        until = time.monotonic() + _PATIENCE
        while waiting:
            if stopped is not None and set(waiting) == {stopped} and ends[stopped].fault_at is not None:
                self._wake_or_kill(case, ends[stopped], waiting[stopped])
                stopped = None
            place = _first(waiting, until)
            self._take(case, place, ends[place], waiting)

    def _take(self, case: Case, place: int, end: Played, waiting: dict[int, Worker]) -> None:
        try:
            event = waiting[place].hear(0)
        except Died:
            waiting[place].expect_end(_PATIENCE)
            del waiting[place]
            return
        if event["event"] == "fault":
            if event["fault"] == case.fault and place == case.who:
                end.fault_at = event["at"]
        else:
            end.result = _done(event)
            end.ended = end.result["ended"]
            del waiting[place]

    @staticmethod
    def _wake_or_kill(case: Case, end: Played, worker: Worker) -> None:
        until = time.monotonic() + _PATIENCE
        while not worker.is_stopped() and time.monotonic() < until:
            time.sleep(0.001)
        worker.signal(signal.SIGKILL if case.fault == "stop" else signal.SIGCONT)

    def _again(self, ends: list[Played]) -> None:
        """The same carrier once more, and nothing goes wrong."""
        # Generously: this is not about time.
        for place in reversed(range(len(ends))):
            self._workers[place].ask({"do": "update", "faults": [], "timeout": 10.0, "deadline": None, "seed": 3})
        for end, worker in zip(ends, self._workers, strict=False):
            end.second = _done(worker.hear(_PATIENCE))

    def _clean(self) -> None:
        """Give back what the fault took from the machine, and forget the dead."""
        for worker in self._workers:
            with suppress(FileNotFoundError):
                os.unlink(f"/dev/shm/filling-{worker.pid}")
        self._workers = [worker for worker in self._workers if worker._process.poll() is None]

    def _left_behind(self, name: str) -> list[str]:
        sockets = Path("/proc/net/unix").read_text()
        return [f"a socket named {name!r} is left"] if name in sockets else []


def _done(event: dict[str, Any]) -> dict[str, Any]:
    assert event["event"] == "done", event
    if "failed" in event:
        raise AssertionError(f"the harness's own work failed in a worker:\n{event['failed']}")
    return event


def _first(waiting: dict[int, Worker], until: float) -> int:
    poll = select.poll()
    places = {}
    for place, worker in waiting.items():
        poll.register(worker._control, select.POLLIN)
        places[worker._control.fileno()] = place
    ready = poll.poll(max(0.0, until - time.monotonic()) * 1000)
    if not ready:
        raise Hung
    return places[ready[0][0]]


def _memfds(pid: int) -> list[str]:
    """A carrier's memory that this process has open, as the kernel sees it from outside."""
    found = []
    for fd in os.listdir(f"/proc/{pid}/fd"):
        with suppress(OSError):
            target = os.readlink(f"/proc/{pid}/fd/{fd}")
            if "rollout-core" in target:
                found.append(target)
    return found


#: The last steps: an update that got here is complete at this end, and what is raised after counts no more.
_COMPLETE: Final = {"say Committed", "hear Committed", "returned"}


class Judge:
    """What must hold after any case. Knows nothing of the protocol but its promises (clauses T2, T3 and T5)."""

    def __init__(self, case: Case, ends: list[Played], timeout: float) -> None:
        self.case, self.ends, self.timeout = case, ends, timeout
        self.found: list[str] = []

    def problems(self) -> list[str]:
        if self.case.who < 0:
            self._smooth()
        else:
            self._struck()
            self._in_time()
            self._truthful()
            self._named()
            self._again()
        self._nothing_left()
        return self.found

    def say(self, place: int, words: str) -> None:
        result = self.ends[place].result
        context = f" [{result['error']}: {result['message']}]" if result and result["error"] else ""
        self.found.append(f"{end_name(place)} {words}{context}")

    def _smooth(self) -> None:
        for place, end in enumerate(self.ends):
            if not end.result or not end.result["ok"]:
                self.say(place, "failed with no fault")
        self._again()

    def _struck(self) -> None:
        end = self.ends[self.case.who]
        if end.fault_at is None:
            self.say(self.case.who, f"never came to the step {self.case.step!r}")
        if (end.result is None) != (self.case.fault in DEADLY):
            self.say(self.case.who, "lives" if end.result else "is dead")
        for place, other in enumerate(self.ends):
            if place != self.case.who and other.result is None:
                self.say(place, "died of a fault elsewhere")

    def _in_time(self) -> None:
        """Clause T2. The end at fault counts from its waking, if it slept."""
        struck = self.ends[self.case.who].fault_at or 0.0
        for place, end in enumerate(self.ends):
            if end.result is None:
                continue
            asleep = 0.0
            if place == self.case.who:
                others = max(other.ended for other in self.ends if other is not end)
                asleep = {"delay": 1.25 * self.timeout, "overdue": 0.4 * self.timeout}.get(self.case.fault, 0.0)
                asleep = max(asleep, others - struck) if self.case.fault == "stop, go on" else asleep
            took = end.ended - max(struck, end.result["started"]) - asleep
            if took > self.timeout + MARGIN:
                self.say(place, f"took {took:.3f} s to end; its timeout is {self.timeout:g} s")

    def _truthful(self) -> None:
        """Clause T5: nobody reports a success that is none, and weights are old, new, or said to be unusable."""
        sender, receivers = self.ends[SENDER].result, [end.result for end in self.ends[1:]]
        for place, result in enumerate(receivers, 1):
            if result is None or self._was_late(place, result):
                continue
            if result["ok"] and not (result["version"] == 1 and result["weights"] == "new" and result["unusable"] is None):
                self.say(place, f"reports success with version {result['version']} and {result['weights']} weights")
            if result["version"] == 1 and not result["ok"]:
                self.say(place, "failed, and its version advanced")
            if not result["ok"] and self.case.targets[place - 1] == "staged" and result["unusable"] is not None:
                self.say(place, f"failed, and calls its {result['weights']} weights unusable")
            is_known = self.case.targets[place - 1] == "direct" and result["unusable"] is not None
            if not result["ok"] and result["weights"] != "old" and not is_known:
                self.say(place, f"failed, and has {result['weights']} weights that count as usable")
            if result["ok"] and sender is not None and "say Commit" not in sender["steps"]:
                self.say(place, "committed, and the sender never said so")
        if sender is not None and sender["ok"]:
            for place, result in enumerate(receivers, 1):
                if result is not None and not (result["ok"] or self._was_late(place, result)):
                    self.say(place, "failed, and the sender reports success")
                if result is None and self.case.step not in _COMPLETE:
                    self.say(place, f"died at {self.case.step!r}, and the sender reports success")
        if sender is not None and not sender["ok"] and any(result and result["ok"] for result in receivers):
            words = ("committed", "nobody can know", "told to commit")
            if not any(word in sender["message"] for word in words):
                self.say(SENDER, "failed, a receiver committed, and the error does not say that it may have")

    def _was_late(self, place: int, result: dict[str, Any]) -> bool:
        """A KeyboardInterrupt after the commit comes out, and a note says that the update is committed."""
        if self.case.fault != "interrupt" or place != self.case.who or self.case.step not in _COMPLETE:
            return False
        return "is committed here all the same" in result["message"] and (result["version"], result["weights"]) == (1, "new")

    def _named(self) -> None:
        """Clause T2: who fails says why."""
        fault, step = self.case.fault, self.case.step
        for place, end in enumerate(self.ends):
            if end.result is None:
                continue
            mine = place == self.case.who
            if end.result["ok"]:
                if mine and fault in ("raise", "interrupt") and step.partition(" #")[0] not in _COMPLETE:
                    self.say(place, f"reports success after {fault}")
                continue
            if fault == "fill" and self.case.before is None:
                self.say(place, "failed, though a carrier's memory does not come from /dev/shm")
            words = _WORDS[fault](mine)
            if self.case.before is not None:
                words = (*words, "injected")
            if not any(word in f"{end.result['error']}: {end.result['message']}" for word in words):
                self.say(place, f"does not name the cause, {fault}")
        if fault == "corrupt" and not all(end.result and end.result["error"] == "IntegrityError" for end in self.ends):
            self.found.append(f"not all raised IntegrityError: {[end.result and end.result['error'] for end in self.ends]}")
        if fault == "no shared memory" and (self.ends[SENDER].result or {}).get("error") != "TransferError":
            self.say(SENDER, "had no shared memory, and raised no TransferError")

    def _again(self) -> None:
        for place, end in enumerate(self.ends):
            second = end.second
            if second is not None and not (second["ok"] and (place == SENDER or second["weights"] == "new")):
                self.say(place, f"could not do the next update: {second['error']}: {second['message']}")
            if second is not None and second["unusable"] is not None:
                self.say(place, f"is unusable after the next update: {second['unusable']}")

    def _nothing_left(self) -> None:
        """Clause T3."""
        for place, end in enumerate(self.ends):
            for what, left in (end.left or {}).items():
                if what not in ("event", "do", "in cycles") and left:
                    if what == "lost" and self.case.fault == "close":
                        continue
                    self.say(place, f"left {what}: {left}")


_GONE: Final = ("lost", "closed its end", "is gone", "closed", "silent", "cannot be taken up")
_ENDED: Final = ("closed its end", "closed by peer", "reset by peer")  # the latter two of a collective
_SILENT: Final = ("silent for", "no update began")
_WORDS: Final[dict[str, Callable[[bool], tuple[str, ...]]]] = {
    "raise": lambda mine: ("injected",),
    "interrupt": lambda mine: ("KeyboardInterrupt",),
    "exit": lambda mine: _ENDED,
    "kill": lambda mine: _ENDED,
    "stop": lambda mine: _SILENT,
    "stop, go on": lambda mine: (*_SILENT, *_GONE) if mine else _SILENT,
    "shut": lambda mine: _ENDED,
    "close": lambda mine: _ENDED,
    "delay": lambda mine: (*_SILENT, *_GONE) if mine else _SILENT,
    "overdue": lambda mine: ("deadline",),
    "corrupt": lambda mine: ("IntegrityError",),
    "fill": lambda mine: (),
    "no memory": lambda mine: ("memory", "Memory", "no update began"),
    "no shared memory": lambda mine: ("shared memory cannot be had", "no update began"),
}


def play_all(
    todo: Iterable[Case],
    *,
    timeout: float,
    lanes: int = 1,
    spares: int = 2,
    tell: Callable[[Verdict], None] | None = None,
    started: list[int] | None = None,
) -> list[Verdict]:
    """Play these, ``lanes`` at a time: a case is mostly waiting. Whatever happens, no process is left. ``started``: counts them."""
    pool, waiting = Pool(spares), deque(todo)
    verdicts: list[Verdict] = []

    def work() -> None:
        lane = Lane(pool, timeout)
        try:
            while True:
                try:
                    case = waiting.popleft()
                except IndexError:
                    return
                verdict = lane.play(case)
                verdicts.append(verdict)
                if tell is not None:
                    tell(verdict)
        finally:
            lane.close()

    try:
        with ThreadPoolExecutor(lanes) as executor:
            try:
                for future in [executor.submit(work) for _ in range(lanes)]:
                    future.result()
            except BaseException:
                waiting.clear()
                raise
    finally:
        pool.close()
        if started is not None:
            started[0] += pool.started
    return verdicts
