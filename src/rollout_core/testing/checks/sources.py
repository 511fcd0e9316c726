"""B16: what tensors come from."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from typing import Any

import torch

from rollout_core.testing.cases import PackerCase
from rollout_core.testing.checks.base import content_of, packer_check, plain_cases, require_same
from rollout_core.testing.machines import SourceBroke
from rollout_core.testing.oracles import StorageRef, picture
from rollout_core.testing.packers import PackerUnderTest, Pairs, Raised, error_words
from rollout_core.testing.registry import Violation


def _script(source: str) -> str:
    return f"""
result = list(packer.unpack(list(packer.pack({source}, capacity))))
assert [(name, raw(t)) for name, t in result] == [(name, raw(t)) for name, t in named]
"""


@packer_check(
    "packer/B16-iterator", "an iterator works as a list does", cases=plain_cases(min_size=0), needs=["iterators"],
    script=_script("((name, tensor.clone()) for name, tensor in named)"),
)  # fmt: skip
def iterator(packer: PackerUnderTest, case: PackerCase) -> None:
    model = picture(case.make(packer.device))

    def source() -> Iterator[tuple[str, torch.Tensor]]:
        for place in range(len(case.tensors)):  # each is gone before the next is made, often in the same memory
            yield case.make(packer.device)[place]

    require_same(model, packer.unpack(packer.pack(source(), case.capacity)))


@packer_check(
    "packer/B16-mapping", "a mapping works as a list does", cases=plain_cases(min_size=0), needs=["mappings"],
    script=_script("dict(named)"),
)  # fmt: skip
def mapping(packer: PackerUnderTest, case: PackerCase) -> None:
    named = case.make(packer.device)
    model = picture(named)
    require_same(model, packer.unpack(packer.pack(dict(named), case.capacity)))


@packer_check(
    "packer/B16-module",
    "parameters and buffers of a module travel, those of its children and tied ones too",
    cases=plain_cases(),
    needs=["modules"],
    script="""
root, inner, expected = torch.nn.Module(), torch.nn.Module(), {}
root.add_module("inner", inner)
for place, (name, tensor) in enumerate(named):
    home, path = (root, name) if place % 3 else (inner, f"inner.{name}")
    expected[path] = raw(tensor)
    if place % 2:
        home.register_buffer(name, tensor)
    else:
        home.register_parameter(name, torch.nn.Parameter(tensor))
        root.register_parameter(f"{name}_tied", home.get_parameter(name))
        expected[f"{name}_tied"] = raw(tensor)
result = {name: raw(t) for name, t in packer.unpack(list(packer.pack(root, capacity)))}
assert result == expected, sorted(result.keys() ^ expected.keys())
""",
)  # fmt: skip
def module(packer: PackerUnderTest, case: PackerCase) -> None:
    root, inner = torch.nn.Module(), torch.nn.Module()
    root.add_module("inner", inner)
    expected = []
    for place, (name, tensor) in enumerate(case.make(packer.device)):
        home, path = (root, name) if place % 3 else (inner, f"inner.{name}")
        if place % 2:
            home.register_buffer(name, tensor)
        else:
            home.register_parameter(name, torch.nn.Parameter(tensor))
            root.register_parameter(f"{name}_tied", home.get_parameter(name))
            expected.append((f"{name}_tied", tensor))
        expected.append((path, tensor))
    result = packer.unpack(packer.pack(root, case.capacity))
    require_same(sorted(picture(expected)), sorted(result, key=lambda pair: pair[0]))


@packer_check(
    "packer/B16-async", "an async source works as a list does", cases=plain_cases(min_size=0), needs=["async"],
    script="""
import asyncio

async def source():
    for pair in named:
        await asyncio.sleep(0)
        yield pair

async def collect():
    return [bucket async for bucket in packer.apack(source(), capacity)]

result = list(packer.unpack(asyncio.run(collect())))
assert [(name, raw(t)) for name, t in result] == [(name, raw(t)) for name, t in named]
""",
)  # fmt: skip
def from_async(packer: PackerUnderTest, case: PackerCase) -> None:
    named = case.make(packer.device)
    model = picture(named)

    async def source() -> AsyncIterator[tuple[str, torch.Tensor]]:
        for pair in named:
            await asyncio.sleep(0)
            yield pair

    require_same(model, packer.unpack(packer.apack(source(), case.capacity)))


@packer_check(
    "packer/B16-async-error", "an error inside an async source reaches the caller unchanged", cases=plain_cases(places=1),
    needs=["async"],
    script="""
import asyncio

broken = RuntimeError("the source broke")
async def source():
    for pair in named[: {at}[0] % (len(named) + 1)]:
        yield pair
    raise broken

async def collect():
    return [bucket async for bucket in packer.apack(source(), capacity)]

try:
    asyncio.run(collect())
except Exception as error:
    assert error is broken, error
else:
    raise AssertionError("no error came")
""",
)  # fmt: skip
def error_in_async(packer: PackerUnderTest, case: PackerCase) -> None:
    named = case.make(packer.device)
    stop = case.at[0] % (len(named) + 1)
    broken = SourceBroke(f"after {stop} tensors")

    async def source() -> AsyncIterator[tuple[str, torch.Tensor]]:
        for pair in named[:stop]:
            yield pair
        raise broken

    try:
        came = packer.apack(source(), case.capacity)
    except Raised as raised:
        if raised.error is not broken:
            raise Violation(f"the source raised SourceBroke, and what came was {error_words(raised.error)}") from raised
    else:
        raise Violation(f"the source raised after {stop} of {len(named)} tensors, and no error came: {len(came)} buckets did")


@packer_check(
    "packer/B16-error", "an error inside the source reaches the caller unchanged, and no partial bucket comes before it",
    cases=plain_cases(places=1), needs=["iterators"],
    script="""
broken = RuntimeError("the source broke")
def source():
    yield from named[: {at}[0] % (len(named) + 1)]
    raise broken

whole = list(packer.pack(iter(named), capacity))
came = []
try:
    for bucket in packer.pack(source(), capacity):
        came.append(bucket)
except Exception as error:
    assert error is broken, error
else:
    raise AssertionError("no error came")
assert len(came) < len(whole) or {at}[0] % (len(named) + 1) == len(named), "more buckets came than were full"
""",
)  # fmt: skip
def error_in_source(packer: PackerUnderTest, case: PackerCase) -> None:
    named = case.make(packer.device)
    stop = case.at[0] % (len(named) + 1)
    broken = SourceBroke(f"after {stop} tensors")

    def source() -> Iterator[tuple[str, torch.Tensor]]:
        yield from named[:stop]
        raise broken

    whole = [content_of(packer, bucket) for bucket in packer.pack(iter(named), case.capacity)]
    came: list[Any] = []
    try:
        for bucket in packer.pack_lazily(source(), case.capacity):
            came.append(content_of(packer, bucket))
    except Exception as error:
        found = error.error if isinstance(error, Raised) else error
        if found is not broken:
            raise Violation(f"the source raised SourceBroke, and what came was {error_words(found)}") from error
    else:
        raise Violation(f"the source raised after {stop} of {len(named)} tensors, and no error came: {len(came)} buckets did")
    for index, content in enumerate(came):
        if index >= len(whole) or content != whole[index]:
            raise Violation(
                f"the source raised after {stop} of {len(named)} tensors, and before that came a partial bucket {index}"
            )


@packer_check(
    "packer/B16-close", "closing early closes the source and lets go of its tensors", cases=plain_cases(min_size=2),
    needs=["iterators"],
    script="""
from torch.multiprocessing.reductions import StorageWeakRef

closed, refs = [], [StorageWeakRef(tensor.untyped_storage()) for _, tensor in named]

def source():
    try:
        while named:
            yield named.pop(0)
    finally:
        named.clear()
        closed.append(True)

buckets = packer.pack(source(), capacity)
bucket = next(iter(buckets))
del bucket
buckets.close()
del buckets
assert closed, "the source is still open"
assert all(ref.expired() for ref in refs), "source tensors are still held"
""",
)  # fmt: skip
def closed_early(packer: PackerUnderTest, case: PackerCase) -> None:
    open_sources = 0
    refs: list[StorageRef] = []

    def source() -> Iterator[tuple[str, torch.Tensor]]:
        nonlocal open_sources
        open_sources += 1
        try:
            pairs: Pairs = case.make(packer.device)
            refs.extend(StorageRef(tensor) for _, tensor in pairs)
            while pairs:
                yield pairs.pop(0)
        finally:
            open_sources -= 1

    buckets = packer.pack_lazily(source(), case.capacity)
    next(buckets, None)
    if not buckets.can_close:
        raise Violation(f"pack gave {buckets.kind}, which cannot be closed")
    buckets.close()
    if open_sources:
        raise Violation("the buckets were closed after the first, and the source was not")
    del buckets
    alive = sum(ref.is_alive() for ref in refs)
    if alive:
        raise Violation(f"the buckets were closed after the first, and {alive} of {len(refs)} source tensors are still held")
