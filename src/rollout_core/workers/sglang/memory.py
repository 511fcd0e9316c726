"""The memory of GPUs in use, by whomever, as the driver says it. It takes no CUDA context, which would take memory itself."""

from __future__ import annotations

import ctypes
from collections.abc import Iterable
from typing import Any, Final

from rollout_core.errors import WorkerError

_LIBRARY: Final = "libnvidia-ml.so.1"


class _Memory(ctypes.Structure):  # nvmlMemory_t
    _fields_ = (("total", ctypes.c_ulonglong), ("free", ctypes.c_ulonglong), ("used", ctypes.c_ulonglong))


def used_memory(gpus: Iterable[str]) -> int:
    """Bytes in use on all of these GPUs together. ``gpus``: their ids, ``GPU-`` and a UUID. ``WorkerError`` if the driver does not
    say it."""
    ids = sorted(set(gpus))
    if not ids:
        return 0
    try:
        nvml = ctypes.CDLL(_LIBRARY)
    except OSError as error:
        raise WorkerError(f"the memory of GPUs in use cannot be read: {error}; install NVIDIA's {_LIBRARY}") from error
    _call(nvml, "nvmlInit_v2")
    try:
        return sum(_used(nvml, gpu) for gpu in ids)
    finally:
        _call(nvml, "nvmlShutdown")


def _used(nvml: Any, gpu: str) -> int:
    handle, found = ctypes.c_void_p(), _Memory()
    _call(nvml, "nvmlDeviceGetHandleByUUID", gpu.encode(), ctypes.byref(handle))
    _call(nvml, "nvmlDeviceGetMemoryInfo", handle, ctypes.byref(found))
    return int(found.used)


def _call(nvml: Any, name: str, *arguments: Any) -> None:
    code = getattr(nvml, name)(*arguments)
    if code:
        words = nvml.nvmlErrorString
        words.restype = ctypes.c_char_p
        raise WorkerError(f"the memory of GPUs in use cannot be read: {name} failed with {code} ({words(code).decode()})")
