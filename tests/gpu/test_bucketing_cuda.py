"""Clauses B on CUDA memory: the same oracle, fed with the raw storage copied to the host."""

from __future__ import annotations

import pytest
import torch

from rollout_core.bucketing import Packer, Unpacker, iter_buckets, pack, pack_stream, plan_buckets, specs_of, unpack, unpack_stream
from rollout_core.bucketing.digest import (
    ALGORITHMS,
    block_multilinear,
    block_multilinear_by_torch,
    multilinear,
    payload_digest,
)
from rollout_core.errors import IntegrityError
from rollout_core.testing.oracles import bytes_of
from support.tensors import odd_inputs, patterned

pytestmark = pytest.mark.filterwarnings("ignore:ComplexHalf:UserWarning")
ODD = odd_inputs()


def on_gpu(tensor: torch.Tensor) -> torch.Tensor:
    """The same view over the same storage, on the GPU."""
    moved = torch.empty(0, dtype=tensor.dtype, device="cuda")
    moved.set_(tensor.untyped_storage().cuda(), tensor.storage_offset(), tensor.shape, tensor.stride())
    moved = torch._conj(moved) if tensor.is_conj() else moved
    return torch._neg_view(moved) if tensor.is_neg() else moved


def picture(pairs):
    return [(n, t.dtype, tuple(t.shape), bytes_of(t if t.device.type == "cpu" else t.cpu())) for n, t in pairs]


@pytest.mark.parametrize("name", ODD)
@pytest.mark.parametrize("capacity", [16, 1 << 20])
def test_b1_odd_inputs(name, capacity):
    expected = picture([(name, ODD[name])])
    pairs = [(name, on_gpu(ODD[name].detach()))]
    plan = plan_buckets(specs_of(pairs), capacity)
    for source in (pairs, iter(pairs)):
        buckets = list(pack(plan, source))
        assert {bucket.buffer.device.type for bucket in buckets} == {"cuda"}
        assert picture(unpack(plan, buckets)) == expected
    assert picture(unpack_stream(pack_stream(pairs, capacity))) == expected
    assert picture(p for b in iter_buckets(pairs, capacity) for p in b) == expected


@pytest.mark.parametrize("order", ["given", "packed"])
def test_b1_many_dtypes_together_and_sources_on_two_devices(order):
    host = [(name, tensor.detach()) for name, tensor in ODD.items() if name != "tied"]
    mixed = [(n, t if i % 3 == 0 else on_gpu(t)) for i, (n, t) in enumerate(host)]
    plan = plan_buckets(specs_of(mixed), 200, order=order)
    assert picture(unpack(plan, Packer(plan).pack(mixed))) == picture(host)


@pytest.mark.parametrize("size", [0, 1, 3, 4, 5, 4096, 16384, 16385, 5_000_003, 5_000_016])
def test_digests_of_cpu_and_gpu_are_equal(size):
    data = torch.randint(0, 256, (size,), dtype=torch.uint8, generator=torch.Generator().manual_seed(size))
    assert multilinear(data.cuda()) == multilinear(data)
    assert block_multilinear(data.cuda()) == block_multilinear_by_torch(data.cuda()) == block_multilinear(data)
    for algorithm in ALGORITHMS:
        assert payload_digest(data.cuda(), b"c", algorithm) == payload_digest(data, b"c", algorithm)


def test_b13_damage_on_the_gpu_is_found():
    pairs = [("w", patterned(torch.float32, 1000).cuda())]
    plan = plan_buckets(specs_of(pairs), 1 << 20)
    (bucket,) = pack(plan, pairs)
    assert bucket.algorithm == "block-multilinear-128"
    bucket.buffer[1234] ^= 8
    with pytest.raises(IntegrityError, match="bucket 0 of version 0 is damaged"):
        Unpacker(plan).feed(bucket)


def test_b8_writing_to_a_source_after_its_bucket_changes_nothing():
    weight = patterned(torch.float32, 1000).cuda()
    plan = plan_buckets(specs_of([("w", weight)]), 1 << 20)
    expected = bytes_of(weight.cpu())
    (bucket,) = pack(plan, [("w", weight)])
    weight.zero_()
    ((_, out),) = unpack(plan, [bucket])
    assert bytes_of(out.cpu()) == expected


def test_b15_rounds_use_the_memory_of_one():
    pairs = [(f"w{i}", torch.randn(1 << 20, device="cuda")) for i in range(8)]
    plan = plan_buckets(specs_of(pairs), 8 << 20)
    packer = Packer(plan)

    def one_round():
        for bucket in packer.pack(pairs):
            del bucket

    one_round()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    for _ in range(5):
        one_round()
    assert torch.cuda.memory_allocated() == before
    assert torch.cuda.max_memory_allocated() - before < 8 * (8 << 20), "one bucket, and the digest's temporaries"
