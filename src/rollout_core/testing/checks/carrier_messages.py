"""T4 and T2: messages arrive whole and in order, nobody waits for longer than it is told to, and an end that is gone is told of."""

from __future__ import annotations

from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy

from rollout_core.testing.carrier_cases import SENDER, CarrierCase, Step
from rollout_core.testing.checks.carrier_base import SIZES, SMALL, TAKE, carrier_check, ends, peers, play, posts, programs


def _messages(most: int) -> SearchStrategy[CarrierCase]:
    return programs(st.integers(1, most), lambda n: st.lists(posts(n, SIZES) | st.just(TAKE), min_size=1, max_size=6))


carrier_check(
    "carrier/T4-messages",
    "messages from 0 bytes to 1 MiB arrive whole, once and in order, on all ways at once",
    cases=_messages,
)(play)


def _flood(most: int) -> SearchStrategy[CarrierCase]:
    """More than any socket buffer holds, and nobody who takes it before all is posted."""
    sizes = st.integers(0, 1 << 20) | st.just(1 << 20)
    return programs(st.integers(1, most), lambda n: st.lists(posts(n, sizes), min_size=1, max_size=6))


carrier_check(
    "carrier/T2-post",
    "a message of up to 1 MiB, and many of them, are posted without waiting for somebody who takes them",
    cases=_flood,
    cost=2,
)(play)


def _idle(most: int) -> SearchStrategy[CarrierCase]:
    def steps(count: int) -> SearchStrategy[list[Step]]:
        polls = st.builds(lambda end, s: Step(do="poll", end=end, seconds=s), ends(count), st.sampled_from((0.0, 0.01, 0.05)))
        before = st.lists(posts(count), max_size=2).map(lambda found: [*found, TAKE] if found else found)
        return st.builds(lambda first, rest: [*first, *rest], before, st.lists(polls, min_size=1, max_size=3))

    return programs(st.integers(1, most), steps)


carrier_check(
    "carrier/T2-poll",
    "poll(0) returns at once and poll(t) within t, where nothing comes",
    cases=_idle,
    cost=4,
)(play)


def _waits(nbytes: SearchStrategy[int], most: int) -> SearchStrategy[CarrierCase]:
    def steps(count: int) -> SearchStrategy[list[Step]]:
        return st.builds(
            lambda both, seconds, nbytes, at: [Step(do="wait", end=both[0], to=both[1], seconds=seconds, nbytes=nbytes, at=at)],
            peers(count),
            st.sampled_from((3.0, -1.0)),
            nbytes,
            st.integers(0, 1),
        )

    return programs(st.integers(1, most), steps)


carrier_check(
    "carrier/T2-wakes",
    "a poll that may wait for seconds, or without an end, returns as soon as there is a message",
    cases=lambda most: _waits(SMALL, most),
    cost=4,
)(play)

carrier_check(
    "carrier/T2-close-wakes",
    "a poll that may wait for seconds, or without an end, returns as soon as the other side closes",
    cases=lambda most: _waits(st.just(-1), most),
    cost=4,
)(play)


def _closing(most: int) -> SearchStrategy[CarrierCase]:
    def steps(count: int) -> SearchStrategy[list[Step]]:
        before = st.lists(posts(count) | st.just(TAKE), max_size=4)
        return st.builds(lambda first, end: [*first, Step(do="close", end=end), TAKE], before, ends(count))

    return programs(st.integers(1, most), steps)


carrier_check(
    "carrier/T2-closed",
    "poll tells once, by a TransferError, that the other side has closed, after all that it said before",
    cases=_closing,
)(play)


def _posting_to_closed(most: int) -> SearchStrategy[CarrierCase]:
    def steps(count: int) -> SearchStrategy[list[Step]]:
        def case(end: int, to: int, sizes: list[int], take: bool) -> list[Step]:
            back = SENDER if end != SENDER else to
            says = [Step(do="post", end=back, to=end, nbytes=nbytes) for nbytes in sizes]
            return [Step(do="close", end=end), *([TAKE] if take else []), *says]

        return st.builds(case, ends(count), st.integers(0, count - 1), st.lists(SIZES, min_size=1, max_size=3), st.booleans())

    return programs(st.integers(1, most), steps)


carrier_check(
    "carrier/T2-post-closed",
    "posting to an end that has closed raises TransferError, or poll tells; nothing else is raised",
    cases=_posting_to_closed,
)(play)


def _posting_from_closed(most: int) -> SearchStrategy[CarrierCase]:
    def steps(count: int) -> SearchStrategy[list[Step]]:
        return st.builds(
            lambda both, nbytes: [Step(do="close", end=both[0]), Step(do="post", end=both[0], to=both[1], nbytes=nbytes)],
            peers(count),
            SMALL,
        )

    return programs(st.integers(1, most), steps)


carrier_check(
    "carrier/T2-own-close",
    "posting from an end that is closed itself raises TransferError",
    cases=_posting_from_closed,
)(play)


def _closing_twice(most: int) -> SearchStrategy[CarrierCase]:
    def steps(count: int) -> SearchStrategy[list[Step]]:
        before = st.lists(posts(count, SIZES) | st.just(TAKE), max_size=3)
        closes = st.lists(ends(count).map(lambda end: Step(do="close", end=end)), min_size=2, max_size=6)
        return st.builds(lambda first, rest: [*first, *rest], before, closes)

    return programs(st.integers(1, most), steps)


carrier_check(
    "carrier/T2-close-twice",
    "closing an end again is harmless, in whatever order the ends close",
    cases=_closing_twice,
)(play)


def _one_gone(most: int) -> SearchStrategy[CarrierCase]:
    def steps(count: int) -> SearchStrategy[list[Step]]:
        def case(gone: int, before: list[Step], after: list[Step], take: bool) -> list[Step]:
            return [*before, Step(do="close", end=gone), *([TAKE] if take else []), *after]

        some = st.lists(posts(count, SIZES) | st.just(TAKE), max_size=4)
        return st.builds(case, st.integers(0, count - 1), some, some.filter(bool), st.booleans())

    return programs(st.integers(2, max(2, most)), steps)


carrier_check(
    "carrier/T2-others",
    "a receiver that has closed does not disturb what the sender and the other receivers say",
    cases=_one_gone,
    needs={"several"},
)(play)
