"""Every mutant of a carrier is killed by the clause it breaks, as the golden file has it, and its script shows the bug."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from rollout_core.testing import Violation, check_carrier, replay
from rollout_core.testing.mutants import mutants_of
from rollout_core.testing.mutants.carrier_slots import remove_names
from rollout_core.testing.registry import select_checks

CARRIERS = mutants_of("carrier")
GOLDEN = Path(__file__).parent / "golden" / "carrier_mutants.json"
#: Each case of these takes a second or more, so that shrinking would take minutes, or they depend on who comes first.
NOT_EXACT = {
    *("WaitsForRoom", "PollsInSeconds", "WaitsForTheMove", "LeavesAThread", "ClosesTogether", "SkipsMessagesInAMove"),
    *("GivesMessagesAsOne", "LastInFirstOut"),
}
#: Not run in this process: what they leave would stay in it.
LEAVES = {"KeepsADescriptor", "KeepsTheMapping", "LeavesAName", "LeavesAThread"}


@pytest.fixture(scope="module")
def reports():
    yield {}
    remove_names()


def without_places(text):
    """The text without file names and line numbers, and without a library's own words."""
    return re.sub(r"(DefaultCPUAllocator).*", r"\1", re.sub(r" \(in [^()]*, [^()]*:\d+\)|\[enforce fail[^]]*\] ", "", text))


@pytest.mark.parametrize("name", CARRIERS)
def test_it_is_killed_by_the_clause_that_it_breaks(name, reports, shrinking):
    mutant = CARRIERS[name]
    shrinking(name not in NOT_EXACT)
    report = reports[name] = check_carrier(mutant.target, only=[mutant.killed_by])
    result = report[mutant.killed_by]
    assert result.status == "fail", f"{name} survived {mutant.killed_by}"
    if name not in NOT_EXACT:
        assert [without_places(result.text), result.words] == json.loads(GOLDEN.read_text())[name]


@pytest.mark.parametrize("name", sorted(set(CARRIERS) - NOT_EXACT))
def test_its_counterexample_fails_again_and_passes_without_the_bug(name, reports):
    mutant = CARRIERS[name]
    assert replay(mutant.target, reports[name]).failed
    assert replay(mutant.sound, reports[name])[mutant.killed_by].status == "pass"


@pytest.mark.parametrize("name", sorted(set(CARRIERS) - NOT_EXACT - LEAVES))
def test_its_script_shows_the_bug(name, reports):
    script = reports[name][CARRIERS[name].killed_by].script
    with pytest.raises(Violation):
        exec(compile(script, "script", "exec"), {"__name__": "__main__"})
    module = CARRIERS[name].subject.__module__
    sound = "from rollout_core.testing.reference_carrier import ReferenceCarrier as"
    repaired = script.replace(f"from {module} import", sound)
    assert repaired != script
    exec(compile(repaired, "script", "exec"), {"__name__": "__main__"})


def test_every_check_of_carriers_has_a_mutant():
    assert {check.id for check in select_checks("carrier")} == {mutant.killed_by for mutant in CARRIERS.values()}
