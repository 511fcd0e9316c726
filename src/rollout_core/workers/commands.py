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


class Receive(msgspec.Struct, tag=True, frozen=True):
    update: Update


class Abandon(msgspec.Struct, tag=True, frozen=True):
    """What was committed as this version has failed for its sender."""

    version: int
    why: str


class Digests(msgspec.Struct, tag=True, frozen=True):
    """Of tensors, by the names and with the shapes that a checkpoint has."""

    shapes: dict[str, tuple[int, ...]]


class Read(msgspec.Struct, tag=True, frozen=True):
    name: str
    shape: tuple[int, ...]


class Expect(msgspec.Struct, tag=True, frozen=True):
    """The next update is to this version. Who counted before may be gone, and the count with it."""

    version: int


class Settle(msgspec.Struct, tag=True, frozen=True):
    """An update is over. ``mend``: see to what is known to be wrong after it."""

    mend: bool


Command: TypeAlias = Receive | Abandon | Digests | Read | Expect | Settle


class Answer(msgspec.Struct, frozen=True, kw_only=True):
    """``unusable``: why the weights are of no use after it, if they are not; ``version``: of the last update that was committed
    there; ``device``: where they are, if it says so. The rest is what was asked for."""

    version: int = -1
    device: str = ""
    unusable: str | None = None
    failed: Cause | None = None
    loading: float = 0.0
    digests: dict[str, str] = {}
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


def answer_with(tensor: torch.Tensor) -> Answer:
    """The answer to ``Read``."""
    return Answer(dtype=WIRE_NAMES[tensor.dtype], shape=tuple(tensor.shape), data=as_bytes(tensor).cpu().numpy().tobytes())


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
    """Raise what one of them raised."""
    for answer in answers:
        if answer.failed is not None:
            raise error_of(answer.failed, lambda text: WorkerError(f"{engine} failed with {text}"))
