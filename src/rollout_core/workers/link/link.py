"""A worker's end of the channel to its engine: requests from any thread, answers and progress to whom they belong."""

from __future__ import annotations

import os
import select
import socket
import threading
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from contextlib import suppress
from typing import Final

from rollout_core.errors import TransferError, WorkerError
from rollout_core.transfer.causes import error_of
from rollout_core.transfer.channel import Channel, PeerGone
from rollout_core.workers.engine import Progress
from rollout_core.workers.link.hosts import GRACE, Host, ProcessHost, Spec, ThreadHost
from rollout_core.workers.link.messages import Answer, Answered, Asked, Asking, Close, Done, Events, Failed

_EVENTS: Final = select.POLLIN | select.POLLHUP | select.POLLERR


class Link:
    """An engine, and the way to it. Every wait has an end: ``timeout`` seconds, or the engine's. A process that did not answer is
    killed: it could do anything, at any time. ``hear`` is called with progress, in a thread of this link's own; and with why, once
    nothing comes any more."""

    def __init__(
        self,
        spec: Spec,
        *,
        process: bool,
        start_timeout: float,
        timeout: float,
        hear: Callable[[Sequence[Progress] | str], None],
    ) -> None:
        self.timeout = timeout
        self.is_updating = False  # weights are being sent
        ours, theirs = socket.socketpair()
        try:
            with theirs:
                host: Host = ProcessHost(spec, theirs) if process else ThreadHost(spec, theirs)
        except BaseException:
            ours.close()
            raise
        self.host = host
        self._pump = _Pump(Channel(ours.detach(), Answered), host, hear)
        # A worker that is forgotten ends its engine: without this the thread would keep both.
        self._forget = weakref.finalize(self, self._pump.stop)
        started = self._pump.expect(0)
        self._pump.start()
        try:
            self.result(started, Done, start_timeout)
        except BaseException:
            self.kill()
            self.close()
            raise

    @property
    def lost(self) -> str | None:
        """Why the engine is of no use any more, if it is."""
        return self._pump.lost

    def post(self, request: Asking) -> Future[Answer]:
        """Send a request; its answer comes in time."""
        return self._pump.post(request)

    def ask(self, request: Asking, kind: type[Answer] = Done) -> Answer:
        """Send a request and wait for its answer. Raises what the engine raised."""
        return self.result(self.post(request), kind, self.timeout)

    def result(
        self, answer: Future[Answer], kind: type[Answer] = Done, timeout: float | None = None, silent: float = 0.0
    ) -> Answer:
        """Wait for an answer, ``timeout`` seconds if not this link's own, after which the engine is given up; ``silent``: seconds
        that it has said nothing before."""
        timeout = self.timeout if timeout is None else timeout
        while True:
            try:
                return _expect(kind, answer.result(timeout))
            except TimeoutError:
                # An engine that takes in an update may answer nothing else meanwhile. Whoever sends it sees to its end.
                if not self.is_updating:
                    raise self._pump.give_up(self._pump.silence(silent + timeout)) from None

    def check(self, seconds: float) -> None:
        """Raise ``TransferError`` if the engine has ended, or does within that time."""
        if self.host.wait(seconds):
            self._pump.join(1.0)
        if self.lost is not None:
            raise TransferError(self.lost)

    def kill(self) -> None:
        """End the engine at once."""
        self.host.kill()

    def close(self) -> None:
        """End the engine: asked first, then killed. Harmless when it has ended already."""
        if self.lost is None:
            with suppress(TransferError):
                self.post(Close())
            if not self.host.wait(min(GRACE, self.timeout)):
                self.host.kill()
        self.host.wait(GRACE)
        self._pump.join(1.0)  # whoever waits hears how it ended
        self._pump.stop()
        self._pump.join(GRACE)
        self._forget.detach()


class _Pump:
    """The one thread that touches the channel. Others hand it messages, and wait for futures."""

    def __init__(self, channel: Channel[Answered], host: Host, hear: Callable[[Sequence[Progress] | str], None]) -> None:
        self.lost: str | None = None
        self._channel = channel
        self._host = host
        self._hear = hear
        self._lock = threading.Lock()
        self._number = 0  # of the last request
        self._waiting: dict[int, Future[Answer]] = {}
        self._outbox: deque[tuple[int, Asking]] = deque()
        self._read, self._write = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self._is_stopped = False
        self._is_closing = False  # the engine was told to
        self._thread = threading.Thread(target=self._run, name="rollout-core-link", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def join(self, seconds: float) -> None:
        if self._thread is not threading.current_thread() and self._thread.ident is not None:
            self._thread.join(seconds)

    def expect(self, number: int) -> Future[Answer]:
        answer: Future[Answer] = Future()
        self._waiting[number] = answer
        return answer

    def post(self, request: Asking) -> Future[Answer]:
        with self._lock:
            self._check_usable()
            self._number += 1
            self._is_closing = isinstance(request, Close)
            answer = self.expect(self._number)
            self._outbox.append((self._number, request))
        self._wake()
        return answer

    def stop(self) -> None:
        """Let the thread end."""
        self._is_stopped = True
        self._wake()

    def silence(self, seconds: float) -> str:
        """What is wrong if an answer has not come for so long."""
        if self._outbox or not self._channel.is_flushed:
            return f"the other process took no message in within {seconds:g} s"
        return f"no answer from the other process within {seconds:g} s"

    def give_up(self, why: str) -> TransferError:
        """End the engine, which is of no use any more; returns the error that says why."""
        with self._lock:
            if self.lost is None:
                self.lost = f"{self._host.words}: {why}"
            self._host.kill()
            waiting, self._waiting = self._waiting, {}
        self._host.wait(GRACE)
        for answer in waiting.values():
            if answer.set_running_or_notify_cancel():
                answer.set_exception(TransferError(self.lost))
        self.stop()
        return TransferError(self.lost)

    def _check_usable(self) -> None:
        if self.lost is not None:
            raise TransferError(f"{self.lost}; close this worker and make another")
        if self._is_stopped:
            raise WorkerError("the worker is closed")

    def _wake(self) -> None:
        with suppress(BlockingIOError, OSError):  # full: it wakes anyway; closed: it has ended
            os.write(self._write, b"x")

    def _run(self) -> None:
        try:
            while not self._is_stopped:
                self._send()
                self._wait()
                while not self._is_stopped and self._channel.has_message():
                    self._take(self._channel.receive(0))
                    with suppress(PeerGone):  # what it said before is to be taken in first
                        self._send()  # an engine that tells more than is taken in here has to hear of an abort nevertheless
        except PeerGone as error:
            # Its exit code says more than the closed channel; and one that was told to close may take its time over its exit.
            self._host.wait(GRACE if self._is_closing else 1.0)
            self.give_up(str(error))
        except TransferError as error:
            self.give_up(str(error))
        except Exception as error:  # a fault of our own: nobody may wait for what will not come
            self.give_up(f"{type(error).__name__}: {error}")
            raise
        finally:
            self._end()

    def _end(self) -> None:
        with self._lock:
            self._is_stopped = True
            waiting, self._waiting = self._waiting, {}
            self._channel.close()
            os.close(self._read)
            os.close(self._write)
            self._write = -1
        why = TransferError(self.lost) if self.lost is not None else WorkerError("the worker was closed before it answered")
        for answer in waiting.values():
            if answer.set_running_or_notify_cancel():
                answer.set_exception(why)
        self._hear(self.lost or "the worker was closed")

    def _send(self) -> None:
        while self._outbox:
            number, request = self._outbox.popleft()
            try:
                self._channel.post(Asked(number, request))
            except (TypeError, ValueError, OverflowError) as error:
                answer = self._waiting.pop(number, None)
                words = f"{type(request).__name__} cannot be sent to the worker process: {error}"
                if answer is not None and answer.set_running_or_notify_cancel():
                    answer.set_exception(WorkerError(words))
        self._channel.flush()

    def _wait(self) -> None:
        poll = select.poll()
        poll.register(self._channel.fileno(), _EVENTS | (0 if self._channel.is_flushed else select.POLLOUT))
        poll.register(self._read, select.POLLIN)
        poll.poll()
        with suppress(BlockingIOError):
            os.read(self._read, 4096)

    def _take(self, answered: Answered) -> None:
        if isinstance(answered.answer, Events):
            self._hear(answered.answer.progress)
            return
        answer = self._waiting.pop(answered.number, None)
        if answer is not None and answer.set_running_or_notify_cancel():
            answer.set_result(answered.answer)


def _expect(kind: type[Answer], answer: Answer) -> Answer:
    """The answer, if it is of this kind; raises what the worker raised."""
    if isinstance(answer, Failed):
        raise error_of(answer.cause, lambda text: WorkerError(f"the worker failed with {text}"))
    if not isinstance(answer, kind):
        raise WorkerError(f"the worker answered {type(answer).__name__}, not {kind.__name__}")
    return answer
