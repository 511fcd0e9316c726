"""What is around the kernels: torch where they do not run, tables on streams of their own, and torch's quick check where it is
missing or was changed."""

from __future__ import annotations

import sys

import numpy as np
import pytest
import torch

from rollout_core.bucketing import Packer, Unpacker, plan_buckets, specs_of, unpack
from rollout_core.bucketing import looks as looks_module
from rollout_core.bucketing.cuda import launching
from rollout_core.bucketing.cuda.tables import CopyTable, PackTable
from rollout_core.bucketing.digest import block_multilinear, block_multilinear_by_torch
from rollout_core.bucketing.digesting import BlockDigests
from rollout_core.bucketing.looks import alike_to
from rollout_core.errors import PlanMismatchError, SourceError
from support.kernel_checks import BLOCK, bytes_at, picture
from support.tensors import patterned

PAIRS = [("a", patterned(torch.bfloat16, 30, 7)), ("b", patterned(torch.float32, 500)), ("c", torch.tensor(7.0))]


def test_where_kernels_do_not_run_torch_does_the_work(monkeypatch, kernels):
    monkeypatch.setattr(launching, "usable", lambda device: False)
    plan = plan_buckets(specs_of(PAIRS), 1500)
    packer = Packer(plan, digest=BLOCK)
    for options in ({}, {"unmoved": True}):
        assert picture(unpack(plan, packer.pack(PAIRS, **options))) == picture(PAIRS)
    into = {name: torch.zeros_like(tensor) for name, tensor in PAIRS}
    unpacker = Unpacker(plan, into=into)
    for bucket in packer.pack(PAIRS):
        unpacker.feed(bucket)
    assert picture(into.items()) == picture(PAIRS)
    data = bytes_at("cpu", 20_000, 3, 1)
    assert block_multilinear(data) == block_multilinear_by_torch(data.clone())
    found = BlockDigests()
    found.add("w", data)
    assert set(found.digests()) == {"w"}
    assert not any(kernels.values())


class Stream:
    def __init__(self, number, log):
        self.cuda_stream, self.log = number, log

    def record_event(self):
        self.log.append(f"{self.cuda_stream} records")
        return f"event of {self.cuda_stream}"

    def wait_event(self, event):
        self.log.append(f"{self.cuda_stream} waits for {event}")


@pytest.fixture
def streams(monkeypatch):
    """Two streams, the one that is current, and what they did; and the tensors whose memory a stream was said to use."""
    log, used = [], []
    both = [Stream(1, log), Stream(2, log)]
    current = {"stream": both[0]}
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: current["stream"])
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda tensor, stream: used.append((tensor.data_ptr(), stream.cuda_stream)))
    return both, current, log, used


@pytest.mark.parametrize("kind", ["pack", "copy"])
def test_t4_a_table_is_read_on_another_stream_only_once_it_was_written(kind, streams):
    (_, second), current, log, used = streams
    cpu = torch.device("cpu")
    # Whole blocks at any address, and parts: every kind of table.
    if kind == "pack":
        payloads = [bytes_at("cpu", 40_000, skip, skip) for skip in (0, 3)]
        addresses = [payload.data_ptr() for payload in payloads]
        table = PackTable(plan_buckets(specs_of([(f"w{i}", p) for i, p in enumerate(payloads)]), 1 << 20).buckets[0], cpu)
        point = lambda: table.point(addresses)  # noqa: E731
    else:
        payloads = [bytes_at("cpu", 40_000, 0, 9) for _ in range(2)]
        addresses = [payload.data_ptr() for payload in payloads]
        whole = bytes_at("cpu", 90_000, 0, 3)
        table = CopyTable(np.array([0, 40_003]), np.array([40_000, 40_000]), cpu)
        point = lambda: table.point(whole.data_ptr(), np.array(addresses))  # noqa: E731
    table._order._device = torch.device("cuda", 0)
    assert point()
    assert not point()
    assert log == ["1 records"]
    assert not used
    current["stream"] = second
    assert not point()
    assert log == ["1 records", "2 waits for event of 1"]
    tensors = [tensor.data_ptr() for tensor in table._tensors()]
    assert sorted(used) == sorted((address, 2) for address in tensors)
    assert len(tensors) == (3 + 5 + 4 + 2 + 3 if kind == "pack" else 3 * 5), "each part of the table is in use"
    # Elsewhere, where all of a bucket can be read 16 bytes at a time; and there again.
    elsewhere = [bytes_at("cpu", 40_000, 0, 4) for _ in range(2)]
    addresses[:] = [payload.data_ptr() for payload in elsewhere]
    used.clear()
    assert point()
    assert log[2:] == ["2 waits for event of 1", "2 records"], "what is made of the table is made after it was written"
    assert {address for address, _ in used} >= set(tensors)
    laid_out = table.aligned
    assert kind == "copy" or (table.shifted is None and table.parts is None)
    addresses.reverse()
    assert point()
    if kind == "pack":
        assert table.aligned is laid_out, "what follows from where they can be read stays"
    else:
        assert table.aligned.starts is laid_out.starts
        assert table.aligned.targets is not laid_out.targets, "what was launched before still reads those"
        table = CopyTable(np.array([0]), np.array([40_000]), cpu)  # all of it in one kind of entries
        table.point(bytes_at("cpu", 40_000, 0, 3).data_ptr(), np.array(addresses[:1]))
        assert len(list(table._tensors())) == 5


def test_memory_on_another_device_is_refused_where_the_tensors_are_not_looked_at():
    plan = plan_buckets(specs_of(PAIRS), 1500)
    packer = Packer(plan, digest=BLOCK)
    list(packer.pack(PAIRS))
    with pytest.raises(ValueError, match="returned memory on meta, and the tensors are on cpu"):
        list(packer.pack(PAIRS, unmoved=True, allocate=lambda nbytes: torch.empty(nbytes, dtype=torch.uint8, device="meta")))


def test_a_bucket_elsewhere_than_its_tensors_is_filled_by_torch(kernels):
    plan = plan_buckets(specs_of(PAIRS), 1500)
    packer = Packer(plan, digest=None, allocate=lambda nbytes: torch.empty(nbytes, dtype=torch.uint8, device="meta"))
    assert [bucket.buffer.device.type for bucket in packer.pack(PAIRS)] == ["meta"] * len(plan.buckets)
    assert not kernels["gather"]


def test_what_a_rank_has_a_part_of_is_not_written_into():
    class Sharded(torch.Tensor):
        def full_tensor(self):
            raise AssertionError("it was gathered")

    into = {**dict(PAIRS), "b": torch.zeros(500).as_subclass(Sharded)}
    with pytest.raises(PlanMismatchError, match="'b' to write into is a DTensor"):
        Unpacker(plan_buckets(specs_of(PAIRS), 1500), into=into)


@pytest.mark.filterwarnings("ignore::UserWarning")  # torch calls this layout a prototype
def test_a_nested_tensor_is_refused():
    pairs = [("a", torch.zeros(3)), ("b", torch.zeros(4))]
    packer = Packer(plan_buckets(specs_of(pairs), 1 << 20), digest=BLOCK)
    nested = torch.nested.nested_tensor([torch.zeros(2), torch.zeros(2)])
    with pytest.raises((PlanMismatchError, SourceError), match="'b'"):
        list(packer.pack([pairs[0], ("b", nested)]))
    for _ in range(3):
        list(packer.pack(pairs))
    with pytest.raises((PlanMismatchError, SourceError), match="'b'"):
        list(packer.pack([pairs[0], ("b", nested)]))
    assert alike_to([nested]) is None
    assert not alike_to([torch.zeros(2)])(nested)


class Blind:
    """What is alike whatever it looks like."""

    def __init__(self, *tensors, **options):
        pass

    def check(self, *tensors):
        return True


@pytest.mark.parametrize("guards", [None, Blind])
def test_without_torchs_quick_check_tensors_are_looked_at_each_time(guards, monkeypatch):
    """It is missing, or does not see what it is here for."""
    monkeypatch.setitem(sys.modules, "torch._C._dynamo.guards", guards and type("Module", (), {"TensorGuards": guards}))
    looks_module._guards.cache_clear()
    try:
        assert alike_to([torch.zeros(3)]) is None
        packer = Packer(plan_buckets(specs_of(PAIRS), 1500), digest=BLOCK)
        for _ in range(4):
            assert picture(unpack(packer.plan, packer.pack(PAIRS))) == picture(PAIRS)
        other = [*PAIRS[:2], ("c", torch.tensor([7.0]))]
        with pytest.raises(PlanMismatchError):
            list(packer.pack(other))
    finally:
        looks_module._guards.cache_clear()
