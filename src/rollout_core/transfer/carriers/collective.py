"""Over a torch.distributed group: buckets by broadcast (gloo on the CPU, NCCL on GPUs), messages over TCP.

Everything is agreed on by messages before the first collective of an update, and a broken update is moved to the end of what was
announced: an end that fails alone leaves no other one waiting in a collective. One that dies or stops does; the group is aborted
then, and of no further use.
"""

from __future__ import annotations

import hmac
import secrets
import socket
import time
from contextlib import suppress
from typing import Any, Final

import msgspec
import torch
import torch.distributed as dist

from rollout_core.errors import TransferError
from rollout_core.transfer.carriers.contract import Moving
from rollout_core.transfer.carriers.links import LinkedReceiver, LinkedSender
from rollout_core.transfer.carriers.slots import make_slots

_ADDRESS_NBYTES: Final = 512
_LENGTH_NBYTES: Final = 2
_TOKEN_NBYTES: Final = 16
_RANK_NBYTES: Final = 4


class _Address(msgspec.Struct, frozen=True, array_like=True):
    host: str
    port: int
    token: bytes  # whoever connects shows it: the port is open to others too


class _Broadcasts:
    """The group's side: one broadcast after the other, each in the background until it is asked about."""

    def __init__(self, group: dist.ProcessGroup | None, src: int, device: torch.device | str | None) -> None:
        group = dist.group.WORLD if group is None else group
        if group is None:
            raise TransferError("torch.distributed has no process group yet; call init_process_group first")
        self.group: dist.ProcessGroup = group
        self.rank, self.size = dist.get_rank(self.group), dist.get_world_size(self.group)
        if not 0 <= src < self.size:
            raise TransferError(f"src is {src}; ranks of this group go from 0 to {self.size - 1}")
        self._src = dist.get_global_rank(self.group, src)
        nccl = "nccl" in str(dist.get_backend(self.group))
        self.device = torch.device(device or ("cuda" if nccl else "cpu"))
        self._under_way: list[Any] = []

    def start(self, buffer: torch.Tensor) -> Moving | None:
        if not buffer.numel():
            return None
        try:
            work = dist.broadcast(buffer, src=self._src, group=self.group, async_op=True)
        except RuntimeError as error:  # torch's own class for whatever the backend says
            raise TransferError(f"the broadcast failed: {error}") from error
        self._under_way.append(work)
        return lambda: self._is_over(work)

    def _is_over(self, work: Any) -> bool:
        if not work.is_completed():
            return False
        self._under_way.remove(work)
        try:
            work.wait()
            if self.device.type == "cuda":  # read on whatever stream the receiver likes
                torch.cuda.current_stream(self.device).synchronize()
        except RuntimeError as error:
            raise TransferError(f"the broadcast failed: {error}") from error
        return True

    def exchange(self, address: bytes | None) -> bytes:
        """The sender's address, at every rank: the one collective that comes before messages, always of one size."""
        data = torch.zeros(_ADDRESS_NBYTES, dtype=torch.uint8)
        if address is not None:
            data[: len(address)] = torch.frombuffer(bytearray(address), dtype=torch.uint8)
        data = data.to(self.device)
        try:
            dist.broadcast(data, src=self._src, group=self.group)
        except RuntimeError as error:
            raise TransferError(f"the group cannot broadcast: {error}") from error
        return data.cpu().numpy().tobytes()

    def abort(self) -> None:
        """Give up broadcasts that are under way: the group is of no use after."""
        if any(not work.is_completed() for work in self._under_way):
            with suppress(RuntimeError):
                self.group.abort()
        self._under_way.clear()


class CollectiveSender(LinkedSender):
    """The sender's end, at rank ``src`` of ``group`` (None: the default group). Receivers are the other ranks, in their order.

    All ranks make their ends at the same time, within ``timeout`` seconds. ``device``: where slots are; by default the GPU in use
    with NCCL, else the CPU. ``host``: this machine's name or address as the receivers reach it. Give it a group that nothing else
    uses: an update that loses a rank aborts the group.
    """

    rendezvous: Final = True

    def __init__(
        self,
        group: dist.ProcessGroup | None = None,
        *,
        src: int = 0,
        device: torch.device | str | None = None,
        host: str | None = None,
        timeout: float = 60.0,
    ) -> None:
        self._broadcasts = _Broadcasts(group, src, device)
        if self._broadcasts.rank != src:
            raise TransferError(f"this is rank {self._broadcasts.rank}, and the sender is rank {src}")
        token = secrets.token_bytes(_TOKEN_NBYTES)
        others = [rank for rank in range(self._broadcasts.size) if rank != src]
        with socket.create_server(("", 0), backlog=len(others) or 1) as listener:
            address = _Address(host or socket.gethostname(), listener.getsockname()[1], token)
            self._broadcasts.exchange(_encode(address))
            came = _accept(listener, token, others, timeout)
        super().__init__([came[rank] for rank in others])
        self._slots: list[torch.Tensor] = []

    def lay_out(self, slots: int, nbytes: int) -> tuple[list[torch.Tensor], bytes]:
        self._links.check_open()
        self._slots = make_slots(self._slots, slots, nbytes, self._broadcasts.device)
        return list(self._slots), b""

    def push(self, slot: int, nbytes: int) -> Moving | None:
        return self._broadcasts.start(self._slots[slot][:nbytes])

    def close(self) -> None:
        super().close()
        self._broadcasts.abort()
        self._slots.clear()


class CollectiveReceiver(LinkedReceiver):
    """A receiver's end, at any other rank than ``src``. Arguments: see ``CollectiveSender``."""

    def __init__(
        self,
        group: dist.ProcessGroup | None = None,
        *,
        src: int = 0,
        device: torch.device | str | None = None,
        timeout: float = 60.0,
    ) -> None:
        self._broadcasts = _Broadcasts(group, src, device)
        if self._broadcasts.rank == src:
            raise TransferError(f"this is rank {src}, which is the sender")
        address = _decode(self._broadcasts.exchange(None))
        ours = _connect(address, timeout)
        ours.sendall(address.token + self._broadcasts.rank.to_bytes(_RANK_NBYTES, "little"))
        super().__init__([ours])
        self._slots: list[torch.Tensor] = []

    def open(self, ticket: bytes, slots: int, nbytes: int) -> None:
        del ticket
        self._slots = make_slots(self._slots, slots, nbytes, self._broadcasts.device)

    def pull(self, slot: int, nbytes: int) -> Moving | None:
        return self._broadcasts.start(self._slots[slot][:nbytes])

    def view(self, slot: int, nbytes: int) -> torch.Tensor:
        return self._slots[slot][:nbytes]

    def close(self) -> None:
        super().close()
        self._broadcasts.abort()
        self._slots.clear()


def _encode(address: _Address) -> bytes:
    """An address with its length before it: the broadcast has a fixed size."""
    encoded = msgspec.msgpack.encode(address)
    if len(encoded) > _ADDRESS_NBYTES - _LENGTH_NBYTES:
        raise TransferError(f"host {address.host[:40]!r}... is longer than a name can be")
    return len(encoded).to_bytes(_LENGTH_NBYTES, "little") + encoded


def _decode(data: bytes) -> _Address:
    length = int.from_bytes(data[:_LENGTH_NBYTES], "little")
    try:
        return msgspec.msgpack.decode(data[_LENGTH_NBYTES : _LENGTH_NBYTES + length], type=_Address)
    except msgspec.MsgspecError as error:
        raise TransferError(f"what the sender broadcast is no address; is its rank the one that src says? {error}") from error


def _connect(address: _Address, timeout: float) -> socket.socket:
    try:
        ours = socket.create_connection((address.host, address.port), timeout)
    except OSError as error:
        raise TransferError(
            f"the sender cannot be reached at {address.host}:{address.port} ({error}); "
            "pass CollectiveSender host=, a name or address of its machine that this one knows"
        ) from error
    _tune(ours)
    return ours


def _accept(listener: socket.socket, token: bytes, ranks: list[int], timeout: float) -> dict[int, socket.socket]:
    """The connections of these ranks; what shows no token is turned away."""
    deadline = time.monotonic() + timeout
    came: dict[int, socket.socket] = {}
    try:
        while len(came) < len(ranks):
            listener.settimeout(_left(deadline))
            one, _ = listener.accept()
            rank = _rank_of(one, token, deadline)
            if rank in ranks and rank not in came:
                _tune(one)
                came[rank] = one
            else:
                one.close()
        return came
    except BaseException as error:
        for one in came.values():
            one.close()
        if isinstance(error, TimeoutError):
            missing = [rank for rank in ranks if rank not in came]
            raise TransferError(f"ranks {missing} did not connect within {timeout:g} s") from error
        raise


def _rank_of(one: socket.socket, token: bytes, deadline: float) -> int | None:
    one.settimeout(_left(deadline))
    greeting = b""
    with suppress(OSError):
        while len(greeting) < _TOKEN_NBYTES + _RANK_NBYTES and (more := one.recv(_TOKEN_NBYTES + _RANK_NBYTES - len(greeting))):
            greeting += more
    if not hmac.compare_digest(greeting[:_TOKEN_NBYTES], token):
        return None
    return int.from_bytes(greeting[_TOKEN_NBYTES:], "little")


def _tune(one: socket.socket) -> None:
    """Small messages leave at once, and a machine that is gone is found out."""
    one.settimeout(None)
    one.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    one.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)


def _left(deadline: float) -> float:
    return max(0.001, deadline - time.monotonic())
