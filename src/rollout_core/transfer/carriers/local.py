"""Between threads of one process: slots are plain tensors, which both ends see."""

from __future__ import annotations

import socket
from typing import Final

import torch

from rollout_core.errors import TransferError
from rollout_core.transfer.carriers.contract import Moving
from rollout_core.transfer.carriers.links import LinkedReceiver, LinkedSender
from rollout_core.transfer.carriers.slots import make_slots


class LocalSender(LinkedSender):
    """The sender's end. ``device``: where the slots are."""

    rendezvous: Final = False

    def __init__(self, sockets: list[socket.socket], shared: list[torch.Tensor], device: torch.device | str) -> None:
        super().__init__(sockets)
        self._shared = shared
        self._device = device

    def lay_out(self, slots: int, nbytes: int) -> tuple[list[torch.Tensor], bytes]:
        self._links.check_open()
        self._shared[:] = make_slots(self._shared, slots, nbytes, self._device)
        return list(self._shared), b""

    def push(self, slot: int, nbytes: int) -> Moving | None:
        del nbytes
        if self._shared[slot].is_cuda:  # another thread may read on another stream
            torch.cuda.synchronize(self._shared[slot].device)
        return None

    def close(self) -> None:
        super().close()
        self._shared.clear()


class LocalReceiver(LinkedReceiver):
    """A receiver's end."""

    def __init__(self, sockets: list[socket.socket], shared: list[torch.Tensor]) -> None:
        super().__init__(sockets)
        self._shared = shared
        self._slots: list[torch.Tensor] = []

    def open(self, ticket: bytes, slots: int, nbytes: int) -> None:
        del ticket
        self._slots = list(self._shared)
        if [slot.numel() for slot in self._slots] != [nbytes] * slots:
            raise TransferError(f"the sender has laid out {len(self._slots)} slots, and says {slots} of {nbytes} bytes")

    def view(self, slot: int, nbytes: int) -> torch.Tensor:
        return self._slots[slot][:nbytes]

    def close(self) -> None:
        super().close()
        self._slots.clear()


def local_carrier(receivers: int = 1, *, device: torch.device | str = "cpu") -> tuple[LocalSender, list[LocalReceiver]]:
    """A sender's end and its receivers', each for a thread of its own."""
    shared: list[torch.Tensor] = []
    pairs = [socket.socketpair() for _ in range(receivers)]
    return LocalSender([ours for ours, _ in pairs], shared, device), [LocalReceiver([theirs], shared) for _, theirs in pairs]
