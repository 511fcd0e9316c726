"""Where thousands of tensors lie, and whether each is what it has to be, in one pass of compiled code.

By torch's own functions the answer takes longer than a GPU needs to copy them, mostly because each question goes through all of
them, and their memory, again. ``addresses.c`` asks once, by DLPack's C exchange API (torch 2.11 and newer). It is compiled with the
C compiler that Triton, too, needs for its kernels, once for each process; without one, torch is asked.
"""

from __future__ import annotations

import ctypes
import os
import shlex
import shutil
import subprocess
import sysconfig
import tempfile
from collections import Counter
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import torch

from rollout_core.bucketing.dtypes import ITEMSIZES

_SOURCE: Final = Path(__file__).with_name("addresses.c")
_SECONDS: Final = 60.0  # for the compiler, which takes a third of one
_WANTED: Final = np.dtype([("code", "i4"), ("bits", "i4"), ("lanes", "i4"), ("ndim", "i4"), ("first", "i8")])


class _DLTensor(ctypes.Structure):
    """``DLTensor`` of DLPack 1."""

    _fields_ = (
        ("data", ctypes.c_void_p),
        ("device_type", ctypes.c_int32),
        ("device_id", ctypes.c_int32),
        ("ndim", ctypes.c_int32),
        ("code", ctypes.c_uint8),
        ("bits", ctypes.c_uint8),
        ("lanes", ctypes.c_uint16),
        ("shape", ctypes.c_void_p),
        ("strides", ctypes.c_void_p),
        ("byte_offset", ctypes.c_uint64),
    )


class _ExchangeAPI(ctypes.Structure):
    """``DLPackExchangeAPI`` of DLPack 1.3, as far as it is used."""

    _fields_ = (
        ("major", ctypes.c_uint32),
        ("minor", ctypes.c_uint32),
        ("previous", ctypes.c_void_p),
        ("managed_tensor_allocator", ctypes.c_void_p),
        ("managed_tensor_from_py_object_no_sync", ctypes.c_void_p),
        ("managed_tensor_to_py_object_no_sync", ctypes.c_void_p),
        ("dltensor_from_py_object_no_sync", ctypes.c_void_p),
    )


class Finder:
    """Finds tensors of given dtypes and shapes, in their order, on one device."""

    @classmethod
    def of(cls, dtypes: Sequence[torch.dtype], shapes: Sequence[tuple[int, ...]], device: torch.device) -> Finder | None:
        """None where there is no compiled code, or none for these: complex tensors may be lazily conjugated, empty ones lie
        nowhere, and DLPack has no name for bits."""
        compiled = _compiled()
        if compiled is None or not compiled.names.keys() >= set(dtypes) or not all(map(all, shapes)):
            return None
        return cls(compiled, dtypes, shapes, device)

    def __init__(
        self, compiled: _Compiled, dtypes: Sequence[torch.dtype], shapes: Sequence[tuple[int, ...]], device: torch.device
    ) -> None:
        names = [compiled.names[dtype] for dtype in dtypes]
        counts = np.array([len(shape) for shape in shapes], np.int64)
        self._wanted = np.empty(len(dtypes), _WANTED)
        for column, numbers in zip(("code", "bits", "lanes"), zip(*names, strict=True), strict=True):
            self._wanted[column] = numbers
        self._wanted["ndim"] = counts
        self._wanted["first"] = np.cumsum(counts) - counts
        self._sizes = np.array([size for shape in shapes for size in shape], np.int64)
        self._tables = (self._wanted.ctypes.data, self._sizes.ctypes.data)
        self._compiled = compiled
        here = compiled.described(torch.empty(1, dtype=torch.uint8, device=device))
        self._where = (here.device_type, here.device_id)
        # DLPack has one name for int4 and int8, each in a byte.
        self._homonyms = [(place, dtype) for place, dtype in enumerate(dtypes) if dtype in compiled.homonyms]

    def addresses(self, rows: list[torch.Tensor]) -> npt.NDArray[np.int64] | None:
        """Of each row's first byte, int64; None if one is no plain contiguous tensor, or not as it has to be."""
        found = np.empty(len(self._wanted), np.int64)
        if len(rows) != len(found):
            return None
        count = self._compiled.count(rows, len(found), *self._tables, *self._where, found)
        same = count == len(found) and all(rows[place].dtype is dtype for place, dtype in self._homonyms)
        return found if same else None


class _Compiled:
    """``names``: what DLPack calls a dtype, by code, bits and lanes, if it has a name for it, and it is not complex. ``homonyms``:
    those whose name is another's, too."""

    def __init__(self, function: Any, describe: int) -> None:
        self._function = function
        self._describe = describe
        found = {dtype: self._name(dtype) for dtype in ITEMSIZES if not dtype.is_complex}
        self.names = {dtype: name for dtype, name in found.items() if name is not None}
        counts = Counter(self.names.values())
        self.homonyms = frozenset(dtype for dtype, name in self.names.items() if counts[name] > 1)

    def _name(self, dtype: torch.dtype) -> tuple[int, int, int] | None:
        try:
            found = self.described(torch.empty(1, dtype=dtype, device="cpu"))
        except RuntimeError:  # bits
            return None
        return found.code, found.bits, found.lanes

    def described(self, tensor: torch.Tensor) -> _DLTensor:
        """What points to memory in it is only good while the tensor is."""
        result = _DLTensor()
        call = ctypes.PYFUNCTYPE(ctypes.c_int, ctypes.py_object, ctypes.POINTER(_DLTensor))(self._describe)
        call(tensor, ctypes.byref(result))  # raises what torch raises
        return result

    def count(
        self, rows: list[torch.Tensor], count: int, wanted: int, sizes: int, kind: int, index: int, found: npt.NDArray[np.int64]
    ) -> int:
        types = (torch.Tensor, torch.nn.Parameter)
        done: int = self._function(
            self._describe, torch.Tensor.is_neg, *types, rows, count, wanted, sizes, kind, index, found.ctypes.data
        )
        return done


@cache
def _compiled() -> _Compiled | None:
    """The compiled code, if this torch has the API, a compiler makes it, and it sees what it is here for."""
    if sysconfig.get_config_var("Py_GIL_DISABLED"):
        return None
    try:
        capsule = torch.Tensor.__dlpack_c_exchange_api__
        pointer = ctypes.pythonapi.PyCapsule_GetPointer
        pointer.restype, pointer.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]
        api = _ExchangeAPI.from_address(pointer(capsule, b"dlpack_exchange_api"))
        if api.major != 1 or not api.dltensor_from_py_object_no_sync:
            return None
        function = _load().addresses
        function.restype = ctypes.c_int64
        pointers, numbers = ctypes.c_void_p, ctypes.c_int32
        function.argtypes = [
            *(pointers, *(ctypes.py_object,) * 4, ctypes.c_int64, pointers, pointers, numbers, numbers, pointers),
        ]
        compiled = _Compiled(function, api.dltensor_from_py_object_no_sync)
        return compiled if _sees(compiled) else None
    except Exception:  # whatever another torch, or a compiler, raises
        return None


def _load() -> ctypes.PyDLL:
    """In a folder that is gone again then: nobody else can have put into it what is loaded, and nothing is out of date."""
    named = shlex.split(os.environ.get("CC", "")) or [name for name in ("cc", "gcc", "clang") if shutil.which(name)][:1]
    if not named:
        raise FileNotFoundError("no C compiler")
    includes = {sysconfig.get_path("include"), sysconfig.get_path("platinclude")}
    with tempfile.TemporaryDirectory(prefix="rollout_core-") as folder:
        made = f"{folder}/addresses.so"
        flags = ("-O2", "-shared", "-fPIC", *(f"-I{path}" for path in sorted(includes)))
        subprocess.run([*named, *flags, str(_SOURCE), "-o", made], check=True, capture_output=True, timeout=_SECONDS)
        return ctypes.PyDLL(made)


def _sees(compiled: _Compiled) -> bool:
    """Whether it finds tensors where they are, and sees everything else."""
    with torch.inference_mode(False):  # whatever is on where it is first asked
        here = torch.device("cpu")
        square = torch.arange(4, dtype=torch.float32, device=here).view(2, 2)
        finder = Finder(compiled, [square.dtype] * 2, [(2, 2)] * 2, here)
        like = [square, torch.nn.Parameter(square[:1].expand(2, 2).contiguous())]
        others: tuple[Any, ...] = (
            *(square.t(), square.view(4), square[:1], square.view(torch.int32), square.to("meta"), square.double()),
            *(torch._neg_view(square), square.to_sparse(), square.expand(2, 2, 2)[0].t(), torch.Tensor, None),
        )
        found = finder.addresses(like)
        return (
            found is not None
            and found.tolist() == [tensor.data_ptr() for tensor in like]
            and all(finder.addresses([square, other]) is None for other in others)
        )
