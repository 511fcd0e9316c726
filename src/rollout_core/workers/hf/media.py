"""What a transformers model is given of a conversation's pictures: tensors and positions, as its trainer gives them to it."""

from __future__ import annotations

import torch

from rollout_core.workers.media import decode_tensors


def inputs_of(data: bytes, length: int, device: torch.device) -> dict[str, torch.Tensor]:
    """What ``model.generate`` takes beside the ids of one prompt, of which there are ``length``: the conversation's, and after them
    what was sampled. Positions of several axes are the conversation's own, below a row of those in the sequence."""
    found = decode_tensors(data)
    positions = found.pop("position_ids")
    more = length - positions.shape[1]
    if len(positions) > 1:
        # A prompt ends in text, after which all axes count on alike.
        after = positions[:, -1:] + torch.arange(1, more + 1)
        found["position_ids"] = torch.cat([torch.arange(length)[None], torch.cat([positions, after], 1)])[:, None]
    for name, tensor in found.items():
        if name.endswith("token_type_ids"):
            found[name] = torch.nn.functional.pad(tensor, (0, more))
    return {name: tensor.to(device) for name, tensor in found.items()}
