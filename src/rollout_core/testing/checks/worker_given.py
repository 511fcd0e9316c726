"""W1 to W5, T3 and T5 as preflight asks for them: one program each, the same for every worker."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rollout_core.preflight import checks
from rollout_core.preflight.checks import Context
from rollout_core.testing.checks.worker_base import worker_check
from rollout_core.testing.worker_cases import WorkerCase
from rollout_core.testing.workers import WorkerUnderTest
from rollout_core.workers.contract import SamplingParams


@contextmanager
def _whole(worker: WorkerUnderTest) -> Iterator[None]:
    """A worker that fails is given up: the next check begins with another."""
    try:
        yield
    except BaseException:
        worker.stop()
        raise


def _given(check: Callable[[Context], str]) -> Callable[[WorkerUnderTest, WorkerCase], None]:
    """A check of preflight, on a worker that has its trainer's weights."""

    def run(worker: WorkerUnderTest, case: WorkerCase) -> None:
        del case
        with _whole(worker):
            worker.given(_trainers_weights)
            worker.given(check)

    return run


def _trainers_weights(context: Context) -> str:
    context.running().sync_weights(context.trainer, capacity=context.capacity)
    return ""


@worker_check("worker/W1-greedy-parity", "greedy tokens are those of the trainer's model, and change with its weights")
def greedy_parity(worker: WorkerUnderTest, case: WorkerCase) -> None:
    del case
    with _whole(worker):
        for check in (_trainers_weights, _first_tokens, _trainers_weights, checks.greedy_equals):
            worker.given(check)


def _first_tokens(context: Context) -> str:
    """By the old weights; then the trainer takes a step."""
    completions = context.running().generate(context.prompts, SamplingParams(response_length=context.response_length))
    context.first_tokens = [completion.token_ids for completion in completions]
    context.models.perturb(context.trainer, context.perturbation, computed=context.running().takes_computed)
    return ""


@worker_check("worker/W2-start", "before any update the worker has what its folder has, bit for bit", needs={"weights"})
def start(worker: WorkerUnderTest, case: WorkerCase) -> None:
    del case
    assert worker.it  # it runs
    digests = worker.first_digests
    if isinstance(digests, Exception):
        raise digests
    worker.given(lambda context: _as_in_the_folder(context, digests))


def _as_in_the_folder(context: Context, digests: dict[str, str]) -> str:
    trainer, context.trainer = context.trainer, context.models.load_trainer(context.folder)
    try:
        return checks.compare(context, digests)
    finally:
        context.trainer = trainer


worker_check(
    "worker/W2-read-back",
    "every parameter and buffer of a changed trainer is read back from the worker, bit for bit, tied ones under each name",
    needs={"weights"},
)(_given(checks.weights_arrive))

worker_check(
    "worker/W3-batch",
    "samples are grouped by prompt and laid out as a trainer reads them; EOS and stop ids end them; a seed repeats them",
)(_given(checks.batch_holds))

worker_check(
    "worker/W4-aborts",
    "requests aborted in the queue and while they decode end once, with a prefix, from which they can go on",
    needs={"requests"},
)(_given(checks.aborts_end))

worker_check(
    "worker/W5-under-requests",
    "weights change under requests: each token is of the weights whose version it carries",
    needs={"requests"},
)(_given(checks.weights_change_under_requests))

worker_check(
    "worker/T5-damage",
    "an update with one flipped bit is refused, the version stays, and the next good one is taken",
    needs={"weights"},
)(_given(checks.damage_is_refused))

worker_check(
    "worker/T5-half",
    "an update that stops halfway raises its source's error, and is never sampled from",
    needs={"weights"},
)(_given(checks.half_an_update_is_no_update))


@worker_check("worker/T3-left-behind", "a closed worker leaves no process, shared memory or socket")
def left_behind(worker: WorkerUnderTest, case: WorkerCase) -> None:
    del case
    try:
        worker.given(_trainers_weights)
        worker.given(checks.nothing_is_left)
    finally:
        worker.stop()
