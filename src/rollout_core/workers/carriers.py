"""How a worker's weights get to its engine: through shared memory, or, from one GPU's memory to the engine on it, by CUDA IPC."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, Final, Literal, TypeAlias, get_args

import torch

from rollout_core.bucketing.sources import Source
from rollout_core.errors import TransferError, WorkerError
from rollout_core.transfer.carriers import unix
from rollout_core.transfer.carriers.contract import ReceiverEnd
from rollout_core.transfer.carriers.links import LinkedSender
from rollout_core.transfer.carriers.memory import MemorySender
from rollout_core.transfer.carriers.names import CarrierName, connect, listen
from rollout_core.transfer.targets import named_weights
from rollout_core.workers.engine import Update, rank_address

if TYPE_CHECKING:
    from rollout_core.transfer.carriers.cuda_ipc import CudaSlots

#: ``auto``: CUDA IPC where engine and source are on a GPU, else shared memory.
CarrierChoice: TypeAlias = Literal["auto", "memory", "cuda_ipc"]
_CHOICES: Final[tuple[str, ...]] = get_args(CarrierChoice)
_IPC: Final = "cudaIpc"  # so begin the names of the calls that share memory, with which their errors begin


def check_carrier_choice(choice: object, device: str) -> None:
    """Raise ``WorkerError`` for what is no choice, or no device, and for CUDA IPC to an engine that is on no GPU."""
    if choice not in _CHOICES:
        raise WorkerError(f"carrier is {choice!r}; it is one of {', '.join(map(repr, _CHOICES))}")
    if re.fullmatch(r"cpu|cuda(:[0-9]+)?", device) is None:
        raise WorkerError(f"device is {device!r}; it is 'cpu', 'cuda', or one of several GPUs, such as 'cuda:1'")
    if choice == "cuda_ipc" and not is_cuda(device):
        raise WorkerError(
            f"carrier is 'cuda_ipc', and the engine's device {device!r}: CUDA IPC reaches engines on a GPU; pass 'auto'"
        )


def is_cuda(device: str) -> bool:
    return device.partition(":")[0] == "cuda"


def receiver_of(update: Update, device: torch.device | str, rank: int = 0) -> ReceiverEnd:
    """The end of an update's carrier of one of the engine's ranks, for weights on ``device``. ``TransferError`` if the sender does
    not come in time, or its memory cannot be reached from there."""
    return connect(update.carrier, update.address_of(rank), device=device, timeout=update.timeout)


class Senders:
    """The sender's ends of a worker's updates, and the GPU memory that those by CUDA IPC keep between them.

    ``device``: where the engine has its weights, such as "cpu" or "cuda:0".
    """

    def __init__(self, choice: CarrierChoice, device: str) -> None:
        check_carrier_choice(choice, device)
        self._choice = choice
        self._device = device
        self._slots: CudaSlots | None = None

    def carrier_for(self, source: Source) -> CarrierName:
        """The carrier of an update from this source. ``WorkerError`` for CUDA IPC from a process that sees no GPU."""
        if self._choice == "cuda_ipc" and not torch.cuda.is_available():
            raise WorkerError("carrier is 'cuda_ipc', and this process sees no GPU: pass 'auto' or 'memory'")
        if self._choice == "auto":
            return "cuda_ipc" if is_cuda(self._device) and gpu_of(source) is not None else "memory"
        return self._choice

    def do_without_ipc(self, error: TransferError) -> bool:
        """Whether this update failed because a GPU's memory cannot be shared here. Updates go through shared memory then, from now
        on: with "auto", and a warning. Some containers are why, or GPUs that do not reach each other; it shows before anything has
        been loaded."""
        if self._choice != "auto" or _IPC not in str(error):
            return False
        self._choice = "memory"
        self.free()
        warnings.warn(
            f"the trainer's GPU memory cannot be shared with the engine ({error}): weights go through shared memory from now on; "
            "pass carrier='cuda_ipc' to be refused instead",
            RuntimeWarning,
            stacklevel=3,
        )
        return True

    def listen(
        self, carrier: CarrierName, source: Source, address: str, *, ranks: int = 1, timeout: float, check: Callable[[], None]
    ) -> LinkedSender:
        """The sender's end of one update, once each of the engine's ranks has connected to its ``rank_address``: they are its
        receivers, by their numbers. What it keeps is on the source's GPU, or that in use."""
        slots = self._slots_on(gpu_of(source)) if carrier == "cuda_ipc" else None
        if ranks == 1:
            return listen(carrier, address, timeout=timeout, check=check, slots=slots)
        sockets = unix.listen_each([rank_address(address, rank, ranks) for rank in range(ranks)], timeout, check)
        if slots is None:
            return unix.joined(MemorySender, sockets)
        from rollout_core.transfer.carriers.cuda_ipc import CudaIpcSender

        return unix.joined(lambda sockets: CudaIpcSender(sockets, slots=slots), sockets)

    def _slots_on(self, gpu: torch.device | None) -> CudaSlots:
        """Those that are kept, if they are on this GPU."""
        from rollout_core.transfer.carriers.cuda_ipc import CudaSlots

        slots = CudaSlots(gpu or "cuda")
        if self._slots is not None and self._slots.device == slots.device:
            return self._slots
        self.free()
        self._slots = slots
        return slots

    @property
    def nbytes(self) -> int:
        """GPU memory that is kept."""
        return 0 if self._slots is None else self._slots.nbytes

    def free(self) -> int:
        """Give back what is kept; the next update takes it anew. Returns its bytes."""
        nbytes = self.nbytes
        if self._slots is not None:
            self._slots.free()
        return nbytes


def gpu_of(source: Source) -> torch.device | None:
    """The GPU that a source's first tensor on one is on; None if none is. No tensor is made for it: a mapping of another kind than
    ``dict``, which may have to, is asked for its ``device``."""
    tensors: Iterable[Any] = ()
    if isinstance(source, torch.nn.Module):
        tensors = named_weights(source).values()
    elif isinstance(source, dict):
        tensors = source.values()
    elif isinstance(source, list | tuple):
        tensors = (tensor for _, tensor in source)
    elif isinstance(device := getattr(source, "device", None), str | torch.device):
        found = torch.device(device)
        return found if found.type == "cuda" else None
    return next((tensor.device for tensor in tensors if getattr(tensor, "is_cuda", False)), None)
