"""Cases: what a check is tried on, as plain data. Tensors are drawn as recipes and made late, so that a case can be sent to another
process, saved, replayed and written out as a script."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import cycle, islice
from typing import Final, Literal, TypeAlias, get_args

import msgspec
import numpy as np
import torch

from rollout_core.bucketing.dtypes import DTYPES, label

#: How a tensor lies in memory. Each but the first is a view for which code that reads a storage from its start, or ignores strides
#: or flags, goes wrong.
Layout: TypeAlias = Literal[
    "contiguous", "sliced", "strided", "transposed", "expanded", "expanded last", "one element, odd stride", "detached slice",
    "conj", "neg", "parameter",
]  # fmt: skip
#: What the elements are: bytes that all differ from their neighbours, NaNs with payloads beside negative zeros, or zeros.
Fill: TypeAlias = Literal["pattern", "special", "zeros"]
#: A tensor made of an earlier one: the same object, a new view of the same elements, a view of a part of its storage, or a view
#: that begins at the same address and is another tensor all the same.
Relation: TypeAlias = Literal["tied", "same view", "head", "tail", "transposed", "as int32", "conj of"]

LAYOUTS: Final[tuple[Layout, ...]] = get_args(Layout)

#: Bit patterns that arithmetic changes and a copy keeps: signalling and quiet NaNs with payloads, negative NaN, negative zero. By
#: dtype; float8 formats differ and are served by bytes that are NaN or negative zero in each of them.
_SPECIAL_BITS: Final[dict[str, tuple[int, ...]]] = {
    "float64": (0x7FF0000000000001, 0x7FF8000000000123, 0xFFFFFFFFFFFFFFFF, 0x8000000000000000),
    "float32": (0x7F800001, 0x7FC00123, 0xFFFFFFFF, 0x80000000),
    "bfloat16": (0x7F81, 0x7FC3, 0xFFFF, 0x8000),
    "float16": (0x7C01, 0x7E03, 0xFFFF, 0x8000),
    "bool": (0x01, 0x00),
}
_COMPONENT: Final = {"complex128": "float64", "complex64": "float32", "complex32": "float16"}


class TensorCase(msgspec.Struct, frozen=True, omit_defaults=True):
    """The recipe of one tensor. ``dtype`` is a torch name without prefix. ``of`` is the place of an earlier tensor that this one is
    made of, in the way ``relation`` says; dtype and shape then follow from it."""

    name: str
    dtype: str = "float32"
    shape: tuple[int, ...] = (1,)
    layout: Layout = "contiguous"
    fill: Fill = "pattern"
    of: int | None = None
    relation: Relation = "tied"

    @property
    def torch_dtype(self) -> torch.dtype:
        return DTYPES[self.dtype]

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor when contiguous."""
        return math.prod(self.shape) * self.torch_dtype.itemsize

    def __str__(self) -> str:
        """``'b' bf16[3], strided``, as messages write it."""
        words = f"{self.name!r} {label(self.torch_dtype)}{list(self.shape)}"
        if self.layout != "contiguous":
            words += f", {self.layout}"
        if self.fill != "pattern":
            words += {"special": ", NaN payloads and -0.0", "zeros": ", zeros"}[self.fill]
        return words


class PackerCase(msgspec.Struct, frozen=True, omit_defaults=True, kw_only=True):
    """One thing to try a packer on: the tensors in order, the capacity in bytes, and what a check asks for beyond that.

    ``tiny``: so many more tensors of one byte. ``others``: further capacities. ``at``: numbers that a check reads as places
    (of a bucket, bit, tensor). ``groups``: names that share a bucket. ``data``: bytes, for what decodes them.
    ``steps``: the program of a state machine, as (operation, number).
    """

    tensors: tuple[TensorCase, ...] = ()
    capacity: int = 1 << 20
    tiny: int = 0
    others: tuple[int, ...] = ()
    at: tuple[int, ...] = ()
    groups: tuple[tuple[str, ...], ...] = ()
    data: bytes = b""
    steps: tuple[tuple[str, int], ...] = ()

    def make(self, device: str = "cpu", *, seed: int = 1) -> list[tuple[str, torch.Tensor]]:
        """The named tensors, new ones at each call. ``seed`` changes every byte that the pattern fills."""
        return make_tensors(self.all_tensors(), device, seed=seed)

    def all_tensors(self) -> list[TensorCase]:
        return [*self.tensors, *(TensorCase(f"tiny {i}", "uint8") for i in range(self.tiny))]

    def __str__(self) -> str:
        words = [f"capacity {self.capacity} bytes"]
        for case in self.tensors:
            words.append(f"{case}{self._relation(case)}")
        if self.tiny:
            words.append(f"and {self.tiny} tensors u8[1]")
        if self.groups:
            words.append(f"groups {[list(group) for group in self.groups]}")
        if self.steps:
            words.append("; ".join(f"{operation} {number}" for operation, number in self.steps))
        return "; ".join(words) if self.tensors or self.tiny else f"{words[0]}; no tensors"

    def _relation(self, case: TensorCase) -> str:
        if case.of is None:
            return ""
        other = repr(self.tensors[case.of].name)
        words = {
            "tied": "the same tensor as", "same view": "a view of all of", "head": "the first half of", "tail": "the end of",
            "transposed": "the transpose of", "as int32": "the integers of", "conj of": "the conjugate of",
        }  # fmt: skip
        return f", {words[case.relation]} {other}"


def make_tensors(cases: Sequence[TensorCase], device: str = "cpu", *, seed: int = 1) -> list[tuple[str, torch.Tensor]]:
    """The named tensors of these recipes."""
    pairs: list[tuple[str, torch.Tensor]] = []
    for place, case in enumerate(cases):
        if case.of is not None:
            pairs.append((case.name, _related(pairs[case.of][1], case.relation)))
        else:
            pairs.append((case.name, make_tensor(case, device, seed=seed + place)))
    return pairs


def make_tensor(case: TensorCase, device: str = "cpu", *, seed: int = 1) -> torch.Tensor:
    """One tensor that is made of no other."""
    shape, dtype = case.shape, case.torch_dtype

    def base(*sizes: int) -> torch.Tensor:
        count = math.prod(sizes) * dtype.itemsize
        if not count:
            return torch.empty(0, dtype=torch.uint8, device=device).view(dtype).view(sizes)
        data = torch.frombuffer(bytearray(fill_bytes(case.fill, case.dtype, count, seed)), dtype=torch.uint8)
        return data.to(device).view(dtype).view(sizes)

    return _LAYOUT_MAKERS[case.layout](base, shape)


Base: TypeAlias = Callable[..., torch.Tensor]


def _strided(base: Base, shape: tuple[int, ...]) -> torch.Tensor:
    return base(*shape[:-1], 2 * shape[-1])[..., ::2] if shape else base(2)[1]


def _sliced(base: Base, shape: tuple[int, ...]) -> torch.Tensor:
    return base(math.prod(shape) + 1)[1:].view(shape)


def _expanded(base: Base, shape: tuple[int, ...]) -> torch.Tensor:
    return base(*(1 for _ in shape[:1]), *shape[1:]).expand(shape)


_LAYOUT_MAKERS: Final[dict[Layout, Callable[[Base, tuple[int, ...]], torch.Tensor]]] = {
    "contiguous": lambda base, shape: base(*shape),
    "sliced": _sliced,
    "strided": _strided,
    "transposed": lambda base, shape: base(*reversed(shape)).permute(*reversed(range(len(shape)))),
    "expanded": _expanded,
    "expanded last": lambda base, shape: base(*shape[:-1], *(1 for _ in shape[-1:])).expand(shape),
    "one element, odd stride": lambda base, shape: base(10)[::5][:1],
    # A detached view does not know its base: code that asks ``_base`` whether it is one is told that it is not.
    "detached slice": lambda base, shape: base(8 * math.prod(shape) + 64)[1 : 1 + math.prod(shape)].view(shape).detach(),
    "conj": lambda base, shape: base(*shape).conj(),
    "neg": lambda base, shape: torch._neg_view(base(*shape)),
    "parameter": lambda base, shape: torch.nn.Parameter(base(*shape)),
}


def _related(tensor: torch.Tensor, relation: Relation) -> torch.Tensor:
    match relation:
        case "tied":
            return tensor
        case "same view":
            return tensor.view(tensor.shape)
        case "head":
            return tensor[: (len(tensor) + 1) // 2]
        case "tail":
            return tensor[1:]
        case "transposed":
            return tensor.t()
        case "as int32":
            return tensor.view(torch.int32)
        case "conj of":
            return tensor.conj()


def related_case(case: TensorCase, of: int, relation: Relation, name: str) -> TensorCase:
    """The recipe of a tensor made of the one at place ``of``, whose recipe is ``case``."""
    rows = case.shape[0] if case.shape else 0
    first = {"head": (rows + 1) // 2, "tail": rows - 1}.get(relation, rows)
    shape = (first, *case.shape[1:]) if case.shape else ()
    if relation == "transposed":
        shape = (shape[1], shape[0])
    return TensorCase(name, "int32" if relation == "as int32" else case.dtype, shape, of=of, relation=relation)


def fill_bytes(fill: Fill, dtype: str, count: int, seed: int) -> bytes:
    """``count`` bytes for elements of this dtype."""
    if fill == "zeros":
        return bytes(count)
    if fill == "pattern":
        return bytes(byte & 1 for byte in pattern(count, seed)) if dtype == "bool" else pattern(count, seed)  # a bool is 0 or 1
    component = _COMPONENT.get(dtype, dtype)
    width = DTYPES[component].itemsize
    bits = _SPECIAL_BITS.get(component, (0x7F, 0xFF, 0x80, 0x7D) if width == 1 else (1, 2, 3))
    values = islice(cycle(bits[seed % len(bits) :] + bits[: seed % len(bits)]), count // width)
    return b"".join(value.to_bytes(width, "little") for value in values)


def pattern(count: int, seed: int) -> bytes:
    """Bytes that all differ from their neighbours, and from those of the next seeds: a misplaced range cannot pass for the right
    one. All are below 120, so that in every floating format each element is an ordinary number."""
    places = np.arange(count)
    return bytes(((31 * seed + 7 * places + places // 256) % 120).astype(np.uint8))
