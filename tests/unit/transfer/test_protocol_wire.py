"""Envelopes as bytes: what was encoded comes back, and anything else is a TransferError."""

import math
import re

import msgspec
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from rollout_core.errors import TransferError
from rollout_core.transfer.protocol import messages, wire
from rollout_core.transfer.protocol.messages import Abort, Beat, Cause, Envelope, Filled, Hello, Welcome

naturals = st.integers(0, 2**63)
seconds = st.floats(1e-6, allow_nan=False)
digests = st.binary(max_size=16)
causes = st.builds(Cause, st.text(), st.text(), st.text())
bodies = st.one_of(
    st.builds(Hello, naturals, naturals, digests, digests, naturals, naturals, st.booleans(), digests, seconds),
    st.builds(Welcome, naturals, seconds),
    st.builds(Filled, naturals, naturals, naturals, digests, st.text(), st.none() | digests, digests),
    st.builds(messages.Free, naturals),
    st.builds(messages.End, naturals),
    st.just(messages.Ready()),
    st.just(messages.Commit()),
    st.builds(messages.Committed, naturals),
    st.builds(Abort, causes, naturals),
    st.builds(messages.Aborted, st.none() | causes),
    st.just(Beat()),
)
envelopes = st.builds(Envelope, naturals, naturals, bodies)
#: What MessagePack can say.
values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats() | st.text() | st.binary(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
)
tags = st.sampled_from([cls.__name__ for cls in messages.Body.__args__])


#: An envelope of a Filled.
GOLDEN = (
    "93050288a474797065a646696c6c6564a5696e64657801a4736c6f7400a66e627974657308ab706c616e5f646967657374c4"
    "0170a9616c676f726974686da8787868332d313238a6646967657374c0a6686561646572c400"
)


def refused(data):
    """The error for these bytes; None if they are an envelope."""
    try:
        wire.decode(data)
    except TransferError as error:
        return error
    return None


@given(envelopes)
def test_what_was_encoded_comes_back(envelope):
    assert wire.decode(wire.encode(envelope)) == envelope


def test_the_bytes_are_these():
    """The protocol's version counts on when these change."""
    data = wire.encode(Envelope(5, 2, Filled(1, 0, 8, b"p", "xxh3-128", None, b"")))
    assert messages.PROTOCOL == 1
    assert data.hex() == GOLDEN


@given(st.binary(max_size=200))
@example(b"")
@example(b"\x91" * 100_000)
@example(b"\xdd\xff\xff\xff\xff")
def test_any_bytes_are_an_envelope_or_refused(data):
    refused(data)


@given(st.lists(values, max_size=4) | values)
def test_any_values_are_an_envelope_or_refused(value):
    refused(msgspec.msgpack.encode(value))


@given(naturals, naturals, tags, st.dictionaries(st.sampled_from(Hello.__struct_fields__ + Filled.__struct_fields__), values))
def test_any_fields_are_an_envelope_or_refused(attempt, number, tag, fields):
    refused(msgspec.msgpack.encode([attempt, number, {"type": tag, **fields}]))


@given(envelopes, st.data())
def test_a_changed_byte_is_an_envelope_or_refused(envelope, data):
    raw = bytearray(wire.encode(envelope))
    raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    refused(bytes(raw))


@given(envelopes, st.data())
def test_a_part_of_an_envelope_is_refused(envelope, data):
    raw = wire.encode(envelope)
    assert refused(raw[: data.draw(st.integers(0, len(raw) - 1))]) is not None
    assert refused(raw + b"\xc0") is not None


@pytest.mark.parametrize("timeout", [math.nan, 0.0, -1.0, 1e-9, -math.inf])
@pytest.mark.parametrize("body", [Hello(1, 1, b"", b"", 1, 8, False, b"", 1.0), Welcome(1, 1.0)], ids=["Hello", "Welcome"])
def test_a_timeout_is_a_length_of_time(body, timeout):
    """Else the other end would speak without an end, or never."""
    bad = msgspec.structs.replace(body, timeout=timeout)
    assert "timeout" in str(refused(wire.encode(Envelope(1, 0, bad))))


def test_words():
    assert str(refused(b"\xc0")).startswith("1 bytes that are no message of this protocol: ")
    text = str(refused(wire.encode(Envelope(1, 0, Abort(Cause("a", "b")))).replace(b"\xa1a", b"\xa1\xff")))
    assert re.search("no message of this protocol: .*utf-8", text, re.IGNORECASE)  # msgspec's words, another in 0.23


def test_no_more_is_read_than_the_largest_manifest_needs(monkeypatch):
    monkeypatch.setattr(wire, "MAX_NBYTES", 100)
    assert str(refused(bytes(101))) == "a message of 101 bytes; none has more than 100"
    assert "no message of this protocol" in str(refused(bytes(100)))


def test_depth_is_refused():
    assert refused(b"\x93\x01\x00\x82\xa4type\xa4Beat\xa1x" + b"\x91" * 100_000 + b"\xc0") is not None
