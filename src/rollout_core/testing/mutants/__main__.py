"""Run the kit on every mutant and on what has no bug, and print a table. Exits with 1 if a mutant survives."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from functools import partial
from typing import Final, get_args

from rollout_core.testing.mutants import SOUND, mutants_of
from rollout_core.testing.mutants.tracker_base import probe_templates
from rollout_core.testing.registry import Check, SubjectKind
from rollout_core.testing.report import Report, Result
from rollout_core.testing.runner import check_carrier, check_packer, check_tracker, check_worker

_CHECK: Final[dict[str, Callable[..., Report]]] = {
    "packer": check_packer,
    "tracker": check_tracker,
    "carrier": check_carrier,
    "worker": partial(check_worker, timeout=1.0),  # a fake answers at once, or never
}


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m rollout_core.testing.mutants", description=__doc__)
    parser.add_argument("--kind", choices=[*_CHECK], help="mutants of one kind of subject alone")
    parser.add_argument("--all-checks", action="store_true", help="run every check on every mutant, not only the one that kills it")
    parser.add_argument("--max-examples", type=int, default=100)
    arguments = parser.parse_args()
    ok = True
    for kind in get_args(SubjectKind):
        if kind in _CHECK and arguments.kind in (None, kind):
            ok = _table(kind, arguments.all_checks, arguments.max_examples) and ok
    return 0 if ok else 1


def _table(kind: SubjectKind, all_checks: bool, max_examples: int) -> bool:
    """Print the mutants of a kind; whether every one was killed, and what has no bug passed."""
    check, mutants, survivors = _CHECK[kind], mutants_of(kind), []
    began = time.monotonic()
    if kind == "tracker":
        probe_templates()
    print(
        "| mutant | killed by | seen in | seconds to the first counterexample | cases | counterexample |\n|---|---|---|---|---|---|"
    )
    for mutant in mutants.values():
        found = _Stopwatch()
        only = [] if all_checks else [mutant.killed_by]
        report = check(mutant.target, only=only, max_examples=max_examples, progress=found.note)
        result = report[mutant.killed_by]
        if result.status != "fail":
            survivors.append(mutant.name)
        others = [other.clause for other in report.failed if other.id != mutant.killed_by]
        beside = f" (also {', '.join(dict.fromkeys(others))})" if others else ""
        killed = mutant.killed_by if result.status == "fail" else "SURVIVED"
        words = f"{result.text}; {result.words}".replace("|", "\\|")[:160]
        row = (f"{mutant.name}: {mutant.bug}", killed + beside, mutant.seen_in, f"{found.seconds:.1f}", str(result.examples), words)
        print(f"| {' | '.join(row)} |", flush=True)
    clean = check(SOUND[kind], max_examples=max_examples)
    print(f"\nthe {kind} without a bug: {clean.summary()}")
    print(f"{len(mutants) - len(survivors)} of {len(mutants)} mutants killed by their clause, in {time.monotonic() - began:.0f} s")
    if survivors:
        print("survived: " + ", ".join(survivors))
    return not survivors and clean.ok


class _Stopwatch:
    """Seconds until the first counterexample."""

    def __init__(self) -> None:
        self._started = time.monotonic()
        self.seconds = float("nan")

    def note(self, check: Check, result: Result | None, total: int) -> None:
        if result is not None and result.status == "fail" and self.seconds != self.seconds:
            self.seconds = time.monotonic() - self._started


if __name__ == "__main__":
    raise SystemExit(main())
