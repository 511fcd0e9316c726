"""B7: two sides whose plans differ."""

from __future__ import annotations

from typing import Final

import torch

from rollout_core.testing.cases import PackerCase
from rollout_core.testing.checks.base import must_raise, packer_check, plain_cases, require_same
from rollout_core.testing.oracles import picture
from rollout_core.testing.packers import PackerUnderTest, SpecRow
from rollout_core.testing.registry import Violation

_SPECS = """
specs = [(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in named]
buckets = list(packer.pack(named, capacity))
"""


@packer_check(
    "packer/B7-same",
    "a receiver that plans for itself from the same specs gets the tensors",
    cases=plain_cases(),
    needs=["receive"],
    script=_SPECS + """
for (name, sent), (other, got) in zip(named, packer.receive(specs, capacity, buckets), strict=True):
    assert name == other and raw(sent) == raw(got), (name, other, sent, got)
""",
)  # fmt: skip
def same(packer: PackerUnderTest, case: PackerCase) -> None:
    named = case.make(packer.device)
    model = picture(named)
    require_same(model, packer.receive(_specs(case), case.capacity, packer.pack(named, case.capacity)))


#: Ways in which the receiver's idea of the model may differ.
_WAYS: Final = ("name", "dtype", "shape", "order", "missing", "extra", "capacity")


@packer_check(
    "packer/B7-different",
    "a receiver whose specs or capacity differ is refused, before it takes one tensor for another",
    cases=plain_cases(min_size=1, max_size=4, places=2),
    needs=["receive"],
    script=_SPECS
    + """
way = ("name", "dtype", "shape", "order", "missing", "extra", "capacity")[{at}[0] % 7]
place = {at}[1] % len(specs)
name, dtype, shape = specs[place]
if way in ("name", "dtype", "shape"):
    specs[place] = {
        "name": (name + "x", dtype, shape), "dtype": (name, torch.int32, shape), "shape": (name, dtype, (1, *shape))
    }[way]
others = {"order": specs[::-1], "missing": specs[:place] + specs[place + 1 :], "extra": [*specs, ("more", dtype, shape)]}
specs = others.get(way, specs)
capacity = 2 * capacity + 16 if way == "capacity" else capacity
"""
    + must_raise("print(packer.receive(specs, capacity, buckets))"),
)
def different(packer: PackerUnderTest, case: PackerCase) -> None:
    named = case.make(packer.device)
    model = picture(named)
    buckets = packer.pack(named, case.capacity)
    specs, capacity = _specs(case), case.capacity
    place = case.at[1] % len(specs)
    name, dtype, shape = specs[place]
    way = _WAYS[case.at[0] % len(_WAYS)]
    match way:
        case "name":
            specs[place] = (name + "x", dtype, shape)
        case "dtype":
            specs[place] = (name, torch.int32, shape)
        case "shape":
            specs[place] = (name, dtype, (1, *shape))
        case "order":
            if len(specs) < 2:
                return
            specs.reverse()
        case "missing":
            del specs[place]
        case "extra":
            specs.append(("more", dtype, shape))
        case "capacity":
            capacity = 2 * capacity + 16
    got = None

    def receive() -> None:
        nonlocal got
        got = packer.receive(specs, capacity, buckets)

    if packer.refusal(receive) is None and (way != "capacity" or picture(got or []) != model):
        raise Violation(f"the receiver's {way} differs ({_words(way, specs, capacity)}), and no error was raised")


def _specs(case: PackerCase) -> list[SpecRow]:
    return [(tensor.name, tensor.torch_dtype, tensor.shape) for tensor in case.all_tensors()]


def _words(way: str, specs: list[SpecRow], capacity: int) -> str:
    if way == "capacity":
        return f"it expects {capacity} bytes"
    return "it expects " + ", ".join(f"{n!r} {str(d).removeprefix('torch.')}{list(s)}" for n, d, s in specs)
