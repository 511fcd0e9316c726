"""What the kernels for packing and unpacking promise, on any device that they run on: a GPU, or Triton's interpreter."""

from __future__ import annotations

import random

import torch

from rollout_core.bucketing import Packer, Unpacker, plan_buckets, specs_of
from rollout_core.bucketing.cuda import launching
from rollout_core.bucketing.digest import block_multilinear_by_torch
from rollout_core.testing.oracles import bytes_of

POISON = 0xA5
BLOCK = "block-multilinear-128"


def count_launches(monkeypatch, by=launching):
    """The calls of what launches kernels, by name, so that no test passes on torch's operations. ``by``: what has the functions."""
    calls = {"gather": 0, "copy": 0, "digest_lanes": 0, "digest_rows": 0}

    def counted(name, original):
        def count(*args, **kwargs):
            calls[name] += 1
            return original(*args, **kwargs)

        return count

    for name in calls:
        monkeypatch.setattr(launching, name, counted(name, getattr(by, name)))
    return calls


def picture(pairs):
    return [(name, t.dtype, tuple(t.shape), bytes_of(t.cpu())) for name, t in pairs]


class Guarded:
    """Poisoned buffers with 64 bytes before and after that have to stay as they are."""

    def __init__(self, device: str) -> None:
        self._device = device
        self._whole: list[torch.Tensor] = []

    def __call__(self, nbytes: int) -> torch.Tensor:
        self._whole.append(torch.full((nbytes + 128,), POISON, dtype=torch.uint8, device=self._device))
        return self._whole[-1][64 : 64 + nbytes]

    def check(self) -> None:
        for whole in self._whole:
            beside = torch.cat([whole[:64], whole[-64:]])
            assert bool((beside == POISON).all()), "bytes beside a buffer were written"


def bytes_at(device: str, nbytes: int, skip: int, seed: int) -> torch.Tensor:
    """Random bytes, ``skip`` bytes past a multiple of 64."""
    generator = torch.Generator().manual_seed(seed)
    raw = torch.empty(nbytes + 192, dtype=torch.uint8, device=device)
    start = -raw.data_ptr() % 64 + skip
    raw[start : start + nbytes] = torch.randint(0, 256, (nbytes,), dtype=torch.uint8, generator=generator).to(device)
    return raw[start : start + nbytes]


def random_pairs(device: str, rng: random.Random, count: int, largest: int):
    """Tensors of many widths and sizes, at aligned and odd addresses, some strided."""
    pairs = []
    for i in range(count):
        dtype = rng.choice([torch.uint8, torch.bfloat16, torch.float32, torch.float64, torch.int8, torch.bool])
        size = rng.choice([0, 1, rng.randint(2, 40), rng.randint(0, largest // 10), rng.randint(0, largest)])
        skip = rng.choice([0, 0, 16, 4, rng.randint(1, 15)]) // dtype.itemsize * dtype.itemsize
        raw = bytes_at(device, size * dtype.itemsize, skip, rng.randint(0, 2**31))
        tensor = (raw.bitwise_and_(1) if dtype is torch.bool else raw).view(dtype)  # of other bools copies differ
        pairs.append((f"w{i}", tensor[::2] if rng.random() < 0.1 else tensor))
    return pairs


def check_packing(pairs, device: str, *, capacity: int, **options) -> int:
    """Buckets filled by kernels equal those filled tensor by tensor by torch, with digests and without. Returns their number."""
    plan = plan_buckets(specs_of(pairs), capacity, **options)
    memory = Guarded(device)
    # An iterator's tensors are copied one by one, by torch.
    wanted = list(Packer(plan, digest=None, allocate=Guarded(device)).pack(iter(pairs), version=3))
    for digest in (BLOCK, None):
        packer = Packer(plan, digest=digest, allocate=memory)
        for source in (pairs, dict(pairs)):
            got = list(packer.pack(source, version=3))
            for mine, other in zip(got, wanted, strict=True):
                assert torch.equal(mine.buffer, other.buffer), f"bucket {mine.index} of {len(got)}: {options}"
        if digest is not None:
            for mine in got:
                lanes = block_multilinear_by_torch(mine.buffer)
                assert mine.digest == _digest_of(mine, lanes)
    memory.check()
    return len(wanted)


def _digest_of(bucket, lanes):
    from rollout_core.bucketing.bucket import _context
    from rollout_core.bucketing.digest import lanes_digest

    return lanes_digest(lanes, bucket.nbytes, _context(bucket.plan_digest, bucket.index, bucket.version))


def check_unpacking(pairs, device: str, *, capacity: int, **options) -> None:
    """Buckets written into poisoned tensors at odd and even addresses: each gets its bytes, and nothing beside it is written."""
    pairs = [(name, tensor.contiguous()) for name, tensor in pairs]
    plan = plan_buckets(specs_of(pairs), capacity, **options)
    buckets = list(Packer(plan, digest=BLOCK).pack(iter(pairs), version=1))
    for skip in (0, 8):
        whole = {name: torch.full((t.nbytes + 192,), POISON, dtype=torch.uint8, device=device) for name, t in pairs}
        starts = {name: -raw.data_ptr() % 64 + 64 + skip for name, raw in whole.items()}
        into = {name: whole[name][starts[name] :][: t.nbytes].view(t.dtype).view(t.shape) for name, t in pairs}
        unpacker = Unpacker(plan, into=into)
        out = [pair for bucket in buckets for pair in unpacker.feed(bucket)]
        unpacker.close()
        assert all(tensor.data_ptr() == into[name].data_ptr() for name, tensor in out)
        assert picture(out) == picture([(name, dict(pairs)[name]) for name in plan.arrival])
        for name, tensor in pairs:
            raw, start = whole[name], starts[name]
            beside = torch.cat([raw[:start], raw[start + tensor.nbytes :]])
            assert bool((beside == POISON).all()), f"bytes beside {name!r} were written"
