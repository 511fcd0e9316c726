"""SGLang's door: the buckets of a plan as what ``update_weights_from_tensor(load_format="flattened_bucket")`` takes.

SGLang's own constructor lays tensors end to end, so that after an odd number of 2-byte elements a 4-byte tensor begins where
``reconstruct_tensors`` cannot view it. Here the packed bucket is the flattened tensor, as it is and without another copy, and the
metadata point at its slots, which are aligned. ``reconstruct_tensors`` reads from start to end: it minds neither padding between
two tensors nor two names for the same bytes (tied weights).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import torch
from sglang.srt.weight_sync.tensor_bucket import FlattenedTensorBucket, FlattenedTensorMetadata

from rollout_core.bucketing import Bucket, BucketPlan, pack
from rollout_core.bucketing.sources import Source
from rollout_core.errors import CapacityError, DuplicateNameError, IntegrityError

_ALIGN = 16  # bytes: of the widest dtype


def flattened_buckets(plan: BucketPlan, source: Source) -> Iterator[FlattenedTensorBucket]:
    """The buckets of ``plan``, filled from ``source`` (see ``pack``, whose errors these are), in SGLang's class.

    SGLang cannot join a split tensor: make the plan with ``oversize="own"`` or ``"error"``, else ``CapacityError``. A bucket's
    memory is used again once nothing refers to it, so keep each until the engine has answered for all of its ranks.
    """
    if plan.split:
        raise CapacityError(
            f"tensor {plan.split[0]!r} is split over buckets, and SGLang's buckets hold whole tensors; plan with oversize='own'"
        )
    # No digest: nothing at SGLang's end would look at it.
    return map(partial(_flattened, plan), pack(plan, source, digest=None))


def _flattened(plan: BucketPlan, bucket: Bucket) -> FlattenedTensorBucket:
    metadata = [
        FlattenedTensorMetadata(
            name=name,
            shape=torch.Size(slot.spec.shape),
            dtype=slot.spec.dtype,
            start_idx=slot.offset,
            end_idx=slot.end,
            numel=slot.nbytes,  # SGLang counts bytes here
        )
        for slot in plan.buckets[bucket.index].slots
        for name in (slot.name, *plan.tied.get(slot.name, ()))
    ]
    return FlattenedTensorBucket(flattened_tensor=bucket.buffer, metadata=metadata)


def rank_payloads(bucket: FlattenedTensorBucket, ranks: int, *, text: bool = False) -> list[bytes] | list[str]:
    """What ``update_weights_from_tensor`` takes as ``named_tensors`` (in process) or, as ``text``, ``serialized_named_tensors``
    (HTTP): the bucket serialised once for each of ``ranks`` tensor-parallel ranks, which may not share one.

    Memory of the CPU is handed over by file, whatever this process does otherwise: an engine that is no child of this process
    cannot take torch's default, a descriptor, and ends when it tries.
    """
    from sglang.srt.utils import MultiprocessingSerializer

    payload = {"flattened_tensor": bucket.get_flattened_tensor(), "metadata": bucket.get_metadata()}
    with _shared_by_file():
        return [MultiprocessingSerializer.serialize(payload, output_str=text) for _ in range(ranks)]


@contextmanager
def _shared_by_file() -> Iterator[None]:
    before = torch.multiprocessing.get_sharing_strategy()  # type: ignore[no-untyped-call]
    torch.multiprocessing.set_sharing_strategy("file_system")  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        torch.multiprocessing.set_sharing_strategy(before)  # type: ignore[no-untyped-call]


def check_flattened(bucket: FlattenedTensorBucket) -> None:
    """Raise unless ``reconstruct_tensors`` gives every tensor of this bucket, whoever made it.

    ``IntegrityError`` names the first tensor that lies at an odd place, outside of the memory, or in a room of another size than
    its own; ``DuplicateNameError`` a name that comes twice, of which SGLang would load both.
    """
    flattened = bucket.get_flattened_tensor()
    if flattened.dtype is not torch.uint8 or flattened.dim() != 1 or not flattened.is_contiguous():
        raise IntegrityError(f"the flattened tensor is {flattened.dtype} of shape {list(flattened.shape)}, not contiguous bytes")
    if flattened.storage_offset() % _ALIGN:
        raise IntegrityError(
            f"the flattened tensor begins {flattened.storage_offset()} bytes into its memory, which aligns nothing"
        )
    places: dict[str, int] = {}
    for place, meta in enumerate(bucket.get_metadata()):
        first = places.setdefault(meta.name, place)
        if first != place:
            raise DuplicateNameError(f"tensor {meta.name!r} stands at places {first} and {place} of one bucket")
        where = f"tensor {meta.name!r} lies at bytes {meta.start_idx} to {meta.end_idx}"
        if not 0 <= meta.start_idx <= meta.end_idx <= flattened.numel():
            raise IntegrityError(f"{where} of {flattened.numel()}")
        if meta.start_idx % meta.dtype.itemsize:
            raise IntegrityError(f"{where}, and {meta.dtype} begins at a multiple of {meta.dtype.itemsize}")
        nbytes = math.prod(meta.shape) * meta.dtype.itemsize
        if meta.end_idx - meta.start_idx != nbytes:
            raise IntegrityError(f"{where}, and {meta.dtype} of shape {list(meta.shape)} has {nbytes} bytes")
