"""The reference packer: the plainest one that keeps every clause, slow and small. The mutants are made of it, each with one bug."""

from __future__ import annotations

import json
import math
from collections.abc import AsyncIterable, AsyncIterator, Iterable, Iterator, Mapping, Sequence
from dataclasses import astuple, dataclass, replace
from hashlib import blake2b
from typing import Any, ClassVar

import torch

from rollout_core.testing.packers import CAPABILITIES, Pairs, SpecRow


class Refused(ValueError):
    """What the reference packer raises for anything that it does not take."""


@dataclass(frozen=True)
class Entry:
    """One tensor, or one piece of it from byte ``start`` on. With ``alias_of`` it takes no bytes: it is that tensor again."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int
    start: int = 0
    alias_of: str = ""

    @property
    def total(self) -> int:
        """Bytes of the whole tensor."""
        return int(math.prod(self.shape) * getattr(torch, self.dtype).itemsize)


@dataclass(frozen=True, eq=False)
class RefBucket:
    buffer: torch.Tensor
    entries: tuple[Entry, ...]
    index: int
    last: bool
    version: int
    digest: bytes = b""


class Stream:
    """One call of pack: tensors in, full buckets out."""

    def __init__(self, packer: ReferencePacker, capacity: int, groups: Iterable[Iterable[str]], *, ties: bool) -> None:
        self.packer = packer
        self.capacity = capacity
        self.groups = [list(group) for group in groups]
        self.held: dict[str, torch.Tensor] = {}  # of groups that are not complete
        self.roots: dict[Any, str] = {}
        self.ties = ties
        self.names: list[str] = []
        self.data = bytearray()
        self.entries: list[Entry] = []
        self.full: list[RefBucket] = []  # not known yet whether the last of them is the last
        self.sent = 0

    def add(self, name: str, tensor: torch.Tensor) -> list[RefBucket]:
        """Take one tensor; the buckets that can go."""
        self.check_name(name)
        group = next((group for group in self.groups if name in group), None)
        if group is None:
            self.place([(name, tensor)])
        else:
            self.held[name] = tensor.clone()
            if all(member in self.held for member in group):
                self.place([(member, self.held.pop(member)) for member in group])
        return self.ready()

    def check_name(self, name: str) -> None:
        if not name:
            raise Refused("a tensor has the empty name")
        if name in self.names:
            raise Refused(f"name {name!r} stands at places {self.names.index(name)} and {len(self.names)}")
        self.names.append(name)

    def place(self, unit: list[tuple[str, torch.Tensor]]) -> None:
        """Put tensors that stay together into the open bucket, or a new one."""
        if self.end_after(unit) > self.capacity:
            self.close()
            if len(unit) > 1 and self.end_after(unit) > self.capacity:
                raise Refused(f"the group {[name for name, _ in unit]} does not fit a bucket of {self.capacity} bytes")
        for name, tensor in unit:
            root = self.root_of(name, tensor)
            if root:
                self.entries.append(self.entry(name, tensor, len(self.data), 0, alias_of=root))
                continue
            content = self.packer.content(tensor)
            if len(content) > self.capacity:
                self.split(name, tensor, content)
            else:
                self.pad(tensor)
                self.entries.append(self.entry(name, tensor, len(self.data), len(content)))
                self.data += content

    def end_after(self, unit: list[tuple[str, torch.Tensor]]) -> int:
        end = len(self.data)
        for _name, tensor in unit:
            end += -end % self.packer.step(tensor) + tensor.numel() * tensor.dtype.itemsize
        return end

    def root_of(self, name: str, tensor: torch.Tensor) -> str:
        """The earlier name of the same view, or nothing."""
        if not self.ties or not tensor.numel():
            return ""
        key = self.packer.view_key(tensor)
        root = self.roots.setdefault(key, name)
        return "" if root == name else root

    def pad(self, tensor: torch.Tensor) -> None:
        self.data += bytes(-len(self.data) % self.packer.step(tensor))

    def split(self, name: str, tensor: torch.Tensor, content: bytes) -> None:
        self.close()
        for start in range(0, len(content), self.capacity):
            piece = content[start : start + self.capacity]
            self.entries.append(replace(self.entry(name, tensor, 0, len(piece)), start=start))
            self.data += piece
            self.close()

    def entry(self, name: str, tensor: torch.Tensor, offset: int, nbytes: int, alias_of: str = "") -> Entry:
        dtype = str(tensor.dtype).removeprefix("torch.")
        return Entry(name, dtype, tuple(tensor.shape), offset, nbytes, alias_of=alias_of)

    def close(self) -> None:
        """Finish the open bucket, if there is anything in it."""
        if self.entries:
            self.full.append(self.bucket(last=False))

    def bucket(self, *, last: bool) -> RefBucket:
        buffer = self.packer.buffer_of(bytes(self.data))
        bucket = RefBucket(buffer, tuple(self.entries), self.sent + len(self.full), last, self.packer.version)
        self.data, self.entries = bytearray(), []
        return bucket

    def ready(self) -> list[RefBucket]:
        """All full buckets that are certainly not the last."""
        keep = 0 if self.entries else 1
        count = max(0, len(self.full) - keep)
        ready, self.full = self.full[:count], self.full[count:]
        self.sent += count
        return [self.packer.seal(bucket) for bucket in ready]

    def finish(self) -> list[RefBucket]:
        """The rest, once the source has ended."""
        self.check_groups()
        if self.entries or not (self.full or self.sent):
            self.full.append(self.bucket(last=False))
        self.full[-1] = replace(self.full[-1], last=True)
        return [self.packer.seal(bucket) for bucket in self.full]

    def check_groups(self) -> None:
        for group in self.groups:
            missing = [name for name in group if name not in self.names]
            if missing:
                raise Refused(f"the group {group} never completed: there is no tensor {missing[0]!r}")


class ReferencePacker:
    """Packs into byte strings, entry by entry; each bucket carries its own layout."""

    capabilities: ClassVar[set[str]] = set(CAPABILITIES) - {"oversize=own", "oversize=error"}
    manifest_errors: ClassVar[type[Exception]] = ValueError
    stream: type[Stream] = Stream

    def __init__(self) -> None:
        self.version = 0

    def pack(self, source: Any, capacity: int, groups: Iterable[Iterable[str]] = ()) -> Iterator[RefBucket]:
        self.version += 1
        stream = self.stream(self, capacity, groups, ties=isinstance(source, list | Mapping | torch.nn.Module))
        pairs = iter(self.pairs(source))
        try:
            for name, tensor in pairs:
                ready = stream.add(name, tensor)
                del tensor
                yield from ready
            yield from stream.finish()
        finally:
            if hasattr(pairs, "close"):
                pairs.close()

    async def apack(self, source: AsyncIterable[tuple[str, torch.Tensor]], capacity: int) -> AsyncIterator[RefBucket]:
        self.version += 1
        stream = self.stream(self, capacity, (), ties=False)
        async for name, tensor in source:
            for bucket in stream.add(name, tensor):
                yield bucket
        for bucket in stream.finish():
            yield bucket

    def pairs(self, source: Any) -> Iterable[tuple[str, torch.Tensor]]:
        if isinstance(source, torch.nn.Module):
            return [*source.named_parameters(remove_duplicate=False), *source.named_buffers(remove_duplicate=False)]
        pairs: Iterable[tuple[str, torch.Tensor]] = source.items() if isinstance(source, Mapping) else source
        return pairs

    def content(self, tensor: torch.Tensor) -> bytes:
        """A tensor's bytes in row-major order."""
        plain = tensor.detach().resolve_conj().resolve_neg().contiguous()
        flat = plain.as_strided((plain.numel(),), (1,), plain.storage_offset())  # one element may still have an odd stride
        return bytes(flat.view(torch.uint8).cpu().numpy().tobytes())

    def view_key(self, tensor: torch.Tensor) -> Any:
        return (tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride(), tensor.is_conj(), tensor.is_neg())

    def step(self, tensor: torch.Tensor) -> int:
        """What this tensor's offset is a multiple of."""
        return tensor.dtype.itemsize

    def buffer_of(self, data: bytes) -> torch.Tensor:
        return torch.frombuffer(bytearray(data), dtype=torch.uint8) if data else torch.empty(0, dtype=torch.uint8)

    def seal(self, bucket: RefBucket) -> RefBucket:
        return replace(bucket, digest=self.digest(bucket))

    def digest(self, bucket: RefBucket) -> bytes:
        header = repr((bucket.version, bucket.index, bucket.last, [astuple(entry) for entry in bucket.entries]))
        return blake2b(header.encode("utf-8", "surrogatepass") + bytes(bucket.buffer.tolist()), digest_size=16).digest()

    def unpack(self, buckets: Sequence[RefBucket]) -> Pairs:
        pairs: Pairs = []
        by_name: dict[str, torch.Tensor] = {}
        pieces: list[torch.Tensor] = []
        ended = False
        for place, bucket in enumerate(buckets):
            self.check(bucket, place, ended, buckets[0].version)
            ended = bucket.last
            for entry in bucket.entries:
                if entry.alias_of:
                    pairs.append((entry.name, by_name[entry.alias_of]))
                    continue
                part = bucket.buffer[entry.offset : entry.offset + entry.nbytes]
                if entry.nbytes < entry.total:
                    pieces.append(part)
                    if entry.start + entry.nbytes < entry.total:
                        continue
                    part, pieces = torch.cat(pieces), []
                by_name[entry.name] = self.tensor(part, entry)
                pairs.append((entry.name, by_name[entry.name]))
        self.check_end(ended, len(buckets))
        return pairs

    def check(self, bucket: RefBucket, place: int, ended: bool, version: int) -> None:
        """Refuse a bucket that is not the next one as it was sealed."""
        if ended:
            raise Refused(f"bucket {bucket.index} came after the end")
        if bucket.index != place:
            raise Refused(f"bucket {bucket.index} came where bucket {place} belongs")
        if bucket.version != version:
            raise Refused(f"bucket {place} is of version {bucket.version}, and the round of {version}")
        if bucket.digest != self.digest(bucket):
            raise Refused(f"bucket {place} is damaged")

    def check_end(self, ended: bool, count: int) -> None:
        if not ended:
            raise Refused(f"the stream stopped after {count} buckets")

    def tensor(self, part: torch.Tensor, entry: Entry) -> torch.Tensor:
        return part.view(getattr(torch, entry.dtype)).view(entry.shape)

    def bucket_nbytes(self, bucket: RefBucket) -> int:
        return bucket.buffer.numel()

    def slots(self, bucket: RefBucket) -> list[tuple[str, int, int]]:
        return [(entry.name, entry.offset, entry.nbytes) for entry in bucket.entries if not entry.alias_of]

    def buffer(self, bucket: RefBucket) -> torch.Tensor:
        return bucket.buffer

    def receive(self, specs: Sequence[SpecRow], capacity: int, buckets: Sequence[RefBucket]) -> Pairs:
        blank = ((name, torch.zeros(shape, dtype=dtype)) for name, dtype, shape in specs)
        expected = [bucket.entries for bucket in type(self)().pack(blank, capacity)]
        if expected != [bucket.entries for bucket in buckets]:
            raise Refused("the sender's layout is not the one that these specs and this capacity give")
        return self.unpack(buckets)

    def manifest(self, named: Pairs, capacity: int) -> bytes:
        return _encoded(bucket.entries for bucket in self.pack(named, capacity))

    def read_manifest(self, data: bytes) -> list[list[Entry]]:
        buckets = json.loads(data)
        if not isinstance(buckets, list) or not all(isinstance(rows, list) for rows in buckets):
            raise Refused("a manifest is a list of lists")
        entries = [[_entry(row) for row in rows] for rows in buckets]
        for bucket in entries:
            end = 0
            for entry in bucket:
                if not (end <= entry.offset < end + 16 and entry.start >= 0 and 0 <= entry.nbytes <= entry.total - entry.start):
                    raise Refused(f"{entry} lies outside of its tensor or its bucket")
                end = entry.offset + entry.nbytes
        if _encoded(entries) != data:
            raise Refused("these are not the bytes that the entries are written as")
        return entries


def _encoded(buckets: Iterable[Iterable[Entry]]) -> bytes:
    return json.dumps([[list(astuple(entry)) for entry in bucket] for bucket in buckets]).encode()


def _entry(row: Any) -> Entry:
    kinds = (str, str, list, int, int, int, str)
    if not isinstance(row, list) or [type(value) for value in row] != list(kinds):
        raise Refused(f"{row!r} is no entry")
    name, dtype, shape, *rest = row
    if not isinstance(getattr(torch, dtype, None), torch.dtype) or not all(type(side) is int and side >= 0 for side in shape):
        raise Refused(f"{row!r} is no entry")
    return Entry(name, dtype, tuple(shape), *rest)
