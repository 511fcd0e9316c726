"""Bugs of workers in requests: how they end, what aborts say and do, ids, budgets, seeds, and an engine that is gone."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from functools import partial
from typing import Any

import msgspec

from rollout_core.errors import WorkerError
from rollout_core.testing.fake_engine import VOCABULARY, FakeEngine, Row
from rollout_core.testing.mutants.registry import worker_mutant
from rollout_core.testing.mutants.worker_base import Tampers, Trusting, replaced
from rollout_core.workers.contract import Completion, SamplingParams, Status
from rollout_core.workers.engine import Emit, Group, Progress
from rollout_core.workers.worker import SyncReport

# How requests end.


class _LosesWhatWaits(FakeEngine):
    def submit(self, group: Group) -> None:
        super().submit(group)
        self.groups = self.groups[-1:]


@worker_mutant("W4-ends", "a slot for the next request, which the one after it takes")
class LosesTheOneBefore(Trusting):
    """Forgets the requests of a call when the next comes: they never end."""

    engine = _LosesWhatWaits


@worker_mutant("W4-ends", "a finish reason of 'length' whatever happened")
class CallsEverythingLength(Tampers):
    """Says 'length' of responses that an EOS has ended."""

    def tamper(self, done: Completion) -> Completion:
        return replaced(done, status="length" if done.status == "stop" else done.status)


class _AttendsToOthers(FakeEngine):
    def sample(self, row: Row) -> Progress:
        cache = self.cache_of(row)
        if sum(len(rows) for _, rows in self.groups) > 1:
            cache.update(b"padding")
        return super().sample(row)


@worker_mutant("W4-ends", "padding that is attended to")
class DependsOnTheBatch(Trusting):
    """Gives a request other tokens when others are under way."""

    engine = _AttendsToOthers


class _OneTokenMore(FakeEngine):
    def status(self, row: Row, token: int) -> Status | None:
        ended = super().status(row, token)
        return None if ended == "length" and len(row.tokens) == row.params.response_length > 1 else ended


@worker_mutant("W4-ends", "counting a prompt's last token as the first of the response")
class GivesATokenMore(Trusting):
    """Gives one token more than was asked for."""

    engine = _OneTokenMore


@worker_mutant("W4-ends", "a pause that stops new requests only")
class GoesOnInAPause(Trusting):
    """Does not pause."""

    def pause(self) -> None:
        self.resume()


# Aborts.


@worker_mutant("W4-schedules", "an HTTP 200 for an abort that the engine ignores")
class AbortDoesNothing(Trusting):
    """Says that it ended the requests, and does not."""

    def abort(self, request_ids: Sequence[str] | None = None) -> list[str]:
        return list(dict.fromkeys(rollout.request_id for rollout in self._rollouts.find(request_ids)))


@worker_mutant("W4-schedules", "an aborted request that is answered with None")
class AbortDropsTokens(Tampers):
    """Gives an aborted request no tokens."""

    def tamper(self, done: Completion) -> Completion:
        return replaced(done, token_ids=()) if done.status == "aborted" else done


@worker_mutant("W4-aborts", "the token that was under way when the abort came")
class AbortMakesUpAToken(Tampers):
    """Gives an aborted request a token that its model would not."""

    def tamper(self, done: Completion) -> Completion:
        if done.status != "aborted" or not done.token_ids:
            return done
        more, logprobs = (done.token_ids[-1] + 1) % VOCABULARY, done.logprobs or ()
        return replaced(done, token_ids=(*done.token_ids, more), logprobs=(*logprobs, -1.0), token_versions=None)


@worker_mutant("W4-schedules", "a trainer that takes what was aborted for complete")
class MixesStatuses(Tampers):
    """Says 'stop' of what was aborted."""

    def tamper(self, done: Completion) -> Completion:
        return replaced(done, status="stop") if done.status == "aborted" else done


@worker_mutant("W4-schedules", "verl: an abort of one that is told to the whole engine")
class AbortEndsAll(Trusting):
    """Ends all requests when one is to be aborted."""

    def abort(self, request_ids: Sequence[str] | None = None) -> list[str]:
        named = self._rollouts.find(request_ids)
        ended = super().abort() if named else []
        return [name for name in ended if request_ids is None or name in request_ids]


@worker_mutant("W4-schedules", "an abort that answers with what it was asked")
class SaysWhatItWasAsked(Trusting):
    """Names every id that it was given, ended before, unknown or not."""

    def abort(self, request_ids: Sequence[str] | None = None) -> list[str]:
        ended = super().abort(request_ids)
        return ended if request_ids is None else list(dict.fromkeys(request_ids))


@worker_mutant("W4-schedules", "an abort that is handled at the end of what the request does anyway")
class EndsTwice(Trusting):
    """Names a request in a second abort again."""

    def __init__(self, folder: Any) -> None:
        super().__init__(folder)
        self.before: list[str] = []

    def abort(self, request_ids: Sequence[str] | None = None) -> list[str]:
        ended = super().abort(request_ids)
        again = [name for name in self.before if name in (request_ids or ()) and name not in ended]
        self.before += [name for name in ended if name]
        return ended + list(dict.fromkeys(again))


class _LosesTheQueued(FakeEngine):
    def end(self, row: Row, emit: Emit) -> None:
        if row.tokens:
            super().end(row, emit)


@worker_mutant("W4-schedules", "vLLM: a request that is aborted before it is scheduled gives no output")
class LosesWhatIsAbortedInTheQueue(Trusting):
    """Says nothing of a request that is aborted before its first token: its future never ends."""

    engine = _LosesTheQueued


class _TakesItsTime(FakeEngine):
    """As slow as a model: what comes meanwhile finds requests under way."""

    def step(self, emit: Emit, between: Callable[[], None]) -> None:
        time.sleep(0.002)
        super().step(emit, between)


@worker_mutant("W4-racing", "a list that is made before the abort")
class DoesNotNameWhatIsRunning(Trusting):
    """Names no request that it ended, unless it was paused."""

    engine = _TakesItsTime
    is_free = False

    def resume(self) -> None:
        super().resume()
        self.is_free = True

    def pause(self) -> None:
        super().pause()
        self.is_free = False

    def step(self, steps: int = 1) -> None:
        super().step(steps)
        self.is_free = False

    def abort(self, request_ids: Sequence[str] | None = None) -> list[str]:
        ended = super().abort(request_ids)
        return [] if self.is_free else ended


@worker_mutant("W4-programs", "requests that an update moves from one queue to another, in which aborts do not look")
class MissesWhatAnUpdateMoved(Trusting):
    """Aborts nothing that was under way when the weights changed."""

    def __init__(self, folder: Any) -> None:
        super().__init__(folder)
        self.moved: set[str] = set()

    def sync_weights(self, source: Any, **options: Any) -> SyncReport:
        self.moved |= {rollout.request_id for rollout in self._rollouts.find(None)}
        return super().sync_weights(source, **options)

    def abort(self, request_ids: Sequence[str] | None = None) -> list[str]:
        named = [rollout.request_id for rollout in self._rollouts.find(request_ids)]
        return super().abort([name for name in named if name not in self.moved])


# Ids.


@worker_mutant("W4-ids", "a table of requests from which aborted ones are not taken")
class KeepsIds(Trusting):
    """Refuses an id of a request that was aborted."""

    def __init__(self, folder: Any) -> None:
        super().__init__(folder)
        self.kept: set[str] = set()

    def abort(self, request_ids: Sequence[str] | None = None) -> list[str]:
        ended = super().abort(request_ids)
        self.kept |= {name for name in ended if name}
        return ended

    def submit(self, prompts: Any, params: SamplingParams, *, request_ids: Any = None, **options: Any) -> list[Future[Completion]]:
        taken = self.kept & set(request_ids or ())
        if taken:
            raise WorkerError(f"request {min(taken)!r} is under way")
        return super().submit(prompts, params, request_ids=request_ids, **options)


@worker_mutant("W4-ids", "a dictionary by request id")
class TakesAnId(Trusting):
    """Takes a second request of an id that is under way."""

    def submit(self, prompts: Any, params: SamplingParams, *, request_ids: Any = None, **options: Any) -> list[Future[Completion]]:
        try:
            return super().submit(prompts, params, request_ids=request_ids, **options)
        except WorkerError:
            return super().submit(prompts, params, **options)


# Going on from a prefix.


@worker_mutant("W4-resumed", "partial rollouts: max_tokens of the request, not of what is left of it")
class ResumesWithTheWholeBudget(Trusting):
    """Gives a prompt that goes on from an aborted request that request's budget again."""

    def __init__(self, folder: Any) -> None:
        super().__init__(folder)
        self.budgets: dict[tuple[int, ...], int] = {}

    def submit(self, prompts: Any, params: SamplingParams, **options: Any) -> list[Future[Completion]]:
        budget = max([params.response_length, *(self.budgets.get(tuple(prompt), 0) for prompt in prompts)])
        params = msgspec.structs.replace(params, response_length=budget)
        futures = super().submit(prompts, params, **options)
        for place, future in enumerate(futures):
            future.add_done_callback(partial(self._note, prompts[place // params.n], budget))
        return futures

    def _note(self, prompt: Sequence[int], budget: int, future: Future[Completion]) -> None:
        done = future.result()
        if done.status == "aborted" and done.token_ids:
            self.budgets[(*prompt, *done.token_ids)] = budget


class _BeginsAnew(FakeEngine):
    def __init__(self, model: str) -> None:
        super().__init__(model)
        self.known: dict[tuple[int, ...], list[int]] = {}

    def end(self, row: Row, emit: Emit) -> None:
        if row.tokens:
            self.known[(*row.request.prompt, *row.tokens)] = row.request.prompt
        super().end(row, emit)

    def submit(self, group: Group) -> None:
        requests = [msgspec.structs.replace(one, prompt=self.known.get(tuple(one.prompt), one.prompt)) for one in group.requests]
        super().submit(msgspec.structs.replace(group, requests=requests))


@worker_mutant("W4-resumed", "a retry that sends the prompt, and puts what it had in front of the answer")
class BeginsAnew(Trusting):
    """Begins with the prompt again where a request is to go on from its tokens."""

    engine = _BeginsAnew


# Samples.


@worker_mutant("W3-batch", "a seed that the engine is not given")
class IgnoresSeeds(Trusting):
    """Samples without the seed."""

    def generate(self, prompts: Any, params: SamplingParams, **options: Any) -> list[Completion]:
        return super().generate(prompts, msgspec.structs.replace(params, seed=None), **options)


@worker_mutant("W3-batch", "n samples as n times the batch")
class GroupsBySample(Trusting):
    """Gives all first samples, then all second ones."""

    def generate(self, *arguments: Any, **options: Any) -> list[Completion]:
        return sorted(super().generate(*arguments, **options), key=lambda done: (done.sample_index, done.prompt_index))


@worker_mutant("W3-batch", "stop ids that are not passed on")
class IgnoresStopIds(Trusting):
    """Goes on after a stop id."""

    def generate(self, prompts: Any, params: SamplingParams, **options: Any) -> list[Completion]:
        return super().generate(prompts, msgspec.structs.replace(params, stop_token_ids=()), **options)


# An engine that is gone.


@worker_mutant("W4-killed", "an empty answer for a server that is gone")
class CallsAFailureAborted(Tampers):
    """Says 'aborted' of what its engine took with it."""

    def __init__(self, folder: Any) -> None:
        super().__init__(folder, process=True)

    def tamper(self, done: Completion) -> Completion:
        return replaced(done, status="aborted") if done.status == "failed" else done
