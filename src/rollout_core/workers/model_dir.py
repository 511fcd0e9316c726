"""What a model's folder says of itself, for engines that are not asked."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rollout_core.errors import WorkerError


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


def _read(file: Path) -> dict[str, Any]:
    try:
        found = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise WorkerError(f"{file} cannot be read: {error}") from error
    if not isinstance(found, dict):
        raise WorkerError(f"{file} holds a {type(found).__name__}, no settings")
    return found
