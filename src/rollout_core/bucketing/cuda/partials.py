"""Lanes that programs on a GPU write straight into the host's memory: there is nothing to copy once they are done."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from rollout_core.bucketing.digest import Lanes


class Partials:
    """``memory``: the lanes of each program, int64 of shape [programs, 2] on the host, pinned for a GPU. The kernels that write it
    are launched within a ``with`` of this, on the current stream, and only ``wait`` waits for them."""

    def __init__(self, device: torch.device, programs: int) -> None:
        self._device = device
        self._done: torch.cuda.Event | None = None
        self.memory = torch.empty((programs, 2), dtype=torch.int64, device="cpu", pin_memory=device.type == "cuda")

    def __enter__(self) -> Partials:
        return self

    def __exit__(self, *error: object) -> None:
        """After an error, too: some kernels may have been launched before it."""
        if self._device.type == "cuda":
            self._done = torch.cuda.current_stream(self._device).record_event()
            _written.keep(self._done, self.memory)

    def wait(self) -> Lanes:
        if self._done is not None:
            self._done.synchronize()
        totals = self.memory.numpy().view(np.uint64).sum(0, dtype=np.uint64)
        return int(totals[0]), int(totals[1])


class _Written:
    """Memory that a GPU may still write to. torch would give it to others as soon as nobody here has it, since it does not know of
    kernels that are not its own."""

    def __init__(self) -> None:
        self._kept: dict[int, tuple[Any, torch.Tensor]] = {}  # by id; threads need no lock for what is one operation of a dict

    def keep(self, done: torch.cuda.Event, memory: torch.Tensor) -> None:
        """Until ``done`` has happened, and somebody comes with other memory."""
        self._kept[id(memory)] = (done, memory)
        for key, (event, _) in list(self._kept.items()):
            if _has_happened(event):
                self._kept.pop(key, None)


def _has_happened(event: Any) -> bool:
    """Not where it cannot be told, as for one that a CUDA graph captured, whose replays write again."""
    try:
        return bool(event.query())
    except RuntimeError:
        return False


_written = _Written()
