"""B16: what tensors come from."""

from __future__ import annotations

import asyncio
import weakref
from collections.abc import AsyncIterator, Iterator
from typing import Any

import torch

from rollout_core.testing.cases import PackerCase
from rollout_core.testing.checks.base import packer_check, plain_cases, require_same
from rollout_core.testing.machines import SourceBroke
from rollout_core.testing.oracles import bytes_of, picture
from rollout_core.testing.packers import PackerUnderTest, Pairs, Raised, error_words
from rollout_core.testing.registry import Violation


def _script(source: str) -> str:
    return f"""
result = list(packer.unpack(list(packer.pack({source}, capacity))))
assert [(name, raw(t)) for name, t in result] == [(name, raw(t)) for name, t in named]
"""


@packer_check(
    "packer/B16-iterator", "an iterator works as a list does", cases=plain_cases(min_size=0), needs=["iterators"],
    script=_script("iter(named)"),
)  # fmt: skip
def iterator(packer: PackerUnderTest, case: PackerCase) -> None:
    named = case.make(packer.device)
    model = picture(named)
    require_same(model, packer.unpack(packer.pack(iter(named), case.capacity)))


@packer_check(
    "packer/B16-mapping", "a mapping works as a list does", cases=plain_cases(min_size=0), needs=["mappings"],
    script=_script("dict(named)"),
)  # fmt: skip
def mapping(packer: PackerUnderTest, case: PackerCase) -> None:
    named = case.make(packer.device)
    model = picture(named)
    require_same(model, packer.unpack(packer.pack(dict(named), case.capacity)))


@packer_check(
    "packer/B16-module", "a module's parameters and buffers travel", cases=plain_cases(), needs=["modules"],
    script="""
module = torch.nn.Module()
for place, (name, tensor) in enumerate(named):
    module.register_buffer(name, tensor) if place % 2 else module.register_parameter(name, torch.nn.Parameter(tensor))
result = dict(packer.unpack(list(packer.pack(module, capacity))))
assert {name: raw(t) for name, t in result.items()} == {name: raw(t) for name, t in named}
""",
)  # fmt: skip
def module(packer: PackerUnderTest, case: PackerCase) -> None:
    model = torch.nn.Module()
    named = case.make(packer.device)
    for place, (name, tensor) in enumerate(named):
        if place % 2:
            model.register_buffer(name, tensor)
        else:
            model.register_parameter(name, torch.nn.Parameter(tensor))
    result = packer.unpack(packer.pack(model, case.capacity))
    require_same(sorted(picture(named)), sorted(result, key=lambda pair: pair[0]))


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

    async def collect() -> list[Any]:
        return [bucket async for bucket in packer.apack(source(), case.capacity)]

    try:
        buckets = asyncio.run(collect())
    except Exception as error:
        raise Raised("apack", error) from error
    require_same(model, packer.unpack(buckets))


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

    whole = [_content(packer, bucket) for bucket in packer.pack(iter(named), case.capacity)]
    came: list[Any] = []
    try:
        for bucket in packer.pack_lazily(source(), case.capacity):
            came.append(_content(packer, bucket))
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
closed = []
def source():
    try:
        yield from named
    finally:
        closed.append(True)

buckets = packer.pack(source(), capacity)
next(iter(buckets))
buckets.close()
assert closed, "the source is still open"
""",
)  # fmt: skip
def closed_early(packer: PackerUnderTest, case: PackerCase) -> None:
    open_sources = 0
    refs: list[weakref.ref[torch.Tensor]] = []

    def source() -> Iterator[tuple[str, torch.Tensor]]:
        nonlocal open_sources
        open_sources += 1
        try:
            pairs: Pairs = case.make(packer.device)
            refs.extend(weakref.ref(tensor) for _, tensor in pairs)
            while pairs:
                yield pairs.pop(0)
        finally:
            open_sources -= 1

    buckets = packer.pack_lazily(source(), case.capacity)
    next(buckets, None)
    close = getattr(buckets, "close", None)
    if close is None:
        raise Violation(f"pack gave {type(buckets).__name__}, which cannot be closed")
    close()
    if open_sources:
        raise Violation("the buckets were closed after the first, and the source was not")
    del buckets
    alive = sum(ref() is not None for ref in refs)
    if alive:
        raise Violation(f"the buckets were closed after the first, and {alive} of {len(refs)} source tensors are still held")


def _content(packer: PackerUnderTest, bucket: Any) -> Any:
    """What can be seen of a bucket's content, at the moment it comes."""
    if "buffer" in packer.capabilities:
        return bytes_of(packer.buffer(bucket))
    if isinstance(bucket, list | tuple):
        return picture(bucket)
    return packer.nbytes(bucket)
