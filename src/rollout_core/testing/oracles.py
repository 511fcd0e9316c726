"""Oracles: what is so, found without the code under test. This module imports nothing of rollout_core."""

from __future__ import annotations

import ctypes
from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import product
from typing import Any, NamedTuple

import torch
from torch.multiprocessing.reductions import StorageWeakRef


class Picture(NamedTuple):
    """All that B1 says must be conserved of a named tensor, as plain values."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    data: bytes

    def __str__(self) -> str:
        shown = self.data.hex() if len(self.data) <= 16 else f"{self.data[:16].hex()}... ({len(self.data)} bytes)"
        return f"{self.name!r} {str(self.dtype).removeprefix('torch.')}{list(self.shape)} {shown or 'no bytes'}"


def bytes_of(tensor: torch.Tensor) -> bytes:
    """The bytes of a tensor's values in row-major order, element by element out of its raw storage, conjugate and negative views
    resolved by hand. No torch operation copies, casts or compares here; only a tensor on another device is brought over first."""
    if tensor.device.type != "cpu":
        tensor = tensor.detach().cpu()
    width = tensor.dtype.itemsize
    storage = tensor.untyped_storage()
    raw = ctypes.string_at(storage.data_ptr(), storage.nbytes()) if storage.nbytes() else b""
    conj, neg = tensor.is_conj(), tensor.is_neg()
    start = tensor.storage_offset() * width
    if tensor.is_contiguous() and not conj and not neg:
        return raw[start : start + tensor.numel() * width]
    out = bytearray()
    for index in product(*map(range, tensor.shape)):
        at = start + width * sum(i * stride for i, stride in zip(index, tensor.stride(), strict=True))
        element = bytearray(raw[at : at + width])
        # On a little-endian machine the sign is the top bit of the last byte of each component.
        if conj:
            element[-1] ^= 0x80
        if neg:
            element[-1] ^= 0x80
            if tensor.dtype.is_complex:
                element[width // 2 - 1] ^= 0x80
        out += element
    return bytes(out)


def picture(pairs: Iterable[tuple[str, torch.Tensor]]) -> list[Picture]:
    """The pictures of named tensors, in their order."""
    return [Picture(str(name), tensor.dtype, tuple(tensor.shape), bytes_of(tensor)) for name, tensor in pairs]


def difference(model: Sequence[Picture], actual: Sequence[Picture]) -> str | None:
    """The first difference between what should have come out (``model``) and what did, in words; None if there is none."""
    if model == actual:
        return None
    wanted, got = [p.name for p in model], [p.name for p in actual]
    if wanted != got:
        missing, extra = [*(Counter(wanted) - Counter(got))], [*(Counter(got) - Counter(wanted))]
        if missing:
            return f"{_names(missing)} did not arrive (model: {_names(wanted)}, actual: {_names(got)})"
        if extra:
            return f"{_names(extra)} came more often than sent (model: {_names(wanted)}, actual: {_names(got)})"
        return f"the names came in another order (model: {_names(wanted)}, actual: {_names(got)})"
    for one, other in zip(model, actual, strict=True):
        if one.dtype != other.dtype:
            return f"{one.name!r} has another dtype (model: {one.dtype}, actual: {other.dtype})"
        if one.shape != other.shape:
            return f"{one.name!r} has another shape (model: {list(one.shape)}, actual: {list(other.shape)})"
        if one.data != other.data:
            at = next(i for i, (a, b) in enumerate(zip(one.data, other.data, strict=True)) if a != b)
            width = one.dtype.itemsize
            element = at // width
            span = slice(element * width, (element + 1) * width)
            count = sum(one.data[i : i + width] != other.data[i : i + width] for i in range(0, len(one.data), width))
            return (
                f"{one.name!r} has other bytes in {count} of {len(one.data) // width} elements, first in element {element} "
                f"(model: {one.data[span].hex()}, actual: {other.data[span].hex()})"
            )
    raise AssertionError("the pictures differ and no part of them does")


class StorageRef:
    """Whether a tensor's memory is still held, by that tensor or by any other of the same storage."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self._ref: Any = StorageWeakRef(tensor.untyped_storage())  # type: ignore[no-untyped-call]

    def is_alive(self) -> bool:
        return not self._ref.expired()


def live_tensor_bytes() -> int:
    """Bytes of all CPU storages that tensors known to the garbage collector refer to, each storage once."""
    import gc

    gc.collect()
    sizes: dict[int, int] = {}
    for item in gc.get_objects():
        if type(item) in (torch.Tensor, torch.nn.Parameter) and item.device.type == "cpu" and item.layout is torch.strided:
            storage = item.untyped_storage()
            sizes[storage.data_ptr()] = storage.nbytes()
    return sum(sizes.values())


def _names(names: Sequence[str]) -> str:
    shown = ", ".join(repr(name) for name in names[:6])
    return shown + (f", ... ({len(names)} in all)" if len(names) > 6 else "") or "nothing"
