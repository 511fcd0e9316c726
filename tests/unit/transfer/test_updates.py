"""send and receive over threads: what is left of an update once it is over, and what a caller may do to one."""

import gc
import math
import os
import signal
import socket
import threading
import time
import weakref
from contextlib import ExitStack, suppress
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from rollout_core.bucketing import plan_buckets, specs_of
from rollout_core.errors import CapacityError, IntegrityError, PlanMismatchError, RolloutCoreError, TransferError
from rollout_core.transfer import CollectedWeights, DirectWeights, StagedWeights, receive, send, send_stream
from rollout_core.transfer.carriers import unix
from rollout_core.transfer.carriers.local import local_carrier
from rollout_core.transfer.carriers.memory import MemoryReceiver, MemorySender


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


def updated(source, into, **options):
    """What ``receive`` came to, over threads: a report, or the error."""
    end, (other,) = local_carrier()
    worker = threading.Thread(target=attempted, args=(lambda: send(plan_buckets(specs_of(source), 1024), source, end, timeout=20),))
    worker.start()
    try:
        return receive(other, into, timeout=20, **options)
    except (RolloutCoreError, KeyboardInterrupt) as error:
        return error
    finally:
        worker.join(30)
        end.close()
        other.close()


class Norm(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1000))
        self.register_buffer("mean", torch.zeros(3))


@pytest.mark.parametrize("target", [DirectWeights, StagedWeights])
@pytest.mark.parametrize(
    "change",
    [lambda model: model.to_empty(device="cpu"), lambda model: model.load_state_dict(Norm().state_dict(), assign=True)],
    ids=["to_empty", "assign"],
)
def test_a_module_whose_tensors_were_replaced_gets_the_update(target, change):
    """The update goes into what the module has when it begins, not into tensors that nobody uses any more."""
    model = Norm()
    into = target(model)
    change(model)
    source = {"weight": torch.full((1000,), 7.0), "mean": torch.full((3,), 9.0)}
    assert updated(source, into).version == 1
    assert torch.equal(model.weight, source["weight"])
    assert torch.equal(model.mean, source["mean"])


@pytest.mark.parametrize("target", [DirectWeights, StagedWeights])
def test_t5_weights_without_memory_are_refused(target):
    with torch.device("meta"):
        into = target(Norm())
    error = updated(weights(), into)
    assert isinstance(error, PlanMismatchError)
    assert str(error).startswith("the model's tensor 'weight' is on the meta device")
    assert (into.version, into.unusable) == (0, None)


@pytest.mark.parametrize("size", [10, 1000], ids=["whole", "split"])
@pytest.mark.parametrize("target", [DirectWeights, StagedWeights])
def test_tied_weights_that_come_with_two_values_are_refused(target, size):
    """The last to come would win, and the model would be neither."""
    tied = torch.zeros(size)
    into = target({"embed": tied, "head": tied})
    same = {"embed": torch.ones(size), "head": torch.ones(size)}
    assert updated(same, into).version == 1
    assert torch.equal(tied, same["embed"])
    into = target({"embed": tied, "head": tied})
    error = updated({"embed": torch.ones(size), "head": torch.zeros(size)}, into)
    assert isinstance(error, PlanMismatchError)
    assert str(error) == "'embed' and 'head' are one tensor in the model, and the update has different values for them"
    assert into.version == 0
    assert (into.unusable is None) == (target is StagedWeights)


def test_t2_an_interrupt_while_the_last_message_leaves_ends_the_update(monkeypatch):
    """What the machine asked for beside that message is done all the same."""
    source = weights()
    into = StagedWeights(weights())
    end, (other,) = local_carrier()
    post = other.post

    def interrupted(message):
        post(message)
        if b"Committed" in message:
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(other, "post", interrupted)
    worker = threading.Thread(target=attempted, args=(lambda: planned(source, end),))
    worker.start()
    with pytest.raises(KeyboardInterrupt) as raised:
        receive(other, into, timeout=20)
    worker.join(30)
    assert raised.value.__notes__ == ["version 1 is committed here all the same"]
    assert (into.version, end.version, other.version) == (1, 1, 1)
    end.close()
    other.close()


@pytest.mark.parametrize("wait", [5.0, math.inf])
def test_t2_a_sender_that_left_after_its_abort_is_not_waited_for(wait):
    """Hello, Abort and the end of the socket come at once: the end is not forgotten with the update that it follows."""
    end, (other,) = local_carrier()
    with pytest.raises(TransferError, match="silent"):
        send(plan_buckets(specs_of(weights()), 4096), weights(), end, timeout=0.2)
    end.close()
    with pytest.raises(TransferError, match="gave the update up"):
        receive(other, wait=5, timeout=20)
    with pytest.raises(TransferError, match="this end of the carrier is closed"):
        receive(other, wait=wait, timeout=20)


def test_t2_a_carrier_that_another_thread_closes_ends_the_update():
    """At once, and not by asking a closed carrier without end."""
    source, opened = weights(), threading.Event()

    def pairs():
        yield "first", source["first"]
        opened.set()
        time.sleep(0.2)
        yield from list(source.items())[1:]

    end, (other,) = local_carrier()
    worker = threading.Thread(target=attempted, args=(lambda: receive(other, timeout=20),))
    worker.start()
    closer = threading.Thread(target=lambda: (opened.wait(20), end.close()))
    closer.start()
    start = time.monotonic()
    with pytest.raises(TransferError, match="this end of the carrier is closed"):
        send(plan_buckets(specs_of(source), 4096), pairs(), end, timeout=20)
    assert time.monotonic() - start < 4
    worker.join(30)
    closer.join(30)


def test_a_carrier_whose_poll_breaks_is_given_up_with_its_own_error(monkeypatch):
    end, (other,) = local_carrier()

    def broken(seconds):
        raise ZeroDivisionError("in the carrier")

    monkeypatch.setattr(end, "poll", broken)
    with pytest.raises(ZeroDivisionError, match="in the carrier"):
        send(plan_buckets(specs_of(weights()), 4096), weights(), end, timeout=20)
    other.close()


@pytest.mark.parametrize("target", [DirectWeights, StagedWeights])
@pytest.mark.parametrize(
    ("model", "words"),
    [
        ({"a": torch.zeros(1).expand(4)}, "the model's tensor 'a' is expanded"),
        (
            dict(zip("ab", torch.zeros(6).unfold(0, 4, 2), strict=True)),
            "the model's tensors 'a' and 'b' share a part of their memory",
        ),
    ],
    ids=["expanded", "overlapping"],
)
def test_t5_what_cannot_be_loaded_is_refused_before_anything_is(target, model, words):
    """Not at the commit: another receiver would have committed by then."""
    into = target(model)
    error = updated({name: torch.ones(4) for name in model}, into)
    assert isinstance(error, PlanMismatchError)
    assert str(error).startswith(words)
    assert (into.version, into.unusable) == (0, None)


def test_columns_of_one_matrix_are_apart():
    """Their memory is, though one begins where the other has not ended."""
    whole = torch.zeros(3, 4)
    into = StagedWeights({"left": whole[:, :2], "right": whole[:, 2:]})
    assert updated({"left": torch.ones(3, 2), "right": torch.full((3, 2), 2.0)}, into).version == 1
    assert torch.equal(whole, torch.tensor([[1.0, 1.0, 2.0, 2.0]] * 3))


def test_a_buffer_of_a_shared_module_may_be_left_out_under_each_name():
    class Rotary(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("inv_freq", torch.ones(3), persistent=False)

    rotary = Rotary()
    model = torch.nn.ModuleDict({name: torch.nn.ModuleList([torch.nn.Linear(2, 2), rotary]) for name in ("first", "second")})
    assert updated(model.state_dict(), DirectWeights(model)).version == 1


class BadManners(StagedWeights):
    def load(self, pairs):
        raise ValueError("the reason")

    def abort(self, version):
        raise OSError("no manners")


def test_what_letting_go_raises_does_not_hide_the_reason():
    end, (other,) = local_carrier()
    worker = threading.Thread(target=attempted, args=(lambda: planned(weights(), end),))
    worker.start()
    with pytest.raises(ValueError, match="the reason") as raised:
        receive(other, BadManners(weights()), timeout=20)
    worker.join(30)
    assert raised.value.__notes__ == ["and letting go raised OSError: no manners"]
    end.close()
    other.close()


def test_t3_an_error_that_is_kept_keeps_no_memory():
    """Tracebacks hold frames, and frames what was in them: slots of shared memory, for as long as a log keeps the error."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        end, other = MemorySender([ours]), MemoryReceiver(theirs)
    kept = []

    def run(work):
        try:
            work()
        except RolloutCoreError as error:
            kept.append(error)

    source = weights()
    target = StagedWeights({**source, "third": torch.zeros(1001)})  # refused where it is loaded: it is a stream
    worker = threading.Thread(target=run, args=(lambda: receive(other, target, timeout=20),))
    worker.start()
    run(lambda: streamed(source, end))
    worker.join(30)
    assert len(kept) == 2
    end.close()
    other.close()
    assert "rollout-core-arena" not in Path("/proc/self/maps").read_text()


@pytest.mark.parametrize("value", [0, -1, 1e-9, math.nan, True, "1", None, 10**400])
@pytest.mark.parametrize("name", ["timeout", "deadline", "wait"])
def test_what_is_no_time_is_refused_by_its_name(name, value):
    end, (other,) = local_carrier()
    calls = [lambda: receive(other, **{name: value})]
    if name != "wait":
        calls.append(lambda: send(plan_buckets([], 8), {}, end, **{name: value}))
    if value is not None or name == "timeout":
        for call in calls:
            with pytest.raises(TransferError, match=f"{name} is .*; it is a number of seconds, at least 1e-06"):
                call()
    end.close()
    other.close()


def test_numbers_of_other_kinds_are_times():
    end, (other,) = local_carrier()
    worker = threading.Thread(target=receive, args=(other,), kwargs={"timeout": np.float32(20), "wait": 20})
    worker.start()
    assert send(plan_buckets(specs_of(weights()), 4096), weights(), end, timeout=np.float64(20), deadline=10**300).version == 1
    worker.join(30)
    end.close()
    other.close()


def test_a_carrier_without_receivers_is_refused():
    end, _ = local_carrier(0)
    with pytest.raises(TransferError, match="no receivers: nobody would get the update"):
        send(plan_buckets([], 8), {}, end)


def test_a_stream_s_capacity_is_looked_at_first():
    end, (other,) = local_carrier()
    for capacity in (0, 1.5, True, "x"):
        with pytest.raises(CapacityError, match=f"capacity is {capacity!r} "):
            send_stream(weights(), end, capacity=capacity)
    end.close()
    other.close()
    with pytest.raises(TransferError, match="this end of the carrier is closed"):
        planned(weights(), end)


def test_t2_a_listener_with_a_full_queue_is_not_waited_for():
    """connect(2) of a blocking Unix socket would wait for it without end."""
    name = f"full-{os.getpid()}"
    with socket.socket(socket.AF_UNIX) as listener, ExitStack() as waiting:
        listener.bind(b"\0rollout-core/" + name.encode())
        listener.listen(0)
        waiting.enter_context(unix.connect(name, 1.0))
        start = time.monotonic()
        with pytest.raises(TransferError, match=f"no sender listens at '{name}' within 0.3 s"):
            unix.connect(name, 0.3)
        assert time.monotonic() - start < 5


def tapped(tap):
    """What becomes of an update whose buckets go through ``tap``: the report or error at each end, and the weights that arrived."""
    source = {name: torch.arange(1000) + place for place, name in enumerate(("first", "second", "third"))}
    mine = {name: torch.zeros_like(tensor) for name, tensor in source.items()}
    end, (other,) = local_carrier()
    ends = []

    def serve():
        with suppress(RolloutCoreError):
            ends.append(receive(other, DirectWeights(mine), timeout=20))

    worker = threading.Thread(target=serve)
    worker.start()
    try:
        ends.append(send(plan_buckets(specs_of(source), 4096), source, end, timeout=20, tap=tap))
    except (RolloutCoreError, ZeroDivisionError) as error:
        ends.append(error)
    worker.join(30)
    end.close()
    other.close()
    return ends, all(torch.equal(mine[name], source[name]) for name in source)


def test_a_tap_sees_every_bucket_and_changes_nothing():
    seen = []
    ends, arrived = tapped(lambda bucket: seen.append((bucket.index, bucket.digest is not None)) or bucket)
    assert arrived
    assert len(ends) == 2
    assert seen == [(index, True) for index in range(len(seen))]
    assert len(seen) == ends[0].buckets > 2


def test_what_a_tap_gives_instead_is_what_is_sent():
    def elsewhere(bucket):
        moved = replace(bucket, buffer=bucket.buffer.clone())
        bucket.buffer.zero_()
        return moved

    assert tapped(elsewhere)[1]

    def flipped(bucket):
        bucket.buffer[0] ^= 1
        return bucket

    (error,), arrived = tapped(flipped)
    assert isinstance(error, IntegrityError)
    assert not arrived


@pytest.mark.parametrize(
    ("tap", "kind", "words"),
    [
        (lambda bucket: replace(bucket, index=bucket.index + 1), TransferError, "bucket 1 was given in the place of bucket 0"),
        (
            lambda bucket: replace(bucket, buffer=torch.zeros(5000, dtype=torch.uint8)),
            TransferError,
            "bucket 0 has 5000 bytes, and none of its plan is larger than a slot",
        ),
        (lambda bucket: 1 // 0, ZeroDivisionError, "division"),
    ],
)
def test_a_tap_that_gives_no_bucket_of_the_plan_ends_the_update(tap, kind, words):
    (error,), arrived = tapped(tap)
    assert isinstance(error, kind)
    assert words in str(error)
    assert not arrived


def test_what_is_no_plan_is_refused_at_once():
    source = weights()
    end, (other,) = local_carrier()
    with pytest.raises(PlanMismatchError, match="plan is a list; pass what plan_buckets"):
        send(specs_of(source), source, end)
    end.close()
    other.close()


def test_a_listener_asks_whether_waiting_still_makes_sense():
    calls = []

    def check():
        calls.append(None)
        if len(calls) == 3:
            raise ZeroDivisionError

    start = time.monotonic()
    with pytest.raises(ZeroDivisionError):
        MemorySender.listen("nobody comes here", timeout=20, check=check)
    assert time.monotonic() - start < 5
    with pytest.raises(TransferError, match="0 of 1 receivers connected to 'nobody comes here' within 0.2 s"):
        MemorySender.listen("nobody comes here", timeout=0.2, check=lambda: None)
