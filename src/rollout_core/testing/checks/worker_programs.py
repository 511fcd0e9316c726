"""W4, W5, W6 and T5 by programs: what is asked of a worker in any order, beside a model of it."""

from __future__ import annotations

from hypothesis.strategies import SearchStrategy

from rollout_core.testing.checks.worker_base import (
    ABORT_ALL,
    FAILS,
    FREELY,
    FREES,
    NAMED,
    RESUMES,
    RUN,
    STEPS,
    SYNCS,
    aborts,
    programs,
    submits,
    worker_check,
)
from rollout_core.testing.worker_cases import Step, WorkerCase
from rollout_core.testing.worker_play import play

_REQUESTS = frozenset({"requests"})

worker_check(
    "worker/W4-ends",
    "every request ends once, as 'stop' or 'length', with the tokens of the greedy reference, whatever else is under way",
    cases=lambda capabilities: programs(submits(), STEPS, RUN, FREELY),
    needs=_REQUESTS,
)(play)

worker_check(
    "worker/W4-schedules",
    "under any schedule of aborts every request ends once; abort names those that it ended, each with a prefix of its tokens",
    cases=lambda capabilities: programs(submits(), STEPS, STEPS, aborts(), aborts(), ABORT_ALL, RUN),
    needs=_REQUESTS,
)(play)

worker_check(
    "worker/W4-racing",
    "the same while the worker goes on by itself",
    cases=lambda capabilities: programs(submits(), aborts(), ABORT_ALL, FREELY, STEPS),
    needs=_REQUESTS,
)(play)


def _ids_again(capabilities: frozenset[str]) -> SearchStrategy[WorkerCase]:
    named = submits(ids=NAMED)
    return programs(named, named, STEPS, aborts(), RUN, first=named)


worker_check(
    "worker/W4-ids",
    "an id is refused while a request of it is under way, and taken again once that has ended",
    cases=_ids_again,
    needs=_REQUESTS,
)(play)


def _resumed(capabilities: frozenset[str]) -> SearchStrategy[WorkerCase]:
    return programs(submits(ids=NAMED), STEPS, aborts(), ABORT_ALL, RESUMES, RESUMES, first=submits(ids=NAMED), most=10)


worker_check(
    "worker/W4-resumed",
    "resumed from its tokens a request ends where an uninterrupted one does, within its budget",
    cases=_resumed,
    needs=_REQUESTS,
)(play)

worker_check(
    "worker/W5-updates",
    "weights come at any time: each token is of the weights of its version, and none of the old ones comes after an update",
    cases=lambda capabilities: programs(submits(), STEPS, STEPS, SYNCS, SYNCS, aborts(), FREELY),
    needs=_REQUESTS,
)(play)

worker_check(
    "worker/T5-updates",
    "an update that fails among requests leaves the version; after the next good one the worker serves",
    cases=lambda capabilities: programs(submits(), STEPS, SYNCS, FAILS, aborts()),
    needs=_REQUESTS,
)(play)

worker_check(
    "worker/W6-memory",
    "memory is released and resumed, twice too; with new weights requests go on, and new ones are answered",
    cases=lambda capabilities: programs(submits(), STEPS, FREES, FREES, SYNCS, aborts()),
    needs={"requests", "memory"},
)(play)


def _anything(capabilities: frozenset[str]) -> SearchStrategy[WorkerCase]:
    steps = [submits(), STEPS, STEPS, aborts(), ABORT_ALL, RUN, FREELY, RESUMES, SYNCS, FAILS]
    return programs(*steps, *([FREES] if "memory" in capabilities else []), most=14)


worker_check("worker/W4-programs", "all of this together", cases=_anything, needs=_REQUESTS)(play)


def _killed(capabilities: frozenset[str]) -> SearchStrategy[WorkerCase]:
    some = programs(submits(), STEPS, aborts(), FREELY, most=3)
    return some.map(lambda case: WorkerCase(steps=(*case.steps, Step(do="kill"))))


worker_check(
    "worker/W4-killed",
    "when its engine is killed every request that is under way ends as 'failed', and every call after it raises",
    cases=_killed,
    needs={"requests", "process"},
    cost=50,
)(play)
