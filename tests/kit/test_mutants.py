"""Every mutant is killed by the clause it breaks, with the counterexample of the golden file, and its script shows the bug."""

from __future__ import annotations

import builtins
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from rollout_core.testing import check_packer, get_check, replay
from rollout_core.testing.mutants import mutants_of
from rollout_core.testing.registry import select_checks
from rollout_core.testing.scripts import reproduction

MUTANTS = mutants_of("packer")
GOLDEN = Path(__file__).parent / "golden" / "mutants.json"
#: Whether its bug shows depends on which memory is used again.
BY_CHANCE = {"TiesByAddressInStreams"}
#: Not run in this process: they end it, never end, or start others.
APART = {"DiesOfScalars", "WaitsForTheFirst", "HangsOnAnExactFit", "PlansByHash"}
#: A case of these is large or depends on when the search gave up waiting.
NOT_EXACT = {"CountsInOneByte", "HangsOnAnExactFit"} | BY_CHANCE


def without_places(text: str) -> str:
    """The text without file names and line numbers."""
    return re.sub(r" \(in [^()]*, [^()]*:\d+\)", "", text)


@pytest.fixture(scope="module")
def reports():
    return {}


@pytest.mark.parametrize("name", MUTANTS)
def test_it_is_killed_by_the_clause_that_it_breaks(name, reports, shrinking):
    mutant = MUTANTS[name]
    shrinking(name not in NOT_EXACT)
    report = check_packer(mutant.target, only=[mutant.killed_by], timeout=2.0)
    result = report[mutant.killed_by]
    assert result.status == "fail", f"{name} survived {mutant.killed_by}"
    reports[name] = report
    if name in NOT_EXACT:
        return
    golden = json.loads(GOLDEN.read_text())
    assert [without_places(result.text), result.words] == golden[name]


@pytest.mark.parametrize("name", sorted(set(MUTANTS) - {"WaitsForTheFirst", "HangsOnAnExactFit"} - BY_CHANCE))
def test_its_counterexample_fails_again_and_passes_without_the_bug(name, reports):
    assert replay(MUTANTS[name].target, reports[name]).failed
    assert replay("reference", reports[name]).ok


@pytest.mark.parametrize("name", sorted(set(MUTANTS) - APART - BY_CHANCE))
def test_its_script_shows_the_bug(name, reports):
    mutant = MUTANTS[name]
    check = get_check(mutant.killed_by)
    if not check.script:
        pytest.fail(f"{check.id} has no script")
    script = reports[name][check.id].script
    with pytest.raises(BaseException):  # noqa: B017 - a script may fail with whatever the packer raises
        exec(compile(script, "script", "exec"), {"__name__": "__main__"})
    vars(builtins).pop("rollout_core_unpickled", None)
    sound = script.replace(
        f"from {mutant.subject.__module__} import {name}", f"from rollout_core.testing.reference import ReferencePacker as {name}"
    )
    assert sound != script
    exec(compile(sound, "script", "exec"), {"__name__": "__main__"})


@pytest.mark.parametrize(("name", "code"), [("DiesOfScalars", 3), ("PlansByHash", 1)])
def test_its_script_runs_as_a_program(name, code, reports, tmp_path):
    (tmp_path / "script.py").write_text(reports[name][MUTANTS[name].killed_by].script)
    run = subprocess.run([sys.executable, tmp_path / "script.py"], capture_output=True, text=True)
    assert run.returncode == code, run.stderr


def test_every_clause_with_a_check_has_a_mutant():
    killed = {mutant.killed_by for mutant in MUTANTS.values()}
    assert {check.id for check in select_checks("packer")} == killed


def test_there_are_as_many_as_were_asked_for():
    assert len(MUTANTS) >= 24


def test_a_script_that_nobody_has_is_empty():
    check = get_check("packer/B1-order")
    assert reproduction(check, object(), "reference", "") == ""
