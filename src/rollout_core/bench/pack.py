"""Packing and unpacking beside a plain copy of the same bytes, and beside what others do, on one device."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Final

import msgspec
import torch

from rollout_core.bench.pack_cases import CASES, Tensors, cut, expected, flat_bytes, loop_into, peers, random_tensors
from rollout_core.bench.timing import Timing
from rollout_core.bucketing import Bucket, BucketPlan, Packer, Unpacker, plan_buckets
from rollout_core.bucketing.bucket import verify
from rollout_core.bucketing.digest import BLOCK_ALGORITHM, DigestChoice, default_algorithm
from rollout_core.bucketing.finding import why_not_compiled

FLOOR: Final = "floor: one copy"
_POISON: Final = 0xA5
_AHEAD: Final = 2_000_000  # clock cycles that the device waits at least, so that the host is ahead of it: about 1 ms
_CYCLES: Final = 4_000_000  # and for each millisecond that the host takes: twice as many as it has
#: Bytes of a case, by device.
_NBYTES: Final = {"cuda": 1_100_000_000, "cpu": 1 << 28}


class Method(msgspec.Struct, frozen=True):
    """``wall``: host milliseconds from the call until the result is there; ``device``: between events around the work on the device
    while the host is ahead of it, None on a CPU. Of methods that wait for the device themselves, both are the host's time."""

    wall: Timing
    device: Timing | None

    @property
    def best(self) -> Timing:
        return self.device or self.wall


class Case(msgspec.Struct, frozen=True):
    """One list of tensors. ``methods`` by direction (``pack``, ``unpack``) and name, the floor in each."""

    name: str
    tensors: int
    nbytes: int
    methods: dict[str, dict[str, Method]]


class PackBench(msgspec.Struct, frozen=True):
    """``uncompiled``: why tensors are not found by compiled code; None if they are."""

    device: str
    versions: dict[str, str]
    repeats: int
    cases: list[Case]
    uncompiled: str | None = None


def bench_pack(
    device: str, *, repeats: int = 20, nbytes: int | None = None, progress: Callable[[str], Any] = lambda words: None
) -> PackBench:
    """Every case on one device. Every result is compared with the bytes that it has to be, in memory that was poisoned before.

    Raises ``ValueError`` for a device that is not there, ``AssertionError`` for a method of ours that gives wrong bytes; one of
    others is left out, as it refuses or damages what the case has.
    """
    where = torch.device(device)
    if where.type not in _NBYTES or (where.type == "cuda" and not torch.cuda.is_available()):
        raise ValueError(f"device is {device!r}; it is cpu, or cuda where there is a GPU")
    cases = []
    for name, specs in CASES.items():
        progress(name)
        cases.append(_case(name, random_tensors(cut(specs(), nbytes or _NBYTES[where.type]), where), where, repeats))
        gc.collect()
    versions = {"torch": str(torch.__version__)}
    for package in ("triton", "sglang", "vllm"):
        if (found := _version(package)) is not None:
            versions[package] = found
    return PackBench(
        torch.cuda.get_device_name(where) if where.type == "cuda" else "cpu", versions, repeats, cases, why_not_compiled()
    )


def _case(name: str, tensors: Tensors, device: torch.device, repeats: int) -> Case:
    from rollout_core.bucketing import specs_of

    plan = plan_buckets(specs_of(tensors, aliases=False), sum(t.nbytes for t in tensors.values()) + (1 << 20))
    pack = _measure(_packing(plan, tensors, device), device, repeats)
    unpack = _measure(_unpacking(plan, tensors, device), device, repeats)
    return Case(name, len(tensors), plan.nbytes, {"pack": pack, "unpack": unpack})


def _packing(plan: BucketPlan, tensors: Tensors, device: torch.device) -> dict[str, Callable[[], Any]]:
    (layout,) = plan.buckets
    target = torch.empty(layout.nbytes, dtype=torch.uint8, device=device)
    wanted = expected(layout, tensors, device)
    fast = default_algorithm(device)
    turns = [tensors, {name: tensor.clone() for name, tensor in tensors.items()}]

    def ours(digest: DigestChoice, **options: Any) -> Callable[[], Bucket]:
        packer = Packer(plan, digest=digest, allocate=lambda nbytes: target[:nbytes])
        for bucket in packer.pack(tensors):
            del bucket

        def run() -> Bucket:
            (bucket,) = packer.pack(tensors, **options)
            return bucket

        return run

    moving = Packer(plan, digest=None, allocate=lambda nbytes: target[:nbytes])

    def moved() -> Bucket:
        turns.reverse()
        (bucket,) = moving.pack(turns[0])
        return bucket

    own = {
        "Packer": ours(None),
        "Packer, unmoved": ours(None, unmoved=True),
        f"Packer, {fast}": ours(fast),
        f"Packer, unmoved, {fast}": ours(fast, unmoved=True),
        "Packer, other storages each round": moved,
    }
    for method, run in own.items():
        target.fill_(_POISON)
        assert torch.equal(run().buffer, wanted), f"{method} gives wrong bytes"
    bytewise = flat_bytes(tensors)
    concatenated = torch.cat(bytewise)
    flat = torch.empty_like(concatenated)
    views = [part.view(t.dtype).view(t.shape) for part, t in _split(flat, tensors)] if _aligned(tensors) else None
    others: dict[str, Callable[[], torch.Tensor]] = {
        "cat of byte views": lambda: torch.cat(flat_bytes(tensors)),
        "slice and copy, one by one": lambda: loop_into(flat, tensors),
        **peers(tensors),
    }
    if views is not None:
        sources = list(tensors.values())
        others["_foreach_copy_ into kept views"] = lambda: _foreach(views, sources, flat)
    return {FLOOR: lambda: flat.copy_(concatenated), **own, **_right(others, flat, concatenated)}


def _unpacking(plan: BucketPlan, tensors: Tensors, device: torch.device) -> dict[str, Callable[[], Any]]:
    fast = default_algorithm(device)
    (bucket,) = Packer(plan, digest=fast).pack(tensors)
    into = {name: torch.empty_like(tensor) for name, tensor in tensors.items()}
    writer, checker = Unpacker(plan, into=into, verify=False), Unpacker(plan, into=into)
    viewer, keeper = Unpacker(plan, verify=False), Unpacker(plan, verify=False, reuse=True)

    def feed(unpacker: Unpacker) -> Callable[[], Any]:
        def run() -> Any:
            unpacker.restart(version=bucket.version)
            unpacker._last_version = -1  # the same bucket again, which a receiver refuses
            return unpacker.feed(bucket)

        return run

    own = {
        "views": feed(viewer),
        "views, kept": feed(keeper),
        f"verify {fast}": _verifying(bucket),
        "into tensors": feed(writer),
        f"into tensors, {fast}": feed(checker),
    }
    for method, run in own.items():
        for tensor in into.values():
            tensor.view(-1).view(torch.uint8).fill_(_POISON)
        pairs = run()
        if isinstance(pairs, list):
            same = all(torch.equal(t.reshape(-1).view(torch.uint8), tensors[n].reshape(-1).view(torch.uint8)) for n, t in pairs)
            assert same, f"{method} gives wrong bytes"
    (layout,) = plan.buckets
    parts = [(slot, into[slot.name].view(-1).view(torch.uint8)) for slot in layout.slots]

    def one_by_one() -> None:
        for slot, part in parts:
            part.copy_(bucket.buffer[slot.offset : slot.end])

    views = [tensor for _, tensor in Unpacker(plan, verify=False).feed(bucket)]
    mine = [into[slot.name] for slot in layout.slots]
    flat = torch.empty_like(bucket.buffer)
    return {
        FLOOR: lambda: flat.copy_(bucket.buffer),
        **own,
        "slice and copy, one by one": one_by_one,
        "_foreach_copy_ from kept views": lambda: torch._foreach_copy_(mine, views),
    }


def _measure(methods: Mapping[str, Callable[[], Any]], device: torch.device, repeats: int) -> dict[str, Method]:
    """In turns, so that noise falls on all alike, after two turns that do not count."""
    wall: dict[str, list[float]] = {name: [] for name in methods}
    events: dict[str, list[float]] = {name: [] for name in methods}
    gc.collect()
    gc.disable()
    try:
        for turn in range(2 + repeats):
            for name, run in methods.items():
                taken = _wall(run, device)
                between = _between_events(run, device, taken) if device.type == "cuda" else 0.0
                if turn >= 2:
                    wall[name].append(taken)
                    events[name].append(between)
    finally:
        gc.enable()
    return {name: Method(_timing(wall[name]), _timing(events[name]) if device.type == "cuda" else None) for name in methods}


def _wall(run: Callable[[], Any], device: torch.device) -> float:
    _wait(device)
    start = time.perf_counter()
    result = run()
    _finish(result)
    _wait(device)
    taken = time.perf_counter() - start
    del result
    return 1e3 * taken


def _finish(result: Any) -> None:
    """Have what the device was asked for on the host, as a sender or a receiver has it."""
    if isinstance(result, Bucket):
        result.digest  # noqa: B018
    elif hasattr(result, "wait"):
        result.wait()


def _verifying(bucket: Bucket) -> Callable[[], Any]:
    """``verify``; on a GPU the part of it that the device does, still to be waited for."""
    verify(bucket)
    if bucket.buffer.is_cuda and bucket.algorithm == BLOCK_ALGORITHM:
        from rollout_core.bucketing.cuda import launching

        if launching.usable(bucket.buffer.device):
            return partial(launching.begin_digest, bucket.buffer)
    return partial(verify, bucket)


def _between_events(run: Callable[[], Any], device: torch.device, wall: float) -> float:
    _wait(device)
    cuda: Any = torch.cuda  # parts of it are not typed
    before, after = cuda.Event(enable_timing=True), cuda.Event(enable_timing=True)
    cuda._sleep(max(_AHEAD, int(_CYCLES * wall)))
    before.record()
    result = run()
    after.record()
    _finish(result)
    _wait(device)
    del result
    return float(before.elapsed_time(after))


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _timing(taken: list[float]) -> Timing:
    return Timing(statistics.median(taken), min(taken), max(taken))


def _split(flat: torch.Tensor, tensors: Tensors) -> list[tuple[torch.Tensor, torch.Tensor]]:
    return list(zip(torch.split(flat, [t.nbytes for t in tensors.values()]), tensors.values(), strict=True))


def _aligned(tensors: Tensors) -> bool:
    """Whether typed views of the concatenation exist."""
    start = 0
    for tensor in tensors.values():
        if start % tensor.dtype.itemsize:
            return False
        start += tensor.nbytes
    return True


def _foreach(views: list[torch.Tensor], sources: list[torch.Tensor], flat: torch.Tensor) -> torch.Tensor:
    torch._foreach_copy_(views, sources)
    return flat


def _right(
    others: dict[str, Callable[[], torch.Tensor]], flat: torch.Tensor, wanted: torch.Tensor
) -> dict[str, Callable[[], torch.Tensor]]:
    """Those that give the right bytes."""
    right = {}
    for name, run in others.items():
        flat.fill_(_POISON)
        try:
            fine = torch.equal(run().view(torch.uint8), wanted)
        except Exception:  # whatever others raise for what they do not take
            fine = False
        if fine:
            right[name] = run
    return right


def _version(package: str) -> str | None:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(package)
    except PackageNotFoundError:
        return None
