"""Every mutant of a worker is killed by the clause it breaks, as the golden file has it, and its script shows the bug."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from rollout_core.testing import Violation, check_worker, replay
from rollout_core.testing.mutants import mutants_of
from rollout_core.testing.mutants.worker_weights import close_left
from rollout_core.testing.registry import select_checks

WORKERS = mutants_of("worker")
GOLDEN = Path(__file__).parent / "golden" / "worker_mutants.json"
#: Each case of these takes a second or more, so that shrinking would take minutes, or they depend on who comes first.
NOT_EXACT = {
    *("LosesTheOneBefore", "LosesWhatIsAbortedInTheQueue", "CallsAFailureAborted", "DoesNotNameWhatIsRunning"),
    *("GoesOnInAPause", "IgnoresSeeds"),
}
#: Seconds for a call of a fake: it answers at once, or never; a busy machine may keep it waiting.
TIMEOUT, PATIENT = 1.0, 10.0


@pytest.fixture(scope="module")
def reports():
    yield {}
    close_left()


def without_places(text):
    """The text without file names, line numbers, and the numbers of descriptors."""
    return re.sub(r" \(in [^()]*, [^()]*:\d+\)|(?<=descriptor )\d+", "", text)


@pytest.mark.parametrize("name", WORKERS)
def test_it_is_killed_by_the_clause_that_it_breaks(name, reports, shrinking):
    mutant = WORKERS[name]
    exact = name not in NOT_EXACT
    shrinking(exact)
    timeout = PATIENT if exact else TIMEOUT
    report = reports[name] = check_worker(mutant.target, only=[mutant.killed_by], timeout=timeout)
    result = report[mutant.killed_by]
    assert result.status == "fail", f"{name} survived {mutant.killed_by}"
    if exact:
        assert [without_places(result.text), result.words] == json.loads(GOLDEN.read_text())[name]


@pytest.mark.parametrize("name", sorted(set(WORKERS) - NOT_EXACT))
def test_its_counterexample_fails_again_and_passes_without_the_bug(name, reports):
    mutant = WORKERS[name]
    assert replay(mutant.target, reports[name], timeout=PATIENT).failed
    assert replay(mutant.sound, reports[name], timeout=PATIENT)[mutant.killed_by].status == "pass"


@pytest.mark.parametrize("name", sorted(set(WORKERS) - NOT_EXACT))
def test_its_script_shows_the_bug(name, reports):
    script = reports[name][WORKERS[name].killed_by].script
    with pytest.raises(Violation):
        exec(compile(script, "script", "exec"), {"__name__": "__main__"})
    module = WORKERS[name].subject.__module__
    repaired = script.replace(f"from {module} import", "from rollout_core.testing.fake_engine import FakeWorker as")
    assert repaired != script
    exec(compile(repaired, "script", "exec"), {"__name__": "__main__"})


def test_every_check_of_workers_has_a_mutant():
    assert {check.id for check in select_checks("worker")} == {mutant.killed_by for mutant in WORKERS.values()}
