"""Moonshot's checkpoint-engine: registration in host memory, buckets made of it, and the worker's view of a bucket."""

from __future__ import annotations

import contextlib
import copy
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch

from rollout_core.testing.peers.common import Named, Slots, nothing
from rollout_core.testing.peers.loading import Overlay, PeerPackage, replaced

PACKAGE = PeerPackage("checkpoint-engine", "0.4.2", "checkpoint_engine", run_init=["checkpoint_engine.distributed"])
NAME = "checkpoint"
FREE_BYTES = 1 << 50  # so that the bucket size follows the configuration and not the memory of a device


@dataclass
class Update:
    """One step of an update: the payload that goes over zmq to the worker, and the buffer that both map."""

    payload: list[dict[str, Any]]
    buffer: torch.Tensor


class ParameterServerBuckets:
    """``_register_checkpoint``, ``ParameterServer._detect_bucket_size``, ``_gen_h2d_buckets``, ``ParameterServer._copy_to_buffer``,
    ``_to_named_tensor`` and the worker's ``_extract_weights`` of checkpoint_engine, in the order of ``_update_per_bucket``.

    The interface takes a dict of tensors, so pairs become one, as its users' do. The capacity is what PS_MAX_BUCKET_SIZE_GB says;
    the peer raises it for all buckets to the size of the largest tensor. Each bucket gets a buffer of its own size in place of
    the halves of one double buffer, which the peer reuses after the worker's answer. Stand-ins in the modules' globals:
    ``torch.empty`` with ``pin_memory`` left out (host memory is pinned for speed, and only with CUDA), ``dist.all_reduce`` (one
    rank), ``os.getenv`` for that one variable and ``logger``; and a device that has memory and nothing to synchronise.
    """

    capabilities = frozenset({"oversize=own"})

    def __init__(self) -> None:
        self._ps = PACKAGE.load("checkpoint_engine.ps")
        self._pin_memory = PACKAGE.load("checkpoint_engine.pin_memory")
        self.align: int = self._pin_memory._ALIGN_SIZE
        self._worker = PACKAGE.load("checkpoint_engine.worker")
        self._types = PACKAGE.load("checkpoint_engine.data_types")

    @contextlib.contextmanager
    def _on_cpu(self, capacity: int) -> Iterator[None]:
        def empty(*size: int, pin_memory: bool = False, **options: Any) -> torch.Tensor:
            return torch.empty(*size, **options)

        def getenv(name: str, default: str | None = None) -> str | None:
            # Exact: the division by a power of two loses nothing, and neither does the peer's multiplication.
            return repr(capacity / (1 << 30)) if name == "PS_MAX_BUCKET_SIZE_GB" else os.getenv(name, default)

        quiet = SimpleNamespace(info=nothing, warning=nothing, error=nothing, exception=nothing)
        with (
            PACKAGE,
            replaced(self._pin_memory, torch=Overlay(torch, empty=empty), logger=quiet),
            replaced(self._ps, os=Overlay(os, getenv=getenv), dist=SimpleNamespace(all_reduce=nothing), logger=quiet),
        ):
            yield

    def _server(self) -> Any:
        """A ParameterServer of one rank, with the attributes that its constructor takes from a device and a process group."""
        server = object.__new__(self._ps.ParameterServer)
        module = SimpleNamespace(mem_get_info=lambda: (FREE_BYTES, FREE_BYTES), synchronize=nothing)
        server.device_manager = SimpleNamespace(device_type="cpu", device_module=module)
        server._rank = server._local_rank = 0
        server._mem_fraction, server._zmq_addr_counter = 1.0, 0
        server._p2p_store, server._current_shared_memory_pool_user = None, ""
        server._memory_pool, server._current_global_parameter_metas = {}, {}
        return server

    def pack(self, named_tensors: list[Named], capacity: int) -> list[Update]:
        types, server = self._types, self._server()
        with self._on_cpu(capacity):
            pool = self._ps._register_checkpoint(files=[], named_tensors=dict(named_tensors), rank=0)
            server._memory_pool[NAME] = pool
            if pool:  # as gather_metas does: a rank with nothing registered is left out
                metas = [types.MemoryBufferMetas(metas=x.metas, ptr=x.buffer.data_ptr(), size=x.size) for x in pool]
                server._current_global_parameter_metas[0] = types.MemoryBufferMetaList(
                    p2p_store_addr=None, memory_buffer_metas_list=metas, rdma_device=""
                )
            else:
                with replaced(self._ps, dist=SimpleNamespace(is_initialized=lambda: True)):
                    server._update_per_bucket(NAME, nothing, None)  # its first line refuses an update of nothing
            bucket_size, _ = server._detect_bucket_size(None)
            return [
                self._update(server, bucket)
                for _, _, bucket in self._ps._gen_h2d_buckets(server._current_global_parameter_metas, bucket_size, {}, {})
            ]

    def _update(self, server: Any, bucket: Any) -> Update:
        buffer = torch.empty(bucket.size, dtype=torch.uint8)
        server._copy_to_buffer(NAME, bucket, buffer)
        return Update(copy.deepcopy(self._ps._to_named_tensor(bucket.items)), buffer)

    def unpack(self, buckets: Iterable[Update]) -> list[Named]:
        return [pair for update in buckets for pair in self._worker._extract_weights(update.payload, update.buffer)]

    def bucket_nbytes(self, bucket: Update) -> int:
        return bucket.buffer.nbytes

    def slots(self, bucket: Update) -> Slots:
        return [(item["name"], item["offset"], item["dtype"].itemsize * item["shape"].numel()) for item in bucket.payload]

    def buffer(self, bucket: Update) -> torch.Tensor:
        return bucket.buffer
