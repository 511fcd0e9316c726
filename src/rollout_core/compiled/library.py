"""``many.c``, compiled and loaded."""

from __future__ import annotations

import ctypes
import os
import shlex
import shutil
import subprocess
import sysconfig
import tempfile
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import torch

Integers = npt.NDArray[np.int64]
_SOURCE: Final = Path(__file__).with_name("many.c")
#: Below lie tensors whose storage was freed, as their address is their offset, of 4 TiB at most; and the heap of some builds of
#: Python, and what CUDA reserves for segments that grow.
LOW: Final = 1 << 42
_POINTER: Final = ctypes.sizeof(ctypes.c_void_p)
_SECONDS: Final = 60.0  # for the compiler, which takes a tenth of one


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


class Library:
    """Its functions, and what DLPack calls dtypes: ``names``, by code, bits and lanes, of those that have a name there and are not
    complex; ``homonyms``: those whose name is another's, too, or may be. ``dtypes`` are all that count.

    Raises whatever a torch without the exchange API raises, or a machine without a compiler.
    """

    def __init__(self, dtypes: Iterable[torch.dtype]) -> None:
        if sysconfig.get_config_var("Py_GIL_DISABLED"):
            raise RuntimeError("its functions count on the interpreter's lock")
        pointer = ctypes.pythonapi.PyCapsule_GetPointer
        pointer.restype, pointer.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]
        api = _ExchangeAPI.from_address(pointer(torch.Tensor.__dlpack_c_exchange_api__, b"dlpack_exchange_api"))
        if api.major != 1 or not api.dltensor_from_py_object_no_sync:
            raise RuntimeError(f"DLPack {api.major}.{api.minor}")
        self._describe: int = api.dltensor_from_py_object_no_sync
        holding, releasing = _load()
        self._storage = storage_place()
        pointers, integers, objects = ctypes.c_void_p, ctypes.c_int32, ctypes.py_object
        self._addresses, self._gather = holding.addresses, releasing.gather
        self._addresses.restype, self._gather.restype = ctypes.c_int64, None
        self._addresses.argtypes = [
            *(pointers, objects, objects, objects, objects, objects, objects, ctypes.c_int64),
            *(pointers, pointers, integers, integers, ctypes.c_int64, integers, pointers),
        ]
        self._gather.argtypes = [pointers, pointers, pointers, ctypes.c_int64, pointers]
        found = {dtype: self._name(dtype) for dtype in dtypes if not dtype.is_complex}
        self.names = {dtype: name for dtype, name in found.items() if name is not None}
        counts = Counter(self.names.values())
        shared = {dtype for dtype, name in self.names.items() if counts[name] > 1}
        self.homonyms = frozenset({torch.int8, torch.uint8} | shared)

    def _name(self, dtype: torch.dtype) -> tuple[int, int, int] | None:
        try:
            # A view: of some dtypes torch makes no tensor in its deterministic mode, which fills them.
            found = self.described(torch.zeros(dtype.itemsize, dtype=torch.uint8, device="cpu").view(dtype))
        except RuntimeError:  # bits
            return None
        return found.code, found.bits, found.lanes

    def described(self, tensor: torch.Tensor) -> _DLTensor:
        """What points to memory in it is only good while the tensor is."""
        result = _DLTensor()
        call = ctypes.PYFUNCTYPE(ctypes.c_int, ctypes.py_object, ctypes.POINTER(_DLTensor))(self._describe)
        call(tensor, ctypes.byref(result))  # raises what torch raises
        return result

    def addresses(
        self, rows: list[torch.Tensor], count: int, wanted: int, sizes: int, kind: int, index: int, found: Integers
    ) -> int:
        """See ``many.c``: how many rows are as wanted; their addresses are in ``found`` then."""
        if type(rows) is not list:
            return 0
        asked = (torch.Tensor.is_neg, False, torch.Tensor.storage_offset, torch.Tensor, torch.nn.Parameter)
        there = (wanted, sizes, kind, index, LOW, self._storage, found.ctypes.data)
        done: int = self._addresses(self._describe, *asked, rows, count, *there)
        return done

    def gather(self, sources: Integers, places: Integers, sizes: Integers, target: int) -> None:
        """Copy ``sizes`` bytes from these addresses to ``places`` bytes after ``target``. Other threads run meanwhile."""
        self._gather(sources.ctypes.data, places.ctypes.data, sizes.ctypes.data, len(sizes), target)


def storage_place() -> int:
    """Bytes from the beginning of torch's structure of a tensor to its pointer to the storage, for who wants to have that fetched;
    0 if it is not found, or the structure is not where the code looks for it: behind the head of the tensor's object."""
    tensor: Any = torch.zeros(1, device="cpu")
    try:
        inner, storage = tensor._cdata, tensor.untyped_storage()._cdata
    except Exception:  # they are torch's own
        return 0
    if torch.Tensor.__basicsize__ < object.__basicsize__ + _POINTER or _word(id(tensor) + object.__basicsize__) != inner:
        return 0
    return next((place for place in range(_POINTER, 5 * _POINTER, _POINTER) if _word(inner + place) == storage), 0)


def _word(address: int) -> int:
    return ctypes.c_size_t.from_address(address).value


def _load() -> tuple[ctypes.PyDLL, ctypes.CDLL]:
    """Twice, as functions are called that hold the interpreter's lock, and some that do not. In a folder that is gone again then:
    nobody else can have put into it what is loaded, and nothing is out of date."""
    named = shlex.split(os.environ.get("CC", "")) or [name for name in ("cc", "gcc", "clang") if shutil.which(name)][:1]
    if not named:
        raise FileNotFoundError("no C compiler")
    with tempfile.TemporaryDirectory(prefix="rollout_core-", ignore_cleanup_errors=True) as folder:
        made = f"{folder}/many.so"
        # Freestanding: with the compiler's own headers, and those of no C library.
        words = [*named, "-O2", "-shared", "-fPIC", "-ffreestanding", "-x", "c", str(_SOURCE), "-o", made]
        subprocess.run(words, check=True, capture_output=True, stdin=subprocess.DEVNULL, timeout=_SECONDS)
        return ctypes.PyDLL(made), ctypes.CDLL(made)
