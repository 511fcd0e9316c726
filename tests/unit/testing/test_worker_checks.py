"""Workers as subjects: what is one, what a case says, and how the command, scripts, reports and pytest take them."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap

import pytest
from typer.testing import CliRunner

from rollout_core.cli import app
from rollout_core.testing import Violation, check_worker, recheck
from rollout_core.testing.fake_engine import FakeModels, FakeWorker
from rollout_core.testing.targets import kind_of
from rollout_core.testing.worker_cases import Step, WorkerCase
from rollout_core.workers import HFWorker


def make(folder):
    return FakeWorker(folder)


make.models = FakeModels


@pytest.mark.parametrize("target", [make, FakeWorker, HFWorker, lambda folder, device="cpu": None])
def test_classes_of_workers_and_what_takes_a_folder_are_workers(target):
    assert kind_of(target) == "worker"


@pytest.mark.parametrize(("target", "kind"), [(lambda path: None, "tracker"), (lambda receivers: None, "carrier"), (3, "packer")])
def test_what_takes_something_else_is_no_worker(target, kind):
    assert kind_of(target) == kind


def test_what_makes_no_sense_is_refused_before_a_worker_starts():
    def never(folder):
        raise AssertionError("it was started")

    for options, message in (
        ({"only": ["W99"]}, "there is no check 'W99'"),
        ({"max_examples": 0}, "max_examples is 0"),
        ({"timeout": 0}, "timeout 0"),
        ({"level": "1999.1"}, "level is '1999.1'"),
        ({"expected_failures": {"W4-ids": ""}}, "gives no reason for W4-ids"),
    ):
        with pytest.raises(ValueError, match=message):
            check_worker(never, **options)


def test_an_expected_failure_that_passes_is_stale():
    report = check_worker(make, only=["W4-ids"], expected_failures={"W4-ids": "known"}, max_examples=3)
    assert [result.status for result in report.results] == ["stale"]


def test_a_case_in_words():
    steps = (
        Step(do="submit", prompts=(2, 0), id=1, length=5, n=2, stop=3),
        Step(do="submit", prompts=(1,)),
        Step(do="abort", ids=(1, 7)),
        Step(do="abort"),
        Step(do="step", steps=4),
        Step(do="go"),
        Step(do="resume from", at=1),
        Step(do="sync", weights=1),
        Step(do="fail"),
        Step(do="free", times=2),
        Step(do="kill"),
    )
    assert str(WorkerCase(steps=steps)).split("; ") == [
        "submit prompts 2, 0 for 5 tokens as r1, r2, 2 samples, or until token 3 of the first or an EOS comes",
        "submit prompt 1 for 1 tokens",
        "abort r1, r7",
        "abort nothing",
        "step 4",
        "go",
        "resume what was aborted, from 1",
        "sync weights 1",
        "an update fails",
        "release and resume memory 2 times, sync weights 0",
        "the engine is killed",
    ]


WORKERS = """
from rollout_core.testing.fake_engine import FakeModels, FakeWorker

class Deaf(FakeWorker):
    def abort(self, request_ids=None):
        return []

def sound(folder):
    return FakeWorker(folder)

sound.models = FakeModels
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "myworker.py").write_text(WORKERS)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    monkeypatch.delitem(sys.modules, "myworker", raising=False)
    return tmp_path


def run(*arguments):
    result = CliRunner().invoke(app, ["check", *arguments])
    return result.exit_code, result.output


def test_the_command_scripts_and_replay(folder):
    FakeModels.make_small_model(folder / "model")
    options = ("--only", "W4-schedules", "--model", "model", "--timeout", "2")
    code, shown = run("myworker:Deaf", *options, "--json", "report.json", "--scripts", "bugs")
    assert code == 1
    assert "abort all: it has returned, and request 0 (r0) has not ended" in shown
    assert "case: submit prompt 0 for 1 tokens as r0; abort all" in shown
    script = folder / "bugs" / "W4_schedules.py"
    assert "2. abort all" in script.read_text()
    assert "model='model')" in script.read_text()
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(os.path.abspath, sys.path))}
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, cwd=folder, env=environment)
    assert done.returncode == 1
    assert "Violation: abort all: it has returned, and request 0 (r0) has not ended" in done.stderr
    assert run("myworker:Deaf", "--replay", "report.json")[0] == 1
    assert run("myworker:sound", "--replay", "report.json", "--model", "model")[0] == 0
    code, shown = run("--list")
    assert "  worker/W4-schedules " in shown
    assert "  fake-worker                  rollout_core.testing.fake_engine:FakeWorker" in shown


def test_a_model_is_for_workers(folder):
    code, shown = run("reference", "--model", "model")
    assert code == 2
    assert "--model is for workers, and this is a packer" in shown


def test_recheck_runs_one_case(folder):
    import myworker

    case = '{"steps":[{"do":"submit","prompts":[0],"id":0},{"do":"abort all"}]}'
    recheck(myworker.sound, "worker/W4-schedules", case)
    with pytest.raises(Violation, match="abort all: it has returned"):
        recheck(myworker.Deaf, "worker/W4-schedules", case)


FILE = """
    from rollout_core.testing import parametrize_worker_checks
    from myworker import Deaf, sound

    @parametrize_worker_checks([sound], only=["W4-ids", "W4-killed"], max_examples=10)
    def test_sound(worker, check):
        check(worker)

    @parametrize_worker_checks([Deaf], only=["W4-schedules"], expected_failures={"worker/W4-schedules": "known"}, timeout=2)
    def test_known(worker, check):
        check(worker)
"""


def test_checks_are_pytest_tests(folder):
    (folder / "test_it.py").write_text(textwrap.dedent(FILE))
    command = [sys.executable, "-m", "pytest", "-vv", "-rxXs", "-p", "no:cacheprovider", "test_it.py"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "200", "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stdout
    assert "test_sound[sound-worker/W4-ids] PASSED" in done.stdout
    assert "needs 'process': found: the worker starts processes" in done.stdout
    assert "1 passed, 1 skipped, 1 xfailed" in done.stdout
