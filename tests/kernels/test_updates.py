"""Updates into a model whose buckets are written by a kernel, each in one launch: what clause T5 says holds there, too."""

from __future__ import annotations

import gc
import threading
import weakref
from contextlib import contextmanager, suppress

import pytest
import torch

from rollout_core.bucketing import plan_buckets, specs_of
from rollout_core.errors import IntegrityError, PlanMismatchError, RolloutCoreError, TransferError
from rollout_core.testing.oracles import bytes_of
from rollout_core.transfer import DirectWeights, StagedWeights, receive, send
from rollout_core.transfer.carriers.local import local_carrier
from support.kernel_checks import bytes_at
from support.tensors import patterned

pytestmark = pytest.mark.filterwarnings("ignore:Conversion of an array with ndim:DeprecationWarning")  # Triton's interpreter does


def weights(seed):
    return {
        "a": patterned(torch.bfloat16, 30, 7, seed=seed),
        "split": patterned(torch.float32, 500, seed=seed + 1),
        "none": torch.zeros(0, 3),
        "b": bytes_at("cpu", 333, 3, seed + 2),
    }


def picture(tensors):
    return {name: bytes_of(tensor) for name, tensor in tensors.items()}


@contextmanager
def connected():
    end, (other,) = local_carrier()
    try:
        yield end, other
    finally:
        end.close()
        other.close()


def update(source, into, ends, *, capacity=1000, tap=None, aliases=True):
    """What ``receive`` gave, or the error that it raised."""
    plan = plan_buckets(specs_of(source, aliases=aliases), capacity)
    end, other = ends

    def sender():
        with suppress(RolloutCoreError):
            # By torch: Triton's interpreter serves one thread at a time, and the receiver's is the one.
            send(plan, iter(source.items()), end, timeout=60, digest="xxh3-128", tap=tap)

    worker = threading.Thread(target=sender)
    worker.start()
    try:
        return receive(other, into, timeout=60)
    except RolloutCoreError as error:
        return error
    finally:
        worker.join(90)


def test_buckets_are_written_by_kernels_update_after_update(kernels):
    mine = weights(0)
    into = DirectWeights(mine)
    places = {name: tensor.data_ptr() for name, tensor in mine.items()}
    with connected() as ends:
        for turn in (1, 2, 3):
            before = kernels["copy"]
            report = update(weights(10 * turn), into, ends)
            assert report.version == turn
            assert kernels["copy"] - before == report.buckets
            assert picture(mine) == picture(weights(10 * turn))
    assert {name: tensor.data_ptr() for name, tensor in mine.items()} == places
    assert into.unusable is None


@pytest.mark.parametrize("bucket", [0, 1, 2])
def test_t5_nothing_of_a_damaged_bucket_is_written(bucket, kernels):
    mine = weights(0)
    into = DirectWeights(mine)

    def damage(one):
        if one.index == bucket:
            one.buffer[5] ^= 1
        return one

    with connected() as ends:
        error = update(weights(10), into, ends, tap=damage)
        assert isinstance(error, IntegrityError)
        assert into.version == 0
        assert kernels["copy"] == bucket
        old, new = picture(weights(0)), picture(weights(10))
        whole = {0: old, 1: {**old, "a": new["a"]}, 2: {**old, "a": new["a"]}}[bucket]
        got = picture(mine)
        assert {name: got[name] for name in ("a", "b", "none")} == {name: whole[name] for name in ("a", "b", "none")}
        if bucket == 0:
            assert got == old
            into.check_usable()
        else:
            with pytest.raises(TransferError, match="unusable: the update to version 1 was not completed"):
                into.check_usable()
        assert update(weights(20), into, ends).version == 1
        assert picture(mine) == picture(weights(20))
        into.check_usable()


def test_tensors_that_moved_are_found(kernels):
    """Between updates a model gets other memory: by ``to``, by ``data``, by another parameter."""
    mine = weights(0)
    into = DirectWeights(mine)
    with connected() as ends:
        assert update(weights(10), into, ends).version == 1
        before = mine["split"]
        mine["split"] = into._weights["split"] = torch.zeros(500)
        mine["a"].data = torch.zeros(30, 7, dtype=torch.bfloat16)
        assert update(weights(20), into, ends).version == 2
    assert picture(mine) == picture(weights(20))
    assert bytes_of(before) == bytes_of(weights(10)["split"]), "what the model has no more is left alone"
    assert kernels["copy"] > 0


def test_t3_memory_that_the_model_got_rid_of_is_free_between_updates(kernels):
    mine = {name: tensor.clone() for name, tensor in weights(0).items()}  # no views, which keep what they are of
    into = DirectWeights(mine)
    with connected() as ends:
        update(weights(10), into, ends)
    assert kernels["copy"] > 0
    ref = weakref.ref(mine["split"].untyped_storage())
    mine["split"].data = torch.empty(0)
    gc.collect()
    assert ref() is None


@pytest.mark.parametrize("turn", [1, 2])
@pytest.mark.parametrize(
    "change",
    [lambda t: torch.zeros(7, 30, dtype=torch.bfloat16), lambda t: torch.zeros(30, 7)],
    ids=["shape", "dtype"],
)
def test_a_model_that_is_no_longer_the_plans_is_refused(change, turn):
    mine = weights(0)
    into = DirectWeights(mine)
    with connected() as ends:
        for _ in range(turn):
            assert update(weights(10), into, ends).version
        mine["a"].data = change(mine["a"])
        before = picture(mine)
        assert isinstance(update(weights(20), into, ends), PlanMismatchError)
    assert picture(mine) == before


def strided():
    return torch.zeros(7, 30, dtype=torch.bfloat16).t()


@pytest.mark.parametrize("kind", ["strided", "staged", "tied here", "untied here", "a view of another"])
def test_what_has_to_be_written_one_by_one_is(kind, kernels):
    mine, source, new = weights(0), weights(10), weights(20)
    target = StagedWeights if kind == "staged" else DirectWeights
    match kind:
        case "strided":
            mine["a"] = strided()
        case "tied here":
            mine["tied"] = mine["a"]
            source["tied"], new["tied"] = source["a"].clone(), new["a"].clone()
        case "untied here":
            mine["tied"] = mine["a"].clone()
            source["tied"], new["tied"] = source["a"], new["a"]
        case "a view of another":
            mine["again"] = mine["a"].view(7, 30)
            source["again"], new["again"] = source["a"].clone().view(7, 30), new["a"].clone().view(7, 30)
    into = target(mine)
    with connected() as ends:
        for given in (source, new):
            assert update(given, into, ends).version
            assert picture(mine) == picture(given)
    assert kernels["copy"] == 0


def test_two_values_for_one_tensor_are_refused_still():
    mine = weights(0)
    mine["tied"] = mine["a"]
    source = weights(10)
    source["tied"] = patterned(torch.bfloat16, 30, 7, seed=77)
    with connected() as ends:
        assert isinstance(update(source, DirectWeights(mine), ends), PlanMismatchError)


def test_tied_here_and_there_is_written_once(kernels):
    mine, source = weights(0), weights(10)
    mine["tied"], source["tied"] = mine["a"], source["a"]
    with connected() as ends:
        assert update(source, DirectWeights(mine), ends).version == 1
    assert kernels["copy"] > 0
    assert picture(mine) == picture(source)


def test_a_target_that_looks_at_what_is_loaded_sees_it(kernels):
    """A subclass with a ``load`` of its own is asked for every tensor."""
    seen = []

    class Watching(DirectWeights):
        def load(self, pairs):
            seen.extend(name for name, _ in pairs)
            super().load(pairs)

    mine = weights(0)
    with connected() as ends:
        assert update(weights(10), Watching(mine), ends).version == 1
    assert sorted(seen) == sorted(mine)
    assert kernels["copy"] == 0
    assert picture(mine) == picture(weights(10))
