"""The header of a stream's bucket: its layout as bytes and back. As in the manifest, offsets are not on the wire."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import msgspec

from rollout_core.bucketing.bucket import Bucket
from rollout_core.bucketing.dtypes import DTYPES, WIRE_NAMES
from rollout_core.bucketing.placement import BucketLayout, Options, Slot, align_up, alignment
from rollout_core.bucketing.sources import check_name
from rollout_core.bucketing.specs import TensorSpec
from rollout_core.errors import ManifestError

FORMAT: Final = "rollout-core/stream"
VERSION: Final = 1


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class StreamBucket(Bucket):
    """A bucket that carries its own layout: ``header`` is MessagePack, to be sent beside the buffer. ``plan_digest`` is the digest
    of this header and all before it, so buckets of two streams cannot be mixed."""

    header: bytes


class _WireSlot(msgspec.Struct, array_like=True, forbid_unknown_fields=True):
    names: list[bytes]  # UTF-8, surrogates passed through; the tensor's own name first, then those tied to it
    dtype: str
    shape: tuple[int, ...]
    start: int
    nbytes: int


class _WireHeader(msgspec.Struct, array_like=True, forbid_unknown_fields=True):
    format: str
    version: int
    index: int
    last: bool
    align: int
    slots: list[_WireSlot]


_DECODER: Final = msgspec.msgpack.Decoder(_WireHeader)


def chain_digest(before: bytes, header: bytes) -> bytes:
    """16 bytes for this header and all before it; ``before`` is the chain so far, empty at the start."""
    return hashlib.blake2b(before + header, digest_size=16, person=FORMAT.encode()[:16]).digest()


def encode_header(index: int, last: bool, align: int, layout: BucketLayout, tied: Mapping[str, Sequence[str]]) -> bytes:
    slots = [
        _WireSlot(
            [name.encode("utf-8", "surrogatepass") for name in (slot.name, *tied.get(slot.name, ()))],
            WIRE_NAMES[slot.spec.dtype],
            slot.spec.shape,
            slot.start,
            slot.nbytes,
        )
        for slot in layout.slots
    ]
    return msgspec.msgpack.encode(_WireHeader(FORMAT, VERSION, index, last, align, slots))


def require(condition: bool, message: str) -> None:
    if not condition:
        raise ManifestError(f"invalid bucket header: {message}")


def decode_header(data: bytes, index: int, max_nbytes: int) -> tuple[_WireHeader, BucketLayout, dict[str, list[str]]]:
    require(len(data) <= max_nbytes, f"it has {len(data)} bytes; the bound is {max_nbytes}")
    try:
        header = _DECODER.decode(data)
        require(header.format == FORMAT, f"its format is {header.format[:40]!r}, not {FORMAT!r}")
        require(header.version == VERSION, f"it has version {header.version}; this library reads version {VERSION}")
        require(header.index == index, f"it is of bucket {header.index}, and came with bucket {index}")
        Options(capacity=1, align=header.align)
        slots, end = [], 0
        tied: dict[str, list[str]] = {}
        for wire in header.slots:
            names = [name.decode("utf-8", "surrogatepass") for name in wire.names]
            require(bool(names), "a slot has no name")
            for name in names:
                check_name(name)
            require(wire.dtype in DTYPES, f"this torch has no dtype {wire.dtype[:40]!r}")
            spec = TensorSpec(names[0], DTYPES[wire.dtype], wire.shape)
            whole = wire.start == 0 and wire.nbytes == spec.nbytes
            piece = wire.start >= 0 and wire.nbytes > 0 and wire.start + wire.nbytes <= spec.nbytes
            require(whole or piece, f"slot {names[0]!r} holds bytes {wire.start} to {wire.start + wire.nbytes} of {spec}")
            require(wire.nbytes % spec.dtype.itemsize == 0, f"slot {names[0]!r} holds a part of an element")
            offset = align_up(end, alignment(spec, header.align))
            slots.append(Slot(spec, offset, wire.nbytes, wire.start))
            end = offset + wire.nbytes
            tied[names[0]] = names[1:]
    except ManifestError:
        raise
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:  # SourceError is a ValueError
        raise ManifestError(f"invalid bucket header: {error}") from error
    return header, BucketLayout(index, end, tuple(slots)), tied
