"""T5 and T2: whole updates over a carrier, well and with a fault, one after the other."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy

from rollout_core.testing.carrier_cases import CarrierCase, Fault, Step
from rollout_core.testing.carrier_updates import Updates
from rollout_core.testing.carriers import CarrierUnderTest
from rollout_core.testing.checks.carrier_base import carrier_check

_INTO: Final = st.lists(st.sampled_from(("staged", "direct", "collected")), min_size=1, max_size=3).map(tuple)


def _update(case: CarrierCase) -> Callable[[Fault], SearchStrategy[Step]]:
    def step(fault: Fault) -> SearchStrategy[Step]:
        return st.builds(
            lambda to, at, stream: Step(do="update", fault=fault, to=to, at=at, stream=stream),
            st.integers(0, case.receivers - 1) if fault in ("refuse", "dies") else st.just(0),
            st.integers(0, 3) if fault in ("source", "dies") else st.just(0),
            st.booleans(),
        )

    return step


def _updates(
    most: int, steps: Callable[[Callable[[Fault], SearchStrategy[Step]]], SearchStrategy[list[Step]]]
) -> SearchStrategy[CarrierCase]:
    """Models of up to four tensors, some of them larger than a bucket, and some of no elements."""
    settings = st.builds(
        CarrierCase,
        receivers=st.sampled_from(sorted({1, min(2, most), most})),
        sizes=st.lists(st.integers(0, 9) | st.sampled_from((40, 120)), max_size=4).map(tuple),
        capacity=st.sampled_from((16, 64, 4096)),
        slots=st.integers(1, 3),
        into=_INTO,
    )
    return settings.flatmap(lambda case: steps(_update(case)).map(lambda found: _with(case, found)))


def _with(case: CarrierCase, steps: list[Step]) -> CarrierCase:
    return CarrierCase(case.receivers, tuple(steps), 1, case.sizes, case.capacity, case.slots, case.into)


def _run(subject: CarrierUnderTest, case: CarrierCase) -> None:
    Updates(subject, case).run()


carrier_check(
    "carrier/T5-updates",
    "updates by send or send_stream, one after the other, arrive byte for byte, and each advances the version of every end",
    cases=lambda most: _updates(most, lambda step: st.lists(step(""), min_size=1, max_size=3)),
    cost=4,
)(_run)

carrier_check(
    "carrier/T5-source",
    "where the source fails, all ends say so and keep version and weights, and the next update arrives",
    cases=lambda most: _updates(most, lambda step: st.tuples(step(""), step("source"), step("")).map(list)),
    cost=4,
)(_run)

carrier_check(
    "carrier/T5-refused",
    "where a receiver refuses the plan, all ends say so and keep version and weights, and the next update arrives",
    cases=lambda most: _updates(most, lambda step: st.tuples(step("refuse"), step("")).map(list)),
    cost=4,
)(_run)

carrier_check(
    "carrier/T5-dies",
    "where a receiver dies in an update, the sender and the others end with an error and keep version and weights",
    cases=lambda most: _updates(most, lambda step: st.tuples(step(""), step("dies")).map(list)),
    cost=2,
)(_run)
