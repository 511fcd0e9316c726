"""The manifest: a plan as bytes and back, written for readers that do not trust the writer (format: docs/manifest.md).

Only scalars and flat columns are on the wire, so nothing can nest; offsets are not: they follow from the slots' order, sizes and
alignment, so an overlap, a hole or an offset out of bounds cannot be written down.
"""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Iterable, Sequence
from itertools import accumulate, pairwise
from typing import Any, Final

import msgspec
import numpy as np
import numpy.typing as npt

from rollout_core.bucketing.dtypes import DTYPES, ITEMSIZES, WIRE_NAMES, is_known_name
from rollout_core.bucketing.placement import BucketLayout, Options, Order, Oversize, Slot, alignment
from rollout_core.bucketing.plan import BucketPlan, Groups, check_aliases, units
from rollout_core.bucketing.specs import MAX_DIMS, MAX_NBYTES, TensorSpec
from rollout_core.errors import ManifestError

FORMAT: Final = "rollout-core/plan"
VERSION: Final = 1
_MAX_KINDS_DTYPES: Final = 64

Column = npt.NDArray[Any]


class _Envelope(msgspec.Struct, array_like=True, forbid_unknown_fields=True):
    format: str
    version: int
    raw_nbytes: int
    body: bytes


class _Body(msgspec.Struct, array_like=True, forbid_unknown_fields=True):
    capacity: int
    oversize: Oversize
    order: Order
    align: int
    tensors: int
    dtypes: str  # wire names, comma-separated
    kind_dtype: bytes  # u8 per kind (a kind is a dtype with a shape): index into dtypes
    kind_ndim: bytes  # u8 per kind
    kind_sizes: bytes  # i64 per dimension of each kind
    tensor_kind: bytes  # u32 per tensor
    name_chars: bytes  # u32 per tensor
    names: bytes  # UTF-8, surrogates passed through
    aliases: bytes  # u32 pairs: tensor, tensor it is tied to
    group_sizes: bytes  # u32 per group
    group_members: bytes  # u32 per member: tensor
    bucket_slots: bytes  # u32 per bucket
    slot_tensor: bytes  # u32 per slot: difference to the slot before, modulo 2**32
    pieces: bytes  # u64 pairs: slot, nbytes of that piece


_ENVELOPE: Final = msgspec.msgpack.Decoder(_Envelope)
_BODY: Final = msgspec.msgpack.Decoder(_Body)


# ----------------------------------------------------------------------------------------------------------------- encoding


def _body(plan: BucketPlan) -> bytes:
    """The canonical form: two equal plans give equal bytes, on any machine."""
    place = {spec.name: index for index, spec in enumerate(plan.specs)}
    kinds = {kind: index for index, kind in enumerate(dict.fromkeys((spec.dtype, spec.shape) for spec in plan.specs))}
    dtypes = {dtype: index for index, dtype in enumerate(dict.fromkeys(dtype for dtype, _ in kinds))}
    slots = [slot for layout in plan.buckets for slot in layout.slots]
    slot_tensor = _column((place[slot.spec.name] for slot in slots), "<u4")
    if len(slot_tensor):
        slot_tensor = np.diff(slot_tensor, prepend=slot_tensor.dtype.type(0))
    return msgspec.msgpack.encode(
        _Body(
            capacity=plan.options.capacity,
            oversize=plan.options.oversize,
            order=plan.options.order,
            align=plan.options.align,
            tensors=len(plan.specs),
            dtypes=",".join(WIRE_NAMES[dtype] for dtype in dtypes),
            kind_dtype=bytes(dtypes[dtype] for dtype, _ in kinds),
            kind_ndim=bytes(len(shape) for _, shape in kinds),
            kind_sizes=_column((size for _, shape in kinds for size in shape), "<i8").tobytes(),
            tensor_kind=_column((kinds[spec.dtype, spec.shape] for spec in plan.specs), "<u4").tobytes(),
            name_chars=_column((len(spec.name) for spec in plan.specs), "<u4").tobytes(),
            names="".join([spec.name for spec in plan.specs]).encode("utf-8", "surrogatepass"),
            aliases=_column(
                (p for spec in plan.specs if spec.alias_of for p in (place[spec.name], place[spec.alias_of])), "<u4"
            ).tobytes(),
            group_sizes=_column((len(group) for group in plan.groups), "<u4").tobytes(),
            group_members=_column((place[name] for group in plan.groups for name in group), "<u4").tobytes(),
            bucket_slots=_column((len(layout.slots) for layout in plan.buckets), "<u4").tobytes(),
            slot_tensor=slot_tensor.tobytes(),
            pieces=_column((p for i, slot in enumerate(slots) if slot.is_piece for p in (i, slot.nbytes)), "<u8").tobytes(),
        )
    )


def _column(values: Iterable[int], dtype: str) -> Column:
    return np.fromiter(values, dtype=dtype)


def canonical_digest(plan: BucketPlan) -> bytes:
    return hashlib.blake2b(_body(plan), digest_size=16, person=FORMAT.encode()[:16]).digest()


def encode(plan: BucketPlan) -> bytes:
    body = _body(plan)
    return msgspec.msgpack.encode(_Envelope(FORMAT, VERSION, len(body), zlib.compress(body, 6)))


# ----------------------------------------------------------------------------------------------------------------- decoding


def decode(data: bytes, *, max_tensors: int, max_nbytes: int) -> BucketPlan:
    body = _open(data, max_nbytes)
    _require(0 <= body.tensors <= max_tensors, f"it declares {body.tensors} tensors; the bound is {max_tensors}")
    try:
        options = Options(capacity=body.capacity, oversize=body.oversize, order=body.order, align=body.align)
        specs = _specs(body)
        check_aliases(specs)
        groups = _groups(body, specs)
        layouts = _layouts(body, specs, groups, options, max_tensors)
        _check_groups(groups, layouts)
    except ManifestError:
        raise
    except ValueError as error:  # SourceError and CapacityError are
        raise ManifestError(f"invalid manifest: {error}") from error
    return BucketPlan(specs, options, groups, layouts)


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ManifestError(f"invalid manifest: {message}")


def _open(data: bytes, max_nbytes: int) -> _Body:
    """The body, inflated to no more than it declares and no more than the bound."""
    if not isinstance(data, bytes | bytearray | memoryview):
        raise ManifestError(f"a manifest is bytes, not {type(data).__name__}")
    _require(len(data) <= max_nbytes, f"it has {len(data)} bytes; the bound is {max_nbytes}")
    try:
        envelope = _ENVELOPE.decode(data)
        _require(envelope.format == FORMAT, f"its format is {envelope.format[:40]!r}, not {FORMAT!r}")
        _require(envelope.version == VERSION, f"it has version {envelope.version}; this library reads version {VERSION}")
        size = envelope.raw_nbytes
        _require(0 < size <= max_nbytes, f"it declares {size} uncompressed bytes; the bound is {max_nbytes}")
        inflater = zlib.decompressobj()
        raw = inflater.decompress(envelope.body, size + 1)
        _require(len(raw) == size and inflater.eof, f"its body does not inflate to the declared {size} bytes")
        _require(not inflater.unused_data, f"{len(inflater.unused_data)} bytes follow its body")
        return _BODY.decode(raw)
    except (msgspec.MsgspecError, zlib.error, UnicodeDecodeError, RecursionError, BufferError) as error:
        raise ManifestError(f"invalid manifest: {error}") from error


def _read(data: bytes, dtype: str, what: str, count: int | None = None) -> Column:
    """A column of the body, which has to have exactly ``count`` entries if that is known."""
    width = np.dtype(dtype).itemsize
    _require(len(data) % width == 0, f"column {what} has {len(data)} bytes, no multiple of {width}")
    _require(count is None or len(data) == count * width, f"column {what} has {len(data) // width} entries, not {count}")
    return np.frombuffer(data, dtype=dtype)


def _below(column: Column, bound: int, what: str) -> None:
    _require(not len(column) or int(column.max()) < bound, f"column {what} refers past the {bound} entries that there are")


def _specs(body: _Body) -> tuple[TensorSpec, ...]:
    names = body.dtypes.split(",", _MAX_KINDS_DTYPES) if body.dtypes else []
    for name in names:
        _require(name in DTYPES, f"this torch has no dtype {name!r}" if is_known_name(name) else f"no dtype {name[:40]!r}")
    kind_dtype = _read(body.kind_dtype, "u1", "kind_dtype")
    _below(kind_dtype, len(names), "kind_dtype")
    kind_ndim = _read(body.kind_ndim, "u1", "kind_ndim", len(kind_dtype))
    _below(kind_ndim, MAX_DIMS + 1, "kind_ndim")
    kind_sizes = _read(body.kind_sizes, "<i8", "kind_sizes", int(kind_ndim.sum(dtype=np.int64)))
    tensor_kind = _read(body.tensor_kind, "<u4", "tensor_kind", body.tensors)
    _below(tensor_kind, len(kind_dtype), "tensor_kind")
    _require(len(kind_dtype) <= body.tensors, f"it declares {len(kind_dtype)} kinds for {body.tensors} tensors")
    sizes = kind_sizes.tolist()
    ends = list(accumulate(kind_ndim.tolist()))
    dtypes = [DTYPES[name] for name in names]
    kinds = [
        (dtypes[dtype], tuple(sizes[end - ndim : end]))
        for dtype, ndim, end in zip(kind_dtype.tolist(), kind_ndim.tolist(), ends, strict=True)
    ]
    tied_to = _aliases(body)
    tensor_names = _names(body)
    return tuple(
        TensorSpec(name, kinds[kind][0], kinds[kind][1], tensor_names[tied_to[place]] if place in tied_to else None)
        for place, (name, kind) in enumerate(zip(tensor_names, tensor_kind.tolist(), strict=True))
    )


def _names(body: _Body) -> list[str]:
    chars = _read(body.name_chars, "<u4", "name_chars", body.tensors)
    text = body.names.decode("utf-8", "surrogatepass")
    _require(int(chars.sum(dtype=np.int64)) == len(text), "the lengths of its names do not add up")
    ends = np.cumsum(chars, dtype=np.int64).tolist()
    names = [text[start:end] for start, end in zip([0, *ends], ends, strict=False)]
    if len(set(names)) != len(names):
        seen: set[str] = set()
        again = next(name for name in names if name in seen or seen.add(name))  # type: ignore[func-returns-value]
        raise ManifestError(f"invalid manifest: name {again!r} stands twice")
    return names


def _aliases(body: _Body) -> dict[int, int]:
    pairs = _read(body.aliases, "<u4", "aliases")
    _require(len(pairs) % 2 == 0, "column aliases has an odd number of entries")
    _require(len(pairs) <= 2 * body.tensors, "column aliases has more entries than there are tensors")
    _below(pairs, body.tensors, "aliases")
    tied, to = pairs[::2].tolist(), pairs[1::2].tolist()
    _require(all(a < b for a, b in pairwise(tied)), "column aliases is not in order")
    return dict(zip(tied, to, strict=True))


def _groups(body: _Body, specs: Sequence[TensorSpec]) -> Groups:
    sizes = _read(body.group_sizes, "<u4", "group_sizes")
    members = _read(body.group_members, "<u4", "group_members", int(sizes.sum(dtype=np.int64)))
    _below(members, body.tensors, "group_members")
    _require(len(members) <= body.tensors, "a tensor is in two groups")
    _require(not len(sizes) or int(sizes.min()) > 1, "a group has fewer than two tensors")
    ends = np.cumsum(sizes, dtype=np.int64).tolist()
    places = members.tolist()
    groups = [places[start:end] for start, end in zip([0, *ends], ends, strict=False)]
    _require(len(set(places)) == len(places), "a tensor is in two groups")
    for group in groups:
        _require(group == sorted(group), "a group is not in order")
        _require(all(specs[place].alias_of is None for place in group), "a group names a tied tensor")
    _require([group[-1] for group in groups] == sorted(group[-1] for group in groups), "its groups are not in order")
    return tuple(tuple(specs[place].name for place in group) for group in groups)


def _layouts(
    body: _Body, specs: Sequence[TensorSpec], groups: Groups, options: Options, max_slots: int
) -> tuple[BucketLayout, ...]:
    """The buckets, each slot placed right after the one before as alignment allows."""
    steps = _read(body.slot_tensor, "<u4", "slot_tensor")
    _require(len(steps) <= max_slots, f"it declares {len(steps)} slots; the bound is {max_slots}")
    slot_tensor = np.cumsum(steps, dtype=np.uint32)
    _below(slot_tensor, len(specs), "slot_tensor")
    bucket_slots = _read(body.bucket_slots, "<u4", "bucket_slots")
    _require(int(bucket_slots.sum(dtype=np.int64)) == len(slot_tensor), "the slots of its buckets do not add up")
    _require(not len(bucket_slots) or int(bucket_slots.min()) > 0, "a bucket is empty")
    pieces = _pieces(body, slot_tensor, specs)
    kinds: dict[tuple[Any, ...], tuple[int, int]] = {}
    layouts, first = [], 0
    tensors = slot_tensor.tolist()
    for index, count in enumerate(bucket_slots.tolist()):
        end, slots = 0, []
        for position in range(first, first + count):
            spec = specs[tensors[position]]
            kind = (spec.dtype, spec.shape)
            if kind not in kinds:
                kinds[kind] = (spec.nbytes, alignment(spec, options.align))
            nbytes, step = kinds[kind]
            offset = (end + step - 1) & -step
            if position in pieces:
                start, nbytes = pieces[position]
                slots.append(Slot(spec, offset, nbytes, start))
            else:
                slots.append(Slot(spec, offset, nbytes))
            end = offset + nbytes
        first += count
        own = options.oversize == "own" and count == 1
        _require(end <= (MAX_NBYTES if own else options.capacity), f"bucket {index} exceeds its capacity")
        layouts.append(BucketLayout(index, end, tuple(slots)))
    _check_arrivals(slot_tensor, pieces, specs)
    _check_pieces(pieces, slot_tensor, bucket_slots, specs, options)
    _check_order(slot_tensor, bucket_slots, groups, specs, options.order)
    if options.order == "packed":
        _check_packed(slot_tensor, bucket_slots, specs)
    return tuple(layouts)


def _pieces(body: _Body, slot_tensor: Column, specs: Sequence[TensorSpec]) -> dict[int, tuple[int, int]]:
    """For each slot that holds a piece of a split tensor: where the piece starts in the tensor, and its nbytes."""
    pairs = _read(body.pieces, "<u8", "pieces")
    _require(len(pairs) % 2 == 0, "column pieces has an odd number of entries")
    _require(len(pairs) <= 2 * len(slot_tensor), "column pieces has more entries than there are slots")
    _below(pairs[::2], len(slot_tensor), "pieces")
    places = pairs[::2].tolist()
    _require(all(a < b for a, b in pairwise(places)), "column pieces is not in order")
    pieces: dict[int, tuple[int, int]] = {}
    written: dict[int, int] = {}
    for place, nbytes in zip(places, pairs[1::2].tolist(), strict=True):
        tensor = int(slot_tensor[place])
        start = written.get(tensor, 0)
        written[tensor] = start + nbytes
        pieces[place] = (start, nbytes)
        fits = nbytes > 0 and nbytes % specs[tensor].dtype.itemsize == 0
        _require(fits, f"a piece of {specs[tensor].name!r} has {nbytes} bytes, no positive number of its elements")
    for tensor, nbytes in written.items():
        spec = specs[tensor]
        _require(nbytes == spec.nbytes, f"the pieces of {spec.name!r} have {nbytes} bytes, and {spec} has {spec.nbytes}")
    alone = any(nbytes == written[int(slot_tensor[place])] for place, (_, nbytes) in pieces.items())
    _require(not alone, "a tensor is split into one piece")
    return pieces


def _check_arrivals(slot_tensor: Column, pieces: dict[int, tuple[int, int]], specs: Sequence[TensorSpec]) -> None:
    """Every travelling tensor has one place, or its pieces; a tied name has none."""
    first = np.ones(len(slot_tensor), dtype=bool)
    first[[place for place, (start, _) in pieces.items() if start]] = False
    places = np.bincount(slot_tensor[first], minlength=len(specs))
    travels = np.fromiter((spec.alias_of is None for spec in specs), dtype=bool, count=len(specs))
    wrong = np.flatnonzero(places != travels)
    if len(wrong):
        spec, count = specs[wrong[0]], places[wrong[0]]
        raise ManifestError(f"invalid manifest: tensor {spec.name!r} has {count} places, not {int(spec.alias_of is None)}")


def _check_pieces(
    pieces: dict[int, tuple[int, int]], slot_tensor: Column, bucket_slots: Column, specs: Sequence[TensorSpec], options: Options
) -> None:
    """A split tensor fills buckets of its own and ends in the one after them, as packers expect."""
    bucket_of = np.repeat(np.arange(len(bucket_slots)), bucket_slots)
    before: dict[int, int] = {}
    for place, (start, nbytes) in pieces.items():
        tensor, bucket = int(slot_tensor[place]), int(bucket_of[place])
        spec = specs[tensor]
        itemsize = spec.dtype.itemsize
        full = nbytes == options.capacity // itemsize * itemsize and bucket_slots[bucket] == 1
        tail = start + nbytes == spec.nbytes
        _require(options.oversize == "split" and (tail or full), f"a piece of {spec.name!r} does not fill bucket {bucket}")
        _require(not start or before[tensor] == bucket - 1, f"the pieces of {spec.name!r} do not follow each other")
        before[tensor] = bucket


def _check_order(slot_tensor: Column, bucket_slots: Column, groups: Groups, specs: Sequence[TensorSpec], order: Order) -> None:
    """Slots lie in the order in which tensors are placed; in packed order that holds from bucket to bucket."""
    ranks = slot_tensor.astype(np.int64)
    if groups:
        rank = {spec.name: place for place, spec in enumerate(spec for unit in units(specs, groups) for spec in unit)}
        ranks = np.array([rank.get(spec.name, 0) for spec in specs], dtype=np.int64)[slot_tensor]
    if order == "packed" and len(ranks):
        starts = np.cumsum(bucket_slots, dtype=np.int64) - bucket_slots
        ordered = np.minimum.reduceat(ranks, starts)[1:] >= np.maximum.reduceat(ranks, starts)[:-1]
    else:
        ordered = np.diff(ranks) >= 0
    _require(bool(ordered.all()), "its slots are not in the order of its tensors")


def _check_packed(slot_tensor: Column, bucket_slots: Column, specs: Sequence[TensorSpec]) -> None:
    widths = np.fromiter((ITEMSIZES[spec.dtype] for spec in specs), dtype=np.int64, count=len(specs))[slot_tensor]
    rises = np.diff(widths) > 0
    rises[np.cumsum(bucket_slots, dtype=np.int64)[:-1] - 1] = False
    _require(not rises.any(), "its slots are not in packed order")


def _check_groups(groups: Groups, layouts: Sequence[BucketLayout]) -> None:
    if not groups:
        return
    home: dict[str, set[int]] = {}
    for layout in layouts:
        for slot in layout.slots:
            home.setdefault(slot.name, set()).add(layout.index)
    for group in groups:
        _require(len(set[int]().union(*(home[name] for name in group))) == 1, f"the group of {group[0]!r} is in two buckets")
