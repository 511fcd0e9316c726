"""``rollout-core check`` and ``parametrize_tracker_checks`` on trackers."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap

import pytest
from typer.testing import CliRunner

from rollout_core.cli import app

TRACKERS = """
from rollout_core.testing.own_tracker import ConversationTracker


class ZeroForMissing(ConversationTracker):
    def logprobs(self, state):
        return [0.0 if value is None else value for value in state.logprobs]


def made(processor):
    return ConversationTracker(processor)
"""


@pytest.fixture
def run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mytracker.py").write_text(TRACKERS)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    monkeypatch.delitem(sys.modules, "mytracker", raising=False)

    def run(*arguments):
        result = CliRunner().invoke(app, ["check", *arguments])
        assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
        return result.exit_code, result.stdout, result.stderr.strip()

    return run


def test_a_tracker_is_checked_as_one(run):
    code, shown, _ = run("mytracker:ZeroForMissing", "--only", "M12-logprobs", "--only", "M12-mask", "--max-examples", "20")
    assert code == 1
    assert "fail  tracker/M12-logprobs  a sampled token has the logprob that came with it" in shown
    assert "      case: world chatml+rows; start [user 'a']; sample 'a', logprobs all\n" in shown
    assert "pass  tracker/M12-mask" in shown


def test_a_factory_and_a_short_name_too(run):
    for target in ("mytracker:made", "rollout_core-tracker"):
        code, shown, _ = run(target, "--only", "M12-mask", "--max-examples", "5", "--world", "chatml+rows")
        assert code == 0, shown
        assert f"{target}: level 2026.1, seed 0, up to 5 cases a check" in shown


def test_reports_and_scripts(run, tmp_path):
    code, _, _ = run(
        *("mytracker:ZeroForMissing", "--only", "M12-logprobs", "--json", "report.json", "--scripts", "bugs"),
        *("--max-examples", "20"),
    )
    assert code == 1
    assert json.loads((tmp_path / "report.json").read_text())["results"][0]["id"] == "tracker/M12-logprobs"
    script = tmp_path / "bugs" / "M12_logprobs.py"
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 1
    assert "Violation: the logprob of token 0 differs" in done.stderr
    code, shown, _ = run("mytracker:ZeroForMissing", "--replay", "report.json")
    assert code == 1
    assert "fail  tracker/M12-logprobs" in shown


def test_a_world_needs_a_tracker_and_must_be_there(run):
    assert run("reference", "--world", "chatml+rows")[2] == "--world is for trackers, and this is a packer"
    assert run("rollout_core-tracker", "--world", "nowhere")[2].startswith("there is no world 'nowhere'; there are chatml+rows, ")


def test_the_list_has_trackers(run):
    _, shown, _ = run("--list")
    assert "  tracker/M5-literal-placeholder " in shown
    assert "  forks                        claim: states are values" in shown
    assert "  chatml+rows\n" in shown
    assert "  rollout_core-tracker         rollout_core.testing.own_tracker:ConversationTracker" in shown


FILE = """
    from rollout_core.testing import parametrize_tracker_checks
    from mytracker import ZeroForMissing
    from rollout_core.testing.own_tracker import ConversationTracker

    @parametrize_tracker_checks([ConversationTracker], only=["M12"], max_examples=10, worlds=["chatml+rows", "glm+bare"])
    def test_sound(tracker, check):
        check(tracker)

    KNOWN = {"tracker/M12-logprobs": "known"}

    @parametrize_tracker_checks([ZeroForMissing], only=["M12"], max_examples=10, expected_failures=KNOWN)
    def test_known(tracker, check):
        check(tracker)
"""


def test_checks_are_pytest_tests(tmp_path):
    (tmp_path / "mytracker.py").write_text(TRACKERS)
    (tmp_path / "test_it.py").write_text(textwrap.dedent(FILE))
    command = [sys.executable, "-m", "pytest", "-vv", "-rxX", "-p", "no:cacheprovider", "test_it.py"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "200", "PYTHONPATH": str(tmp_path)}
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stdout
    assert "test_sound[ConversationTracker-tracker/M12-mask] PASSED" in done.stdout
    assert "5 passed, 1 xfailed" in done.stdout
