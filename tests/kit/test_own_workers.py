"""The fake worker under the kit: the same decorator that somebody with a worker uses; and workers that step in other ways, or have
less to check."""

from __future__ import annotations

import msgspec
import pytest

from rollout_core.errors import WorkerError
from rollout_core.testing import SubjectError, check_worker, parametrize_worker_checks
from rollout_core.testing.fake_engine import FakeModels, FakeWorker
from rollout_core.testing.registry import select_checks

QUICK = {"max_examples": 40, "timeout": 5.0}


#: What does not need a process to be killed; see below for that.
IN_A_THREAD = [check.id for check in select_checks("worker") if "process" not in check.needs]


@parametrize_worker_checks(["fake-worker"], max_examples=100, only=IN_A_THREAD)
def test_worker(worker, check):
    check(worker)


class InAProcess(FakeWorker):
    def __init__(self, folder):
        super().__init__(folder, process=True)


def test_a_worker_in_a_process_of_its_own_is_killed_too():
    report = check_worker(InAProcess, only=["W4-killed", "T3-left-behind", "W4-schedules"], max_examples=100)
    assert [result.status for result in report.results] == ["pass"] * 3, str(report)


class StepsFurther(FakeWorker):
    """As an engine that samples on its own between calls."""

    steps_exactly = False

    def step(self, steps=1):
        super().step(steps + 3)


def test_w4_a_worker_need_not_count_steps():
    report = check_worker(StepsFurther, **QUICK)
    assert report.ok, str(report)


class ClaimsToCountSteps(StepsFurther):
    steps_exactly = True


def test_w4_a_worker_that_says_so_has_to():
    report = check_worker(ClaimsToCountSteps, only=["W4-ends"], **QUICK)
    assert "has 2 tokens, and no more than 1 steps were made" in report["worker/W4-ends"].text


class Bare:
    """Somebody else's: no more than what a worker must have."""

    def __init__(self, folder):
        self._worker = FakeWorker(folder)

    @property
    def version(self):
        return self._worker.version

    def sync_weights(self, source, *, capacity, inject=None):
        return self._worker.sync_weights(source, capacity=capacity, inject=inject)

    def generate(self, prompts, params):
        return self._worker.generate(prompts, params)

    def close(self):
        self._worker.close()


def make_bare(folder):
    return Bare(folder)


make_bare.models = FakeModels


def test_what_a_worker_has_not_is_not_checked():
    report = check_worker(make_bare, **QUICK)
    assert {result.id for result in report.results if result.status == "pass"} == {
        "worker/T3-left-behind",
        "worker/W1-greedy-parity",
        "worker/W3-batch",
    }
    assert {result.status for result in report.results} == {"pass", "skip"}
    missing = {reason.partition(":")[0] for reason in report.skipped()}
    assert missing == {"needs 'weights'", "needs 'requests'", "needs 'memory'", "needs 'process'"}


class Counted(FakeWorker):
    made = 0

    def __init__(self, folder):
        Counted.made += 1
        super().__init__(folder)


def test_one_worker_serves_all_checks_but_the_one_that_closes_it():
    Counted.made = 0
    report = check_worker(Counted, max_examples=5)
    assert report.ok, str(report)
    assert Counted.made == 2


class FailsOnce(Counted):
    def abort(self, request_ids=None):
        if Counted.made == 1:
            raise ZeroDivisionError("planted")
        return super().abort(request_ids)


def test_a_worker_that_a_check_left_broken_is_started_again():
    Counted.made = 0
    report = check_worker(FailsOnce, only=["W4-aborts", "W4-schedules"], max_examples=5)
    assert [result.status for result in report.results] == ["fail", "pass"]
    assert "abort" in report["worker/W4-aborts"].text
    assert "ZeroDivisionError: planted" in report["worker/W4-aborts"].text
    assert Counted.made == 2


class DoesNotStart(FakeWorker):
    def __init__(self, folder):
        raise WorkerError(f"no room for {folder.name}")


def make_nothing(folder):
    return object()


make_nothing.models = FakeModels


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (3, "an int cannot be called; a worker under test is make_worker"),
        (DoesNotStart, "the worker: start raised WorkerError: no room for model"),
        (make_nothing, "an object has no method sync_weights; a worker under test has sync_weights"),
    ],
)
def test_what_is_no_worker_is_refused(make, message):
    with pytest.raises(SubjectError) as raised:
        check_worker(make, **QUICK)
    assert message in str(raised.value)


def test_a_folder_is_taken_for_the_model(tmp_path):
    FakeModels.make_small_model(tmp_path)
    assert check_worker("fake-worker", model=tmp_path, **QUICK).ok


class WithoutSeeds(FakeWorker):
    """As an engine that cannot repeat what it sampled, nor let go of its memory."""

    capabilities = frozenset()

    def generate(self, prompts, params, **options):
        if params.seed is not None:
            raise WorkerError("this worker takes no seed")
        return super().generate(prompts, params, **options)

    def release_memory(self):
        raise WorkerError("this engine cannot let go of its memory")


def test_what_a_worker_says_that_it_cannot_is_not_asked_for():
    report = check_worker(WithoutSeeds, only=["W3-batch", "W4-programs", "W6-memory"], **QUICK)
    assert {result.id: result.status for result in report.results} == {
        "worker/W3-batch": "pass",
        "worker/W4-programs": "pass",
        "worker/W6-memory": "skip",
    }


class StopsNowhere(WithoutSeeds):
    def generate(self, prompts, params, **options):
        return super().generate(prompts, msgspec.structs.replace(params, stop_token_ids=()), **options)


def test_w3_stop_ids_are_judged_without_seeds_too():
    report = check_worker(StopsNowhere, only=["W3-batch"], **QUICK)
    assert "tokens go on after an EOS or stop id" in report["worker/W3-batch"].text
