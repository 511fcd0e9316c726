"""The state machine: a packer through rounds, beside a model that only remembers pictures.

A program is a list of steps (operation, number), drawn as data: it can be run in another process, saved, and read in a report. A
step that has nothing to act on does nothing, so that programs shrink by leaving steps out.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Final

import torch
from hypothesis import strategies as st

from rollout_core.testing.cases import PackerCase
from rollout_core.testing.oracles import Picture, difference, picture
from rollout_core.testing.packers import PackerUnderTest, Pairs
from rollout_core.testing.registry import Violation
from rollout_core.testing.strategies import packer_cases, tensor_cases

#: What a step does; ``number`` picks the source, the round or the place that it does it to.
OPERATIONS: Final[dict[str, str]] = {
    "pack": "pack one of three sets of tensors and keep the buckets",
    "unpack": "unpack a kept round and keep the result",
    "change": "overwrite the tensors of one of the three sources",
    "spoil": "overwrite a kept result, which may also be its round's buffers",
    "drop": "forget a kept round",
    "forget": "forget a kept result",
    "fail": "pack a source that raises in the middle",
    "stop": "pack an iterator, take some buckets, and close early",
}
_SOURCES: Final = 3


class SourceBroke(Exception):
    """What a failing source raises."""


@st.composite
def programs(draw: st.DrawFn, *, max_steps: int = 12) -> PackerCase:
    """Tensors, a capacity that makes several buckets likely, and up to ``max_steps`` steps."""
    steps = draw(st.lists(st.tuples(st.sampled_from([*OPERATIONS]), st.integers(0, 5)), min_size=1, max_size=max_steps))
    tensors = tensor_cases(min_size=1, max_size=4, dtypes=st.just(torch.float32), shapes=st.sampled_from([(1,), (3,), (2, 2)]))
    case = draw(packer_cases(tensors=tensors))
    return PackerCase(tensors=case.tensors, capacity=case.capacity, steps=tuple(steps))


@dataclass(eq=False)
class _Round:
    buckets: list[Any]
    model: list[Picture]


@dataclass
class _World:
    """What has been made so far, and the pictures of what it must still be."""

    sources: list[Pairs]
    rounds: list[_Round] = field(default_factory=list)
    results: list[tuple[Pairs, list[Picture], _Round]] = field(default_factory=list)
    newest: int = -1  # the latest round that was unpacked


def run_program(packer: PackerUnderTest, case: PackerCase) -> None:
    """Run the steps of a case; ``Violation`` that names the step after which something is not what the model says."""
    world = _World([case.make(packer.device, seed=1 + 20 * i) for i in range(_SOURCES)])
    for place, (operation, number) in enumerate([*case.steps, ("end", 0)]):
        try:
            _STEPS[operation](world, packer, case, number)
            for pairs, model, _round in world.results:
                problem = difference(model, picture(pairs))
                if problem is not None:
                    raise Violation(f"what was unpacked before changed: {problem}")
        except Violation as violation:
            where = f"step {place} ({operation} {number})" if operation != "end" else "at the end"
            raise Violation(f"{where}: {violation}") from violation


def _pack(world: _World, packer: PackerUnderTest, case: PackerCase, number: int) -> None:
    source = world.sources[number % _SOURCES]
    model = picture(source)
    world.rounds.append(_Round(packer.pack(source, case.capacity), model))


def _unpack(world: _World, packer: PackerUnderTest, case: PackerCase, number: int) -> None:
    if not world.rounds:
        return
    place = number % len(world.rounds)
    if "versions" in packer.capabilities and place < world.newest:
        return  # an older round may be refused
    world.newest = max(world.newest, place)
    round_ = world.rounds[place]
    result = packer.unpack(round_.buckets)
    problem = difference(round_.model, picture(result))
    if problem is not None:
        raise Violation(f"round {place} is not what was packed: {problem}")
    world.results.append((result, round_.model, round_))


def _change(world: _World, packer: PackerUnderTest, case: PackerCase, number: int) -> None:
    for _name, tensor in world.sources[number % _SOURCES]:
        flip_bytes(tensor)


def _spoil(world: _World, packer: PackerUnderTest, case: PackerCase, number: int) -> None:
    if not world.results:
        return
    pairs, _model, round_ = world.results.pop(number % len(world.results))
    before = [picture(source) for source in world.sources]
    for _name, tensor in pairs:
        flip_bytes(tensor)
    for i, source in enumerate(world.sources):
        problem = difference(before[i], picture(source))
        if problem is not None:
            raise Violation(f"writing to what was unpacked changed source {i}: {problem}")
    # The result may be views of the round's buffers: neither it nor its other results are what they were.
    world.results = [kept for kept in world.results if kept[2] is not round_]
    _remove(world, round_)


def _drop(world: _World, packer: PackerUnderTest, case: PackerCase, number: int) -> None:
    if world.rounds:
        _remove(world, world.rounds[number % len(world.rounds)])


def _forget(world: _World, packer: PackerUnderTest, case: PackerCase, number: int) -> None:
    if world.results:
        world.results.pop(number % len(world.results))


def _fail(world: _World, packer: PackerUnderTest, case: PackerCase, number: int) -> None:
    if "iterators" not in packer.capabilities:
        return
    stop = number % (len(world.sources[0]) + 1)

    def source() -> Iterator[tuple[str, torch.Tensor]]:
        yield from world.sources[0][:stop]
        raise SourceBroke(f"after {stop} tensors")

    error = packer.refusal(lambda: packer.pack(source(), case.capacity))
    if not isinstance(error, SourceBroke):
        raise Violation(f"the source raised SourceBroke after {stop} tensors, and pack {_came(error)}")


def _stop(world: _World, packer: PackerUnderTest, case: PackerCase, number: int) -> None:
    if "iterators" not in packer.capabilities:
        return
    buckets = packer.pack_lazily(iter(world.sources[number % _SOURCES]), case.capacity)
    next(buckets, None)
    buckets.close()


def _end(world: _World, packer: PackerUnderTest, case: PackerCase, number: int) -> None:
    """Whatever was kept still unpacks to what it was."""
    for place, round_ in enumerate(world.rounds):
        if "versions" in packer.capabilities and place < world.newest:
            continue
        problem = difference(round_.model, picture(packer.unpack(round_.buckets)))
        if problem is not None:
            raise Violation(f"round {place} is not what was packed: {problem}")


_STEPS: Final = {
    "pack": _pack, "unpack": _unpack, "change": _change, "spoil": _spoil, "drop": _drop, "forget": _forget, "fail": _fail,
    "stop": _stop, "end": _end,
}  # fmt: skip


def _remove(world: _World, round_: _Round) -> None:
    if round_ in world.rounds:
        place = world.rounds.index(round_)
        del world.rounds[place]
        world.newest -= place <= world.newest


def _came(error: Exception | None) -> str:
    return "raised nothing" if error is None else f"raised {type(error).__name__}: {error}"


def flip_bytes(tensor: torch.Tensor) -> None:
    """Change every byte of a tensor's elements in place."""
    if tensor.numel():
        flipped = tensor.detach().clone(memory_format=torch.contiguous_format)
        flipped.view(-1).view(torch.uint8).bitwise_xor_(0xFF)
        tensor.detach().copy_(flipped)
