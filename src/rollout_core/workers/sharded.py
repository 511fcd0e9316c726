"""sync_sharded: the weights of a trainer that shards, such as one with FSDP2, into a worker that one of its ranks has."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress

import msgspec
import torch
import torch.distributed as dist

from rollout_core.bucketing import BucketPlan, plan_buckets, specs_of
from rollout_core.bucketing.placement import Order, Oversize
from rollout_core.errors import PlanMismatchError, TransferError, WorkerError
from rollout_core.transfer.lockstep import Lockstep, bounded, patient
from rollout_core.transfer.sharded import Parts, Sharded
from rollout_core.workers.worker import SyncReport, Worker


class _Part(msgspec.Struct, frozen=True, array_like=True):
    """What a rank says of itself first."""

    sends: bool
    takes_computed: bool


def sync_sharded(
    worker: Worker | None,
    source: Sharded,
    *,
    capacity: int = 64 << 20,
    oversize: Oversize = "split",
    order: Order = "given",
    readback: bool = True,
    dtype: torch.dtype | None = None,
    rename: Callable[[str], str] | None = None,
    group: dist.ProcessGroup | None = None,
    timeout: float = 600.0,
) -> SyncReport:
    """``worker.sync_weights`` from a model whose parameters are sharded over the ranks of ``group`` (None: the default group).

    Every rank of the group calls it, one of them with a worker and the others with None, and every rank gets the report.
    ``source`` is each rank's own module with DTensor parameters, or a mapping of DTensors by name; what is not sharded is taken
    from the rank with the worker. Each parameter is gathered when its turn comes in a bucket, on all ranks, and let go of before
    the next: beside two buckets at the sender, no rank holds more than one whole parameter. Before each, the ranks agree twice by
    an all-reduce of eight bytes: that it is its turn, and that all have the memory for it.

    ``dtype``: what floating-point parameters are cast to, each part before it is gathered; buffers keep theirs. ``rename``: gives
    each tensor the worker's name for it, from its own without what wrappers put in (``rollout_core.transfer.sharded.plain_name``).
    ``timeout``: seconds that a rank waits for the others at one step; longer than what the worker takes over a bucket, and over
    reading its weights back. Other arguments: see ``sync_weights``. FSDP2's modules are resharded first, which lets go of whole
    parameters that they kept from a forward pass.

    Whatever is raised on one rank ends the call on all of them: as the same class, with the rank in a note. A rank that ends, or
    does not come, ends it on the others with ``TransferError``, at once over gloo and otherwise within ``timeout``; the group is of
    no use after that. The worker's weights are then as after a failed ``sync_weights``, unless a note says that the update is
    committed: a rank was lost after it.

    Raises:
        WorkerError: not exactly one rank has a worker; or as ``sync_weights``.
        PlanMismatchError: ranks have other tensors than each other, or than the worker.
    """
    steps = Lockstep(group, timeout)
    with patient(steps.group, timeout):
        return _sync(worker, source, steps, capacity, oversize, order, readback, dtype, rename)


def _sync(
    worker: Worker | None,
    source: Sharded,
    steps: Lockstep,
    capacity: int,
    oversize: Oversize,
    order: Order,
    readback: bool,
    dtype: torch.dtype | None,
    rename: Callable[[str], str] | None,
) -> SyncReport:
    hello = _Part(worker is not None, worker is not None and worker.takes_computed)
    said = [msgspec.msgpack.decode(one, type=_Part) for one in steps.exchange(msgspec.msgpack.encode(hello))]
    senders = [rank for rank, one in enumerate(said) if one.sends]
    if len(senders) != 1:
        raise WorkerError(f"ranks {senders} have a worker: pass it on one rank, and None on the others")
    (sender,) = senders
    parts: Parts | None = None

    def plan() -> bytes:
        nonlocal parts
        parts = Parts(steps, source, dtype=dtype, computed=said[sender].takes_computed, rename=rename)
        return plan_buckets(specs_of(parts.tensors), capacity, oversize=oversize, order=order).to_bytes()

    plans = steps.together(plan)
    assert parts is not None
    for rank, one in enumerate(plans):
        if one != plans[sender]:
            try:
                BucketPlan.from_bytes(one).require_same(BucketPlan.from_bytes(plans[sender]))
            except PlanMismatchError as error:
                raise PlanMismatchError(f"rank {rank} has another plan than rank {sender}, which sends: {error}") from error

    report: SyncReport | None = None

    def update() -> bytes:
        nonlocal report
        if worker is None:
            parts.follow()
            return b""
        try:
            report = worker.sync_weights(parts.tensors, capacity=capacity, oversize=oversize, order=order, readback=readback)
        except BaseException:
            with suppress(TransferError):  # the error that led here says more
                parts.end()
            raise
        parts.end()
        return msgspec.msgpack.encode(report)

    try:
        with bounded(parts.groups - {steps.group}, steps.timeout):
            return msgspec.msgpack.decode(steps.together(update)[sender], type=SyncReport)
    except BaseException as error:
        if report is not None:
            error.add_note(f"the worker has committed version {report.version} all the same")
        raise
