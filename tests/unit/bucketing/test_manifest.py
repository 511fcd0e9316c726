"""B14 hostile bytes: the manifest's format, and what is refused."""

from __future__ import annotations

import functools
import hashlib
import json
import random
import struct
import tracemalloc
import zlib
from pathlib import Path

import msgspec
import pytest
import torch
from hypothesis import example as case
from hypothesis import given
from hypothesis import strategies as st

from rollout_core.bucketing import BucketPlan, TensorSpec, plan_buckets, specs_of
from rollout_core.errors import ManifestError
from support.manifests import FIELDS, body_fields, damage, example, open_envelope, rebuild, u32
from support.tensors import capacities, named, plan_options

GOLDEN = json.loads((Path(__file__).parent / "golden_manifests.json").read_text())


@given(st.data())
def test_b14_a_manifest_is_its_plan(data):
    pairs = data.draw(named())
    plan = plan_buckets(specs_of(pairs), data.draw(capacities(pairs)), **data.draw(plan_options))
    again = BucketPlan.from_bytes(plan.to_bytes())
    assert again == plan
    assert again.digest == plan.digest
    assert again.arrival == plan.arrival
    for kind in (bytearray, memoryview):
        assert BucketPlan.from_bytes(kind(plan.to_bytes())) == plan


# -------------------------------------------------------------------------------------------------------------- golden vectors


def golden_plans() -> dict[str, BucketPlan]:
    moe = [TensorSpec(f"layers.{i}.experts.{j}.w", torch.bfloat16, (4, 8)) for i in range(2) for j in range(3)]
    return {
        "empty": plan_buckets([], 1),
        "every column": example(),
        "packed, aligned, own": plan_buckets(example().specs, 48, order="packed", align=16, oversize="own"),
        "experts": plan_buckets(moe, 100),
    }


@pytest.mark.parametrize("name", golden_plans())
def test_golden_vectors_decode_to_the_same_plans_for_ever(name):
    plan, golden = golden_plans()[name], GOLDEN[name]
    assert BucketPlan.from_bytes(bytes.fromhex(golden["manifest"])) == plan
    assert plan.digest.hex() == golden["digest"]
    # Compressors differ between builds of zlib, so the bytes that are pinned are the inflated ones.
    assert open_envelope(plan.to_bytes())[1].hex() == golden["body"]
    assert open_envelope(plan.to_bytes())[0][:2] == ["rollout-core/plan", 1]


@pytest.mark.parametrize("name", golden_plans())
def test_a_reader_with_msgpack_and_struct_understands_the_format(name):
    """docs/manifest.md, written a second time: names, kinds, ties and offsets out of the golden bytes."""
    plan = golden_plans()[name]
    fields = body_fields(bytes.fromhex(GOLDEN[name]["manifest"]))
    unpacked = {
        key: list(struct.unpack(f"<{len(value) // width}{code}", value))
        for key, value in fields.items()
        if isinstance(value, bytes) and key != "names"
        for width, code in [
            {"kind_dtype": (1, "B"), "kind_ndim": (1, "B"), "kind_sizes": (8, "q"), "pieces": (8, "Q")}.get(key, (4, "I"))
        ]
    }
    sizes = iter(unpacked["kind_sizes"])
    dtypes = fields["dtypes"].split(",")
    kinds = [
        (dtypes[d], tuple(next(sizes) for _ in range(n)))
        for d, n in zip(unpacked["kind_dtype"], unpacked["kind_ndim"], strict=True)
    ]
    text = iter(fields["names"].decode("utf-8", "surrogatepass"))
    names = ["".join(next(text) for _ in range(count)) for count in unpacked["name_chars"]]
    assert [(spec.name, (str(spec.dtype)[6:], spec.shape)) for spec in plan.specs] == [
        (name, kinds[kind]) for name, kind in zip(names, unpacked["tensor_kind"], strict=True)
    ]
    ties = dict(zip(unpacked["aliases"][::2], unpacked["aliases"][1::2], strict=True))
    assert {names[a]: names[b] for a, b in ties.items()} == {s.name: s.alias_of for s in plan.specs if s.alias_of}
    pieces = dict(zip(unpacked["pieces"][::2], unpacked["pieces"][1::2], strict=True))
    position, tensor, buckets = 0, 0, []
    for count in unpacked["bucket_slots"]:
        end, slots = 0, []
        for _ in range(count):
            tensor = (tensor + unpacked["slot_tensor"][position]) % 2**32
            dtype, shape = kinds[unpacked["tensor_kind"][tensor]]
            width = getattr(torch, dtype).itemsize
            whole = width
            for size in shape:
                whole *= size
            step = max(width, fields["align"])
            offset = -(-end // step) * step
            nbytes = pieces.get(position, whole)
            slots.append((names[tensor], offset, nbytes))
            end, position = offset + nbytes, position + 1
        buckets.append(slots)
    assert [[(s.name, s.offset, s.nbytes) for s in layout.slots] for layout in plan.buckets] == buckets
    body = bytes.fromhex(GOLDEN[name]["body"])
    assert hashlib.blake2b(body, digest_size=16, person=b"rollout-core/pla").hexdigest() == GOLDEN[name]["digest"]


# ------------------------------------------------------------------------------------------------------------ what is refused


@given(st.binary(max_size=200))
@case(b"")
@case(b"\x94")
@case(b"\xdd\xff\xff\xff\xff")  # an array of 4 billion
@case(b"\xc6\xff\xff\xff\xff")  # 4 GiB of bytes
@case(b"\x91" * 5000)  # nesting
def test_b14_any_bytes(data):
    with pytest.raises(ManifestError, match="invalid manifest|a manifest is"):
        BucketPlan.from_bytes(data)


@given(st.integers(0, 2**32))
def test_b14_damaged_manifests(seed):
    """A short run of what `nox -s fuzz` does ten million times."""
    rng = random.Random(seed)
    plan = example()
    good = plan.to_bytes()
    for _ in range(20):
        data = damage(rng, good, body_fields(good))
        try:
            accepted = BucketPlan.from_bytes(data)
        except ManifestError:
            continue
        assert BucketPlan.from_bytes(accepted.to_bytes()) == accepted


def test_b14_every_truncation_and_every_trailing_byte():
    good = example().to_bytes()
    for cut in range(len(good)):
        with pytest.raises(ManifestError):
            BucketPlan.from_bytes(good[:cut])
    for extra in (b"\0", b"\xc0", good):
        with pytest.raises(ManifestError):
            BucketPlan.from_bytes(good + extra)


def hostile(**changes) -> bytes:
    fields = body_fields(example().to_bytes())
    for name, change in changes.items():
        fields[name] = change(fields[name]) if callable(change) else change
    return rebuild(fields)


def u32s(column: bytes) -> list[int]:
    return list(struct.unpack(f"<{len(column) // 4}I", column))


LIES = [
    ({"capacity": 0}, "capacity is 0"),
    ({"capacity": -1}, "capacity is -1"),
    ({"capacity": 2**63}, "Integer|capacity is"),
    ({"capacity": 63}, "bucket 0 exceeds its capacity"),
    ({"align": 3}, "align is 3"),
    ({"oversize": "drop"}, "Invalid enum value 'drop'"),
    ({"order": "sorted"}, "Invalid enum value 'sorted'"),
    ({"order": "packed"}, "its slots are not in packed order"),
    ({"tensors": -1}, "it declares -1 tensors"),
    ({"tensors": 2**40}, "it declares 1099511627776 tensors; the bound is 1048576"),
    ({"tensors": 7}, "column tensor_kind has 8 entries, not 7"),
    ({"dtypes": lambda d: d.replace("uint8", "uint9")}, "no dtype 'uint9'"),
    ({"dtypes": lambda d: d.replace("uint8", "qint8")}, "no dtype 'qint8'"),
    ({"dtypes": ""}, "column kind_dtype refers past the 0 entries"),
    ({"kind_dtype": lambda c: b"\xff" + c[1:]}, "column kind_dtype refers past"),
    ({"kind_ndim": lambda c: b"\xff" + c[1:]}, "column kind_ndim refers past the 65 entries"),
    ({"kind_ndim": lambda c: c + b"\0"}, "column kind_ndim has 7 entries, not 6"),
    ({"kind_sizes": lambda c: struct.pack("<q", -40) + c[8:]}, r"shape \(-40, 2\), which is no tuple of sizes"),
    ({"kind_sizes": lambda c: struct.pack("<q", 2**62) + c[8:]}, r"is larger than 2\*\*63 - 1 bytes"),
    ({"kind_sizes": lambda c: c[:-3]}, "column kind_sizes has .* bytes, no multiple of 8"),
    ({"tensor_kind": lambda c: u32(99) + c[4:]}, "column tensor_kind refers past the 6 entries"),
    ({"name_chars": lambda c: u32(11) + c[4:]}, "the lengths of its names do not add up"),
    ({"name_chars": lambda c: u32(2**32 - 1) + c[4:]}, "the lengths of its names do not add up"),
    ({"name_chars": lambda c: u32(0, 13) + c[8:]}, "a tensor has the empty name"),
    ({"names": lambda n: n.replace(b"scale", b"qqqqq").replace(b"k", b"q", 1)}, "stands twice|do not add up"),
    ({"names": lambda n: n[:-1] + b"\xff"}, "'utf-8' codec can't decode"),
    ({"aliases": u32(5)}, "column aliases has an odd number of entries"),
    ({"aliases": u32(5, 99)}, "column aliases refers past the 8 entries"),
    ({"aliases": u32(5, 0, 5, 0)}, "column aliases is not in order"),
    ({"aliases": u32(5, 1)}, r"'lm_head.weight' \(bf16\[40, 2\]\) is tied to 'q', which is f32"),
    (
        {"aliases": u32(0, 5)},
        "tensor 'embed.weight' is tied to 'lm_head.weight', which is no untied tensor that comes before it",
    ),
    ({"aliases": b""}, "tensor 'lm_head.weight' has 0 places, not 1"),
    ({"aliases": u32(*([5, 0] * 9))}, "column aliases has more entries than there are tensors"),
    ({"group_sizes": u32(1, 1)}, "a group has fewer than two tensors"),
    ({"group_sizes": u32(3)}, "column group_members has 2 entries, not 3"),
    ({"group_members": u32(3, 1)}, "a group is not in order"),
    ({"group_members": u32(1, 5)}, "a group names a tied tensor"),
    ({"group_members": u32(0, 1)}, "its slots are not in the order of its tensors"),
    ({"group_sizes": u32(2, 2), "group_members": u32(1, 3, 1, 3)}, "a tensor is in two groups"),
    ({"group_sizes": u32(9), "group_members": u32(*range(8), 1)}, "a tensor is in two groups"),
    ({"group_sizes": u32(2, 2), "group_members": u32(6, 7, 1, 3)}, "its groups are not in order"),
    ({"bucket_slots": lambda c: c[:-4]}, "the slots of its buckets do not add up"),
    ({"bucket_slots": lambda c: c + u32(0)}, "a bucket is empty"),
    ({"slot_tensor": lambda c: u32(99) + c[4:]}, "column slot_tensor refers past the 8 entries"),
    ({"slot_tensor": lambda c: c[:-4]}, "the slots of its buckets do not add up|has 0 places"),
    ({"slot_tensor": lambda c: c[:-4] + u32(0)}, "places, not"),
    ({"pieces": lambda c: c[:-8]}, "column pieces has an odd number of entries"),
    ({"pieces": lambda c: c[:-16]}, "the pieces of 'embed.weight' have"),
    ({"pieces": lambda c: c + c[-16:]}, "column pieces is not in order"),
    (
        {"pieces": struct.pack("<4Q", 0, 63, 1, 97)},
        "a piece of 'embed.weight' has 63 bytes, no positive number of its elements",
    ),
    ({"pieces": struct.pack("<4Q", 0, 0, 1, 160)}, "a piece of 'embed.weight' has 0 bytes"),
    ({"pieces": struct.pack("<4Q", 0, 2**64 - 2, 1, 162)}, "the pieces of 'embed.weight' have"),
    ({"pieces": struct.pack("<2Q", 99, 64)}, "column pieces refers past"),
    ({"pieces": struct.pack("<40Q", *range(40))}, "column pieces has more entries than there are slots"),
    ({"pieces": struct.pack("<20Q", *range(20))}, "column pieces has more entries than there are slots"),
    ({"kind_dtype": lambda c: c[:-1] + b"\5"}, "column kind_dtype refers past the 5 entries"),
    ({"kind_ndim": lambda c: b"\x41" + c[1:]}, "column kind_ndim refers past the 65 entries"),
    ({"tensor_kind": lambda c: c[:-4] + u32(6)}, "column tensor_kind refers past the 6 entries"),
    ({"aliases": u32(5, 8)}, "column aliases refers past the 8 entries"),
    ({"group_members": u32(1, 8)}, "column group_members refers past the 8 entries"),
    ({"slot_tensor": lambda c: u32(8) + c[4:]}, "column slot_tensor refers past the 8 entries"),
    ({"pieces": lambda c: c[:-16] + struct.pack("<2Q", 9, 32)}, "column pieces refers past the 9 entries"),
    ({"group_sizes": u32(2, 1), "group_members": u32(1, 3, 4)}, "a group has fewer than two tensors"),
]


@pytest.mark.parametrize(("changes", "message"), LIES, ids=[f"{i}-{'+'.join(changes)}" for i, (changes, _) in enumerate(LIES)])
def test_b14_bodies_that_lie(changes, message):
    with pytest.raises(ManifestError, match=message):
        BucketPlan.from_bytes(hostile(**changes))


@pytest.mark.parametrize(
    ("column", "width"),
    [(name, 4) for name in ("tensor_kind", "name_chars", "aliases", "group_sizes", "group_members", "bucket_slots", "slot_tensor")]
    + [("kind_sizes", 8), ("pieces", 8)],
)
def test_b14_a_stray_byte_in_a_column_is_named(column, width):
    length = len(body_fields(example().to_bytes())[column])
    with pytest.raises(ManifestError, match=f"column {column} has {length + 1} bytes, no multiple of {width}"):
        BucketPlan.from_bytes(hostile(**{column: lambda c: c + b"\0"}))


def test_b9_a_name_that_stands_twice_is_the_one_that_is_named():
    specs = [TensorSpec(name, torch.uint8, (1,)) for name in ("a", "b", "c", "d")]
    fields = body_fields(plan_buckets(specs, 8).to_bytes())
    with pytest.raises(ManifestError, match="name 'b' stands twice"):
        BucketPlan.from_bytes(rebuild({**fields, "names": b"abcb"}))


def test_b14_more_kinds_than_tensors():
    fields = body_fields(plan_buckets([TensorSpec("a", torch.uint8, (4,))], 8).to_bytes())
    unused = {"kind_dtype": b"\0\0", "kind_ndim": b"\1\1", "kind_sizes": struct.pack("<2q", 4, 5)}
    with pytest.raises(ManifestError, match="it declares 2 kinds for 1 tensors"):
        BucketPlan.from_bytes(rebuild({**fields, **unused}))


def test_b14_the_first_tensor_without_a_place_is_named():
    specs = [TensorSpec(name, torch.uint8, (1,)) for name in ("a", "b", "c", "d")]
    fields = body_fields(plan_buckets(specs, 8).to_bytes())
    with pytest.raises(ManifestError, match="tensor 'b' has 0 places, not 1"):
        BucketPlan.from_bytes(rebuild({**fields, "slot_tensor": u32(0, 2, 1), "bucket_slots": u32(3)}))
    with pytest.raises(ManifestError, match="tensor 'b' has 0 places, not 1"):
        BucketPlan.from_bytes(rebuild({**fields, "slot_tensor": u32(0, 2), "bucket_slots": u32(2)}))
    with pytest.raises(ManifestError, match="tensor 'a' has 2 places, not 1"):
        BucketPlan.from_bytes(rebuild({**fields, "slot_tensor": u32(0, 0, 2, 1), "bucket_slots": u32(4)}))


def test_b14_a_body_without_its_checksum():
    """All that was declared comes out of it, and its end does not."""
    fields = body_fields(example().to_bytes())
    whole = open_envelope(rebuild(fields))[0][3]
    for cut in range(1, 5):
        with pytest.raises(ManifestError, match="its body does not inflate to the declared"):
            BucketPlan.from_bytes(rebuild(fields, body=whole[:-cut]))


@pytest.mark.parametrize("order", ["given", "packed"])
def test_b12_the_empty_plan_is_a_manifest_in_every_order(order):
    plan = plan_buckets([], 8, order=order)
    assert BucketPlan.from_bytes(plan.to_bytes()) == plan


def test_b14_a_tensor_split_into_one_piece():
    plan = plan_buckets([TensorSpec("a", torch.uint8, (4,))], 8)
    fields = body_fields(plan.to_bytes())
    with pytest.raises(ManifestError, match="a tensor is split into one piece"):
        BucketPlan.from_bytes(rebuild({**fields, "pieces": struct.pack("<2Q", 0, 4)}))


def test_b14_a_dtype_that_this_torch_lacks_is_named(monkeypatch):
    data = plan_buckets([TensorSpec("a", torch.float8_e8m0fnu, (4,))], 8).to_bytes()
    from rollout_core.bucketing import manifest

    monkeypatch.setattr(manifest, "DTYPES", {"float32": torch.float32})
    with pytest.raises(ManifestError, match="this torch has no dtype 'float8_e8m0fnu'"):
        BucketPlan.from_bytes(data)


@pytest.mark.parametrize(
    ("envelope", "message"),
    [
        ({"format": "rollout-core/stream"}, "its format is 'rollout-core/stream', not 'rollout-core/plan'"),
        ({"version": 2}, "it has version 2; this library reads version 1"),
        ({"raw_nbytes": 0}, "it declares 0 uncompressed bytes"),
        ({"raw_nbytes": 10}, "its body does not inflate to the declared 10 bytes"),
        ({"raw_nbytes": 10_000}, "its body does not inflate to the declared 10000 bytes"),
        ({"raw_nbytes": 2**40}, "it declares 1099511627776 uncompressed bytes; the bound is"),
        ({"body": b"not zlib"}, "incorrect header check"),
        ({"body": b""}, "its body does not inflate"),
        ({"extra": 1}, "Expected `array` of at most length 4, got 5"),
    ],
    ids=str,
)
def test_b14_envelopes_that_lie(envelope, message):
    with pytest.raises(ManifestError, match=message):
        BucketPlan.from_bytes(rebuild(body_fields(example().to_bytes()), **envelope))


def test_b14_trailing_bytes_inside():
    fields = body_fields(example().to_bytes())
    body = msgspec.msgpack.encode([fields[name] for name in FIELDS])
    with pytest.raises(ManifestError, match="2 bytes follow its body"):
        BucketPlan.from_bytes(rebuild(fields, body=zlib.compress(body) + b"xx"))
    more = msgspec.msgpack.encode([*(fields[name] for name in FIELDS), 0])
    with pytest.raises(ManifestError, match="Expected `array` of at most length 18, got 19"):
        BucketPlan.from_bytes(rebuild(fields, body=zlib.compress(more), raw_nbytes=len(more)))
    longer = body + b"\0"
    with pytest.raises(ManifestError):
        BucketPlan.from_bytes(rebuild(fields, body=zlib.compress(longer), raw_nbytes=len(longer)))


@pytest.mark.parametrize("data", ["text", None, 5, [1]])
def test_b14_what_is_no_bytes(data):
    with pytest.raises(ManifestError, match="a manifest is bytes, not"):
        BucketPlan.from_bytes(data)


# --------------------------------------------------------------------------------------------------------- bounds and bombs


def peak(data: bytes, **bounds) -> int:
    """Bytes allocated at the most while refusing (or reading) a manifest."""
    tracemalloc.start()
    try:
        BucketPlan.from_bytes(data, **bounds)
    except ManifestError:
        pass
    finally:
        used = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    return used


@functools.cache
def bombs() -> dict[str, bytes]:
    fields = body_fields(example().to_bytes())
    zeros = bytes(50 << 20)
    squeezed = zlib.compress(zeros, 9)
    inner = msgspec.msgpack.encode(list(fields.values()))
    return {
        "50 MiB of zeros, declared honestly": rebuild(fields, body=squeezed, raw_nbytes=len(zeros)),
        "50 MiB of zeros, declared as 1 KiB": rebuild(fields, body=squeezed, raw_nbytes=1024),
        "a body followed by 50 MiB": rebuild(fields, body=zlib.compress(inner + zeros, 9), raw_nbytes=len(inner)),
        "wide characters": hostile(names=("a" * 400_000 + "\U0001f600").encode()),
        "sizes": hostile(kind_sizes=bytes(800_000)),
        "groups": hostile(group_sizes=bytes(800_000)),
        "members": hostile(group_members=bytes(800_000), group_sizes=u32(200_000)),
        "ties": hostile(aliases=bytes(800_000)),
        "pieces": hostile(pieces=bytes(800_000)),
        "slots": hostile(slot_tensor=bytes(800_000)),
        "buckets": hostile(bucket_slots=bytes(800_000)),
        "dtypes": hostile(dtypes="," * 800_000),
        "one tensor of every name": rebuild(
            {**fields, "tensors": 1000, "names": b"n" * 500_000, "name_chars": u32(*[500] * 1000), "tensor_kind": bytes(4000)}
        ),
    }


@pytest.mark.parametrize("name", bombs())
def test_b14_bombs_stay_within_the_stated_bound(name):
    bounds = {"max_tensors": 1 << 10, "max_nbytes": 1 << 20}
    data = bombs()[name]
    assert peak(data, **bounds) <= 10 * bounds["max_nbytes"] + 1024 * bounds["max_tensors"]
    with pytest.raises(ManifestError):
        BucketPlan.from_bytes(data, **bounds)


def test_b14_a_valid_manifest_at_the_bound_stays_within_it():
    """The costliest valid plan: every tensor of a kind of its own, names with wide characters, every one split."""
    specs = [TensorSpec(f"tensor \U0001f600 {i}", torch.uint8, (1, 1, 1, i + 2)) for i in range(1000)]
    plan = plan_buckets(
        specs, 1 << 20, groups=[[f"tensor \U0001f600 {i}", f"tensor \U0001f600 {i + 1}"] for i in range(0, 1000, 2)]
    )
    data = plan.to_bytes()
    raw = open_envelope(data)[0][2]
    assert peak(data, max_tensors=1000, max_nbytes=raw) <= 10 * raw + 1024 * 1000


def test_b14_bounds_are_the_callers():
    data = example().to_bytes()
    assert BucketPlan.from_bytes(data, max_tensors=9, max_nbytes=1 << 12) == example()
    with pytest.raises(ManifestError, match="it declares 8 tensors; the bound is 7"):
        BucketPlan.from_bytes(data, max_tensors=7)
    with pytest.raises(ManifestError, match="it declares 10 slots; the bound is 9|it declares .* slots; the bound is 8"):
        BucketPlan.from_bytes(data, max_tensors=8)
    with pytest.raises(ManifestError, match="bytes; the bound is 100"):
        BucketPlan.from_bytes(data, max_nbytes=100)


def test_b14_each_bound_holds_to_the_byte():
    """What the reader is given, and what it inflates to: whichever is larger is what a bound must allow."""
    small, large = plan_buckets([], 1).to_bytes(), example().to_bytes()
    raw = open_envelope(large)[0][2]
    assert len(small) > open_envelope(small)[0][2]
    assert len(large) < raw
    for data, least, message in (
        (small, len(small), f"it has {len(small)} bytes; the bound is {len(small) - 1}"),
        (large, raw, f"it declares {raw} uncompressed bytes; the bound is {raw - 1}"),
    ):
        BucketPlan.from_bytes(data, max_nbytes=least)
        with pytest.raises(ManifestError) as error:
            BucketPlan.from_bytes(data, max_nbytes=least - 1)
        assert str(error.value) == f"invalid manifest: {message}"


def test_b14_hostile_words_are_quoted_in_part():
    """An error is for people, however long what it complains about."""
    long = "x" * 41
    with pytest.raises(ManifestError) as error:
        BucketPlan.from_bytes(rebuild(body_fields(example().to_bytes()), format=long))
    assert str(error.value) == f"invalid manifest: its format is {long[:40]!r}, not 'rollout-core/plan'"
    with pytest.raises(ManifestError) as error:
        BucketPlan.from_bytes(hostile(dtypes=long))
    assert str(error.value) == f"invalid manifest: no dtype {long[:40]!r}"


def test_b14_the_bounds_that_hold_if_none_are_given():
    """The documented ones."""
    fields = body_fields(example().to_bytes())
    for envelope, message in (
        ({"raw_nbytes": (64 << 20) + 1}, "it declares 67108865 uncompressed bytes; the bound is 67108864"),
        ({"raw_nbytes": 64 << 20}, "its body does not inflate to the declared 67108864 bytes"),
    ):
        with pytest.raises(ManifestError, match=message):
            BucketPlan.from_bytes(rebuild(fields, **envelope))
    with pytest.raises(ManifestError, match="it declares 1048577 tensors; the bound is 1048576"):
        BucketPlan.from_bytes(rebuild({**fields, "tensors": (1 << 20) + 1}))
    with pytest.raises(ManifestError, match="column tensor_kind has 8 entries, not 1048576"):
        BucketPlan.from_bytes(rebuild({**fields, "tensors": 1 << 20}))
