"""Server-sent events: the same whatever the pieces, and bounded."""

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rollout_core.workers.http.events import EventError, EventParser


def parse(pieces, limit=10_000):
    parser = EventParser(limit)
    found = [event for piece in pieces for event in parser.feed(piece)]
    parser.end()
    return found


def cut(whole, places):
    places = sorted({0, len(whole), *(place % (len(whole) + 1) for place in places)})
    return [whole[start:stop] for start, stop in pairwise(places)]


LINE = st.text(st.characters(exclude_characters="\r\n", exclude_categories=["Cs"]), max_size=6)
EVENT = st.lists(LINE, min_size=1, max_size=3)  # lines of data
END = st.sampled_from(["\n", "\r", "\r\n"])
NOISE = st.sampled_from(["", ": comment", "event: x", "id: 7", "retry: 5", "unknown", "dat: x"])


@given(st.data(), st.lists(EVENT, min_size=1, max_size=4), st.booleans())
def test_events_are_the_same_whatever_the_pieces(data, events, marked):
    """Written out from the format, then cut anywhere: within CR LF, a character, or the mark at the beginning."""
    text = "\ufeff" if marked else ""
    for lines in events:
        for line in lines:
            text += data.draw(NOISE.filter(bool)) + data.draw(END) + f"data: {line}" + data.draw(END)
        text += "\n" if text.endswith("\n") else "\n\n"  # after CR, one LF would belong to it
    whole = text.encode()
    pieces = cut(whole, data.draw(st.lists(st.integers(0, 1000), max_size=12)))
    assert parse(pieces) == ["\n".join(lines) for lines in events]
    assert parse([whole[i : i + 1] for i in range(len(whole))]) == parse([whole])


@pytest.mark.parametrize(
    ("said", "events"),
    [
        (b"\xef\xbb\xbfdata: 1\n\n", ["1"]),
        (b"data: 1\n\n\xef\xbb\xbfdata: 2\n\n", ["1"]),  # a mark is one at the beginning only
        (b"data:1\n\ndata:  2 \n\n", ["1", " 2 "]),
        (b"data\n\n", [""]),
        (b"\n\n: x\n\nevent: a\n\n", []),
        (b"data: 1\r\r\ndata: 2\r\n\r\n", ["1", "2"]),
        (b"", []),
    ],
)
def test_what_the_format_says(said, events):
    assert parse([said]) == events
    assert parse([said[i : i + 1] for i in range(len(said))]) == events


@pytest.mark.parametrize("said", [b"data: 1", b"data: 1\n", b"data: 1\n\n:", b"\n\ndata: 1\r"])
def test_an_end_in_the_middle_is_an_error(said):
    with pytest.raises(EventError, match="middle of an event"):
        parse([said])


@pytest.mark.parametrize(
    "said", [b"data: " + b"x" * 95 + b"\n\n", b"data: xxxx\n" * 20 + b"\n", b"data: " + b"x" * 200, b":" + b"x" * 200]
)
def test_an_event_beyond_the_bound_is_an_error(said):
    for pieces in ([said], cut(said, range(0, 1000, 7))):
        with pytest.raises(EventError, match="more than 90 bytes"):
            parse(pieces, 90)


def test_the_bound_is_of_one_event():
    assert len(parse([b"data: " + b"x" * 80 + b"\n\n"] * 50, 90)) == 50


def test_what_came_before_an_error_is_given_first():
    parser = EventParser(100)
    events = parser.feed(b"data: 1\n\ndata: \xff\n\n")
    assert next(events) == "1"
    with pytest.raises(EventError, match="not UTF-8 at its byte 0"):
        next(events)
