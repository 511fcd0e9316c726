"""B15: how much is held, and how far ahead a source is read."""

from __future__ import annotations

import tracemalloc
from collections.abc import Iterator

import torch
from hypothesis import strategies as st

from rollout_core.testing.cases import PackerCase
from rollout_core.testing.checks.base import NBYTES, packer_check, plain, plain_cases
from rollout_core.testing.oracles import StorageRef, live_tensor_bytes
from rollout_core.testing.packers import PackerUnderTest, Raised
from rollout_core.testing.registry import Skipped, Violation
from rollout_core.testing.strategies import packer_cases

#: Many tensors of about one size, so that reading further ahead than a bucket shows.
_MANY = packer_cases(tensors=plain(min_size=4, max_size=12, shapes=st.sampled_from([(1,), (2,), (3,)])))
_ROUNDS = 6
_LARGE = 1 << 14  # elements: beside it what Python keeps for itself is small


@packer_check(
    "packer/B15-lookahead",
    "from an iterator no more is taken than the bucket under way and the next tensor",
    cases=_MANY,
    needs=["iterators"],
    script=NBYTES
    + """
from torch.multiprocessing.reductions import StorageWeakRef

sizes = {name: t.numel() * t.element_size() for name, t in named}
largest = max(sizes.values())
taken, alive = [], []

def source():
    while named:
        name, tensor = named.pop(0)
        taken.append(name)
        alive.append(StorageWeakRef(tensor.untyped_storage()))
        held = sum(sizes[name] for name, ref in zip(taken, alive) if not ref.expired())
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
    alive: list[StorageRef] = []  # of storages: whoever keeps another tensor of one keeps its memory

    def source() -> Iterator[tuple[str, torch.Tensor]]:
        nonlocal taken
        for place in range(len(case.tensors)):
            name, tensor = case.make(packer.device)[place]
            taken += case.tensors[place].nbytes
            alive.append(StorageRef(tensor))
            held = sum(t.nbytes for t, ref in zip(case.tensors, alive, strict=False) if ref.is_alive())
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
    except Raised as raised:
        if isinstance(raised.error, _TooMuch):
            raise Violation(str(raised.error)) from raised
        raise


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
    cases=plain_cases(max_size=3, shapes=st.just((_LARGE,))),
    cost=10,
    script="""
import gc, tracemalloc

def live():
    gc.collect()
    tensors = [x for x in gc.get_objects() if type(x) is torch.Tensor]
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values()) + tracemalloc.get_traced_memory()[0]

tracemalloc.start()
for number in range(12):
    new = [(name, tensor.clone()) for name, tensor in named]
    packer.unpack(list(packer.pack(new, capacity)))
    del new
    if number == 5:
        before = live()
assert live() - before <= 3 * sum(t.numel() * t.element_size() for _, t in named), (before, live())
""",
)
def many_rounds(packer: PackerUnderTest, case: PackerCase) -> None:
    def one_round() -> None:
        packer.unpack(packer.pack(case.make(packer.device), case.capacity))

    def live() -> int:
        return live_tensor_bytes() + tracemalloc.get_traced_memory()[0]

    tracemalloc.start()  # for what is kept as bytes
    try:
        for _warm_up in range(_ROUNDS):  # a pool may fill up
            one_round()
        before = live()
        for _round in range(_ROUNDS):
            one_round()
        grown = live() - before
    finally:
        tracemalloc.stop()
    total = sum(tensor.nbytes for tensor in case.tensors)
    if grown > total * _ROUNDS // 2:  # Python and torch keep a little for themselves
        raise Violation(f"{_ROUNDS} rounds of {total} bytes left {grown // total} times as much behind (model: no more than one)")
