"""Feed BucketPlan.from_bytes hostile bytes: nothing but ManifestError may come out, and memory stays within its stated bound.

python tests/fuzz/fuzz_manifest.py --count 10000000 --seed 0
"""

from __future__ import annotations

import argparse
import random
import resource
import sys
import time
import tracemalloc
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
import torch

from rollout_core.bucketing import BucketPlan, Packer, TensorSpec, Unpacker, plan_buckets
from rollout_core.errors import ManifestError
from support.manifests import body_fields, damage, example

MAX_TENSORS, MAX_NBYTES = 1 << 10, 1 << 16
BOUND = 10 * MAX_NBYTES + 1024 * MAX_TENSORS
TRACED_SHARE = 64  # tracing allocations is slow, so one input in this many is run again with tracing


def inputs(count: int, seed: int) -> Iterator[bytes]:
    rng = random.Random(seed)
    seeds = [example(), plan_buckets(example().specs, 300, order="packed", align=8), plan_buckets([], 1)]
    corpus = [(good, body_fields(good)) for good in (plan.to_bytes() for plan in seeds)]
    for _ in range(count):
        yield damage(rng, *rng.choice(corpus))


def run(count: int, seed: int) -> int:
    """Feed ``count`` inputs. Returns how many were refused with ManifestError; raises whatever else comes out."""
    refused = 0
    for data in inputs(count, seed):
        try:
            plan = BucketPlan.from_bytes(data, max_tensors=MAX_TENSORS, max_nbytes=MAX_NBYTES)
        except ManifestError:
            refused += 1
        else:
            check_usable(plan)
    return refused


def peak_nbytes(count: int, seed: int) -> int:
    """The most bytes that one call allocated."""
    peak = 0
    tracemalloc.start()
    for data in inputs(count, seed):
        tracemalloc.reset_peak()
        before = tracemalloc.get_traced_memory()[0]
        with suppress(ManifestError):
            BucketPlan.from_bytes(data, max_tensors=MAX_TENSORS, max_nbytes=MAX_NBYTES)
        peak = max(peak, tracemalloc.get_traced_memory()[1] - before)
    tracemalloc.stop()
    return peak


def check_usable(plan: BucketPlan) -> None:
    """What was accepted is a plan: it encodes to itself, and its slots are disjoint, aligned and complete."""
    assert BucketPlan.from_bytes(plan.to_bytes()) == plan
    covered: dict[str, int] = {}
    for layout in plan.buckets:
        end = 0
        for slot in layout.slots:
            assert slot.offset >= end
            assert slot.offset % slot.spec.dtype.itemsize == 0
            assert slot.nbytes >= 0
            assert slot.start == covered.get(slot.name, 0)
            covered[slot.name] = slot.start + slot.nbytes
            end = slot.offset + slot.nbytes
        assert end == layout.nbytes
    assert covered == {spec.name: spec.nbytes for spec in plan.specs if spec.alias_of is None}
    Packer(plan), Unpacker(plan)


def seconds_to_decode(count: int) -> float:
    """Best of five for a plan of ``count`` tensors whose names differ in their last character only."""
    specs = [TensorSpec("n" * 30 + chr(0x4E00 + i), torch.uint8, (i % 7,)) for i in range(count)]
    data = plan_buckets(specs, 64).to_bytes()
    best = []
    for _ in range(5):
        start = time.perf_counter()
        BucketPlan.from_bytes(data)
        best.append(time.perf_counter() - start)
    return min(best)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--count", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    run(1000, arguments.seed)  # imports and caches, before memory is measured
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start = time.perf_counter()
    refused = run(arguments.count, arguments.seed)
    seconds = time.perf_counter() - start
    growth = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    peak = peak_nbytes(arguments.count // TRACED_SHARE, arguments.seed)
    print(f"inputs: {arguments.count}, seed {arguments.seed}, {seconds:.0f} s, {1e6 * seconds / arguments.count:.1f} us each")
    print(f"refused with ManifestError: {refused}, accepted as valid plans: {arguments.count - refused}, other exceptions: 0")
    print(f"peak of one call: {peak} bytes of {BOUND} allowed; the process grew by {growth} bytes over the run")
    small, large = seconds_to_decode(1_500), seconds_to_decode(15_000)
    print(f"time: 10 times the tensors take {large / small:.1f} times as long ({1e3 * small:.1f} ms, {1e3 * large:.1f} ms)")
    if peak > BOUND:
        raise SystemExit("memory exceeded the stated bound")


if __name__ == "__main__":
    main()
