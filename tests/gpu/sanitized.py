"""Packing, unpacking and digests by the kernels, in memory that ends where the tensors do: for compute-sanitizer to watch.

    PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool memcheck python3 tests/gpu/sanitized.py [wrong]

Without torch's cache each tensor is an allocation of its own, so that an access beside it is one that the tool sees. ``wrong``: a
kernel that reads 16 bytes too far, instead; to see that the tool would tell.
"""

from __future__ import annotations

import random
import sys
from pathlib import Path

import torch
import triton
import triton.language as tl

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from rollout_core.bucketing import Packer, Unpacker, plan_buckets, specs_of
from rollout_core.bucketing.cuda import launching
from rollout_core.bucketing.digest import block_multilinear_by_torch
from support.kernel_checks import random_pairs

BLOCK = "block-multilinear-128"
LAYOUTS = 6


@triton.jit
def reads_too_far(source, out, size):
    at = tl.arange(0, 16)
    tl.store(out + at, tl.load(source + size + at))


def wrong() -> None:
    source, out = (torch.zeros(512, dtype=torch.uint8, device="cuda") for _ in range(2))
    reads_too_far[(1,)](source, out, 512)
    torch.cuda.synchronize()


def right() -> None:
    assert launching.usable(torch.device("cuda"))
    for seed in range(LAYOUTS):
        rng = random.Random(seed)
        pairs = random_pairs("cuda", rng, 25, 100_000)
        if seed % 2:  # in memory of their own, that ends with them
            pairs = [(name, tensor.clone()) for name, tensor in pairs]
        plan = plan_buckets(specs_of(pairs), rng.choice([40_001, 16 << 10, 1 << 20]), align=rng.choice([1, 16, 256]))
        for digest in (BLOCK, None):
            packer = Packer(plan, digest=digest, allocate=lambda nbytes: torch.empty(nbytes, dtype=torch.uint8, device="cuda"))
            for _ in range(2):
                buckets = list(packer.pack(pairs))
            into = {name: torch.empty_like(tensor, memory_format=torch.contiguous_format) for name, tensor in pairs}
            unpacker = Unpacker(plan, into=into, verify=digest is not None)
            for bucket in buckets:
                unpacker.feed(bucket)
            unpacker.close()
            assert all(torch.equal(into[name].view(torch.uint8), t.contiguous().view(torch.uint8)) for name, t in pairs)
        for bucket in buckets:
            assert launching.digest_lanes(bucket.buffer) == block_multilinear_by_torch(bucket.buffer)


if __name__ == "__main__":
    wrong() if "wrong" in sys.argv[1:] else right()
    print("reached the end")
