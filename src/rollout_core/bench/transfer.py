"""Updates between two processes, beside copies of the same bytes without any protocol.

One update is packed (one copy), verified (one read on each side) and loaded (one copy): beside one plain copy its bound is two of
them, by both processes at once, unless a bucket is still in the cache when the receiver reads it. The receiver is this module, run
by ``python -m``: it does what it is told, a word a turn.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import IO, Any, Final

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
SLOTS: Final = 2
SMALL_CAPACITY: Final = 4 << 20  # with its slots it stays in the last cache of most processors
SMALL_SLOTS: Final = 4
TIMEOUT: Final = 120.0
_WARMUP: Final = 2
Tensors = dict[str, torch.Tensor]


def bench_transfer(repeats: int, threads: int) -> dict[str, dict[str, Timing]]:
    """For shared memory and for gloo the baselines and the updates, steady state. Each process uses one torch thread; one plain
    copy is timed with ``threads``, too."""
    source = _weights(1)
    return {"shared memory": _memory(source, repeats, threads), "gloo": _gloo(source, repeats)}


def _memory(source: Tensors, repeats: int, threads: int) -> dict[str, Timing]:
    name = f"bench-{os.getpid()}"
    target = _weights(0)
    with receiver(__name__, "memory", name) as other, MemorySender.listen(name, timeout=TIMEOUT) as end:
        candidates: dict[str, Callable[[], Any]] = {
            f"plain copy, {count} threads": partial(_copy, source, target, count) for count in sorted({1, threads})
        }
        candidates["plain copies in two processes at once"] = partial(_copy_together, source, target, other)
        return measure(candidates | _updates(source, end, other, small=True), repeats=repeats, warmup=_WARMUP)


def _gloo(source: Tensors, repeats: int) -> dict[str, Timing]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    flat = _flat(source)
    slots = _slots()
    with receiver(__name__, "gloo", str(port)) as other:
        dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=0, world_size=2)
        try:
            with CollectiveSender(host="127.0.0.1") as end:
                candidates = {
                    "plain broadcast": other.together("broadcast", partial(_broadcast, flat)),
                    "copied, broadcast and copied by hand": other.together("hand", partial(_send_by_hand, flat, slots)),
                }
                return measure(candidates | _updates(source, end, other), repeats=repeats, warmup=_WARMUP)
        finally:
            dist.destroy_process_group()


def _updates(source: Tensors, end: Any, other: Other, *, small: bool = False) -> dict[str, Callable[[], Any]]:
    """Updates with and without digests."""
    sizes = [(CAPACITY, SLOTS)] + ([(SMALL_CAPACITY, SMALL_SLOTS)] if small else [])
    candidates = {}
    for capacity, slots in sizes:
        plan = plan_buckets(specs_of(source), capacity)
        for verify in (True, False):
            name = f"update, {slots} slots of {capacity >> 20} MiB" + (", verified" if verify else "")
            update = partial(send, plan, source, end, slots=slots, timeout=TIMEOUT, digest="auto" if verify else None)
            candidates[name] = other.together("verified" if verify else "unverified", update)
    return candidates


def _copy(source: Tensors, target: Tensors, threads: int) -> None:
    torch.set_num_threads(threads)
    for name, tensor in source.items():
        target[name].copy_(tensor)
    torch.set_num_threads(1)


def _copy_together(source: Tensors, target: Tensors, other: Other) -> None:
    other.tell("copy")
    _copy(source, target, 1)
    other.wait()


def _broadcast(flat: torch.Tensor) -> None:
    dist.broadcast(flat, src=0)
    dist.barrier()  # at both ends, as an update is


def _send_by_hand(flat: torch.Tensor, slots: list[torch.Tensor]) -> None:
    """What a trainer would write: while one part is broadcast, the next is copied."""
    under_way = None
    for part, slot in zip(torch.split(flat, CAPACITY), _cycle(slots), strict=False):
        slot[: len(part)].copy_(part)
        if under_way is not None:
            under_way.wait()
        under_way = dist.broadcast(slot[: len(part)], src=0, async_op=True)
    assert under_way is not None
    under_way.wait()
    dist.barrier()


def _receive_by_hand(flat: torch.Tensor, slots: list[torch.Tensor]) -> None:
    came: tuple[torch.Tensor, torch.Tensor] | None = None
    for part, slot in zip(torch.split(flat, CAPACITY), _cycle(slots), strict=False):
        under_way = dist.broadcast(slot[: len(part)], src=0, async_op=True)
        if came is not None:
            came[0].copy_(came[1])
        under_way.wait()
        came = part, slot[: len(part)]
    assert came is not None
    came[0].copy_(came[1])
    dist.barrier()


def _cycle(slots: list[torch.Tensor]) -> Iterator[torch.Tensor]:
    while True:
        yield from slots


def _slots() -> list[torch.Tensor]:
    return [torch.zeros(CAPACITY, dtype=torch.uint8) for _ in range(SLOTS)]


def _flat(tensors: Tensors) -> torch.Tensor:
    return torch.cat([tensor.view(torch.uint8).view(-1) for tensor in tensors.values()])


def _weights(seed: int) -> Tensors:
    generator = torch.Generator().manual_seed(seed)
    size = NBYTES // TENSORS // 4
    return {f"w{i}": torch.randn(size, generator=generator) if seed else torch.zeros(size) for i in range(TENSORS)}


class Other:
    """The other process, and the words that it is told."""

    def __init__(self, words: IO[str], answers: IO[str]) -> None:
        self._words, self._answers = words, answers

    def tell(self, word: str) -> None:
        print(word, file=self._words, flush=True)

    def wait(self) -> None:
        assert self._answers.readline(), "the other process ended"

    def together(self, word: str, work: Callable[[], Any]) -> Callable[[], None]:
        """Work at which the other process takes part after the word."""

        def run() -> None:
            self.tell(word)
            work()
            self.wait()

        return run


@contextmanager
def receiver(module: str, *words: str) -> Iterator[Other]:
    """The other process, which runs a module and does as it is told; it ends with its input."""
    command = [sys.executable, "-m", module, *words]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdin is not None
        assert child.stdout is not None
        torch.set_num_threads(1)
        try:
            yield Other(child.stdin, child.stdout)
            child.stdin.close()
            child.wait(TIMEOUT)
        finally:
            child.kill()


def _follow(kind: str, where: str) -> None:
    """Be the other process."""
    torch.set_num_threads(1)
    target = DirectWeights(_weights(0))
    if kind == "memory":
        source = _weights(1)
        with MemoryReceiver.connect(where, timeout=TIMEOUT) as end:
            obey(_receiving(end, target) | {"copy": partial(_copy, source, target.tensors, 1)})
        return
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{where}", rank=1, world_size=2)
    flat, slots = _flat(target.tensors), _slots()
    with CollectiveReceiver(timeout=TIMEOUT) as end:
        by_hand = {"broadcast": partial(_broadcast, flat), "hand": partial(_receive_by_hand, flat, slots)}
        obey(_receiving(end, target) | by_hand)
    dist.destroy_process_group()


def _receiving(end: Any, target: DirectWeights) -> dict[str, Callable[[], Any]]:
    return {name: partial(receive, end, target, timeout=TIMEOUT, verify=name == "verified") for name in ("verified", "unverified")}


def obey(words: Mapping[str, Callable[[], Any]]) -> None:
    """Do what each line of the input says, and say so."""
    for word in sys.stdin:
        words[word.strip()]()
        print("done", flush=True)


if __name__ == "__main__":
    _follow(*sys.argv[1:])
