"""Sharded tensors made whole, on a mesh of one process; tests/engines/hf/test_sharded.py has several."""

from __future__ import annotations

import math

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

from rollout_core.bucketing import TensorSpec, pack, plan_buckets, specs_of, unpack
from rollout_core.errors import DuplicateNameError, SourceError, TransferError
from rollout_core.testing.oracles import bytes_of
from rollout_core.transfer.lockstep import Lockstep, bounded, timeout_of
from rollout_core.transfer.sharded import Parts


@pytest.fixture(scope="module")
def mesh():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield DeviceMesh("cpu", [0])
    dist.destroy_process_group()


def test_a_group_is_needed():
    with pytest.raises(TransferError, match="init_process_group"):
        Lockstep(None, 1.0)


FLOATS = (torch.float32, torch.bfloat16, torch.float16)


@st.composite
def models(draw):
    """Names with a tensor, how it is cut (None: not at all), and the name that it is tied to (None: not)."""
    found = []
    for place in range(draw(st.integers(0, 6))):
        dtype = draw(st.sampled_from((*FLOATS, torch.int64)))
        shape = draw(st.lists(st.integers(1, 5), min_size=1, max_size=3))
        values = draw(st.lists(st.integers(-99, 99), min_size=math.prod(shape), max_size=math.prod(shape)))
        cut = draw(st.sampled_from((None, Replicate(), *map(Shard, range(len(shape))))))
        tied = draw(st.sampled_from((None, *(name for name, *_ in found)))) if found and draw(st.booleans()) else None
        found.append((f"w{place}", torch.tensor(values).view(shape).div(7).to(dtype), cut, tied))
    return found


@given(models(), st.sampled_from((None, *FLOATS)), st.integers(8, 200))
def test_b1_b5_b10_sharded_tensors_arrive_as_whole_ones_do(mesh, model, dtype, capacity):
    whole: dict[str, torch.Tensor] = {}
    sharded: dict[str, torch.Tensor] = {}
    expected = []
    for name, tensor, cut, tied in model:
        whole[name] = tensor if tied is None else whole[tied]
        sharded[name] = sharded[tied] if tied else tensor if cut is None else distribute_tensor(tensor, mesh, [cut])
        sent = dtype if dtype is not None and whole[name].is_floating_point() else whole[name].dtype
        root = next((s.alias_of or s.name for s in expected if s.name == tied), None)
        expected.append(TensorSpec(name, sent, tuple(whole[name].shape), root))
    parts = Parts(Lockstep(None, 5.0), sharded, dtype=dtype)
    specs = specs_of(parts.tensors)
    assert specs == expected
    plan = plan_buckets(specs, capacity)
    arrived = dict(unpack(plan, pack(plan, parts.tensors)))
    assert set(arrived) == {name for name, *_ in model}
    for spec in expected:
        assert bytes_of(arrived[spec.name]) == bytes_of(whole[spec.name].to(spec.dtype)), spec


def test_b16_nothing_is_gathered_before_it_is_asked_for(mesh, monkeypatch):
    moved = []
    monkeypatch.setattr(dist, "broadcast", lambda *a, broadcast=dist.broadcast, **k: moved.append(1) or broadcast(*a, **k))
    parts = Parts(Lockstep(None, 5.0), {f"w{i}": distribute_tensor(torch.ones(4), mesh, [Shard(0)]) for i in range(4)})
    buckets = pack(plan_buckets(specs_of(parts.tensors), 16), parts.tensors)
    assert moved == []
    for count in range(1, 5):
        next(buckets)
        assert len(moved) == count
    parts.end()
    with pytest.raises(TransferError, match="'w0' can be gathered no more"):
        parts.tensors["w0"].full_tensor()


def test_a_tensor_that_is_not_gathered_says_so(mesh):
    (tensor,) = Parts(Lockstep(None, 5.0), {"w": distribute_tensor(torch.ones(4), mesh, [Shard(0)])}).tensors.values()
    assert repr(tensor) == "Deferred(torch.float32, [4])"
    with pytest.raises(SourceError, match="not gathered yet"):
        tensor + 1


def test_b9_two_names_that_become_one(mesh):
    with pytest.raises(DuplicateNameError, match="'_orig_mod.w' and 'w' are both 'w'"):
        Parts(Lockstep(None, 5.0), {"_orig_mod.w": torch.ones(1), "w": torch.ones(1)})
    with pytest.raises(DuplicateNameError, match="'a' and 'b' are both 'x'"):
        Parts(Lockstep(None, 5.0), {"a": torch.ones(1), "b": torch.ones(1)}, rename=lambda name: "x")


def test_buffers_that_a_state_dict_leaves_out_go_where_they_are_taken(mesh):
    module = torch.nn.Linear(2, 2)
    module.register_buffer("kept", torch.ones(1))
    module.register_buffer("computed", torch.ones(1), persistent=False)
    steps = Lockstep(None, 5.0)
    parts = Parts(steps, module, dtype=torch.bfloat16)
    assert {name: tensor.dtype for name, tensor in parts.tensors.items()} == {
        "weight": torch.bfloat16,
        "bias": torch.bfloat16,
        "kept": torch.float32,
        "computed": torch.float32,
    }
    assert list(Parts(steps, module, computed=False).tensors) == ["weight", "bias", "kept"]


def test_a_part_that_is_not_what_torch_chunk_gives(mesh, monkeypatch):
    tensor = distribute_tensor(torch.ones(4), mesh, [Shard(0)])
    monkeypatch.setattr(type(tensor), "to_local", lambda self: torch.ones(3))
    (deferred,) = Parts(Lockstep(None, 5.0), {"w": tensor}).tensors.values()
    with pytest.raises(SourceError, match=r"'w': this rank has \[3\] of it, and torch.chunk gives it \[4\]"):
        deferred.full_tensor()


def test_what_is_done_together(mesh):
    steps = Lockstep(None, 5.0)
    assert steps.agree(7) == 7
    assert steps.together(lambda: b"done") == [b"done"]
    with pytest.raises(ZeroDivisionError):
        steps.together(lambda: 1 // 0)
    assert steps.exchange(b"") == [b""]


def test_a_group_that_was_left_is_of_no_use(mesh):
    steps = Lockstep(dist.new_group([0]), 5.0)
    steps.abort("an interrupt")
    with pytest.raises(TransferError, match="cannot be reached: an interrupt"):
        steps.agree(1)


def test_t2_what_never_ends_ends_with_the_timeout(mesh):
    class Stuck:
        def is_completed(self):
            return False

    steps = Lockstep(dist.new_group([0]), 0.05)
    with pytest.raises(TransferError, match=r"rank 0 waited 0.05 s for the others at a step"):
        steps.finish("a step", lambda: [Stuck()])
    assert steps.broken is not None


def test_timeouts_of_groups_are_theirs_again(mesh):
    group = dist.new_group([0])
    before = timeout_of(group)
    with pytest.raises(KeyError), bounded([group], 3.0):
        assert timeout_of(group) == 3.0
        raise KeyError
    assert timeout_of(group) == before != 3.0


@pytest.mark.parametrize("timeout", [0, -1, float("inf"), "5", True, None])
def test_what_is_no_timeout(mesh, timeout):
    with pytest.raises(TransferError, match="timeout is"):
        Lockstep(None, timeout)
