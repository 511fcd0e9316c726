"""check_packer, check_tracker, check_carrier, check_worker: run every check on a subject and report what came of each."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias, cast

import msgspec

import rollout_core.testing.checks  # noqa: F401 - registers the checks
from rollout_core.testing.isolation import Here, Isolated, Outcome, Start, SubjectError, run_case
from rollout_core.testing.peers import PEERS
from rollout_core.testing.registry import LEVELS, Check, SubjectKind, Violation, get_check, select_checks
from rollout_core.testing.report import Report, Result, versions
from rollout_core.testing.scripts import reproduction, target_of
from rollout_core.testing.search import Finding, search
from rollout_core.testing.targets import OWN, OWN_CARRIERS, OWN_TRACKERS, OWN_WORKERS, capability_words, load_target, wrap
from rollout_core.testing.targets import kind_of as kind_of_loaded
from rollout_core.testing.workers import WorkerUnderTest
from rollout_core.testing.worlds import world_info

#: Called before each check with None, and after it with its result; and with the number of checks.
Progress: TypeAlias = Callable[[Check, Result | None, int], None]
_HASH_SEEDS = (1, 2)


def check_packer(
    packer: Any,
    *,
    level: str = LEVELS[-1],
    only: Iterable[str] = (),
    expected_failures: Mapping[str, str] | None = None,
    max_examples: int = 100,
    seed: int = 0,
    timeout: float = 5.0,
    isolate: bool = True,
    progress: Progress | None = None,
) -> Report:
    """Run the checks of a level on a packer and report every clause that it violates, with the smallest counterexample of each.

    ``packer``: an object with ``pack`` and ``unpack`` (``rollout_core.testing.packers`` says what else it may have), a class or
    factory that makes one (then every case gets a new one), or a name such as ``"mytrainer.sync:packer"``. ``only``: check ids, or
    clauses. ``expected_failures``: check id -> reason; one that passes, or is skipped, is reported as stale. ``max_examples``:
    cases tried per check. The same ``seed`` tries the same cases. ``timeout``: seconds that a case may take, and the first of all
    three times as long.

    With ``isolate`` the packer runs in a forked process, so that a hang or a crash is a failed check. A process that has used CUDA
    cannot be forked: pass ``isolate=False`` there, or use ``rollout-core check``.

    Raises ``SubjectError`` if this is no packer, ``ValueError`` for an unknown id or level or a number out of range, and
    ``RuntimeError`` if it is to be isolated in a process that has used CUDA.
    """
    return _run("packer", packer, level, only, expected_failures, max_examples, seed, timeout, isolate, progress)


def check_tracker(
    tracker: Any,
    *,
    worlds: Iterable[str] = (),
    level: str = LEVELS[-1],
    only: Iterable[str] = (),
    expected_failures: Mapping[str, str] | None = None,
    max_examples: int = 100,
    seed: int = 0,
    timeout: float = 5.0,
    isolate: bool = True,
    progress: Progress | None = None,
) -> Report:
    """Run the checks of a level on a tracker: a class or factory that takes a processor, or the name of one.
    ``rollout_core.testing.trackers`` says what it gives.

    ``worlds``: names of the worlds to try it in, such as those that ``register_world`` was given; without any, in all fakes. A
    check for which none of them is fit is skipped. The other arguments are those of ``check_packer``, and so are the errors.
    """
    asked = [f"world={world_info(name).name}" for name in ([worlds] if isinstance(worlds, str) else worlds)]
    return _run("tracker", tracker, level, only, expected_failures, max_examples, seed, timeout, isolate, progress, asked)


def check_carrier(
    carrier: Any,
    *,
    level: str = LEVELS[-1],
    only: Iterable[str] = (),
    expected_failures: Mapping[str, str] | None = None,
    max_examples: int = 100,
    seed: int = 0,
    timeout: float = 5.0,
    isolate: bool = True,
    progress: Progress | None = None,
) -> Report:
    """Run the checks of a level on a carrier: ``make(receivers)``, which gives the sender's end and a list of the receivers' ends,
    all in this process, or the name of one. ``rollout_core.testing.carriers`` says what it may have.

    Every case makes a carrier, uses each end from a thread of its own, and closes it. The arguments are those of ``check_packer``,
    and so are the errors.
    """
    return _run("carrier", carrier, level, only, expected_failures, max_examples, seed, timeout, isolate, progress)


def check_worker(
    make_worker: Any,
    *,
    model: str | Path | None = None,
    level: str = LEVELS[-1],
    only: Iterable[str] = (),
    expected_failures: Mapping[str, str] | None = None,
    max_examples: int = 100,
    seed: int = 0,
    timeout: float = 30.0,
    progress: Progress | None = None,
) -> Report:
    """Run the checks of a level on a rollout worker: ``make_worker(folder)``, which starts one on the model in a folder, a class of
    workers, or the name of either. ``rollout_core.testing.workers`` says what it may have.

    ``model``: a folder as ``save_pretrained`` writes it; None: a small random one. One worker serves all checks, in this process or
    those that it starts itself, and is started again where a check has left it broken. ``timeout``: seconds that one of its calls,
    or a request, may take. The other arguments are those of ``check_packer``, and so are the errors.
    """
    options = (level, only, expected_failures, max_examples, seed, timeout, False, progress)
    start = partial(_WorkerExecutor, make_worker, model, timeout)
    return _run("worker", make_worker, *options, start=start, model=str(model or ""))


def replay(
    subject: Any, report: Report, *, timeout: float | None = None, isolate: bool = True, model: str | Path | None = None
) -> Report:
    """Run the counterexamples of a saved report again, and nothing else. ``model``: that of a worker."""
    started = time.monotonic()
    saved = [result for result in report.results if bytes(result.case) != b"null"]
    kind = get_check(saved[0].id).kind if saved else "packer"
    execute: _Executor | _WorkerExecutor
    if kind == "worker":
        execute = _WorkerExecutor(subject, model, timeout or 30.0)
    else:
        execute = _Executor(kind, subject, timeout or 5.0, isolate)
    with execute:
        results = []
        for old in saved:
            check = get_check(old.id)
            begun = time.monotonic()
            outcome = execute(check, bytes(old.case))
            finding = Finding(
                examples=1,
                case=bytes(old.case) if outcome.result == "violation" else None,
                outcome=outcome,
                skip=outcome.text if outcome.result == "skip" else "",
            )
            results.append(
                _result(
                    check,
                    finding,
                    time.monotonic() - begun,
                    old.reason if old.status == "xfail" else None,
                    subject,
                    str(model or ""),
                )
            )
    return msgspec.structs.replace(
        report,
        target=target_of(subject).words,
        max_examples=1,
        seconds=time.monotonic() - started,
        versions=versions(),
        results=results,
    )


def recheck(subject: Any, id: str, case: str | bytes, *, model: str | Path | None = None) -> None:
    """Run one check on one case, written as JSON. ``Violation`` if the subject still fails it. ``model``: that of a worker."""
    check = get_check(id)
    if check.kind == "worker":
        worker = WorkerUnderTest(subject, model)
        try:
            check.run(worker, msgspec.json.decode(case, type=check.case_type))
        finally:
            worker.close()
        return
    check.run(wrap(check.kind, subject, None), msgspec.json.decode(case, type=check.case_type))


def _run(
    kind: SubjectKind,
    target: Any,
    level: str,
    only: Iterable[str],
    expected: Mapping[str, str] | None,
    max_examples: int,
    seed: int,
    timeout: float,
    isolate: bool,
    progress: Progress | None,
    asked: Iterable[str] = (),
    *,
    start: Callable[[], _WorkerExecutor] | None = None,
    model: str = "",
) -> Report:
    started = time.monotonic()
    if max_examples < 1 or timeout <= 0:
        raise ValueError(
            f"max_examples is {max_examples} and timeout {timeout}; a check needs at least 1 case and some seconds for it"
        )
    checks, expected = select_checks(kind, level=level, only=only), expected_of(kind, expected)
    results = []
    execute = start() if start is not None else _Executor(kind, target, timeout, isolate)
    with execute:
        if any(check.twins for check in checks):
            execute.start_twins()
        for check in checks:
            if progress:
                progress(check, None, len(checks))
            begun = time.monotonic()
            execute.begin_check()
            finding = _find(check, execute, max_examples, seed, frozenset(asked))
            result = _result(check, finding, time.monotonic() - begun, expected.get(check.id), target, model)
            results.append(result)
            if progress:
                progress(check, result, len(checks))
    return Report(
        target=target_of(target).words,
        level=level,
        seed=seed,
        max_examples=max_examples,
        seconds=time.monotonic() - started,
        versions=versions(),
        results=results,
    )


def expected_of(kind: SubjectKind, expected: Mapping[str, str] | None) -> dict[str, str]:
    """Full check id -> why it is expected to fail; the ids may be given without their subject. ``ValueError`` for an unknown id and
    for one without a reason."""
    if not isinstance(expected, Mapping | None):
        raise ValueError(f"expected_failures is a {type(expected).__name__}; it is a mapping from check id to reason")
    reasons = {}
    for id, reason in (expected or {}).items():
        if not isinstance(reason, str) or not reason.strip():
            raise ValueError(f"expected_failures gives no reason for {id}")
        reasons[get_check(id if "/" in id else f"{kind}/{id}").id] = reason
    return reasons


def _find(check: Check, execute: _Executor | _WorkerExecutor, max_examples: int, seed: int, asked: frozenset[str]) -> Finding:
    missing = sorted(check.needs - execute.capabilities)
    if missing:
        words = capability_words(check.subject)
        return Finding(examples=0, skip=f"needs {missing[0]!r}: {words.get(missing[0], 'not declared')}")
    if check.twins and not execute.importable:
        return Finding(examples=0, skip="needs a packer that a new interpreter can import: pass package.module:attribute")
    examples = max(1, max_examples // check.cost)
    return search(check.cases(execute.capabilities | asked), partial(execute, check), max_examples=examples, random_seed=seed)


def _result(check: Check, finding: Finding, seconds: float, reason: str | None, target: Any, model: str = "") -> Result:
    """The result of a check, given what was found and why it was expected to fail, if it was."""
    fields: dict[str, Any] = {"id": check.id, "title": check.title, "examples": finding.examples, "seconds": round(seconds, 3)}
    if finding.skip:
        if reason is not None:
            return Result(**fields, status="stale", reason=reason, text=f"it was skipped: {finding.skip}")
        return Result(**fields, status="skip", reason=finding.skip)
    if finding.case is None or finding.outcome is None:
        if reason is not None:
            return Result(**fields, status="stale", reason=reason, text="it passed")
        return Result(**fields, status="pass")
    case = msgspec.json.decode(finding.case, type=check.case_type)
    return Result(
        **fields,
        status="fail" if reason is None else "xfail",
        reason=reason or "",
        text=finding.outcome.text,
        words=str(case),
        case=msgspec.Raw(finding.case),
        script=reproduction(check, case, target, finding.outcome.text, model),
    )


class _Executor:
    """Runs cases of checks on a subject; the processes that this takes end with it."""

    def __init__(self, kind: SubjectKind, target: Any, timeout: float, isolate: bool) -> None:
        self._timeout = timeout
        self._kind = kind
        self._start = _starter(kind, target)
        self._target = target_of(target)
        self._twins: list[Isolated] = []
        self.begin_check()
        if isolate:
            _refuse_cuda()
        self._runner = Isolated(self._start) if isolate else Here(self._start)
        self.capabilities = frozenset(self._runner.hello.capabilities)
        self.importable = isolate and self._target.importable

    def __enter__(self) -> _Executor:
        return self

    def __exit__(self, *error: object) -> None:
        for runner in (self._runner, *self._twins):
            runner.close()

    def begin_check(self) -> None:
        """What one check hung on says nothing of how long the next may take."""
        self._patience = self._timeout
        self._slowest = 0.0  # seconds of a case that ended

    def __call__(self, check: Check, case: bytes) -> Outcome:
        if check.twins:
            return self._run_twins(check, case)
        started = time.monotonic()
        outcome = self._runner.run(check, case, self._patience)
        if not outcome.fatal:
            self._slowest = max(self._slowest, time.monotonic() - started)
        else:  # it may hang: the smaller cases that shrinking tries need not be given as long
            self._patience = min(self._patience, max(1.0, 20 * self._slowest))
        return outcome

    def start_twins(self) -> None:
        """Start the new interpreters now: they take seconds, in which other checks can run."""
        if self.importable and not self._twins:
            self._twins = [Isolated(self._start, kind=self._kind, target=self._target.name, hash_seed=seed) for seed in _HASH_SEEDS]

    def _run_twins(self, check: Check, case: bytes) -> Outcome:
        self.start_twins()
        one, other = (runner.run(check, case, self._timeout) for runner in self._twins)
        for outcome in (one, other):
            if outcome.result != "pass":
                return outcome
        if one.value != other.value:
            text = (
                f"two processes with the same input lay it out differently (PYTHONHASHSEED={_HASH_SEEDS[0]}: {one.value}; "
                f"PYTHONHASHSEED={_HASH_SEEDS[1]}: {other.value})"
            )
            return Outcome(result="violation", text=text)
        return one


class _WorkerExecutor:
    """Runs cases on one worker, which closes with it. It is not isolated: it may have processes, and time limits, of its own."""

    importable = False

    def __init__(self, target: Any, model: str | Path | None, timeout: float) -> None:
        try:
            self._worker = WorkerUnderTest(load_target(target) if isinstance(target, str) else target, model, timeout=timeout)
        except TypeError as error:
            raise SubjectError(str(error)) from error
        try:
            self.capabilities = self._worker.capabilities
        except Violation as violation:
            self._worker.close()
            raise SubjectError(str(violation)) from violation
        except BaseException:
            self._worker.close()
            raise

    def __enter__(self) -> _WorkerExecutor:
        return self

    def __exit__(self, *error: object) -> None:
        self._worker.close()

    def begin_check(self) -> None:
        """Every check is given the same time."""

    def start_twins(self) -> None:
        """There are none."""

    def __call__(self, check: Check, case: bytes) -> Outcome:
        return run_case(self._worker, check, case)


def kind_of(target: str) -> SubjectKind:
    """What a name stands for. The module is loaded in a process of its own; one that cannot be loaded is told when it is run."""
    if target in OWN_TRACKERS:
        return "tracker"
    if target in OWN or target in PEERS:
        return "packer"
    if target in OWN_CARRIERS:
        return "carrier"
    if target in OWN_WORKERS:
        return "worker"
    runner = None
    try:
        runner = Isolated(lambda phase: _Kind(frozenset({kind_of_loaded(load_target(target))})))
        return cast(SubjectKind, runner.hello.capabilities[0])
    except SubjectError:
        return "packer"
    finally:
        if runner is not None:
            runner.close()


@dataclass
class _Kind:
    """A subject of which only the kind is asked."""

    capabilities: frozenset[str]


def _starter(kind: SubjectKind, target: Any) -> Start:
    if isinstance(target, str):
        return lambda phase: wrap(kind, load_target(target), phase)
    return lambda phase: wrap(kind, target, phase)


def _refuse_cuda() -> None:
    import torch

    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        raise RuntimeError(
            "this process has used CUDA, which a forked process cannot use; pass isolate=False, or use `rollout-core check`, "
            "which loads the subject in a process of its own"
        )
