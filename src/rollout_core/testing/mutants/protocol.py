"""Bugs in where a stream ends, in digests, in agreement and in manifests."""

from __future__ import annotations

import json
import pickle
from collections.abc import Sequence
from dataclasses import astuple, replace
from hashlib import blake2b
from typing import Any

import torch

from rollout_core.testing.mutants.registry import mutant
from rollout_core.testing.packers import Pairs, SpecRow
from rollout_core.testing.reference import Entry, RefBucket, ReferencePacker, Refused


@mutant("B7-different", "SkyRL#2114, vllm#31943")
class TrustsTheOtherSide(ReferencePacker):
    """Binds its own specs to the ranges that it computes, and never compares them with the sender's."""

    def receive(self, specs: Sequence[SpecRow], capacity: int, buckets: Sequence[RefBucket]) -> Pairs:
        data = torch.cat([bucket.buffer for bucket in buckets])
        pairs: Pairs = []
        place = 0
        for name, dtype, shape in specs:
            nbytes = torch.Size(shape).numel() * dtype.itemsize
            pairs.append((name, data[place : place + nbytes].clone().view(dtype).view(shape)))
            place += nbytes
        return pairs


@mutant("B7-different")
class ComparesTheLastOnly(TrustsTheOtherSide):
    """Compares the number of tensors and the last of them."""

    def receive(self, specs: Sequence[SpecRow], capacity: int, buckets: Sequence[RefBucket]) -> Pairs:
        entries = [entry for bucket in buckets for entry in bucket.entries]
        name, dtype, shape = specs[-1] if specs else ("", None, ())
        last = entries[-1] if entries else None
        if len(specs) != len(entries) or (last and (last.name, last.dtype, last.shape) != (name, str(dtype)[6:], shape)):
            raise Refused(f"the two sides differ in tensor {len(specs) - 1}")
        return super().receive(specs, capacity, buckets)


@mutant("B7-same")
class PlansWithAnotherCapacity(ReferencePacker):
    """The receiving side rounds the capacity up to a power of two, and refuses what the sender made."""

    def receive(self, specs: Sequence[SpecRow], capacity: int, buckets: Sequence[RefBucket]) -> Pairs:
        return super().receive(specs, 1 << capacity.bit_length(), buckets)


@mutant("B12-empty", "SGLang, slime#2134")
class RefusesTheEmptyModel(ReferencePacker):
    """Raises when there is nothing to pack."""

    def seal(self, bucket: RefBucket) -> RefBucket:
        if not bucket.entries:
            raise Refused("Cannot create empty tensor bucket")
        return super().seal(bucket)


@mutant("B12-truncated")
class AcceptsLess(ReferencePacker):
    """Takes a stream that stops early for a whole one."""

    def check_end(self, ended: bool, count: int) -> None:
        pass


@mutant("B12-missing")
class CountsTheLastOnly(ReferencePacker):
    """Takes a stream for whole once its last bucket is there."""

    def check(self, bucket: RefBucket, place: int, ended: bool, version: int) -> None:
        super().check(bucket, max(place, bucket.index), ended, version)


@mutant("B12-repeated")
class AcceptsRepeats(ReferencePacker):
    """Passes over a bucket that it has seen."""

    def unpack(self, buckets: Sequence[RefBucket]) -> Pairs:
        return super().unpack([b for i, b in enumerate(buckets) if not i or b.index != buckets[i - 1].index])


@mutant("B12-reordered")
class SortsBuckets(ReferencePacker):
    """Takes buckets in any order, as if each could be applied on its own."""

    def unpack(self, buckets: Sequence[RefBucket]) -> Pairs:
        return super().unpack(sorted(buckets, key=lambda bucket: bucket.index))


@mutant("B12-after-end")
class StopsListening(ReferencePacker):
    """Looks at nothing that comes after the last bucket."""

    def unpack(self, buckets: Sequence[RefBucket]) -> Pairs:
        ends = [i for i, bucket in enumerate(buckets) if bucket.last]
        return super().unpack(buckets[: ends[0] + 1] if ends else buckets)


@mutant("B13-flipped-bit", "every dense path that was looked at")
class HasNoDigest(ReferencePacker):
    """Says that damage is noticed, and checks nothing of the payload."""

    def digest(self, bucket: RefBucket) -> bytes:
        return repr((bucket.version, bucket.index, bucket.last, bucket.entries)).encode()


@mutant("B13-flipped-bit")
class DigestsTheBeginning(ReferencePacker):
    """A digest of the first 512 bytes."""

    def digest(self, bucket: RefBucket) -> bytes:
        return super().digest(replace(bucket, buffer=bucket.buffer[:512]))


@mutant("B13-swapped-values", "verl's delta checksum")
class XorsWords(ReferencePacker):
    """A digest that is the XOR of all 32-bit words."""

    def digest(self, bucket: RefBucket) -> bytes:
        total = 0
        data = bytes(bucket.buffer.tolist())
        for at in range(0, len(data), 4):
            total ^= int.from_bytes(data[at : at + 4], "little")
        return total.to_bytes(4, "little") + repr((bucket.version, bucket.index, bucket.entries)).encode()


@mutant("B13-swapped-slots")
class AddsSlotDigests(ReferencePacker):
    """A digest that is the sum of the digests of the slots, whatever their order."""

    def digest(self, bucket: RefBucket) -> bytes:
        data = bytes(bucket.buffer.tolist())
        parts = [blake2b(data[e.offset : e.offset + e.nbytes], digest_size=8).digest() for e in bucket.entries]
        total = sum(int.from_bytes(part, "little") for part in parts) & (1 << 64) - 1
        return total.to_bytes(8, "little") + repr((bucket.version, bucket.index, bucket.entries)).encode()


@mutant("B13-moved")
class AddsBucketDigests(ReferencePacker):
    """Checks the round as a whole, by a sum that does not know which bucket a payload is of."""

    def digest(self, bucket: RefBucket) -> bytes:
        return blake2b(bytes(bucket.buffer.tolist()), digest_size=8).digest()

    def check(self, bucket: RefBucket, place: int, ended: bool, version: int) -> None:
        super().check(replace(bucket, digest=self.digest(bucket)), place, ended, version)

    def unpack(self, buckets: Sequence[RefBucket]) -> Pairs:
        if sorted(self.digest(bucket) for bucket in buckets) != sorted(bucket.digest for bucket in buckets):
            raise Refused("the round is damaged")
        return super().unpack(buckets)


@mutant("B13-replay")
class ForgetsTheVersion(ReferencePacker):
    """Seals buckets without the round that they are of."""

    def digest(self, bucket: RefBucket) -> bytes:
        return super().digest(replace(bucket, version=0))

    def check(self, bucket: RefBucket, place: int, ended: bool, version: int) -> None:
        super().check(bucket, place, ended, bucket.version)


@mutant("B14-cut")
class FillsUpManifests(ReferencePacker):
    """Reads as much of a manifest as there is."""

    def read_manifest(self, data: bytes) -> list[list[Entry]]:
        try:
            return super().read_manifest(data)
        except json.JSONDecodeError:
            return []


@mutant("B14-trailing")
class StripsManifests(ReferencePacker):
    """Takes zero bytes after a manifest for padding."""

    def read_manifest(self, data: bytes) -> list[list[Entry]]:
        return super().read_manifest(data.rstrip(b"\0"))


@mutant("B14-changed")
class TrustsManifests(ReferencePacker):
    """Unpacks rows without looking at them, and fails with whatever comes of that."""

    def read_manifest(self, data: bytes) -> list[list[Entry]]:
        rows: Any = json.loads(data)
        return [[Entry(name, str(getattr(torch, dtype)), tuple(shape), *rest) for name, dtype, shape, *rest in b] for b in rows]


@mutant("B14-pickle", "SGLang, verl, slime, checkpoint-engine (sglang#11909)")
class UnpicklesManifests(ReferencePacker):
    """Sends its metadata as a pickle, and loads whatever comes."""

    manifest_errors = Exception

    def manifest(self, named: Pairs, capacity: int) -> bytes:
        return pickle.dumps([[astuple(entry) for entry in bucket.entries] for bucket in self.pack(named, capacity)])

    def read_manifest(self, data: bytes) -> Any:
        return pickle.loads(data)
