"""B15: how much is held, and how far ahead a source is read."""

from __future__ import annotations

import weakref
from collections.abc import Iterator

import torch
from hypothesis import strategies as st

from rollout_core.testing.cases import PackerCase
from rollout_core.testing.checks.base import NBYTES, packer_check, plain, plain_cases
from rollout_core.testing.oracles import live_tensor_bytes
from rollout_core.testing.packers import PackerUnderTest
from rollout_core.testing.registry import Skipped, Violation
from rollout_core.testing.strategies import packer_cases

#: Many tensors of about one size, so that reading further ahead than a bucket shows.
_MANY = packer_cases(tensors=plain(min_size=4, max_size=12, shapes=st.sampled_from([(1,), (2,), (3,)])))
_ROUNDS = 6


@packer_check(
    "packer/B15-lookahead",
    "from an iterator no more is taken than the bucket under way and the next tensor",
    cases=_MANY,
    needs=["iterators"],
    script=NBYTES
    + """
import weakref

sizes = {name: t.numel() * t.element_size() for name, t in named}
largest = max(sizes.values())
taken, alive = [], []

def source():
    while named:
        name, tensor = named.pop(0)
        taken.append(name)
        alive.append(weakref.ref(tensor))
        held = sum(sizes[name] for name, ref in zip(taken, alive) if ref() is not None)
        assert held <= capacity + 2 * largest, (held, capacity, largest)
        pair = (name, tensor)
        del tensor
        yield pair
        del pair

given = 0
for index, bucket in enumerate(packer.pack(source(), capacity)):
    given += max(capacity, nbytes(bucket))
    assert sum(sizes[name] for name in taken) <= given + capacity + largest, (index, taken)
""",
)
def lookahead(packer: PackerUnderTest, case: PackerCase) -> None:
    largest = max(tensor.nbytes for tensor in case.tensors)
    taken = 0
    alive: list[weakref.ref[torch.Tensor]] = []

    def source() -> Iterator[tuple[str, torch.Tensor]]:
        nonlocal taken
        for place in range(len(case.tensors)):
            name, tensor = case.make(packer.device)[place]
            taken += case.tensors[place].nbytes
            alive.append(weakref.ref(tensor))
            held = sum(t.nbytes for t, ref in zip(case.tensors, alive, strict=False) if ref() is not None)
            if held > case.capacity + 2 * largest:
                raise _TooMuch(f"{held} bytes of source tensors are held at once (capacity: {case.capacity}, largest: {largest})")
            pair = (name, tensor)
            del tensor
            yield pair
            del pair

    given = 0  # bytes that the buckets so far may have carried
    try:
        for index, bucket in enumerate(packer.pack_lazily(source(), case.capacity)):
            given += max(case.capacity, _nbytes(packer, bucket))
            if taken > given + case.capacity + largest:
                raise Violation(
                    f"{taken} bytes were taken from the source when bucket {index} came (capacity: {case.capacity}, "
                    f"model: at most {given + case.capacity + largest})"
                )
            del bucket
    except _TooMuch as error:
        raise Violation(str(error)) from error


class _TooMuch(Exception):
    pass


def _nbytes(packer: PackerUnderTest, bucket: object) -> int:
    try:
        return packer.nbytes(bucket)
    except Skipped:
        return 0


@packer_check(
    "packer/B15-rounds",
    "many rounds use the memory of one",
    cases=plain_cases(max_size=3),
    cost=5,
    script="""
import gc

def live():
    gc.collect()
    tensors = [x for x in gc.get_objects() if type(x) is torch.Tensor]
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())

for number in range(9):
    packer.unpack(list(packer.pack(named, capacity)))
    if number == 2:
        before = live()
assert live() - before <= sum(t.numel() * t.element_size() for _, t in named), (before, live())
""",
)
def many_rounds(packer: PackerUnderTest, case: PackerCase) -> None:
    def one_round() -> None:
        packer.unpack(packer.pack(case.make(packer.device), case.capacity))

    for _warm_up in range(2):
        one_round()
    before = live_tensor_bytes()
    for _round in range(_ROUNDS):
        one_round()
    grown = live_tensor_bytes() - before
    total = sum(tensor.nbytes for tensor in case.tensors)
    if grown > total:
        raise Violation(f"{_ROUNDS} rounds of {total} bytes left {grown} bytes of tensors alive (model: no more than after one)")
