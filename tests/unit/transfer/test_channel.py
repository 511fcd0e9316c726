"""The channel: a call ends with a message of an expected kind or with an error, in its time, whatever the peer does."""

import os
import signal
import socket
import struct
import threading
import time
from contextlib import contextmanager, suppress
from typing import Literal

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rollout_core.errors import TransferError, WorkerError
from rollout_core.transfer.channel import Channel, PeerGone


class Ping(msgspec.Struct, tag=True, frozen=True):
    number: int
    payload: bytes = b""
    names: list[str] = []


class Pong(msgspec.Struct, tag=True, frozen=True):
    scores: tuple[float, ...]
    by_name: dict[str, int | None]
    inner: Ping | None = None


class Refusing(msgspec.Struct, tag=True, frozen=True):
    kind: Literal["a", "b"]

    def __post_init__(self):
        if self.kind == "b":
            raise WorkerError("this value refuses to be")


def frame(payload: bytes, mark: bytes = b"RCm1", length: int | None = None) -> bytes:
    """The format, written out once more."""
    return mark + struct.pack("<Q", len(payload) if length is None else length) + payload


@contextmanager
def raw_and_channel():
    """A bare socket, and a channel on the other end."""
    ours, theirs = socket.socketpair()
    channel = Channel(theirs.detach(), Ping | Pong | Refusing)
    try:
        yield ours, channel
    finally:
        channel.close()
        ours.close()


@contextmanager
def two_channels():
    with raw_and_channel() as (ours, channel):
        other = Channel(ours.detach(), Ping | Pong | Refusing)
        try:
            yield channel, other
        finally:
            other.close()


@pytest.fixture
def raw():
    with raw_and_channel() as both:
        yield both


@pytest.fixture
def pair():
    with two_channels() as both:
        yield both


@contextmanager
def within(least: float, most: float):
    start = time.monotonic()
    yield
    seconds = time.monotonic() - start
    assert least <= seconds < most, f"took {seconds:.3f} s"


pings = st.builds(Ping, st.integers(-(2**63), 2**64 - 1), st.binary(), st.lists(st.text(st.characters(exclude_categories=["Cs"]))))
pongs = st.builds(
    Pong,
    st.lists(st.floats(allow_nan=False)).map(tuple),
    st.dictionaries(st.text(st.characters(exclude_categories=["Cs"])), st.none() | st.integers(-(2**63), 2**63 - 1)),
    st.none() | pings,
)


@given(st.lists(pings | pongs, max_size=6))
def test_messages_come_out_as_they_went_in(messages):
    with two_channels() as (sender, receiver):
        for message in messages:
            sender.send(message)
        assert [receiver.receive(1) for _ in messages] == messages
        assert not receiver.has_message()


@given(st.binary(max_size=40), st.data())
def test_a_message_comes_out_whole_however_it_is_cut(payload, data):
    """Bytes arrive in any portions; a message is there once its last byte is."""
    message = Ping(7, payload)
    stream = frame(msgspec.msgpack.encode(message)) * 2
    cuts = sorted(data.draw(st.sets(st.integers(1, len(stream) - 1), max_size=5)))
    received = 0
    with raw_and_channel() as (ours, receiver):
        for start, end in zip([0, *cuts], [*cuts, len(stream)], strict=True):
            assert not receiver.has_message()
            ours.send(stream[start:end])
            while received < end // (len(stream) // 2):
                assert receiver.has_message()
                assert receiver.receive(0) == message
                received += 1
        assert received == 2


def test_both_ways_at_once(pair):
    """Both ends send more than the system holds before either receives: each takes in while it sends."""
    message = Ping(1, bytes(8 << 20))
    received = []

    def talk(end):
        end.send(message, 10)
        received.append(end.receive(10))

    threads = [threading.Thread(target=talk, args=(end,)) for end in pair]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert received == [message, message]


@pytest.mark.parametrize(
    "payload",
    [
        msgspec.msgpack.encode({"type": "Other", "number": 1}),
        msgspec.msgpack.encode({"number": 1}),
        msgspec.msgpack.encode({"type": "Ping", "number": "one"}),
        msgspec.msgpack.encode({"type": "Ping", "number": 1.5}),
        msgspec.msgpack.encode([1, 2]),
        msgspec.msgpack.encode({"type": "Refusing", "kind": "c"}),
        msgspec.msgpack.encode(Ping(1))[:-1],
        msgspec.msgpack.encode(Ping(1)) + b"\0",
        b"",
        b"\xc1",
        b"\x80\x04\x95",  # the beginning of a pickle
    ],
)
def test_what_is_no_expected_message_is_refused_and_the_next_is_read(raw, payload):
    ours, channel = raw
    ours.send(frame(payload) + frame(msgspec.msgpack.encode(Ping(5))))
    with within(0, 1), pytest.raises(TransferError, match="sent what is no message"):
        channel.receive(10)
    assert channel.receive(10) == Ping(5)


def test_a_value_that_refuses_to_be_is_used_up(raw):
    ours, channel = raw
    ours.send(frame(msgspec.msgpack.encode({"type": "Refusing", "kind": "b"})) + frame(msgspec.msgpack.encode(Ping(5))))
    with pytest.raises(WorkerError, match="refuses to be"):
        channel.receive(10)
    assert channel.receive(10) == Ping(5)


@pytest.mark.parametrize("data", [b"x", b"RCm", b"RCm2", b"\xff" * 64, b"Traceback (most recent call last):\n", bytes(64)])
def test_stray_bytes_are_known_at_once(raw, data):
    """Never taken for the length of a message that would then be waited for."""
    ours, channel = raw
    ours.send(data)
    if b"RCm1".startswith(data):  # so far it could be one
        with pytest.raises(TransferError, match="no answer .* within 0.05 s"):
            channel.receive(0.05)
        return
    for _ in range(2):
        with within(0, 1), pytest.raises(TransferError, match="sent what is no message: it begins with"):
            channel.receive(10)


@pytest.mark.parametrize("timeout", [0, 0.05, 0.2])
def test_the_timeout_is_honoured(raw, timeout):
    _, channel = raw
    with within(timeout, timeout + 1), pytest.raises(TransferError, match=f"no answer from the other process within {timeout:g} s"):
        channel.receive(timeout)


@pytest.mark.parametrize("data", [b"RC", frame(bytes(20))[:-1], frame(b"", length=1 << 60), frame(b"abc", length=100)])
def test_a_peer_that_stops_in_the_middle_of_a_message_is_not_waited_for(raw, data):
    ours, channel = raw
    ours.send(data)
    with within(0.1, 1), pytest.raises(TransferError, match="no answer from the other process within 0.1 s"):
        channel.receive(0.1)


def test_a_peer_that_trickles_is_not_waited_for_either(raw):
    """The timeout is of the message, not of each of its bytes."""
    ours, channel = raw
    over = threading.Event()

    def trickle():
        for byte in frame(bytes(1000)):
            ours.send(bytes([byte]))
            if over.wait(0.02):
                return

    thread = threading.Thread(target=trickle)
    thread.start()
    with within(0.2, 1), pytest.raises(TransferError, match=r"within 0.2 s"):
        channel.receive(0.2)
    over.set()
    thread.join()


def test_a_peer_that_never_stops_talking_is_not_waited_for(raw):
    """There is always something to take in, and never a message; nor does it take anything in itself."""
    ours, channel = raw
    ours.setblocking(False)
    ours.send(frame(b"", length=1 << 60))
    over = threading.Event()

    def talk():
        while not over.wait(0.0005):
            with suppress(BlockingIOError):
                ours.send(bytes(1 << 16))

    thread = threading.Thread(target=talk)
    thread.start()
    with within(0.2, 2), pytest.raises(TransferError, match=r"no answer .* within 0.2 s"):
        channel.receive(0.2)
    with within(0.2, 2), pytest.raises(TransferError, match=r"took no message in within 0.2 s"):
        channel.send(Ping(1, bytes(16 << 20)), 0.2)
    over.set()
    thread.join()


def test_a_peer_that_will_say_no_more_may_still_listen(raw):
    ours, channel = raw
    ours.shutdown(socket.SHUT_WR)
    with within(0.1, 1), pytest.raises(TransferError, match="took no message in"):
        channel.send(Ping(1, bytes(16 << 20)), 0.1)


def test_a_message_that_was_late_comes_with_the_next_call(raw):
    ours, channel = raw
    data = frame(msgspec.msgpack.encode(Ping(3)))
    ours.send(data[:9])
    with pytest.raises(TransferError, match="no answer"):
        channel.receive(0.05)
    ours.send(data[9:])
    assert channel.receive(1) == Ping(3)


@pytest.mark.parametrize("timeout", [10, None])
def test_a_closed_peer_is_known_at_once(raw, timeout):
    ours, channel = raw
    ours.close()
    assert channel.has_message()
    for _ in range(2):
        with within(0, 1), pytest.raises(PeerGone, match="the other process closed its end of the channel$"):
            channel.receive(timeout)
    with pytest.raises(PeerGone, match="closed its end"):
        channel.send(Ping(1), timeout)


def test_a_peer_that_closes_while_it_is_waited_for_is_known_at_once(raw):
    ours, channel = raw
    timer = threading.Timer(0.05, ours.close)
    timer.start()
    with within(0, 1), pytest.raises(PeerGone):
        channel.receive(10)
    timer.join()


def test_what_a_peer_sent_before_it_closed_is_received(raw):
    ours, channel = raw
    ours.send(frame(msgspec.msgpack.encode(Ping(3))) + frame(bytes(9))[:-1])
    ours.close()
    assert channel.receive(10) == Ping(3)
    with within(0, 1), pytest.raises(PeerGone, match="closed its end of the channel in the middle of a message"):
        channel.receive(10)


def test_a_peer_that_closed_with_messages_unread_is_gone(raw):
    """The system says "connection reset" then, not the end of the stream."""
    ours, channel = raw
    channel.send(Ping(1))
    ours.close()
    with within(0, 1), pytest.raises(PeerGone):
        channel.receive(10)


def test_a_peer_that_takes_nothing_in_is_not_waited_for(raw):
    _, channel = raw
    with within(0.1, 2), pytest.raises(TransferError, match=r"took no message in within 0.1 s"):
        channel.send(Ping(1, bytes(16 << 20)), 0.1)


def test_what_cannot_be_encoded_is_not_sent(raw):
    ours, channel = raw
    for message in (Ping(2**70), Ping(1, names=["\ud800"]), Ping(object())):
        with pytest.raises((OverflowError, ValueError, TypeError)):
            channel.send(message)
    channel.send(Ping(1))
    assert ours.recv(100) == frame(msgspec.msgpack.encode(Ping(1)))


def interrupt(number, frame):
    raise KeyboardInterrupt


@pytest.fixture
def alarm():
    before = signal.signal(signal.SIGALRM, interrupt)
    yield lambda seconds: signal.setitimer(signal.ITIMER_REAL, seconds)
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, before)


def test_an_interrupted_receive_loses_nothing(raw, alarm):
    ours, channel = raw
    data = frame(msgspec.msgpack.encode(Ping(3)))
    ours.send(data[:9])
    alarm(0.05)
    with pytest.raises(KeyboardInterrupt):
        channel.receive(10)
    ours.send(data[9:])
    assert channel.receive(1) == Ping(3)


def test_an_interrupted_send_is_taken_up_again(pair, alarm):
    sender, receiver = pair
    large = Ping(1, bytes(16 << 20))
    alarm(0.5)  # long enough to have begun: nobody reads yet, and most of it has to wait
    with pytest.raises(KeyboardInterrupt):
        sender.send(large, 10)
    thread = threading.Thread(target=sender.send, args=(Ping(2), 10))
    thread.start()
    assert receiver.receive(10) == large
    assert receiver.receive(10) == Ping(2)
    thread.join()


def test_interrupted_while_bytes_move_it_says_so(raw, monkeypatch):
    """Between the system's call and the note of how far it came: nobody knows then where a message begins."""
    ours, channel = raw
    ours.send(frame(msgspec.msgpack.encode(Ping(3))))

    class Interrupted(bytearray):
        def __iadd__(self, data):
            raise KeyboardInterrupt

    monkeypatch.setattr(channel, "_inbox", Interrupted())
    with pytest.raises(KeyboardInterrupt):
        channel.receive(10)
    for call in (lambda: channel.receive(10), lambda: channel.send(Ping(1)), channel.has_message):
        with within(0, 1), pytest.raises(TransferError, match="interrupted in the middle of a message"):
            call()


def test_a_closed_channel_says_so_and_closes_twice(raw):
    _, channel = raw
    fd = channel._socket.fileno()
    channel.close()
    channel.close()
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(fd)
    for call in (lambda: channel.receive(10), lambda: channel.send(Ping(1)), channel.has_message):
        with pytest.raises(TransferError, match="this end of the channel is closed"):
            call()
