"""Updates by CUDA IPC to another process on the same GPU, of a model of real shape: packed, moved and verified, beside one copy of
the same bytes on that GPU, which is the least that packing can cost, and one digest of them, the least that verifying can.

The receiver is this module, run by ``python -m``; ``discarded`` updates are verified there and dropped, ``loaded`` ones are copied
into a model's tensors, too.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Final

import msgspec
import torch

from rollout_core.bench.models import config_of, random_weights
from rollout_core.bench.timing import Timing, keep_busy, measure
from rollout_core.bench.transfer import TIMEOUT, obey, receiver
from rollout_core.bucketing import BucketPlan, Packer, plan_buckets, specs_of
from rollout_core.bucketing.digest import DigestChoice
from rollout_core.bucketing.sources import Pair
from rollout_core.transfer import DirectWeights, receive, send
from rollout_core.transfer.carriers.cuda_ipc import CudaIpcReceiver, CudaIpcSender

FLOOR: Final = "one copy of the same bytes"
DIGEST: Final = "one digest of the same bytes"
VERIFIED: Final = "pack, move and verify"
_DIGESTS: Final[tuple[DigestChoice, ...]] = ("auto", None)
_PIECE: Final = 1 << 30  # bytes: both ends of the copy have to fit beside the model
#: Of a bucket, of which there are two. Each costs a few hundred microseconds for messages, and for the GPU to change processes.
CAPACITY: Final = 2 << 30


class SyncBench(msgspec.Struct, frozen=True, kw_only=True):
    """Milliseconds of each candidate; see ``bench_sync``."""

    model: str
    nbytes: int
    tensors: int
    buckets: int
    capacity: int
    gpu: str
    timings: dict[str, Timing]

    def ratio(self, name: str) -> float:
        """Of medians, to the copy."""
        return self.timings[name].median / self.timings[FLOOR].median


def bench_sync(
    shape: str, *, layers: int | None = None, capacity: int = CAPACITY, repeats: int = 10, loaded: bool = True
) -> SyncBench:
    """Interleaved, after two turns that do not count, each after 50 ms of work on the GPU. ``loaded``: also updates into tensors,
    for which the GPU has to have room for the model twice."""
    config = config_of(shape, layers)
    weights = random_weights(config, torch.bfloat16, "cuda")
    plan = plan_buckets(specs_of(weights), capacity)
    address = f"bench-{os.getpid()}"
    told = json.dumps({"address": address, "shape": shape, "layers": layers, "loaded": loaded})
    with receiver(__name__, told) as other, CudaIpcSender.listen(address, timeout=TIMEOUT) as end:
        candidates: dict[str, Callable[[], Any]] = {FLOOR: _copier(plan.nbytes), DIGEST: _digester(plan.nbytes)}
        for digest in _DIGESTS:
            packer = Packer(plan, digest=digest, allocate=_slots(plan))
            candidates["pack" + (", with digests" if digest else "")] = partial(_pack, packer, weights)
        for word in ("discarded", "loaded") if loaded else ("discarded",):
            for digest in _DIGESTS:
                name = {"discarded": VERIFIED if digest else "pack and move"}.get(
                    word
                ) or f"the same{'' if digest else ', unverified'}, loaded"
                update = partial(send, plan, weights, end, timeout=TIMEOUT, packer=Packer(plan, digest=digest))
                candidates[name] = other.together(f"{word} {'verified' if digest else 'unverified'}", update)
        timings = measure(candidates, repeats=repeats, before=keep_busy)
    return SyncBench(
        model=shape if layers is None else f"{shape} with {layers} layers",
        nbytes=plan.nbytes,
        tensors=len(plan.specs),
        buckets=len(plan.buckets),
        capacity=capacity,
        gpu=torch.cuda.get_device_name(),
        timings=timings,
    )


def _copier(nbytes: int) -> Callable[[], None]:
    source = torch.randint(0, 256, (min(nbytes, _PIECE),), dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)

    def copy() -> None:
        for start in range(0, nbytes, _PIECE):
            most = min(_PIECE, nbytes - start)
            target[:most].copy_(source[:most])
        torch.cuda.synchronize()

    return copy


def _digester(nbytes: int) -> Callable[[], None]:
    """As a receiver verifies, waiting once at the end."""
    from rollout_core.bucketing.cuda import launching

    source = torch.randint(0, 256, (min(nbytes, _PIECE),), dtype=torch.uint8, device="cuda")

    def digest() -> None:
        begun = [launching.begin_digest(source[: min(_PIECE, nbytes - start)]) for start in range(0, nbytes, _PIECE)]
        for one in begun:
            one.wait()

    return digest


def _slots(plan: BucketPlan) -> Callable[[int], torch.Tensor]:
    """Two buffers in turn, as a sender has."""
    buffers = [torch.empty(max(layout.nbytes for layout in plan.buckets), dtype=torch.uint8, device="cuda") for _ in range(2)]

    def allocate(nbytes: int) -> torch.Tensor:
        buffers.reverse()
        return buffers[0][:nbytes]

    return allocate


def _pack(packer: Packer, weights: Mapping[str, torch.Tensor]) -> None:
    for bucket in packer.pack(weights):
        bucket.digest  # noqa: B018 - on the host, as a sender has to say it
    torch.cuda.synchronize()


class Discarding:
    """A target that drops what comes."""

    def __init__(self) -> None:
        self.version = 0

    def begin(self, plan: BucketPlan | None, version: int) -> None: ...

    def load(self, pairs: list[Pair]) -> None: ...

    def prepare(self) -> None: ...

    def commit(self, version: int) -> None:
        self.version = version

    def abort(self, version: int) -> None: ...


def _follow(told: str) -> None:
    """Be the receiver."""
    given = json.loads(told)
    targets: dict[str, Any] = {"discarded": Discarding()}
    if given["loaded"]:
        weights = random_weights(config_of(given["shape"], given["layers"]), torch.bfloat16, "cuda", seed=1)
        targets["loaded"] = DirectWeights(weights)

    def take(end: CudaIpcReceiver, target: Any, verify: bool) -> None:
        target.version = max(one.version for one in targets.values())  # one carrier counts for both
        receive(end, target, timeout=TIMEOUT, verify=verify)
        torch.cuda.synchronize()

    with CudaIpcReceiver.connect(given["address"], timeout=TIMEOUT) as end:
        obey(
            {
                f"{name} {word}": partial(take, end, target, word == "verified")
                for name, target in targets.items()
                for word in ("verified", "unverified")
            }
        )


if __name__ == "__main__":
    _follow(sys.argv[1])
