"""verl's door: a checkpoint engine, by which verl brings an actor's weights to its rollout workers.

Importing this module registers it, in every process that verl tells to: ``checkpoint_engine.backend=rollout_core`` and
``checkpoint_engine.custom_backend_module=rollout_core.transfer.doors.verl``. Arguments of ``RolloutCoreCheckpointEngine`` beside
the first two are given under ``checkpoint_engine.engine_kwargs.rollout_core``.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncGenerator, Iterable
from functools import partial
from typing import Any

from verl.checkpoint_engine.base import CheckpointEngine, CheckpointEngineRegistry

from rollout_core.bucketing import BucketPlan
from rollout_core.bucketing.sources import Pair
from rollout_core.errors import TransferError
from rollout_core.transfer import receive, send_stream
from rollout_core.transfer.targets import CollectedWeights, own_copies


@CheckpointEngineRegistry.register("rollout_core")
class RolloutCoreCheckpointEngine(CheckpointEngine):  # type: ignore[misc]
    """One process's end: actor rank 0 sends, every rollout worker receives, on the same machine.

    The carrier is made anew for each update, with the workers that there are then. ``bucket_size``: bytes of a bucket, of which two
    are in flight; a larger tensor is split. ``carrier``: ``memory``, or ``cuda_ipc`` between GPUs. ``timeout``: seconds that either
    end bears the other's silence, longer than the engine takes over one bucket. ``staged``: yield nothing before everything has
    arrived, verified, in memory of its own; else an update that fails may have reached the engine in part.
    """

    def __init__(
        self,
        bucket_size: int,
        is_master: bool = False,
        *,
        carrier: str = "memory",
        timeout: float = 60.0,
        staged: bool = False,
    ) -> None:
        self._sender, self._receiver = _ends(carrier)
        self.bucket_size = bucket_size
        self.is_master = is_master
        self._timeout = timeout
        self._staged = staged
        self._carrier: Any = None

    def prepare(self) -> dict[str, Any]:
        """Where the sender will be found; nothing from any other process."""
        return {"address": secrets.token_hex(16)} if self.is_master else {}

    @classmethod
    def build_topology(
        cls, actor_wg_world_size: int, rollout_world_size: int, metadata: list[dict[str, Any]]
    ) -> tuple[dict[str, list[Any]], dict[str, list[Any]]]:
        """``init_process_group``'s arguments: how many receivers a process sends to (-1: it receives), and where."""
        address = metadata[0].get("address")
        if address is None:
            raise TransferError("actor rank 0 was not made with is_master, and gave no address")
        receivers = [rollout_world_size, *[0] * (actor_wg_world_size - 1)]
        return (
            {"receivers": receivers, "address": [address] * actor_wg_world_size},
            {"receivers": [-1] * rollout_world_size, "address": [address] * rollout_world_size},
        )

    def init_process_group(self, receivers: int, address: str) -> None:
        """Meet the others, within ``timeout`` seconds."""
        self.finalize()
        if receivers > 0:
            self._carrier = self._sender.listen(address, receivers, timeout=self._timeout)
        elif receivers < 0:
            self._carrier = self._receiver.connect(address, timeout=self._timeout)

    def finalize(self) -> None:
        """Let go of the carrier and its memory."""
        carrier, self._carrier = self._carrier, None
        if carrier is not None:
            carrier.close()

    async def send_weights(self, weights: Iterable[Pair], global_steps: int | None = None) -> dict[str, float]:
        """Returns what verl logs. Blocks its thread: what gives the weights may depend on being asked in it (the CUDA device)."""
        if self._carrier is None:
            for _ in weights:  # gathering each is the work of all actors
                pass
            return {}
        report = send_stream(
            weights, self._carrier, capacity=self.bucket_size, version=_wire_version(global_steps), timeout=self._timeout
        )
        return {"weight_transfer/bytes": report.nbytes, "weight_transfer/seconds": report.seconds}

    async def receive_weights(self, global_steps: int | None = None) -> AsyncGenerator[Pair, None]:
        """The tensors, in memory of their own: verl's rollouts gather several before they use the first.

        Ends when the update is committed, which it is not before the last tensor was taken (``staged``: had arrived). Raises if it
        failed; what was yielded is then part of an update, and the engine's weights are unusable. Left off, it fails at both ends.
        ``TransferError`` if the sender has another step.
        """
        if self._carrier is None:
            raise TransferError("receive_weights was called before init_process_group")
        take = partial(receive, self._carrier, timeout=self._timeout)
        if self._staged:
            report = await asyncio.to_thread(take, _Whole(global_steps))
            for name, tensor in (report.weights or {}).items():
                yield name, tensor
            return
        handover = _Handover(global_steps, asyncio.get_running_loop(), self._timeout)
        receiving = asyncio.ensure_future(asyncio.to_thread(take, handover))
        receiving.add_done_callback(handover.end)
        try:
            while (pairs := await handover.offered.get()) is not None:
                for pair in pairs:
                    yield pair
                handover.took()
        finally:
            handover.close()
            await asyncio.wait([receiving])
        receiving.result()


class _Whole(CollectedWeights):
    """All of an update, if it is of this step."""

    def __init__(self, global_steps: int | None) -> None:
        super().__init__()
        self._global_steps = global_steps

    def begin(self, plan: BucketPlan | None, version: int) -> None:
        if self._global_steps is not None and version != _wire_version(self._global_steps):
            raise TransferError(f"weights are asked for at step {self._global_steps}, and the sender sends step {version - 1}")
        super().begin(plan, version)


class _Handover(_Whole):
    """Bucket by bucket from the thread that receives to the coroutine that yields; the former waits until the latter is through."""

    def __init__(self, global_steps: int | None, loop: asyncio.AbstractEventLoop, timeout: float) -> None:
        super().__init__(global_steps)
        self.offered: asyncio.Queue[list[Pair] | None] = asyncio.Queue()
        self._loop = loop
        self._timeout = timeout
        self._taken: asyncio.Future[None] = loop.create_future()
        self._is_open = True

    def load(self, pairs: list[Pair]) -> None:
        """In the receiving thread."""
        offer = asyncio.run_coroutine_threadsafe(self._offer(own_copies(pairs)), self._loop)
        try:
            offer.result(self._timeout)
        except TimeoutError:
            offer.cancel()
            raise TransferError(f"whoever takes the weights took more than {self._timeout:g} s over one bucket") from None

    async def _offer(self, pairs: list[Pair]) -> None:
        if not self._is_open:
            raise TransferError("whoever takes the weights stopped before their end")
        self._taken = self._loop.create_future()
        self.offered.put_nowait(pairs)
        await self._taken

    def took(self) -> None:
        if not self._taken.done():
            self._taken.set_result(None)

    def end(self, receiving: asyncio.Future[Any]) -> None:
        self.offered.put_nowait(None)

    def close(self) -> None:
        """Nothing is taken any more."""
        self._is_open = False
        if not self._taken.done():
            self._taken.set_exception(TransferError("whoever takes the weights stopped before their end"))
            self._taken.exception()  # seen: there may be nobody to wait for it


def _ends(carrier: str) -> tuple[Any, Any]:
    """The classes of a carrier's two ends, which ``listen`` and ``connect``."""
    if carrier == "memory":
        from rollout_core.transfer.carriers.memory import MemoryReceiver, MemorySender

        return MemorySender, MemoryReceiver
    if carrier == "cuda_ipc":
        from rollout_core.transfer.carriers.cuda_ipc import CudaIpcReceiver, CudaIpcSender

        return CudaIpcSender, CudaIpcReceiver
    raise TransferError(f"carrier is {carrier!r}; it is 'memory' or 'cuda_ipc'")


def _wire_version(global_steps: int | None) -> int:
    """Of a carrier that is made anew for each update, whose versions begin at 1; verl's steps begin at 0, and may repeat."""
    return 1 if global_steps is None else global_steps + 1
