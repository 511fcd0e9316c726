"""Requests that are under way: what each has so far, and the completion that it ends with, once."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field

from rollout_core.errors import TransferError, WorkerError
from rollout_core.transfer.causes import cause_of, error_of
from rollout_core.transfer.protocol.messages import Cause
from rollout_core.workers.contract import Completion, Status
from rollout_core.workers.engine import Progress


@dataclass(eq=False, slots=True)
class Rollout:
    """One sample of one prompt."""

    key: int
    request_id: str
    prompt_index: int
    sample_index: int
    future: Future[Completion] = field(default_factory=Future)
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    versions: list[int] = field(default_factory=list)
    status: Status | None = None  # once it has ended
    cause: Cause | None = None  # of its end, if it failed
    first_token: float | None = None  # when it was heard of, by time.perf_counter
    resent: int = 0  # times that it was sent again, because the engine missed the data of its media
    resent_at: int | None = None  # tokens that it had then

    def end(self, status: Status, version: int, cause: Cause | None = None) -> None:
        """With what it has; ``version``: of the weights, if it has nothing."""
        self.status, self.cause = status, cause
        try:
            completion = self._completion(status, version, cause.message if cause is not None else "")
        except WorkerError as error:  # the engine said what cannot be; one future without an end would be worse
            self.status, self.cause = "failed", cause_of(error)
            self.token_ids, self.logprobs, self.versions = [], [], []
            completion = self._completion("failed", max(0, version), str(error))
        if self.future.set_running_or_notify_cancel():
            self.future.set_result(completion)

    def _completion(self, status: Status, version: int, error: str) -> Completion:
        return Completion(
            token_ids=tuple(self.token_ids),
            logprobs=tuple(self.logprobs),
            status=status,
            weight_version=self.versions[-1] if self.versions else version,
            prompt_index=self.prompt_index,
            sample_index=self.sample_index,
            token_versions=tuple(self.versions),
            request_id=self.request_id,
            error=error,
        )


class Rollouts:
    """All that are under way in one engine. Any thread may ask; progress comes from one. ``missed`` is called with a request that
    the engine has forgotten, and the identities of the media that it misses."""

    def __init__(self, missed: Callable[[Rollout, Sequence[str]], None]) -> None:
        self._missed = missed
        self._lock = threading.Lock()
        self._open: dict[int, Rollout] = {}
        self._last = 0
        self._version = 0  # of the newest progress, for who is lost without any
        self.told = 0  # how often the engine has said anything

    def add(self, wanted: Sequence[tuple[str, int, int]]) -> list[Rollout]:
        """New ones, each of a request id, a prompt's index and a sample's. ``WorkerError`` for an id that is under way."""
        with self._lock:
            under_way = {rollout.request_id for rollout in self._open.values()}
            for request_id, _, _ in wanted:
                if request_id and request_id in under_way:
                    raise WorkerError(f"request {request_id!r} is under way; give each request an id of its own, or none")
            made = [Rollout(self._last + 1 + place, *one) for place, one in enumerate(wanted)]
            self._last += len(made)
            self._open.update((rollout.key, rollout) for rollout in made)
        return made

    def drop(self, rollouts: Iterable[Rollout], why: str) -> None:
        """These were refused, and never under way."""
        with self._lock:
            found = [rollout for rollout in rollouts if self._open.pop(rollout.key, None) is not None]
        for rollout in found:  # another thread may have found them meanwhile
            rollout.end("failed", self._version, Cause("WorkerError", why, ""))

    def find(self, request_ids: Iterable[str] | None) -> list[Rollout]:
        """Those of these ids that are under way; all of them for None."""
        wanted = None if request_ids is None else set(request_ids)
        with self._lock:
            return [rollout for rollout in self._open.values() if wanted is None or rollout.request_id in wanted]

    def hear(self, progress: Sequence[Progress] | str) -> None:
        """Take in what the engine says. Why, if it says nothing any more: what is under way has failed."""
        self.told += 1
        if isinstance(progress, str):
            with self._lock:
                left, self._open = list(self._open.values()), {}
            for one_left in left:
                one_left.end("failed", self._version, Cause("TransferError", progress, ""))
            return
        for one in progress:
            with self._lock:
                rollout = self._open.get(one.key)
            if rollout is None:  # it was dropped
                continue
            if one.missing:
                self._missed(rollout, one.missing)
                continue
            self._version = one.version
            if one.token_ids and rollout.first_token is None:
                rollout.first_token = time.perf_counter()
            rollout.token_ids += one.token_ids
            rollout.logprobs += one.logprobs
            rollout.versions += [one.version] * len(one.token_ids)
            if one.status is not None:
                with self._lock:
                    self._open.pop(one.key, None)
                rollout.end(one.status, one.version, one.cause)


def raise_failed(rollouts: Iterable[Rollout], lost: str | None) -> None:
    """Raise the error of the first that failed: ``TransferError`` if its engine is gone."""
    for rollout in rollouts:
        if rollout.status == "failed":
            if lost is not None:
                raise TransferError(lost)
            raise error_of(rollout.cause or Cause("WorkerError", "a request failed", ""), WorkerError)
