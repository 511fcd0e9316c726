"""receive: one update on the worker's side."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch

from rollout_core.bucketing import Bucket, BucketPlan, StreamBucket, StreamUnpacker, Unpacker
from rollout_core.bucketing.sources import Pair
from rollout_core.bucketing.unpacker import JoinMemory, WriteBucket
from rollout_core.errors import PlanMismatchError, RolloutCoreError, TransferError
from rollout_core.transfer.carriers.contract import Moving, ReceiverEnd
from rollout_core.transfer.driver import Driver
from rollout_core.transfer.protocol.messages import Filled, Hello
from rollout_core.transfer.protocol.receiver import Receiver
from rollout_core.transfer.protocol.steps import (
    Applied,
    Apply,
    Examine,
    Examined,
    Load,
    Loaded,
    Prepare,
    Prepared,
    Pull,
    Pulled,
    ReceiverAction,
)
from rollout_core.transfer.report import Observe, ReceiveReport
from rollout_core.transfer.sending import MAX_SLOTS, deadline_of, seconds_of
from rollout_core.transfer.targets import CollectedWeights, Target


def receive(
    carrier: ReceiverEnd,
    into: Target | None = None,
    *,
    plan: BucketPlan | None = None,
    wait: float | None = None,
    timeout: float = 60.0,
    deadline: float | None = None,
    verify: bool = True,
    observe: Observe | None = None,
) -> ReceiveReport:
    """Receive one update, which the other side gives to ``send`` or ``send_stream``. Returns once it is committed here.

    ``into``: what the weights are loaded into, such as ``DirectWeights(model)`` or ``StagedWeights(model)``; None collects them in
    memory of their own, as the report's ``weights``. ``plan``: accept this one only. ``wait``: seconds until an update has to begin
    (None: ``timeout``; ``math.inf``: as long as the sender lives). ``timeout``: seconds from the sender's last sign of life to the
    end of the update with an error, see ``send``. ``deadline``: seconds after
    which it is given up, as for ``send``. ``verify``: check every bucket's digest before anything of it is used. ``observe`` is
    told of every step.

    If this raises, the version has not advanced: ``into`` has the old weights, or says that they are unusable (clause T5). Only a
    KeyboardInterrupt that comes after the commit is raised all the same, and a note says that the update is committed. The carrier
    can be used for the next update if the sender was not lost; else it is closed.

    Raises:
        PlanMismatchError: the update is not what ``plan`` or ``into`` expects; nothing has changed.
        IntegrityError, IncompleteStreamError: what came is not what was sent.
        TransferError: the sender ended, gave up, fell silent, or was not done in time; the message says why.
        Exception: whatever ``into`` raises, unchanged.
    """
    timeout, deadline = seconds_of("timeout", timeout), deadline_of(deadline)
    wait = timeout if wait is None else seconds_of("wait", wait, endless=True)
    if into is not None and not isinstance(into, Target):
        raise TransferError(f"into is a {type(into).__name__}, no target: pass DirectWeights(model) or StagedWeights(model)")
    target = CollectedWeights(carrier.version) if into is None else into
    hands = _Receiving(carrier, target, plan, verify)
    machine = Receiver.new(
        timeout=timeout,
        wait=wait,
        deadline=deadline,
        now=time.monotonic(),
    )
    Driver(machine, hands, observe).update(carrier, remark=hands.remark)
    return hands.report()


class _Receiving:
    """What the receiver's machine asks for, done."""

    def __init__(self, carrier: ReceiverEnd, target: Target, plan: BucketPlan | None, verify: bool) -> None:
        self._carrier = carrier
        self._target = target
        self._plan = plan
        self._verify = verify
        self._unpacker: Unpacker | StreamUnpacker | None = None
        self._version: int | None = None  # of an update that the target was told of
        self._applied = False
        self._rendezvous = False  # as the sender says
        self._start = 0.0
        self._buckets, self._nbytes, self._loading = 0, 0, 0.0

    def end(self) -> None:
        """Tell the target if the update did not come to its end."""
        self._unpacker = None
        if self._version is not None and not self._applied:
            self._target.abort(self._version)

    def remark(self) -> str | None:
        return f"version {self._version} is committed here all the same" if self._applied else None

    def report(self) -> ReceiveReport:
        assert self._version is not None
        return ReceiveReport(
            version=self._version,
            buckets=self._buckets,
            nbytes=self._nbytes,
            seconds=time.monotonic() - self._start,
            loading=self._loading,
            weights=self._target.weights if isinstance(self._target, CollectedWeights) else None,
        )

    @property
    def peers(self) -> int:
        return 1

    def post(self, peer: int, message: bytes) -> None:
        del peer
        self._carrier.post(message)

    def poll(self, seconds: float | None) -> list[tuple[int, bytes | TransferError]]:
        return [(0, message) for message in self._carrier.poll(seconds)]

    def do(self, action: ReceiverAction) -> list[Any] | tuple[Moving, Callable[[], Any]]:
        match action:
            case Examine(hello):
                return [self._examine(hello)]
            case Pull(index, slot, nbytes):
                moving = self._carrier.pull(slot, nbytes)
                return [Pulled(index)] if moving is None else (moving, lambda: Pulled(index))
            case Load(filled):
                self._load(filled)
                return [Loaded(filled.index)]
            case Prepare():
                assert self._unpacker is not None
                self._unpacker.close()
                self._target.prepare()
                return [Prepared()]
            case Apply(version):
                self._target.commit(version)
                self._applied = True
                self._carrier.version = version
                return [Applied()]
        raise AssertionError(f"no action of a receiver: {action}")

    def instead(self, action: ReceiverAction) -> list[Any] | None:
        match action:
            case Pull():
                return None
            case Load(filled):
                return [Loaded(filled.index)]
        return []

    def _examine(self, hello: Hello) -> Examined:
        """Refuse by raising, before anything has changed."""
        self._start, self._rendezvous = time.monotonic(), hello.rendezvous
        memory: JoinMemory | None = getattr(self._target, "memory_for", None)
        write: WriteBucket | None = getattr(self._target, "write_bucket", None)
        if hello.manifest:
            plan = _plan_of(hello.manifest)
            if plan.digest != hello.plan_digest:
                raise PlanMismatchError(f"the sender's plan has digest {plan.digest.hex()}, and it says {hello.plan_digest.hex()}")
            if self._plan is not None:
                self._plan.require_same(plan)
            largest = max((layout.nbytes for layout in plan.buckets), default=0)
            self._unpacker = Unpacker(plan, verify=self._verify, version=hello.version, memory=memory, write=write)
        elif self._plan is not None:
            raise PlanMismatchError("the sender sends a stream, whose tensors are not known ahead, and this side expects a plan")
        else:
            plan, largest = None, hello.slot_nbytes
            self._unpacker = StreamUnpacker(verify=self._verify, version=hello.version, memory=memory)
        if not 1 <= hello.slots <= MAX_SLOTS or hello.slot_nbytes != largest:
            raise TransferError(
                f"the sender has {hello.slots} slots of {hello.slot_nbytes} bytes, and its largest bucket {largest}"
            )
        if hello.version <= self._target.version:
            raise TransferError(
                f"the update has version {hello.version}, and the weights here are version {self._target.version} already; "
                "pass send() a larger version"
            )
        self._target.begin(plan, hello.version)
        self._version = hello.version
        self._carrier.open(hello.ticket, hello.slots, hello.slot_nbytes)
        return Examined(self._target.version)

    def _load(self, filled: Filled) -> None:
        start = time.monotonic()
        buffer = self._carrier.view(filled.slot, filled.nbytes)
        assert self._version is not None
        pairs = self._feed(filled, buffer)
        if pairs:
            self._target.load(pairs)
        if buffer.is_cuda:  # the slot is given back when nothing reads it any more
            if self._rendezvous:  # the next bucket may be on its way to this GPU, and is not to be waited for
                torch.cuda.current_stream(buffer.device).synchronize()
            else:  # on whatever stream
                torch.cuda.synchronize(buffer.device)
        self._buckets, self._nbytes = self._buckets + 1, self._nbytes + filled.nbytes
        self._loading += time.monotonic() - start

    def _feed(self, filled: Filled, buffer: torch.Tensor) -> list[Pair]:
        assert self._version is not None
        sealed: dict[str, Any] = {
            "index": filled.index,
            "buffer": buffer,
            "plan_digest": filled.plan_digest,
            "version": self._version,
            "algorithm": filled.algorithm,
            "digest": filled.digest,
        }
        match self._unpacker:
            case Unpacker() as unpacker:
                return unpacker.feed(Bucket(**sealed))
            case StreamUnpacker() as unpacker:
                return unpacker.feed(StreamBucket(**sealed, header=filled.header))
        raise RolloutCoreError("no update is under way")


@lru_cache(maxsize=2)
def _plan_of(manifest: bytes) -> BucketPlan:
    """A trainer sends the same one again and again."""
    return BucketPlan.from_bytes(manifest)
