"""Bugs in what arrives: bytes, dtypes, shapes, names, order."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from rollout_core.testing.mutants.registry import mutant
from rollout_core.testing.packers import Pairs
from rollout_core.testing.reference import Entry, RefBucket, ReferencePacker, Stream


@mutant("B1-zero-size", "verl NCCL and NIXL senders, ROLL")
class DropsZeroSize(ReferencePacker):
    """Leaves out tensors without elements."""

    class stream(Stream):
        def place(self, unit: list[tuple[str, torch.Tensor]]) -> None:
            super().place([pair for pair in unit if pair[1].numel()])


@mutant("B1-scalars")
class MakesScalarsVectors(ReferencePacker):
    """A 0-d tensor arrives as one of shape [1]."""

    def tensor(self, part: torch.Tensor, entry: Entry) -> torch.Tensor:
        return part.view(getattr(torch, entry.dtype)).view(entry.shape or (1,))


@mutant("B1-strided", "vllm#50641")
class IgnoresStrides(ReferencePacker):
    """Reads elements one after the other from the first, whatever the strides."""

    def content(self, tensor: torch.Tensor) -> bytes:
        if tensor.is_conj() or tensor.is_neg() or not tensor.untyped_storage().nbytes():
            return super().content(tensor)
        whole = torch.empty(0, dtype=torch.uint8).set_(tensor.untyped_storage())
        start = tensor.storage_offset() * tensor.dtype.itemsize
        data = whole[start : start + tensor.numel() * tensor.dtype.itemsize].numpy().tobytes()
        return data.ljust(tensor.numel() * tensor.dtype.itemsize, b"\0")


@mutant("B1-offset")
class IgnoresStorageOffset(ReferencePacker):
    """Reads a tensor from the beginning of its storage."""

    def content(self, tensor: torch.Tensor) -> bytes:
        if tensor.is_contiguous() and tensor.storage_offset() and not tensor.is_neg():
            tensor = tensor.as_strided(tensor.shape, tensor.stride(), 0)
        return super().content(tensor)


@mutant("B1-conj")
class IgnoresConj(ReferencePacker):
    """Sends a conjugate view without conjugating it."""

    def content(self, tensor: torch.Tensor) -> bytes:
        return super().content(tensor.conj() if tensor.is_conj() else tensor)


@mutant("B1-neg")
class IgnoresNeg(ReferencePacker):
    """Sends a negative view without negating it."""

    def content(self, tensor: torch.Tensor) -> bytes:
        return super().content(torch._neg_view(tensor) if tensor.is_neg() else tensor)


@mutant("B1-strided", "transposed fp8 weights, as vLLM keeps them")
class IgnoresStridesOfBytes(IgnoresStrides):
    """Reads one-byte dtypes as they lie in memory."""

    def content(self, tensor: torch.Tensor) -> bytes:
        return super().content(tensor) if tensor.dtype.itemsize == 1 else ReferencePacker.content(self, tensor)


@mutant("B1-parameter")
class TakesNoParameters(ReferencePacker):
    """Asks numpy for the data of a tensor that requires grad."""

    def content(self, tensor: torch.Tensor) -> bytes:
        if tensor.requires_grad:
            tensor.numpy()
        return super().content(tensor)


@mutant("B1-large")
class LosesABlock(ReferencePacker):
    """Copies in blocks of 4 KiB, and the last byte of each is left out."""

    def content(self, tensor: torch.Tensor) -> bytes:
        data = bytearray(super().content(tensor))
        data[4095::4096] = bytes(len(data[4095::4096]))
        return bytes(data)


@mutant("B1-split")
class SplitsWhatLiesThere(ReferencePacker):
    """Splits a tensor as it lies in memory, without looking at its strides."""

    class stream(Stream):
        def split(self, name: str, tensor: torch.Tensor, content: bytes) -> None:
            if not tensor.is_contiguous():
                content = IgnoresStrides().content(tensor)
            super().split(name, tensor, content)


@mutant("B1-bits", "verl's delta uses NaN as a mark")
class CleansNaN(ReferencePacker):
    """Goes through arithmetic, which makes all NaNs one and loses payloads."""

    def content(self, tensor: torch.Tensor) -> bytes:
        if tensor.dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
            tensor = torch.where(tensor.isnan(), torch.full_like(tensor, float("nan")), tensor)
        return super().content(tensor)


@mutant("B1-bits")
class DropsNegativeZero(ReferencePacker):
    """Adds zero on the way, so that -0.0 arrives as 0.0."""

    def content(self, tensor: torch.Tensor) -> bytes:
        if tensor.dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
            tensor = torch.where(tensor == 0, torch.zeros_like(tensor), tensor)
        return super().content(tensor)


@mutant("B1-dtypes", "SkyRL IPC")
class CastsToOneDtype(ReferencePacker):
    """Sends every float as bfloat16 and makes the old dtype of it again."""

    def content(self, tensor: torch.Tensor) -> bytes:
        if tensor.dtype in (torch.float64, torch.float32, torch.float16) and not tensor.is_neg():
            tensor = tensor.to(torch.bfloat16).to(tensor.dtype)
        return super().content(tensor)


@mutant("B1-dtypes")
class ForgetsFloat8(ReferencePacker):
    """Gives float8 back as the uint8 that it travelled as."""

    def tensor(self, part: torch.Tensor, entry: Entry) -> torch.Tensor:
        return super().tensor(part, replace(entry, dtype="uint8") if entry.dtype.startswith("float8") else entry)


@mutant("B1-shared")
class TiesByAddress(ReferencePacker):
    """Takes tensors that begin at one address for the same tensor."""

    def view_key(self, tensor: torch.Tensor) -> Any:
        return (tensor.data_ptr(), tensor.dtype, tensor.shape[1:])


@mutant("B1-shared")
class TiesTransposes(ReferencePacker):
    """Takes a square matrix and its transpose for the same tensor."""

    def view_key(self, tensor: torch.Tensor) -> Any:
        return (tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.is_conj(), tensor.is_neg())


@mutant("B1-conj")
class TiesConjugates(ReferencePacker):
    """Takes a tensor and its conjugate for the same tensor."""

    def view_key(self, tensor: torch.Tensor) -> Any:
        return (tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride())


@mutant("B16-iterator")
class TiesByAddressInStreams(ReferencePacker):
    """Looks for tied tensors in a generator too, by their addresses, which are used again."""

    class stream(Stream):
        def __init__(self, packer: ReferencePacker, capacity: int, groups: Any, *, ties: bool) -> None:
            super().__init__(packer, capacity, groups, ties=True)


@mutant("B1-order", "SkyRL#1816, #1581")
class SortsItsMetadata(ReferencePacker):
    """Sorts the names by size, and the payload not: a name is bound to the range of another."""

    def seal(self, bucket: RefBucket) -> RefBucket:
        ranges = [(entry.offset, entry.nbytes, entry.dtype, entry.shape, entry.start) for entry in bucket.entries]
        by_size = sorted(bucket.entries, key=lambda entry: (-entry.nbytes, entry.name))
        mixed = tuple(
            replace(entry, offset=offset, nbytes=nbytes, dtype=dtype, shape=shape, start=start)
            for entry, (offset, nbytes, dtype, shape, start) in zip(by_size, ranges, strict=True)
        )
        return super().seal(replace(bucket, entries=mixed))


@mutant("B1-order")
class ArrivesBackwards(ReferencePacker):
    """Hands tensors out last first."""

    def unpack(self, buckets: Sequence[RefBucket]) -> Pairs:
        return super().unpack(buckets)[::-1]


@mutant("B1-order", "verl#6813")
class MarksTheEndInThePayload(ReferencePacker):
    """Writes its end marker over the first bytes of the last bucket."""

    def seal(self, bucket: RefBucket) -> RefBucket:
        if bucket.last:
            bucket.buffer[:4] = 0xEE
        return super().seal(bucket)


@mutant("B1-many")
class CountsInOneByte(ReferencePacker):
    """Keeps the number of a bucket's tensors in one byte, and loses those beyond."""

    def seal(self, bucket: RefBucket) -> RefBucket:
        count = len(bucket.entries)
        return super().seal(replace(bucket, entries=bucket.entries[: count % 256] if count > 255 else bucket.entries))


@mutant("B5-capacity", "sglang#14178")
class GarblesSmallBuckets(ReferencePacker):
    """Begins the second and later buckets with bytes of the first."""

    def seal(self, bucket: RefBucket) -> RefBucket:
        if bucket.index and bucket.buffer.numel():
            bucket.buffer[0] ^= 1
        return super().seal(bucket)


@mutant("B5-capacity")
class LosesTheTail(ReferencePacker):
    """Never sends the last bucket when it is not full."""

    class stream(Stream):
        def finish(self) -> list[RefBucket]:
            return [] if self.sent and len(self.data) < self.capacity else super().finish()

    def check_end(self, ended: bool, count: int) -> None:
        pass


@mutant("B9-names")
class NormalisesNames(ReferencePacker):
    """Sends names in Unicode's composed form, stripped of spaces."""

    class stream(Stream):
        def add(self, name: str, tensor: torch.Tensor) -> list[RefBucket]:
            return super().add(unicodedata.normalize("NFC", name).strip(" ") or name, tensor)


@mutant("B9-duplicate", "verl's vLLM sender")
class CollapsesDuplicates(ReferencePacker):
    """Keeps tensors by name, so that the later of two of one name is all that arrives."""

    class stream(Stream):
        def check_name(self, name: str) -> None:
            self.names.append(name)

    def unpack(self, buckets: Sequence[RefBucket]) -> Pairs:
        return list(dict(super().unpack(buckets)).items())


@mutant("B9-duplicate")
class PassesOverTheSameTensor(ReferencePacker):
    """Leaves out a tensor that comes a second time under the same name."""

    class stream(Stream):
        def add(self, name: str, tensor: torch.Tensor) -> list[RefBucket]:
            if name in self.names and self.root_of(name + "?", tensor):
                return []
            return super().add(name, tensor)


@mutant("B9-duplicate")
class RefusesDuplicatesSilently(ReferencePacker):
    """Refuses a name that comes twice without saying which."""

    class stream(Stream):
        def check_name(self, name: str) -> None:
            if name in self.names:
                raise ValueError("duplicate parameter")
            self.names.append(name)


@mutant("B10-arrive", "vllm#56689")
class DropsTiedNames(ReferencePacker):
    """Sends a tied tensor under its first name only."""

    class stream(Stream):
        def place(self, unit: list[tuple[str, torch.Tensor]]) -> None:
            super().place([(name, tensor) for name, tensor in unit if not self.root_of(name, tensor)])


@mutant("B10-once", "every peer that was looked at")
class SendsTiedTwice(ReferencePacker):
    """Sends a tied tensor under every name anew."""

    class stream(Stream):
        def root_of(self, name: str, tensor: torch.Tensor) -> str:
            return ""
