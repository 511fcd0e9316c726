"""Tasks share a GPU or have it to themselves, and end in time."""

from __future__ import annotations

import subprocess
import sys
import time

import pytest

from gpu.campaign import SHARING, TASKS, Running, Task, carry_out, choose

NAP = "import time; time.sleep(0.3)"
STUBBORN = "import signal, time; signal.signal(signal.SIGINT, signal.SIG_IGN); time.sleep(60)"


class Host:
    """Begins tasks whose first word is a program, and looks at who has which GPU then."""

    def __init__(self, tmp_path):
        self.tmp_path, self.running, self.places = tmp_path, [], {}

    def begin(self, task, gpus, most):
        self.running = [one for one in self.running if one.process.poll() is None]
        there = [one.task for one in self.running if set(one.gpus) & set(gpus)]
        assert len(gpus) == task.gpus
        assert not there or not (task.alone or any(one.alone for one in there))
        assert len(there) < SHARING
        process = subprocess.Popen([sys.executable, "-c", task.words[0]], start_new_session=True)
        log = (self.tmp_path / f"{task.name}.log").open("wb")
        self.running.append(Running(task, gpus, process, log, time.monotonic() + most))
        self.places[task.name] = gpus
        return self.running[-1]


def tasks(*kinds, program=NAP):
    return [Task(f"{kind}-{number}", "", (program,), alone=kind == "alone") for number, kind in enumerate(kinds)]


@pytest.mark.parametrize("gpus", [1, 2, 3])
def test_tasks_have_the_room_that_they_need(tmp_path, gpus):
    host = Host(tmp_path)
    found = carry_out(tasks("alone", *["shared"] * 7, "alone"), gpus, 60, host.begin)
    assert [status for status, _ in found.values()] == [0] * 9


def test_those_that_share_keep_together(tmp_path):
    host = Host(tmp_path)
    carry_out(tasks(*["shared"] * SHARING, "alone"), 2, 60, host.begin)
    assert [host.places[name] for name in sorted(host.places)] == [(1,), *[(0,)] * SHARING]


def test_a_failure_is_told(tmp_path):
    assert carry_out(tasks("alone", program="raise SystemExit(3)"), 1, 60, Host(tmp_path).begin)["alone-0"][0] == 3


def test_what_needs_more_gpus_is_not_begun(tmp_path):
    two = [Task("two", "", (NAP,), gpus=2)]
    assert carry_out(two, 1, 60, Host(tmp_path).begin) == {"two": (None, 0.0)}
    host = Host(tmp_path)
    assert carry_out(two, 2, 60, host.begin)["two"][0] == 0
    assert host.places["two"] == (0, 1)


def test_nothing_is_begun_after_the_deadline_and_who_does_not_stop_is_killed(tmp_path, monkeypatch):
    monkeypatch.setattr("gpu.campaign.PATIENCE", 0.5)
    start = time.monotonic()
    found = carry_out(tasks("alone", "alone", program=STUBBORN), 1, 1.5, Host(tmp_path).begin)
    assert found["alone-0"][0] == -9
    assert found["alone-1"] == (None, 0.0)
    assert time.monotonic() - start < 30


def test_a_gpu_that_is_shared_is_none_for_who_wants_it_alone():
    task = {kind: Task(kind, "", (), alone=kind == "alone") for kind in ("alone", "shared")}
    running = {"x": Running(task["shared"], (0,), None, None, 0.0)}
    assert choose(task["alone"], running, 1) is None
    assert choose(task["alone"], running, 2) == (1,)
    assert choose(task["shared"], running, 2) == (0,)
    running["y"] = Running(task["alone"], (1,), None, None, 0.0)
    assert choose(task["shared"], running, 2) == (0,)
    assert choose(task["alone"], running, 2) is None


def test_names_are_told_apart():
    assert len({task.name for task in TASKS}) == len(TASKS)
