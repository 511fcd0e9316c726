"""Searching one check's cases for a violation, and shrinking what is found."""

from __future__ import annotations

import time
from collections.abc import Callable

import msgspec
from hypothesis import HealthCheck, Phase, Verbosity, given, seed, settings
from hypothesis.strategies import SearchStrategy

from rollout_core.testing.isolation import Outcome

#: Seconds for shrinking one failure, where a search is not told.
SHRINK_SECONDS: float = 10.0


class Finding(msgspec.Struct, frozen=True, kw_only=True):
    """What a search found: the smallest failing case as JSON and its outcome, or none. ``skip``: why nothing could be judged."""

    examples: int
    case: bytes | None = None
    outcome: Outcome | None = None
    skip: str = ""


class _Found(Exception):
    pass


def search(
    strategy: SearchStrategy[msgspec.Struct],
    execute: Callable[[bytes], Outcome],
    *,
    max_examples: int,
    random_seed: int,
    shrink_seconds: float | None = None,
) -> Finding:
    """Try up to ``max_examples`` cases; on a violation shrink it for at most ``shrink_seconds``, or ``SHRINK_SECONDS``. The same
    seed gives the same cases.

    Outcomes are kept by case, so that a subject that answers differently the second time does not confuse the search; it is run
    once more at the end, and a second answer is told.
    """
    known: dict[bytes, Outcome] = {}
    last: list[tuple[bytes, Outcome]] = []
    deadline: list[float] = []

    @seed(random_seed)
    @settings(
        max_examples=max_examples,
        deadline=None,
        database=None,
        derandomize=False,
        print_blob=False,
        report_multiple_bugs=False,
        verbosity=Verbosity.quiet,
        phases=(Phase.generate, Phase.shrink),
        # The subject's time counts as drawing time does; how long it may take is the timeout's to say.
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.nested_given],
    )
    @given(strategy)
    def attempt(case: msgspec.Struct) -> None:
        data = msgspec.json.encode(case)
        outcome = known.get(data)
        if outcome is None:
            if deadline and time.monotonic() > deadline[0]:
                return  # what was found is small enough
            outcome = known[data] = execute(data)
        if outcome.result == "violation":
            last[:] = [(data, outcome)]
            if not deadline:
                deadline.append(time.monotonic() + (SHRINK_SECONDS if shrink_seconds is None else shrink_seconds))
            raise _Found

    try:
        attempt()
    except _Found:
        data, outcome = last[0]
        again = execute(data) if not outcome.fatal else outcome
        if again.result != "violation":
            outcome = msgspec.structs.replace(
                outcome, text=f"{outcome.text} (a second run of the same case passed: it does not depend on the case alone)"
            )
        return Finding(examples=len(known), case=data, outcome=outcome)
    judged = any(outcome.result == "pass" for outcome in known.values())
    reasons = [outcome.text for outcome in known.values() if outcome.result == "skip"]
    return Finding(examples=len(known), skip=reasons[0] if reasons and not judged else "")
