"""Digests of many weights at once are those of each by itself, and split tensors are not kept for theirs."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch

from rollout_core.bucketing import Packer, plan_buckets, specs_of
from rollout_core.workers import digests
from rollout_core.workers.digests import SentDigests, algorithm_on, weight_digest, weight_digests
from rollout_core.workers.shards import WHOLE, Shard
from support.tensors import patterned

ON_GPU = algorithm_on("cuda:0")


def weights():
    values = patterned(torch.complex64, 6, 5)
    tied = patterned(torch.bfloat16, 40, 30)
    return {
        "whole": patterned(torch.float32, 300, 20),
        "strided": patterned(torch.bfloat16, 20, 30).t(),
        "every other": patterned(torch.float32, 4000)[::2],
        "conjugate": values.conj(),
        "negated": torch._neg_view(patterned(torch.float32, 9)),
        "parameter": torch.nn.Parameter(patterned(torch.float32, 7)),
        "none": torch.zeros(0, 4),
        "scalar": torch.tensor(-0.0),
        "tied": tied,
        "also tied": tied,
    }


@pytest.mark.parametrize("algorithm", ["xxh3-128", ON_GPU])
@pytest.mark.parametrize("values", [False, True])
@pytest.mark.parametrize("at_once", [1, 3000, 1 << 30])
def test_they_are_those_of_each(algorithm, values, at_once, monkeypatch):
    monkeypatch.setattr(digests, "_AT_ONCE", at_once)
    found = weight_digests(weights().items(), values=values, algorithm=algorithm)
    assert found == {name: weight_digest(tensor, values=values, algorithm=algorithm) for name, tensor in weights().items()}


def test_no_more_copies_than_are_digested_at_once(monkeypatch):
    """What is made of a layer to be read (quantized, packed) lives until its digest is under way."""
    monkeypatch.setattr(digests, "_AT_ONCE", 4000)
    refs, most = [], 0

    def made():
        nonlocal most
        for i in range(12):
            tensor = torch.full((500,), float(i))  # 2000 bytes
            refs.append(weakref.ref(tensor))
            gc.collect()
            most = max(most, sum(ref() is not None for ref in refs))
            yield f"w{i}", tensor
            del tensor

    assert len(weight_digests(made(), algorithm=ON_GPU)) == 12
    assert most <= 4


def test_b15_a_split_tensor_is_not_kept_for_its_digest():
    source = {"before": torch.ones(300), "w": patterned(torch.float32, 100_000), "after": torch.ones(9)}
    plan = plan_buckets(specs_of(source), 90_000)
    sent = SentDigests(plan, algorithm=ON_GPU)
    refs = []
    for bucket in Packer(plan, allocate=lambda nbytes: torch.empty(nbytes, dtype=torch.uint8)).pack(source):
        sent.add(bucket)
        bucket.buffer.fill_(255)
        refs.append(weakref.ref(bucket.buffer.untyped_storage()))
        del bucket
    gc.collect()
    assert not any(ref() for ref in refs)
    assert not sent._joined
    assert sent.digests == {name: weight_digest(tensor, algorithm=ON_GPU) for name, tensor in source.items()}


@pytest.mark.parametrize("algorithm", ["xxh3-128", ON_GPU])
@pytest.mark.parametrize("capacity", [2000, 1 << 20])
def test_w9_parts_are_digested_too(algorithm, capacity):
    source = weights()
    plan = plan_buckets(specs_of(source), capacity)
    rows, columns = Shard(0, ((0, 10), (20, 40))), Shard(1, ((0, 10),))
    parts = {"tied": {rows}, "also tied": {columns, WHOLE}, "whole": {Shard(0, ((100, 300),)), Shard(0, ((0, 0),))}}
    sent = SentDigests(plan, algorithm=algorithm, parts=parts)
    for bucket in Packer(plan).pack(source):
        sent.add(bucket)
        bucket.buffer.fill_(255)
    assert sent.digests == {name: weight_digest(tensor, algorithm=algorithm) for name, tensor in source.items()}
    for name, some in parts.items():
        for part in some:
            assert sent.of_parts[name, part] == weight_digest(part.of(source[name]), algorithm=algorithm), (name, part)
    assert sent.of_parts["tied", columns] == sent.of_parts["also tied", columns]


def test_weights_have_one_of_two_algorithms():
    with pytest.raises(ValueError, match="algorithm is 'multilinear-128'; it is 'xxh3-128' or 'block-multilinear-128'"):
        SentDigests(plan_buckets([], 10), algorithm="multilinear-128")
