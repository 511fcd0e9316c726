"""The order of messages on a way, and what counts as a sign of life."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rollout_core.errors import TransferError
from rollout_core.transfer.protocol.line import Line, Patience
from rollout_core.transfer.protocol.messages import Beat, End, Envelope

BODIES = [End(number) for number in range(6)]


def taken(numbers):
    """What comes out, in order, for messages that come in this order; and the line at the end."""
    line, out = Line(0.0, 0.0), []
    for now, number in enumerate(numbers, 1):
        line, due = line.take(number, BODIES[number], float(now))
        out += due
    return line, out


@pytest.mark.parametrize("count", range(5))
def test_messages_come_out_in_order_whatever_order_they_come_in(count):
    for numbers in itertools.permutations(range(count)):
        line, out = taken(numbers)
        assert out == BODIES[:count], f"{numbers} came"
        assert (line.next_in, line.early) == (count, ())


@given(st.lists(st.integers(0, 5), max_size=20))
def test_a_message_comes_out_once_and_only_behind_those_before_it(numbers):
    _, out = taken(numbers)
    complete = next(count for count in itertools.count() if count not in numbers)
    assert out == BODIES[:complete]


def test_only_what_has_its_turn_is_a_sign_of_life():
    line = Line(1.0, 1.0)
    line, due = line.take(1, BODIES[1], 2.0)
    assert (due, line.heard) == ((), 1.0)
    line, due = line.take(0, BODIES[0], 3.0)
    assert (due, line.heard) == ((BODIES[0], BODIES[1]), 3.0)
    line, due = line.take(0, BODIES[0], 4.0)
    assert (due, line.heard) == ((), 3.0)


def test_what_is_said_is_numbered_and_timed():
    line, first = Line(0.0, 0.0).say(7, Beat(), 1.0)
    line, second = line.say(7, Beat(), 2.0)
    assert (first, second) == (Envelope(7, 0, Beat()), Envelope(7, 1, Beat()))
    assert (line.posted, line.heard) == (2.0, 0.0)


def test_messages_behind_one_that_never_comes_are_bounded():
    line = Line(0.0, 0.0)
    for number in range(1, 257):
        line, due = line.take(number, Beat(), 0.0)
        assert due == ()
    with pytest.raises(TransferError) as raised:
        line.take(257, Beat(), 0.0)
    assert str(raised.value) == "message 0 never came, and 257 after it did"


def test_a_complaint_names_a_hole():
    line = Line(1.0, 1.0)
    assert line.complaint(4.5) == "silent for 3.5 s"
    line, _ = line.take(2, Beat(), 3.0)
    assert line.complaint(4.5) == "message 0 never came, and 1 after it did; silent for 3.5 s"


@given(st.floats(1e-6, 1e6))
def test_silence_and_drain_together_are_the_timeout(timeout):
    patience = Patience(timeout, 0.0)
    assert patience.silence + patience.drain == pytest.approx(timeout, rel=1e-12)
    assert 0 < patience.drain < patience.silence
