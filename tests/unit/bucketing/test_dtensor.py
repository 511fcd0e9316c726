"""B16 with torch's own DTensor: a mesh of one process is enough to have local shards and a gather."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

from rollout_core.bucketing import iter_buckets, pack, pack_stream, plan_buckets, specs_of, unpack, unpack_stream
from rollout_core.testing.oracles import picture
from support.tensors import patterned


@pytest.fixture(scope="module")
def mesh():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield DeviceMesh("cpu", [0])
    dist.destroy_process_group()


def test_b16_dtensors(mesh, monkeypatch):
    full = [(f"w{i}", patterned(torch.float32, 4, 3, seed=i)) for i in range(4)]
    placements = [Shard(0), Shard(1), Replicate(), Shard(0)]
    sharded = [(name, distribute_tensor(t, mesh, [p])) for (name, t), p in zip(full, placements, strict=True)]
    sharded.append(("tied", sharded[0][1]))
    gathered = []
    kind = type(sharded[0][1])
    original = kind.full_tensor
    monkeypatch.setattr(kind, "full_tensor", lambda self, **k: gathered.append(id(self)) or original(self, **k))
    plan = plan_buckets(specs_of(sharded), 100)
    assert gathered == []
    assert plan.tied == {"w0": ("tied",)}
    expected = {name: rest for name, *rest in picture([*full, ("tied", full[0][1])])}
    for source in (sharded, dict(sharded), iter(sharded)):
        assert {n: r for n, *r in picture(unpack(plan, pack(plan, source)))} == expected
    assert {n: r for n, *r in picture(unpack_stream(pack_stream(sharded, 100)))} == expected
    assert {n: r for n, *r in picture(p for b in iter_buckets(sharded, 100) for p in b)} == expected
    module = torch.nn.ParameterDict({name: torch.nn.Parameter(t) for name, t in sharded[:4]})
    buckets = pack(plan_buckets(specs_of(module), 50), module)
    gathered.clear()
    next(buckets)
    assert len(gathered) == 1, "the second bucket's tensor is not gathered yet"
