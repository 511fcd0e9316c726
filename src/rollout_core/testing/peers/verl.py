"""verl's three ways to put weights into buckets: grouping for SGLang, split chunks for NCCL, and the shared-memory sender for
vLLM."""

from __future__ import annotations

import asyncio
import contextlib
import copy
import os
import tempfile
import threading
import traceback
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch

from rollout_core.testing.peers.common import Named, Slots, WouldHangError, as_given, copied, finish, nothing, run_in_thread
from rollout_core.testing.peers.loading import Overlay, PeerPackage, replaced

_TYPES_ONLY = "names types and base classes of the worker and manager classes, which are not used"
PACKAGE = PeerPackage(
    "verl",
    "0.9.1",
    "verl",
    run_init=["verl.plugin.platform"],
    stubs={
        "ray": "starts workers and finds nodes; the bucket code runs inside a worker and calls neither",
        "ray.util": "the package of ray.util.collective",
        "ray.util.collective": "carries the NCCL broadcast; the adapter puts a hand-over of tensors in its place",
        "cupy": "makes and fills the send buffer on a GPU; the adapter puts torch in its place",
        "uvicorn": "serves HTTP; verl.workers.rollout.utils imports it beside ensure_async_iterator, which is what is used",
        "fastapi": "the same",
        "yaml": "the same",
        "verl.utils.tokenizer": "the same",
        "verl.workers.config": _TYPES_ONLY,
        "verl.workers.config.rollout": _TYPES_ONLY,
        "verl.workers.rollout": _TYPES_ONLY,
        "verl.single_controller.base": _TYPES_ONLY,
        "verl.single_controller.base.decorator": _TYPES_ONLY,
        "verl.single_controller.ray": _TYPES_ONLY,
        "verl.utils.distributed": "starts the process group of a worker, which there is none of",
        "verl.utils.import_utils": "loads plugins of the manager, which is not used",
        "verl.utils.ray_utils": "decorates methods of the manager, which is not used",
    },
)
LINGER_MS = 1000


class NamedTensorBuckets:
    """``get_named_tensor_buckets`` of verl/workers/rollout/sglang_rollout/utils.py.

    It groups and copies nothing: a bucket is a list of pairs, and to unpack is to read the lists. Its fusion groups are tuples of
    name suffixes that must share what comes before them; whole names are suffixes too, and are passed as such.
    """

    capabilities = frozenset({"oversize=own", "iterators", "async", "groups"})

    def __init__(self) -> None:
        self._function = PACKAGE.load("verl.workers.rollout.sglang_rollout.utils").get_named_tensor_buckets

    def pack(
        self, named_tensors: Iterable[Named], capacity: int, groups: Sequence[Sequence[str]] = ()
    ) -> list[list[Named]] | Iterator[list[Named]]:
        return as_given(named_tensors, self._pack(named_tensors, capacity, groups))

    def _pack(self, named_tensors: Iterable[Named], capacity: int, groups: Sequence[Sequence[str]]) -> Iterator[list[Named]]:
        buckets = self._function(named_tensors, capacity, fusion_groups=tuple(tuple(group) for group in groups))
        try:
            while True:
                try:
                    bucket: list[Named] = finish(buckets.__anext__())
                except StopAsyncIteration:
                    return
                yield bucket
        finally:
            finish(buckets.aclose())

    def apack(self, named_tensors: AsyncIterator[Named], capacity: int) -> AsyncIterator[list[Named]]:
        buckets: AsyncIterator[list[Named]] = self._function(named_tensors, capacity)
        return buckets

    def unpack(self, buckets: Iterable[list[Named]]) -> list[Named]:
        return [pair for bucket in buckets for pair in bucket]

    def bucket_nbytes(self, bucket: list[Named]) -> int:
        return sum(tensor.nbytes for _, tensor in bucket)


@dataclass
class ChunkBucket:
    """One broadcast of the NCCL engine: the metadata that goes over zmq, and the part of the send buffer that was filled.

    ``capacity`` is the bucket size of both engines' configuration."""

    metadata: dict[str, Any]
    payload: torch.Tensor
    capacity: int


class _Sent:
    """The sending engine's socket and collective: what both carried is kept, the payload copied as a broadcast would."""

    def __init__(self, capacity: int) -> None:
        self.buckets: list[ChunkBucket] = []
        self._capacity = capacity
        self._metadata: dict[str, Any] = {}

    def send_string(self, topic: str, flags: int = 0) -> None:
        """The topic that zmq subscribers filter by."""

    def send_pyobj(self, metadata: dict[str, Any]) -> None:
        self._metadata = copy.deepcopy(metadata)  # as sending it would

    def broadcast(self, payload: torch.Tensor, src_rank: int, group_name: str) -> None:
        self.buckets.append(ChunkBucket(self._metadata, payload.clone(), self._capacity))


class _Received:
    """The receiving engine's socket and collective."""

    def __init__(self, buckets: Iterable[ChunkBucket]) -> None:
        self._pending = deque(buckets)

    def recv_string(self) -> str:
        if not self._pending:
            raise WouldHangError("the receiver waits for a bucket that the sender never sends: none was marked as the last")
        return "bucket_metadata"

    def recv_pyobj(self) -> Any:
        return copy.deepcopy(self._pending[0].metadata)

    def broadcast(self, payload: torch.Tensor, src_rank: int, group_name: str) -> None:
        payload.copy_(self._pending.popleft().payload)


class SplitChunks:
    """``NCCLCheckpointEngine`` of verl/checkpoint_engine/nccl_checkpoint_engine.py with ``split_weight_chunks`` and
    ``merge_weight_chunks`` of base.py, which it shares with the HCCL and NIXL engines.

    ``send_weights`` of a source and ``receive_weights`` of a rollout rank run as they are: splitting, filling and swapping of the
    two buffers, offsets, the end marker, merging. Stand-ins: torch buffers for the cupy buffers of ``prepare``, and in the
    module's globals ``cp.asarray`` (a view on the GPU, the tensor itself here), ``collective.broadcast`` (a hand-over) and
    ``torch.cuda.synchronize``. Received weights are views of a buffer that is reused two buckets later, so each is copied when it
    is yielded, as verl's ``BucketedWeightSender``, its consumer for vLLM, does.
    """

    capabilities = frozenset({"oversize=split"})

    def __init__(self) -> None:
        self._module = PACKAGE.load("verl.checkpoint_engine.nccl_checkpoint_engine")

    def pack(self, named_tensors: list[Named], capacity: int) -> list[ChunkBucket]:
        sent = _Sent(capacity)
        self._run(sent, 0, capacity, lambda engine: engine.send_weights(iter(named_tensors)))
        return sent.buckets

    def unpack(self, buckets: Iterable[ChunkBucket]) -> list[Named]:
        buckets = list(buckets)
        received: list[Named] = []

        async def consume(engine: Any) -> None:
            async for name, weight in engine.receive_weights():
                received.append((name, copied(weight)))

        self._run(_Received(buckets), 1, buckets[0].capacity if buckets else 0, consume)
        return received

    def _run(self, link: Any, rank: int, capacity: int, use: Callable[[Any], Awaitable[None]]) -> None:
        """Use an engine of this rank. The attributes are those that ``prepare`` and ``init_process_group`` set."""
        engine = self._module.NCCLCheckpointEngine(bucket_size=capacity)
        engine.rank, engine.world_size, engine.num_senders, engine.socket = rank, 2, 1, link
        engine.send_buf = torch.zeros(capacity, dtype=torch.uint8)
        engine.recv_buf = torch.zeros(capacity, dtype=torch.uint8)

        async def main() -> None:
            await use(engine)

        stand_ins = {
            "cp": SimpleNamespace(asarray=lambda chunk: chunk),
            "collective": SimpleNamespace(broadcast=link.broadcast),
            "torch": Overlay(torch, cuda=Overlay(torch.cuda, synchronize=nothing)),
        }
        with PACKAGE, replaced(self._module, **stand_ins):
            run_in_thread(lambda: asyncio.run(main()))

    def bucket_nbytes(self, bucket: ChunkBucket) -> int:
        return bucket.payload.nbytes

    def slots(self, bucket: ChunkBucket) -> Slots:
        return [(chunk.name, chunk.offset, chunk.chunk_size) for chunk in bucket.metadata["bucket_meta"].values()]

    def buffer(self, bucket: ChunkBucket) -> torch.Tensor:
        return bucket.payload


@dataclass
class SharedBucket:
    """One bucket as the receiver's callback saw it: copies of its tensors, and where in the shared buffer each of them lay."""

    named_tensors: list[Named]
    offsets: list[int]


class SharedMemoryTransfer:
    """``BucketedWeightSender`` and ``BucketedWeightReceiver`` of verl/workers/rollout/vllm_rollout/bucketed_weight_transfer.py.

    Both run with ``use_shm=True`` in two threads, over a real zmq ipc socket and real shared memory. ``bucket_size`` is set in
    bytes after construction; the constructor takes megabytes. The callback copies what it is given, because the buffer is reused.
    A tensor over the bucket size is an assertion with shared memory (only the CUDA path sends it aside).

    Stand-ins in the module's globals: ``get_torch_device``, of which only synchronize, empty_cache and ipc_collect are called,
    and ``is_support_ipc``, which is False on the devices that use shared memory. Each side gets a zmq context of its own in place
    of the process-wide one: verl waits without a limit, and to end the context of the other side is the one way to end its wait.
    """

    capabilities = frozenset({"oversize=error"})

    def __init__(self) -> None:
        self._module = PACKAGE.load("verl.workers.rollout.vllm_rollout.bucketed_weight_transfer")
        # The sender imports ensure_async_iterator from it when it runs; stubs hand out names only while a module is loaded here.
        PACKAGE.load("verl.workers.rollout.utils")

    def pack(self, named_tensors: list[Named], capacity: int) -> list[SharedBucket]:
        import zmq  # type: ignore[import-not-found,unused-ignore]

        buckets: list[SharedBucket] = []

        def on_bucket_received(weights: list[Named], is_last: bool) -> None:
            # Received tensors are views of the shared uint8 buffer: their storage offsets are their places in it.
            offsets = [int(tensor.storage_offset()) * tensor.element_size() for _, tensor in weights]
            buckets.append(SharedBucket([(name, copied(tensor)) for name, tensor in weights], offsets))

        device = SimpleNamespace(synchronize=nothing, empty_cache=nothing, ipc_collect=nothing)
        with (
            tempfile.TemporaryDirectory(prefix="verl") as folder,
            PACKAGE,
            replaced(self._module, get_torch_device=lambda: device, is_support_ipc=lambda: False),
        ):
            address = f"ipc://{os.path.join(folder, 'zmq')}"
            sender = self._module.BucketedWeightSender(address, use_shm=True)
            sender.bucket_size = capacity
            receiver = self._module.BucketedWeightReceiver(address, device=torch.device("cpu"), use_shm=True)
            sender.zmq_context, receiver.zmq_context = contexts = zmq.Context(), zmq.Context()
            for context in contexts:
                # Not 0: the receiver closes its socket right after the last answer. Not endless: nobody may be left to read it.
                context.setsockopt(zmq.LINGER, LINGER_MS)
            _run_both(
                (sender, lambda: asyncio.run(sender.async_send_weights(iter(named_tensors)))),
                (receiver, lambda: receiver.receive_weights(on_bucket_received)),
            )
        return buckets

    def unpack(self, buckets: Iterable[SharedBucket]) -> list[Named]:
        return [pair for bucket in buckets for pair in bucket.named_tensors]

    def bucket_nbytes(self, bucket: SharedBucket) -> int:
        return max((offset + nbytes for _, offset, nbytes in self.slots(bucket)), default=0)

    def slots(self, bucket: SharedBucket) -> Slots:
        return [(name, offset, tensor.nbytes) for (name, tensor), offset in zip(bucket.named_tensors, bucket.offsets, strict=True)]


def _run_both(*sides: tuple[Any, Callable[[], None]]) -> None:
    """Run verl's sender and receiver in a thread each. When one fails, the other's wait is ended; the first failure is raised."""
    failures: list[BaseException] = []
    done = threading.Semaphore(0)

    def run(side: Any, call: Callable[[], None]) -> None:
        try:
            call()
        except BaseException as error:
            failures.append(error)
        finally:
            # verl's own clean-up does not get as far as the socket when the shared memory before it refuses to close.
            if side.socket is not None:
                side.socket.close()
            done.release()

    threads = [threading.Thread(target=run, args=side, name="verl", daemon=True) for side in sides]
    for thread in threads:
        thread.start()
    done.acquire()
    if not failures:
        done.acquire()
    # All is done, or one side failed: then calls that block on the other's socket raise, and it is closed by its own thread.
    for side, _ in sides:
        side.zmq_context.term()
    for thread in threads:
        thread.join()
    if failures:
        first = _first_cause(failures[0])
        _release(failures, [side for side, _ in sides])
        raise first


def _first_cause(error: BaseException) -> BaseException:
    """What went wrong first. While an error is on its way its frames hold views of the shared memory, so that closing it in
    verl's clean-up fails with a BufferError of its own."""
    while isinstance(error, BufferError) and error.__context__ is not None:
        error = error.__context__
    return error


def _release(failures: list[BaseException], sides: list[Any]) -> None:
    """Free what verl leaves behind in that case: a mapping on either side, and the name, which would outlive the process."""
    for failure in failures:
        error: BaseException | None = failure
        while error is not None:
            traceback.clear_frames(error.__traceback__)
            error = error.__context__
    for side in sides:
        if side.shm is not None:
            with contextlib.suppress(BufferError):  # the error itself may hold a view, among its arguments
                side.shm.close()
    sender = sides[0]
    if sender.shm is not None:
        sender.shm.unlink()
