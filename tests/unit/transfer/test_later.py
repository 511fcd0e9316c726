"""Buckets whose digests are computed while they are moved: the next is packed meanwhile, and none is announced without."""

from __future__ import annotations

import socket
import threading
from dataclasses import replace

import pytest
import torch

from rollout_core.bucketing import Bucket, Packer, plan_buckets, specs_of
from rollout_core.bucketing.bucket import LaterBucket, verify
from rollout_core.errors import RolloutCoreError
from rollout_core.testing.oracles import picture
from rollout_core.transfer import receive, send
from rollout_core.transfer.carriers.local import LocalReceiver, LocalSender

FIELDS = ("index", "buffer", "plan_digest", "version", "algorithm")


class Slow(LocalSender):
    """Moves take as long as ``asked`` says: so many questions."""

    def __init__(self, *arguments, log, asked=3):
        super().__init__(*arguments)
        self.log, self.asked = log, asked

    def push(self, slot, nbytes):
        left = self.asked

        def moved():
            nonlocal left
            left -= 1
            if left == 0:
                self.log.append(f"moved {slot}")
            return left <= 0

        self.log.append(f"push {slot}")
        return moved


class Together(Slow):
    """A bucket is announced before it is moved."""

    rendezvous = True


class Later(Packer):
    """What it packs has its digest when it is asked for."""

    def __init__(self, plan, log, **options):
        super().__init__(plan, **options)
        self.log = log

    def pack(self, source, **options):
        for bucket in super().pack(source, **options):
            self.log.append(f"packed {bucket.index}")
            yield self.later(bucket)

    def later(self, bucket):
        def digest():
            self.log.append(f"digest {bucket.index}")
            return bucket.digest

        return LaterBucket(**{name: getattr(bucket, name) for name in FIELDS}, digest=digest)


class Broken(Later):
    def later(self, bucket):
        def digest():
            raise OSError("the device is gone")

        return LaterBucket(**{name: getattr(bucket, name) for name in FIELDS}, digest=digest)


def source():
    return {f"w{i}": torch.arange(100.0) + i for i in range(3)}


def update(kind, packer_kind, log, **options):
    """What arrived, and what was raised at the sender."""
    plan = plan_buckets(specs_of(source()), 400)
    shared, (ours, theirs) = [], socket.socketpair()
    end, other = kind([ours], shared, "cpu", log=log), LocalReceiver([theirs], shared)
    arrived, raised = [], []

    def receiver():
        try:
            arrived.append(picture(receive(other, timeout=20).weights.items()))
        except RolloutCoreError as error:
            arrived.append(type(error))

    worker = threading.Thread(target=receiver)
    worker.start()
    try:
        send(plan, source(), end, timeout=20, packer=packer_kind(plan, log), **options)
    except (RolloutCoreError, OSError) as error:
        raised.append(error)
    worker.join(30)
    end.close()
    other.close()
    return arrived[0], raised


def test_the_next_bucket_is_packed_while_a_digest_is_computed():
    log = []
    arrived, raised = update(Slow, Later, log, slots=2)
    assert not raised
    assert arrived == picture(source().items())
    assert log[:4] == ["packed 0", "push 0", "packed 1", "moved 0"] or log[:5] == [
        "packed 0",
        "push 0",
        "packed 1",
        "push 1",
        "moved 0",
    ]
    for index in range(3):
        slot = index % 2
        assert log.index(f"packed {index}") < log.index(f"digest {index}")
        assert log[log.index(f"digest {index}") - 1] == f"moved {slot}", "asked for when the move is over, and not before"
    assert log.count("digest 0") == 1


def test_with_a_rendezvous_a_digest_is_there_before_the_bucket_is_announced():
    log = []
    arrived, raised = update(Together, Later, log)
    assert not raised
    assert arrived == picture(source().items())
    assert log[:3] == ["packed 0", "digest 0", "push 0"]


@pytest.mark.parametrize("kind", [Slow, Together])
def test_t5_a_device_that_fails_at_a_digest_fails_the_update(kind):
    arrived, raised = update(kind, Broken, [])
    assert [str(error) for error in raised] == ["the device is gone"]
    assert issubclass(arrived, RolloutCoreError)


def test_a_tap_sees_a_bucket_as_it_is():
    seen = []

    def tap(bucket):
        seen.append(bucket.digest)
        return replace(bucket, buffer=bucket.buffer.clone())

    arrived, raised = update(Slow, Later, [], tap=tap)
    assert not raised
    assert arrived == picture(source().items())
    assert len(set(seen)) == 3


def test_b13_a_later_bucket_is_a_bucket():
    plan = plan_buckets(specs_of(source()), 400)
    log = []
    (bucket, *_) = Later(plan, log).pack(source())
    assert isinstance(bucket, Bucket)
    assert bucket.nbytes == 400
    assert log.count("digest 0") == 0
    verify(bucket)
    assert bucket.digest == next(iter(Packer(plan).pack(source()))).digest
    assert log.count("digest 0") == 1
    other = replace(bucket, index=5)
    assert (other.index, other.digest, other.buffer is bucket.buffer) == (5, bucket.digest, True)
    with pytest.raises(AttributeError):
        bucket.index = 7
