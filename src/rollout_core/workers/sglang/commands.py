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
from rollout_core.workers.commands import Answer, Command

#: The loader, as ``load_format`` and ``--custom-weight-loader`` name it.
LOADER: Final = "rollout_core.workers.sglang.loader.load"


class Where(msgspec.Struct, tag=True, frozen=True):
    """Of the weights: which GPU they are on, if they are on one."""


Asked: TypeAlias = Command | Where


class Order(msgspec.Struct, frozen=True):
    what: Asked
    folder: str  # where the answer goes


Named: TypeAlias = list[tuple[str, torch.Tensor]]


def packed(order: Order) -> Named:
    return [(msgspec.json.encode(order).decode(), torch.empty(0))]


def unpacked(named: Named) -> Order:
    """``WorkerError`` for what is no command: the loader is for no weights."""
    try:
        ((name, _),) = named
        return msgspec.json.decode(name, type=Order)
    except (ValueError, msgspec.DecodeError) as error:
        raise WorkerError(f"{LOADER} takes one command, and no weights") from error


def write_answer(folder: str, rank: int, answer: Answer) -> None:
    place = Path(folder) / f"{rank}.part"
    place.write_bytes(msgspec.msgpack.encode(answer))
    place.rename(Path(folder) / f"{rank}.answer")


def read_answers(folder: Path, ranks: int, *, said: str) -> list[Answer]:
    """One of each rank. ``WorkerError`` if one is missing, with what SGLang ``said``."""
    files = sorted(folder.glob("*.answer"), key=lambda file: int(file.stem))
    if files and len(files) < ranks:
        raise WorkerError(f"{len(files)} of SGLang's {ranks} ranks answered ({said}): see its log for what became of the others")
    if not files:
        raise WorkerError(
            f"SGLang did not come to {LOADER} ({said}); start it with --custom-weight-loader {LOADER}, on this machine, "
            "and with rollout_core installed"
        )
    return [msgspec.msgpack.decode(file.read_bytes(), type=Answer) for file in files]
