"""send and receive over threads: what is left of an update once it is over."""

import gc
import threading
import weakref
from contextlib import suppress

import pytest
import torch

from rollout_core.bucketing import plan_buckets, specs_of
from rollout_core.errors import PlanMismatchError, RolloutCoreError
from rollout_core.transfer import CollectedWeights, DirectWeights, StagedWeights, receive, send, send_stream
from rollout_core.transfer.carriers.local import local_carrier


def weights():
    return {name: torch.ones(1000) for name in ("first", "second", "third")}


def planned(source, end):
    send(plan_buckets(specs_of(source), 4096), source, end, timeout=20)


def streamed(source, end):
    send_stream(source.items(), end, capacity=4096, timeout=20)


def breaking(source, end):
    def pairs():
        yield "first", source["first"]
        raise OSError("the disk is gone")

    send(plan_buckets(specs_of(source), 4096), pairs(), end, timeout=20)


class Refusing(DirectWeights):
    def begin(self, plan, version):
        raise PlanMismatchError("not here")


class Failing(DirectWeights):
    def load(self, pairs):
        raise MemoryError("no room")


@pytest.fixture
def uncollected():
    """No garbage collection: what is freed is freed by its last reference."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


@pytest.mark.parametrize("update", [planned, streamed, breaking])
@pytest.mark.parametrize("target", [DirectWeights, StagedWeights, CollectedWeights, Refusing, Failing])
def test_t3_an_update_leaves_nothing_to_the_garbage_collector(update, target, uncollected):
    """The sender's tensors, both ends, their memory and the receiver's tensors all end with their last reference. The weights of a
    trainer are most of its memory, and collections may be hours apart."""

    def watched():
        source, mine = weights(), weights()
        end, (other,) = local_carrier()
        into = target() if target is CollectedWeights else target(mine)
        # Errors are of no interest here, and hold what they came through: each is dropped where it was raised.
        worker = threading.Thread(target=attempted, args=(lambda: receive(other, into, timeout=20),))
        worker.start()
        attempted(lambda: update(source, end))
        worker.join(30)
        assert not worker.is_alive()
        things = {"source": source["first"], "sender": end, "receiver": other, "target": into, "weights": mine["first"]}
        refs = {name: weakref.ref(thing) for name, thing in things.items()}
        end.close()
        other.close()
        return refs

    refs = watched()
    assert [name for name, ref in refs.items() if ref() is not None] == []


def attempted(update):
    with suppress(RolloutCoreError, OSError, MemoryError):
        update()
