"""The dtypes that travel, their wire names and the short labels used in messages.

The wire name of a dtype is its torch name without the prefix (``bfloat16``), so a manifest needs no private code table. The
list is fixed here rather than read off torch: a receiver with an older torch must be able to say which dtype it lacks.
"""

from __future__ import annotations

from typing import Final

import torch

_LABELS: Final[dict[str, str]] = {
    "bool": "bool",
    "uint8": "u8",
    "uint16": "u16",
    "uint32": "u32",
    "uint64": "u64",
    "int8": "i8",
    "int16": "i16",
    "int32": "i32",
    "int64": "i64",
    "float16": "f16",
    "bfloat16": "bf16",
    "float32": "f32",
    "float64": "f64",
    "complex32": "c32",
    "complex64": "c64",
    "complex128": "c128",
    "float8_e4m3fn": "f8e4m3",
    "float8_e4m3fnuz": "f8e4m3fnuz",
    "float8_e5m2": "f8e5m2",
    "float8_e5m2fnuz": "f8e5m2fnuz",
    "float8_e8m0fnu": "f8e8m0",
    "float4_e2m1fn_x2": "f4e2m1x2",
    **{f"{sign}int{bits}": f"{sign or 'i'}{bits}" for sign in ("", "u") for bits in range(1, 8)},
    **{name: name for name in ("bits8", "bits1x8", "bits2x4", "bits4x2", "bits16")},
}

#: Wire name -> dtype, for every dtype that travels and that this torch has.
DTYPES: Final[dict[str, torch.dtype]] = {name: getattr(torch, name) for name in _LABELS if hasattr(torch, name)}
#: dtype -> wire name.
WIRE_NAMES: Final[dict[torch.dtype, str]] = {dtype: name for name, dtype in DTYPES.items()}
#: dtype -> bytes per element (``torch.dtype.itemsize`` as a dict: one lookup on the planning path).
ITEMSIZES: Final[dict[torch.dtype, int]] = {dtype: dtype.itemsize for dtype in WIRE_NAMES}

_SUB_BYTE: Final = frozenset(f"{sign}int{bits}" for sign in ("", "u") for bits in range(1, 8))
#: Dtypes whose copy kernels move the bits of any value unchanged. The rest is copied as integers of the same width: torch has
#: no copy kernel for the sub-byte dtypes, and a bool copy may turn a byte of 2 into 1.
BIT_EXACT_COPY: Final[frozenset[torch.dtype]] = frozenset(
    dtype for name, dtype in DTYPES.items() if name != "bool" and name not in _SUB_BYTE and not name.startswith("bits")
)


def is_known_name(name: str) -> bool:
    """Whether ``name`` is the wire name of a dtype that travels, whether or not this torch has it."""
    return name in _LABELS


def label(dtype: torch.dtype) -> str:
    """The short name used in messages and tables: ``bf16`` for ``torch.bfloat16``."""
    name = str(dtype).removeprefix("torch.")
    return _LABELS.get(name, name)
