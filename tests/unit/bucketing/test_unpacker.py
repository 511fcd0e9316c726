"""What receivers promise besides the bytes: whose memory a tensor is, what is kept, and what an early end is told as."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from rollout_core.bucketing import (
    Options,
    StreamUnpacker,
    TensorSpec,
    Unpacker,
    iter_buckets,
    pack,
    pack_stream,
    plan_buckets,
    specs_of,
    unpack,
    unpack_stream,
)
from rollout_core.errors import IncompleteStreamError, IntegrityError
from rollout_core.testing.oracles import bytes_of, picture
from support.tensors import from_bytes, patterned, placed_at

U8, F32 = torch.uint8, torch.float32
PAIRS = [("a", patterned(F32, 4)), ("b", patterned(F32, 4, seed=2))]
PLAN = plan_buckets(specs_of(PAIRS), 32)

RECEIVERS = {
    "unpack": (lambda: pack(PLAN, PAIRS), lambda buckets, **options: unpack(PLAN, buckets, **options)),
    "Unpacker": (
        lambda: pack(PLAN, PAIRS),
        lambda buckets, **options: [pair for bucket in buckets for pair in Unpacker(PLAN, **options).feed(bucket)],
    ),
    "unpack_stream": (lambda: pack_stream(PAIRS, 32), unpack_stream),
    "StreamUnpacker": (
        lambda: pack_stream(PAIRS, 32),
        lambda buckets, **options: [pair for bucket in buckets for pair in StreamUnpacker(**options).feed(bucket)],
    ),
}


@pytest.mark.parametrize("kind", RECEIVERS)
def test_b8_tensors_are_views_unless_copies_are_asked_for(kind):
    send, receive = RECEIVERS[kind]
    for options, inside in (({}, True), ({"copy": False}, True), ({"copy": True}, False)):
        (bucket,) = send()
        start = bucket.buffer.data_ptr()
        for _, tensor in receive([bucket], **options):
            assert (start <= tensor.data_ptr() < start + bucket.nbytes) == inside


@pytest.mark.parametrize("kind", RECEIVERS)
def test_b13_digests_are_checked_unless_that_is_switched_off(kind):
    send, receive = RECEIVERS[kind]
    for options in ({}, {"verify": True}):
        (bucket,) = send()
        bucket.buffer[0] ^= 1
        with pytest.raises(IntegrityError, match="is damaged"):
            list(receive([bucket], **options))
    (bucket,) = send()
    bucket.buffer[0] ^= 1
    assert len(list(receive([bucket], verify=False))) == 2


def test_a_bucket_is_equal_to_itself_alone_and_never_changes():
    """Comparing bytes by accident would cost a model's worth of time, and tensors have no one answer to ==."""
    for bucket in (*pack(PLAN, PAIRS), *pack_stream(PAIRS, 32)):
        same = dataclasses.replace(bucket)
        assert bucket == bucket
        assert bucket != same
        assert len({bucket, same}) == 2
        assert not hasattr(bucket, "__dict__")
        for field in dataclasses.fields(bucket):
            with pytest.raises(dataclasses.FrozenInstanceError):
                setattr(bucket, field.name, getattr(bucket, field.name))
        fields = {field.name: getattr(bucket, field.name) for field in dataclasses.fields(bucket)}
        for name in fields:
            with pytest.raises(TypeError, match="positional"):
                type(bucket)(fields[name], **{other: value for other, value in fields.items() if other != name})


@pytest.mark.parametrize("part", ["specs", "options", "groups", "buckets"])
def test_b6_a_plan_never_changes(part):
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(PLAN, part, getattr(PLAN, part))


@pytest.mark.parametrize(
    ("thing", "field"),
    [(PLAN.specs[0], "shape"), (PLAN.options, "capacity"), (PLAN.buckets[0], "nbytes"), (PLAN.buckets[0].slots[0], "offset")],
    ids=["spec", "options", "layout", "slot"],
)
def test_b6_what_a_plan_is_made_of_never_changes(thing, field):
    with pytest.raises(AttributeError, match="immutable"):
        setattr(thing, field, getattr(thing, field))


def test_options_are_given_by_name():
    with pytest.raises(TypeError, match="positional"):
        Options(64, "split")


@pytest.mark.parametrize("kind", ["plan", "stream"])
def test_b13_the_right_bytes_under_another_dtype_are_refused(kind):
    receiver, (bucket,) = (Unpacker(PLAN), pack(PLAN, PAIRS)) if kind == "plan" else (StreamUnpacker(), pack_stream(PAIRS, 32))
    with pytest.raises(IntegrityError, match=r"bucket 0 has a buffer of torch.int8 with shape \[32\]; its layout is 32 contiguous"):
        receiver.feed(dataclasses.replace(bucket, buffer=bucket.buffer.view(torch.int8)))
    assert len(receiver.feed(bucket)) == 2


@pytest.mark.parametrize("verify", [True, False])
@pytest.mark.parametrize("kind", ["plan", "stream"])
def test_b13_the_right_bytes_in_another_shape_are_refused(kind, verify):
    receiver, (bucket,) = (
        (Unpacker(PLAN, verify=verify), pack(PLAN, PAIRS))
        if kind == "plan"
        else (StreamUnpacker(verify=verify), pack_stream(PAIRS, 32))
    )
    longer = torch.cat([bucket.buffer, bucket.buffer])
    for wrong in (bucket.buffer.view(8, 4), bucket.buffer.view(1, 32), longer, bucket.buffer[:31], longer[::2]):
        with pytest.raises(
            IntegrityError, match=r"bucket 0 has a buffer of torch.uint8 with shape .*; its layout is 32 contiguous"
        ):
            receiver.feed(dataclasses.replace(bucket, buffer=wrong))
    assert len(receiver.feed(bucket)) == 2


def moved(bucket, address, skip):
    buffer = placed_at(address, bucket.nbytes, skip=skip)
    return dataclasses.replace(bucket, buffer=buffer.copy_(bucket.buffer))


@pytest.mark.parametrize(("address", "skip"), [(1, 0), (8, 0), (1, 16), (15, 1), (8, 8), (4, 12), (17, 1), (3, 5)])
def test_b3_tensors_start_aligned_wherever_the_bucket_lies(address, skip):
    """Neither a GPU nor a view of another dtype can begin anywhere."""
    pairs = [("c", patterned(torch.complex128, 2)), ("h", patterned(torch.float16, 3)), ("f", patterned(F32, 4))]
    for receiver, buckets in receivers(pairs, 256):
        (bucket,) = buckets
        out = receiver.feed(moved(bucket, address, skip))
        assert picture(out) == picture(pairs)
        assert all(tensor.data_ptr() % tensor.dtype.itemsize == 0 for _, tensor in out)


@pytest.mark.parametrize(("address", "skip"), [(0, 0), (0, 16), (16, 0), (0, 32), (32, 48), (0, 240), (16, 256)])
def test_b8_a_bucket_at_an_aligned_place_is_not_copied(address, skip):
    for receiver, buckets in receivers(PAIRS, 64):
        (bucket,) = buckets
        bucket = moved(bucket, address, skip)
        assert [tensor.data_ptr() - bucket.buffer.data_ptr() for _, tensor in receiver.feed(bucket)] == [0, 16]


def receivers(pairs, capacity):
    plan = plan_buckets(specs_of(pairs), capacity)
    return [(Unpacker(plan), pack(plan, pairs)), (StreamUnpacker(), pack_stream(pairs, capacity))]


def test_b15_a_joined_tensor_is_its_receivers_alone():
    """It was collected piece by piece; handed out, nothing here keeps it."""
    pairs = [("big", patterned(U8, 50)), ("after", patterned(U8, 3)), ("big too", patterned(U8, 30))]
    for receiver, buckets in receivers(pairs, 8):
        kept = []
        for bucket in buckets:
            receiver.feed(bucket)
            kept.append(sorted(receiver._joins))
        assert kept == [["big"]] * 6 + [[], ["big too"], ["big too"], ["big too"], []]


@pytest.mark.parametrize("shape", [(), (1,), (0,), (0, 3), (3, 0), (2, 0, 3), (2, 3, 4), (1, 1), (5, 1, 2), (0, 0)])
def test_b1_strides_are_those_of_a_new_tensor(shape):
    pairs = [("w", patterned(F32, *shape))]
    for receiver, buckets in receivers(pairs, 256):
        ((_, tensor),) = [pair for bucket in buckets for pair in receiver.feed(bucket)]
        assert tensor.stride() == torch.empty(shape).stride()


@pytest.mark.parametrize(
    ("count", "words"),
    [
        (1, "1 tensors: 'w0'"),
        (3, "3 tensors: 'w0', 'w1', 'w2'"),
        (4, "4 tensors: 'w0', 'w1', 'w2', ..."),
        (9, "9 tensors: 'w0', 'w1', 'w2', ..."),
    ],
)
def test_b12_what_is_missing_is_counted_and_three_are_named(count, words):
    plan = plan_buckets([TensorSpec(f"w{i}", U8, (8,)) for i in range(count)], 8)
    with pytest.raises(IncompleteStreamError) as error:
        list(unpack(plan, []))
    assert str(error.value) == f"the stream ended after 0 of {count} buckets; missing {words}"


def test_b12_a_stream_that_ends_between_tensors_says_so():
    buckets = list(pack_stream(PAIRS, 16))
    with pytest.raises(IncompleteStreamError) as error:
        list(unpack_stream(buckets[:1]))
    assert str(error.value) == "the stream ended after 1 buckets; its last bucket is missing"
    with pytest.raises(IncompleteStreamError):
        list(unpack(PLAN, []))


# ----------------------------------------------------------------------------------------------------------- views and ties


@pytest.mark.parametrize("shape", [(), (1,), (1, 1), (2,)])
def test_b10_the_smallest_tensors_can_be_tied(shape):
    weight = patterned(F32, *shape)
    assert [spec.alias_of for spec in specs_of([("a", weight), ("b", weight)])] == [None, "a"]


@pytest.mark.parametrize("shape", [(0,), (3, 0)])
def test_b10_two_empty_tensors_are_no_tie(shape):
    """They share no memory, for they have none."""
    assert [spec.alias_of for spec in specs_of([("a", torch.empty(shape)), ("b", torch.empty(shape))])] == [None, None]


@pytest.mark.parametrize("kind", ["neg f16", "neg bf16", "conj c32", "both c32"])
def test_b1_copies_of_views_keep_signalling_nans(kind):
    raw = bytes.fromhex("817f" if "bf16" in kind else "017d") * 4
    dtype = {"neg f16": torch.float16, "neg bf16": torch.bfloat16}.get(kind, torch.complex32)
    view = from_bytes(raw, dtype, (len(raw) // dtype.itemsize,))
    if "neg" in kind or "both" in kind:
        view = torch._neg_view(view)
    if "c32" in kind:
        view = view.conj()
    pairs = [("w", view), ("x", view[:1])]
    assert picture(pair for bucket in iter_buckets(pairs, 64) for pair in bucket) == picture(pairs)
    assert picture(unpack_stream(pack_stream(iter(pairs), 64, groups=[["w", "x"]]))) == picture(pairs)


@pytest.mark.parametrize("stream", [False, True])
def test_a_split_tensor_is_joined_where_the_caller_says(stream):
    source = {"a": patterned(torch.float32, 10), "b": patterned(torch.int16, 3), "c": patterned(torch.float32, 9)}
    places = {"a": torch.zeros(40, dtype=torch.uint8)}  # and "c" in new memory
    asked = []

    def memory(spec):
        asked.append(spec.name)
        return places.get(spec.name)

    plan = plan_buckets(specs_of(source), 16)
    if stream:
        pairs = dict(unpack_with(StreamUnpacker(memory=memory), pack_stream(source, 16)))
    else:
        pairs = dict(unpack_with(Unpacker(plan, memory=memory), pack(plan, source)))
    assert asked == ["a", "c"]
    assert {name: bytes_of(tensor) for name, tensor in pairs.items()} == {name: bytes_of(t) for name, t in source.items()}
    assert pairs["a"].data_ptr() == places["a"].data_ptr()


def test_memory_is_asked_for_only_once_the_piece_is_verified():
    source = {"a": patterned(torch.float32, 10)}
    plan = plan_buckets(specs_of(source), 16)
    damaged = next(pack(plan, source))
    damaged.buffer[3] ^= 1
    unpacker = Unpacker(plan, memory=lambda spec: pytest.fail(f"asked for {spec.name}"))
    with pytest.raises(IntegrityError):
        unpacker.feed(damaged)


def unpack_with(unpacker, buckets):
    for bucket in buckets:
        yield from unpacker.feed(bucket)
    unpacker.close()
