"""Packing, unpacking and digests by the kernels, in memory that ends where the tensors do: for compute-sanitizer to watch.

    PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool memcheck python3 tests/gpu/sanitized.py [wrong]

Without torch's cache each tensor is an allocation of its own, so that an access beside it is one that the tool sees. ``wrong``: a
kernel that reads 16 bytes too far, instead; to see that the tool would tell.
"""

from __future__ import annotations

import random
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import triton
import triton.language as tl

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from rollout_core.bucketing import Packer, Unpacker, plan_buckets, specs_of
from rollout_core.bucketing.cuda import launching
from rollout_core.bucketing.digest import block_multilinear_by_torch
from support.kernel_checks import random_pairs

BLOCK = "block-multilinear-128"
#: Alignments and capacities of what is packed.
LAYOUTS = [(1, 1 << 20), (1, 40_001), (16, 1 << 20), (16, 16 << 10), (256, 40_001), (1, 1 << 20)]
#: Kernels that have to be launched, or they were not watched.
KERNELS = ["copy_aligned", "copy_parts", "copy_shifted", "digest_aligned", "digest_part", "digest_rows", "gather_aligned"]
KERNELS += ["gather_parts", "gather_shifted", "gather_whole"]


@triton.jit
def reads_too_far(source, out, size):
    at = tl.arange(0, 16)
    tl.store(out + at, tl.load(source + size + at))


def wrong() -> None:
    source, out = (torch.zeros(512, dtype=torch.uint8, device="cuda") for _ in range(2))
    reads_too_far[(1,)](source, out, 512)
    torch.cuda.synchronize()


def launched():
    """The names of kernels as they are launched from here on."""
    names = set()
    kernels = launching._kernels()

    class Noted:
        def __init__(self, name):
            self._name, self._kernel = name, getattr(kernels, name)

        def __getitem__(self, grid):
            names.add(self._name)
            return self._kernel[grid]

    noted = SimpleNamespace(**{name: Noted(name) for name in KERNELS})
    launching._kernels = lambda: noted
    return names


def right(device: str = "cuda") -> None:
    names = launched()
    for seed, (align, capacity) in enumerate(LAYOUTS):
        # Clones: in memory of their own, that ends with them, so that what is read beside them is seen.
        pairs = [(name, tensor.clone()) for name, tensor in random_pairs(device, random.Random(seed), 25, 100_000)]
        plan = plan_buckets(specs_of(pairs), capacity, align=align)
        for digest in (BLOCK, None):
            packer = Packer(plan, digest=digest, allocate=lambda nbytes: torch.empty(nbytes, dtype=torch.uint8, device=device))
            for _ in range(2):
                buckets = list(packer.pack(pairs))
            into = {name: torch.empty_like(tensor, memory_format=torch.contiguous_format) for name, tensor in pairs}
            unpacker = Unpacker(plan, into=into, verify=digest is not None)
            for bucket in buckets:
                unpacker.feed(bucket)
            unpacker.close()
            assert all(torch.equal(into[name].view(torch.uint8), t.contiguous().view(torch.uint8)) for name, t in pairs)
        buffers = [bucket.buffer for bucket in buckets]
        lanes = [block_multilinear_by_torch(buffer) for buffer in buffers]
        assert [launching.digest_lanes(buffer) for buffer in buffers] == lanes
        places = np.array([buffer.data_ptr() for buffer in buffers])
        sizes = np.array([buffer.nbytes for buffer in buffers])
        rows = launching.digest_rows(torch.device(device), places, sizes, np.zeros_like(sizes))
        assert rows.cpu().numpy().view(np.uint64).tolist() == [list(pair) for pair in lanes]
    assert names == set(KERNELS), f"not launched: {set(KERNELS) - names}"


if __name__ == "__main__":
    assert launching.usable(torch.device("cuda"))
    wrong() if "wrong" in sys.argv[1:] else right()
    print("reached the end")
