"""T3: what is left of carriers that were used and closed, while their ends are still referred to."""

from __future__ import annotations

import gc
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy
from msgspec.structs import replace

from rollout_core.testing.carrier_cases import SENDER, CarrierCase, Step
from rollout_core.testing.carrier_play import Play
from rollout_core.testing.carriers import CarrierUnderTest
from rollout_core.testing.checks.carrier_base import SMALL, TAKE, carrier_check, ends, layouts, moves, posts
from rollout_core.testing.registry import Violation

_SETTLE: Final = 1.0  # seconds for what ends in the background


@dataclass(frozen=True)
class _Left:
    """What a process has."""

    descriptors: dict[str, str]  # number -> what it is
    tasks: frozenset[str]  # threads, and processes that this one has started
    shared: int  # bytes of shared memory that is mapped
    names: frozenset[str]  # in /dev/shm

    @classmethod
    def now(cls) -> _Left:
        descriptors = {}
        for name in os.listdir("/proc/self/fd"):
            try:
                descriptors[name] = os.readlink(f"/proc/self/fd/{name}")
            except OSError:  # the listing's own
                continue
        return cls(descriptors, _tasks(), _shared_bytes(), frozenset(os.listdir("/dev/shm")))


def _tasks() -> frozenset[str]:
    threads = os.listdir("/proc/self/task")
    children = []
    for thread in threads:
        try:
            children += Path(f"/proc/self/task/{thread}/children").read_text().split()
        except OSError:
            continue
    return frozenset([*(f"thread {thread}" for thread in threads), *(f"process {child}" for child in children)])


def _shared_bytes() -> int:
    total = 0
    for line in Path("/proc/self/maps").read_text().splitlines():
        places, rights = line.split()[:2]
        if rights[3] == "s":
            begin, end = (int(place, 16) for place in places.split("-"))
            total += end - begin
    return total


def _after(subject: CarrierUnderTest, case: CarrierCase, is_as_before: Callable[[_Left, _Left], bool]) -> tuple[_Left, _Left]:
    """What this process has before and after so many carriers; waits a little for it to be the same."""
    Play(subject, case).run()  # what the first of all leaves with the library is not this carrier's
    gc.collect()
    before, kept = _Left.now(), []
    for _ in range(case.times):
        kept.append(Play(subject, case))
        kept[-1].run()
    deadline = time.monotonic() + _SETTLE
    while not is_as_before(before, after := _Left.now()) and time.monotonic() < deadline:
        time.sleep(0.05)
    return before, after


def _used(most: int) -> SearchStrategy[CarrierCase]:
    def cases(count: int) -> SearchStrategy[CarrierCase]:
        talk = st.lists(posts(count, SMALL | st.just(300_000)) | st.just(TAKE), max_size=3)
        slots = st.lists(st.tuples(layouts(), moves()), max_size=2).map(lambda found: [step for both in found for step in both])
        closes = st.lists(ends(count).map(lambda end: Step(do="close", end=end)), max_size=2)
        steps = st.builds(lambda *parts: tuple(step for part in parts for step in part), talk, slots, closes)
        stall = Step(do="stall", ends=(SENDER,), end=0)
        stalled = layouts().map(lambda layout: (layout, stall))
        return st.builds(
            lambda steps, times: CarrierCase(receivers=count, steps=steps, times=times), steps | stalled, st.integers(1, 8)
        )

    return st.integers(1, most).flatmap(cases)


@carrier_check("carrier/T3-descriptors", "no socket, file or other descriptor is left", cases=_used, cost=5)
def _descriptors(subject: CarrierUnderTest, case: CarrierCase) -> None:
    before, after = _after(subject, case, lambda one, other: len(other.descriptors) <= len(one.descriptors))
    if len(after.descriptors) > len(before.descriptors):
        kinds = sorted({after.descriptors[fd].partition(":")[0] for fd in after.descriptors.keys() - before.descriptors.keys()})
        count = len(after.descriptors) - len(before.descriptors)
        raise Violation(f"{count} more descriptors than before ({', '.join(kinds)}), after {case.times} carriers were closed")


@carrier_check("carrier/T3-threads", "no thread and no process is left", cases=_used, cost=5)
def _threads(subject: CarrierUnderTest, case: CarrierCase) -> None:
    before, after = _after(subject, case, lambda one, other: len(other.tasks) <= len(one.tasks))
    if len(after.tasks) > len(before.tasks):
        new = after.tasks - before.tasks
        kinds = [kind for kind in ("thread", "process") if any(task.startswith(kind) for task in new)]
        count = len(after.tasks) - len(before.tasks)
        raise Violation(f"{count} more tasks than before ({' and '.join(kinds)}), after {case.times} carriers were closed")


@carrier_check("carrier/T3-memory", "no shared memory is left: neither mapped nor by a name in /dev/shm", cases=_used, cost=5)
def _memory(subject: CarrierUnderTest, case: CarrierCase) -> None:
    before, after = _after(subject, case, lambda one, other: other.shared <= one.shared and other.names <= one.names)
    if after.shared > before.shared:
        more = after.shared - before.shared
        raise Violation(f"{more} bytes more of shared memory are mapped than before, after {case.times} carriers were closed")
    if len(after.names - before.names) >= case.times:  # another process may have made some
        again, still = _after(subject, replace(case, times=case.times + 1), lambda one, other: other.names <= one.names)
        if len(still.names - again.names) > case.times:
            raise Violation(f"{case.times} carriers were closed, and as many names are left in /dev/shm")
