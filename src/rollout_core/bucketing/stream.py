"""pack_stream: buckets from a source whose tensors are not known ahead, each bucket with its own layout.

For a trainer that gathers one parameter at a time. Where the specs are known, a plan is better: it is agreed on before anything
moves, and its buckets carry no layout.
"""

from __future__ import annotations

from collections.abc import AsyncIterable, AsyncIterator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch

from rollout_core.bucketing.bucket import Bucket, check_version, seal
from rollout_core.bucketing.buffers import Allocate, BufferPool, check_buffer
from rollout_core.bucketing.copying import conform, write_slot, zero_padding
from rollout_core.bucketing.digest import DigestChoice, check_choice
from rollout_core.bucketing.placement import BucketLayout, Filler, Options, Oversize, Slot
from rollout_core.bucketing.sources import AnySource, Source, Step, adrive, as_mapping, drive, in_loop, named_pairs
from rollout_core.bucketing.specs import TensorSpec, next_spec, specs_of
from rollout_core.bucketing.stream_header import StreamBucket, chain_digest, encode_header
from rollout_core.bucketing.tensors import as_bytes, bytes_digest, own_copy
from rollout_core.errors import IncompleteStreamError, PlanMismatchError, SourceError


def pack_stream(
    source: Source,
    capacity: int,
    *,
    oversize: Oversize = "split",
    align: int = 1,
    groups: Iterable[Iterable[str]] = (),
    aliases: Mapping[str, str] | None = None,
    version: int = 0,
    digest: DigestChoice = "auto",
    allocate: Allocate | None = None,
) -> Iterator[StreamBucket]:
    """Buckets of at most ``capacity`` bytes from tensors as they come; each is copied before the next is asked for.

    ``aliases`` maps a tied name to the earlier name of the same tensor: it travels with that one. It is found by itself where all
    tensors can be seen at once (a module, mapping or list); a generator has to be told, or its tied tensors travel under each
    name. ``groups``: names that land in one bucket, sent when the last of them has come. The rest is as for ``plan_buckets`` and
    ``pack``, and so are the errors; a group or alias that never comes is ``IncompleteStreamError``, raised before the last bucket.
    """
    mapping = as_mapping(source)
    if aliases is None:
        seen_at_once = mapping if mapping is not None else source if isinstance(source, Sequence) else None
        aliases = {} if seen_at_once is None else {s.name: s.alias_of for s in specs_of(seen_at_once) if s.alias_of}
    stream = _Stream(Options(capacity=capacity, oversize=oversize, align=align), groups, aliases, version, digest, allocate)
    return drive(stream.steps(), named_pairs(mapping if mapping is not None else source))


def apack_stream(
    source: AnySource,
    capacity: int,
    *,
    oversize: Oversize = "split",
    align: int = 1,
    groups: Iterable[Iterable[str]] = (),
    aliases: Mapping[str, str] | None = None,
    version: int = 0,
    digest: DigestChoice = "auto",
    allocate: Allocate | None = None,
) -> AsyncIterator[StreamBucket]:
    """``pack_stream`` for sync and async sources; an async one's ties are only those declared in ``aliases``."""
    if not isinstance(source, AsyncIterable):
        return in_loop(
            pack_stream(
                source,
                capacity,
                oversize=oversize,
                align=align,
                groups=groups,
                aliases=aliases,
                version=version,
                digest=digest,
                allocate=allocate,
            )
        )
    options = Options(capacity=capacity, oversize=oversize, align=align)
    return adrive(_Stream(options, groups, aliases or {}, version, digest, allocate).steps(), source)


@dataclass
class _Open:
    """The bucket being filled."""

    buffer: torch.Tensor | None = None
    filled: int = 0  # slots that were copied


class _Stream:
    """The sending side, as a generator of requests and buckets."""

    def __init__(
        self,
        options: Options,
        groups: Iterable[Iterable[str]],
        aliases: Mapping[str, str],
        version: int,
        digest: DigestChoice,
        allocate: Allocate | None,
    ) -> None:
        self._options = options
        self._filler = Filler(options)
        self._groups = _Groups(groups, aliases)
        self._ties = _DeclaredTies(aliases)
        self._version = check_version(version)
        check_choice(digest)
        self._digest = digest
        self._allocate = allocate
        self._pool = BufferPool()
        self._places: dict[str, int] = {}
        self._open = _Open()
        self._sent = 0
        self._chain = b""

    def steps(self) -> Step[StreamBucket]:
        finished: tuple[BucketLayout, torch.Tensor] | None = None  # full, and not known yet whether it is the last
        while items := (yield 1):
            name, tensor = items.pop()
            spec = next_spec(name, tensor, self._places)
            if self._ties.is_alias(spec, tensor):
                del tensor  # or it stays alive while the source makes the next
                continue
            if spec.name in self._ties.names:
                tensor = conform(spec, tensor)
                self._ties.sent(spec, tensor)
            unit = self._groups.collect(spec, tensor)
            del tensor
            if not unit:
                continue
            for layout in self._filler.add([spec for spec, _ in unit]):
                if finished is not None:
                    yield self._bucket(*finished, last=False)
                finished = None
                finished = (layout, self._fill(layout, unit))
            if self._filler.open_slots and finished is not None:
                yield self._bucket(*finished, last=False)
                finished = None
            self._fill_open(unit)
            del unit
        self._groups.finish()
        self._ties.finish()
        for layout in self._filler.finish():  # nothing is open while a finished bucket waits
            finished = (layout, self._fill(layout, []))
        if finished is None:  # a source without tensors
            finished = (BucketLayout(0, 0, ()), self._new_buffer(0, torch.device("cpu")))
        yield self._bucket(*finished, last=True)

    def _fill(self, layout: BucketLayout, unit: list[tuple[TensorSpec, torch.Tensor]]) -> torch.Tensor:
        """The buffer of a closed bucket: the open one, or a new one with a piece (or the whole) of an oversize tensor."""
        if self._open.buffer is not None:
            buffer, self._open = self._pool.trim(self._open.buffer, layout.nbytes), _Open()
        else:
            (slot,) = layout.slots
            buffer = self._new_buffer(layout.nbytes, unit[0][1].device)
            write_slot(buffer, slot, self._ready(unit, slot))
        zero_padding(buffer, layout.gaps())
        return buffer

    def _fill_open(self, unit: list[tuple[TensorSpec, torch.Tensor]]) -> None:
        """Copy into the open bucket what the filler placed there."""
        slots = self._filler.open_slots
        for slot in slots[self._open.filled :]:
            tensor = self._ready(unit, slot)
            if self._open.buffer is None:
                self._open.buffer = self._new_buffer(self._options.capacity, tensor.device)
            write_slot(self._open.buffer, slot, tensor)
        self._open.filled = len(slots)

    def _ready(self, unit: list[tuple[TensorSpec, torch.Tensor]], slot: Slot) -> torch.Tensor:
        """The tensor of a slot as plain memory; for a piece its bytes, made once and kept in its place in the unit."""
        place = next(i for i, (spec, _) in enumerate(unit) if spec is slot.spec)
        tensor = unit[place][1]
        if slot.start == 0:
            tensor = conform(slot.spec, tensor)
            if slot.is_piece:
                tensor = as_bytes(tensor)
            unit[place] = (slot.spec, tensor)
        return tensor

    def _new_buffer(self, nbytes: int, device: torch.device) -> torch.Tensor:
        if self._allocate is not None:
            return check_buffer(self._allocate(nbytes), nbytes)
        return self._pool.take(nbytes, device)

    def _bucket(self, layout: BucketLayout, buffer: torch.Tensor, *, last: bool) -> StreamBucket:
        header = encode_header(self._sent, last, self._options.align, layout, self._ties.names)
        self._chain = chain_digest(self._chain, header)
        index, self._sent = self._sent, self._sent + 1
        sealed = seal(buffer, self._digest, index=index, plan_digest=self._chain, version=self._version)
        return StreamBucket(header=header, **{name: getattr(sealed, name) for name in Bucket.__slots__})


class _Groups:
    """Groups that are still collecting their members, as copies: the source may use their memory for the next."""

    def __init__(self, groups: Iterable[Iterable[str]], aliases: Mapping[str, str]) -> None:
        self._missing: dict[str, set[str]] = {}  # name -> what its group still waits for, one set per group
        self._held: dict[int, list[tuple[TensorSpec, torch.Tensor]]] = {}
        for number, group in enumerate(groups):
            if isinstance(group, str):
                raise SourceError(f"group {number} is the str {group!r}; a group is a list of names")
            members = {aliases.get(name, name) for name in group}
            for name in members:
                if name in self._missing:
                    raise SourceError(f"tensor {name!r} is in two groups; it can be in one")
                self._missing[name] = members

    def collect(self, spec: TensorSpec, tensor: torch.Tensor) -> list[tuple[TensorSpec, torch.Tensor]]:
        """What can be placed now: the tensor, its whole group if it completes one, or nothing."""
        missing = self._missing.get(spec.name)
        if missing is None:
            return [(spec, tensor)]
        held = self._held.setdefault(id(missing), [])
        missing.remove(spec.name)
        if not missing:
            del self._held[id(missing)]
            return [*held, (spec, tensor)]
        held.append((spec, own_copy(conform(spec, tensor))))
        return []

    def finish(self) -> None:
        for missing in self._missing.values():
            if missing:
                names = ", ".join(repr(name) for name in sorted(missing)[:3])
                raise IncompleteStreamError(f"a group never completed: the source ended without {names}")


class _DeclaredTies:
    """Declared aliases: each is sent with its tensor, and compared with it when it comes."""

    def __init__(self, aliases: Mapping[str, str]) -> None:
        self._alias_of = dict(aliases)
        self._digests: dict[str, tuple[torch.device, bytes]] = {}
        self._specs: dict[str, TensorSpec] = {}
        self.names: dict[str, list[str]] = {}
        for alias, name in self._alias_of.items():
            if name in self._alias_of:
                raise SourceError(f"{alias!r} is declared tied to {name!r}, which is tied itself; name the tensor that travels")
            self.names.setdefault(name, []).append(alias)

    def sent(self, spec: TensorSpec, plain: torch.Tensor) -> None:
        """Note a tensor that others are tied to."""
        self._digests[spec.name] = (plain.device, bytes_digest(plain))
        self._specs[spec.name] = spec

    def is_alias(self, spec: TensorSpec, tensor: torch.Tensor) -> bool:
        """Whether this tensor has travelled already under another name; ``PlanMismatchError`` if it is not that tensor."""
        name = self._alias_of.pop(spec.name, None)
        if name is None:
            return False
        if name not in self._digests:
            raise SourceError(f"tensor {spec.name!r} is declared tied to {name!r}, which has not been sent before it")
        device, digest = self._digests[name]
        root = self._specs[name]
        if bytes_digest(conform(TensorSpec(spec.name, root.dtype, root.shape), tensor).to(device)) != digest:
            raise PlanMismatchError(f"tensor {spec.name!r} is declared tied to {name!r}, and the source gives it other bytes")
        return True

    def finish(self) -> None:
        if self._alias_of:
            alias, name = next(iter(self._alias_of.items()))
            raise IncompleteStreamError(f"the source ended without {alias!r}, which is declared tied to {name!r}")
