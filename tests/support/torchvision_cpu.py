"""Lets the CUDA build of torchvision, the only one on PyPI, be imported beside a CPU build of torch.

Its C library cannot be loaded then, and ``torchvision/_meta_registrations.py`` registers fake kernels for two operators that this
library would have declared. They are declared here, without kernels: transforms work, ``nms`` does not.
"""

from __future__ import annotations

import sys
from typing import Any

_declared: list[Any] = []


class _BeforeTorchvision:
    def find_spec(self, name: str, path: object = None, target: object = None) -> None:
        if name != "torchvision":
            return
        sys.meta_path.remove(self)
        import torch

        if torch.version.cuda is None:
            library = torch.library.Library("torchvision", "DEF")
            for operator in ("nms", "qnms"):
                library.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
            _declared.append(library)  # operators live as long as their library


def prepare() -> None:
    """Call before anything imports torchvision."""
    if "torchvision" not in sys.modules and not any(
        type(finder).__name__ == _BeforeTorchvision.__name__ for finder in sys.meta_path
    ):
        sys.meta_path.insert(0, _BeforeTorchvision())
