"""What a caller asks for, checked, and what it is given for it: one future for each sample."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future

import msgspec

from rollout_core.errors import WorkerError
from rollout_core.workers.contract import Completion, SamplingParams
from rollout_core.workers.rollouts import Rollout


def check_request(prompts: Sequence[Sequence[int]], params: SamplingParams, max_batch: int) -> None:
    """Raise ``WorkerError`` for what is no request at all; whether the model can carry it out, the model's side says."""
    if type(params) is not SamplingParams:
        raise WorkerError(f"params is a {type(params).__name__}: pass SamplingParams(response_length=...)")
    if type(max_batch) is not int or not 1 <= max_batch < 2**63:
        raise WorkerError(f"max_batch is {max_batch!r}: pass a whole number of at least 1")
    for index, prompt in enumerate(prompts):
        for position, token in enumerate(prompt):
            if type(token) is not int or not 0 <= token < 2**63:
                raise WorkerError(
                    f"prompt {index} position {position} is {token!r}, no token id: pass plain ints, as tolist() gives"
                )


def request_ids_of(count: int, given: Sequence[str] | None) -> list[str]:
    """One for each of so many prompts; "" for those that are given none. ``WorkerError`` if they are not one for each."""
    if given is None:
        return [""] * count
    ids = list(given)
    if isinstance(given, str) or len(ids) != count or not all(isinstance(one, str) and one for one in ids):
        raise WorkerError(f"request_ids is {given!r}: pass one str for each of {count} prompts")
    if len(set(ids)) < len(ids):
        twice = next(one for one in ids if ids.count(one) > 1)
        raise WorkerError(f"request id {twice!r} is given twice: pass each prompt one of its own")
    return ids


def futures_of(rollouts: Sequence[Rollout], params: SamplingParams) -> list[Future[Completion]]:
    """One for each sample of each prompt, in order."""
    futures = [rollout.future for rollout in rollouts]
    return futures if params.temperature != 0 else [copy for future in futures for copy in _copies(future, params.n)]


def _copies(future: Future[Completion], samples: int) -> list[Future[Completion]]:
    """A future for each sample of a prompt, of which one was made."""
    copies: list[Future[Completion]] = [Future() for _ in range(samples)]

    def settle(made: Future[Completion]) -> None:
        for sample, copy in enumerate(copies):
            if copy.set_running_or_notify_cancel():  # else its owner has cancelled it
                copy.set_result(msgspec.structs.replace(made.result(), sample_index=sample))

    future.add_done_callback(settle)
    return copies
