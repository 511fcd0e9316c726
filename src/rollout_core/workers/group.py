"""RolloutGroup: requests that outlive an interruption. What was sampled is kept, and the rest of its budget is sampled later."""

from __future__ import annotations

import secrets
import time
from collections.abc import Sequence
from concurrent.futures import Future, wait
from dataclasses import dataclass, field
from typing import Protocol

import msgspec

from rollout_core.errors import WorkerError
from rollout_core.workers.contract import Completion, SamplingParams

#: Of one and the same seed for different samples, and parts of one, whose chances must not be the same again.
_APART = 0x9E3779B1


class Submits(Protocol):
    """Of a worker, what a group uses."""

    def submit(
        self, prompts: Sequence[Sequence[int]], params: SamplingParams, *, request_ids: Sequence[str] | None = None
    ) -> list[Future[Completion]]: ...

    def abort(self, request_ids: Sequence[str] | None = None) -> list[str]: ...


@dataclass(eq=False, slots=True)
class _Row:
    """One sample of one prompt, and its parts so far."""

    prompt: list[int]
    place: int
    sample: int
    parts: list[Completion] = field(default_factory=list)
    future: Future[Completion] | None = None  # while it is under way
    name: str = ""

    @property
    def tokens(self) -> list[int]:
        return [token for part in self.parts for token in part.token_ids]


class RolloutGroup:
    """``params.n`` samples of each prompt, kept alive while the weights of a worker change, by whatever means it changes them.

        group = RolloutGroup(worker, prompts, params)
        group.start()
        group.interrupt()                     # what came is kept
        worker.sync_weights(model)
        group.start()                         # each goes on from its tokens, with what is left of its response_length
        completions = group.result(60)

    The budget is that of a whole response: however often it is interrupted, it has ``response_length`` tokens at most. Any worker
    serves that has ``submit`` and ``abort``. One of ours needs no interruption for an update; there a group is for stopping early,
    when enough of a batch is done, and going on later. Sampled parts have seeds of their own, so a seed makes a group repeatable
    only if it is interrupted at the same tokens. One thread uses a group.
    """

    def __init__(self, worker: Submits, prompts: Sequence[Sequence[int]], params: SamplingParams) -> None:
        if type(params) is not SamplingParams:
            raise WorkerError(f"params is a {type(params).__name__}: pass SamplingParams(response_length=...)")
        self._worker = worker
        self._params = params
        self._id = secrets.token_hex(4)
        self._rows = [_Row(list(prompt), place, sample) for place, prompt in enumerate(prompts) for sample in range(params.n)]
        self._ended: dict[int, Completion] = {}

    @property
    def unfinished(self) -> int:
        """Rows that have not ended, on their way or not."""
        self._collect()
        return len(self._rows) - len(self._ended)

    def start(self) -> int:
        """Submit what has not ended and is not under way, each from the tokens that it has. Returns how many that were."""
        self._collect()
        waiting = [number for number, row in enumerate(self._rows) if number not in self._ended and row.future is None]
        calls: dict[SamplingParams, list[int]] = {}  # those that have the same left go together: some engines batch by call
        for number in waiting:
            calls.setdefault(self._left(self._rows[number]), []).append(number)
        for params, numbers in calls.items():
            rows = [self._rows[number] for number in numbers]
            for number, row in zip(numbers, rows, strict=True):
                row.name = f"{self._id}-{number}-{len(row.parts)}"
            futures = self._worker.submit([row.prompt + row.tokens for row in rows], params, request_ids=[row.name for row in rows])
            for row, future in zip(rows, futures, strict=True):
                row.future = future
        return len(waiting)

    def _left(self, row: _Row) -> SamplingParams:
        """What a row is still to be asked for."""
        params, count, seed = self._params, len(row.tokens), self._params.seed
        if seed is not None and params.temperature != 0:
            # Prompts differ by their place: rows of one call would share their chances.
            seed = (seed + _APART * (row.place + (count * params.n + row.sample) * len(self._rows))) % 2**31
        return msgspec.structs.replace(params, n=1, seed=seed, response_length=params.response_length - count)

    def interrupt(self, timeout: float = 60.0) -> int:
        """End what is under way, and keep what came of it. Returns the rows that wait to be started again. ``WorkerError`` if one
        has not ended within ``timeout`` seconds."""
        under_way = [row for row in self._rows if row.future is not None]
        if under_way:
            self._worker.abort([row.name for row in under_way])
        late = wait([row.future for row in under_way if row.future is not None], timeout).not_done
        if late:
            raise WorkerError(f"{len(late)} of {len(under_way)} requests had not ended {timeout:g} s after they were aborted")
        self._collect(interrupted=True)
        return len(self._rows) - len(self._ended)

    def wait(self, rows: int | None = None, timeout: float | None = None) -> bool:
        """Until so many rows have ended, all of them if None. Returns whether they have."""
        wanted = len(self._rows) if rows is None else min(rows, len(self._rows))
        end = None if timeout is None else time.monotonic() + timeout
        while True:
            self._collect()
            futures = [row.future for row in self._rows if row.future is not None]
            if len(self._ended) >= wanted or not futures:
                return len(self._ended) >= wanted
            left = None if end is None else end - time.monotonic()
            if left is not None and left <= 0:
                return False
            wait(futures, left, "FIRST_COMPLETED")

    def result(self, timeout: float | None = None) -> list[Completion]:
        """All completions, grouped by prompt, each joined of its parts. ``WorkerError`` if some have not ended in that time, or
        wait to be started."""
        if not self.wait(None, timeout):
            idle = sum(row.future is None for number, row in enumerate(self._rows) if number not in self._ended)
            raise WorkerError(
                f"{len(self._rows) - len(self._ended)} of {len(self._rows)} rows have not ended"
                + (f"; {idle} were interrupted: call start" if idle else "")
            )
        return [self._ended[number] for number in range(len(self._rows))]

    def partial(self) -> list[Completion | None]:
        """What each row has by now, under way parts left out; None for one without a token."""
        self._collect()
        return [self._ended.get(number) or (_joined(row) if row.parts else None) for number, row in enumerate(self._rows)]

    def _collect(self, *, interrupted: bool = False) -> None:
        """Take in what has ended; ``interrupted``: what was aborted was so by this group, and goes on."""
        for number, row in enumerate(self._rows):
            if row.future is None or not row.future.done():
                continue
            done, row.future = row.future.result(), None
            row.parts.append(done)
            over = len(row.tokens) - self._params.response_length
            if over > 0:
                raise WorkerError(
                    f"{_joined(row).place} has {over} tokens more than its response_length: the worker passed its budget"
                )
            if not (interrupted and done.status == "aborted" and over < 0):
                self._ended[number] = _joined(row)


def _joined(row: _Row) -> Completion:
    """The parts as one completion, with the last one's status."""
    last = row.parts[-1]
    versions = tuple(version for part in row.parts for version in part.versions)
    with_tokens = [part for part in row.parts if part.token_ids]
    has_logprobs = all(part.logprobs is not None for part in with_tokens)
    return Completion(
        token_ids=tuple(row.tokens),
        logprobs=tuple(logprob for part in row.parts for logprob in part.logprobs or ()) if has_logprobs else None,
        status=last.status,
        weight_version=versions[-1] if versions else last.weight_version,
        prompt_index=row.place,
        sample_index=row.sample,
        token_versions=versions,
        error=last.error,
    )
