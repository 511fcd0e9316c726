"""A thousand rounds leave nothing: descriptors, threads and resident memory are at the end what they were after the warm-up.

python tests/faults/leaks.py
"""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

sys.path.insert(0, str(Path(__file__).parents[1]))
from faults.harness import Pool, Worker

#: Resident memory may grow by so much between the end of the warm-up and the end. Less than a leak of one bucket's slots (8 KiB) in
#: each of 1,000 rounds, or of a descriptor's worth of Python objects (some KiB); more than the allocator's own unrest, which was
#: measured at up to 0.2 MiB.
ALLOWED: Final = 1 << 20
_PATIENCE: Final = 600.0

#: Rounds, aborted rounds, carriers.
FULL: Final = (1000, 200, 200)
SHORT: Final = (100, 30, 20)


@dataclass(frozen=True)
class State:
    """Of a process: numbers that must not grow."""

    descriptors: int
    threads: int
    rss: int


def measure(rounds: int, aborted: int, carriers: int) -> tuple[list[str], list[str]]:
    """What is wrong, and lines of a table. Each kind of round is warmed up with a tenth of them first."""
    pool, problems = Pool(0), []
    lines = [
        "| rounds | process | descriptors | threads | RSS, MiB, after warm-up | at the end | grown, KiB |",
        "|---|---|---|---|---|---|---|",
    ]
    for what, count in (("updates", rounds), ("aborted updates", aborted), ("carriers", carriers)):
        sender, receiver = workers = pool.take(), pool.take()
        try:
            _open(sender, receiver, what)
            warm = _rounds(workers, what, max(10, count // 10))
            end = _rounds(workers, what, count)
        finally:
            for worker in workers:
                worker.end()
        for name, before, after in zip(("sender", "receiver"), warm, end, strict=True):
            grown = after.rss - before.rss
            row = (
                f"{count:,} {what}",
                name,
                after.descriptors,
                after.threads,
                f"{before.rss / 2**20:.1f}",
                f"{after.rss / 2**20:.1f}",
            )
            lines.append(f"| {' | '.join(map(str, row))} | {grown / 1024:.0f} |")
            if after.descriptors != before.descriptors or after.threads != before.threads or grown > ALLOWED:
                problems.append(f"{count} {what} leave the {name} at {after}; it was {before}")
    pool.close()
    why = f"At most {ALLOWED // 1024} KiB may be added to RSS; /proc/self/statm after gc.collect()."
    return problems, [*lines, "", why if not problems else "**Leaks:** " + "; ".join(problems)]


def _open(sender: Worker, receiver: Worker, what: str) -> None:
    import socket

    ours, theirs = socket.socketpair()
    with ours, theirs:
        common: dict[str, Any] = {"do": "leaks open", "what": what, "name": f"leaks-{os.getpid()}"}
        sender.ask({**common, "role": "sender"}, [ours])
        receiver.ask({**common, "role": "receiver"}, [theirs])
    for worker in (sender, receiver):
        _heard(worker)


def _rounds(workers: tuple[Worker, Worker], what: str, count: int) -> list[State]:
    for worker in workers:
        worker.ask({"do": "leaks run", "what": what, "count": count})
    replies = [_heard(worker) for worker in workers]
    return [State(reply["descriptors"], reply["threads"], reply["rss"]) for reply in replies]


def _heard(worker: Worker) -> dict[str, Any]:
    event = worker.hear(_PATIENCE)
    assert "failed" not in event, event["failed"]
    return event


def main() -> int:
    problems, lines = measure(*FULL)
    print("\n".join([*lines, *problems]))
    return 1 if problems else 0


if __name__ == "__main__":
    raise SystemExit(main())
