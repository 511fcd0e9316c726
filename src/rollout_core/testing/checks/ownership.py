"""B8: who owns which memory."""

from __future__ import annotations

from hypothesis import strategies as st

from rollout_core.testing.cases import PackerCase
from rollout_core.testing.checks.base import NBYTES, buckets_of, content_of, overwrite, packer_check, plain, plain_cases
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
    "packer/B8-complete",
    "a bucket is complete when it is handed out, and stays as it is while the next ones are made",
    cases=plain_cases(min_size=2),
    script="""
def content(bucket):
    if hasattr(packer, "buffer"):
        return packer.buffer(bucket).tolist()
    pairs = bucket.items() if isinstance(bucket, dict) else bucket
    return [(name, raw(t)) for name, t in pairs]

came = [(bucket, content(bucket)) for bucket in packer.pack(named, capacity)]
for index, (bucket, before) in enumerate(came):
    assert content(bucket) == before, index
""",
)
def complete(packer: PackerUnderTest, case: PackerCase) -> None:
    came = [(bucket, content_of(packer, bucket)) for bucket in packer.pack_lazily(case.make(packer.device), case.capacity)]
    for index, (bucket, before) in enumerate(came):
        if content_of(packer, bucket) != before:
            raise Violation(f"bucket {index} of {len(came)} is not what it was when it was handed out")


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
    script=NBYTES
    + """
def storage(tensor):
    return tensor.untyped_storage().nbytes()
for bucket in packer.pack(named, capacity):
    if isinstance(bucket, list):  # of (name, tensor)
        for name, tensor in bucket:
            assert storage(tensor) <= tensor.numel() * tensor.element_size(), (name, storage(tensor))
        continue
    if hasattr(packer, "buffer"):
        assert storage(packer.buffer(bucket)) <= max(len(packer.buffer(bucket)), capacity), storage(packer.buffer(bucket))
buckets = list(packer.pack(named, capacity))
largest = max(map(nbytes, buckets), default=0)
for name, tensor in packer.unpack(buckets):
    assert storage(tensor) <= max(largest, tensor.numel() * tensor.element_size()), (name, storage(tensor), largest)
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
    if "buffer" in packer.capabilities:
        for index, bucket in enumerate(buckets):
            held, carried = packer.buffer(bucket).untyped_storage().nbytes(), packer.buffer(bucket).numel()
            if held > max(carried, case.capacity):
                raise Violation(f"bucket {index} keeps a storage of {held} bytes for a buffer of {carried}")
    for name, tensor in packer.unpack(buckets):
        held = tensor.untyped_storage().nbytes()
        if held > max(largest, tensor.numel() * tensor.dtype.itemsize):
            raise Violation(f"{name!r} keeps a storage of {held} bytes, and the largest bucket has {largest}")


@packer_check(
    "packer/B8-rounds",
    "buckets and results of one round stay what they are through later rounds, changed sources, errors and early ends",
    cases=programs(),
    script="""
steps = {steps}
sources = [named, *([(n, (t.view(torch.uint8) ^ 15 * i).view(t.dtype)) for n, t in named] for i in (1, 2))]
rounds, results = [], []
picture = lambda pairs: [(name, raw(t)) for name, t in pairs]
flip = lambda pairs: [t.view(torch.uint8).bitwise_xor_(255) for _, t in pairs]

def broken(stop):
    yield from sources[0][:stop]
    raise KeyError("the source broke")

for operation, number in steps:
    source = sources[number % 3]
    if operation == "pack":
        rounds.append((picture(source), list(packer.pack(source, capacity))))
    elif operation == "unpack" and rounds:
        model, buckets = rounds[number % len(rounds)]
        results.append((model, packer.unpack(buckets), buckets))
        assert picture(results[-1][1]) == model, (operation, number)
    elif operation == "change":
        flip(source)
    elif operation == "spoil" and results:
        before, (_, pairs, spoiled) = [picture(s) for s in sources], results.pop(number % len(results))
        flip(pairs)
        assert [picture(s) for s in sources] == before, (operation, number)
        results = [r for r in results if r[2] is not spoiled]
        rounds = [r for r in rounds if r[1] is not spoiled]
    elif operation == "drop" and rounds:
        del rounds[number % len(rounds)]
    elif operation == "forget" and results:
        del results[number % len(results)]
    elif operation == "fail" and "iterators" in getattr(packer, "capabilities", ()):
        try:
            list(packer.pack(broken(number % (len(named) + 1)), capacity))
            raise AssertionError("the source's error did not come")
        except KeyError:
            pass
    elif operation == "stop" and "iterators" in getattr(packer, "capabilities", ()):
        buckets = iter(packer.pack(iter(source), capacity))
        next(buckets, None)
        buckets.close()
    assert all(picture(pairs) == model for model, pairs, _ in results), (operation, number)
assert all(picture(packer.unpack(buckets)) == model for model, buckets in rounds), "at the end"
""",
)
def rounds(packer: PackerUnderTest, case: PackerCase) -> None:
    run_program(packer, case)
