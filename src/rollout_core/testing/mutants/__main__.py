"""Run the kit on every mutant and on the packer without a bug, and print the table. Exits with 1 if a mutant survives."""

from __future__ import annotations

import argparse
import time

from rollout_core.testing.mutants import MUTANTS
from rollout_core.testing.registry import Check
from rollout_core.testing.report import Result
from rollout_core.testing.runner import check_packer


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m rollout_core.testing.mutants", description=__doc__)
    parser.add_argument("--all-checks", action="store_true", help="run every check on every mutant, not only the one that kills it")
    parser.add_argument("--max-examples", type=int, default=100)
    arguments = parser.parse_args()
    survivors = []
    began = time.monotonic()
    print(
        "| mutant | killed by | seen in | seconds to the first counterexample | cases | counterexample |\n|---|---|---|---|---|---|"
    )
    for mutant in MUTANTS.values():
        found = _Stopwatch()
        only = [] if arguments.all_checks else [mutant.killed_by]
        report = check_packer(mutant.target, only=only, max_examples=arguments.max_examples, progress=found.note)
        result = report[mutant.killed_by]
        if result.status != "fail":
            survivors.append(mutant.name)
        others = [other.clause for other in report.failed if other.id != mutant.killed_by]
        beside = f" (also {', '.join(dict.fromkeys(others))})" if others else ""
        killed = mutant.killed_by if result.status == "fail" else "SURVIVED"
        words = f"{result.text}; {result.words}".replace("|", "\\|")[:160]
        row = (f"{mutant.name}: {mutant.bug}", killed + beside, mutant.seen_in, f"{found.seconds:.1f}", str(result.examples), words)
        print(f"| {' | '.join(row)} |", flush=True)
    clean = check_packer("reference", max_examples=arguments.max_examples)
    print(f"\nthe packer without a bug: {clean.summary()}")
    print(f"{len(MUTANTS) - len(survivors)} of {len(MUTANTS)} mutants killed by their clause, in {time.monotonic() - began:.0f} s")
    if survivors:
        print("survived: " + ", ".join(survivors))
    return 1 if survivors or not clean.ok else 0


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
