"""Ranks of a torch.distributed group over gloo, as processes that are forked from one which has imported everything once."""

from __future__ import annotations

import importlib
import multiprocessing
import os
import tempfile
import threading
import time
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_PRELOAD = [
    "torch",
    "torch.distributed.fsdp",
    "torch.distributed.tensor",
    "torch.distributed.algorithms._checkpoint.checkpoint_wrapper",
    "transformers.models.qwen2.modeling_qwen2",
    "rollout_core.preflight.models",
    "rollout_core.testing.oracles",
    "rollout_core.workers.hf.engine",
    "rollout_core.workers.hf.sharded",
]


@dataclass(frozen=True)
class Ended:
    """How one rank ended: what its function returned, or the traceback of what it raised; None and its exit code if it said
    nothing. ``seconds``: after the start of all of them."""

    value: Any
    error: str | None
    exitcode: int | None
    seconds: float


def values_of(ended: list[Ended]) -> list[Any]:
    """What each rank returned; an assertion says, in full, what some raised."""
    errors = [f"rank {rank}: {one.error}" for rank, one in enumerate(ended) if one.error is not None]
    assert not errors, "\n".join(errors)
    return [one.value for one in ended]


def run_ranks(
    size: int, function: str, *arguments: Any, timeout: float = 240.0, until: int | None = None, **environment: str
) -> list[Ended]:
    """Call ``module:name`` with the rank and these arguments on each rank. Ranks that are left after ``timeout`` seconds are
    killed, and say so in ``error``; so are the others once the rank ``until`` has ended. ``environment``: variables that they
    have, with ``{rank}`` filled in."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_PRELOAD)
    with tempfile.TemporaryDirectory() as folder:
        start = time.monotonic()
        pipes, processes = [], []
        for rank in range(size):
            ours, theirs = context.Pipe(duplex=False)
            process = context.Process(
                target=_rank, args=(rank, size, folder, function, arguments, environment, theirs), daemon=False
            )
            process.start()
            theirs.close()
            pipes.append(ours)
            processes.append(process)
        said: list[tuple[Any, str | None, float] | None] = [None] * size
        left = set(range(size))
        while left and time.monotonic() < start + timeout and (until is None or until in left):
            for ready in multiprocessing.connection.wait([pipes[rank] for rank in left], 0.2):
                rank = pipes.index(ready)
                left.remove(rank)
                try:
                    said[rank] = (*ready.recv(), time.monotonic() - start)
                except EOFError:
                    said[rank] = (None, None, time.monotonic() - start)
        for rank in left:
            said[rank] = (None, f"killed after {time.monotonic() - start:.1f} s", time.monotonic() - start)
            processes[rank].kill()
        for process in processes:
            process.join(10.0)
            if process.is_alive():
                process.kill()
                process.join()
        return [Ended(*one[:2], process.exitcode, one[2]) for one, process in zip(said, processes, strict=True)]


def _rank(
    rank: int, size: int, folder: str, function: str, arguments: tuple[Any, ...], environment: dict[str, str], pipe: Any
) -> None:
    import torch
    import torch.distributed as dist
    import tqdm

    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    os.environ.update({name: value.format(rank=rank) for name, value in environment.items()})
    torch.set_num_threads(1)
    tqdm.tqdm.set_lock(threading.RLock())  # its own is a semaphore of the system, which ranks that die leave behind
    try:
        backend = environment.get("ROLLOUT_CORE_BACKEND", "gloo")
        if "nccl" in backend:
            torch.cuda.set_device(rank)
        dist.init_process_group(backend, init_method=f"file://{Path(folder) / 'store'}", rank=rank, world_size=size)
        module, _, name = function.partition(":")
        result = (getattr(importlib.import_module(module), name)(rank, *arguments), None)
    except BaseException:
        result = (None, traceback.format_exc())
    pipe.send(result)
    pipe.close()
    os._exit(0)  # not by way of the group's end, which may wait for a rank that is gone
