"""Every mutant of a tracker is killed by the clause it breaks, as the golden file has it, and its script shows the bug."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from rollout_core.testing import Violation, check_tracker, get_check, replay
from rollout_core.testing.mutants import MUTANTS, mutants_of
from rollout_core.testing.mutants.tracker_base import probe_templates
from rollout_core.testing.packers import Raised
from rollout_core.testing.registry import select_checks
from rollout_core.testing.targets import OWN_TRACKERS

TRACKERS = mutants_of("tracker")
GOLDEN = Path(__file__).parent / "golden" / "tracker_mutants.json"


def without_places(text: str) -> str:
    """The text without file names and line numbers."""
    return re.sub(r" \(in [^()]*, [^()]*:\d+\)", "", text)


@pytest.fixture(scope="module", autouse=True)
def probed():
    probe_templates()


@pytest.fixture(scope="module")
def reports():
    return {}


@pytest.mark.parametrize("name", TRACKERS)
def test_it_is_killed_by_the_clause_that_it_breaks(name, reports, shrinking):
    mutant = TRACKERS[name]
    shrinking(True)
    report = reports[name] = check_tracker(mutant.target, only=[mutant.killed_by])
    result = report[mutant.killed_by]
    assert result.status == "fail", f"{name} survived {mutant.killed_by}"
    assert [without_places(result.text), result.words] == json.loads(GOLDEN.read_text())[name]


@pytest.mark.parametrize("name", TRACKERS)
def test_its_counterexample_fails_again_and_passes_without_the_bug(name, reports):
    assert replay(TRACKERS[name].target, reports[name]).failed
    sound = replay(TRACKERS[name].sound, reports[name])
    assert sound.ok
    assert sound[TRACKERS[name].killed_by].status == "pass"


@pytest.mark.parametrize("name", TRACKERS)
def test_its_script_shows_the_bug(name, reports, capsys):
    mutant = TRACKERS[name]
    script = reports[name][mutant.killed_by].script
    with pytest.raises((Violation, Raised)):
        exec(compile(script, "script", "exec"), {"__name__": "__main__"})
    module, _, sound = OWN_TRACKERS[mutant.sound].partition(":")
    repaired = script.replace(f"from {mutant.subject.__module__} import {name}", f"from {module} import {sound} as {name}")
    assert repaired != script
    exec(compile(repaired, "script", "exec"), {"__name__": "__main__"})


def test_every_check_of_trackers_has_a_mutant():
    assert {check.id for check in select_checks("tracker")} == {mutant.killed_by for mutant in TRACKERS.values()}


def test_there_are_as_many_as_were_asked_for():
    assert len(TRACKERS) >= 26
    assert all(mutant.bug and not mutant.bug.endswith(".") for mutant in MUTANTS.values())


def test_the_checks_of_the_mutants_are_known():
    assert all(get_check(mutant.killed_by).kind == mutant.kind for mutant in MUTANTS.values())
