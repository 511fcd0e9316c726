"""Engines that sample by themselves, and tell what they sampled in streams: AsyncLLM, SGLang's Engine, and both as servers.

A request is in the air while the engine has it, and on the ground else. To pause, to change the weights or to abort is to call it
back: the engine ends it, what came by then is kept, and to go on is to start it anew from there with what is left of its budget.
So each token is of the weights that were there when it started, whatever an engine does to requests that it keeps (clause W5).
"""

from __future__ import annotations

import asyncio
import math
import secrets
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import aclosing, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Final, Literal, TypeVar

from rollout_core.errors import RolloutCoreError, TransferError, WorkerError
from rollout_core.transfer.causes import cause_of
from rollout_core.workers.commands import not_completed
from rollout_core.workers.contract import SamplingParams, Status
from rollout_core.workers.engine import AWAITED, RELEASED, Emit, Group, Progress, Request, Update
from rollout_core.workers.limits import Limits, seed_of
from rollout_core.workers.media import data_in

#: Seconds that requests which are cancelled have to let go of what they hold.
_LAST: Final = 2.0
#: Seconds between two calls to an engine to end requests, the least and the most; between them it is what the last call took, so
#: that a busy server is not kept busy by them. A request that it has not taken in yet it does not know.
_AGAIN_LEAST: Final = 0.05
_AGAIN_MOST: Final = 0.4

T = TypeVar("T")


class MissingMedia(Exception):
    """The engine does not have the data of these media, which came by identity alone."""

    def __init__(self, identities: Sequence[str]) -> None:
        super().__init__(f"the engine has no data of {', '.join(identities)}")
        self.identities = list(identities)


@dataclass(frozen=True, slots=True)
class Piece:
    """Tokens that followed the last piece's, with their logprobs (NaN where the engine has none); ``finish`` with the last."""

    token_ids: list[int]
    logprobs: list[float]
    finish: Literal["stop", "length", "aborted"] | None = None


@dataclass(eq=False, slots=True)
class Flight:
    """A request and what it has so far. ``given``: the data of its pictures that came with its call, by identity; ``name``: what
    the engine knows it by, another each time that it starts; ``most``: tokens that it may bring this time; ``goal``: those that it
    has then."""

    request: Request
    params: SamplingParams
    given: Mapping[str, bytes] = field(default_factory=dict)
    tokens: list[int] = field(default_factory=list)
    name: str = ""
    most: int = 0
    goal: int = 0
    starts: int = 0
    task: asyncio.Task[None] | None = None  # while it is in the air
    is_sent: bool = False  # the engine has been asked for it, or is about to be
    is_called_back: bool = False
    has_ended: bool = False

    @property
    def left(self) -> int:
        """Tokens of its budget that it has not got."""
        return self.params.response_length - len(self.tokens)

    @property
    def prompt(self) -> list[int]:
        """What the engine is given: the prompt, with placeholders as they were, and what came of it so far."""
        return [*self.request.prompt, *self.tokens]

    @property
    def seed(self) -> int | None:
        """What the engine is given: each start has one of its own, or the same chances would come again."""
        return seed_of(self.params, self.request, len(self.tokens))


class StreamingEngine(ABC):
    """An ``Engine`` (see ``workers.engine``) over one that samples by itself. Its event loop runs in ``wait`` and while a call of
    this class lasts; ``timeout``: seconds that the engine may take to end a request; ``at_once``: most requests that it is given,
    others wait their turn."""

    is_read_in_update: Final = False

    def __init__(self, *, loop: asyncio.AbstractEventLoop, limits: Limits, timeout: float, at_once: int | None = None) -> None:
        self._loop = loop
        self._limits = limits
        self._timeout = timeout
        self._turns = nullcontext() if at_once is None else asyncio.Semaphore(at_once)
        self._version = self._before = 0  # the one before the last update, too
        self._unusable: str | None = None
        self._is_released = False
        self._is_paused = False
        self._flights: dict[int, Flight] = {}
        self._news: list[Progress] = []
        self._woken = asyncio.Event()
        self._prefix = secrets.token_hex(4)  # a server may have other clients

    # What an engine has to do

    @abstractmethod
    def _stream(self, flight: Flight) -> AsyncIterator[Piece]:
        """Start a request, and give what comes of it. Raises ``MissingMedia``, or whatever goes wrong."""

    @abstractmethod
    async def _end(self, names: Sequence[str]) -> None:
        """Have the engine end these requests, which then give their last piece. A name that it does not know is none of its
        business."""

    @abstractmethod
    def _abandon(self, version: int) -> None:
        """Tell the engine that the weights which it has committed as this version are of no use."""

    @abstractmethod
    def _update(self, update: Update) -> float:
        """Receive an update; nothing is in the air. Sets ``_unusable``; returns the seconds spent on loading."""

    def _check(self, request: Request, params: SamplingParams) -> None:
        """Raise ``WorkerError`` for a request that the engine cannot carry out."""
        self._limits.check(request, params)

    async def _ping(self) -> None:
        """Raise if the engine does not answer; here, one whose end is noticed without being asked."""
        await asyncio.sleep(0)

    # Requests

    @property
    def version(self) -> int:
        return self._version

    @property
    def is_busy(self) -> bool:
        return bool(self._news)

    def submit(self, group: Group) -> None:
        self._check_usable()
        for request in group.requests:
            self._check(request, group.params)
        data = data_in(group.requests)
        flights = [Flight(request, group.params, _given(request, data)) for request in group.requests]
        self._flights.update((flight.request.key, flight) for flight in flights)
        if not self._is_paused:
            self._start(flights)

    def abort(self, keys: Sequence[int] | None, emit: Emit) -> None:
        found = [flight for key, flight in self._flights.items() if keys is None or key in keys]
        self._call_back(found)
        for flight in found:
            if not flight.has_ended:
                self._ended(flight, "aborted")
        self._tell(emit)

    def step(self, emit: Emit, between: Callable[[], None]) -> None:
        self._tell(emit)
        between()

    def run(self, steps: int | None, emit: Emit) -> None:
        """Go on without an end (None), or until each request got so many tokens or ended; 0: pause."""
        self._is_paused = steps is not None
        if steps is None:
            self._start(self._flights.values())
        elif steps == 0:
            self._call_back(self._flights.values())
        else:
            flights = list(self._flights.values())
            self._call_back(flights)
            self._start(flights, steps)
            self._run(self._landed(flights))
        self._tell(emit)

    def wait(self, descriptors: Iterable[int]) -> None:
        """Until there is something to tell, or to read at one of these."""
        if not self._news:
            self._run(self._until(list(descriptors)))

    def check_alive(self) -> None:
        self._run(self._ping())

    # Weights

    def update(self, update: Update) -> float:
        with self._on_the_ground():
            loading = self._update(update)
            self._before, self._version = self._version, update.version
        return loading

    def abandon(self, version: int) -> None:
        """What was committed here has failed for its sender."""
        if self._version == version:
            with self._on_the_ground():
                self._version, self._unusable = self._before, not_completed(version)
                self._abandon(version)

    # Memory

    def release_memory(self) -> int:
        if self._is_released:
            return 0
        with self._on_the_ground():
            freed = self._release()
            self._is_released = True
        return freed

    def resume_memory(self) -> None:
        if self._is_released:
            self._resume()
            self._is_released, self._unusable = False, AWAITED

    @abstractmethod
    def _release(self) -> int:
        """Let go of the memory of weights and cache, with nothing in the air; returns the bytes that this freed."""

    @abstractmethod
    def _resume(self) -> None:
        """Take the memory again."""

    def close(self) -> None:
        tasks = [flight.task for flight in self._flights.values() if flight.task is not None]
        for task in tasks:
            task.cancel()
        if tasks:
            self._run(asyncio.wait(tasks, timeout=_LAST))

    # For those who have such an engine

    def _run(self, work: Awaitable[T]) -> T:
        return self._loop.run_until_complete(work)

    @contextmanager
    def _on_the_ground(self) -> Iterator[None]:
        """Within it nothing is in the air; after it everything is again that was. If the weights are of no use then, all have
        failed, unless they are awaited (``resume_memory``)."""
        self._call_back(self._flights.values())
        try:
            yield
        finally:
            if self._unusable not in (None, AWAITED):
                for flight in list(self._flights.values()):
                    self._ended(flight, "failed", WorkerError(f"the worker's weights are unusable: {self._unusable}"))
            if not self._is_paused:
                self._start(self._flights.values())

    def _check_resumed(self) -> None:
        if self._is_released:
            raise WorkerError(RELEASED)

    def _check_usable(self) -> None:
        self._check_resumed()
        if self._unusable is not None:
            raise WorkerError(f"the worker's weights are unusable: {self._unusable}; call sync_weights again")

    # Flights

    def _start(self, flights: Iterable[Flight], most: int | None = None) -> None:
        for flight in () if self._is_released or self._unusable is not None else flights:
            if flight.task is None and not flight.has_ended:
                flight.starts += 1
                flight.name = f"{self._prefix}-{flight.request.key}-{flight.starts}"
                flight.most = flight.left if most is None else min(most, flight.left)
                flight.goal = len(flight.tokens) + flight.most
                flight.is_called_back = flight.is_sent = False
                flight.task = self._loop.create_task(self._fly(flight))

    async def _fly(self, flight: Flight) -> None:
        finish: Literal["stop", "length", "aborted"] | None = None
        try:
            async with self._turns:
                if not flight.is_called_back:  # before it began
                    flight.is_sent = True
                    finish = await self._follow(flight)
            flight.task = None
            if finish is None and not flight.is_called_back:
                raise TransferError("the engine ended a request without a word")
            self._land(flight, finish)
        except MissingMedia as error:
            self._forget(flight)
            self._say(Progress(flight.request.key, [], [], self._version, missing=error.identities))
        except Exception as error:
            if not flight.has_ended:
                known = isinstance(error, RolloutCoreError)
                self._ended(flight, "failed", error if known else WorkerError(f"{type(error).__name__}: {error}"))
        finally:
            flight.task = None
            self._woken.set()

    async def _follow(self, flight: Flight) -> Literal["stop", "length", "aborted"] | None:
        """Take what comes of a request; returns how that ended, if the engine says so."""
        finish = None
        async with aclosing(self._stream(flight)) as pieces:  # type: ignore[type-var]
            async for piece in pieces:
                self._take(flight, piece)
                finish = piece.finish
                await asyncio.sleep(0)  # what it has more of waits its turn, or nobody would hear of an abort meanwhile
        return finish

    def _take(self, flight: Flight, piece: Piece) -> None:
        if any(math.isnan(logprob) for logprob in piece.logprobs):
            raise WorkerError("the model gave NaN logits: check the weights it was last given")
        if len(piece.token_ids) != len(piece.logprobs):
            raise WorkerError(f"the engine gave {len(piece.logprobs)} logprobs for {len(piece.token_ids)} tokens")
        if len(piece.token_ids) > flight.left:
            raise WorkerError(f"the engine gave {len(piece.token_ids)} tokens where {flight.left} were left of the budget")
        if piece.token_ids:
            flight.tokens += piece.token_ids
            self._say(Progress(flight.request.key, list(piece.token_ids), list(piece.logprobs), self._version))

    def _land(self, flight: Flight, finish: str | None) -> None:
        """It is on the ground, and goes on from there if it was called back, or was to bring a part only."""
        if finish == "stop":
            self._ended(flight, "stop")
        elif flight.left == 0:
            self._ended(flight, "length")
        elif finish == "aborted" and not flight.is_called_back:
            self._ended(flight, "aborted")  # by somebody else
        elif finish == "length" and len(flight.tokens) < flight.goal:
            raise WorkerError(f"the engine stopped a request at {len(flight.tokens)} tokens, before its length")

    def _ended(self, flight: Flight, status: Status, error: Exception | None = None) -> None:
        self._forget(flight)
        self._say(Progress(flight.request.key, [], [], self._version, status, None if error is None else cause_of(error)))

    def _forget(self, flight: Flight) -> None:
        flight.has_ended = True
        self._flights.pop(flight.request.key, None)

    def _call_back(self, flights: Iterable[Flight]) -> None:
        flights = [flight for flight in flights if flight.task is not None]
        for flight in flights:
            flight.is_called_back = True
            if flight.task is not None and not flight.is_sent:
                flight.task.cancel()  # it waits its turn, and others' may take long
        if flights:
            self._run(self._called_back(flights))
            for flight in flights:
                flight.task = None  # one that was cancelled before it began does not say so itself

    async def _landed(self, flights: list[Flight]) -> None:
        """Until none of these is in the air."""
        if tasks := [flight.task for flight in flights if flight.task is not None]:
            await asyncio.wait(tasks)

    async def _called_back(self, flights: list[Flight]) -> None:
        """Have the engine end these, until none is in the air, within the timeout."""
        end = self._loop.time() + self._timeout
        while tasks := {flight.task: flight for flight in flights if flight.task is not None and not flight.task.done()}:
            begun = self._loop.time()
            late: Exception | None = TimeoutError() if begun > end else None
            try:
                if sent := [flight.name for flight in tasks.values() if flight.is_sent]:
                    await asyncio.wait_for(self._end(sent), self._timeout)
            except Exception as error:  # the engine is gone, or does not answer
                late = error
            if late is not None:
                self._lose(flights, late)
                return
            now = self._loop.time()
            pause = min(max(_AGAIN_LEAST, now - begun), _AGAIN_MOST, max(0.0, end - now))
            await asyncio.wait(tasks, timeout=pause)

    def _lose(self, flights: list[Flight], error: Exception) -> None:
        why = (
            f"no end of it came within {self._timeout:g} s"
            if isinstance(error, TimeoutError)
            else f"{type(error).__name__}: {error}"
        )
        for flight in flights:
            if flight.task is None:
                continue  # it has landed
            flight.task.cancel()
            flight.task = None
            if not flight.has_ended:
                self._ended(flight, "failed", TransferError(f"the engine was told to end a request: {why}"))

    # News

    def _say(self, progress: Progress) -> None:
        self._news.append(progress)
        self._woken.set()

    def _tell(self, emit: Emit) -> None:
        news, self._news = self._news, []
        if news:
            emit(news)

    async def _until(self, descriptors: list[int]) -> None:
        self._woken.clear()
        if self._news:  # said since it was looked for: others of the loop run before this
            return
        for descriptor in descriptors:
            self._loop.add_reader(descriptor, self._woken.set)
        try:
            await self._woken.wait()
        finally:
            for descriptor in descriptors:
                self._loop.remove_reader(descriptor)


def _given(request: Request, data: Mapping[str, bytes]) -> dict[str, bytes]:
    """Of its pictures alone, as far as there is data."""
    return {item.identity: data[item.identity] for item in request.media if item.identity in data}
