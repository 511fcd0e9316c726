"""What the ranks of a trainer with FSDP2 do that updates an engine on ranks of its own."""

from __future__ import annotations

import importlib
from contextlib import nullcontext
from typing import Any

import torch
import torch.distributed as dist

from rollout_core.workers import SamplingParams, sync_sharded
from support.sharded import TIMEOUT, shard, trainer

LENGTH = 10


def updates(
    rank: int, folder: str, start: str, prompts: list[list[int]], seeds: list[int], dtype: torch.dtype | None
) -> list[dict[str, Any]]:
    """An update from each of these seeds' models, by rank 0, whose engine ``start`` (``module:name``) gives; what it found then."""
    module, _, name = start.partition(":")
    found = []
    with getattr(importlib.import_module(module), name)(folder) if rank == 0 else nullcontext() as worker:
        dist.barrier()  # an engine takes longer to start than an update waits for a rank
        for seed in seeds:
            report = sync_sharded(worker, shard(trainer(folder, seed=seed)), capacity=50_000, dtype=dtype, timeout=TIMEOUT)
            if worker is not None:
                completions = worker.generate(prompts, SamplingParams(response_length=LENGTH, ignore_eos=True))
                found.append(
                    {
                        "report": report,
                        "ranks": worker.ranks,
                        "values": worker.reads_values,
                        "algorithm": worker.digest_algorithm,
                        "digests": worker.tensor_digests(),
                        "tokens": [list(one.token_ids) for one in completions],
                    }
                )
        dist.barrier()
    return found
