"""B14 for streams: headers that lie, and headers as any bytes."""

from __future__ import annotations

import dataclasses
import hashlib

import msgspec
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rollout_core.bucketing import Bucket, StreamBucket, StreamUnpacker, pack_stream, unpack_stream
from rollout_core.bucketing.bucket import seal
from rollout_core.errors import DuplicateNameError, ManifestError, RolloutCoreError
from support.tensors import patterned


def forged(*headers, buffers=None) -> list[StreamBucket]:
    """A stream with these headers, sealed as an honest sender would: only what they say is wrong."""
    chain, made = b"", []
    for index, header in enumerate(headers):
        raw = header if isinstance(header, bytes) else msgspec.msgpack.encode(header)
        chain = hashlib.blake2b(chain + raw, digest_size=16, person=b"rollout-core/str").digest()
        buffer = torch.zeros(buffers[index] if buffers else 0, dtype=torch.uint8)
        sealed = seal(buffer, "xxh3-128", index=index, plan_digest=chain, version=0)
        made.append(StreamBucket(header=raw, **{name: getattr(sealed, name) for name in Bucket.__slots__}))
    return made


def header(*slots, index=0, last=True, align=1, form="rollout-core/stream", version=1, **extra):
    return [form, version, index, last, align, [list(slot) for slot in slots], *extra.values()]


W = ([b"w"], "float32", [2], 0, 8)


def test_the_forger_can_be_honest():
    ((name, tensor),) = unpack_stream(forged(header(W), buffers=[8]))
    assert (name, tensor.tolist()) == ("w", [0.0, 0.0])


LIES = [
    (header(form="rollout-core/plan"), "its format is 'rollout-core/plan', not 'rollout-core/stream'"),
    (header(version=2), "it has version 2; this library reads version 1"),
    (header(index=3), "it is of bucket 3, and came with bucket 0"),
    (header(align=3), "align is 3; it is a power of two"),
    (header(extra=1), "Expected `array` of at most length 6"),
    (header((*W, 0)), "Expected `array` of at most length 5, got 6"),
    (header(([], "float32", [2], 0, 8)), "a slot has no name"),
    (header(([b""], "float32", [2], 0, 8)), "names are non-empty str"),
    (header(([b"\xff"], "float32", [2], 0, 8)), "codec can't decode"),
    (header(([b"w"], "float99", [2], 0, 8)), "this torch has no dtype 'float99'"),
    (header(([b"w"], "float32", [-2], 0, 8)), "which is no tuple of sizes"),
    (header(([b"w"], "float32", [2**62, 2**62], 0, 8)), "is larger than"),
    (header(([b"w"], "float32", [2], 0, 9)), "slot 'w' holds bytes 0 to 9 of f32"),
    (header(([b"w"], "float32", [2], 0, 0)), "slot 'w' holds bytes 0 to 0 of f32"),
    (header(([b"w"], "float32", [2], -4, 8)), "slot 'w' holds bytes -4 to 4 of f32"),
    (header(([b"w"], "float32", [2], 4, 8)), "slot 'w' holds bytes 4 to 12 of f32"),
    (header(([b"w"], "float32", [2], 0, 6)), "slot 'w' holds a part of an element"),
    (header(([b"w"], "float32", [2], 4, 4)), "a piece of 'w' starts at byte 4, and nothing came before it"),
    (header(([b"w"], "float32", [2], 0, 4)), "the stream's last bucket leaves 'w' incomplete"),
    (header(([b"w"], "float32", [2], 0, 4), W), "slot 'w' stands where tensor 'w' has to continue"),
    (header(([b"w"], "uint8", [2], -1, 2)), "slot 'w' holds bytes -1 to 1 of u8"),
    (header(([b"w", b"v"], "float32", [2], 0, 9)), "slot 'w' holds bytes 0 to 9 of f32"),
    (header(([b"w", b"v"], "float32", [2], 0, 6)), "slot 'w' holds a part of an element"),
    (header(form="x" * 41), f"its format is '{'x' * 40}', not"),
    (header(([b"w"], "x" * 41, [2], 0, 8)), f"this torch has no dtype '{'x' * 40}'"),
    (b"\x91" * 3000, "invalid bucket header"),
    (b"", "invalid bucket header"),
]


@pytest.mark.parametrize(("lie", "message"), LIES, ids=[str(i) for i in range(len(LIES))])
def test_headers_that_lie(lie, message):
    with pytest.raises(ManifestError, match=message):
        list(unpack_stream(forged(lie)))


@pytest.mark.parametrize("twice", [[W, W], [W, ([b"v", b"w"], "float32", [2], 0, 8)], [([b"w", b"w"], "float32", [2], 0, 8)]])
def test_a_name_that_comes_twice(twice):
    with pytest.raises(DuplicateNameError, match="name 'w' came twice in the stream"):
        list(unpack_stream(forged(header(*twice))))
    with pytest.raises(DuplicateNameError, match="name 'w' came twice in the stream"):
        list(unpack_stream(forged(header(W, last=False), header(W, index=1), buffers=[8, 8])))


def test_another_tensor_where_a_piece_has_to_continue():
    first = header(([b"w"], "float32", [2], 0, 4), last=False)
    for slot in (
        ([b"v"], "float32", [1], 0, 4),
        ([b"w"], "float32", [3], 4, 4),
        ([b"w"], "int32", [2], 4, 4),
        ([b"w"], "float32", [2], 0, 4),
    ):
        with pytest.raises(ManifestError, match="stands where tensor 'w' has to continue"):
            list(unpack_stream(forged(first, header(slot, index=1), buffers=[4, 4])))


def test_a_huge_tensor_in_pieces_is_refused_before_memory_is_asked_for():
    piece = ([b"w"], "uint8", [1 << 40], 0, 4)
    with pytest.raises(ManifestError, match="split tensor 'w' has 1099511627776 bytes; the bound is 274877906944"):
        list(unpack_stream(forged(header(piece, last=False), buffers=[4])))
    unpacker = StreamUnpacker(max_tensor_nbytes=7)
    with pytest.raises(ManifestError, match="split tensor 'w' has 8 bytes; the bound is 7"):
        unpacker.feed(*forged(header(([b"w"], "float32", [2], 0, 4), last=False), buffers=[4]))


def test_a_header_over_the_bound():
    (bucket,) = pack_stream([("a" * 100, patterned(torch.uint8, 3))], 8)
    with pytest.raises(ManifestError, match="it has .* bytes; the bound is 50"):
        StreamUnpacker(max_header_nbytes=50).feed(bucket)


@given(st.binary(max_size=100))
def test_any_bytes(data):
    with pytest.raises(RolloutCoreError):
        list(unpack_stream(forged(data)))


def test_a_refused_bucket_leaves_no_trace():
    pairs = [("w", patterned(torch.float32, 5)), ("v", patterned(torch.float32, 5, seed=3))]
    buckets = list(pack_stream(pairs, 12))
    unpacker = StreamUnpacker()
    for bucket in buckets:
        for wrong in (dataclasses.replace(bucket, digest=b"\0" * 16), dataclasses.replace(bucket, buffer=bucket.buffer[:-1])):
            with pytest.raises(RolloutCoreError):
                unpacker.feed(wrong)
        unpacker.feed(bucket)
    unpacker.close()


def test_b9_b10_a_streams_tied_names_are_checked_on_every_piece():
    first = header(([b"a", b"lost"], "uint8", [2], 0, 1), last=False)
    second = header(([b"a", b"x"], "uint8", [2], 1, 1), index=1)
    with pytest.raises(ManifestError, match="stands where tensor 'a' has to continue"):
        list(unpack_stream(forged(first, second, buffers=[1, 1])))
    with pytest.raises(ManifestError, match="names are non-empty str"):
        list(unpack_stream(forged(header(([b"a", b""], "uint8", [1], 0, 1)), buffers=[1])))


def test_b14_the_bound_of_a_header_holds_to_the_byte():
    (bucket,) = pack_stream([("a", patterned(torch.uint8, 3))], 8)
    length = len(bucket.header)
    with pytest.raises(ManifestError, match=f"it has {length} bytes; the bound is {length - 1}"):
        StreamUnpacker(max_header_nbytes=length - 1).feed(bucket)
    assert len(StreamUnpacker(max_header_nbytes=length).feed(bucket)) == 1
    for more, message in ((1, "it has 67108865 bytes; the bound is 67108864"), (0, "invalid bucket header: (?!it has)")):
        with pytest.raises(ManifestError, match=message):
            list(unpack_stream(forged(bytes((64 << 20) + more))))


def test_b14_the_bound_of_a_split_tensor_holds_to_the_byte():
    pairs = [("w", patterned(torch.float32, 5))]
    assert len(list(StreamUnpacker(max_tensor_nbytes=20).feed(next(pack_stream(pairs, 12))))) == 0
    with pytest.raises(ManifestError, match="split tensor 'w' has 20 bytes; the bound is 19"):
        StreamUnpacker(max_tensor_nbytes=19).feed(next(pack_stream(pairs, 12)))
