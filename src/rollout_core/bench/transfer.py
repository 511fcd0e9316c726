"""Updates between two processes, beside a plain copy of the same bytes in one, and beside a plain gloo broadcast between both.

One update is packed (one copy), verified (one read on each side) and loaded (one copy). The receiver is this module, run by
``python -m``: it follows the sender's turns in step.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, Final

import torch
import torch.distributed as dist

from rollout_core.bench.timing import Timing, measure
from rollout_core.bucketing import plan_buckets, specs_of
from rollout_core.transfer import DirectWeights, receive, send
from rollout_core.transfer.carriers.collective import CollectiveReceiver, CollectiveSender
from rollout_core.transfer.carriers.memory import MemoryReceiver, MemorySender

TENSORS: Final = 24
NBYTES: Final = 1 << 30
CAPACITY: Final = 64 << 20
TIMEOUT: Final = 120.0
_WARMUP: Final = 2


def bench_transfer(repeats: int, threads: int) -> dict[str, dict[str, Timing]]:
    """For shared memory and for gloo the baselines and the updates, steady state. Both processes use one torch thread for an
    update; the plain copy is timed with one and with ``threads``."""
    source = _weights(1)
    return {"shared memory": _memory(source, repeats, threads), "gloo": _gloo(source, repeats)}


def _memory(source: dict[str, torch.Tensor], repeats: int, threads: int) -> dict[str, Timing]:
    name = f"bench-{os.getpid()}"
    target = {key: torch.zeros_like(tensor) for key, tensor in source.items()}

    def copy(count: int) -> None:
        torch.set_num_threads(count)
        for key, tensor in source.items():
            target[key].copy_(tensor)

    with _receiver("memory", name, repeats), MemorySender.listen(name, timeout=TIMEOUT) as end:
        candidates: dict[str, Callable[[], Any]] = {f"plain copy, {n} threads": partial(copy, n) for n in sorted({1, threads})}
        candidates |= {"update, verified": partial(_update, source, end, True), "update": partial(_update, source, end, False)}
        return measure(candidates, repeats=repeats, warmup=_WARMUP)


def _gloo(source: dict[str, torch.Tensor], repeats: int) -> dict[str, Timing]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    flat = torch.cat([tensor.view(torch.uint8).view(-1) for tensor in source.values()])
    with _receiver("gloo", str(port), repeats):
        dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=0, world_size=2)
        try:
            with CollectiveSender(host="127.0.0.1") as end:
                return measure(
                    {
                        "plain broadcast": partial(_broadcast, flat),
                        "update, verified": partial(_update, source, end, True),
                        "update": partial(_update, source, end, False),
                    },
                    repeats=repeats,
                    warmup=_WARMUP,
                )
        finally:
            dist.destroy_process_group()


def _update(source: dict[str, torch.Tensor], end: Any, verify: bool) -> None:
    torch.set_num_threads(1)
    plan = plan_buckets(specs_of(source), CAPACITY)
    send(plan, source, end, timeout=TIMEOUT, digest="auto" if verify else None)


def _broadcast(flat: torch.Tensor) -> None:
    dist.broadcast(flat, src=0)
    dist.barrier()  # at both ends, as an update is


def _weights(seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    size = NBYTES // TENSORS // 4
    return {f"w{i}": torch.randn(size, generator=generator) if seed else torch.zeros(size) for i in range(TENSORS)}


@contextmanager
def _receiver(kind: str, where: str, repeats: int) -> Iterator[None]:
    """The other process; ended if this one's part fails."""
    child = subprocess.Popen([sys.executable, "-m", __name__, kind, where, str(repeats)])
    try:
        yield
        child.wait(TIMEOUT)
    finally:
        child.kill()
        child.wait()


def _follow(kind: str, where: str, repeats: str) -> None:
    """The receiver's turns, as the sender's."""
    torch.set_num_threads(1)
    target = DirectWeights(_weights(0))
    turns = _WARMUP + int(repeats)
    if kind == "memory":
        with MemoryReceiver.connect(where, timeout=TIMEOUT) as end:
            _receive_both(end, target, turns, lambda: None)
        return
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{where}", rank=1, world_size=2)
    flat = torch.zeros(sum(tensor.nbytes for tensor in target.tensors.values()), dtype=torch.uint8)
    with CollectiveReceiver(timeout=TIMEOUT) as end:
        _receive_both(end, target, turns, lambda: _broadcast(flat))
    dist.destroy_process_group()


def _receive_both(end: Any, target: DirectWeights, turns: int, first: Callable[[], None]) -> None:
    for _ in range(turns):
        first()
        for verify in (True, False):
            receive(end, target, timeout=TIMEOUT, verify=verify)


if __name__ == "__main__":
    _follow(*sys.argv[1:])
