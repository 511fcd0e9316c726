"""The oracle: a tensor's bytes, element by element out of its raw storage. It imports nothing of rollout_core and uses no torch
operation that copies, casts or compares."""

from __future__ import annotations

import ctypes
from itertools import product

import torch


def bytes_of(tensor: torch.Tensor) -> bytes:
    """The bytes of the tensor's values in row-major order, conjugate and negative views resolved by hand."""
    width = tensor.dtype.itemsize
    storage = tensor.untyped_storage()
    raw = ctypes.string_at(storage.data_ptr(), storage.nbytes()) if storage.nbytes() else b""
    out = bytearray()
    for index in product(*map(range, tensor.shape)):
        at = tensor.storage_offset() + sum(i * stride for i, stride in zip(index, tensor.stride(), strict=True))
        element = bytearray(raw[at * width : (at + 1) * width])
        # On a little-endian machine the sign is the top bit of the last byte of each component.
        if tensor.is_conj():
            element[-1] ^= 0x80
        if tensor.is_neg():
            element[-1] ^= 0x80
            if tensor.dtype.is_complex:
                element[width // 2 - 1] ^= 0x80
        out += element
    return bytes(out)


def picture(pairs) -> list[tuple[str, torch.dtype, tuple[int, ...], bytes]]:
    """All that B1 says must be conserved, as plain values."""
    return [(name, tensor.dtype, tuple(tensor.shape), bytes_of(tensor)) for name, tensor in pairs]
