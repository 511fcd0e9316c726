"""SGLang's door against SGLang's FlattenedTensorBucket and MultiprocessingSerializer, unmodified."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from doors.sglang_process import digest
from rollout_core.bucketing import plan_buckets, specs_of
from rollout_core.errors import CapacityError, DuplicateNameError, IntegrityError
from rollout_core.testing.oracles import difference, picture
from support.tensors import named, patterned

#: An odd number of 2-byte elements before a 4-byte tensor: what SGLang's own constructor cannot give back.
ODD = {"half": patterned(torch.bfloat16, 3), "single": patterned(torch.float32, 5), "byte": patterned(torch.uint8, 1)}


def received(bucket):
    """What SGLang's weight updater makes of a payload."""
    again = type(bucket)(flattened_tensor=bucket.get_flattened_tensor(), metadata=[replace(meta) for meta in bucket.get_metadata()])
    return again.reconstruct_tensors()


def assert_same(got, want):
    """Byte for byte, in whatever order; the pictures are taken without torch's copying."""
    assert difference(picture(sorted(want, key=by_name)), picture(sorted(got, key=by_name))) is None


def by_name(pair):
    return pair[0]


def buckets_of(door, source, **options):
    plan = plan_buckets(specs_of(source), **{"capacity": 1 << 20, "oversize": "own", **options})
    return plan, list(door.flattened_buckets(plan, source))


def test_sglang_s_own_layout_misaligns(sglang_door):
    """Why this door lays out buckets itself. If SGLang mends it, this test says so."""
    bucket = sglang_door.FlattenedTensorBucket(named_tensors=list(ODD.items()))
    with pytest.raises(RuntimeError, match="divisible"):
        bucket.reconstruct_tensors()
    with pytest.raises(IntegrityError, match="'single' lies at bytes 6 to 26, and torch.float32 begins at a multiple of 4"):
        sglang_door.check_flattened(bucket)


@pytest.mark.parametrize("order", ["given", "packed"])
def test_odd_sizes_come_back(sglang_door, order):
    _, (bucket,) = buckets_of(sglang_door, ODD, order=order)
    sglang_door.check_flattened(bucket)
    assert_same(received(bucket), list(ODD.items()))


def test_no_copy_beside_the_pack(sglang_door):
    plan, (bucket,) = buckets_of(sglang_door, ODD)
    assert bucket.get_flattened_tensor().numel() == plan.buckets[0].nbytes
    memory = bucket.get_flattened_tensor().untyped_storage().data_ptr()
    assert {tensor.untyped_storage().data_ptr() for _, tensor in received(bucket)} == {memory}


@given(
    named_tensors=named(),
    capacity=st.integers(1, 200),
    order=st.sampled_from(["given", "packed"]),
)
def test_anything_that_travels_comes_back(sglang_door, named_tensors, capacity, order):
    plan, buckets = buckets_of(sglang_door, named_tensors, capacity=capacity, order=order)
    assert [bucket.get_flattened_tensor().numel() for bucket in buckets] == [layout.nbytes for layout in plan.buckets]
    for bucket in buckets:
        sglang_door.check_flattened(bucket)
    assert_same([pair for bucket in buckets for pair in received(bucket)], named_tensors)


def test_zero_size_between_and_at_the_end(sglang_door):
    source = {
        "byte": patterned(torch.uint8, 1),
        "empty": torch.empty(0, 3, dtype=torch.float64),
        "scalar": patterned(torch.int64),
        "tail": patterned(torch.uint8, 3),
        "last": torch.empty(2, 0, dtype=torch.complex64),
    }
    for order in ("given", "packed"):
        _, (bucket,) = buckets_of(sglang_door, source, order=order)
        sglang_door.check_flattened(bucket)
        assert_same(received(bucket), list(source.items()))


def test_tied_weights_lie_once_and_come_under_every_name(sglang_door):
    embedding = patterned(torch.float32, 4, 3)
    source = {"embed": embedding, "norm": patterned(torch.float32, 3), "lm_head": embedding}
    _, (bucket,) = buckets_of(sglang_door, source)
    assert bucket.get_flattened_tensor().numel() == embedding.nbytes + 12
    assert_same(received(bucket), list(source.items()))


def test_a_split_plan_is_refused_before_anything_is_packed(sglang_door):
    plan = plan_buckets(specs_of(ODD), 8)
    with pytest.raises(CapacityError, match="'single' is split over buckets"):
        sglang_door.flattened_buckets(plan, ODD)


def test_a_packed_plan_lies_as_sglang_s_receive_bucket_for_a_broadcast(sglang_door):
    """``update_weights_from_distributed`` sends names, dtypes and shapes only, and lays them end to end at the other end."""
    plan, (bucket,) = buckets_of(sglang_door, ODD, order="packed")
    slots = [slot.spec for slot in plan.buckets[0].slots]
    theirs = type(bucket).empty([s.name for s in slots], [s.dtype for s in slots], [s.shape for s in slots], "cpu")
    assert theirs.get_metadata() == bucket.get_metadata()
    theirs.get_flattened_tensor().copy_(bucket.get_flattened_tensor())
    assert_same(theirs.reconstruct_tensors(), list(ODD.items()))


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        (
            {"start_idx": 1, "end_idx": 7},
            IntegrityError,
            "'half' lies at bytes 1 to 7, and torch.bfloat16 begins at a multiple of 2",
        ),
        ({"start_idx": 28, "end_idx": 34}, IntegrityError, "'half' lies at bytes 28 to 34 of 29"),
        ({"start_idx": -2, "end_idx": 4}, IntegrityError, "'half' lies at bytes -2 to 4 of 29"),
        ({"end_idx": 4}, IntegrityError, "'half' lies at bytes 0 to 4, and torch.bfloat16 of shape \\[3\\] has 6 bytes"),
        ({"name": "single"}, DuplicateNameError, "'single' stands at places 0 and 1"),
    ],
)
def test_check_names_what_is_wrong(sglang_door, change, error, words):
    _, (bucket,) = buckets_of(sglang_door, ODD)
    bucket.metadata[0] = replace(bucket.metadata[0], **change)
    with pytest.raises(error, match=words):
        sglang_door.check_flattened(bucket)


def test_check_looks_at_the_memory(sglang_door):
    _, (bucket,) = buckets_of(sglang_door, ODD)
    flattened = bucket.get_flattened_tensor()
    for wrong in (flattened.to(torch.int8), torch.cat([torch.zeros(1, dtype=torch.uint8), flattened])[1:], flattened.view(1, -1)):
        with pytest.raises(IntegrityError, match="the flattened tensor"):
            sglang_door.check_flattened(type(bucket)(flattened_tensor=wrong, metadata=bucket.metadata))


def test_each_rank_of_another_process_takes_its_own_payload(sglang_door):
    """Nothing but the text goes over; the process is no child by fork and shares no descriptor with this one."""
    source = {**ODD, "empty": torch.empty(0), "scalar": torch.tensor(2.5), "tied": ODD["single"]}
    strategy = torch.multiprocessing.get_sharing_strategy()
    _, buckets = buckets_of(sglang_door, source, capacity=24)
    assert len(buckets) > 1
    payloads = [sglang_door.rank_payloads(bucket, 2, text=True) for bucket in buckets]
    assert torch.multiprocessing.get_sharing_strategy() == strategy
    assert all(len(ranks) == 2 for ranks in payloads)
    program = Path(__file__).with_name("sglang_process.py")
    for rank in range(2):
        lines = "".join(ranks[rank] + "\n" for ranks in payloads)
        done = subprocess.run([sys.executable, program], input=lines, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
        got = [pair for line in done.stdout.splitlines() for pair in json.loads(line)]
        assert sorted(map(tuple, got)) == sorted((name, digest(tensor)) for name, tensor in source.items())
    mine = f"torch_{os.getpid()}_"
    assert [name for name in os.listdir("/dev/shm") if name.startswith(mine)]
    del buckets, payloads, lines
    assert not [name for name in os.listdir("/dev/shm") if name.startswith(mine)]


def test_the_strategy_is_put_back_after_an_error(sglang_door):
    strategy = torch.multiprocessing.get_sharing_strategy()
    _, (bucket,) = buckets_of(sglang_door, ODD)
    bucket.metadata = lambda: None  # cannot be pickled
    with pytest.raises(Exception, match="[Pp]ickle|lambda"):
        sglang_door.rank_payloads(bucket, 1)
    assert torch.multiprocessing.get_sharing_strategy() == strategy
