"""B8: who owns which memory."""

from __future__ import annotations

from hypothesis import strategies as st

from rollout_core.testing.cases import PackerCase
from rollout_core.testing.checks.base import buckets_of, overwrite, packer_check, plain, plain_cases
from rollout_core.testing.machines import flip_bytes, programs, run_program
from rollout_core.testing.oracles import difference, picture
from rollout_core.testing.packers import PackerUnderTest, bucket_tensors
from rollout_core.testing.registry import Skipped, Violation
from rollout_core.testing.strategies import packer_cases


@packer_check(
    "packer/B8-sources",
    "writing to a source tensor after packing changes nothing",
    cases=plain_cases(),
    script="""
before = [raw(t) for _, t in named]
buckets = list(packer.pack(named, capacity))
for _, tensor in named:
    tensor.view(torch.uint8).bitwise_xor_(255)  # the next training step
assert [raw(t) for _, t in packer.unpack(buckets)] == before
""",
)
def sources(packer: PackerUnderTest, case: PackerCase) -> None:
    named = case.make(packer.device)
    model = picture(named)
    buckets = packer.pack(named, case.capacity)
    overwrite([tensor for _, tensor in named])
    problem = difference(model, picture(packer.unpack(buckets)))
    if problem is not None:
        raise Violation(f"the source was overwritten after packing, and {problem}")


@packer_check(
    "packer/B8-independent",
    "writing to one unpacked tensor changes no other, and no source",
    cases=plain_cases(min_size=2),
    script="""
result = list(packer.unpack(list(packer.pack(named, capacity))))
for place, (name, tensor) in enumerate(result):
    before = [raw(t) for _, t in named + result[:place] + result[place + 1 :]]
    tensor.view(torch.uint8).bitwise_xor_(255)
    assert [raw(t) for _, t in named + result[:place] + result[place + 1 :]] == before, name
""",
)
def independent(packer: PackerUnderTest, case: PackerCase) -> None:
    named = case.make(packer.device)
    result = packer.unpack(packer.pack(named, case.capacity))
    for place, (name, tensor) in enumerate(result):
        others = [*((f"source {n}", t) for n, t in named), *result[:place], *result[place + 1 :]]
        before = picture(others)
        flip_bytes(tensor)
        problem = difference(before, picture(others))
        if problem is not None:
            raise Violation(f"writing to {name!r} changed another: {problem}")


@packer_check(
    "packer/B8-retained",
    "nothing that is handed out keeps a storage alive that is larger than what it carries",
    cases=packer_cases(tensors=plain(max_size=3, layouts=st.sampled_from(["contiguous", "sliced", "detached slice"]))),
    script="""
def storage(tensor):
    return tensor.untyped_storage().nbytes()
for bucket in packer.pack(named, capacity):
    if isinstance(bucket, list):  # of (name, tensor)
        for name, tensor in bucket:
            assert storage(tensor) <= tensor.numel() * tensor.element_size(), (name, storage(tensor))
total = sum(t.numel() * t.element_size() for _, t in named)
for name, tensor in packer.unpack(list(packer.pack(named, capacity))):
    assert storage(tensor) <= total, (name, storage(tensor), total)
""",
)
def retained(packer: PackerUnderTest, case: PackerCase) -> None:
    buckets = buckets_of(packer, case)
    for index, bucket in enumerate(buckets):
        for tensor in bucket_tensors(bucket) or []:
            held, carried = tensor.untyped_storage().nbytes(), tensor.numel() * tensor.dtype.itemsize
            if held > carried:
                raise Violation(f"bucket {index} keeps a storage of {held} bytes for a tensor of {carried}")
    try:
        largest = max([packer.nbytes(bucket) for bucket in buckets], default=0)
    except Skipped:
        largest = sum(tensor.nbytes for tensor in case.tensors)
    for name, tensor in packer.unpack(buckets):
        held = tensor.untyped_storage().nbytes()
        if held > max(largest, tensor.numel() * tensor.dtype.itemsize):
            raise Violation(f"{name!r} keeps a storage of {held} bytes, and the largest bucket has {largest}")


@packer_check(
    "packer/B8-rounds",
    "buckets and results of one round stay what they are through later rounds, changed sources, errors and early ends",
    cases=programs(),
    script="""
for _ in range(4):  # a buffer that is used again too early shows in a later round
    kept = []
    for shift in range(3):
        model = [raw(t) for _, t in named]
        kept.append((model, list(packer.pack(named, capacity))))
        named = [(name, tensor.clone().view(torch.uint8).add(shift + 1).view(tensor.dtype)) for name, tensor in named]
    for model, buckets in kept:
        assert [raw(t) for _, t in packer.unpack(buckets)] == model
""",
)
def rounds(packer: PackerUnderTest, case: PackerCase) -> None:
    run_program(packer, case)
