"""Many small tensors on the CPU, by compiled code: the bytes that torch copies, and torch's answers for what it does not take."""

from __future__ import annotations

import copy
import gc
import random
import threading
import weakref
from concurrent.futures import Executor, Future, ThreadPoolExecutor

import pytest
import torch

from rollout_core.bucketing import Packer, gathering, plan_buckets, specs_of
from rollout_core.bucketing.finding import compiled
from rollout_core.bucketing.gathering import Gathering
from rollout_core.errors import PlanMismatchError, SourceError
from rollout_core.testing.oracles import bytes_of
from support.in_place import CHANGES, square
from support.tensors import patterned

DTYPES = [torch.bfloat16, torch.float32, torch.uint8, torch.float8_e4m3fn, torch.int64, torch.bool]


@pytest.fixture
def filled(monkeypatch):
    """Whether each bucket since was filled by compiled code."""
    assert compiled() is not None, "no C compiler, or no DLPack exchange API: packing would be slower, not wrong"
    calls = []
    fill = Gathering.fill
    monkeypatch.setattr(Gathering, "fill", lambda *arguments: calls.append(fill(*arguments)) or calls[-1])
    return calls


def some_tensors(seed, count, largest=3000):
    rng = random.Random(seed)
    shapes = [lambda: (), lambda: (1,), lambda: (rng.randint(1, largest),), lambda: (3, rng.randint(1, 9))]
    return [(f"w{i}", patterned(rng.choice(DTYPES), *rng.choice(shapes)(), seed=i)) for i in range(count)]


def expected(plan, pairs):
    """By address and offset, without torch's copies."""
    named = dict(pairs)
    images = []
    for layout in plan.buckets:
        image = bytearray(layout.nbytes)
        for slot in layout.slots:
            image[slot.offset : slot.end] = bytes_of(named[slot.name])[slot.start : slot.start + slot.nbytes]
        images.append(bytes(image))
    return images


def images_of(packer, source):
    return [bytes_of(bucket.buffer) for bucket in packer.pack(source)]


def poisoned(nbytes):
    return torch.full((nbytes,), 0xA5, dtype=torch.uint8)


@pytest.mark.parametrize("threads", [0, 2])
@pytest.mark.parametrize("align", [1, 16, 256])
@pytest.mark.parametrize("seed", range(3))
def test_b1_b4_the_bytes_of_each_and_zeros_between(seed, align, threads, filled, monkeypatch):
    monkeypatch.setattr(gathering, "JOB", 50_000)  # a larger tensor is torch's
    pairs = some_tensors(seed, 400)
    plan = plan_buckets(specs_of(pairs), 1 << 20, align=align)
    with ThreadPoolExecutor(max(1, threads)) as pool:
        packer = Packer(plan, allocate=poisoned, executor=pool if threads else None)
        for _ in range(3):
            assert images_of(packer, pairs) == expected(plan, pairs)
            pairs = [(name, tensor.clone()) for name, tensor in pairs]
    assert len(plan.buckets) == 1
    assert filled == [True] * 2, "the first round may be the last, and is torch's"


def test_a_mapping_and_a_module_too(filled):
    module = torch.nn.ParameterList([torch.nn.Parameter(patterned(torch.bfloat16, 40, seed=i)) for i in range(240)])
    plan = plan_buckets(specs_of(module), 6400)
    packer = Packer(plan)
    for source in (module, dict(module.named_parameters()), list(module.named_parameters())):
        assert images_of(packer, source) == expected(plan, list(module.named_parameters()))
    assert len(plan.buckets) == 3
    assert filled == [True] * 6


@pytest.mark.parametrize("place", [0, 33, 79])
@pytest.mark.parametrize("change", [*CHANGES, "values"])
def test_b1_a_tensor_that_changed_in_place_is_looked_at_again(change, place, filled):
    def outcome(packer):
        try:
            return images_of(packer, pairs)
        except PlanMismatchError as error:
            return str(error)

    pairs = [(f"w{i}", square() + i) for i in range(80)]
    plan = plan_buckets(specs_of(pairs), 1 << 20)
    packer = Packer(plan)
    for _ in range(2):
        images_of(packer, pairs)
    tensor = pairs[place][1]
    tensor.add_(7) if change == "values" else CHANGES[change](tensor)
    assert outcome(packer) == outcome(Packer(plan))
    assert filled == [True, change == "values"]


@pytest.mark.parametrize("kind", ["strided", "conjugated", "empty", "split", "few", "large", "large one", "by turn"])
def test_what_it_leaves_to_torch(kind, filled, monkeypatch):
    pairs = some_tensors(5, 100, largest=500)
    match kind:
        case "strided":
            pairs[50] = ("w50", patterned(torch.float32, 80)[::2])
        case "conjugated":
            pairs[50] = ("w50", patterned(torch.complex64, 8).conj())
        case "empty":
            pairs[50] = ("w50", torch.zeros(0))
        case "split":
            pairs[50] = ("w50", patterned(torch.float32, 40_000))
        case "few":
            pairs = pairs[:63]
        case "large":
            monkeypatch.setattr(gathering, "SMALL", 10)
        case "large one":
            monkeypatch.setattr(gathering, "JOB", 1 << 10)
    plan = plan_buckets(specs_of(pairs), 150_000)
    packer = Packer(plan)
    for _ in range(3):
        source = iter(pairs) if kind == "by turn" else pairs
        assert images_of(packer, source) == expected(plan, pairs)
    assert True not in filled


@pytest.mark.parametrize("count", [1, 5, 100])
@pytest.mark.parametrize("skip", [0, 3, 100_000])
@pytest.mark.parametrize("capacity", [1 << 20, 1000])
def test_a_tensor_whose_storage_was_freed_is_refused(count, skip, capacity):
    """As FSDP frees it. torch.cat reads there all the same, and the process ends."""
    tensors = [torch.zeros(500 + skip)[skip:] for _ in range(count)]
    pairs = [(f"w{i}", tensor) for i, tensor in enumerate(tensors)]
    packer = Packer(plan_buckets(specs_of(pairs), capacity))
    for _ in range(2):
        list(packer.pack(pairs))
    tensors[-1].untyped_storage().resize_(0)
    for kept in (packer, Packer(packer.plan)):
        with pytest.raises(SourceError, match=f"tensor 'w{count - 1}' has no memory"):
            list(kept.pack(pairs))


@pytest.mark.parametrize("rounds", [0, 2])
def test_a_freed_tensor_far_into_a_large_storage_is_refused(rounds):
    """As one of many views of a flat parameter. The storage is never touched, but for its views."""
    flat = torch.empty(9 << 30, dtype=torch.uint8)
    start = (1 << 33) + 4096
    pairs = [(f"w{i}", flat[at : at + 64].view(torch.float32).zero_()) for i, at in enumerate(range(start, start + 6400, 64))]
    packer = Packer(plan_buckets(specs_of(pairs), 1 << 20))
    for _ in range(rounds):
        list(packer.pack(pairs))
    flat.untyped_storage().resize_(0)
    with pytest.raises(SourceError, match="has no memory"):
        list(packer.pack(pairs))


def test_an_interpreter_whose_heap_is_low_is_served_all_the_same(monkeypatch, filled):
    """Where an address says nothing, the storage does."""
    monkeypatch.setattr("rollout_core.bucketing.copying.LOW", 1 << 62)
    monkeypatch.setattr("rollout_core.compiled.library.LOW", 1 << 62)
    pairs = [(f"w{i}", patterned(torch.bfloat16, 40, seed=i).clone()) for i in range(100)]
    plan = plan_buckets(specs_of(pairs), 1 << 20)
    packer = Packer(plan)
    for _ in range(3):
        assert images_of(packer, pairs) == expected(plan, pairs)
    assert filled == [True, True]
    pairs[7][1].untyped_storage().resize_(0)
    with pytest.raises(SourceError, match="tensor 'w7' has no memory"):
        list(packer.pack(pairs))


class OtherExecutor(Executor):
    """Whose jobs may be run in another process."""

    def submit(self, job, *arguments):
        future = Future()
        future.set_result(job(*arguments))
        return future


def test_jobs_for_other_executors_are_torchs(filled):
    pairs = some_tensors(3, 100)
    plan = plan_buckets(specs_of(pairs), 1 << 20)
    packer = Packer(plan, executor=OtherExecutor())
    for _ in range(2):
        assert images_of(packer, pairs) == expected(plan, pairs)
    assert filled == [False]


def test_a_buffer_without_memory_is_not_written():
    pairs = some_tensors(3, 100)
    (layout,) = plan_buckets(specs_of(pairs), 1 << 20).buckets
    freed = torch.empty(layout.nbytes, dtype=torch.uint8)
    freed.untyped_storage().resize_(0)
    for buffer in (freed, torch.empty(layout.nbytes, dtype=torch.uint8, device="meta")):
        assert Gathering.of(layout).fill(buffer, [tensor for _, tensor in pairs], None) is False


def test_a_packer_that_has_gathered_can_be_copied(filled):
    pairs = some_tensors(4, 100)
    plan = plan_buckets(specs_of(pairs), 1 << 20)
    packer = Packer(plan)
    for _ in range(2):
        list(packer.pack(pairs))
    copied = copy.deepcopy(packer)
    del packer
    assert images_of(copied, pairs) == expected(plan, pairs)
    assert filled == [True] * 2


def test_b8_a_late_job_writes_to_no_memory_of_others(monkeypatch):
    """Where the packer was interrupted while it waited for its jobs: they hold the buffer that they were made for."""
    monkeypatch.setattr(gathering, "JOB", 1 << 10)
    pairs = [(f"w{i}", torch.full((100,), 1.0)) for i in range(100)]
    later = [(name, torch.full((100,), 3.0)) for name, _ in pairs]
    plan = plan_buckets(specs_of(pairs), 1 << 20)
    go, jobs = threading.Event(), []
    with ThreadPoolExecutor(2) as pool:
        packer = Packer(plan, executor=pool)
        list(packer.pack(pairs))

        def late(job):
            if jobs:
                raise KeyboardInterrupt
            jobs.append(ThreadPoolExecutor.submit(pool, lambda: (go.wait(60), job())))
            return ThreadPoolExecutor.submit(pool, bool)

        with monkeypatch.context() as patch:
            patch.setattr(pool, "submit", late)
            with pytest.raises(KeyboardInterrupt):
                list(packer.pack(pairs))
        (bucket,) = packer.pack(later)
        go.set()
        assert jobs[0].result(60) == (True, True)
        assert [bytes_of(bucket.buffer)] == expected(plan, later)


def test_b15_it_keeps_no_tensor(filled):
    pairs = some_tensors(1, 100)
    packer = Packer(plan_buckets(specs_of(pairs), 1 << 20))
    for _ in range(2):
        list(packer.pack(pairs))
    refs = [weakref.ref(tensor) for _, tensor in pairs]
    del pairs
    gc.collect()
    assert filled == [True]
    assert not any(ref() for ref in refs)


def test_without_compiled_code_torch_copies(monkeypatch):
    monkeypatch.setattr("rollout_core.bucketing.finding.compiled", lambda: None)
    pairs = some_tensors(2, 100)
    plan = plan_buckets(specs_of(pairs), 1 << 20)
    packer = Packer(plan)
    for _ in range(3):
        assert images_of(packer, pairs) == expected(plan, pairs)
