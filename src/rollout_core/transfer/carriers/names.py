"""The carriers between processes of one machine by name, which a configuration or a message can say. Each is imported when used."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Final, Literal, TypeAlias, get_args

import torch

from rollout_core.errors import TransferError
from rollout_core.transfer.carriers.contract import ReceiverEnd
from rollout_core.transfer.carriers.links import LinkedSender

if TYPE_CHECKING:
    from rollout_core.transfer.carriers.cuda_ipc import CudaSlots

#: ``memory``: slots in shared memory. ``cuda_ipc``: slots in the sender's GPU memory, which receivers map.
CarrierName: TypeAlias = Literal["memory", "cuda_ipc"]
NAMES: Final[tuple[str, ...]] = get_args(CarrierName)


def listen(
    name: str,
    address: str,
    receivers: int = 1,
    *,
    timeout: float = 60.0,
    check: Callable[[], None] | None = None,
    slots: CudaSlots | None = None,
) -> LinkedSender:
    """The sender's end, once ``receivers`` processes of the same user have connected to ``address``: see ``unix.listen``.

    ``slots``: for ``cuda_ipc``, memory that outlives this end; by default memory of its own on the GPU in use. ``TransferError``
    for a carrier that is not known.
    """
    match name:
        case "memory":
            from rollout_core.transfer.carriers.memory import MemorySender

            return MemorySender.listen(address, receivers, timeout=timeout, check=check)
        case "cuda_ipc":
            from rollout_core.transfer.carriers.cuda_ipc import CudaIpcSender

            return CudaIpcSender.listen(address, receivers, timeout=timeout, check=check, slots=slots)
    raise _unknown(name)


def connect(name: str, address: str, *, device: torch.device | str = "cpu", timeout: float = 60.0) -> ReceiverEnd:
    """A receiver's end for weights on ``device``, at the other side of ``listen``, which may start within ``timeout`` seconds.
    ``TransferError`` after that, and for a carrier that is not known or does not reach this device."""
    match name:
        case "memory":
            from rollout_core.transfer.carriers.memory import MemoryReceiver

            return MemoryReceiver.connect(address, timeout=timeout)
        case "cuda_ipc":
            from rollout_core.transfer.carriers.cuda_ipc import CudaIpcReceiver

            return CudaIpcReceiver.connect(address, device=device, timeout=timeout)
    raise _unknown(name)


def _unknown(name: str) -> TransferError:
    return TransferError(f"carrier is {name!r}; it is one of {', '.join(map(repr, NAMES))}")
