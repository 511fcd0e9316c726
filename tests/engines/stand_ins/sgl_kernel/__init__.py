"""Stands in for sgl_kernel on a CPU without AMX: SGLang imports its functions and, as ``torch.ops.sgl_kernel`` has none of them, uses
torch's own instead. One that is called nevertheless says so."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

__version__ = "0.0.0+standin"


def __getattr__(name: str) -> Callable[..., Any]:
    if name.startswith("__"):
        raise AttributeError(name)

    def missing(*args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError(f"sgl_kernel.{name} needs a GPU or AMX; this is a stand-in")

    missing.__name__ = name
    return missing
