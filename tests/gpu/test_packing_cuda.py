"""The kernels on a GPU: the bytes that torch's operations give, in every bucket, at any address, on any stream."""

from __future__ import annotations

import random

import pytest
import torch

from rollout_core.bucketing import Packer, Unpacker, finding, plan_buckets, specs_of, unpack
from rollout_core.bucketing.cuda import launching, packing
from rollout_core.bucketing.digest import block_multilinear_by_torch
from rollout_core.bucketing.finding import why_not_compiled
from rollout_core.bucketing.tensors import view_key
from rollout_core.testing import check_packer
from support.kernel_checks import BLOCK, bytes_at, check_packing, check_unpacking, count_launches, picture, random_pairs

KIB16 = 16 << 10


@pytest.fixture(autouse=True)
def kernels(monkeypatch):
    return count_launches(monkeypatch)


def test_the_kernels_run_here():
    assert launching.usable(torch.device("cuda"))


@pytest.mark.parametrize("size", [1, 15, 16, 17, KIB16 - 1, KIB16, KIB16 + 1, 3 * KIB16 + 48, 5_000_003, 1 << 28])
@pytest.mark.parametrize("skip", [0, 1, 4])
def test_digest(size, skip, kernels):
    data = bytes_at("cuda", size, skip, size)
    assert launching.digest_lanes(data) == block_multilinear_by_torch(data.clone())
    if size < 1 << 20:
        assert launching.digest_lanes(data) == block_multilinear_by_torch(data.cpu())


@pytest.mark.parametrize("seed", range(40))
def test_b1_random_layouts(seed, kernels):
    rng = random.Random(seed)
    pairs = random_pairs("cuda", rng, rng.randint(1, 60), 300_000)
    options = {"align": rng.choice([1, 1, 16, 256]), "order": rng.choice(["given", "packed"])}
    capacity = rng.choice([8 << 20, 1 << 20, 40_000, 20_001, KIB16])
    check_packing(pairs, "cuda", capacity=capacity, **options)
    check_unpacking(pairs, "cuda", capacity=capacity, **options)
    assert kernels["gather"] > 0
    assert kernels["copy"] > 0 or not any(tensor.numel() for _, tensor in pairs)


@pytest.mark.parametrize("count", [1, 2, 3, 50])
def test_b1_many_small_tensors_in_one_block(count):
    rng = random.Random(count)
    pairs = [(f"w{i}", bytes_at("cuda", rng.randint(1, 300), rng.randint(0, 15), i)) for i in range(count)]
    check_packing(pairs, "cuda", capacity=1 << 20)
    check_unpacking(pairs, "cuda", capacity=1 << 20)


def test_b1_a_large_bucket_of_every_kind_of_block():
    """More blocks than programs run at once, and offsets beyond 2**31."""
    pairs = [
        ("lead", bytes_at("cuda", 3, 0, 1)),
        ("w", bytes_at("cuda", (1 << 31) + 77, 0, 2)),
        ("v", bytes_at("cuda", 1 << 27, 0, 3)),
    ]
    plan = plan_buckets(specs_of(pairs), 4 << 30, align=2)
    (bucket,) = Packer(plan, digest=BLOCK).pack(pairs)
    for (_, tensor), slot in zip(pairs, plan.buckets[0].slots, strict=True):
        assert torch.equal(bucket.buffer[slot.offset : slot.end], tensor)
    into = {name: torch.zeros_like(tensor) for name, tensor in pairs}
    Unpacker(plan, into=into).feed(bucket)
    assert all(torch.equal(into[name], tensor) for name, tensor in pairs)


def test_tensors_that_move_between_rounds_are_found():
    pairs = [(f"w{i}", bytes_at("cuda", 30_000, 0, i)) for i in range(5)]
    plan = plan_buckets(specs_of(pairs), 70_000)
    packer = Packer(plan)
    for turn in range(5):
        pairs = [(name, bytes_at("cuda", 30_000, (turn * i) % 16, 10 * turn + i)) for i, (name, _) in enumerate(pairs)]
        assert picture(unpack(plan, packer.pack(pairs))) == picture(pairs)


def test_unmoved_reads_where_the_tensors_were():
    pairs = [(f"w{i}", bytes_at("cuda", 30_001, i, i)) for i in range(5)]
    plan = plan_buckets(specs_of(pairs), 70_000)
    packer = Packer(plan)
    list(packer.pack(pairs))
    for turn in range(3):
        for _, tensor in pairs:
            tensor += turn + 1
        assert picture(unpack(plan, packer.pack(pairs, unmoved=True))) == picture(pairs)


def test_t4_packing_on_other_streams():
    """Each round on a stream of its own, which waits for what wrote the sources, and on whose work the reading waits."""
    pairs = [(f"w{i}", bytes_at("cuda", 4 << 20, 0, i)) for i in range(8)]
    plan = plan_buckets(specs_of(pairs), 64 << 20)
    packer = Packer(plan, digest=None)
    for turn in range(6):
        stream = torch.cuda.Stream()
        moved = [(name, tensor.clone()) for name, tensor in pairs] if turn % 2 else pairs
        for _, tensor in moved:
            tensor += 1
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            (bucket,) = packer.pack(moved)
        torch.cuda.current_stream().wait_stream(stream)
        assert torch.equal(bucket.buffer, torch.cat([tensor for _, tensor in moved]))


def test_digests_that_nobody_asks_for_write_to_no_memory_of_others():
    """Their kernels run when pinned memory of the same size has been given to others."""
    data = bytes_at("cuda", 1 << 20, 0, 1)
    launching.digest_lanes(data)
    nbytes = launching.begin_digest(data).memory.nbytes
    torch.cuda.synchronize()
    torch.cuda._sleep(200_000_000)
    for _ in range(50):
        launching.begin_digest(data)
    others = [torch.zeros(nbytes, dtype=torch.uint8, pin_memory=True) for _ in range(60)]
    torch.cuda.synchronize()
    assert not any(other.any() for other in others)


def test_many_tensors_are_found_by_compiled_code(monkeypatch):
    """Without it packing would be slower, not wrong, and nothing else here would tell."""
    assert why_not_compiled() is None
    pairs = [(f"w{i}", bytes_at("cuda", 4096, 0, i)) for i in range(finding.MANY)]
    packer = Packer(plan_buckets(specs_of(pairs), 1 << 20))
    for _ in range(2):
        list(packer.pack(pairs))
    monkeypatch.setattr(packing.Filling, "_all_plain", lambda self, rows: pytest.fail("torch was asked"))
    (bucket,) = packer.pack(elsewhere := [(name, tensor + 1) for name, tensor in pairs])
    assert torch.equal(bucket.buffer, torch.cat([tensor for _, tensor in elsewhere]))


def test_b15_digests_leave_no_pinned_memory():
    data = bytes_at("cuda", 1 << 20, 0, 1)
    held = []
    for _ in range(40):
        launching.digest_lanes(data)
        held.append(torch.cuda.host_memory_stats()["allocated_bytes.current"])
    assert held[-1] == held[5]


def test_b15_rounds_leave_no_memory():
    pairs = [(f"w{i}", bytes_at("cuda", 1 << 20, 0, i)) for i in range(8)]
    plan = plan_buckets(specs_of(pairs), 4 << 20)
    packer, unpacker = Packer(plan), Unpacker(plan, into={name: torch.empty_like(t) for name, t in pairs})

    def one_round():
        unpacker.restart()
        for bucket in packer.pack([(name, tensor.clone()) for name, tensor in pairs]):
            unpacker.feed(bucket)

    for _ in range(2):
        one_round()
    before = torch.cuda.memory_allocated()
    for _ in range(4):
        one_round()
    assert torch.cuda.memory_allocated() == before


class OnGpu:
    """Our packer with everything on the GPU, as the kit asks for it: what it sees are the tensors, copied back."""

    capabilities = frozenset({"groups", "oversize=split"})

    def pack(self, named_tensors, capacity, groups=()):
        moved = {}  # a tied tensor stays one
        pairs = [(name, moved.setdefault(view_key(tensor) or name, tensor.cuda())) for name, tensor in named_tensors]
        self._plan = plan_buckets(specs_of(pairs), capacity, groups=groups)
        return list(Packer(self._plan).pack(pairs))

    def unpack(self, buckets):
        return [(name, tensor.cpu()) for name, tensor in unpack(self._plan, buckets)]

    def bucket_nbytes(self, bucket):
        return bucket.nbytes

    def slots(self, bucket):
        return [(slot.name, slot.offset, slot.nbytes) for slot in self._plan.buckets[bucket.index].slots]


@pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental")
def test_the_kit_passes_on_the_gpu(kernels):
    report = check_packer(OnGpu, isolate=False, timeout=30.0)
    assert not report.failed, str(report)
    assert kernels["gather"] > 0
