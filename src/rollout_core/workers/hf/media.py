"""What a transformers model is given of a conversation's pictures: tensors and positions, as its trainer gives them to it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import torch

from rollout_core.errors import WorkerError
from rollout_core.workers.media import decode_tensors

_KINDS: Final = {"image_token_id": 1, "video_token_id": 2}  # as mm_token_type_ids counts them


def inputs_of(data: bytes, ids: Sequence[int], place: int, model: Any) -> dict[str, torch.Tensor]:
    """What ``model.generate`` takes beside the ids of one prompt: what its conversation has, and after that what was sampled.
    Positions of several axes are the conversation's own, below a row of those in the sequence.

    ``WorkerError`` for a placeholder that was sampled: the model, which looks for ids, would take it for a part of a picture."""
    found = decode_tensors(data)
    positions = found.pop("position_ids")
    more = len(ids) - positions.shape[1]
    if len(positions) > 1:
        # A prompt ends in text, after which all axes count on alike.
        after = positions[:, -1:] + torch.arange(1, more + 1)
        found["position_ids"] = torch.cat([torch.arange(len(ids))[None], torch.cat([positions, after], 1)])[:, None]
    for name, tensor in found.items():
        if name.endswith("token_type_ids"):
            found[name] = torch.nn.functional.pad(tensor, (0, more))
    types = found.get("mm_token_type_ids")
    for name, kind in _KINDS.items() if types is not None else ():
        shown = types[0] == kind  # type: ignore[index]
        stray = (torch.tensor(ids) == getattr(model.config, name, -1)) & ~shown & shown.any()
        if stray.any():
            position = int(stray.int().argmax())
            raise WorkerError(
                f"prompt {place} has {ids[position]}, the model's {name}, at position {position}, where its conversation shows "
                "nothing: it was sampled, and the model would take it for a part of a picture"
            )
    return {name: tensor.to(model.device) for name, tensor in found.items()}
