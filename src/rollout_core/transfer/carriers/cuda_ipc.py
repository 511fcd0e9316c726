"""Between processes on the GPUs of one machine: slots in one's GPU memory, mapped by the others; messages over Unix sockets.

The bytes are not copied on the way to a receiver on the same GPU, and once to one on another. The memory is the CUDA runtime's own
(cudaMalloc and cudaIpcGetMemHandle), not torch's caching allocator's: its handles come with a counter file in /dev/shm, which a
killed process leaves behind; these leave nothing.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import cache
from typing import Any, Final
from weakref import WeakValueDictionary

import msgspec
import torch

from rollout_core.errors import TransferError
from rollout_core.transfer.carriers import unix
from rollout_core.transfer.carriers.contract import Moving
from rollout_core.transfer.carriers.links import LinkedReceiver, LinkedSender
from rollout_core.transfer.carriers.slots import Ticket, read_ticket

_ALIGN: Final = 512  # bytes, as cudaMalloc itself aligns
_PAGE: Final = 2 << 20  # bytes of a GPU's large page
_HANDLE_NBYTES: Final = 64  # CUDA_IPC_HANDLE_SIZE
_LAZY_PEER_ACCESS: Final = 1  # cudaIpcMemLazyEnablePeerAccess
_BY_ADDRESS: Final = 4  # cudaMemcpyDefault: the addresses say which GPU each is on


class _Handle(ctypes.Structure):
    _fields_ = (("reserved", ctypes.c_char * _HANDLE_NBYTES),)


class _Memory:
    """GPU memory at an address, which torch can make tensors of while it lives."""

    def __init__(self, address: int, nbytes: int) -> None:
        self.address, self.nbytes = address, nbytes
        self.__cuda_array_interface__ = {"shape": (nbytes,), "typestr": "|u1", "data": (address, False), "version": 3}

    def bytes(self) -> torch.Tensor:
        return torch.as_tensor(self)  # on the device that has the address; naming another would copy


#: What this process has exported, by its handle: CUDA maps no memory into the process that has it.
_EXPORTED: Final[WeakValueDictionary[bytes, _Memory]] = WeakValueDictionary()


class CudaSlots:
    """GPU memory for the slots of one ``CudaIpcSender`` after the other, kept until ``free``: to allocate it for each costs time.

    ``device``: the GPU, by default the one in use. It is used again only when the sender before has ended, and its receivers do not
    read any more.
    """

    def __init__(self, device: torch.device | str = "cuda") -> None:
        self.device = _check_device(device)
        self._memory: _Memory | None = None

    @property
    def nbytes(self) -> int:
        """Bytes that it holds."""
        return 0 if self._memory is None else self._memory.nbytes

    def take(self, nbytes: int) -> _Memory:
        """At least so much memory. ``TransferError`` if it cannot be had."""
        if self._memory is None or self._memory.nbytes < nbytes:
            self.free()
            self._memory = _allocate(nbytes, self.device)
        return self._memory

    def free(self) -> None:
        """Give the memory back to the GPU. A second call is harmless."""
        memory, self._memory = self._memory, None
        if memory is not None:
            _call("cudaFree", ctypes.c_void_p(memory.address), device=self.device)

    def __del__(self) -> None:
        with suppress(Exception):  # at the interpreter's end there may be nothing left to call
            self.free()


class CudaIpcSender(LinkedSender):
    """The sender's end. ``sockets``: as for ``MemorySender``. ``device``: the GPU that slots are on, by default the one in use.
    ``slots``: memory that outlives this end, on its own device then.

    Memory of its own is kept between updates, and freed by ``close``: close the receivers first, or let them end.
    """

    rendezvous: Final = False

    def __init__(
        self, sockets: Sequence[unix.HasFileno | int], *, device: torch.device | str = "cuda", slots: CudaSlots | None = None
    ) -> None:
        self._device = _check_device(device) if slots is None else slots.device
        self._slots = slots
        self._memory: _Memory | None = None
        self._outgrown: list[_Memory] = []  # mapped by receivers until they open the next
        super().__init__(unix.stream_sockets(sockets))

    @classmethod
    def listen(
        cls,
        name: str,
        receivers: int = 1,
        *,
        device: torch.device | str = "cuda",
        timeout: float = 60.0,
        check: Callable[[], None] | None = None,
        slots: CudaSlots | None = None,
    ) -> CudaIpcSender:
        """Wait for ``receivers`` processes of the same user to ``CudaIpcReceiver.connect`` to ``name``: see ``unix.listen``."""
        sockets = unix.listen(name, receivers, timeout, check)
        return unix.joined(lambda sockets: cls(sockets, device=device, slots=slots), sockets)

    def lay_out(self, slots: int, nbytes: int) -> tuple[list[torch.Tensor], bytes]:
        self._links.check_open()
        stride = max(1, -(-nbytes // _ALIGN)) * _ALIGN
        memory = self._room(slots * stride)
        whole = memory.bytes()
        handle = _Handle()
        _call("cudaIpcGetMemHandle", ctypes.byref(handle), ctypes.c_void_p(memory.address), device=self._device)
        ticket = Ticket(stride, slots * stride, ctypes.string_at(ctypes.byref(handle), _HANDLE_NBYTES))
        _EXPORTED[ticket.handle] = memory
        return [whole[slot * stride :][:nbytes] for slot in range(slots)], msgspec.msgpack.encode(ticket)

    def _room(self, nbytes: int) -> _Memory:
        if self._slots is not None:
            return self._slots.take(nbytes)
        if self._memory is None or not nbytes <= self._memory.nbytes < nbytes + _PAGE:
            if self._memory is not None:
                self._outgrown.append(self._memory)
            self._memory = _allocate(nbytes, self._device)
        return self._memory

    def push(self, slot: int, nbytes: int) -> Moving | None:
        """Written where it is read, once the work of the current stream is done."""
        del slot, nbytes
        event = torch.cuda.current_stream(self._device).record_event()
        return event.query  # type: ignore[no-any-return]

    def close(self) -> None:
        super().close()
        memory, self._memory = [*self._outgrown, *filter(None, [self._memory])], None
        self._outgrown.clear()
        for block in memory:
            _call("cudaFree", ctypes.c_void_p(block.address), device=self._device)


class CudaIpcReceiver(LinkedReceiver):
    """A receiver's end. ``device``: the GPU in use here; the sender's, or one that reaches its memory directly. On another GPU each
    bucket is copied to it when it is read, and takes as much memory there until it was."""

    def __init__(self, one: unix.HasFileno | int, *, device: torch.device | str = "cuda") -> None:
        self._device = _check_device(device)
        self._ticket = Ticket(0, 0)
        self._memory: _Memory | None = None
        self._is_mapped = False
        super().__init__([unix.stream_socket(one)])

    @classmethod
    def connect(cls, name: str, *, device: torch.device | str = "cuda", timeout: float = 60.0) -> CudaIpcReceiver:
        """Connect to the sender that listens at ``name``; it may start to within ``timeout`` seconds. ``TransferError`` after."""
        with unix.connect(name, timeout) as one:
            return cls(one, device=device)

    def open(self, ticket: bytes, slots: int, nbytes: int) -> None:
        new = read_ticket(ticket, slots, nbytes)
        if len(new.handle) != _HANDLE_NBYTES:
            raise TransferError(f"the sender sends a handle of {len(new.handle)} bytes; CUDA IPC has handles of {_HANDLE_NBYTES}")
        if self._memory is not None and new == self._ticket:
            return
        self._unmap()
        own = _EXPORTED.get(new.handle)  # the sender is in another thread
        if own is not None:
            self._memory, self._ticket = own, new
            return
        address = ctypes.c_void_p()
        handle = _Handle.from_buffer_copy(new.handle)
        _call("cudaIpcOpenMemHandle", ctypes.byref(address), handle, ctypes.c_uint(_LAZY_PEER_ACCESS), device=self._device)
        self._memory, self._ticket, self._is_mapped = _Memory(address.value or 0, new.total), new, True

    def view(self, slot: int, nbytes: int) -> torch.Tensor:
        if self._memory is None:
            raise TransferError("the sender's memory is not open")
        start = slot * self._ticket.stride
        there = self._memory.bytes()[start:][:nbytes]
        if there.device == self._device or not nbytes:
            return there
        # By this GPU's own stream: torch's copy would be the other's, and make this process a context on it.
        here = torch.empty(nbytes, dtype=torch.uint8, device=self._device)
        address = ctypes.c_void_p(self._memory.address + start)
        stream = ctypes.c_void_p(torch.cuda.current_stream(self._device).cuda_stream)
        count, kind = ctypes.c_size_t(nbytes), ctypes.c_int(_BY_ADDRESS)
        _call("cudaMemcpyAsync", ctypes.c_void_p(here.data_ptr()), address, count, kind, stream, device=self._device)
        return here

    def close(self) -> None:
        super().close()
        self._unmap()

    def _unmap(self) -> None:
        memory, self._memory = self._memory, None
        is_mapped, self._is_mapped = self._is_mapped, False
        if memory is not None and is_mapped:
            _call("cudaIpcCloseMemHandle", ctypes.c_void_p(memory.address), device=self._device)


def _check_device(device: torch.device | str) -> torch.device:
    found = torch.device(device)
    if found.type != "cuda" or not torch.cuda.is_available():
        raise TransferError(f"device is {str(device)!r}, and this carrier is for CUDA GPUs ({torch.cuda.device_count()} are here)")
    return torch.device("cuda", torch.cuda.current_device() if found.index is None else found.index)


def _allocate(nbytes: int, device: torch.device) -> _Memory:
    """At least so many bytes, in whole large pages. Of 15,231,233,024 bytes, a part of a page more than 7,262, an H200 reads half
    as fast in the process that maps them as in the one that has them; in whole pages as fast (docs/gpu.md)."""
    nbytes = -(-nbytes // _PAGE) * _PAGE
    address = ctypes.c_void_p()
    try:
        _call("cudaMalloc", ctypes.byref(address), ctypes.c_size_t(nbytes), device=device)
    except TransferError:  # torch keeps what was freed, and gives it back to its own allocations only
        torch.cuda.empty_cache()
        _call("cudaMalloc", ctypes.byref(address), ctypes.c_size_t(nbytes), device=device)
    return _Memory(address.value or 0, nbytes)


@cache
def _runtime() -> Any:
    """The CUDA runtime that torch has loaded."""
    major = (torch.version.cuda or "").partition(".")[0]
    torch.cuda.current_device()  # loads it
    try:
        return ctypes.CDLL(f"libcudart.so.{major}")
    except OSError as error:
        raise TransferError(f"torch's CUDA runtime, libcudart.so.{major}, cannot be called: {error}") from error


def _call(name: str, *arguments: Any, device: torch.device) -> None:
    """Call the runtime on a device. ``TransferError`` with its words for an error."""
    with torch.cuda.device(device):
        code = getattr(_runtime(), name)(*arguments)
    if code:
        # The runtime keeps it, and torch, which looks after each launch of its own, would take it for the launch's.
        _runtime().cudaGetLastError()
        words = _runtime().cudaGetErrorString
        words.restype = ctypes.c_char_p
        raise TransferError(f"{name} failed with {code}: {words(code).decode()}")
