"""Bucket: one buffer under way, with what a receiver needs to check it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from rollout_core.bucketing.digest import (
    BLOCK_ALGORITHM,
    DigestChoice,
    LaterLanes,
    chosen_algorithm,
    lanes_digest,
    payload_digest,
)
from rollout_core.errors import IntegrityError

MAX_VERSION = 2**63 - 1


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class Bucket:
    """One bucket under way. ``buffer`` is 1-d uint8, contiguous, exactly as long as its layout says.

    ``plan_digest`` (16 bytes) says which plan the layout is from, ``version`` which round of weights the bytes are. ``digest``
    (16 bytes) binds the bytes to both and to ``index``; None if the sender was asked for none. Send the five small fields beside
    the buffer in whatever envelope the transport has.
    """

    index: int
    buffer: torch.Tensor
    plan_digest: bytes
    version: int
    algorithm: str
    digest: bytes | None

    @property
    def nbytes(self) -> int:
        return self.buffer.numel()


class LaterBucket(Bucket):
    """A bucket that its device may still be filling. ``digest`` waits for that; work on the current stream comes after it."""

    __slots__ = ("_later",)
    _later: bytes | Callable[[], bytes] | None

    def __init__(
        self,
        *,
        index: int,
        buffer: torch.Tensor,
        plan_digest: bytes,
        version: int,
        algorithm: str,
        digest: bytes | Callable[[], bytes] | None,
    ) -> None:
        fields = {"index": index, "buffer": buffer, "plan_digest": plan_digest, "version": version, "algorithm": algorithm}
        for name, value in {**fields, "_later": digest}.items():
            object.__setattr__(self, name, value)

    @property
    def digest(self) -> bytes | None:
        later = self._later
        if callable(later):
            later = later()
            object.__setattr__(self, "_later", later)
        return later


def seal(
    buffer: torch.Tensor, choice: DigestChoice, *, index: int, plan_digest: bytes, version: int, lanes: LaterLanes | None = None
) -> Bucket:
    """A bucket of these bytes, its digest bound to plan, index and version; without a digest if the choice is None. ``lanes``:
    those of ``block_multilinear`` for the buffer, if the pass that fills it computes them; they are waited for when the digest is
    asked for."""
    algorithm = chosen_algorithm(choice, buffer.device)
    context = _context(plan_digest, index, version)
    fields: dict[str, Any] = {"index": index, "buffer": buffer, "plan_digest": plan_digest, "version": version}
    if lanes is not None and algorithm == BLOCK_ALGORITHM:
        return LaterBucket(**fields, algorithm=algorithm, digest=partial(_digest_of, lanes, buffer.numel(), context))
    digest = None if algorithm is None else payload_digest(buffer, context, algorithm)
    return Bucket(**fields, algorithm=algorithm or "none", digest=digest)


def _digest_of(lanes: LaterLanes, nbytes: int, context: bytes) -> bytes:
    return lanes_digest(lanes.wait(), nbytes, context)


def verify(bucket: Bucket) -> None:
    """Raise ``IntegrityError`` unless the bucket's bytes are the ones that were sealed."""
    if bucket.digest is None:
        raise IntegrityError(f"bucket {bucket.index} carries no digest; let the sender make one, or receive with verify=False")
    try:
        actual = payload_digest(bucket.buffer, _context(bucket.plan_digest, bucket.index, bucket.version), bucket.algorithm)
    except ValueError as error:
        raise IntegrityError(f"bucket {bucket.index}: {error}") from error
    if actual != bucket.digest:
        raise IntegrityError(
            f"bucket {bucket.index} of version {bucket.version} is damaged: its bytes have {bucket.algorithm} {actual.hex()}, "
            f"and {bytes(bucket.digest).hex()} was sent"
        )


def check_version(version: object) -> int:
    if type(version) is not int or not 0 <= version <= MAX_VERSION:
        raise ValueError(f"version is {version!r}; it is a whole number from 0 to 2**63 - 1")
    return version


def check_sealed(bucket: Bucket) -> None:
    """Raise ``IntegrityError`` unless index and version are numbers that a bucket can have."""
    for name, value in (("index", bucket.index), ("version", bucket.version)):
        if type(value) is not int or not 0 <= value <= MAX_VERSION:
            raise IntegrityError(f"a bucket has {name} {value!r}, which is no whole number from 0 to 2**63 - 1")


def _context(plan_digest: bytes, index: int, version: int) -> bytes:
    return plan_digest + index.to_bytes(8, "little") + version.to_bytes(8, "little")
