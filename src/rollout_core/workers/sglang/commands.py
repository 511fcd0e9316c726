"""What the loader in SGLang's scheduler is told, and what it answers.

SGLang hands what ``update_weights_from_tensor`` is given to a loader of one's own, beside the live model, in each rank. A command
goes there as the name of an empty tensor: no memory has to be shared for it, which SGLang cannot do between processes that are no
relatives. The answer is a file, in a folder that the command names.
"""

from __future__ import annotations

from pathlib import Path
from typing import Final, TypeAlias

import msgspec
import torch

from rollout_core.errors import WorkerError
from rollout_core.transfer.causes import error_of
from rollout_core.transfer.protocol.messages import Cause
from rollout_core.workers.engine import Update

#: The loader, as ``load_format`` and ``--custom-weight-loader`` name it.
LOADER: Final = "rollout_core.workers.sglang.loader.load"


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


class Command(msgspec.Struct, frozen=True):
    what: Receive | Abandon | Digests | Read
    folder: str  # where the answer goes


class Answer(msgspec.Struct, frozen=True, kw_only=True):
    """``unusable``: why the weights are of no use after it, if they are not. The rest is what was asked for."""

    unusable: str | None = None
    failed: Cause | None = None
    loading: float = 0.0
    digests: dict[str, str] = {}
    dtype: str = ""
    shape: tuple[int, ...] = ()
    data: bytes = b""


Named: TypeAlias = list[tuple[str, torch.Tensor]]


def packed(command: Command) -> Named:
    return [(msgspec.json.encode(command).decode(), torch.empty(0))]


def unpacked(named: Named) -> Command:
    """``WorkerError`` for what is no command: the loader is for no weights."""
    try:
        ((name, _),) = named
        return msgspec.json.decode(name, type=Command)
    except (ValueError, msgspec.DecodeError) as error:
        raise WorkerError(f"{LOADER} takes one command, and no weights") from error


def write_answer(folder: str, rank: int, answer: Answer) -> None:
    place = Path(folder) / f"{rank}.part"
    place.write_bytes(msgspec.msgpack.encode(answer))
    place.rename(Path(folder) / f"{rank}.answer")


def read_answers(folder: Path, *, said: str) -> list[Answer]:
    """One of each rank. Raises what a rank raised; ``WorkerError`` if there is none, with what SGLang ``said``."""
    files = sorted(folder.glob("*.answer"))
    if not files:
        raise WorkerError(
            f"SGLang did not come to {LOADER} ({said}); start it with --custom-weight-loader {LOADER}, on this machine, "
            "and with rollout_core installed"
        )
    return [msgspec.msgpack.decode(file.read_bytes(), type=Answer) for file in files]


def raise_failed(answers: list[Answer]) -> None:
    for answer in answers:
        if answer.failed is not None:
            raise error_of(answer.failed, lambda text: WorkerError(f"SGLang's loader failed with {text}"))
