"""W4, W5, W6 and T5 by programs: what is asked of a worker in any order, beside a model of it."""

from __future__ import annotations

from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy

from rollout_core.testing.checks.worker_base import (
    ABORT_ALL,
    FAILS,
    FREES,
    GO,
    PAUSE,
    RESUMES,
    RUN,
    STEPS,
    SYNCS,
    aborts,
    programs,
    rounds,
    submits,
    worker_check,
)
from rollout_core.testing.worker_cases import Step, WorkerCase
from rollout_core.testing.worker_play import play

_REQUESTS = frozenset({"requests"})
#: Calls whose ids meet again soon.
_AGAIN = submits(ids=st.integers(0, 1))

worker_check(
    "worker/W4-ends",
    "every request ends once, as 'stop' or 'length', with the tokens of the greedy reference, whatever else is under way",
    cases=lambda capabilities: programs(submits(), STEPS, RUN, GO),
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
    cases=lambda capabilities: rounds(submits(), GO, submits(), aborts() | ABORT_ALL, PAUSE),
    needs=_REQUESTS,
)(play)

worker_check(
    "worker/W4-ids",
    "an id is refused while a request of it is under way, and taken again once that has ended",
    cases=lambda capabilities: rounds(_AGAIN, STEPS, aborts(ids=2) | RUN, _AGAIN),
    needs=_REQUESTS,
)(play)

worker_check(
    "worker/W4-resumed",
    "resumed from its tokens a request ends where an uninterrupted one does, within its budget",
    cases=lambda capabilities: rounds(submits(), STEPS, ABORT_ALL, RESUMES, RESUMES, STEPS),
    needs=_REQUESTS,
)(play)


def _updates(capabilities: frozenset[str]) -> SearchStrategy[WorkerCase]:
    freely = programs(submits(), STEPS, STEPS, SYNCS, SYNCS, aborts(), GO)
    return rounds(submits(), STEPS, SYNCS, STEPS | aborts(), SYNCS, most=2) | freely


worker_check(
    "worker/W5-updates",
    "weights come at any time: each token is of the weights of its version, and none of the old ones comes after an update",
    cases=_updates,
    needs=_REQUESTS,
)(play)

worker_check(
    "worker/W5-resumed",
    "resumed after an update a request goes on from its tokens, with those of the new weights",
    cases=lambda capabilities: rounds(submits(), STEPS, ABORT_ALL, SYNCS, RESUMES, STEPS),
    needs=_REQUESTS,
)(play)

worker_check(
    "worker/T5-updates",
    "an update that fails among requests leaves the version; after the next good one the worker serves",
    cases=lambda capabilities: rounds(submits(), STEPS, FAILS, submits() | aborts(), STEPS, SYNCS),
    needs=_REQUESTS,
)(play)

worker_check(
    "worker/W6-memory",
    "memory is released and resumed, twice too; with new weights requests go on, and new ones are answered",
    cases=lambda capabilities: programs(submits(), STEPS, FREES, FREES, SYNCS, aborts()),
    needs={"requests", "memory"},
)(play)


def _anything(capabilities: frozenset[str]) -> SearchStrategy[WorkerCase]:
    steps = [submits(), STEPS, STEPS, aborts(), ABORT_ALL, RUN, GO, RESUMES, SYNCS, FAILS]
    return programs(*steps, *([FREES] if "memory" in capabilities else []), most=14)


worker_check("worker/W4-programs", "all of this together", cases=_anything, needs=_REQUESTS)(play)


def _killed(capabilities: frozenset[str]) -> SearchStrategy[WorkerCase]:
    some = rounds(submits(), STEPS, aborts(), GO, most=2)
    return some.map(lambda case: WorkerCase(steps=(*case.steps, Step(do="kill"))))


worker_check(
    "worker/W4-killed",
    "when its engine is killed every request that is under way ends as 'failed', and every call after it raises",
    cases=_killed,
    needs={"requests", "process"},
    cost=50,
)(play)
