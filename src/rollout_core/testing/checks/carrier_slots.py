"""T1 and T4: slots are what was asked for, what is moved arrives byte for byte, and what is held keeps its bytes."""

from __future__ import annotations

from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy

from rollout_core.testing.carrier_cases import SENDER, CarrierCase, Step
from rollout_core.testing.checks.carrier_base import SIZES, SLOT_NBYTES, carrier_check, ends, layouts, moves, play, programs


def _laid_out(most: int) -> SearchStrategy[CarrierCase]:
    return programs(st.integers(1, most), lambda n: layouts().map(lambda step: [step]))


carrier_check(
    "carrier/T1-slots",
    "lay_out gives as many slots as asked for: contiguous uint8, of exactly these bytes, none of which is another slot's",
    cases=_laid_out,
)(play)


def _laid_out_again(most: int) -> SearchStrategy[CarrierCase]:
    def steps(count: int) -> SearchStrategy[list[Step]]:
        both = st.tuples(layouts(), st.lists(moves(), max_size=2))
        rounds = st.lists(both, min_size=2, max_size=4)
        return rounds.map(lambda found: [step for layout, rest in found for step in (layout, *rest)])

    return programs(st.integers(1, most), steps)


carrier_check(
    "carrier/T1-again",
    "laid out again, with other sizes or the same, the slots are those, and what is moved arrives",
    cases=_laid_out_again,
)(play)


def _one_layout(most: int, rest: SearchStrategy[list[Step]], least: int = 1) -> SearchStrategy[CarrierCase]:
    return programs(st.integers(least, max(least, most)), lambda n: st.builds(lambda one, more: [one, *more], layouts(), rest))


carrier_check(
    "carrier/T4-bytes",
    "what arrives of a slot is what was in it, byte for byte, and nothing beyond the bytes that were pushed",
    cases=lambda most: _one_layout(1, st.lists(moves(most=1), min_size=1, max_size=3)),
)(play)

carrier_check(
    "carrier/T1-lent",
    "what a reader holds of a slot keeps its bytes while other slots are filled and moved, one or several at a time",
    cases=lambda most: _one_layout(most, st.lists(moves(most=3), min_size=1, max_size=6)),
)(play)

carrier_check(
    "carrier/T4-receivers",
    "every receiver gets everything",
    cases=lambda most: _one_layout(most, st.lists(moves(), min_size=1, max_size=3), least=2),
    needs={"several"},
)(play)

carrier_check(
    "carrier/T4-apart",
    "messages that are posted while bytes are moved arrive whole and in order, and so do the bytes",
    cases=lambda most: _one_layout(most, st.lists(moves(talk=SIZES), min_size=1, max_size=3)),
)(play)


def _sender_closes(most: int) -> SearchStrategy[CarrierCase]:
    def case(layout: Step, move: Step) -> list[Step]:
        return [layout, move, Step(do="close", end=SENDER)]

    return programs(st.integers(1, most), lambda n: st.builds(case, layouts(), moves()))


carrier_check(
    "carrier/T1-closed",
    "what a reader holds can be read, unchanged, after the sender has closed",
    cases=_sender_closes,
)(play)


def _stalled(most: int) -> SearchStrategy[CarrierCase]:
    def steps(count: int) -> SearchStrategy[list[Step]]:
        def case(nbytes: int, before: list[Step], begin: set[int], end: int) -> list[Step]:
            layout = Step(do="lay out", slots=2, nbytes=nbytes)
            return [layout, *before, Step(do="stall", ends=tuple(sorted(begin)), end=end)]

        begin = st.sets(ends(count))
        return st.builds(case, SLOT_NBYTES | st.just(1 << 20), st.lists(moves(), max_size=1), begin, ends(count))

    return programs(st.integers(1, most), steps)


carrier_check(
    "carrier/T2-mid-move",
    "an end may close in the middle of a move: the others are told, wait for nobody, and close",
    cases=_stalled,
    cost=2,
)(play)


def _too_large(most: int) -> SearchStrategy[CarrierCase]:
    def case(before: list[Step], after: list[Step]) -> list[Step]:
        return [*before, Step(do="too large"), *after]

    some = st.lists(st.tuples(layouts(), moves(most=1)), max_size=1).map(lambda found: [step for both in found for step in both])
    return programs(st.integers(1, most), lambda n: st.builds(case, some, some))


carrier_check(
    "carrier/T2-memory",
    "memory that cannot be had is a TransferError, and smaller slots can be laid out after it",
    cases=_too_large,
    cost=4,
)(play)


def _tickets(most: int) -> SearchStrategy[CarrierCase]:
    how = st.sampled_from(("empty", "cut", "longer", "flipped", "more slots", "more bytes"))

    def steps(count: int) -> SearchStrategy[list[Step]]:
        def case(end: int, words: str, slots: int, nbytes: int, after: list[Step]) -> list[Step]:
            return [Step(do="ticket", end=end, how=words, slots=slots, nbytes=nbytes), *after]  # type: ignore[arg-type]

        after = st.lists(st.tuples(layouts(), moves(most=1)), max_size=1).map(lambda found: [s for both in found for s in both])
        return st.builds(case, st.integers(0, count - 1), how, st.integers(1, 3), SLOT_NBYTES, after)

    return programs(st.integers(1, most), steps)


carrier_check(
    "carrier/T2-ticket",
    "what is no ticket of the sender's is refused with a TransferError, if it is needed, and the next layout can be opened",
    cases=_tickets,
)(play)
