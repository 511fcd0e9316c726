"""send: one update from the trainer's side."""

from __future__ import annotations

import math
import secrets
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Final, TypeAlias

import torch

from rollout_core.bucketing import Bucket, BucketPlan, Packer, pack_stream
from rollout_core.bucketing.bucket import MAX_VERSION, LaterBucket
from rollout_core.bucketing.digest import DigestChoice, check_choice
from rollout_core.bucketing.placement import Options
from rollout_core.bucketing.sources import Source
from rollout_core.bucketing.stream_header import StreamBucket
from rollout_core.errors import CapacityError, PlanMismatchError, TransferError
from rollout_core.transfer.carriers.contract import Moving, SenderEnd
from rollout_core.transfer.driver import Driver
from rollout_core.transfer.protocol.line import Patience
from rollout_core.transfer.protocol.messages import PROTOCOL, Filled, Hello
from rollout_core.transfer.protocol.sender import Sender
from rollout_core.transfer.protocol.steps import Begin, Pack, Packed, Push, Pushed, SenderAction, SourceEnded
from rollout_core.transfer.report import Observe, SendReport

MAX_SLOTS: Final = 64
#: Called with every bucket of a plan once it is packed; returns what is sent: the bucket itself, or in a test another in its place.
Tap: TypeAlias = Callable[[Bucket], Bucket]
SHORTEST: Final = 1e-6  # seconds of a timeout: what a Hello and a Welcome can say


def send(
    plan: BucketPlan,
    source: Source,
    carrier: SenderEnd,
    *,
    version: int | None = None,
    slots: int = 2,
    timeout: float = 60.0,
    deadline: float | None = None,
    digest: DigestChoice = "auto",
    packer: Packer | None = None,
    observe: Observe | None = None,
    tap: Tap | None = None,
) -> SendReport:
    """Send one update to every receiver of a carrier, each of which calls ``receive``. Returns once all have committed it.

    ``plan`` and ``source`` are as for ``pack``. While a bucket is read by the receivers the next is packed, in ``slots`` buffers of
    the size of the largest bucket. ``version``: of the new weights, larger than what the receivers have; None counts on from the
    last that this carrier committed. ``digest``: as for ``pack``; None where receivers are told ``verify=False``. ``packer``: a
    ``Packer`` of this plan, kept from one update to the next, so that what it knows of the plan and of where tensors lie is made
    once; its digests are made as it was told, and ``digest`` is not looked at.

    ``timeout``: seconds from a receiver's last sign of life to the end of the update with an error. Three quarters of it have to be
    longer than any side takes over one step: a bucket, the source's own work included, or with ``StagedWeights`` the commit.
    ``deadline``: seconds after which an update that is not complete is given up; to end it in order takes a quarter of ``timeout``
    at most. ``observe`` is told of every step. ``tap`` is called with every bucket, packed and sealed, and returns what is sent:
    the bucket again, for who only wants to look, or another in its place, which is how a test has one damaged.

    If this raises, no receiver has committed the update, unless the message says that one has, or may have. The carrier can be used
    for the next update if nobody was lost; else it is closed, and says so.

    Raises:
        PlanMismatchError: a receiver has other tensors, or the source is not the plan's; nothing was moved in the first case. Also
            if ``plan`` is no plan, or ``packer`` is of another.
        TransferError: a receiver ended, fell silent, or was not done in time.
        IntegrityError: what arrived was not what was sent. Other errors of a receiver come as the same class, too.
        Exception: whatever the source raises, unchanged.
    """
    if not isinstance(plan, BucketPlan):
        raise PlanMismatchError(f"plan is a {type(plan).__name__}; pass what plan_buckets(specs_of(source), capacity) gives")
    options = _Options(version, slots, seconds_of("timeout", timeout), deadline_of(deadline), digest, observe)
    kept = Packer(plan, digest=digest) if packer is None else packer
    if kept.plan is not plan:
        plan.require_same(kept.plan)
    hands = _Sending(carrier, tap)

    def buckets(version: int) -> Iterator[Bucket]:
        return kept.pack(source, version=version, allocate=hands.allocate)

    slot_nbytes = max((layout.nbytes for layout in plan.buckets), default=0)
    return _send(hands, _Content(buckets, slot_nbytes, plan.to_bytes(), plan.digest), options)


def send_stream(
    source: Source,
    carrier: SenderEnd,
    *,
    capacity: int,
    oversize: str = "split",
    version: int | None = None,
    slots: int = 2,
    timeout: float = 60.0,
    deadline: float | None = None,
    digest: DigestChoice = "auto",
    observe: Observe | None = None,
) -> SendReport:
    """``send`` for a source whose tensors are not known ahead: see ``pack_stream``, and ``send`` for the rest.

    Each bucket carries its layout, so a receiver can refuse a tensor only when it comes: with ``DirectWeights`` some have been
    overwritten by then. Where the specs are known, a plan is better, and one copy a bucket cheaper. ``oversize`` is ``split`` or
    ``error``: there is no room for a bucket larger than ``capacity`` bytes.
    """
    if oversize not in ("split", "error"):
        raise CapacityError(f"oversize is {oversize!r}; a stream's buckets are split, or their tensors refused: 'split' or 'error'")
    options = _Options(version, slots, seconds_of("timeout", timeout), deadline_of(deadline), digest, observe)
    Options(capacity=capacity)  # refuses what is no capacity, before anything is laid out

    def buckets(version: int) -> Iterator[Bucket]:
        return pack_stream(source, capacity, oversize=oversize, version=version, digest=digest)  # type: ignore[arg-type]

    return _send(_Sending(carrier), _Content(buckets, capacity), options)


@dataclass(frozen=True, slots=True)
class _Content:
    """What is sent: its buckets, by version, and what the receivers are told of them before."""

    buckets: Callable[[int], Iterator[Bucket]]
    slot_nbytes: int
    manifest: bytes = b""  # empty for a stream, as in a Hello
    plan_digest: bytes = b""


@dataclass(frozen=True, slots=True)
class _Options:
    """How it is sent: see ``send``."""

    version: int | None
    slots: int
    timeout: float
    deadline: float
    digest: DigestChoice
    observe: Observe | None

    def __post_init__(self) -> None:
        check_choice(self.digest)
        if type(self.slots) is not int or not 1 <= self.slots <= MAX_SLOTS:
            raise TransferError(f"slots is {self.slots!r}; it is a whole number from 1 to {MAX_SLOTS}")

    def next_version(self, last: int) -> int:
        """The version of this update, ``last`` being the one before."""
        version = last + 1 if self.version is None else self.version
        if type(version) is not int or not last < version <= MAX_VERSION:
            raise TransferError(f"version is {version!r}; it is a whole number larger than {last}, which was sent last")
        return version


def _send(hands: _Sending, content: _Content, options: _Options) -> SendReport:
    carrier = hands.carrier
    if not carrier.receivers:
        raise TransferError("the carrier has no receivers: nobody would get the update")
    version = options.next_version(carrier.version)
    start = time.monotonic()
    memory, ticket = carrier.lay_out(options.slots, content.slot_nbytes)
    hello = Hello(
        protocol=PROTOCOL,
        version=version,
        plan_digest=content.plan_digest,
        manifest=content.manifest,
        slots=options.slots,
        slot_nbytes=content.slot_nbytes,
        rendezvous=carrier.rendezvous,
        ticket=ticket,
        timeout=options.timeout,
    )
    patience = Patience(options.timeout, start + options.deadline)
    hands.begin(memory, lambda: content.buckets(version))
    del memory  # this frame is part of the traceback of an error that may be kept
    machine = Sender.new(secrets.randbits(63), hello, patience, carrier.receivers, start)
    driver = Driver(machine, hands, options.observe)

    def remark() -> str | None:
        if not any(peer.standing == "committed" for peer in driver.machine.peers):
            return None
        carrier.version = version  # the next update needs a larger one
        return f"receivers have committed version {version} all the same"

    driver.update(carrier, Begin(), remark=remark)
    carrier.version = version
    return SendReport(
        version=version,
        receivers=carrier.receivers,
        buckets=hands.buckets,
        nbytes=hands.nbytes,
        seconds=time.monotonic() - start,
        packing=hands.packing,
    )


class _Sending:
    """What the sender's machine asks for, done."""

    def __init__(self, carrier: SenderEnd, tap: Tap | None = None) -> None:
        self.carrier = carrier
        self._tap = tap
        self.buckets, self.nbytes, self.packing = 0, 0, 0.0
        self._memory: list[torch.Tensor] = []
        self._open: Callable[[], Iterator[Bucket]] = _nothing
        self._source: Iterator[Bucket] | None = None
        self._slot: torch.Tensor | None = None
        self._later: dict[int, LaterBucket] = {}  # packed without waiting for the device, and not yet moved

    def begin(self, memory: list[torch.Tensor], source: Callable[[], Iterator[Bucket]]) -> None:
        """The source is opened with the first bucket: if that fails, the receivers hear of it."""
        self._memory, self._open = memory, source

    def end(self) -> None:
        """Let go of the source and the slots."""
        if self._source is not None and hasattr(self._source, "close"):
            self._source.close()
        self._source, self._memory, self._slot, self._later = None, [], None, {}
        self._open = _nothing  # what it was holds the caller's tensors, and this

    def allocate(self, nbytes: int) -> torch.Tensor:
        assert self._slot is not None
        return self._slot[:nbytes]

    @property
    def peers(self) -> int:
        return self.carrier.receivers

    def post(self, peer: int, message: bytes) -> None:
        self.carrier.post(peer, message)

    def poll(self, seconds: float | None) -> list[tuple[int, bytes | TransferError]]:
        return self.carrier.poll(seconds)

    def do(self, action: SenderAction) -> list[Any] | tuple[Moving, Callable[[], Any]]:
        match action:
            case Pack(_, slot):
                filled = self._pack(slot)
                return [SourceEnded()] if filled is None else [Packed(filled)]
            case Push(index, slot, nbytes):
                moving = self.carrier.push(slot, nbytes)
                return [self._pushed(index)] if moving is None else (moving, lambda: self._pushed(index))
        raise AssertionError(f"no action of a sender: {action}")

    def _pushed(self, index: int) -> Pushed:
        """What moved it has waited for the device, and so its digest is there."""
        later = self._later.pop(index, None)
        return Pushed(index, None if later is None else later.digest)

    def instead(self, action: SenderAction) -> list[Any] | None:
        return [SourceEnded()] if isinstance(action, Pack) else None

    def _pack(self, slot: int) -> Filled | None:
        start = time.monotonic()
        self._slot = self._memory[slot]
        if self._source is None:
            self._source = self._open()
        bucket = next(self._source, None)
        if bucket is None:
            return None
        if self._tap is not None:
            packed, bucket = bucket, self._tap(bucket)
            if bucket.index != packed.index:
                raise TransferError(f"bucket {bucket.index} was given in the place of bucket {packed.index}")
            if bucket.nbytes > self._slot.numel():
                raise TransferError(f"bucket {bucket.index} has {bucket.nbytes} bytes, and none of its plan is larger than a slot")
        if bucket.nbytes and bucket.buffer.data_ptr() != self._slot.data_ptr():  # a stream's, packed ahead, or a tap's own
            self._slot[: bucket.nbytes].copy_(bucket.buffer)
        self.buckets, self.nbytes = self.buckets + 1, self.nbytes + bucket.nbytes
        header = bucket.header if isinstance(bucket, StreamBucket) else b""
        if isinstance(bucket, LaterBucket) and not self.carrier.rendezvous:  # else it is announced before it is moved
            self._later[bucket.index], digest = bucket, None
        else:
            digest = bucket.digest
        self.packing += time.monotonic() - start
        return Filled(bucket.index, slot, bucket.nbytes, bucket.plan_digest, bucket.algorithm, digest, header)


def _nothing() -> Iterator[Bucket]:
    return iter(())


def deadline_of(value: object) -> float:
    return math.inf if value is None else seconds_of("deadline", value, endless=True)


def seconds_of(name: str, value: object, *, endless: bool = False) -> float:
    """A number of seconds, as a float. ``TransferError`` unless it is positive, and finite unless ``endless``."""
    try:
        seconds = math.nan if isinstance(value, bool) else float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError, OverflowError):
        seconds = math.nan
    if not seconds >= SHORTEST or isinstance(value, str):
        raise TransferError(f"{name} is {_brief(value)}; it is a number of seconds, at least {SHORTEST:g}")
    if seconds == math.inf and not endless:
        raise TransferError(f"{name} is infinite: the other side could hang this one for ever")
    return seconds


def _brief(value: object) -> str:
    try:
        words = repr(value)
    except ValueError:  # an integer of more digits than Python writes
        words = f"a huge {type(value).__name__}"
    return words if len(words) <= 40 else f"{words[:40]}..."
