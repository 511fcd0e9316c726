"""Digests of what was sent, taken from buckets, are those of the tensors themselves, by either device's algorithm (W2)."""

import pytest
import torch
import xxhash

from rollout_core.bucketing import pack, plan_buckets, specs_of
from rollout_core.bucketing.digest import payload_digest
from rollout_core.workers.digests import SentDigests, algorithm_on, weight_digest

ON_GPU = algorithm_on("cuda:0")


def weights():
    generator = torch.Generator().manual_seed(0)
    large = torch.randn(700, generator=generator)
    found = {
        "odd": torch.randn(7, generator=generator).to(torch.bfloat16),
        "large": large,
        "strided": torch.randn(20, 30, generator=generator).t(),
        "whole": torch.arange(50),
        "zeros": torch.tensor([0.0, -0.0, 1.0]),
    }
    return {**found, "tied": found["large"]}


def raw(tensor):
    return torch.frombuffer(bytearray(tensor.contiguous().view(torch.uint8).numpy().tobytes()), dtype=torch.uint8)


def test_a_cpus_algorithm_is_not_a_gpus():
    assert algorithm_on("cpu") == "xxh3-128"
    assert ON_GPU != "xxh3-128"


@pytest.mark.parametrize("algorithm", ["xxh3-128", ON_GPU])
@pytest.mark.parametrize("capacity", [64, 1000, 1 << 20])  # the large tensor in many pieces, in some, whole
def test_digests_of_buckets_are_those_of_tensors(algorithm, capacity):
    source = weights()
    plan = plan_buckets(specs_of(source), capacity)
    sent = SentDigests(plan, algorithm=algorithm)
    for bucket in pack(plan, source):
        sent.add(bucket)
        bucket.buffer.fill_(255)  # it is used again
    expected = {}
    for name, tensor in source.items():
        data = raw(tensor)
        is_bare = algorithm == "xxh3-128"
        expected[name] = xxhash.xxh3_128_hexdigest(data.numpy()) if is_bare else payload_digest(data, b"", algorithm).hex()
    assert sent.digests == expected
    assert {name: weight_digest(tensor, algorithm=algorithm) for name, tensor in source.items()} == expected


@pytest.mark.parametrize("algorithm", ["xxh3-128", ON_GPU])
def test_values_know_no_sign_of_a_zero(algorithm):
    source = {"w": torch.tensor([0.0, -0.0, 1.0] * 30)}
    plan = plan_buckets(specs_of(source), 64)
    signs, values = SentDigests(plan, algorithm=algorithm), SentDigests(plan, values=True, algorithm=algorithm)
    for bucket in pack(plan, source):
        signs.add(bucket)
        values.add(bucket)
    plain = source["w"].abs()
    assert values.digests["w"] == weight_digest(plain, algorithm=algorithm)
    assert values.digests["w"] == weight_digest(source["w"], values=True, algorithm=algorithm)
    assert signs.digests["w"] != values.digests["w"]
