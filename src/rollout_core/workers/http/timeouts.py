"""How long a request may take, and the clock that holds it to that."""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, fields
from typing import Final

from rollout_core.errors import WorkerError


@dataclass(frozen=True, slots=True)
class Timeouts:
    """Bounds in seconds; None is no bound. Any number above 0 is kept to as it is, none is rounded.

    ``connect``: to have a connection, its name resolved. ``silence``: between two pieces of the request that the server takes, or
    of the answer's body that it sends, and from the end of the request to that of the answer's headers. ``total``: from the first
    look for a connection to the last byte of the answer. ``queue``: for one of the client's connections to be free, before all
    that; it counts for none of the others.
    """

    connect: float | None = 10.0
    silence: float | None = 300.0
    total: float | None = None
    queue: float | None = None

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
                raise WorkerError(f"Timeouts.{field.name} is {value!r}: pass seconds above 0, or None for no bound")


class Clock:
    """What one request has left. ``why`` says which bound ended a step."""

    def __init__(self, timeouts: Timeouts) -> None:
        self._loop: Final = asyncio.get_running_loop()
        self._end, self._end_why = math.inf, ""
        if timeouts.total is not None:
            self._end = self._loop.time() + timeouts.total
            self._end_why = f"not complete within {timeouts.total:g} s (Timeouts.total)"
        self._silence = timeouts.silence
        self._step: asyncio.Timeout | None = None
        self.why = ""

    @asynccontextmanager
    async def step(self, seconds: float | None, why: str) -> AsyncIterator[None]:
        """Raises ``TimeoutError`` where the body takes longer than ``seconds``, the total, or ``end`` allow."""
        if self._loop.time() >= self._end:
            self.why = self._end_why
            raise TimeoutError
        try:
            async with asyncio.timeout(None) as self._step:
                self.allow(seconds, why)
                yield
        finally:
            self._step = None

    def silence(self) -> None:
        """Something has moved: the step under way has another ``Timeouts.silence``."""
        silence = self._silence
        self.allow(silence, "" if silence is None else f"the server was silent for {silence:g} s (Timeouts.silence)")

    def allow(self, seconds: float | None, why: str) -> None:
        """The step under way, if there is one, has ``seconds`` from now."""
        if self._step is None or self._step.expired():
            return
        when = math.inf if seconds is None else self._loop.time() + seconds
        if when >= self._end:
            when, why = self._end, self._end_why
        self.why = why
        self._step.reschedule(None if when == math.inf else when)

    def end(self, why: str) -> None:
        """End the step under way at once, and every later one."""
        self._end, self._end_why = -math.inf, why
        self.allow(None, "")
