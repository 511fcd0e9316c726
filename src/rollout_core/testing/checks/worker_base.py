"""What the checks of workers share: how one is declared, and strategies of programs."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any, Final, TypeAlias

from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy

from rollout_core.testing.registry import Check, register
from rollout_core.testing.worker_cases import NO_ID, Step, WorkerCase
from rollout_core.testing.workers import WorkerUnderTest

RunWorker: TypeAlias = Callable[[WorkerUnderTest, WorkerCase], Any]

_PROMPTS: Final = 4  # that preflight makes
_IDS: Final = 4  # few, so that they meet again
_LENGTHS: Final = st.integers(1, 12)


def worker_check(
    id: str,
    title: str,
    *,
    cases: Callable[[frozenset[str]], SearchStrategy[WorkerCase]] | None = None,
    needs: Collection[str] = (),
    cost: int = 1,
) -> Callable[[RunWorker], RunWorker]:
    """Declare a check of workers; without ``cases`` it has one, and is its own program."""

    def declare(run: RunWorker) -> RunWorker:
        register(
            Check(
                id=id,
                title=title,
                run=run,
                cases=cases or (lambda capabilities: st.just(WorkerCase())),
                case_type=WorkerCase,
                needs=frozenset(needs),
                script="worker",
                cost=cost,
            )
        )
        return run

    return declare


def programs(*steps: SearchStrategy[Step], first: SearchStrategy[Step] | None = None, most: int = 8) -> SearchStrategy[WorkerCase]:
    """Programs of these steps, after a first one that gives the others something to do."""
    start = submits() if first is None else first
    # Anything shrinks to a pause, which changes nothing where nothing runs, and from there to nothing.
    rest = st.lists(st.one_of(PAUSE, *steps), min_size=1, max_size=most)
    return st.builds(lambda one, more: WorkerCase(steps=(one, *more)), start, rest)


def rounds(*parts: SearchStrategy[Step], most: int = 3) -> SearchStrategy[WorkerCase]:
    """Programs of up to so many rounds, each of these steps in this order, all but the first of which may be left out."""
    one = st.tuples(parts[0], *(st.none() | part for part in parts[1:]))
    return st.lists(one, min_size=1, max_size=most).map(
        lambda found: WorkerCase(steps=tuple(step for steps in found for step in steps if step is not None))
    )


def submits(*, ids: SearchStrategy[int] | None = None, several: int = 2) -> SearchStrategy[Step]:
    """Calls of up to so many prompts, with ids or without."""
    return st.builds(
        lambda prompts, id, length, n, stop: Step(do="submit", prompts=tuple(prompts), id=id, length=length, n=n, stop=stop),
        st.lists(st.integers(0, _PROMPTS - 1), min_size=1, max_size=several),
        st.integers(NO_ID, _IDS - 1) if ids is None else ids,
        _LENGTHS,
        st.sampled_from((1, 1, 2)),
        st.just(0) | st.integers(1, 6),
    )


def aborts(ids: int = _IDS + 1) -> SearchStrategy[Step]:
    """Of one, of several, of none; of what has ended, or never was."""
    return st.lists(st.integers(0, ids - 1), max_size=3).map(lambda ids: Step(do="abort", ids=tuple(ids)))


ABORT_ALL: Final = st.just(Step(do="abort all"))
STEPS: Final = st.integers(1, 5).map(lambda steps: Step(do="step", steps=steps))
RUN: Final = st.just(Step(do="run"))
#: Beside what follows: which of the two comes first is open then.
GO: Final = st.just(Step(do="go"))
PAUSE: Final = st.just(Step(do="pause"))
RESUMES: Final = st.integers(0, 2).map(lambda at: Step(do="resume from", at=at))
SYNCS: Final = st.integers(0, 1).map(lambda weights: Step(do="sync", weights=weights))
FAILS: Final = st.just(Step(do="fail"))
FREES: Final = st.builds(lambda times, weights: Step(do="free", times=times, weights=weights), st.integers(1, 2), st.integers(0, 1))
