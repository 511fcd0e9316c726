"""Many small tensors on the CPU, by compiled code: the bytes that torch copies, and torch's answers for what it does not take."""

from __future__ import annotations

import gc
import random
import weakref
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from rollout_core.bucketing import Packer, plan_buckets, specs_of
from rollout_core.bucketing.compiled import gathering
from rollout_core.bucketing.compiled.finding import compiled
from rollout_core.bucketing.compiled.gathering import Gathering
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
@pytest.mark.parametrize("skip", [0, 3])
@pytest.mark.parametrize("capacity", [1 << 20, 1000])
def test_a_tensor_whose_storage_was_freed_is_refused(count, skip, capacity):
    """As FSDP frees it. torch.cat reads there all the same, and the process ends."""
    tensors = [torch.zeros(503)[skip : 500 + skip] for _ in range(count)]
    pairs = [(f"w{i}", tensor) for i, tensor in enumerate(tensors)]
    packer = Packer(plan_buckets(specs_of(pairs), capacity))
    for _ in range(2):
        list(packer.pack(pairs))
    tensors[-1].untyped_storage().resize_(0)
    for kept in (packer, Packer(packer.plan)):
        with pytest.raises(SourceError, match=f"tensor 'w{count - 1}' has no memory"):
            list(kept.pack(pairs))


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
    monkeypatch.setattr("rollout_core.bucketing.compiled.finding.compiled", lambda: None)
    pairs = some_tensors(2, 100)
    plan = plan_buckets(specs_of(pairs), 1 << 20)
    packer = Packer(plan)
    for _ in range(3):
        assert images_of(packer, pairs) == expected(plan, pairs)
