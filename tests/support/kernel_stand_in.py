"""What the kernels do, byte by byte through addresses on the CPU: what stands in for them where there is no Triton."""

from __future__ import annotations

import ctypes

import numpy as np
import torch

from rollout_core.bucketing.digest import block_multilinear_by_torch


def gather(table, buffer, *, digest):
    image = bytearray(table.nbytes)
    for base, start, end in zip(*(column.tolist() for column in (table.bases, table.row_starts, table.row_ends)), strict=True):
        image[start:end] = ctypes.string_at(base + start, end - start)
    ctypes.memmove(buffer.data_ptr(), bytes(image), table.nbytes)
    return Lanes(digest_lanes(buffer)) if digest else None


class Lanes:
    """What a device would be at work on."""

    def __init__(self, lanes):
        self._lanes = lanes

    def wait(self):
        return self._lanes


def copy(table):
    for some in (table.aligned, table.shifted, table.parts):
        if some is not None:
            for start, target, size in zip(*(column.tolist() for column in (some.starts, some.targets, some.sizes)), strict=True):
                ctypes.memmove(target, table.source + start, size)


def digest_lanes(buffer):
    return block_multilinear_by_torch(buffer.clone())


def digest_rows(device, addresses, sizes, firsts):
    lanes = np.zeros((len(sizes), 2), np.uint64)
    for row, (address, size, first) in enumerate(zip(addresses.tolist(), sizes.tolist(), firsts.tolist(), strict=True)):
        if size:
            payload = torch.frombuffer(bytearray(ctypes.string_at(address, size)), dtype=torch.uint8)
            lanes[row] = block_multilinear_by_torch(payload, first=first)
    return torch.from_numpy(lanes.view(np.int64)).to(device)
