"""B2, B3, B4 and B6: sizes, places, and that they depend on nothing else."""

from __future__ import annotations

import contextlib
import os
import random
from collections.abc import Iterator
from unittest import mock

from hypothesis import strategies as st

from rollout_core.testing import invariants
from rollout_core.testing.cases import PackerCase
from rollout_core.testing.checks.base import (
    MIXED_DTYPES,
    NBYTES,
    ROUND_TRIP,
    SHAPES,
    buckets_of,
    packer_check,
    plain_cases,
    require_none,
    require_same,
    rounded,
)
from rollout_core.testing.oracles import picture
from rollout_core.testing.packers import PackerUnderTest, Raised
from rollout_core.testing.registry import Skipped, Violation
from rollout_core.testing.strategies import packer_cases, tensor_cases

_MIXED = packer_cases(tensors=tensor_cases(min_size=2, max_size=5, shapes=SHAPES, dtypes=MIXED_DTYPES))


@packer_check(
    "packer/B2-capacity",
    "no bucket is larger than the capacity when every tensor fits it, padding included",
    cases=st.one_of(plain_cases(), _MIXED),
    script=NBYTES + "\nassert all(nbytes(bucket) <= capacity for bucket in packer.pack(named, capacity))\n",
)
def capacity(packer: PackerUnderTest, case: PackerCase) -> None:
    most = rounded(packer, case.capacity)
    sizes = [packer.nbytes(bucket) for bucket in packer.pack(case.make(packer.device), most)]
    require_none(invariants.within_capacity(sizes, most))


@packer_check(
    "packer/B2-oversize",
    "a tensor larger than the capacity is split, gets a bucket of its own, or is refused, as declared; it is never lost or changed",
    cases=plain_cases(oversize=True),
    script=ROUND_TRIP
    + NBYTES
    + """
policies = {"oversize=split", "oversize=error"} & set(getattr(packer, "capabilities", ()))
assert policies != {"oversize=error"}, "a tensor over the capacity was not refused"
sizes = [nbytes(bucket) for bucket in packer.pack(named, capacity)]
beyond = sorted(size for size in sizes if size > capacity)
larger = sorted(t.numel() * t.element_size() for _, t in named if t.numel() * t.element_size() > capacity)
assert not beyond or (not policies and beyond <= larger and len(beyond) <= len(larger)), (sizes, larger)
""",
)
def oversize(packer: PackerUnderTest, case: PackerCase) -> None:
    named = case.make(packer.device)
    model = picture(named)
    largest = max(case.tensors, key=lambda tensor: tensor.nbytes)
    most = rounded(packer, case.capacity)
    if largest.nbytes <= most:
        return
    declared = {claim.partition("=")[2] for claim in packer.capabilities if claim.startswith("oversize=")}
    try:
        buckets = packer.pack(named, most)
    except Raised as raised:
        if declared and "error" not in declared:
            raise Violation(f"{largest} has {largest.nbytes} bytes, and {raised} (declared: {_policies(declared)})") from raised
        return
    if declared == {"error"}:
        raise Violation(f"{largest} has {largest.nbytes} bytes, and was not refused (declared: error)")
    require_same(model, packer.unpack(buckets))
    try:
        sizes = [packer.nbytes(bucket) for bucket in buckets]
    except Skipped:
        return
    if declared == {"split"}:
        require_none(invariants.within_capacity(sizes, most))
    allowed = sorted((rounded(packer, t.nbytes) for t in case.tensors if t.nbytes > most), reverse=True)
    # What a bucket may have beyond its capacity is one tensor that is larger, and nothing beside it.
    beyond = sorted((size for size in sizes if size > most), reverse=True)
    if beyond > allowed or len(beyond) > len(allowed):
        raise Violation(f"buckets of {beyond} bytes are over the capacity, and the tensors over it have {allowed} bytes")


def _policies(declared: set[str]) -> str:
    return ", ".join(sorted(declared)) or "nothing"


_SLOTS_SCRIPT = """
dtypes = {name: tensor.dtype for name, tensor in named}
if hasattr(packer, "slots"):
    for bucket in packer.pack(named, capacity):
        for name, offset, nbytes in packer.slots(bucket):
            step = max(dtypes[name].itemsize, getattr(packer, "align", 1))
            assert offset % step == 0, (name, dtypes[name], offset)
"""


@packer_check(
    "packer/B3-alignment",
    "every slot begins at a multiple of its dtype's itemsize, after any sequence of dtypes and sizes",
    cases=_MIXED,
    script=_SLOTS_SCRIPT + ROUND_TRIP,
)
def alignment(packer: PackerUnderTest, case: PackerCase) -> None:
    named = case.make(packer.device)
    model = picture(named)
    buckets = packer.pack(named, case.capacity)
    if "slots" in packer.capabilities:
        by_name = {tensor.name: tensor for tensor in case.tensors}
        problem = invariants.aligned([packer.slots(bucket) for bucket in buckets], by_name, packer.align)
        if problem is not None:
            try:
                packer.unpack(buckets)
            except Raised as raised:
                problem += f"; {raised}"
            raise Violation(problem)
    require_same(model, packer.unpack(buckets))


@packer_check(
    "packer/B3-views",
    "an unpacked tensor is a view of its bucket's buffer",
    cases=_MIXED,
    needs=["views", "buffer"],
    script="""
buckets = list(packer.pack(named, capacity))
homes = {packer.buffer(bucket).untyped_storage().data_ptr() for bucket in buckets}
for name, tensor in packer.unpack(buckets):
    assert tensor.untyped_storage().data_ptr() in homes, name
""",
)
def views(packer: PackerUnderTest, case: PackerCase) -> None:
    buckets = buckets_of(packer, case)
    homes = {packer.buffer(bucket).untyped_storage().data_ptr() for bucket in buckets}
    try:
        result = packer.unpack(buckets)
    except Raised:
        return  # what cannot be unpacked at all is for B3-alignment to say
    for name, tensor in result:
        if tensor.numel() and tensor.untyped_storage().data_ptr() not in homes:
            raise Violation(f"{name!r} lies in memory of its own, not in a bucket's buffer")


@packer_check("packer/B4-disjoint", "no two slots share a byte", cases=_MIXED, needs=["slots"], script="""
for bucket in packer.pack(named, capacity):
    end = 0
    for name, offset, nbytes in sorted(packer.slots(bucket), key=lambda slot: slot[1:]):
        assert not nbytes or offset >= end, (name, offset, end)
        end = max(end, offset + nbytes)
""")  # fmt: skip
def disjoint(packer: PackerUnderTest, case: PackerCase) -> None:
    require_none(invariants.disjoint([packer.slots(bucket) for bucket in packer.pack(case.make(packer.device), case.capacity)]))


@packer_check("packer/B4-bounds", "every slot lies within its bucket", cases=_MIXED, needs=["slots"], script=NBYTES + """
for bucket in packer.pack(named, capacity):
    for name, offset, length in packer.slots(bucket):
        assert 0 <= offset and offset + length <= nbytes(bucket), (name, offset, length, nbytes(bucket))
""")  # fmt: skip
def bounds(packer: PackerUnderTest, case: PackerCase) -> None:
    buckets = packer.pack(case.make(packer.device), case.capacity)
    require_none(invariants.in_bounds([packer.slots(b) for b in buckets], [packer.nbytes(b) for b in buckets]))


@packer_check(
    "packer/B4-cover",
    "slots and the padding that alignment asks for cover a bucket exactly: what travels is what is needed",
    cases=_MIXED,
    needs=["slots"],
    script=NBYTES + """
align = max([getattr(packer, "align", 1), *(t.element_size() for _, t in named)])
for bucket in packer.pack(named, capacity):
    end = max([offset + length for _, offset, length in packer.slots(bucket)], default=0)
    assert nbytes(bucket) - end < align, (nbytes(bucket), end)
""",
)  # fmt: skip
def cover(packer: PackerUnderTest, case: PackerCase) -> None:
    buckets = packer.pack(case.make(packer.device), case.capacity)
    align = max([packer.align, *(tensor.torch_dtype.itemsize for tensor in case.tensors)])
    require_none(invariants.covered([packer.slots(b) for b in buckets], [packer.nbytes(b) for b in buckets], align))


@packer_check(
    "packer/B4-padding",
    "padding is zero, also in memory that was used before",
    cases=_MIXED,
    needs=["slots", "buffer"],
    script="""
for _ in range(3):  # later rounds may use memory again
    for bucket in packer.pack(named, capacity):
        rest = packer.buffer(bucket).clone()
        for name, offset, length in packer.slots(bucket):
            rest[offset : offset + length] = 0
        assert not rest.any(), rest.tolist()
        packer.buffer(bucket).fill_(0xA5)
    del bucket
""",
)
def padding(packer: PackerUnderTest, case: PackerCase) -> None:
    for _round in range(3):
        buckets = packer.pack(case.make(packer.device), case.capacity)
        for index, bucket in enumerate(buckets):
            require_none(invariants.zero_padding(index, packer.buffer(bucket), packer.slots(bucket)))
        for bucket in buckets:
            packer.buffer(bucket).fill_(0xA5)
        del buckets
        if case.tensors:
            del bucket


_TWICE = """
def layout(named=named):
    buckets = list(packer.pack(named, capacity))
    if hasattr(packer, "slots"):
        return [packer.slots(bucket) for bucket in buckets]
    return [[name for name, _ in packer.unpack([bucket])] for bucket in buckets]
"""


@packer_check(
    "packer/B6-repeat",
    "packing the same again gives the same layout",
    cases=plain_cases(),
    script=_TWICE
    + """
others = [(name, (tensor.view(torch.uint8) ^ 85).view(tensor.dtype)) for name, tensor in named]
assert layout() == layout(others)
""",
)
def repeat(packer: PackerUnderTest, case: PackerCase) -> None:
    first = _layout(packer, case, seed=1)
    second = _layout(packer, case, seed=2)  # other values: the layout depends on the specs alone
    if first != second:
        raise Violation(f"the same specs were laid out in two ways (first: {first}, then: {second})")


@packer_check(
    "packer/B6-environment",
    "the layout does not depend on free memory, rank, environment variables or the random state",
    cases=plain_cases(),
    script=_TWICE + """
import os
from unittest import mock

from hypothesis import strategies as st

import random

def elsewhere(rank, free):
    random.seed(rank)
    os.environ.update({"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": "8", "CUDA_VISIBLE_DEVICES": rank})
    with mock.patch("torch.cuda.mem_get_info", return_value=(free, 80 << 30)):
        with mock.patch("torch.cuda.memory_allocated", return_value=(80 << 30) - free):
            return layout()

first = elsewhere("0", 79 << 30)
assert elsewhere("7", 1 << 20) == first
""",
)  # fmt: skip
def environment(packer: PackerUnderTest, case: PackerCase) -> None:
    layouts = {}
    for words, free, rank in (("rank 0, much free memory", 79 << 30, "0"), ("rank 7, little free memory", 1 << 20, "7")):
        with _elsewhere(free, rank):
            layouts[words] = _layout(packer, case, seed=1)
    if len(set(layouts.values())) > 1:
        raise Violation("the layout depends on where it is made (" + "; ".join(f"{w}: {x}" for w, x in layouts.items()) + ")")


@packer_check(
    "packer/B6-hash-order",
    "two processes lay the same specs out alike, whatever their hash seeds",
    cases=plain_cases(min_size=2),
    script=_TWICE + """
import subprocess, sys

if len(sys.argv) > 1:  # the other process
    print(layout())
else:
    both = []
    for seed in ("1", "2"):
        env = {"PYTHONPATH": ":".join(sys.path), "PYTHONHASHSEED": seed}
        both.append(subprocess.run([sys.executable, __file__, "x"], env=env, capture_output=True, check=True).stdout)
    assert both[0] == both[1], both
""",
    twins=True,
    cost=2,
)  # fmt: skip
def hash_order(packer: PackerUnderTest, case: PackerCase) -> str:
    return _layout(packer, case, seed=1)


def _layout(packer: PackerUnderTest, case: PackerCase, *, seed: int) -> str:
    """All that can be seen of a layout, as text."""
    buckets = packer.pack(case.make(packer.device, seed=seed), case.capacity)
    if "slots" in packer.capabilities:
        return str([packer.slots(bucket) for bucket in buckets])
    with contextlib.suppress(Skipped):
        return str([packer.nbytes(bucket) for bucket in buckets])
    return f"{len(buckets)} buckets"


@contextlib.contextmanager
def _elsewhere(free: int, rank: str) -> Iterator[None]:
    """This process as it would look on another rank, with so much free device memory."""
    variables = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": "8", "CUDA_VISIBLE_DEVICES": rank}
    state = random.getstate()
    random.seed(rank)
    try:
        with (
            mock.patch.dict(os.environ, variables),
            mock.patch("torch.cuda.mem_get_info", return_value=(free, 80 << 30)),
            mock.patch("torch.cuda.memory_allocated", return_value=(80 << 30) - free),
        ):
            yield
    finally:
        random.setstate(state)
