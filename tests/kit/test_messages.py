"""Messages of checks that no mutant leads to, word for word; with golden/mutants.json these are all that checks have."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from typing import ClassVar

import pytest
import torch

import rollout_core.testing.checks.manifest as manifest_checks
from rollout_core.testing import Violation, get_check
from rollout_core.testing.cases import PackerCase, TensorCase
from rollout_core.testing.packers import PackerUnderTest
from rollout_core.testing.reference import ReferencePacker, Stream

AB = (TensorCase("a"), TensorCase("b"))


class Plain:
    """One bucket for each tensor, a list of one pair."""

    capabilities = frozenset({"iterators"})

    def pack(self, named, capacity, **options):
        for name, tensor in named:
            yield [(name, tensor.clone())]

    def unpack(self, buckets):
        return [pair for bucket in buckets for pair in bucket]


class OversizeError(Plain):
    capabilities = frozenset({"oversize=error"})


class TwoTogether(ReferencePacker):
    capabilities = ReferencePacker.capabilities - {"oversize=split"} | {"oversize=own"}

    class stream(Stream):
        def end_after(self, unit):
            return 0

        def split(self, name, tensor, content):
            self.entries.append(self.entry(name, tensor, len(self.data), len(content)))
            self.data += content


class LooksAhead(Plain):
    def pack(self, named, capacity):
        copies = [(name, tensor.clone()) for name, tensor in named]
        yield from ([pair] for pair in copies)


class ListsBuckets(Plain):
    def pack(self, named, capacity):
        return [[(name, tensor.clone())] for name, tensor in named]


def one_bucket(pair):
    return [(pair[0], pair[1].clone())]


class Iterates(Plain):
    def pack(self, named, capacity):
        return map(one_bucket, named)


class Swallows(Plain):
    def pack(self, named, capacity):
        try:
            yield from super().pack(named, capacity)
        except Exception:
            return


class HoldsOn(Plain):
    held: ClassVar[list] = []

    def pack(self, named, capacity):
        for name, tensor in named:
            self.held.append(tensor)
            yield [(name, tensor.clone())]


class KeepsViews(Plain):
    def pack(self, named, capacity):
        for pair in named:
            yield [pair]


class OpaqueGroups(Plain):
    capabilities = frozenset({"groups"})

    def pack(self, named, capacity, groups=()):
        return [frozenset(named)]

    def unpack(self, buckets):
        return [pair for bucket in buckets for pair in bucket]


class WrongBuffer(ReferencePacker):
    def buffer(self, bucket):
        return bucket.buffer.to(torch.int32)


class NoBuffer(ReferencePacker):
    def buffer(self, bucket):
        return bytes(bucket.buffer.tolist())


class OtherCapacity(ReferencePacker):
    def receive(self, specs, capacity, buckets):
        result = self.unpack(buckets)
        return result if capacity < 16 else result[::-1]


class Renews(Plain):
    """Unpacks into the same memory every time."""

    def unpack(self, buckets):
        for bucket in buckets:
            for name, tensor in bucket:
                kept = MEMORY.setdefault((name, tuple(tensor.shape)), tensor.clone())
                kept.copy_(tensor)
                yield name, kept


MEMORY: dict = {}


class SlicesOfArena(ReferencePacker):
    def buffer_of(self, data):
        return torch.zeros(1 << 16, dtype=torch.uint8)[: len(data)].copy_(super().buffer_of(data))


class OneBuffer(Plain):
    def pack(self, named, capacity):
        kept = None
        for name, tensor in named:
            kept = tensor.clone() if kept is None else kept.copy_(tensor)
            yield [(name, kept)]


class WrapsAsync(ReferencePacker):
    async def apack(self, source, capacity):
        try:
            async for bucket in super().apack(source, capacity):
                yield bucket
        except Exception as error:
            raise RuntimeError("broken") from error


class Grouped(OpaqueGroups):
    pass


class SlowManifest(ReferencePacker):
    def read_manifest(self, data):
        time.sleep(0.02)
        return super().read_manifest(data)


def case(*, tensors=AB, capacity=8, **fields):
    return PackerCase(tensors=tensors, capacity=capacity, **fields)


MANY = tuple(TensorCase(name) for name in "abcdefgh")
MESSAGES = [
    (
        "B2-oversize",
        OversizeError,
        case(tensors=(TensorCase("a", shape=(3,)),)),
        "'a' f32[3] has 12 bytes, and was not refused (declared: error)",
    ),
    (
        "B2-oversize",
        TwoTogether,
        case(tensors=(TensorCase("a", shape=(3,)), TensorCase("b"))),
        "buckets of [16] bytes are over the capacity, and the tensors over it have [12] bytes",
    ),
    (
        "B15-lookahead",
        LooksAhead,
        case(tensors=MANY, capacity=4),
        "32 bytes were taken from the source when bucket 0 came (capacity: 4, model: at most 12)",
    ),
    (
        "B15-lookahead",
        HoldsOn,
        case(tensors=MANY, capacity=4),
        "16 bytes of source tensors are held at once (capacity: 4, largest: 4)",
    ),
    ("B16-error", Swallows, case(at=(1,)), "the source raised after 1 of 2 tensors, and no error came: 1 buckets did"),
    ("B16-close", ListsBuckets, case(), "pack gave list_iterator, which cannot be closed"),
    ("B16-close", Iterates, case(), "pack gave map, which cannot be closed"),
    ("B16-close", HoldsOn, case(), "the buckets were closed after the first, and 1 of 2 source tensors are still held"),
    (
        "B8-retained",
        SlicesOfArena,
        case(),
        "bucket 0 keeps a storage of 65536 bytes for a buffer of 8",
    ),
    (
        "B8-complete",
        OneBuffer,
        case(),
        "bucket 0 of 2 is not what it was when it was handed out",
    ),
    (
        "B16-async-error",
        WrapsAsync,
        case(at=(1,)),
        "the source raised SourceBroke, and what came was RuntimeError: broken (in WrapsAsync.apack, test_messages.py:LINE)",
    ),
    (
        "B11-too-large",
        Grouped,
        case(capacity=4, groups=(("a", "b"),)),
        "the group ['a', 'b'] has 8 bytes and the capacity is 4: no error was raised",
    ),
    (
        "B8-retained",
        KeepsViews,
        case(tensors=(TensorCase("a", layout="sliced"),)),
        "bucket 0 keeps a storage of 8 bytes for a tensor of 4",
    ),
    (
        "B8-sources",
        KeepsViews,
        case(),
        "the source was overwritten after packing, and 'a' has other bytes in 1 of 1 elements, first in element 0 "
        "(model: 1f262d34, actual: e0d9d2cb)",
    ),
    (
        "B8-rounds",
        KeepsViews,
        case(tensors=AB[:1], steps=(("pack", 0), ("change", 0), ("unpack", 0))),
        "step 2 (unpack 0): round 0 is not what was packed: 'a' has other bytes in 1 of 1 elements, first in element 0 "
        "(model: 1f262d34, actual: e0d9d2cb)",
    ),
    (
        "B8-rounds",
        KeepsViews,
        case(tensors=AB[:1], steps=(("pack", 0), ("change", 0))),
        "at the end: round 0 is not what was packed: 'a' has other bytes in 1 of 1 elements, first in element 0 "
        "(model: 1f262d34, actual: e0d9d2cb)",
    ),
    (
        "B8-rounds",
        KeepsViews,
        case(tensors=AB[:1], steps=(("pack", 0), ("unpack", 0), ("spoil", 0))),
        "step 2 (spoil 0): writing to what was unpacked changed source 0: 'a' has other bytes in 1 of 1 elements, first in "
        "element 0 (model: 1f262d34, actual: e0d9d2cb)",
    ),
    (
        "B8-rounds",
        Renews,
        case(tensors=AB[:1], steps=(("pack", 0), ("pack", 1), ("unpack", 0), ("unpack", 1))),
        "step 3 (unpack 1): what was unpacked before changed: 'a' has other bytes in 1 of 1 elements, first in element 0 "
        "(model: 1f262d34, actual: 333a4148)",
    ),
    (
        "B8-rounds",
        Swallows,
        case(tensors=AB[:1], steps=(("fail", 1),)),
        "step 0 (fail 1): the source raised SourceBroke after 1 tensors, and pack raised nothing",
    ),
    (
        "B11-together",
        OpaqueGroups,
        case(groups=(("a", "b"),)),
        "a packer with groups needs slots(bucket), or buckets that are lists of (name, tensor)",
    ),
    ("B13-flipped-bit", WrongBuffer, case(at=(0, 0)), "buffer(bucket) gave a Tensor of int32[8], not a 1-d uint8 tensor"),
    ("B13-flipped-bit", NoBuffer, case(at=(0, 0)), "buffer(bucket) gave a bytes, not a 1-d uint8 tensor"),
    (
        "B7-different",
        OtherCapacity,
        case(at=(6, 0)),
        "the receiver's capacity differs (it expects 32 bytes), and no error was raised",
    ),
    ("B14-changed", SlowManifest, case(data=b"[]"), "reading 2 bytes took 0.0 s"),
]


@pytest.mark.parametrize("place", range(len(MESSAGES)))
def test_the_message(place, monkeypatch):
    id, packer, drawn, message = MESSAGES[place]
    monkeypatch.setattr(manifest_checks, "_SECONDS", 0.01)
    MEMORY.clear()
    HoldsOn.held.clear()
    with pytest.raises(Violation) as raised:
        get_check(f"packer/{id}").run(PackerUnderTest(packer()), drawn)
    assert re.sub(r"\.py:\d+", ".py:LINE", str(raised.value)) == message


def test_a_generator_is_closed():
    assert isinstance(Plain().pack([], 1), Iterator)
    get_check("packer/B16-close").run(PackerUnderTest(Plain()), case())
