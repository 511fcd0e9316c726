"""Reading weights back takes a launch for many of them, and as many for what was sent as it has buckets."""

from __future__ import annotations

import random

import pytest
import torch

from rollout_core.bucketing import Packer, plan_buckets, specs_of
from rollout_core.bucketing.digest import block_multilinear_by_torch, lanes_digest
from rollout_core.testing.oracles import bytes_of
from rollout_core.workers.digests import SentDigests, weight_digests
from support.kernel_checks import BLOCK, random_pairs

pytestmark = pytest.mark.filterwarnings("ignore:Conversion of an array with ndim:DeprecationWarning")  # Triton's interpreter does


def expected(pairs):
    found = {}
    for name, tensor in pairs:
        raw = (
            torch.frombuffer(bytearray(bytes_of(tensor)), dtype=torch.uint8)
            if tensor.numel()
            else torch.empty(0, dtype=torch.uint8)
        )
        found[name] = lanes_digest(block_multilinear_by_torch(raw), raw.numel(), b"").hex()
    return found


@pytest.mark.parametrize("seed", range(4))
def test_of_what_is_there(seed, kernels):
    pairs = random_pairs("cpu", random.Random(seed), 12, 30_000)
    assert weight_digests(pairs, algorithm=BLOCK) == expected(pairs)
    assert (kernels["digest_rows"], kernels["digest_lanes"]) == (1, 0)


@pytest.mark.parametrize("seed", range(4))
def test_of_what_was_sent(seed, kernels):
    rng = random.Random(seed)
    pairs = random_pairs("cpu", rng, 12, 30_000)
    plan = plan_buckets(specs_of(pairs), rng.choice([9_000, 20_001, 1 << 20]))
    buckets = list(Packer(plan, digest=None).pack(iter(pairs)))
    sent = SentDigests(plan, algorithm=BLOCK)
    for bucket in buckets:
        sent.add(bucket)
        bucket.buffer.fill_(255)
    assert sent.digests == expected(pairs)
    assert kernels["digest_lanes"] == 0
    assert 0 < kernels["digest_rows"] <= len(buckets), "a bucket may end before a block of its tensor does"
