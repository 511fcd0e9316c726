"""Updates within a GPU: written by kernels, read back in few launches, with what is kept between them."""

from __future__ import annotations

import random
import threading

import numpy as np
import pytest
import torch

from rollout_core.bucketing import Packer, plan_buckets, specs_of
from rollout_core.bucketing.bucket import LaterBucket
from rollout_core.bucketing.cuda import launching
from rollout_core.bucketing.digest import block_multilinear_by_torch, payload_digest
from rollout_core.bucketing.looks import alike_to
from rollout_core.transfer import DirectWeights, receive, send
from rollout_core.transfer.carriers.local import local_carrier
from rollout_core.workers.digests import SentDigests, weight_digest, weight_digests
from support.in_place import CHANGES, square
from support.kernel_checks import BLOCK, bytes_at, count_launches, picture, random_pairs

CUDA = torch.device("cuda", 0)


@pytest.fixture(autouse=True)
def kernels(monkeypatch):
    return count_launches(monkeypatch)


@pytest.mark.parametrize("skip", [0, 16, 8, 4, 2, 1])
def test_digests_of_rows(skip):
    sizes = [0, 1, 15, 16, 17, 16_383, 16_384, 16_385, 100_000, 5_000_003, 64 << 20]
    payloads = [bytes_at("cuda", size, skip, size) for size in sizes]
    firsts = [0, 3, 7, 0, 1 << 20, 0, 5, 0, 0, 9, 2]
    arrays = (np.array(column, dtype=np.int64) for column in ([p.data_ptr() for p in payloads], sizes, firsts))
    found = launching.digest_rows(CUDA, *arrays).tolist()
    for payload, first, lanes in zip(payloads, firsts, found, strict=True):
        assert tuple(lane % (1 << 64) for lane in lanes) == block_multilinear_by_torch(payload.clone(), first=first)


@pytest.mark.parametrize("seed", range(6))
def test_weights_are_digested_in_few_launches(seed, kernels):
    rng = random.Random(seed)
    pairs = random_pairs("cuda", rng, 200, 300_000)
    expected = {name: weight_digest(tensor.cpu(), algorithm=BLOCK) for name, tensor in pairs}
    assert weight_digests(pairs, algorithm=BLOCK) == expected
    assert (kernels["digest_rows"], kernels["digest_lanes"]) == (1, 0)
    plan = plan_buckets(specs_of(pairs), rng.choice([1 << 20, 300_000, 50_001]))
    sent = SentDigests(plan, algorithm=BLOCK)
    memory = torch.empty(max(layout.nbytes for layout in plan.buckets), dtype=torch.uint8, device="cuda")
    for bucket in Packer(plan, digest=None).pack(pairs, allocate=lambda nbytes: memory[:nbytes]):
        sent.add(bucket)  # the next bucket is written where this one lies
    assert sent.digests == expected


def test_a_digest_is_there_when_it_is_asked_for():
    pairs = [(f"w{i}", bytes_at("cuda", 64 << 20, 0, i)) for i in range(4)]
    plan = plan_buckets(specs_of(pairs), 64 << 20)
    buckets = list(Packer(plan).pack(pairs, version=3))
    assert all(isinstance(bucket, LaterBucket) for bucket in buckets)
    for bucket in reversed(buckets):
        context = plan.digest + bucket.index.to_bytes(8, "little") + (3).to_bytes(8, "little")
        assert bucket.digest == payload_digest(bucket.buffer.cpu(), context, BLOCK)


def weights(turn):
    generator = torch.Generator("cuda").manual_seed(turn)

    def drawn(*shape, dtype=torch.bfloat16):
        return torch.randn(shape, generator=generator, device="cuda").to(dtype)

    small = {f"small.{i}": drawn(3 + i % 5, 7) for i in range(300)}
    return {"large": drawn(3000, 1001), **small, "norm": drawn(513, dtype=torch.float32), "none": drawn(0, 4)}


def test_updates_are_written_by_kernels_with_what_is_kept(kernels):
    mine = weights(0)
    into = DirectWeights(mine)
    plan = plan_buckets(specs_of(mine), 1 << 20)
    packer = Packer(plan)
    end, (other,) = local_carrier(device="cuda")
    try:
        for turn in range(1, 6):
            before = kernels["copy"]
            if turn == 4:
                mine["large"].data = torch.zeros_like(mine["large"])  # in other memory from here on
            source = weights(turn)
            raised = []

            def sender(source=source, raised=raised):
                try:
                    send(plan, source, end, timeout=60, packer=packer)
                except Exception as error:
                    raised.append(error)

            worker = threading.Thread(target=sender)
            worker.start()
            report = receive(other, into, timeout=60)
            worker.join(90)
            assert not raised
            assert report.version == turn
            assert kernels["copy"] - before == report.buckets
            assert picture(mine.items()) == picture(source.items())
    finally:
        end.close()
        other.close()


@pytest.mark.parametrize("change", CHANGES)
def test_a_tensor_that_changed_in_place_looks_otherwise(change):
    tensors = [square().cuda() for _ in range(3)]
    alike = alike_to(tensors)
    assert alike is not None, "this torch has no quick check: packing is slower, not wrong"
    tensors[1] += 1
    assert alike(*tensors)
    CHANGES[change](tensors[1])
    assert not alike(*tensors)
    assert not alike(tensors[0], tensors[1].cpu(), tensors[2])
