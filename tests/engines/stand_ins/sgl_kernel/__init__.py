"""Stands in for sgl_kernel on a CPU without AMX: SGLang imports its functions and, as ``torch.ops.sgl_kernel`` has none of them,
uses torch's own instead. One that is called nevertheless says so.

But for a few operators that ``models/qwen3_5.py`` looks up as it is imported, which the processor of all Qwen models imports. They
are declared, and nothing more: torch refuses to run them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

import torch

__version__ = "0.0.0+standin"


def __getattr__(name: str) -> Callable[..., Any]:
    if name.startswith("__"):
        raise AttributeError(name)

    def missing(*args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError(f"sgl_kernel.{name} needs a GPU or AMX; this is a stand-in")

    missing.__name__ = name
    return missing


_OPERATORS: Final = torch.library.Library("sgl_kernel", "FRAGMENT")  # which last as long as it
for _name in (
    "fused_sigmoid_mul_cpu",
    "fused_qk_gemma_rmsnorm_cpu",
    "fused_qk_gemma_rmsnorm_with_gate_cpu",
    "fused_qkvzba_split_reshape_cat_contiguous_cpu",
):
    _OPERATORS.define(f"{_name}(Tensor first) -> Tensor")
