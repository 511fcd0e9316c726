"""Packing, unpacking and digests by kernels: the bytes that torch's operations give, and not one beside them."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch

from rollout_core.bucketing import Packer, TensorSpec, Unpacker, plan_buckets, specs_of, unpack
from rollout_core.bucketing.cuda import launching, packing
from rollout_core.bucketing.cuda.tables import CopyTable, PackTable
from rollout_core.bucketing.digest import block_multilinear_by_torch
from rollout_core.errors import PlanMismatchError, SourceError
from support.in_place import CHANGES, square
from support.kernel_checks import BLOCK, bytes_at, check_packing, check_unpacking, picture, random_pairs
from support.tensors import odd_inputs, patterned

pytestmark = [
    pytest.mark.filterwarnings("ignore:ComplexHalf:UserWarning"),
    pytest.mark.filterwarnings("ignore:Conversion of an array with ndim:DeprecationWarning"),  # Triton's interpreter does
]
KIB16 = 16 << 10


@pytest.mark.parametrize("size", [0, 1, 3, 4, 15, 16, 17, 2048, KIB16 - 1, KIB16, KIB16 + 1, KIB16 + 16, 3 * KIB16, 3 * KIB16 + 48])
def test_digest(size):
    data = bytes_at("cpu", size, 0, size)
    assert launching.digest_lanes(data) == block_multilinear_by_torch(data)


@pytest.mark.parametrize("skip", [1, 2, 4, 8])
def test_digest_at_an_odd_address(skip):
    data = bytes_at("cpu", 5000, skip, 1)
    assert launching.digest_lanes(data) == block_multilinear_by_torch(data.clone())


@pytest.mark.parametrize("order", ["given", "packed"])
@pytest.mark.parametrize("capacity", [16, 200, 1 << 20])
def test_b1_odd_inputs(capacity, order, kernels, found_by):
    pairs = [(name, tensor.detach()) for name, tensor in odd_inputs().items() if name != "tied"]
    buckets = check_packing(pairs, "cpu", capacity=capacity, order=order)
    assert kernels["gather"] == 4 * buckets


@pytest.mark.parametrize("seed", range(12))
def test_b1_random_layouts(seed, found_by):
    rng = random.Random(seed)
    pairs = random_pairs("cpu", rng, rng.randint(1, 10), 30_000)
    options = {"align": rng.choice([1, 1, 16, 256]), "order": rng.choice(["given", "packed"])}
    capacity = rng.choice([1 << 20, 40_000, 20_001, KIB16])
    check_packing(pairs, "cpu", capacity=capacity, **options)
    check_unpacking(pairs, "cpu", capacity=capacity, **options)


@pytest.mark.parametrize("lead", [0, 1, 2, 4, 16])
def test_each_kernel_serves_the_blocks_that_it_is_for(lead):
    """A large tensor after ``lead`` bytes: its inner blocks are aligned or shifted, the first and the last in parts."""
    pairs = [("lead", bytes_at("cpu", lead, 0, 1)), ("w", bytes_at("cpu", 6 * KIB16, 0, 2))]
    plan = plan_buckets(specs_of(pairs), 1 << 20)
    table = PackTable(plan.buckets[0], torch.device("cpu"))
    table.point([t.data_ptr() for _, t in pairs if t.numel()])
    counts = [0 if part is None else part.blocks.numel() for part in (table.aligned, table.shifted, table.parts)]
    # After 16 bytes all is on multiples of 16, the first block having two sources. Else the first is in parts, as is the last, and
    # the one before where fewer than 4 bytes follow it.
    assert counts == {0: [6, 0, 0], 1: [0, 4, 3], 2: [0, 4, 3], 4: [0, 5, 2], 16: [7, 0, 0]}[lead]
    check_packing(pairs, "cpu", capacity=1 << 20)


def test_a_row_that_begins_with_a_block_is_not_read_before_its_first_byte():
    pairs = [("w", bytes_at("cpu", 6 * KIB16, 2, 1))]
    table = PackTable(plan_buckets(specs_of(pairs), 1 << 20).buckets[0], torch.device("cpu"))
    table.point([pairs[0][1].data_ptr()])
    assert table.aligned is None
    assert table.shifted.blocks.tolist() == [1, 2, 3, 4]
    assert table.parts.blocks.tolist() == [0, 5]


def test_b4_padding_within_a_block_is_zero():
    """Gaps that are multiples of 16, between tensors that are."""
    check_packing([(f"w{i}", bytes_at("cpu", 48, 0, i)) for i in range(2)], "cpu", capacity=1 << 20, align=64)


@pytest.mark.parametrize("bit", ["neg", "conj", "neither"])
def test_b1_contiguous_tensors_whose_bytes_are_not_their_values(bit, found_by):
    values = patterned(torch.complex64, 50)
    tensor = {"neg": torch._neg_view(values), "conj": values.conj(), "neither": values}[bit]
    check_packing([("before", torch.zeros(3)), ("w", tensor)], "cpu", capacity=1 << 20)


def test_a_table_is_made_anew_only_where_tensors_moved():
    pairs = [(f"w{i}", bytes_at("cpu", 20_000, 0, i)) for i in range(3)]
    table = PackTable(plan_buckets(specs_of(pairs), 1 << 20).buckets[0], torch.device("cpu"))
    here = [t.data_ptr() for _, t in pairs]
    assert table.point(here)
    aligned, parts = table.aligned, table.parts
    assert not table.point(here)
    bases = table.bases
    moved = bytes_at("cpu", 20_000, 0, 9)
    assert table.point([here[0], moved.data_ptr(), here[2]])
    assert (table.bases != bases).tolist() == [False, True, False]
    assert table.aligned is aligned, "what follows from the layout stays"
    assert table.parts is parts
    # To where 16 bytes cannot be read at once: other kernels serve its blocks.
    assert table.point([bytes_at("cpu", 20_000, 2, 9).data_ptr(), *here[1:]])
    assert table.aligned.blocks.tolist() == [b for b in aligned.blocks.tolist() if b > 1]


def test_tensors_that_move_between_rounds_are_found(found_by):
    plan = plan_buckets([TensorSpec("a", torch.bfloat16, (5000,)), TensorSpec("b", torch.float32, (9001,))], 1 << 20)
    packer = Packer(plan, digest=BLOCK)
    for turn, skip in enumerate([0, 0, 2, 16, 4]):
        pairs = [
            ("a", bytes_at("cpu", 10_000, skip, turn).view(torch.bfloat16)),
            ("b", bytes_at("cpu", 36_004, 4 * skip % 16, turn + 50).view(torch.float32)),
        ]
        assert picture(unpack(plan, packer.pack(pairs))) == picture(pairs)


def test_unmoved_reads_where_the_tensors_were(kernels):
    pairs = [("a", bytes_at("cpu", 20_000, 0, 1)), ("b", bytes_at("cpu", 333, 4, 2))]
    plan = plan_buckets(specs_of(pairs), 15_000)
    packer = Packer(plan, digest=BLOCK)
    assert picture(unpack(plan, packer.pack(pairs, unmoved=True))) == picture(pairs), "the first round looks"
    for _, tensor in pairs:
        tensor.copy_(tensor.flip(0))  # trained in place
    # Nothing of the source is looked at: not even that it is empty.
    assert picture(unpack(plan, packer.pack([], unmoved=True))) == picture(pairs)
    with pytest.raises(PlanMismatchError):
        list(packer.pack([]))


@pytest.mark.parametrize("between", ["strided", "iterator", "failed"])
def test_unmoved_looks_again_where_the_round_before_was_no_kernels_alone(between, found_by):
    good = [("a", patterned(torch.float32, 100)), ("b", patterned(torch.float32, 50, seed=3))]
    other = [("a", patterned(torch.float32, 200, seed=5)[::2]), ("b", patterned(torch.float32, 50, seed=7))]
    plan = plan_buckets(specs_of(good), 400)
    packer = Packer(plan, digest=BLOCK)
    list(packer.pack(good))
    match between:
        case "strided":
            list(packer.pack(other))
        case "iterator":
            list(packer.pack(iter(other)))
        case "failed":
            with pytest.raises(PlanMismatchError):
                list(packer.pack([("a", other[0][1].contiguous()), ("b", torch.zeros(1))]))
    final = [("a", patterned(torch.float32, 100, seed=11)), ("b", patterned(torch.float32, 50, seed=13))]
    assert picture(unpack(plan, packer.pack(final, unmoved=True))) == picture(final)


@pytest.mark.parametrize(
    ("tensor", "error"),
    [
        (torch.zeros(5), PlanMismatchError),
        (torch.zeros(4, dtype=torch.int32), PlanMismatchError),
        (torch.zeros(2, 2), PlanMismatchError),
        (torch.zeros(4, device="meta"), SourceError),
        (torch.zeros(4).to_sparse(), SourceError),
        (torch.nn.UninitializedParameter(), SourceError),
    ],
    ids=["size", "dtype", "shape", "meta", "sparse", "lazy"],
)
@pytest.mark.parametrize("order", ["given", "packed"])
def test_a_tensor_that_is_not_the_plans_is_refused(tensor, error, order, found_by):
    pairs = [("a", torch.zeros(3, dtype=torch.bfloat16)), ("b", torch.zeros(4))]
    packer = Packer(plan_buckets(specs_of(pairs), 1 << 20, order=order), digest=BLOCK)
    list(packer.pack(pairs))
    with pytest.raises(error, match="'b'"):
        list(packer.pack([pairs[0], ("b", tensor)]))


@pytest.mark.parametrize("beside", ["plain", "strided"])
@pytest.mark.parametrize("skip", [0, 3])
@pytest.mark.parametrize("capacity", [1 << 20, 70_000])
def test_a_tensor_whose_storage_was_freed_is_refused(skip, beside, capacity, found_by):
    """As FSDP frees it: on a GPU, reading there ends everything."""
    freed = torch.zeros(50_003)[skip : 50_000 + skip]
    pairs = [("a", torch.zeros(8)[:: 2 if beside == "strided" else 1]), ("b", freed)]
    packer = Packer(plan_buckets(specs_of(pairs), capacity), digest=BLOCK)
    list(packer.pack(pairs))
    freed.untyped_storage().resize_(0)
    with pytest.raises(SourceError, match="tensor 'b' has no memory"):
        list(packer.pack(pairs))


def outcome(packer, pairs):
    try:
        return [(bytes(bucket.buffer), bucket.digest) for bucket in packer.pack(pairs, version=9)]
    except PlanMismatchError as error:
        return str(error)


@pytest.mark.parametrize("rounds", [1, 2, 3])
@pytest.mark.parametrize("change", [*CHANGES, "values", "data elsewhere", "storage of its own"])
def test_b1_a_tensor_that_changed_in_place_is_looked_at_again(change, rounds, found_by):
    """However often it was found to be the plan's before."""
    pairs = [("before", torch.arange(3.0)), ("w", square()), ("after", torch.arange(5.0))]
    plan = plan_buckets(specs_of(pairs), 1 << 20)
    packer = Packer(plan, digest=BLOCK)
    for _ in range(rounds):
        list(packer.pack(pairs))
    tensor = pairs[1][1]
    match change:
        case "values":
            tensor += 1
        case "data elsewhere":
            tensor.data = square() + 2
        case "storage of its own":
            tensor.set_(torch.arange(20.0).untyped_storage(), 4, (4, 4), (4, 1))
        case _:
            CHANGES[change](tensor)
    assert outcome(packer, pairs) == outcome(Packer(plan, digest=BLOCK), pairs)
    assert outcome(packer, pairs) == outcome(Packer(plan, digest=BLOCK), pairs)


def test_a_source_that_stays_is_looked_at_in_one_call(monkeypatch):
    pairs = [(f"w{i}", patterned(torch.float32, 10, seed=i)) for i in range(4)]
    packer = Packer(plan_buckets(specs_of(pairs), 80), digest=BLOCK)
    for _ in range(2):
        list(packer.pack(pairs))
    monkeypatch.setattr(packing.Filling, "_are_plain", None)  # calling it would raise
    assert picture(unpack(packer.plan, packer.pack(pairs))) == picture(pairs)
    other = [(name, tensor.clone()) for name, tensor in pairs]
    assert picture(unpack(packer.plan, packer.pack(other))) == picture(pairs), "in other memory, too"


def test_a_tensor_without_bytes_is_looked_at_too():
    pairs = [("a", torch.zeros(4)), ("none", torch.zeros(0, 3))]
    packer = Packer(plan_buckets(specs_of(pairs), 1 << 20), digest=BLOCK)
    list(packer.pack(pairs))
    with pytest.raises(PlanMismatchError, match="'none'"):
        list(packer.pack([pairs[0], ("none", torch.zeros(0, 4))]))


def test_views_of_a_bucket_are_kept_only_on_request_and_only_for_its_memory():
    pairs = [(f"w{i}", patterned(torch.bfloat16, 3, i + 1)) for i in range(5)]
    plan = plan_buckets(specs_of(pairs), 1 << 20)
    memory = torch.zeros(plan.buckets[0].nbytes, dtype=torch.uint8)
    unpacker = Unpacker(plan, reuse=True)

    def feed(allocate, source, version):
        unpacker.restart()
        (bucket,) = Packer(plan, digest=BLOCK, allocate=allocate).pack(source, version=version)
        return unpacker.feed(bucket)

    first = feed(lambda nbytes: memory, pairs, 1)
    negated = [(name, -tensor) for name, tensor in pairs]
    again = feed(lambda nbytes: memory, negated, 2)
    assert all(mine is other for (_, mine), (_, other) in zip(first, again, strict=True))
    assert picture(again) == picture(negated)
    elsewhere = feed(None, pairs, 3)
    assert picture(elsewhere) == picture(pairs)
    assert not {tensor.data_ptr() for _, tensor in elsewhere} & {tensor.data_ptr() for _, tensor in again}


def test_copy_table_serves_each_block_by_its_kernel():
    """Sizes and addresses that differ in what they are multiples of."""
    sizes = [5 * KIB16, 5 * KIB16, 5 * KIB16, 5 * KIB16 + 8]
    starts = [0, 6 * KIB16 + 2, 12 * KIB16, 18 * KIB16]
    source = bytes_at("cpu", 24 * KIB16, 0, 1)
    table = CopyTable(np.array(starts), np.array(sizes), torch.device("cpu"))
    for _ in range(2):  # to other targets, the second time, of the same alignment
        targets = [bytes_at("cpu", size, skip, 9) for size, skip in zip(sizes, (0, 0, 2, 0), strict=True)]
        assert table.point(source.data_ptr(), np.array([t.data_ptr() for t in targets]))
        counts = [0 if part is None else part.rows.numel() for part in (table.aligned, table.shifted, table.parts)]
        assert counts == [5 + 5, 3, 2 + 5 + 1]
        launching.copy(table)
        for start, size, target in zip(starts, sizes, targets, strict=True):
            assert torch.equal(source[start : start + size], target)


def test_copy_table_keeps_its_entries_for_another_source():
    """Only where its alignment is another do blocks change their kernel."""
    size = 3 * KIB16
    sources = [bytes_at("cpu", size, skip, seed) for seed, skip in enumerate((0, 0, 4))]
    target = bytes_at("cpu", size, 0, 9)
    table = CopyTable(np.array([0]), np.array([size]), torch.device("cpu"))
    entries = []
    for place, source in enumerate(sources):
        assert table.point(source.data_ptr(), np.array([target.data_ptr()])) is (place == 0)
        entries.append((table.aligned, table.shifted, table.parts))
        launching.copy(table)
        assert torch.equal(source, target)
    assert entries[0][0] is entries[1][0] is not None
    assert entries[2][0] is None
    assert entries[2][1] is not None
