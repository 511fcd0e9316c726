"""What a model's folder says of itself, for engines that are not asked."""

from __future__ import annotations

import json
import math
from collections import Counter
from pathlib import Path
from typing import Any, Protocol

import torch

from rollout_core.bucketing import TensorSpec, specs_of
from rollout_core.errors import RolloutCoreError, WorkerError
from rollout_core.workers.names import EMBEDDING, HEAD, canonical


def config_of(folder: Path) -> dict[str, Any]:
    """config.json, its text part in place of what it is for. ``WorkerError`` if there is none that can be read."""
    if not (folder / "config.json").is_file():
        raise WorkerError(f"{folder} has no config.json; pass the folder that save_pretrained wrote")
    whole = _read(folder / "config.json")
    text = whole.get("text_config")
    return {**whole, **text} if isinstance(text, dict) else whole


def eos_token_ids(folder: Path) -> list[int]:
    """From generation_config.json, or config.json if that has none; as transformers takes them."""
    generation = folder / "generation_config.json"
    for config in ([_read(generation)] if generation.is_file() else []) + [config_of(folder)]:
        eos = config.get("eos_token_id")
        if eos is not None:
            return [eos] if isinstance(eos, int) else list(eos)
    return []


class Checkpoint:
    """What an update has to bring: the tensors of a folder, and the head that a tied model does not store. ``WorkerError`` if they
    cannot be read."""

    def __init__(self, folder: Path) -> None:
        try:
            specs = {spec.name: spec for spec in specs_of(folder)}
        except RolloutCoreError as error:
            raise WorkerError(f"the weights in {folder} cannot be read: {error}") from error
        self.shapes = {name: spec.shape for name, spec in specs.items()}
        embedding = next((name for name in self.shapes if canonical(name) == EMBEDDING), None)
        if config_of(folder).get("tie_word_embeddings", False) and embedding is not None:
            self.shapes.setdefault(HEAD, self.shapes[embedding])
        dtypes = Counter[torch.dtype]()
        for spec in specs.values():
            dtypes[spec.dtype] += spec.nbytes
        common = dtypes.most_common(1)[0][0] if dtypes else None
        #: Of another dtype than most, such as a router's biases in float32.
        self._odd = {name: spec.dtype for name, spec in specs.items() if spec.dtype != common}
        self._specs: list[TensorSpec] | None = None

    def specs_in(self, engine: Reads) -> list[TensorSpec]:
        """In the dtype that an engine has them in, which one of them says for all that a checkpoint has in one dtype."""
        if self._specs is None:
            smallest = min(self.shapes.keys() - self._odd.keys(), key=lambda name: (math.prod(self.shapes[name]), name))
            common = engine.read_tensor(smallest).dtype
            odd = {name: _dtype_in(engine, name, dtype) for name, dtype in self._odd.items()}
            self._specs = [TensorSpec(name, odd.get(name, common), shape) for name, shape in self.shapes.items()]
        return self._specs


def _dtype_in(engine: Reads, name: str, stored: torch.dtype) -> torch.dtype:
    try:
        return engine.read_tensor(name).dtype
    except WorkerError:  # it has nothing of that name, or nothing that is read
        return stored


class Reads(Protocol):
    """Of an engine, what is asked here."""

    def read_tensor(self, name: str) -> torch.Tensor: ...


def _read(file: Path) -> dict[str, Any]:
    try:
        found = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise WorkerError(f"{file} cannot be read: {error}") from error
    if not isinstance(found, dict):
        raise WorkerError(f"{file} holds a {type(found).__name__}, no settings")
    return found
