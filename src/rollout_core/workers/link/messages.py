"""What the process of an engine is told, and what it answers. Weights go through shared memory, not through these.

Requests are numbered, and answered under the same number: an answer whose caller was interrupted while it waited is not taken for
the answer to the next request. Progress comes unasked, and always before the answer to what was asked after it.
"""

from __future__ import annotations

from typing import TypeAlias

import msgspec

from rollout_core.transfer.protocol.messages import Cause
from rollout_core.workers.engine import Group, Progress, Update
from rollout_core.workers.shards import Shard


class Submit(msgspec.Struct, tag=True, frozen=True):
    group: Group


class Abort(msgspec.Struct, tag=True, frozen=True):
    """Keys of requests; None for all."""

    keys: list[int] | None


class Run(msgspec.Struct, tag=True, frozen=True):
    """Go on for this many steps, and answer when they are done or there is nothing to do; None: without an end, answered at once;
    0: pause."""

    steps: int | None


class Receive(msgspec.Struct, tag=True, frozen=True):
    update: Update


class Abandon(msgspec.Struct, tag=True, frozen=True):
    """The update to this version will not be completed, or nobody heard that it was."""

    version: int


class ReadSpecs(msgspec.Struct, tag=True, frozen=True):
    """What does an update have to bring?"""


class ReadDigests(msgspec.Struct, tag=True, frozen=True):
    names: list[str] | None


class ReadShards(msgspec.Struct, tag=True, frozen=True):
    """Which part of each tensor does each rank have?"""


class ReadRankDigests(msgspec.Struct, tag=True, frozen=True):
    """Of the parts that each rank has."""


class ReadTensor(msgspec.Struct, tag=True, frozen=True):
    name: str


class ReadMediaHits(msgspec.Struct, tag=True, frozen=True):
    pass


class Call(msgspec.Struct, tag=True, frozen=True):
    """Something that this engine alone can do: its method ``call_<name>``, which takes bytes and gives some."""

    name: str
    argument: bytes


class ReleaseMemory(msgspec.Struct, tag=True, frozen=True):
    """Answered with what it freed."""


class ResumeMemory(msgspec.Struct, tag=True, frozen=True):
    pass


class Ping(msgspec.Struct, tag=True, frozen=True):
    """Is anybody there?"""


class Close(msgspec.Struct, tag=True, frozen=True):
    pass


Asking: TypeAlias = (
    Submit
    | Abort
    | Run
    | Receive
    | Abandon
    | ReadSpecs
    | ReadDigests
    | ReadShards
    | ReadRankDigests
    | ReadTensor
    | ReadMediaHits
    | Call
    | ReleaseMemory
    | ResumeMemory
    | Ping
    | Close
)


class Asked(msgspec.Struct, frozen=True):
    number: int
    request: Asking


class Done(msgspec.Struct, tag=True, frozen=True):
    """The request was carried out."""


class Received(msgspec.Struct, tag=True, frozen=True):
    """The update is committed; seconds of it went into loading."""

    loading: float


class Returned(msgspec.Struct, tag=True, frozen=True):
    """What ``Call`` gave."""

    value: bytes


class Freed(msgspec.Struct, tag=True, frozen=True):
    nbytes: int


class MediaHits(msgspec.Struct, tag=True, frozen=True):
    """Media that the engine found in its cache of what it has processed, of those that it looked for; None: it does not say."""

    hits: int | None = None
    queries: int | None = None


class Specs(msgspec.Struct, tag=True, frozen=True):
    """Name, dtype by its name on the wire, and shape of each tensor; None: the engine looks at an update itself."""

    specs: list[tuple[str, str, tuple[int, ...]]] | None


class Digests(msgspec.Struct, tag=True, frozen=True):
    """``weight_digest`` of each tensor, by name."""

    digests: dict[str, str]


class Shards(msgspec.Struct, tag=True, frozen=True):
    """By rank; empty if there is one."""

    ranks: list[dict[str, Shard]]


class RankDigests(msgspec.Struct, tag=True, frozen=True):
    """``weight_digest`` of the parts of tensors that each rank has, by rank and name."""

    ranks: list[dict[str, str]]


class TensorBytes(msgspec.Struct, tag=True, frozen=True):
    dtype: str
    shape: tuple[int, ...]
    data: bytes


class Failed(msgspec.Struct, tag=True, frozen=True):
    """The request was refused or went wrong."""

    cause: Cause


class Events(msgspec.Struct, tag=True, frozen=True):
    """Answers nothing (its number is that of no request): what became of requests since the last."""

    progress: list[Progress]


Answer: TypeAlias = (
    Done | Received | Returned | Freed | MediaHits | Specs | Digests | Shards | RankDigests | TensorBytes | Failed | Events
)


class Answered(msgspec.Struct, frozen=True):
    """The start of the engine is answered too, as number 0."""

    number: int
    answer: Answer
