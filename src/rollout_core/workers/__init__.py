"""Rollout workers behind one contract: weights in buckets, batched generation, digests read back.

Imports no engine until a worker is made.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any, Final

from rollout_core.workers.contract import Completion, RolloutBatch, SamplingParams, to_batch

if TYPE_CHECKING:
    from rollout_core.workers.group import RolloutGroup
    from rollout_core.workers.hf.sharded import ShardedHFWorker
    from rollout_core.workers.hf.worker import HFWorker
    from rollout_core.workers.sglang.worker import SGLangServerWorker, SGLangWorker
    from rollout_core.workers.sharded import sync_sharded
    from rollout_core.workers.vllm.worker import VLLMServerWorker, VLLMWorker
    from rollout_core.workers.worker import SyncReport, Worker

__all__ = [
    "Completion",
    "HFWorker",
    "RolloutBatch",
    "RolloutGroup",
    "SGLangServerWorker",
    "SGLangWorker",
    "SamplingParams",
    "ShardedHFWorker",
    "SyncReport",
    "VLLMServerWorker",
    "VLLMWorker",
    "Worker",
    "sync_sharded",
    "to_batch",
]

_PLACES: Final = {
    "HFWorker": "rollout_core.workers.hf.worker",
    "RolloutGroup": "rollout_core.workers.group",
    "SGLangServerWorker": "rollout_core.workers.sglang.worker",
    "SGLangWorker": "rollout_core.workers.sglang.worker",
    "ShardedHFWorker": "rollout_core.workers.hf.sharded",
    "SyncReport": "rollout_core.workers.worker",
    "VLLMServerWorker": "rollout_core.workers.vllm.worker",
    "VLLMWorker": "rollout_core.workers.vllm.worker",
    "Worker": "rollout_core.workers.worker",
    "sync_sharded": "rollout_core.workers.sharded",
}


def __getattr__(name: str) -> Any:
    if name in _PLACES:
        return getattr(importlib.import_module(_PLACES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
