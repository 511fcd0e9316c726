"""What a trainer batches."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from rollout_core.errors import ConversationError
from rollout_core.multimodal.deltas import Tokens
from rollout_core.multimodal.tracks import Ids


@dataclass(frozen=True, slots=True, eq=False)
class Arrays:
    """Per-token arrays of one length n, as numpy arrays or torch tensors.

    Attributes:
        input_ids: (n,) int64, expanded.
        attention_mask: (n,) int64, all 1: nothing here is padding.
        loss_mask: (n,) int64, 1 where the policy sampled the token.
        logprobs: (n,) float32; not a number where there is none, never 0.0.
        position_ids: (axes, n) int64.
        origin: (n,) uint8, a code of `ORIGINS`.
        message_ids: (n,) int64.
    """

    input_ids: Any
    attention_mask: Any
    loss_mask: Any
    logprobs: Any
    position_ids: Any
    origin: Any
    message_ids: Any

    @classmethod
    def of(cls, tokens: Tokens, positions: Ids, backend: Literal["numpy", "torch"]) -> Arrays:
        """Copies, free to be changed."""
        if backend not in ("numpy", "torch"):
            raise ConversationError(f"backend is {backend!r}; it is 'numpy' or 'torch'")
        values = (
            tokens.input_ids.copy(),
            np.ones(len(tokens), np.int64),
            tokens.loss_mask,
            tokens.logprobs.astype(np.float32),
            positions.copy(),
            tokens.origin.copy(),
            tokens.message.copy(),
        )
        if backend == "torch":
            import torch

            return cls(*(torch.from_numpy(value) for value in values))
        return cls(*values)
