"""A rank of an engine that is killed: what was under way ends within the timeouts, with words; nothing is left of the engine."""

from __future__ import annotations

import os
import signal
import time
from concurrent.futures import wait
from contextlib import suppress
from pathlib import Path

import pytest

from rollout_core.errors import TransferError, WorkerError
from support.engines import started

_GONE = 60.0  # seconds after close() until the last process of an engine is gone


def rank_process(worker, engine, rank):
    """The process of a rank, by the title that its engine gives it."""
    title = {"vllm": f"Worker_TP{rank}", "sglang": f"scheduler_TP{rank}"}[engine]
    found = [pid for pid in worker.processes() if title.encode() in Path(f"/proc/{pid}/cmdline").read_bytes()]
    assert len(found) == 1, f"{len(found)} processes are {title}"
    return found[0]


def kill_while(when, worker, engine, prompts, params, weights, *, capacity):
    """Kill the second rank in the middle of an update to ``weights``, of requests, or before an abort; then close the worker."""
    processes = started(worker.processes())
    victim = rank_process(worker, engine, 1)
    futures = worker.submit(prompts, params)
    start = time.monotonic()
    if when == "update":

        def kill(bucket):
            if bucket.index == 1:
                os.kill(victim, signal.SIGKILL)
            return bucket

        with pytest.raises(TransferError):
            worker.sync_weights(weights, capacity=capacity, inject=kill)
    else:
        os.kill(victim, signal.SIGKILL)
        if when == "abort":
            with suppress(TransferError, WorkerError):
                worker.abort()
    assert not wait(futures, timeout=2 * worker.timeout).not_done
    assert time.monotonic() - start < 2 * worker.timeout
    for future in futures:
        done = future.result()
        assert done.status in ("failed", "aborted") if when == "abort" else done.status == "failed"
        assert done.status == "aborted" or done.error
    print(f"\nkilled during {when}: {time.monotonic() - start:.1f} s, {futures[0].result().error}")
    with pytest.raises((TransferError, WorkerError)):
        worker.generate(prompts, params)
    with pytest.raises((TransferError, WorkerError)):
        worker.sync_weights(weights)
    worker.close()
    end = time.monotonic() + _GONE
    while (left := processes & started(pid for pid, _ in processes)) and time.monotonic() < end:
        time.sleep(0.1)
    assert not left
