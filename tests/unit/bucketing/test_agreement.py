"""B7 agreement and B13 integrity: two sides that differ find out, and so does a side that gets other bytes."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from rollout_core.bucketing import TensorSpec, Unpacker, pack, pack_stream, plan_buckets, specs_of, unpack, unpack_stream
from rollout_core.errors import IntegrityError, PlanMismatchError, RolloutCoreError
from support.tensors import capacities, named, patterned, plan_options

SPECS = [TensorSpec("a", torch.float32, (3,)), TensorSpec("b", torch.bfloat16, (4, 2)), TensorSpec("c", torch.float32, (3,), "a")]


@pytest.mark.parametrize(
    ("theirs", "options", "difference"),
    [
        (SPECS, {"capacity": 32}, "capacity is 64 here and 32 there"),
        (SPECS, {"order": "packed"}, "order is 'given' here and 'packed' there"),
        (SPECS, {"align": 8}, "align is 1 here and 8 there"),
        (SPECS, {"oversize": "own"}, "oversize is 'split' here and 'own' there"),
        (
            [SPECS[0], TensorSpec("x", torch.bfloat16, (4, 2)), SPECS[2]],
            {},
            "tensor 1 is 'b' bf16[4, 2] here and 'x' bf16[4, 2] there",
        ),
        (
            [SPECS[0], TensorSpec("b", torch.float16, (4, 2)), SPECS[2]],
            {},
            "tensor 1 is 'b' bf16[4, 2] here and 'b' f16[4, 2] there",
        ),
        (
            [SPECS[0], TensorSpec("b", torch.bfloat16, (2, 4)), SPECS[2]],
            {},
            "tensor 1 is 'b' bf16[4, 2] here and 'b' bf16[2, 4] there",
        ),
        ([*SPECS[:2], TensorSpec("c", torch.float32, (3,))], {}, "tensor 2 is 'c' f32[3] tied to 'a' here and 'c' f32[3] there"),
        (SPECS[:2], {}, "tensor 2 is 'c' f32[3] tied to 'a' only here"),
        ([*SPECS, TensorSpec("d", torch.uint8, (1,))], {}, "tensor 3 is 'd' u8[1] only there"),
        (SPECS, {"groups": [["a", "b"]]}, "the group ('a', 'b') is declared on one side only"),
    ],
)
def test_b7_the_first_difference_is_named(theirs, options, difference):
    ours = plan_buckets(SPECS, 64)
    other = plan_buckets(theirs, **{"capacity": 64, **options})
    with pytest.raises(PlanMismatchError) as error:
        ours.require_same(other)
    assert str(error.value) == f"the two sides have different plans: {difference}"


def test_b7_of_several_groups_the_first_by_name_is_named():
    specs = [TensorSpec(f"w{i}", torch.uint8, (1,)) for i in range(20)]
    groups = [[f"w{i}", f"w{i + 1}"] for i in range(18, -1, -2)]
    with pytest.raises(PlanMismatchError, match=r"the group \('w0', 'w1'\) is declared on one side only"):
        plan_buckets(specs, 64).require_same(plan_buckets(specs, 64, groups=groups))


def test_b7_a_layout_alone_can_differ():
    """Equal specs and options from a planner that placed them otherwise."""
    ours = plan_buckets(SPECS, 64)
    moved = dataclasses.replace(ours, buckets=plan_buckets(SPECS, 12).buckets)
    with pytest.raises(
        PlanMismatchError, match=r"slot 1 is 'b' bytes 0 to 16 at offset 12 of bucket 0 here and 'b' bytes 0 to 12 at"
    ):
        ours.require_same(moved)
    shorter = dataclasses.replace(ours, buckets=())
    with pytest.raises(PlanMismatchError, match=r"slot 0 is 'a' bytes 0 to 12 at offset 0 of bucket 0 here and missing there"):
        ours.require_same(shorter)
    ours.require_same(plan_buckets(SPECS, 64))


def test_b7_a_bucket_of_another_plan_is_refused_before_anything_is_used():
    pairs = [("a", patterned(torch.float32, 3))]
    ours, theirs = plan_buckets(specs_of(pairs), 64), plan_buckets(specs_of(pairs), 63)
    unpacker = Unpacker(ours)
    (bucket,) = pack(theirs, pairs)
    with pytest.raises(PlanMismatchError, match="bucket 0 is of plan .*, and this side has plan"):
        unpacker.feed(bucket)
    (bucket,) = pack(ours, pairs)
    assert [name for name, _ in unpacker.feed(bucket)] == ["a"]


def tampered(bucket, **changes):
    return dataclasses.replace(bucket, **changes)


@given(st.data())
def test_b13_one_flipped_bit_is_found(data):
    pairs = data.draw(named())
    algorithm = data.draw(st.sampled_from(["xxh3-128", "multilinear-128", "block-multilinear-128"]))
    plan = plan_buckets(specs_of(pairs), data.draw(capacities(pairs)), **data.draw(plan_options))
    buckets = [b for b in pack(plan, pairs, digest=algorithm) if b.nbytes]
    assume(buckets)
    bucket = data.draw(st.sampled_from(buckets))
    bit = data.draw(st.integers(0, bucket.nbytes * 8 - 1))
    bucket.buffer[bit // 8] ^= 1 << bit % 8
    with pytest.raises(IntegrityError, match=f"bucket {bucket.index} of version 0 is damaged"):
        list(unpack(plan, _until(plan, pairs, bucket)))


def _until(plan, pairs, bucket):
    """All buckets up to this one, and this one in its place."""
    for each in pack(plan, pairs, digest=bucket.algorithm):
        yield bucket if each.index == bucket.index else each
        if each.index == bucket.index:
            return


@pytest.mark.parametrize("algorithm", ["xxh3-128", "multilinear-128", "block-multilinear-128"])
@pytest.mark.parametrize("offset", [1, 2, 4, 8, 24])
def test_b13_two_values_swapped_are_found(algorithm, offset):
    pairs = [("a", patterned(torch.uint8, 64))]
    plan = plan_buckets(specs_of(pairs), 64)
    (bucket,) = pack(plan, pairs, digest=algorithm)
    first, second = bucket.buffer[3].clone(), bucket.buffer[3 + offset].clone()
    bucket.buffer[3], bucket.buffer[3 + offset] = second, first
    with pytest.raises(IntegrityError, match="is damaged"):
        list(unpack(plan, [bucket]))


@pytest.mark.parametrize("algorithm", ["xxh3-128", "multilinear-128", "block-multilinear-128"])
def test_b13_two_equal_sized_slots_swapped_are_found(algorithm):
    pairs = [("a", patterned(torch.float32, 4, seed=1)), ("b", patterned(torch.float32, 4, seed=2))]
    plan = plan_buckets(specs_of(pairs), 64)
    (bucket,) = pack(plan, [("a", pairs[1][1]), ("b", pairs[0][1])], digest=algorithm)
    (sent,) = pack(plan, pairs, digest=algorithm)
    with pytest.raises(IntegrityError, match="is damaged"):
        list(unpack(plan, [tampered(sent, buffer=bucket.buffer)]))


def test_b13_two_equal_buckets_swapped_are_found():
    """Equal sizes, and even equal bytes: the digest is bound to the index."""
    pairs = [("a", torch.ones(4)), ("b", torch.ones(4))]
    plan = plan_buckets(specs_of(pairs), 16)
    first, second = pack(plan, pairs)
    with pytest.raises(IntegrityError, match="bucket 0 of version 0 is damaged"):
        list(unpack(plan, [tampered(second, index=0), tampered(first, index=1)]))


def test_b13_a_bucket_replayed_from_an_older_version_is_found():
    pairs = [("a", torch.ones(4)), ("b", torch.ones(4))]
    plan = plan_buckets(specs_of(pairs), 16)
    old = list(pack(plan, pairs, version=1))
    new = list(pack(plan, pairs, version=2))
    with pytest.raises(IntegrityError, match="bucket 1 is of version 1, and this round is version 2"):
        list(unpack(plan, [new[0], old[1]]))
    with pytest.raises(IntegrityError, match="bucket 1 of version 2 is damaged"):
        list(unpack(plan, [new[0], tampered(old[1], version=2)]))


def test_b13_a_whole_round_replayed_is_found():
    pairs = [("a", torch.ones(4))]
    plan = plan_buckets(specs_of(pairs), 16)
    unpacker = Unpacker(plan)
    unpacker.feed(*pack(plan, pairs, version=5))
    unpacker.restart()
    for version in (4, 5):
        with pytest.raises(IntegrityError, match=f"of version {version}, which is not newer than 5: a replay"):
            unpacker.feed(*pack(plan, pairs, version=version))
    unpacker.feed(*pack(plan, pairs, version=6))
    assert unpacker.version == 6


def test_b13_the_version_that_was_asked_for_is_the_only_one():
    pairs = [("a", torch.ones(4))]
    plan = plan_buckets(specs_of(pairs), 16)
    unpacker = Unpacker(plan, version=7)
    with pytest.raises(IntegrityError, match="is of version 8, and this round is version 7"):
        unpacker.feed(*pack(plan, pairs, version=8))
    unpacker.feed(*pack(plan, pairs, version=7))


@pytest.mark.parametrize(
    "changes",
    [
        {"digest": b"\0" * 16},
        {"digest": b""},
        {"algorithm": "multilinear-128"},
        {"algorithm": "md5"},
        {"buffer": torch.zeros(17, dtype=torch.uint8)},
        {"buffer": torch.zeros(15, dtype=torch.uint8)},
        {"buffer": torch.zeros(4, 4, dtype=torch.uint8)},
        {"buffer": torch.zeros(16, dtype=torch.int8)},
        {"buffer": torch.zeros(32, dtype=torch.uint8)[::2]},
        {"digest": None},
    ],
    ids=str,
)
def test_b13_a_bucket_that_is_not_what_was_sent_is_refused(changes):
    pairs = [("a", torch.ones(4))]
    plan = plan_buckets(specs_of(pairs), 16)
    (bucket,) = pack(plan, pairs)
    unpacker = Unpacker(plan)
    with pytest.raises(IntegrityError, match="bucket 0"):
        unpacker.feed(tampered(bucket, **changes))
    assert len(unpacker.feed(bucket)) == 1, "the refused one left no trace"


@given(st.data())
def test_b13_streams_find_any_changed_byte_of_header_or_payload(data):
    pairs = data.draw(named(max_size=5))
    buckets = list(pack_stream(pairs, data.draw(capacities(pairs))))
    at = data.draw(st.integers(0, len(buckets) - 1))
    bucket = buckets[at]
    if bucket.nbytes and data.draw(st.booleans()):
        place = data.draw(st.integers(0, bucket.nbytes - 1))
        buffer = bucket.buffer.clone()
        buffer[place] ^= data.draw(st.integers(1, 255))
        buckets[at] = tampered(bucket, buffer=buffer)
    else:
        place = data.draw(st.integers(0, len(bucket.header) - 1))
        header = bytearray(bucket.header)
        header[place] ^= data.draw(st.integers(1, 255))
        buckets[at] = tampered(bucket, header=bytes(header))
    with pytest.raises(RolloutCoreError):
        list(unpack_stream(buckets))


def test_b13_a_stream_without_verification():
    pairs = [("a", patterned(torch.float32, 4))]
    buckets = list(pack_stream(pairs, 16, digest=None))
    ((_, tensor),) = unpack_stream(buckets, verify=False)
    assert torch.equal(tensor, pairs[0][1])
    with pytest.raises(IntegrityError, match="bucket 0 carries no digest"):
        list(unpack_stream(buckets))


def test_b13_without_verification_nothing_is_hashed_and_bytes_still_arrive():
    pairs = [("a", patterned(torch.float32, 4))]
    plan = plan_buckets(specs_of(pairs), 16)
    (bucket,) = pack(plan, pairs, digest=None)
    assert bucket.digest is None
    assert bucket.algorithm == "none"
    ((_, tensor),) = unpack(plan, [bucket], verify=False)
    assert torch.equal(tensor, pairs[0][1])
    with pytest.raises(IntegrityError, match="bucket 0 carries no digest; let the sender make one"):
        list(unpack(plan, [bucket]))


@pytest.mark.parametrize("version", [-1, 2**63, 1.0, True, "1"])
def test_bad_versions(version):
    plan = plan_buckets([], 8)
    with pytest.raises(ValueError, match="version is .*; it is a whole number"):
        list(pack(plan, [], version=version))
    with pytest.raises(ValueError, match="version is"):
        Unpacker(plan, version=version)
    with pytest.raises(ValueError, match="version is"):
        list(pack_stream([], 8, version=version))


def test_bad_digest_choice():
    with pytest.raises(
        ValueError, match="digest is 'md5'; it is one of xxh3-128, multilinear-128, block-multilinear-128, 'auto' or None"
    ):
        pack(plan_buckets([], 8), [], digest="md5")
    with pytest.raises(ValueError, match="digest is 'md5'"):
        pack_stream([], 8, digest="md5")
