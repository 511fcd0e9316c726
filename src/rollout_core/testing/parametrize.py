"""``parametrize_packer_checks`` and its siblings: the checks as pytest tests, one for each subject and check."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import pytest

from rollout_core.testing.packers import name_of
from rollout_core.testing.registry import LEVELS, Check, SubjectKind, select_checks
from rollout_core.testing.report import Report, Result, result_lines
from rollout_core.testing.runner import check_carrier, check_packer, check_tracker, check_worker, expected_of

Test = TypeVar("Test", bound=Callable[..., Any])


def parametrize_packer_checks(
    packers: Sequence[Any],
    *,
    level: str = LEVELS[-1],
    only: Iterable[str] = (),
    expected_failures: Mapping[str, str] | None = None,
    max_examples: int = 100,
    seed: int = 0,
    timeout: float = 5.0,
    isolate: bool = True,
) -> Callable[[Test], Test]:
    """Parametrize a test over packers and the checks of a level:

        @parametrize_packer_checks([MyPacker])
        def test_packer(packer, check):
            check(packer)

    Ids are like ``MyPacker-packer/B3-alignment``, so ``-k B3`` or ``-k alignment`` selects. ``expected_failures``: check id ->
    reason; such a check that passes fails the test. The other arguments are those of ``check_packer``. A skipped check is a skipped
    test that says why; the option ``--rollout-core-max-examples`` goes before ``max_examples``.
    """
    options = {"level": level, "max_examples": max_examples, "seed": seed, "timeout": timeout, "isolate": isolate}
    return _parametrized("packer", check_packer, packers, only, expected_failures, options)


def parametrize_tracker_checks(
    trackers: Sequence[Any],
    *,
    worlds: Iterable[str] = (),
    level: str = LEVELS[-1],
    only: Iterable[str] = (),
    expected_failures: Mapping[str, str] | None = None,
    max_examples: int = 100,
    seed: int = 0,
    timeout: float = 5.0,
    isolate: bool = True,
) -> Callable[[Test], Test]:
    """Parametrize a test over trackers and the checks of a level:

        @parametrize_tracker_checks([MyTracker])
        def test_tracker(tracker, check):
            check(tracker)

    ``worlds`` is that of ``check_tracker``; everything else is as for ``parametrize_packer_checks``.
    """
    options = {"level": level, "max_examples": max_examples, "seed": seed, "timeout": timeout, "isolate": isolate}
    return _parametrized("tracker", check_tracker, trackers, only, expected_failures, {**options, "worlds": tuple(worlds)})


def parametrize_carrier_checks(
    carriers: Sequence[Any],
    *,
    level: str = LEVELS[-1],
    only: Iterable[str] = (),
    expected_failures: Mapping[str, str] | None = None,
    max_examples: int = 100,
    seed: int = 0,
    timeout: float = 5.0,
    isolate: bool = True,
) -> Callable[[Test], Test]:
    """Parametrize a test over carriers and the checks of a level:

        @parametrize_carrier_checks([my_carrier])
        def test_carrier(carrier, check):
            check(carrier)

    Everything is as for ``parametrize_packer_checks``.
    """
    options = {"level": level, "max_examples": max_examples, "seed": seed, "timeout": timeout, "isolate": isolate}
    return _parametrized("carrier", check_carrier, carriers, only, expected_failures, options)


def parametrize_worker_checks(
    workers: Sequence[Any],
    *,
    model: str | Path | None = None,
    level: str = LEVELS[-1],
    only: Iterable[str] = (),
    expected_failures: Mapping[str, str] | None = None,
    max_examples: int = 100,
    seed: int = 0,
    timeout: float = 30.0,
) -> Callable[[Test], Test]:
    """Parametrize a test over workers and the checks of a level:

        @parametrize_worker_checks([make_worker])
        def test_worker(worker, check):
            check(worker)

    Each check starts a worker of its own: for an engine that takes long to start, one test with ``check_worker`` is quicker. Its
    arguments are those of ``check_worker``; everything else is as for ``parametrize_packer_checks``.
    """
    options = {"model": model, "level": level, "max_examples": max_examples, "seed": seed, "timeout": timeout}
    return _parametrized("worker", check_worker, workers, only, expected_failures, options)


def _parametrized(
    kind: SubjectKind,
    run: Callable[..., Report],
    subjects: Sequence[Any],
    only: Iterable[str],
    expected_failures: Mapping[str, str] | None,
    options: dict[str, Any],
) -> Callable[[Test], Test]:
    expected = expected_of(kind, expected_failures)
    checks = select_checks(kind, level=options["level"], only=only)
    rows = []
    labels = [subject if isinstance(subject, str) else name_of(subject).rpartition(" ")[2] for subject in subjects]
    for place, subject in enumerate(subjects):
        label = labels[place] + (f"-{place}" if labels.count(labels[place]) > 1 else "")
        for check in checks:
            marks = []
            if check.id in expected:
                marks.append(pytest.mark.xfail(reason=expected[check.id], strict=True, raises=CheckFailed))
            runnable = _Runnable(check, run, options, expected=check.id in expected)
            rows.append(pytest.param(subject, runnable, id=f"{label}-{check.id}", marks=marks))
    return pytest.mark.parametrize((kind, "check"), rows)


class CheckFailed(AssertionError):
    """A check found a counterexample; the message is what the report says, with the script."""


class _Runnable:
    """One check, to be called with a subject."""

    def __init__(self, check: Check, run: Callable[..., Report], options: dict[str, Any], *, expected: bool) -> None:
        self._check = check
        self._run = run
        self._options = options
        self._expected = expected  # to fail

    def __repr__(self) -> str:
        return f"<check {self._check.id}: {self._check.title}>"

    def __call__(self, subject: Any) -> Result:
        __tracebackhide__ = True
        from rollout_core.testing import pytest_plugin

        options = dict(self._options)
        if pytest_plugin.max_examples is not None:
            options["max_examples"] = pytest_plugin.max_examples
        (result,) = self._run(subject, only=[self._check.id], **options).results
        if result.status == "skip" and self._expected:
            raise AssertionError(f"{result.id} is expected to fail, and was skipped: {result.reason}")
        if result.status == "skip":
            pytest.skip(result.reason)
        if result.status == "fail":
            raise CheckFailed("\n".join([*result_lines(result), "", result.script]))
        return result
