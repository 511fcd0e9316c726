"""Run the checks one after the other and collect what came of them."""

from __future__ import annotations

import os
import platform
import time
import traceback
from collections.abc import Callable, Sequence
from typing import Any, Literal

import msgspec
import torch

import rollout_core
from rollout_core.preflight.checks import CHECKS, EXPECTED, Check, Context


class Outcome(msgspec.Struct, frozen=True, kw_only=True):
    """What came of one check: its result, wall seconds, its figure if it passed and what was wrong if not, and the traceback of an
    error that no check expects, or that a worker's process sent."""

    id: str
    clause: str
    result: Literal["pass", "fail", "skip"]  # skip: not judged, as what it needs does not hold
    seconds: float
    figure: str
    trace: str = ""


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """All outcomes, and on what they were found. ``ok`` only if every check passed."""

    ok: bool
    worker: str
    model: str
    seconds: float
    environment: dict[str, Any]
    checks: list[Outcome]


def run_checks(
    context: Context,
    *,
    worker: str,
    model: str,
    checks: Sequence[Check] = CHECKS,
    progress: Callable[[Check, Outcome | None], None] = lambda check, outcome: None,
) -> Report:
    """Run every check that can be judged; ``progress`` is called before (with None) and after each. The worker is closed in any
    case; an error in that is a line of its own."""
    start = time.perf_counter()
    outcomes: dict[str, Outcome] = {}
    try:
        for check in checks:
            progress(check, None)
            needed = outcomes.get(check.needs) if check.needs else None
            if needed is not None and needed.result != "pass":
                outcome = Outcome(id=check.id, clause=check.clause, result="skip", seconds=0.0, figure=f"needs: {check.needs}")
            else:
                outcome = _run(check, context)
            outcomes[check.id] = outcome
            progress(check, outcome)
    finally:
        closing = _run(Check("worker closes", "T3", _close), context)
    if closing.result != "pass":
        outcomes[closing.id] = closing
    return Report(
        ok=all(outcome.result == "pass" for outcome in outcomes.values()),
        worker=worker,
        model=model,
        seconds=time.perf_counter() - start,
        environment=_environment(),
        checks=list(outcomes.values()),
    )


def _close(context: Context) -> str:
    if context.worker is not None:
        context.worker.close()
    return ""


def _run(check: Check, context: Context) -> Outcome:
    start = time.perf_counter()
    trace = ""
    try:
        result: Literal["pass", "fail"] = "pass"
        figure = check.run(context)
    except EXPECTED as error:
        result, figure, trace = "fail", str(error), "\n".join(getattr(error, "__notes__", ()))
    except Exception as error:  # a check that falls over is a failed check, not the end of the report
        result, figure, trace = "fail", f"{type(error).__name__}: {error}", traceback.format_exc()
    return Outcome(id=check.id, clause=check.clause, result=result, seconds=time.perf_counter() - start, figure=figure, trace=trace)


def _environment() -> dict[str, Any]:
    import transformers

    return {
        "rollout_core": rollout_core.__version__,
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "transformers": transformers.__version__,
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "platform": platform.platform(),
    }
