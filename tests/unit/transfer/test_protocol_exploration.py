"""Every interleaving of small updates, with every fault at every place: see support.network for what that means.

How many worlds there are is part of each test: fewer would mean that something is not looked at any more.
"""

import pytest

from support.exploration import Explorer
from support.network import Network, Size

#: Sizes, the most faults, and how many worlds and how many ends of updates there are.
QUICK = [
    (Size(), 0, 148, 2),
    (Size(rendezvous=True), 0, 435, 8),
    (Size(receivers=0), 1, 248, 79),
    (Size(slots=1), 1, 5748, 760),
    (Size(), 1, 16954, 2338),
    (Size(staged=True, closes=False), 1, 16614, 1708),
    (Size(rendezvous=True), 1, 57314, 7600),
    (Size(rendezvous=True, closes=False), 1, 53296, 4539),
    (Size(timeouts=(100.0, 10.0)), 1, 30641, 2331),
    (Size(timeouts=(10.0, 100.0), buckets=1), 1, 11454, 697),
    (Size(receivers=2), 0, 1668, 2),
    (Size(receivers=2, rendezvous=True), 0, 3973, 8),
]
LARGE = [
    (Size(slots=1, buckets=1), 2, 194484, 49293),
    (Size(receivers=2, slots=1, buckets=1), 1, 125313, 12163),
    (Size(receivers=3, slots=1, buckets=1), 0, 634, 2),
    (Size(receivers=2, buckets=1, rendezvous=True), 1, 751934, 49145),
    (Size(receivers=2, buckets=2), 1, 1991025, 146732),
    (Size(receivers=2, buckets=1, timeouts=(100.0, 10.0)), 1, 707752, 45237),
    (Size(slots=3, buckets=5), 1, 262726, 32721),
    (Size(slots=3, buckets=4, rendezvous=True), 1, 747347, 84371),
    (Size(buckets=2), 2, 830604, 209412),
    (Size(buckets=1, rendezvous=True), 2, 452843, 118631),
]


def named(cases):
    return [pytest.param(*case, id=name_of(*case[:2])) for case in cases]


def name_of(size, faults):
    kind = ["plain", "rendezvous"][size.rendezvous] + ["-open", ""][size.closes] + ["", "-staged"][size.staged]
    timeouts = "-".join(f"{timeout:g}" for timeout in size.timeouts)
    return f"{size.receivers}r-{size.slots}s-{size.buckets}b-{kind}-{timeouts}s-{faults}faults"


def explore(size, faults, worlds, ends):
    explored = Explorer(Network(size), faults).run()
    assert explored.again > 0, "no second update was tried"
    assert (explored.worlds, explored.ends) == (worlds, ends), f"what was looked at has changed: {explored}"


@pytest.mark.parametrize(("size", "faults", "worlds", "ends"), named(QUICK))
def test_every_interleaving_ends_well_or_with_the_cause(size, faults, worlds, ends):
    explore(size, faults, worlds, ends)


@pytest.mark.slow
@pytest.mark.parametrize(("size", "faults", "worlds", "ends"), named(LARGE))
def test_every_interleaving_of_more(size, faults, worlds, ends):
    explore(size, faults, worlds, ends)
