"""The engine's side of a link: carries out what it is told, between one token and the next."""

from __future__ import annotations

import os
import select
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from typing import Final, assert_never

from rollout_core.bucketing.dtypes import WIRE_NAMES
from rollout_core.bucketing.tensors import as_bytes
from rollout_core.errors import WorkerError
from rollout_core.transfer.causes import cause_of
from rollout_core.transfer.channel import Channel
from rollout_core.workers.engine import Engine, Progress, Ranked, SelfRunning, Update
from rollout_core.workers.link.messages import (
    Abandon,
    Abort,
    Answer,
    Answered,
    Asked,
    Call,
    Close,
    Digests,
    Done,
    Events,
    Failed,
    Freed,
    MediaHits,
    Ping,
    RankDigests,
    ReadDigests,
    ReadMediaHits,
    ReadRankDigests,
    ReadShards,
    ReadSpecs,
    ReadTensor,
    Receive,
    Received,
    ReleaseMemory,
    ResumeMemory,
    Returned,
    Run,
    Shards,
    Specs,
    Submit,
    TensorBytes,
)

#: Seconds that tokens may wait for others to be told with. A first token, and a last, are told at once.
_GATHER: Final = 0.01


class _Closed(BaseException):
    """Told to close. Not an Exception: it has to get through whatever the engine is in the middle of."""


class Serving:
    """An engine, served over a channel until it is told to close, or the other side is gone (``PeerGone``)."""

    def __init__(self, channel: Channel[Asked], engine: Engine) -> None:
        self._channel = channel
        self._engine = engine
        self._alone = engine if isinstance(engine, SelfRunning) else None
        self._steps: int | None = None  # that may be made; None: any number
        self._running: int | None = None  # number of the request that waits for the last of them
        self._outbox: list[Progress] = []
        self._started: set[int] = set()  # keys of requests of which a token was told
        self._told = 0.0  # when
        self._updating: _Updating | None = None
        self._held: list[Asked] = []  # requests that came during an update

    def run(self) -> None:
        with suppress(_Closed):
            while True:
                self._between()
                self._engine.step(self._emit, self._stepped)

    def _stepped(self) -> None:
        """A token was sampled, of every request that the engine had in hand."""
        if self._steps is not None:
            self._steps -= 1
        self._between()

    def _between(self) -> None:
        """Carry out what has been asked; returns when there is a step to make."""
        while True:
            may_step = self._engine.is_busy and self._updating is None and (self._alone is not None or self._steps != 0)
            if not may_step:
                self._tell()
                if self._running is not None:
                    self._answer(self._running, Done())
                    self._running = None
                self._wait()
            if self._updating is not None and self._updating.is_done:
                updating, self._updating = self._updating, None
                self._answer(updating.number, updating.join())
                held, self._held = self._held, []
                for asked in held:
                    self._take(asked)
            elif self._channel.has_message():
                self._take(self._channel.receive(None))
            elif may_step:
                return

    def _wait(self) -> None:
        """Until something has come, or the update that is under way is at its end."""
        if self._channel.has_message():
            return
        descriptors = [self._channel.fileno()] + ([] if self._updating is None else [self._updating.fileno()])
        if self._alone is not None:
            self._alone.wait(descriptors)
            return
        poll = select.poll()
        for descriptor in descriptors:
            poll.register(descriptor, select.POLLIN)
        poll.poll()

    def _take(self, asked: Asked) -> None:
        if isinstance(asked.request, Submit | Receive) and self._updating is not None:
            self._held.append(asked)  # until it is known what weights there are, or the update before has let go
            return
        if isinstance(asked.request, Receive) and self._engine.is_read_in_update:
            self._updating = _Updating(asked.number, self._engine, asked.request.update)
            return
        if isinstance(asked.request, Run) and asked.request.steps and self._alone is None:
            self._steps, self._running = asked.request.steps, asked.number
            return
        try:
            answer = self._carry_out(asked)
        except Exception as error:
            answer = Failed(cause_of(error))
        self._answer(asked.number, answer)
        if isinstance(asked.request, Close):
            raise _Closed

    def _answer(self, number: int, answer: Answer) -> None:
        self._tell()  # what was sampled before it
        try:
            self._channel.send(Answered(number, answer))
        except (TypeError, ValueError, OverflowError) as error:  # not encodable: larger than MessagePack can say, for one
            self._channel.send(Answered(number, Failed(cause_of(error))))

    def _carry_out(self, asked: Asked) -> Answer:
        engine, request = self._engine, asked.request
        match request:
            case Submit():
                engine.submit(request.group)
                return Done()
            case Abort():
                engine.abort(request.keys, self._emit)
                return Done()
            case Run():
                if self._alone is not None:
                    self._alone.run(request.steps, self._emit)
                else:
                    self._steps = request.steps
                return Done()
            case ReadMediaHits():
                hits = getattr(engine, "media_hits", None)  # of few engines
                return MediaHits() if hits is None else MediaHits(*hits())
            case Call():
                call = getattr(engine, f"call_{request.name}", None)
                if call is None:
                    raise WorkerError(f"this engine has no {request.name}")
                return Returned(call(request.argument))
            case ReleaseMemory():
                return Freed(engine.release_memory())
            case ResumeMemory():
                engine.resume_memory()
                return Done()
            case Receive():
                return Received(engine.update(request.update))
            case Abandon():
                engine.abandon(request.version)
                return Done()
            case ReadSpecs():
                specs = engine.specs()
                listed = None if specs is None else [(spec.name, WIRE_NAMES[spec.dtype], spec.shape) for spec in specs]
                return Specs(listed)
            case ReadDigests():
                return Digests(engine.digests(request.names))
            case ReadShards():
                return Shards([dict(shards) for shards in engine.shards()] if isinstance(engine, Ranked) else [])
            case ReadRankDigests():
                return RankDigests([dict(found) for found in engine.rank_digests()] if isinstance(engine, Ranked) else [])
            case ReadTensor():
                tensor = engine.read_tensor(request.name)
                return TensorBytes(WIRE_NAMES[tensor.dtype], tuple(tensor.shape), as_bytes(tensor).numpy().tobytes())
            case Ping():
                if self._alone is not None:
                    self._alone.check_alive()
                return Done()
            case Close():
                return Done()
        assert_never(request)

    def _emit(self, progress: Sequence[Progress]) -> None:
        self._outbox += progress
        is_urgent = time.monotonic() - self._told >= _GATHER
        for one in progress:
            if one.status is not None:
                self._started.discard(one.key)
                is_urgent = True
            elif one.key not in self._started:
                self._started.add(one.key)
                is_urgent = True
        if is_urgent:
            self._tell()

    def _tell(self) -> None:
        outbox, self._outbox = self._outbox, []
        if outbox:
            self._channel.send(Answered(-1, Events(_joined(outbox))))
            self._told = time.monotonic()


def _joined(progress: list[Progress]) -> list[Progress]:
    """The same, with what a request got from one version in one piece."""
    found: dict[tuple[int, int], Progress] = {}
    for one in progress:
        place = (one.key, one.version)
        if place in found and not one.missing and not found[place].missing:
            one.token_ids[:0], one.logprobs[:0] = found[place].token_ids, found[place].logprobs
        found[place] = one
    return list(found.values())


class _Updating:
    """An update that is received in a thread of its own, while the engine's weights may be asked for."""

    def __init__(self, number: int, engine: Engine, update: Update) -> None:
        self.number = number
        self._read, self._write = os.pipe()
        self._answer: Answer = Done()
        self._thread = threading.Thread(target=self._receive, args=(engine, update), name="update", daemon=True)
        self._thread.start()

    @property
    def is_done(self) -> bool:
        return not self._thread.is_alive()

    def fileno(self) -> int:
        return self._read

    def join(self) -> Answer:
        self._thread.join()
        os.close(self._read)
        return self._answer

    def _receive(self, engine: Engine, update: Update) -> None:
        try:
            self._answer = Received(engine.update(update))
        except Exception as error:
            self._answer = Failed(cause_of(error))
        finally:
            os.close(self._write)  # wakes whoever polls the other end
