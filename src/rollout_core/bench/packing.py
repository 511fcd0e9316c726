"""Packing on the CPU beside a plain copy of the same bytes: the floor is one read and one write."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Final

import torch

from rollout_core.bench.timing import Timing, measure
from rollout_core.bucketing import Packer, plan_buckets, specs_of

MIB: Final = 1 << 20
#: Rows and columns of bf16 tensors, by case.
CASES: Final = {
    "dense: 24 tensors, 1 GiB": [(11264 - 512 * (i % 3), 2048) for i in range(24)],
    "MoE: 341 x 3 MiB": [(768, 2048)] * 341,
    "tiny: 16384 x 8 KiB": [(4, 1024)] * 16384,
}


def bench_packing(repeats: int, threads: int) -> dict[str, dict[str, Timing]]:
    """For each case the plain copy and the packers, steady state: sources, buffers and plan are those of the round before."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            return {name: _case(shapes, repeats, pool) for name, shapes in CASES.items()}
    finally:
        torch.set_num_threads(before)


def _case(shapes: list[tuple[int, int]], repeats: int, pool: ThreadPoolExecutor) -> dict[str, Timing]:
    source = {f"w{i}": torch.randint(-999, 999, shape, dtype=torch.int16).view(torch.bfloat16) for i, shape in enumerate(shapes)}
    plan = plan_buckets(specs_of(source), sum(t.nbytes for t in source.values()))
    flat = torch.randint(0, 255, (plan.nbytes,), dtype=torch.uint8)
    target = torch.empty_like(flat)
    plain, pooled, sealed = Packer(plan, digest=None), Packer(plan, digest=None, executor=pool), Packer(plan, executor=pool)

    def drain(packer: Packer) -> None:
        for bucket in packer.pack(source):
            del bucket

    return measure(
        {
            "plain copy": lambda: target.copy_(flat),
            "Packer": lambda: drain(plain),
            "Packer, executor": lambda: drain(pooled),
            "Packer, executor, xxh3-128": lambda: drain(sealed),
        },
        repeats=repeats,
    )
