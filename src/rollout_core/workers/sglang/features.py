"""What one SGLang has and another has not, in one place. Read in the sources of 0.5.17 to 0.5.23."""

from __future__ import annotations

import re
from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass
from typing import Any, Final

from rollout_core.workers.versions import check_version

#: From here on an update stands between ``begin_weight_update`` and ``end_weight_update``.
_SESSIONS: Final = (0, 5, 21)
#: From here on an update that cannot flush says so. Before, its scheduler ended: an assertion failed.
_SAYS_NOT_FLUSHED: Final = (0, 5, 22)


@dataclass(frozen=True, slots=True)
class Features:
    """``has_sessions``: updates are begun and ended. ``flushes_in_update``: an update may be asked to flush what was computed with
    other weights. ``is_incremental``: an answer of a stream has the tokens since the last, not all so far."""

    has_sessions: bool
    flushes_in_update: bool
    is_incremental: bool

    @classmethod
    def of(cls, version: str, *, is_incremental: bool) -> Features:
        """Of SGLang of this version. ``WorkerError`` if it is not served."""
        check_version("SGLang", version)
        found = tuple(int(part) for part in re.findall(r"\d+", version)[:3])
        return cls(found >= _SESSIONS, found >= _SAYS_NOT_FLUSHED, is_incremental)


#: Positions that SGLang keeps from a request: it takes prompts of at most 7 less than its context, and one that was called back
#: before its last token is such a prompt.
SPARE: Final = 6


def room_of(info: Mapping[str, Any], context: int) -> int:
    """The most tokens of a prompt and its response: what SGLang says of its scheduler, which may have memory for less than the
    context of the model. Beyond that a request would be cut short, or refused when it starts again."""
    found = [context - SPARE]
    if info.get("max_req_input_len"):
        found.append(int(info["max_req_input_len"]))
    if info.get("max_total_num_tokens"):
        found.append(int(info["max_total_num_tokens"]) - 2 * int(info.get("page_size") or 1))
    return max(1, min(found))


def context_for(positions: int, config: Mapping[str, Any], environment: MutableMapping[str, str]) -> int:
    """SGLang's ``context_length`` for requests of so many tokens. Where that passes the model's positions, as no request will,
    ``environment`` is made to allow it."""
    context, most = positions + SPARE, config.get("max_position_embeddings")
    if isinstance(most, int) and positions <= most < context:
        environment.setdefault("SGLANG_ALLOW_OVERWRITE_LONGER_CONTEXT_LEN", "1")
    return context


def capabilities_of(device: str, *, frees: bool, repeats: bool) -> frozenset[str]:
    """What a worker on an SGLang can: ``frees``, it has a memory saver; ``repeats``, its inference is deterministic."""
    return frozenset({*(("memory",) if frees or device == "cpu" else ()), *(("seeds",) if repeats else ())})
