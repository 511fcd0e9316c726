"""Carriers as subjects: what is one, what is refused, and how the command, the reports and pytest take them."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap

import pytest
from typer.testing import CliRunner

from rollout_core.cli import app
from rollout_core.testing import SubjectError, Violation, check_carrier, recheck
from rollout_core.testing.carrier_cases import CarrierCase, Step
from rollout_core.testing.carriers import CARRIER_CAPABILITIES, CarrierUnderTest
from rollout_core.testing.reference_carrier import ReferenceCarrier
from rollout_core.testing.registry import select_checks
from rollout_core.testing.targets import kind_of

QUICK = {"only": ["T1-slots"], "max_examples": 5, "isolate": False}


def function(receivers):
    return ReferenceCarrier()(receivers)


class Single(ReferenceCarrier):
    capabilities = frozenset({"single"})

    def __call__(self, receivers):
        assert receivers == 1
        return super().__call__(receivers)


@pytest.mark.parametrize("make", [function, ReferenceCarrier, ReferenceCarrier(), Single])
def test_functions_classes_and_instances_are_carriers(make):
    assert kind_of(make) == "carrier"
    assert check_carrier(make, **QUICK).ok


def test_what_takes_something_else_is_no_carrier():
    assert kind_of(lambda processor: None) == "tracker"
    assert kind_of(object()) == "packer"


def test_a_single_carrier_is_never_asked_for_more():
    report = check_carrier(Single, only=["T4-messages", "T2-others", "T4-receivers"], max_examples=30, isolate=False)
    assert [result.status for result in report.results] == ["skip", "pass", "skip"]
    assert report["carrier/T2-others"].reason == f"needs 'several': {CARRIER_CAPABILITIES['several']}"


def test_how_it_moves_is_found():
    assert CarrierUnderTest(ReferenceCarrier).capabilities == {"rendezvous", "several"}
    assert CarrierUnderTest(Single).capabilities == {"rendezvous", "single"}


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (3, "an int cannot be called; a carrier under test is make(receivers)"),
        (lambda receivers: None, "make(1) gave a NoneType, not a sender's end and a list of receivers' ends"),
        (lambda receivers: (object(), []), "the sender's end is an object, which has no method lay_out"),
        (lambda receivers: (function(1)[0], []), "make(1) gave 0 receivers' ends, and a sender's end with receivers = 1"),
        (lambda receivers: (function(1)[0], [object()]), "receiver 0 is an object, which has no method open"),
    ],
)
def test_what_is_no_carrier_is_refused(make, message):
    with pytest.raises(SubjectError) as raised:
        check_carrier(make, **QUICK)
    assert message in str(raised.value)


def test_unknown_claims_are_refused():
    class Claims(ReferenceCarrier):
        capabilities = frozenset({"fast"})

    with pytest.raises(SubjectError, match="capabilities has 'fast'; a carrier may claim single"):
        check_carrier(Claims, **QUICK)


def test_every_check_says_what_it_is():
    for check in select_checks("carrier"):
        assert check.title
        assert not check.title.endswith(".")
        assert check.script == "carrier"
        assert check.needs <= CARRIER_CAPABILITIES.keys()


def test_a_case_in_words():
    steps = (
        Step(do="post", to=1, nbytes=3),
        Step(do="wait", end=0, to=-1, seconds=-1, nbytes=-1),
        Step(do="move", moves=((0, 5), (2, 7)), nbytes=4, pull_first=True),
        Step(do="stall", ends=(-1, 1), end=0),
        Step(do="update", fault="refuse", to=1),
        Step(do="update", stream=True),
    )
    assert str(CarrierCase(receivers=2, steps=steps, times=3, sizes=(4, 0))).split("; ") == [
        "2 receivers",
        "4, 0 elements in buckets of 64 bytes and 2 slots, staged",
        "the sender posts 3 bytes to receiver 1",
        "receiver 0 polls for as long as it takes, and the sender closes meanwhile",
        "move 5 bytes of slot 0 and 7 bytes of slot 2, the pulls first, and all post 4 bytes meanwhile",
        "the sender and receiver 1 begin to move slot 0, and receiver 0 closes",
        "update that receiver 1 refuses",
        "stream",
        "all of it 3 times",
    ]


CARRIERS = """
from rollout_core.testing.reference_carrier import ReferenceCarrier, ReferenceSender

class Short(ReferenceCarrier):
    class sender(ReferenceSender):
        def post(self, receiver, message):
            super().post(receiver, message[:40])

def sound(receivers):
    return ReferenceCarrier()(receivers)
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mycarrier.py").write_text(CARRIERS)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    monkeypatch.delitem(sys.modules, "mycarrier", raising=False)
    return tmp_path


def test_the_command_scripts_and_replay(folder):
    def run(*arguments):
        result = CliRunner().invoke(app, ["check", *arguments])
        return result.exit_code, result.stdout

    code, shown = run("mycarrier:Short", "--only", "T4-messages", "--json", "report.json", "--scripts", "bugs")
    assert code == 1
    assert "receiver 0: message 0 from the sender has 40 bytes instead of 4095" in shown
    assert "case: 1 receiver; the sender posts 4095 bytes to receiver 0" in shown
    script = folder / "bugs" / "T4_messages.py"
    assert "2. the sender posts 4095 bytes to receiver 0" in script.read_text()
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, cwd=folder)
    assert done.returncode == 1
    assert "Violation: receiver 0: message 0 from the sender has 40 bytes instead of 4095" in done.stderr
    code, shown = run("mycarrier:Short", "--replay", "report.json")
    assert code == 1
    assert run("mycarrier:sound", "--replay", "report.json")[0] == 0
    code, shown = run("--list")
    assert "  carrier/T4-messages " in shown
    assert "  rollout_core-memory          rollout_core.testing.own_carriers:memory_carrier" in shown


def test_recheck_runs_one_case(folder):
    import mycarrier

    case = '{"steps":[{"do":"post","nbytes":41}]}'
    recheck(mycarrier.sound, "carrier/T4-messages", case)
    with pytest.raises(Violation, match="has 40 bytes instead of 41"):
        recheck(mycarrier.Short, "carrier/T4-messages", case)


FILE = """
    from rollout_core.testing import parametrize_carrier_checks
    from mycarrier import Short, sound

    @parametrize_carrier_checks([sound], only=["T4-messages", "T2-closed"], max_examples=10)
    def test_sound(carrier, check):
        check(carrier)

    @parametrize_carrier_checks([Short], only=["T4-messages"], expected_failures={"carrier/T4-messages": "known"})
    def test_known(carrier, check):
        check(carrier)
"""


def test_checks_are_pytest_tests(folder):
    (folder / "test_it.py").write_text(textwrap.dedent(FILE))
    command = [sys.executable, "-m", "pytest", "-vv", "-rxX", "-p", "no:cacheprovider", "test_it.py"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "200", "PYTHONPATH": str(folder)}
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stdout
    assert "test_sound[sound-carrier/T2-closed] PASSED" in done.stdout
    assert "2 passed, 1 xfailed" in done.stdout
