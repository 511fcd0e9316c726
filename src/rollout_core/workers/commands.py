"""What the processes of an engine are asked to do with the model that they have, and what they answer: vLLM's workers by an RPC,
SGLang's ranks by its loader of weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias

import msgspec
import torch

from rollout_core.bucketing.dtypes import DTYPES, WIRE_NAMES
from rollout_core.bucketing.tensors import as_bytes
from rollout_core.errors import WorkerError
from rollout_core.transfer.causes import error_of
from rollout_core.transfer.protocol.messages import Cause
from rollout_core.workers.engine import Update
from rollout_core.workers.shards import WHOLE, Shard, joined


class Receive(msgspec.Struct, tag=True, frozen=True):
    update: Update


class Abandon(msgspec.Struct, tag=True, frozen=True):
    """What was committed as this version has failed for its sender."""

    version: int
    why: str


class Digests(msgspec.Struct, tag=True, frozen=True):
    """Of tensors, by the names and with the shapes that a checkpoint has."""

    shapes: dict[str, tuple[int, ...]]


class Layout(msgspec.Struct, tag=True, frozen=True):
    """Which part is there of tensors, by the names and with the shapes that a checkpoint has."""

    shapes: dict[str, tuple[int, ...]]


class Read(msgspec.Struct, tag=True, frozen=True):
    """A tensor, or the part of it that is there."""

    name: str
    shape: tuple[int, ...]


class Expect(msgspec.Struct, tag=True, frozen=True):
    """The next update is to this version. Who counted before may be gone, and the count with it."""

    version: int


class Settle(msgspec.Struct, tag=True, frozen=True):
    """An update that came from ``address`` is over; another's may be under way. ``mend``: see to what is known to be wrong after
    it."""

    mend: bool
    address: str = ""


Command: TypeAlias = Receive | Abandon | Digests | Layout | Read | Expect | Settle


class Answer(msgspec.Struct, frozen=True, kw_only=True):
    """``unusable``: why the weights are of no use after it, if they are not; ``version``: of the last update that was committed
    there; ``device``: where they are, if it says so; ``quantization`` of them by the engine; ``sleeps``: whether it lets go of
    their memory when it is told to. The rest is what was asked for; no ``dtype``: that tensor is not there."""

    version: int = -1
    device: str = ""
    quantization: str = ""
    sleeps: bool = True
    unusable: str | None = None
    failed: Cause | None = None
    loading: float = 0.0
    digests: dict[str, str] = {}
    shards: dict[str, Shard] = {}
    shard: Shard = WHOLE
    dtype: str = ""
    shape: tuple[int, ...] = ()
    data: bytes = b""

    @property
    def tensor(self) -> torch.Tensor:
        """What was read, in memory of its own."""
        dtype = DTYPES[self.dtype]
        if not self.data:
            return torch.empty(self.shape, dtype=dtype)
        return torch.frombuffer(bytearray(self.data), dtype=torch.uint8).view(dtype).view(self.shape)


def answer_with(tensor: torch.Tensor, shard: Shard = WHOLE) -> Answer:
    """The answer to ``Read``."""
    data = as_bytes(tensor).cpu().numpy().tobytes()
    return Answer(dtype=WIRE_NAMES[tensor.dtype], shape=tuple(tensor.shape), data=data, shard=shard)


def tensor_of(name: str, shape: tuple[int, ...], answers: Sequence[Answer]) -> torch.Tensor:
    """The tensor that was ``Read``, joined if it is in parts. ``WorkerError`` if no rank has it, or they have different values."""
    parts = {rank: (answer.shard, answer.tensor) for rank, answer in enumerate(answers) if answer.dtype}
    if len(answers) == 1 and parts:
        return parts[0][1]
    return joined(name, shape, parts)


def unusable_of(answers: Sequence[Answer]) -> str | None:
    """Why the weights of any are of no use."""
    return next((answer.unusable for answer in answers if answer.unusable is not None), None)


def asked(found: Sequence[Any]) -> list[Answer]:
    """The answers of vLLM's workers, as an RPC brings them. Raises what one of them raised."""
    answers = [msgspec.convert(answer, type=Answer) for answer in found]
    raise_failed(answers, "vLLM's worker")
    return answers


def left_by(answers: Sequence[Answer], version: int, before: str | None) -> str | None:
    """Why the weights are of no use after an update to ``version`` that failed, given why they were not ``before``."""
    committed = any(answer.version == version for answer in answers)
    return unusable_of(answers) or (not_completed(version) if committed else before)


def not_completed(version: int) -> str:
    return f"the update to version {version} was not completed"


def raise_failed(answers: Sequence[Answer], engine: str) -> None:
    """Raise what one of them raised, and say which if there are several."""
    for rank, answer in enumerate(answers):
        if answer.failed is not None:
            where = f" (on rank {rank} of {len(answers)})" if len(answers) > 1 else ""
            cause = msgspec.structs.replace(answer.failed, message=answer.failed.message + where)
            raise error_of(cause, lambda text: WorkerError(f"{engine} failed with {text}"))


def check_versions(answers: Sequence[Answer], version: int) -> None:
    """Raise ``WorkerError`` unless each rank has committed this version."""
    for rank, answer in enumerate(answers):
        if answer.version != version:
            raise WorkerError(f"after the update to version {version} rank {rank} of {len(answers)} has version {answer.version}")
