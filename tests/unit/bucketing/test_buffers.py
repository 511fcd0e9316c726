"""B8 and B15 at the buffer: what the pool lends, what it keeps, and what an allocator may return."""

from __future__ import annotations

import dataclasses

import pytest
import torch
import xxhash

from rollout_core.bucketing import Packer, Slot, TensorSpec, Unpacker, pack, plan_buckets, specs_of, unpack
from rollout_core.bucketing.buffers import BufferPool
from rollout_core.bucketing.tensors import own_copy
from rollout_core.bucketing.unpacker import join_piece
from rollout_core.errors import IntegrityError
from rollout_core.testing.oracles import bytes_of, picture
from support.tensors import patterned, placed_at

CPU = torch.device("cpu")


def held_by(pool: BufferPool) -> int:
    return len(pool._buffers)


@pytest.mark.parametrize("nbytes", [1, 16, 17, 63, 64, 65, 1000, 4096])
def test_b3_a_pools_buffers_start_at_cache_lines(nbytes):
    pool = BufferPool()
    lent = [pool.take(nbytes, CPU) for _ in range(20)]
    assert {buffer.data_ptr() % 64 for buffer in lent} == {0}
    assert all(buffer.shape == (nbytes,) and buffer.dtype is torch.uint8 for buffer in lent)
    assert len({buffer.data_ptr() for buffer in lent}) == 20


def test_b8_two_idle_buffers_are_lent_once_each():
    """A pool that counted one of them twice would let two buckets share memory."""
    pool = BufferPool()
    lent = [pool.take(64, CPU) for _ in range(2)]
    addresses = {buffer.data_ptr() for buffer in lent}
    for _ in range(3):
        lent.clear()
        lent = [pool.take(64, CPU) for _ in range(2)]
        assert {buffer.data_ptr() for buffer in lent} == addresses
        assert held_by(pool) == 2


def test_b15_two_buckets_in_flight_use_the_memory_of_two():
    """One is sent while the next is filled, round after round, and between rounds both are let go."""
    pairs = [(f"w{i}", patterned(torch.uint8, 64)) for i in range(6)]
    packer = Packer(plan_buckets(specs_of(pairs), 64))
    used = set()
    for _ in range(4):
        before = None
        for bucket in packer.pack(pairs):
            used.add(bucket.buffer.data_ptr())
            before = bucket  # keeps the last one while the next is packed
        del before, bucket
    assert len(used) == 2


def test_b15_idle_buffers_that_are_too_small_are_let_go():
    pool = BufferPool()
    small = [pool.take(8, CPU) for _ in range(3)]
    del small
    large = pool.take(64, CPU)
    assert held_by(pool) == 1
    del large
    large = [pool.take(64, CPU) for _ in range(2)]
    del large
    exact = pool.take(64, CPU)
    assert held_by(pool) == 2, "one that just fits is worth keeping"
    assert exact.shape == (64,)


def test_memory_is_made_where_the_bytes_are():
    """Seen on the meta device, which is the other one that every machine has."""
    elsewhere = BufferPool().take(8, torch.device("meta"))
    assert elsewhere.dtype is torch.uint8
    assert own_copy(torch.empty(3, device="meta")).device.type == "meta"
    slot = Slot(TensorSpec("w", torch.uint8, (9,)), 0, 8)
    joins = {}
    assert join_piece(joins, slot, elsewhere) is None
    assert joins["w"].device.type == "meta"


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        (lambda n: placed_at(1, n), "does not start at a multiple of 16 bytes"),
        (
            lambda n: placed_at(15, n, skip=1),
            "does not start at a multiple of 16 bytes",
        ),  # its own address would do, its offset not
        (lambda n: torch.empty(n, dtype=torch.int8), r"allocate\(12\) returned torch.int8 of shape \[12\]"),
        (lambda n: torch.empty(n, 1, dtype=torch.uint8), r"allocate\(12\) returned torch.uint8 of shape \[12, 1\]"),
    ],
    ids=["odd address", "odd offset", "signed", "2-d"],
)
def test_b3_an_allocators_memory_has_to_serve_every_dtype(returned, message):
    pairs = [("a", torch.ones(3))]
    with pytest.raises(ValueError, match=message):
        list(pack(plan_buckets(specs_of(pairs), 12), pairs, allocate=returned))


def test_b3_an_allocator_may_start_anywhere_that_is_aligned():
    pairs = [("a", patterned(torch.complex128, 3)), ("empty", torch.empty(0))]
    plan = plan_buckets(specs_of(pairs), 48)
    assert picture(unpack(plan, pack(plan, pairs, allocate=lambda n: placed_at(16, n, skip=16)))) == picture(pairs)
    nothing = plan_buckets(specs_of(pairs[1:]), 48)
    assert picture(unpack(nothing, pack(nothing, pairs[1:], allocate=lambda n: placed_at(1, n, skip=16)))) == picture(pairs[1:])


# ---------------------------------------------------------------------------------------------------------------- envelopes


@pytest.mark.parametrize("version", [0, 1, 2**63 - 1])
def test_b13_a_digest_is_the_documented_bytes(version):
    """docs/manifest.md: XXH3-128 over plan digest, index and version (u64 each), their length (u64) and the payload."""
    pairs = [(f"w{i}", patterned(torch.uint8, 8, seed=i)) for i in range(3)]
    plan = plan_buckets(specs_of(pairs), 8)
    buckets = list(pack(plan, pairs, version=version))
    for index, bucket in enumerate(buckets):
        context = plan.digest + index.to_bytes(8, "little") + version.to_bytes(8, "little")
        assert len(context) == 32
        assert bucket.digest == xxhash.xxh3_128_digest(context + (32).to_bytes(8, "little") + bytes_of(bucket.buffer))
    unpacker = Unpacker(plan, version=version)
    assert picture(pair for bucket in buckets for pair in unpacker.feed(bucket)) == picture(pairs)


def test_b13_an_index_at_the_limit_is_one_that_a_bucket_can_have():
    pairs = [("a", torch.ones(2))]
    plan = plan_buckets(specs_of(pairs), 8)
    (bucket,) = pack(plan, pairs)
    with pytest.raises(Exception, match="is out of order"):
        Unpacker(plan).feed(dataclasses.replace(bucket, index=2**63 - 1))
    with pytest.raises(IntegrityError, match="a bucket has index 9223372036854775808"):
        Unpacker(plan).feed(dataclasses.replace(bucket, index=2**63))
