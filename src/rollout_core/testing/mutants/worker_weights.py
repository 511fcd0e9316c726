"""Bugs of workers in weights: updates, versions, what is computed from old ones, memory, and what is left behind."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence
from concurrent.futures import wait
from typing import Any, Final

import torch
import xxhash

from rollout_core.errors import WorkerError
from rollout_core.testing.fake_engine import FakeEngine, FakeWorker, Row
from rollout_core.testing.mutants.registry import worker_mutant
from rollout_core.testing.mutants.worker_base import Tampers, Trusting, replaced
from rollout_core.transfer import receive
from rollout_core.workers.carriers import receiver_of
from rollout_core.workers.contract import Completion
from rollout_core.workers.digests import weight_digest
from rollout_core.workers.engine import Group, Progress, Update
from rollout_core.workers.worker import SyncReport

_HEAD: Final = "lm_head.weight"
_NORM: Final = "model.norm.weight"
_INV_FREQ: Final = "model.inv_freq"
_LEFT: Final[list[int]] = []  # descriptors


class _SpoilsUpdates(FakeEngine):
    """Puts back, or changes, some of what has come."""

    def update(self, update: Update) -> float:
        old = {name: tensor.clone() for name, tensor in self.weights.tensors.items()}
        loading = super().update(update)
        self.spoil(old)
        return loading

    def spoil(self, old: dict[str, torch.Tensor]) -> None:
        raise NotImplementedError


class _KeepsTheHead(FakeEngine):
    """With a head of its own, packed at the start."""

    def __init__(self, model: str) -> None:
        super().__init__(model)
        self.head = self.weights.tensors[_HEAD].clone()

    def used(self) -> dict[str, torch.Tensor]:
        return {**self.weights.tensors, _HEAD: self.head}


class _ReadsTheKeptHead(_KeepsTheHead):
    def digests(self, names: Sequence[str] | None) -> dict[str, str]:
        found = super().digests(names)
        return {**found, _HEAD: weight_digest(self.head)} if _HEAD in found else found

    def read_tensor(self, name: str) -> torch.Tensor:
        return self.head.clone() if name == _HEAD else super().read_tensor(name)


@worker_mutant("W2-read-back", "vLLM on a CPU: lm_head is packed once, and a reload does not pack it again")
class StaleTiedHead(Trusting):
    """Leaves a tied head as it was at the start."""

    engine = _ReadsTheKeptHead


@worker_mutant("W1-greedy-parity", "a packed copy that readback does not look at")
class UsesAStaleHead(Trusting):
    """Reads back the head that came, and computes with the one from the start."""

    engine = _KeepsTheHead


class _LeavesBuffers(_SpoilsUpdates):
    def spoil(self, old: dict[str, torch.Tensor]) -> None:
        self.weights.tensors[_INV_FREQ].copy_(old[_INV_FREQ])


@worker_mutant("W2-read-back", "sending named_parameters()")
class LeavesBuffers(Trusting):
    """Takes parameters, and leaves the buffers as they were."""

    engine = _LeavesBuffers


class _CastsWeights(_SpoilsUpdates):
    def spoil(self, old: dict[str, torch.Tensor]) -> None:
        for tensor in self.weights.tensors.values():
            tensor.copy_(tensor.bfloat16().float())


@worker_mutant("W2-read-back", "weights that travel in bfloat16")
class CastsThroughBfloat16(Trusting):
    """Rounds what has come to bfloat16."""

    engine = _CastsWeights


class _StartsOtherwise(FakeEngine):
    def __init__(self, model: str) -> None:
        super().__init__(model)
        self.weights.tensors[_NORM][3] += 1


@worker_mutant("W2-start", "a norm whose weight is stored less one")
class StartsWithOtherWeights(Trusting):
    """Has another value in one tensor until the first update."""

    engine = _StartsOtherwise


class _CachesPrefixes(FakeEngine):
    def __init__(self, model: str) -> None:
        super().__init__(model)
        self.prefixes: dict[tuple[int, ...], Any] = {}

    def cache_of(self, row: Row) -> Any:
        prompt = tuple(row.request.prompt)
        if not row.tokens and prompt in self.prefixes:
            row.cache, row.cached_under = self.prefixes[prompt].copy(), self.loads
        elif not row.tokens:
            self.prefixes[prompt] = super().cache_of(row).copy()
        return super().cache_of(row)


@worker_mutant("W1-greedy-parity", "vLLM without reset_prefix_cache(), SGLang without flush_cache()")
class KeepsThePrefixCache(Trusting):
    """Answers a prompt that it has seen from what the old weights computed of it."""

    engine = _CachesPrefixes


class _KeepsCaches(FakeEngine):
    def cache_of(self, row: Row) -> Any:
        return super().cache_of(row) if row.cache is None else row.cache


@worker_mutant("W5-updates", "a KV cache that survives a pause and an update")
class GoesOnFromTheOldCache(Trusting):
    """Goes on with what the old weights computed of the tokens so far."""

    engine = _KeepsCaches


class _KeepsCachesOfAborted(FakeEngine):
    def __init__(self, model: str) -> None:
        super().__init__(model)
        self.kept: dict[tuple[int, ...], Any] = {}

    def end(self, row: Row, emit: Any) -> None:
        if row.cache is not None:
            self.kept[(*row.request.prompt, *row.tokens)] = row.cache
        super().end(row, emit)

    def cache_of(self, row: Row) -> Any:
        kept = self.kept.pop(tuple(row.request.prompt), None)
        if kept is not None and not row.tokens:
            row.cache, row.cached_under = kept.copy(), self.loads
        return super().cache_of(row)


@worker_mutant("W5-resumed", "partial rollouts whose KV cache is kept for the next round, over an update")
class ResumesFromAKeptCache(Trusting):
    """Keeps what was computed of an aborted request for when it is resumed, whatever weights there are then."""

    engine = _KeepsCachesOfAborted


@worker_mutant("W5-updates", "one weight_version for a completion")
class GivesAllTokensTheNewVersion(Tampers):
    """Says of all tokens that they are of the weights of the last."""

    def tamper(self, done: Completion) -> Completion:
        return replaced(done, token_versions=None)


class _SaysTheVersionOfTheSubmit(FakeEngine):
    def submit(self, group: Group) -> None:
        super().submit(group)
        self.since = {**getattr(self, "since", {}), **{request.key: self.version for request in group.requests}}

    def sample(self, row: Row) -> Progress:
        made = super().sample(row)
        return Progress(made.key, made.token_ids, made.logprobs, self.since[made.key], made.status)


@worker_mutant("W5-updates", "the version that was read when the request was sent")
class SaysTheVersionOfTheSubmit(Trusting):
    """Says of all tokens that they are of the weights that there were at the submit."""

    engine = _SaysTheVersionOfTheSubmit


@worker_mutant("W5-updates", "draining an engine before each update")
class DrainsBeforeAnUpdate(Trusting):
    """Lets all requests end with the old weights before an update, paused or not."""

    def sync_weights(self, source: Any, **options: Any) -> SyncReport:
        left = [rollout.future for rollout in self._rollouts.find(None)]
        if left:
            self.resume()
            wait(left)
        return super().sync_weights(source, **options)


@worker_mutant("W5-under-requests", "SGLang's abort_all before an update")
class EndsRequestsInAnUpdate(Trusting):
    """Aborts all requests before an update."""

    def sync_weights(self, source: Any, **options: Any) -> SyncReport:
        self.abort()
        return super().sync_weights(source, **options)


@worker_mutant("T5-updates")
class NeverCounts(Trusting):
    """Has version 0 for ever."""

    version = property(lambda self: 0)


@worker_mutant("T5-updates", "a version that is counted before the update")
class CountsFailedUpdates(Trusting):
    """Counts updates that have failed."""

    failures = 0

    def sync_weights(self, source: Any, **options: Any) -> SyncReport:
        try:
            return super().sync_weights(source, **options)
        except BaseException:
            self.failures += 1
            raise

    @property
    def version(self) -> int:
        return self._version + self.failures


@worker_mutant("T5-updates", "a log line instead of an error")
class SwallowsTheError(Trusting):
    """Returns from an update that has failed."""

    def sync_weights(self, source: Any, **options: Any) -> Any:
        with contextlib.suppress(ArithmeticError):
            return super().sync_weights(source, **options)
        return None


class _SkipsVerification(FakeEngine):
    def update(self, update: Update) -> float:
        with contextlib.closing(receiver_of(update, "cpu")) as carrier:
            report = receive(carrier, self.weights, timeout=update.timeout, verify=False)
        self.loads += 1
        return report.loading


@worker_mutant("T5-damage", "buckets without digests")
class SkipsVerification(Trusting):
    """Loads what has come, damaged or not."""

    engine = _SkipsVerification


class _ForgetsThatItIsBroken(FakeEngine):
    def check_usable(self) -> None:
        self.check_memory()


@worker_mutant("T5-half", "loading straight into the model, bucket by bucket")
class SamplesFromHalfAnUpdate(Trusting):
    """Generates with weights of which a part is new."""

    engine = _ForgetsThatItIsBroken


class _StaysBroken(FakeEngine):
    was_unusable = False

    def check_usable(self) -> None:
        self.was_unusable = self.was_unusable or self.weights.unusable is not None
        if self.was_unusable:
            raise WorkerError("the worker's weights are unusable")


@worker_mutant("T5-updates", "a flag that nothing takes back")
class StaysBroken(Trusting):
    """Once it has refused to generate after an update that failed, it refuses for ever."""

    engine = _StaysBroken


class _FreesTwice(FakeEngine):
    def release_memory(self) -> int:
        return super().release_memory() or sum(tensor.nbytes for tensor in self.weights.tensors.values())


@worker_mutant("W6-memory", "bytes that are computed, and not measured")
class FreesTwice(Trusting):
    """Says of a second release that it freed as much as the first."""

    engine = _FreesTwice


class _RefusesASecondRelease(FakeEngine):
    def release_memory(self) -> int:
        self.check_memory()
        return super().release_memory()


@worker_mutant("W6-memory", "SGLang: a second release_memory_occupation is an assertion that fails")
class RefusesASecondRelease(Trusting):
    """Raises when memory is released that is released."""

    engine = _RefusesASecondRelease


class _DropsRequestsOnRelease(FakeEngine):
    def release_memory(self) -> int:
        for _, rows in self.groups:
            for row in rows.values():
                row.cache, row.cached_under = xxhash.xxh64(), self.loads + 1
        return super().release_memory()


@worker_mutant("W6-memory", "a KV cache that comes back empty")
class GoesOnFromAnEmptyCache(Trusting):
    """Goes on with requests from caches that were released."""

    engine = _DropsRequestsOnRelease


class _LoadsWhatChanged(_SpoilsUpdates):
    def __init__(self, model: str) -> None:
        super().__init__(model)
        self.known = super().digests(None)

    def spoil(self, old: dict[str, torch.Tensor]) -> None:
        now = super().digests(None)
        for name, digest in now.items():
            if self.known[name] == digest:
                self.weights.tensors[name].copy_(old[name])
        self.known = now


@worker_mutant("W6-memory", "an update of what has changed since the last, to an engine that has slept since")
class LoadsWhatChanged(Trusting):
    """Skips tensors that are as in the last update, also after memory was released."""

    engine = _LoadsWhatChanged


@worker_mutant("T3-left-behind", "a buffer in shared memory that a table keeps")
class LeavesSharedMemory(FakeWorker):
    """Leaves shared memory behind for every worker."""

    def __init__(self, folder: Any) -> None:
        super().__init__(folder)
        _LEFT.append(os.memfd_create("rollout-core-mutant"))


def close_left() -> None:
    """Take away what ``LeavesSharedMemory`` has left."""
    while _LEFT:
        os.close(_LEFT.pop())
