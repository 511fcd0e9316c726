"""Checking what an engine says was sampled."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, get_args

import numpy as np

from rollout_core.errors import ConversationError
from rollout_core.multimodal.deltas import Floats
from rollout_core.multimodal.tracks import Ids, as_ids

#: Beyond the range of float32, which trainers use.
_MOST = 3e38
#: How a sampled turn may end.
Finish = Literal["stop", "length", "aborted"]


def check_sampled(ids: Any, logprobs: Any, finish: str, vocab_size: int) -> tuple[Ids, Floats]:
    """Private copies: ids (n,) int64, and logprobs (n,) float64 with not-a-number where there is none."""
    if finish not in get_args(Finish):
        raise ConversationError(f"finish is {finish!r}; it is one of {', '.join(map(repr, get_args(Finish)))}")
    sampled = as_ids(ids, "sampled ids")
    bad = np.flatnonzero((sampled < 0) | (sampled >= vocab_size))
    if len(bad):
        raise ConversationError(
            f"sampled id {sampled[bad[0]]} at {bad[0]} is outside the vocabulary of {vocab_size}; a model with padded "
            "embeddings can sample it: give the renderer its vocab_size, or mask those ids when sampling"
        )
    if logprobs is None:
        return sampled, np.full(len(sampled), np.nan)
    values = _values(logprobs)
    if len(values) != len(sampled):
        raise ConversationError(
            f"there are {len(values)} logprobs for {len(sampled)} sampled ids; give one for each, None where missing"
        )
    return sampled, values


def _values(logprobs: Any) -> Floats:
    if isinstance(logprobs, (Mapping, str, bytes)) or not (hasattr(logprobs, "__len__") and hasattr(logprobs, "__iter__")):
        raise ConversationError(
            f"logprobs is a {type(logprobs).__name__}; it is a list, array or tensor with one number for each id"
        )
    if hasattr(logprobs, "detach"):
        logprobs = logprobs.detach().cpu().double().numpy()
    if isinstance(logprobs, np.ndarray):
        logprobs = logprobs.tolist() if logprobs.ndim == 1 else [logprobs]
    values = np.full(len(logprobs), np.nan)
    for index, value in enumerate(logprobs):
        if value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, (int, float, np.floating, np.integer)):
            raise ConversationError(f"logprob {index} is {value!r:.60}; it is a number, or None where there is none")
        if not abs(float(value)) < _MOST:
            raise ConversationError(f"logprob {index} is {value}; a sampled token has a finite one, and a missing one is None")
        values[index] = value
    return values
