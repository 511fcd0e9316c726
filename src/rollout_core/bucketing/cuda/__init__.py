"""Packing, unpacking and digests on a GPU. Importing this does not import Triton, and nothing outside has to know of it: the
functions of ``bucketing`` come here by themselves when the tensors are on a GPU, and to torch's operations when they are not."""

from __future__ import annotations

import torch


def possible(device: torch.device) -> bool:
    """Whether kernels may serve this device: what is asked before ``launching`` is imported, which says whether they do."""
    return device.type == "cuda"
