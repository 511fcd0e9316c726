"""What an update costs its two ends beside moving bytes: planning, looking at tensors, manifests. For a mixture of experts of
18,867 tensors, each a few bytes here, so that hardly anything is moved.

What a GPU's kernels are given is made here as for a GPU, and the kernels are left out.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Final
from unittest.mock import patch

import torch

from rollout_core.bench.planning import CAPACITY, qwen3_30b_a3b
from rollout_core.bench.timing import Timing, measure
from rollout_core.bucketing import BucketPlan, Packer, plan_buckets, specs_of
from rollout_core.bucketing.specs import are_specs_of
from rollout_core.transfer import DirectWeights, receive, send
from rollout_core.transfer.carriers.local import local_carrier

_TIMEOUT: Final = 120.0

Tensors = dict[str, torch.Tensor]


def bench_host_time(repeats: int) -> dict[str, dict[str, Timing]]:
    """Milliseconds for all tensors, by part and way: what is made anew for each update, first, and then what is kept."""
    source, other = _tensors(1), _tensors(2)
    buckets = len(plan_buckets(qwen3_30b_a3b(), CAPACITY).buckets)
    plan = plan_buckets(specs_of(source), -(-sum(t.nbytes for t in source.values()) // buckets))
    return {
        f"a sender's plan of {len(plan.specs)} tensors": _planning(source, plan, repeats),
        "a receiver's checks": _checks(plan, repeats),
        "a GPU's tables": _tables(source, other, plan, repeats),
        f"an update of {len(plan.buckets)} buckets over threads, xxh3-128, both ends": _updates(source, plan, repeats),
    }


def _tensors(seed: int) -> Tensors:
    generator = torch.Generator().manual_seed(seed)
    shapes = [(spec.name, tuple(min(size, 4) for size in spec.shape)) for spec in qwen3_30b_a3b()]
    return {name: torch.randn(shape, generator=generator).to(torch.bfloat16) for name, shape in shapes}


def _planning(source: Tensors, plan: BucketPlan, repeats: int) -> dict[str, Timing]:
    def anew() -> bytes:
        made = plan_buckets(specs_of(source), plan.capacity)
        Packer(made)
        return made.digest + made.to_bytes()

    def kept() -> None:
        assert are_specs_of(plan.specs, source)

    return measure({"specs, plan, manifest and packer": anew, "the last ones, looked at again": kept}, repeats=repeats)


def _checks(plan: BucketPlan, repeats: int) -> dict[str, Timing]:
    mine, manifest = _tensors(3), plan.to_bytes()
    target = DirectWeights(mine)

    def anew() -> None:
        DirectWeights(mine).begin(BucketPlan.from_bytes(manifest), 1)

    return measure({"manifest read, tensors checked": anew, "again": lambda: target.begin(plan, 1)}, repeats=repeats)


def _tables(source: Tensors, other: Tensors, plan: BucketPlan, repeats: int) -> dict[str, Timing]:
    memory = torch.empty(max(layout.nbytes for layout in plan.buckets), dtype=torch.uint8)
    turns = [source, other]

    def packed(packer: Packer, tensors: Tensors, **options: Any) -> None:
        for bucket in packer.pack(tensors, allocate=lambda nbytes: memory[:nbytes], **options):
            del bucket

    kept, moving, still = (Packer(plan, digest=None) for _ in range(3))

    def moved() -> None:
        turns.reverse()
        packed(moving, turns[0])

    with _without_kernels():
        return measure(
            {
                "a packer made for it": lambda: packed(Packer(plan, digest=None), source),
                "kept, other tensors each time": moved,
                "kept": lambda: packed(kept, source),
                "kept, said to be unmoved": lambda: packed(still, source, unmoved=True),
            },
            repeats=repeats,
            warmup=4,
        )


@contextmanager
def _without_kernels() -> Iterator[None]:
    """Everything for a GPU's kernels, on the CPU, and not them."""
    from rollout_core.bucketing import cuda
    from rollout_core.bucketing.cuda import launching

    nothing: Callable[..., Any] = lambda *_, **__: None  # noqa: E731
    with (
        patch.object(cuda, "possible", lambda device: device.type == "cpu"),
        patch.object(launching, "usable", lambda device: True),
        patch.object(launching, "gather", nothing),
    ):
        yield


def _updates(source: Tensors, plan: BucketPlan, repeats: int) -> dict[str, Timing]:
    end, (other,) = local_carrier()
    target = DirectWeights(_tensors(4))
    packer = Packer(plan)

    def update(given: Callable[[], tuple[BucketPlan, Packer | None]]) -> Callable[[], None]:
        def run() -> None:
            worker = threading.Thread(target=receive, args=(other, target), kwargs={"timeout": _TIMEOUT})
            worker.start()
            made, kept = given()
            send(made, source, end, timeout=_TIMEOUT, packer=kept)
            worker.join()

        return run

    try:
        return measure(
            {
                "plan and packer made for it": update(lambda: (plan_buckets(specs_of(source), plan.capacity), None)),
                "kept": update(lambda: (plan, packer)),
            },
            repeats=repeats,
        )
    finally:
        end.close()
        other.close()
