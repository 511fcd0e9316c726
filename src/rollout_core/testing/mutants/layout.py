"""Bugs in where things lie, and in what that depends on."""

from __future__ import annotations

import os

import torch

from rollout_core.testing.mutants.registry import mutant
from rollout_core.testing.reference import Entry, RefBucket, ReferencePacker, Refused, Stream


@mutant("B2-capacity", "vLLM packed NCCL, NeMo-RL NCCL")
class AppendsThenBreaks(ReferencePacker):
    """Looks at the capacity after it has added the tensor that goes over it."""

    class stream(Stream):
        def end_after(self, unit: list[tuple[str, torch.Tensor]]) -> int:
            return len(self.data) + 1 if len(self.data) >= self.capacity else 0

        def split(self, name: str, tensor: torch.Tensor, content: bytes) -> None:
            self.entries.append(self.entry(name, tensor, len(self.data), len(content)))
            self.data += content


@mutant("B2-capacity")
class OffByOne(ReferencePacker):
    """Lets a bucket have one byte more than its capacity."""

    class stream(Stream):
        def end_after(self, unit: list[tuple[str, torch.Tensor]]) -> int:
            return super().end_after(unit) - 1


@mutant("B2-capacity")
class ForgetsPadding(ReferencePacker):
    """Counts the tensors of a bucket, and not what lies between them."""

    class stream(Stream):
        def end_after(self, unit: list[tuple[str, torch.Tensor]]) -> int:
            sizes = [entry.nbytes for entry in self.entries]
            return sum(sizes) + sum(tensor.numel() * tensor.dtype.itemsize for _, tensor in unit)


@mutant("B2-oversize", "slime, miles: a bucket of its own")
class DoesNotSplit(ReferencePacker):
    """Says that it splits tensors over the capacity, and gives them a bucket of their own."""

    class stream(Stream):
        def split(self, name: str, tensor: torch.Tensor, content: bytes) -> None:
            self.entries.append(self.entry(name, tensor, 0, len(content)))
            self.data += content
            self.close()


@mutant("B2-oversize", "verl#6091")
class LosesTheLastPiece(ReferencePacker):
    """Splits into whole pieces only, and leaves out what is left over."""

    class stream(Stream):
        def split(self, name: str, tensor: torch.Tensor, content: bytes) -> None:
            whole = len(content) // self.capacity * self.capacity
            super().split(name, tensor, content[:whole])


@mutant("B2-oversize", "NeMo#3356")
class RefusesOversize(ReferencePacker):
    """Raises for a tensor over the capacity, which it says that it splits."""

    class stream(Stream):
        def split(self, name: str, tensor: torch.Tensor, content: bytes) -> None:
            raise Refused(f"parameter {name} does not fit the buffer")


@mutant("B3-alignment", "SGLang, vLLM (vllm#57665), verl (verl#7318)")
class DoesNotAlign(ReferencePacker):
    """Puts each tensor where the one before ends."""

    def step(self, tensor: torch.Tensor) -> int:
        return 1


@mutant("B3-alignment")
class AlignsToFour(ReferencePacker):
    """Aligns everything to four bytes, which eight-byte dtypes are not content with."""

    def step(self, tensor: torch.Tensor) -> int:
        return 4


@mutant("B3-alignment")
class ForgetsItsAlignment(ReferencePacker):
    """Says that offsets are multiples of 64, and aligns to the itemsize alone."""

    align = 64


@mutant("B3-views", "vLLM IPC, prime-rl: one copy more")
class UnpacksCopies(ReferencePacker):
    """Says that it hands out views, and hands out copies."""

    def tensor(self, part: torch.Tensor, entry: Entry) -> torch.Tensor:
        return super().tensor(part.clone(), entry)


@mutant("B4-disjoint", "accepted by SGLang's reconstruct")
class Overlaps(ReferencePacker):
    """Reports slots that are one byte longer than they are."""

    def slots(self, bucket: RefBucket) -> list[tuple[str, int, int]]:
        return [(name, offset, nbytes + 1) for name, offset, nbytes in super().slots(bucket)]


@mutant("B4-bounds")
class ReportsTheWholeTensor(ReferencePacker):
    """Gives a slot the size of its whole tensor rounded up to 16 bytes."""

    def slots(self, bucket: RefBucket) -> list[tuple[str, int, int]]:
        return [(name, offset, nbytes + -nbytes % 16) for name, offset, nbytes in super().slots(bucket)]


@mutant("B4-cover", "verl#7107")
class SendsTheWholeBuffer(ReferencePacker):
    """Sends a buffer of the capacity for every bucket, however little is in it."""

    class stream(Stream):
        def bucket(self, *, last: bool) -> RefBucket:
            self.data += bytes(max(0, min(self.capacity, 4096) - len(self.data)))
            return super().bucket(last=last)


@mutant("B4-padding", "checkpoint-engine")
class LeavesPaddingDirty(ReferencePacker):
    """Leaves in the padding what was there before."""

    class stream(Stream):
        def pad(self, tensor: torch.Tensor) -> None:
            self.data += b"\xa7" * (-len(self.data) % self.packer.step(tensor))


@mutant("B6-environment", "NeMo-RL NCCL: each side's own free memory")
class PlansByFreeMemory(ReferencePacker):
    """Takes a smaller capacity where the device has little free memory."""

    class stream(Stream):
        def __init__(self, packer: ReferencePacker, capacity: int, *args: object, **options: bool) -> None:
            try:
                free = torch.cuda.mem_get_info()[0]
            except (RuntimeError, AssertionError):
                free = 80 << 30
            super().__init__(packer, capacity if free > 1 << 30 else max(16, capacity // 2), *args, **options)  # type: ignore[arg-type]


@mutant("B6-environment")
class PlansByRank(ReferencePacker):
    """Leaves the first bucket of odd ranks a byte short."""

    class stream(Stream):
        def end_after(self, unit: list[tuple[str, torch.Tensor]]) -> int:
            return super().end_after(unit) + int(os.environ.get("RANK", "0")) % 2


@mutant("B6-repeat")
class GrowsItsBuckets(ReferencePacker):
    """Doubles its capacity in later rounds, up to what the largest round had."""

    def __init__(self) -> None:
        super().__init__()
        self.seen = 0

    class stream(Stream):
        def __init__(self, packer: ReferencePacker, capacity: int, *args: object, **options: bool) -> None:
            super().__init__(packer, capacity, *args, **options)  # type: ignore[arg-type]
            assert isinstance(packer, GrowsItsBuckets)
            self.early = packer.seen % 2
            packer.seen += 1

        def end_after(self, unit: list[tuple[str, torch.Tensor]]) -> int:
            return super().end_after(unit) + (self.early and len(self.data) > 0)


@mutant("B6-hash-order")
class PlansByHash(ReferencePacker):
    """Starts a new bucket where a name's hash says so: Python salts it anew in every process."""

    class stream(Stream):
        def place(self, unit: list[tuple[str, torch.Tensor]]) -> None:
            if hash(unit[0][0]) % 2:
                self.close()
            super().place(unit)


@mutant("B11-together")
class SeparatesGroups(ReferencePacker):
    """Takes a group for a wish."""

    class stream(Stream):
        def place(self, unit: list[tuple[str, torch.Tensor]]) -> None:
            for pair in unit:
                super().place([pair])


@mutant("B11-too-large")
class OverfillsForGroups(ReferencePacker):
    """Packs a group into one bucket, however large it is."""

    class stream(Stream):
        def end_after(self, unit: list[tuple[str, torch.Tensor]]) -> int:
            return super().end_after(unit) if len(unit) == 1 else 0


@mutant("B11-together")
class TakesPairsForGroups(ReferencePacker):
    """Keeps the first two of a group together, and lets the third go where it likes."""

    class stream(Stream):
        def place(self, unit: list[tuple[str, torch.Tensor]]) -> None:
            super().place(unit[:2])
            for pair in unit[2:]:
                self.close()
                super().place([pair])


@mutant("B11-incomplete", "verl before it staged fusion groups")
class ForgetsIncompleteGroups(ReferencePacker):
    """Drops the members of a group that never completes."""

    class stream(Stream):
        def check_groups(self) -> None:
            pass
