"""What a worker in a process of its own is told, and what it answers. Tensor bytes go through shared memory, not through these.

Requests are numbered, and answered in their order under the same number: an answer whose caller was interrupted while it waited
is not taken for the answer to the next request.
"""

from __future__ import annotations

from typing import TypeAlias

import msgspec

from rollout_core.bucketing import Bucket
from rollout_core.transfer.protocol.messages import Cause
from rollout_core.workers.contract import Completion, SamplingParams


class Begin(msgspec.Struct, tag=True, frozen=True):
    """An update begins: its manifest, its version, and the size of the shared memory that it comes in."""

    manifest: bytes
    version: int
    arena_nbytes: int


class Load(msgspec.Struct, tag=True, frozen=True):
    """A bucket lies at ``offset`` in the shared memory."""

    offset: int
    nbytes: int
    index: int
    plan_digest: bytes
    version: int
    algorithm: str
    digest: bytes | None

    @classmethod
    def of(cls, bucket: Bucket, offset: int) -> Load:
        return cls(offset, bucket.nbytes, bucket.index, bucket.plan_digest, bucket.version, bucket.algorithm, bucket.digest)


class Commit(msgspec.Struct, tag=True, frozen=True):
    """All buckets were sent."""


class Abandon(msgspec.Struct, tag=True, frozen=True):
    """The update to this version will not be completed, or nobody heard that it was."""

    version: int


class Generate(msgspec.Struct, tag=True, frozen=True):
    prompts: list[list[int]]
    params: SamplingParams
    max_batch: int


class ReadDigests(msgspec.Struct, tag=True, frozen=True):
    pass


class ReadTensor(msgspec.Struct, tag=True, frozen=True):
    name: str


class Close(msgspec.Struct, tag=True, frozen=True):
    pass


Request: TypeAlias = Begin | Load | Commit | Abandon | Generate | ReadDigests | ReadTensor | Close


class Asked(msgspec.Struct, frozen=True):
    number: int
    request: Request


class Done(msgspec.Struct, tag=True, frozen=True):
    """The request was carried out; the memory of a bucket is free again."""


class Completions(msgspec.Struct, tag=True, frozen=True):
    completions: list[Completion]


class Digests(msgspec.Struct, tag=True, frozen=True):
    """Hexadecimal xxh3-128 of each tensor's bytes, by name."""

    digests: dict[str, str]


class TensorBytes(msgspec.Struct, tag=True, frozen=True):
    dtype: str
    shape: tuple[int, ...]
    data: bytes


class Failed(msgspec.Struct, tag=True, frozen=True):
    """The request was refused or went wrong."""

    cause: Cause


Answer: TypeAlias = Done | Completions | Digests | TensorBytes | Failed


class Answered(msgspec.Struct, frozen=True):
    """The start of the worker is answered too, as number 0."""

    number: int
    answer: Answer
