"""Faults in real processes: the part of ``run.py`` that is short enough for every change. One receiver, shared memory.

Each end waits so little that a fault by silence is over soon. Faults that cost time are tried at one step of each kind (of those
that differ by the bucket, the first), SIGKILL and os._exit in turns, as the others see no difference; ``run.py`` does all.
"""

import re
import sys
from pathlib import Path

import pytest

from faults import leaks
from faults.cases import Case, cases, cases_giving_up, steps_of
from faults.harness import Lane, Pool, play_all

TIMEOUT = 0.6


def played(todo: list[Case]) -> int:
    """How many of these there were; fails with what went wrong in any."""
    verdicts = play_all(todo, timeout=TIMEOUT, spares=1)
    seconds = sum(verdict.seconds for verdict in verdicts)
    longest = max(max(verdict.noticed.values(), default=0.0) for verdict in verdicts)
    print(
        f"{len(verdicts)} cases, {seconds / len(verdicts):.2f} s each; at most {longest:.3f} s from fault to end", file=sys.stderr
    )
    bad = [f"{verdict.case}: {'; '.join(verdict.problems)}" for verdict in verdicts if verdict.problems]
    assert not bad, "\n".join(bad)
    return len(verdicts)


def first_of_each(todo: list[Case]) -> list[Case]:
    """Of steps that differ only by the bucket, the first."""
    kept = {}
    for case in todo:
        kept.setdefault((case.who, re.sub(r" \d+$", "", case.step), case.fault), case)
    return list(kept.values())


def test_the_steps_are_those_that_happen():
    pool = Pool(0)
    lane = Lane(pool, 5.0)
    try:
        verdict = lane.play(None)
        happened = [set(end.result["steps"]) for end in verdict.ends]
    finally:
        lane.close()
        pool.close()
    assert verdict.problems == []
    assert happened == [{"begin", *steps_of(end, 1), "returned"} for end in (0, 1)]


@pytest.mark.parametrize(("target", "faults"), [("direct", {"raise", "shut", "corrupt"}), ("staged", {"interrupt", "close"})])
def test_every_step_raises_is_interrupted_loses_its_connection_or_bytes(target, faults):
    assert played(list(cases("listen", (target,), frozenset(faults)))) > 80


def test_every_step_stops_and_each_kind_of_step_dies_or_takes_too_long():
    todo = list(cases("memory", ("staged",), frozenset({"stop, go on"})))
    todo += first_of_each(list(cases("memory", ("direct",), frozenset({"delay", "overdue"}))))
    for fault, turn in (("kill", 0), ("exit", 1)):
        todo += first_of_each(list(cases("memory", ("direct",), frozenset({fault}))))[turn::2]
    # In the order of steps: while one case waits in silence, the processes for another start.
    assert played(sorted(todo, key=lambda case: (case.who, case.step))) > 100


def test_every_step_of_giving_up_fails_again():
    assert played(list(cases_giving_up("memory", "staged", frozenset({"raise", "interrupt", "shut", "close"}))))


def test_rounds_leave_nothing():
    problems, lines = leaks.measure(*leaks.SHORT)
    print("\n".join(lines), file=sys.stderr)
    assert problems == []


def test_the_large_model_is_refused_memory():
    scarce = cases("memory", ("staged",), frozenset({"no shared memory", "no memory"}))
    assert played([case for case in scarce if case.step in ("begin", "examine")]) == 4


def test_no_process_is_left():
    """After all of the above: what this process started has ended and was waited for."""
    children = Path(f"/proc/self/task/{Path('/proc/thread-self').resolve().name}/children").read_text().split()
    assert [pid for pid in children if b"faults/worker.py" in Path(f"/proc/{pid}/cmdline").read_bytes()] == []
