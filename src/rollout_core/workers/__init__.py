"""Rollout workers behind one contract: weights in buckets, batched generation, digests read back.

Imports no engine until a worker is made.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rollout_core.workers.contract import Completion, RolloutBatch, SamplingParams, to_batch

if TYPE_CHECKING:
    from rollout_core.workers.hf import HFWorker, SyncReport

__all__ = ["Completion", "HFWorker", "RolloutBatch", "SamplingParams", "SyncReport", "to_batch"]


def __getattr__(name: str) -> Any:
    if name in ("HFWorker", "SyncReport"):
        from rollout_core.workers import hf

        return getattr(hf, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
