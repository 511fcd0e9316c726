"""What a trainer batches, and what is new of it since an earlier state."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from rollout_core.errors import ConversationError
from rollout_core.multimodal.deltas import Delta, Floats, Item, Tokens
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


@dataclass(frozen=True, slots=True, eq=False)
class ConversationDelta:
    """What came after an earlier state of a conversation.

    Attributes:
        input_ids, compact_ids: the new tokens on both tracks, int64.
        position_ids: (axes, n) int64, of the new tokens.
        loss_mask: (n,) int64, 1 where sampled.
        logprobs: per new token, its logprob or None.
        items: the new items only, at their places in the whole conversation.
        start, compact_start: how many tokens came before, on each track.
    """

    input_ids: Ids
    compact_ids: Ids
    position_ids: Ids
    loss_mask: Ids
    logprobs: tuple[float | None, ...]
    items: tuple[Item, ...]
    start: int
    compact_start: int

    @classmethod
    def of(cls, steps: Sequence[Delta], since: Delta | None, axes: int) -> ConversationDelta:
        """Of the deltas after ``since``, or of all without it; ``axes`` of the position rule."""
        tokens = Tokens.concatenate([step.tokens for step in steps])
        positions = [step.positions for step in steps] or [np.zeros((axes, 0), np.int64)]
        return cls(
            tokens.input_ids,
            tokens.compact_ids,
            np.concatenate(positions, axis=1),
            tokens.loss_mask,
            tuple(optional(tokens.logprobs)),
            tuple(item for step in steps for item in step.items),
            since.length if since else 0,
            since.compact_length if since else 0,
        )


def optional(logprobs: Floats) -> list[float | None]:
    """As a list, None where there is none."""
    return [None if missing else value for value, missing in zip(logprobs.tolist(), np.isnan(logprobs).tolist(), strict=True)]
