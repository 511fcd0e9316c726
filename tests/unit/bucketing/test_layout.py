"""B2 capacity, B3 alignment, B4 layout, B6 determinism: on specs alone."""

from __future__ import annotations

import math
import os
import subprocess
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rollout_core.bucketing import BucketPlan, TensorSpec, pack, pack_stream, plan_buckets, specs_of
from rollout_core.errors import CapacityError
from rollout_core.testing.oracles import bytes_of
from support.tensors import DTYPES, capacities, named, patterned, plan_options

specs = st.lists(
    st.tuples(st.sampled_from(DTYPES), st.lists(st.integers(0, 9), max_size=3)), max_size=30
).map(lambda kinds: [TensorSpec(f"t{i}", dtype, tuple(shape)) for i, (dtype, shape) in enumerate(kinds)])  # fmt: skip


def size(spec: TensorSpec) -> int:
    return math.prod(spec.shape) * spec.dtype.itemsize


@given(specs, st.integers(16, 300), plan_options)
def test_b2_b3_b4_invariants(specs, capacity, options):
    plan = plan_buckets(specs, capacity, **options)
    pieces: dict[str, list[tuple[int, int]]] = {spec.name: [] for spec in specs}
    for index, layout in enumerate(plan.buckets):
        assert layout.index == index
        assert layout.slots, "a bucket holds something"
        end = 0
        for slot in layout.slots:
            step = max(slot.spec.dtype.itemsize, options["align"])
            assert slot.offset % step == 0, "B3: offsets are aligned"
            assert slot.offset >= end, "B4: slots are disjoint"
            assert slot.offset - end < step, "B4: padding is no more than alignment asks for"
            end = slot.offset + slot.nbytes
            pieces[slot.name].append((slot.start, slot.nbytes))
        assert layout.nbytes == end, "B4: slots and padding cover the bucket"
        assert layout.padding == end - sum(slot.nbytes for slot in layout.slots), "B4: padding is declared"
        alone = options["oversize"] == "own" and len(layout.slots) == 1 and size(layout.slots[0].spec) > capacity
        assert layout.nbytes <= capacity or alone, "B2"
        assert (layout.slots[0].name in plan.oversized) == (layout.nbytes > capacity), "B2: over capacity is reported"
    for spec in specs:
        start = 0
        for at, nbytes in pieces[spec.name]:
            assert at == start
            assert nbytes % spec.dtype.itemsize == 0
            start += nbytes
        assert start == size(spec), "every byte has one place"
        assert (len(pieces[spec.name]) > 1) == (options["oversize"] == "split" and size(spec) > capacity)
    assert plan.nbytes == sum(map(size, specs))
    assert plan.padding == sum(layout.nbytes for layout in plan.buckets) - plan.nbytes


@given(specs, st.integers(16, 300), st.sampled_from(["split", "own"]))
def test_b4_packed_order_needs_no_padding(specs, capacity, oversize):
    assert plan_buckets(specs, capacity, order="packed", oversize=oversize).padding == 0


@given(st.data())
def test_b4_padding_is_zero_also_in_used_memory(data):
    """Buffers come filled with 0xFF."""
    pairs = data.draw(named())
    plan = plan_buckets(specs_of(pairs), data.draw(capacities(pairs)), align=data.draw(st.sampled_from([1, 8, 64])))
    for bucket in pack(plan, pairs, allocate=lambda n: torch.full((n,), 0xFF, dtype=torch.uint8)):
        covered = bytearray(bucket.nbytes)
        for slot in plan.buckets[bucket.index].slots:
            covered[slot.offset : slot.offset + slot.nbytes] = b"\x01" * slot.nbytes
        raw = bytes_of(bucket.buffer)
        assert all(raw[i] == 0 for i in range(bucket.nbytes) if not covered[i])


@given(st.data())
def test_b4_padding_of_a_stream_is_zero_also_in_used_memory(data):
    pairs = data.draw(named())
    options = {"align": data.draw(st.sampled_from([1, 8, 64])), "oversize": data.draw(st.sampled_from(["split", "own"]))}
    capacity = data.draw(capacities(pairs))
    plan = plan_buckets(specs_of(pairs, aliases=False), capacity, **options)
    buckets = list(pack_stream(iter(pairs), capacity, allocate=lambda n: torch.full((n,), 0xFF, dtype=torch.uint8), **options))
    for layout, bucket in zip(plan.buckets, buckets, strict=bool(pairs)):
        raw = bytes_of(bucket.buffer)
        assert not any(any(raw[offset : offset + nbytes]) for offset, nbytes in layout.gaps())


def test_b4_padding_of_a_stream_is_zero():
    pairs = [("a", patterned(torch.uint8, 3)), ("b", patterned(torch.float32, 2))]
    (bucket,) = pack_stream(pairs, 64, align=16, allocate=lambda n: torch.full((n,), 0xFF, dtype=torch.uint8))
    assert bytes_of(bucket.buffer) == bytes_of(pairs[0][1]) + bytes(13) + bytes_of(pairs[1][1])


@given(st.data())
def test_b2_a_streams_buckets_are_those_of_the_plan(data):
    """One algorithm places for both; only a model without tensors has a bucket, which says that it ends."""
    pairs = data.draw(named(max_size=10))
    options = {"align": data.draw(st.sampled_from([1, 2, 64])), "oversize": data.draw(st.sampled_from(["split", "own"]))}
    capacity = data.draw(capacities(pairs))
    aliases = data.draw(st.sampled_from([True, False]))
    plan = plan_buckets(specs_of(pairs, aliases=aliases), capacity, **options)
    buckets = list(pack_stream(pairs if aliases else iter(pairs), capacity, **options))
    assert [bucket.nbytes for bucket in buckets] == ([layout.nbytes for layout in plan.buckets] or [0])


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, [3, 8, 4, 5]),
        ({"oversize": "own"}, [3, 9, 8]),
        ({"align": 4}, [3, 8, 7, 5]),
        ({"oversize": "own", "align": 4}, [3, 9, 3, 5]),
    ],
)
def test_b2_a_streams_buckets_follow_its_options(options, expected):
    pairs = [(f"w{size}", patterned(torch.uint8, size)) for size in (3, 9)] + [
        ("x", patterned(torch.uint8, 3)),
        ("y", torch.ones(5).bool()),
    ]
    assert [bucket.nbytes for bucket in pack_stream(iter(pairs), 8, **options)] == expected
    with pytest.raises(CapacityError, match="is larger than the capacity of 8 bytes"):
        list(pack_stream(iter(pairs), 8, oversize="error"))


def test_b12_a_stream_that_ends_with_an_oversize_tensor_has_no_empty_bucket():
    for sizes in ([9], [3, 9], [16], [3, 16]):
        pairs = [(f"w{i}", patterned(torch.uint8, size)) for i, size in enumerate(sizes)]
        assert all(bucket.nbytes for bucket in pack_stream(iter(pairs), 8, oversize="own"))
        assert all(bucket.nbytes for bucket in pack_stream(iter(pairs), 8))


def test_b12_the_end_of_an_empty_stream_asks_for_no_bytes():
    asked = []
    (bucket,) = pack_stream([], 8, allocate=lambda n: asked.append(n) or torch.empty(n, dtype=torch.uint8))
    assert asked == [0]
    assert bucket.version == 0


@given(specs, st.integers(16, 300))
def test_b2_greedy_leaves_no_room_for_what_comes_next(specs, capacity):
    """A bucket is closed only when the next tensor does not fit it: nobody pays for half-empty buckets."""
    plan = plan_buckets(specs, capacity)
    for layout, after in zip(plan.buckets, plan.buckets[1:], strict=False):
        first = after.slots[0]
        if first.start or first.spec.nbytes > capacity:
            continue
        step = first.spec.dtype.itemsize
        assert -(-layout.nbytes // step) * step + first.nbytes > capacity


@pytest.mark.parametrize(
    ("capacity", "expected"), [(1, [["a"], ["b"]]), (2, [["a"], ["b"]]), (3, [["a"], ["b"]]), (4, [["a", "b"]])]
)
def test_b2_cuts_where_verl_cuts(capacity, expected):
    """verl's own cases for get_named_tensor_buckets, in units of half of its 1 MiB: two tensors of 2 units."""
    specs = [TensorSpec("a", torch.uint8, (2 << 19,)), TensorSpec("b", torch.uint8, (2 << 19,))]
    plan = plan_buckets(specs, capacity << 19, oversize="own")
    assert [[slot.name for slot in layout.slots] for layout in plan.buckets] == expected


def test_b2_split_needs_only_one_element_of_the_widest_dtype():
    pairs = [("c128", patterned(torch.complex128, 3)), ("u8", patterned(torch.uint8, 5)), ("f64", patterned(torch.float64, 5))]
    plan = plan_buckets(specs_of(pairs), 16)
    assert max(layout.nbytes for layout in plan.buckets) <= 16
    with pytest.raises(CapacityError, match=r"capacity is 15 bytes, and one element of tensor 'c128' \(c128\[3\]\) has 16"):
        plan_buckets(specs_of(pairs), 15)


def test_b2_one_byte_capacity():
    plan = plan_buckets([TensorSpec("a", torch.uint8, (5,)), TensorSpec("z", torch.float64, (0,))], 1)
    assert [layout.nbytes for layout in plan.buckets][:5] == [1, 1, 1, 1, 1]
    assert plan.split == ("a",)


def test_b2_error_policy_names_the_tensor():
    with pytest.raises(CapacityError, match=r"tensor 'big' \(f32\[9\], 36 bytes\) is larger than the capacity of 35 bytes"):
        plan_buckets([TensorSpec("big", torch.float32, (9,))], 35, oversize="error")


def test_b2_a_capacity_in_the_wrong_unit_is_refused_and_not_planned():
    with pytest.raises(CapacityError, match="would be split into 10000000 pieces"):
        plan_buckets([TensorSpec("big", torch.uint8, (10_000_000,))], 1)


def test_b2_more_pieces_than_four_million_are_refused():
    with pytest.raises(CapacityError, match="would be split into 4194305 pieces by a capacity of 1 bytes"):
        plan_buckets([TensorSpec("big", torch.uint8, ((1 << 22) + 1,))], 1)


def test_b2_pieces_up_to_the_bound_are_planned(monkeypatch):
    monkeypatch.setattr("rollout_core.bucketing.placement._MAX_PIECES", 4)
    assert len(plan_buckets([TensorSpec("big", torch.uint8, (32,))], 8).buckets) == 4
    with pytest.raises(CapacityError, match="would be split into 5 pieces by a capacity of 8 bytes"):
        plan_buckets([TensorSpec("big", torch.uint8, (33,))], 8)


def test_b14_a_spec_has_up_to_64_dimensions():
    assert TensorSpec("w", torch.uint8, (1,) * 64).nbytes == 1


@pytest.mark.parametrize("shape", [(2**63 - 1,), (0, 2**62), (2**62, 0), (0, 2**63 - 1, 0)])
def test_b14_the_largest_sizes_that_a_spec_has(shape):
    assert TensorSpec("w", torch.uint8, shape).nbytes in (0, 2**63 - 1)


@pytest.mark.parametrize("capacity", [0, -1, 1.5, float("nan"), "1", None, True, 2**63])
def test_bad_capacity(capacity):
    with pytest.raises(CapacityError, match="capacity is .*; it is a whole number of bytes"):
        plan_buckets([], capacity)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"oversize": "drop"}, "oversize is 'drop'; it is one of split, own, error"),
        ({"order": "random"}, "order is 'random'; it is one of given, packed"),
        ({"align": 3}, "align is 3; it is a power of two"),
        ({"align": 0}, "align is 0; it is a power of two"),
        ({"align": 1 << 21}, "align is 2097152; it is a power of two"),
        ({"align": 2.0}, "align is 2.0; it is a power of two"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        plan_buckets([], 8, **options)


@given(specs, st.integers(16, 300), plan_options)
def test_b6_equal_plans_have_equal_digests_and_different_plans_differ(specs, capacity, options):
    plan = plan_buckets(specs, capacity, **options)
    again = plan_buckets(list(specs), capacity, **options)
    assert plan == again
    assert plan.digest == again.digest
    others = [plan_buckets(specs, capacity + 1, **options), plan_buckets(specs[1:], capacity, **options)]
    others.append(plan_buckets(specs[::-1], capacity, **options))
    others.append(plan_buckets(specs, capacity, **{**options, "align": 2 * options["align"]}))
    for other in others:
        assert (other == plan) == (other.digest == plan.digest)


@given(st.integers(2, 300), st.integers(1, 200))
def test_b6_layouts_of_one_set_of_specs_have_digests_of_their_own(first, second):
    specs = [TensorSpec("a", torch.uint8, (100,)), TensorSpec("b", torch.uint8, (100,))]
    one, two = plan_buckets(specs, first), plan_buckets(specs, second)
    assert (one == two) == (one.digest == two.digest)


def test_b6_a_plan_is_the_same_in_a_process_with_another_hash_seed_and_environment():
    program = (
        "import torch; from rollout_core.bucketing import TensorSpec, plan_buckets;"
        "s=[TensorSpec(f'w{i}', torch.float16, (i, 3)) for i in range(50)];"
        "p=plan_buckets(s, 96, order='packed', groups=[['w5','w1','w3'],['w7','w8']]);"
        "print(p.digest.hex(), [[t.name for t in b.slots] for b in p.buckets])"
    )
    outputs = {
        subprocess.run(
            [sys.executable, "-c", program],
            env={**os.environ, "PYTHONHASHSEED": seed, "RANK": seed, "WORLD_SIZE": "8", "CUDA_VISIBLE_DEVICES": seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("0", "42")
    }
    assert len(outputs) == 1


def test_b6_planning_touches_no_data():
    """A plan from meta tensors is the plan from real ones."""
    real = {"w": torch.ones(3, 4), "b": torch.ones(3, dtype=torch.bfloat16)}
    meta = {name: tensor.to("meta") for name, tensor in real.items()}
    assert plan_buckets(specs_of(meta), 32) == plan_buckets(specs_of(real), 32)


def test_plan_says_what_it_is():
    plan = plan_buckets([TensorSpec("a", torch.uint8, (3,)), TensorSpec("b", torch.float32, (5,))], 8)
    assert str(plan) == "2 tensors, 23 bytes in 4 buckets of at most 8, 0 bytes of padding, 1 split, 0 over capacity"
    assert BucketPlan.from_bytes(plan.to_bytes()) == plan
