"""One packer for many updates: what it keeps is of the plan, never of a source or of one update's memory."""

import gc
import threading
import weakref
from contextlib import ExitStack

import pytest
import torch

from rollout_core.bucketing import Packer, plan_buckets, specs_of
from rollout_core.errors import PlanMismatchError, RolloutCoreError
from rollout_core.testing.oracles import picture
from rollout_core.transfer import receive, send
from rollout_core.transfer.carriers.local import local_carrier


@pytest.fixture
def connected():
    """Makes the two ends of a carrier, which are closed in the end."""
    with ExitStack() as stack:

        def connect():
            end, (other,) = local_carrier()
            stack.callback(other.close)
            stack.callback(end.close)
            return end, other

        yield connect


def weights(seed, names=("first", "second", "third")):
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(300, generator=generator) for name in names}


def update(plan, source, ends, *, verify=True, **options):
    """What the receiver has of it, and the error at the sender, if there is one."""
    end, other = ends
    raised, received = [], []

    def receiver():
        try:
            received.append(receive(other, timeout=20, verify=verify).weights)
        except RolloutCoreError:
            received.append(None)

    worker = threading.Thread(target=receiver)
    worker.start()
    try:
        send(plan, source, end, timeout=20, **options)
    except (RolloutCoreError, OSError) as error:
        raised.append(type(error))
    worker.join(30)
    return received[0], raised


def test_each_update_is_packed_into_its_own_memory(connected):
    plan = plan_buckets(specs_of(weights(0)), 1500)
    packer = Packer(plan)
    ends = connected()
    for turn, slots in enumerate((2, 1, 3)):  # others ends, and other slots of the same
        ends = connected() if turn == 2 else ends
        source = weights(turn)
        received, raised = update(plan, source, ends, packer=packer, slots=slots)
        assert not raised
        assert picture(received.items()) == picture(source.items())
    assert len(list(packer.pack(weights(7)))) == len(plan.buckets), "its own memory is its own still"


def test_an_equal_plan_is_the_packers_and_another_is_refused_before_anything_is_said(connected):
    plan = plan_buckets(specs_of(weights(0)), 1500)
    ends = connected()
    equal = Packer(plan_buckets(specs_of(weights(1)), 1500))
    received, raised = update(plan, weights(2), ends, packer=equal)
    assert not raised
    assert picture(received.items()) == picture(weights(2).items())
    other = Packer(plan_buckets(specs_of(weights(0)), 1400))
    with pytest.raises(PlanMismatchError, match="capacity is 1500 here and 1400 there"):
        send(plan, weights(0), ends[0], timeout=20, packer=other)
    received, raised = update(plan, weights(3), ends, packer=equal)
    assert not raised


def test_its_digests_are_made_as_it_was_told(connected):
    plan = plan_buckets(specs_of(weights(0)), 1500)
    seen = []

    def tap(bucket):
        seen.append(bucket.algorithm)
        return bucket

    received, raised = update(plan, weights(1), connected(), packer=Packer(plan, digest=None), verify=False, tap=tap)
    assert not raised
    assert picture(received.items()) == picture(weights(1).items())
    assert set(seen) == {"none"}


def test_an_update_that_failed_leaves_it_as_it_was(connected):
    plan = plan_buckets(specs_of(weights(0)), 1500)
    packer, ends = Packer(plan), connected()

    def breaking():
        yield "first", weights(0)["first"]
        raise OSError("the disk is gone")

    assert update(plan, breaking(), ends, packer=packer) == (None, [OSError])
    received, raised = update(plan, weights(5), ends, packer=packer)
    assert not raised
    assert picture(received.items()) == picture(weights(5).items())


def test_t3_it_keeps_no_tensor_of_a_source_and_no_slot():
    plan = plan_buckets(specs_of(weights(0)), 1500)
    packer = Packer(plan)
    gc.collect()
    gc.disable()
    try:

        def watched():
            source, (end, (other,)) = weights(1), local_carrier()
            received, raised = update(plan, source, (end, other), packer=packer)
            assert received is not None
            assert not raised
            refs = [weakref.ref(source["first"]), weakref.ref(end)]
            end.close()
            other.close()
            return refs

        assert [ref() for ref in watched()] == [None, None]
    finally:
        gc.enable()
