"""What the checks of carriers share: how one is declared, and strategies of programs."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any, Final, TypeAlias

from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy

from rollout_core.testing.carrier_cases import SENDER, CarrierCase, Step
from rollout_core.testing.carrier_play import Play
from rollout_core.testing.carriers import CarrierUnderTest
from rollout_core.testing.registry import Check, register

RunCarrier: TypeAlias = Callable[[CarrierUnderTest, CarrierCase], Any]
#: From the largest number of receivers the cases of a check.
Cases: TypeAlias = Callable[[int], SearchStrategy[CarrierCase]]

_MOST: Final = 3  # receivers
#: Sizes at which buffers of systems and libraries end; a socket's own is smaller than the largest.
_EDGES: Final = (0, 1, 4095, 4096, 4097, 65_535, 65_536, 65_537, 212_992, 262_144, 1_000_000, 1 << 20)


def carrier_check(
    id: str,
    title: str,
    *,
    cases: Cases,
    needs: Collection[str] = (),
    cost: int = 1,
) -> Callable[[RunCarrier], RunCarrier]:
    """Declare a check of carriers; one that claims to be single is tried with one receiver."""

    def declare(run: RunCarrier) -> RunCarrier:
        register(
            Check(
                id=id,
                title=title,
                run=run,
                cases=lambda capabilities: cases(_MOST if "several" in capabilities else 1),
                case_type=CarrierCase,
                needs=frozenset(needs),
                script="carrier",
                cost=cost,
            )
        )
        return run

    return declare


def play(subject: CarrierUnderTest, case: CarrierCase) -> None:
    """The program of a case, beside the model of it."""
    Play(subject, case).run()


#: Bytes of a message: mostly few, some more than a socket buffer holds.
SIZES: Final = st.integers(0, 64) | st.sampled_from(_EDGES) | st.integers(0, 1 << 20)
SMALL: Final = st.integers(0, 64)
#: Bytes of a slot.
SLOT_NBYTES: Final = st.integers(0, 40) | st.sampled_from((4095, 4096, 4097, 70_000)) | st.integers(0, 10_000)


def posts(receivers: int, sizes: SearchStrategy[int] = SMALL) -> SearchStrategy[Step]:
    """A message from the sender to a receiver, or from one to the sender."""
    place = st.integers(0, receivers - 1)
    down = st.builds(lambda to, nbytes: Step(do="post", to=to, nbytes=nbytes), place, sizes)
    up = st.builds(lambda end, nbytes: Step(do="post", end=end, to=SENDER, nbytes=nbytes), place, sizes)
    return down | up


TAKE: Final = Step(do="take")


def layouts() -> SearchStrategy[Step]:
    return st.builds(lambda slots, nbytes: Step(do="lay out", slots=slots, nbytes=nbytes), st.integers(1, 4), SLOT_NBYTES)


def moves(*, most: int = 2, talk: SearchStrategy[int] | None = None) -> SearchStrategy[Step]:
    """Up to ``most`` slots moved at once, in part or whole."""
    rows = st.lists(st.tuples(st.integers(0, 3), SLOT_NBYTES), min_size=1, max_size=most).map(tuple)
    return st.builds(
        lambda rows, first, nbytes: Step(do="move", moves=rows, pull_first=first, nbytes=nbytes),
        rows,
        st.booleans(),
        st.just(0) if talk is None else talk,
    )


def programs(receivers: SearchStrategy[int], steps: Callable[[int], SearchStrategy[list[Step]]]) -> SearchStrategy[CarrierCase]:
    """Cases of so many receivers, whose steps may name each of them."""
    return receivers.flatmap(lambda count: steps(count).map(lambda found: CarrierCase(receivers=count, steps=tuple(found))))


def ends(receivers: int) -> SearchStrategy[int]:
    """The sender's or a receiver's."""
    return st.sampled_from([SENDER, *range(receivers)])


def peers(receivers: int) -> SearchStrategy[tuple[int, int]]:
    """Two ends that talk to each other."""
    place = st.integers(0, receivers - 1)
    return place.map(lambda one: (SENDER, one)) | place.map(lambda one: (one, SENDER))
