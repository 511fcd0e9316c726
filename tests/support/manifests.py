"""Manifests taken apart with nothing but msgpack, zlib and struct, to check the format and to damage it on purpose."""

from __future__ import annotations

import random
import struct
import zlib

import msgspec
import torch

from rollout_core.bucketing import BucketPlan, TensorSpec, plan_buckets

FIELDS = (
    *("capacity", "oversize", "order", "align", "tensors", "dtypes", "kind_dtype", "kind_ndim", "kind_sizes", "tensor_kind"),
    *("name_chars", "names", "aliases", "group_sizes", "group_members", "bucket_slots", "slot_tensor", "pieces"),
)


def open_envelope(data: bytes) -> tuple[list, bytes]:
    """The envelope's four fields and the inflated body."""
    envelope = msgspec.msgpack.decode(data)
    return envelope, zlib.decompress(envelope[3])


def body_fields(data: bytes) -> dict:
    return dict(zip(FIELDS, msgspec.msgpack.decode(open_envelope(data)[1]), strict=True))


def rebuild(fields: dict, **envelope) -> bytes:
    """A manifest with these body fields, and a correct envelope unless told otherwise."""
    body = msgspec.msgpack.encode([fields[name] for name in FIELDS])
    parts = {"format": "rollout-core/plan", "version": 1, "raw_nbytes": len(body), "body": zlib.compress(body), **envelope}
    return msgspec.msgpack.encode(list(parts.values()))


def u32(*values: int) -> bytes:
    return struct.pack(f"<{len(values)}I", *values)


def example() -> BucketPlan:
    """A small plan in which every column is in use."""
    specs = [
        TensorSpec("embed.weight", torch.bfloat16, (40, 2)),
        TensorSpec("q", torch.float32, (2, 2)),
        TensorSpec("scale", torch.float32, ()),
        TensorSpec("k", torch.float32, (2, 2)),
        TensorSpec("empty", torch.int64, (0, 7)),
        TensorSpec("lm_head.weight", torch.bfloat16, (40, 2), "embed.weight"),
        TensorSpec("\ud800 name", torch.uint8, (3,)),
        TensorSpec("fp8", torch.float8_e4m3fn, (5,)),
    ]
    return plan_buckets(specs, 64, groups=[["q", "k"]])


def damage(rng: random.Random, good: bytes, fields: dict) -> bytes:
    """One hostile input: noise, a damaged envelope, or a well-formed envelope around a damaged body."""
    kind = rng.randrange(10)
    if kind < 3:
        return rng.randbytes(rng.randrange(64))
    if kind < 7:
        data = bytearray(good)
        for _ in range(rng.randrange(1, 4)):
            place = rng.randrange(len(data))
            match rng.randrange(4):
                case 0:
                    data[place] ^= 1 << rng.randrange(8)
                case 1:
                    data[place] = rng.randrange(256)
                case 2:
                    del data[place:]
                    data = data or bytearray(b"\0")
                case 3:
                    data[place:place] = rng.randbytes(rng.randrange(1, 5))
        return bytes(data)
    changed = dict(fields)
    for _ in range(rng.randrange(1, 3)):
        name = rng.choice(FIELDS)
        value = changed[name]
        if isinstance(value, bytes):
            column = bytearray(value)
            if column and rng.random() < 0.7:
                place = rng.randrange(len(column))
                column[place] = rng.choice((0, 1, 2, 127, 128, 255, rng.randrange(256)))
            elif rng.random() < 0.5:
                column += rng.randbytes(rng.choice((1, 4, 8)))
            else:
                del column[-rng.choice((1, 4, 8)) :]
            changed[name] = bytes(column)
        elif isinstance(value, int):
            near = (min(value + 1, 2**64 - 1), max(value - 1, -(2**63)))
            changed[name] = rng.choice((0, 1, -1, *near, 2**31, 2**63 - 1, 2**64 - 1, rng.randrange(2**40)))
        else:
            changed[name] = rng.choice(("", "split", "own", "packed", "given", "bool", "float99", value + ",", value + ",int8"))
    return rebuild(changed)
