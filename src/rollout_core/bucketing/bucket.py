"""Bucket: one buffer under way, with what a receiver needs to check it."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from rollout_core.bucketing.digest import BLOCK_ALGORITHM, DigestChoice, Lanes, chosen_algorithm, lanes_digest, payload_digest
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


def seal(
    buffer: torch.Tensor, choice: DigestChoice, *, index: int, plan_digest: bytes, version: int, lanes: Lanes | None = None
) -> Bucket:
    """A bucket of these bytes, its digest bound to plan, index and version; without a digest if the choice is None. ``lanes``:
    those of ``block_multilinear`` for the buffer, if the pass that filled it computed them."""
    algorithm = chosen_algorithm(choice, buffer.device)
    context = _context(plan_digest, index, version)
    digest = None
    if lanes is not None and algorithm == BLOCK_ALGORITHM:
        digest = lanes_digest(lanes, buffer.numel(), context)
    elif algorithm is not None:
        digest = payload_digest(buffer, context, algorithm)
    return Bucket(
        index=index,
        buffer=buffer,
        plan_digest=plan_digest,
        version=version,
        algorithm=algorithm or "none",
        digest=digest,
    )


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
