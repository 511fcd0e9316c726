"""What SGLang answers to a request, as pieces. Pure."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Final

from rollout_core.errors import WorkerError
from rollout_core.workers.streaming import Piece

#: The answer of a request that has ended early, where SGLang itself gives none; see ``tells_an_end``.
ENDED: Final[Mapping[str, Any]] = {"meta_info": {"finish_reason": {"type": "abort"}}}


def piece_of(answer: Mapping[str, Any], seen: int) -> Piece:
    """What of an answer was not seen before. ``WorkerError`` for one that is a refusal.

    A request that is ended while it waits, for the first time or because its memory was taken from it, is told by SGLang's
    front end: with its last token once more, and all of its logprobs. It is known by having no prompt, and nothing in it is new.
    """
    meta = answer["meta_info"]
    is_echo = "prompt_tokens" not in meta
    tokens = [] if is_echo else list(answer.get("output_ids") or ())[seen:]
    rows = () if is_echo else (meta.get("output_token_logprobs") or ())[seen:]
    logprobs = [math.nan if row[0] is None else float(row[0]) for row in rows]
    reason = meta.get("finish_reason")
    if reason is None:
        return Piece(tokens, logprobs)
    kind, code = reason.get("type"), reason.get("status_code")
    if kind == "abort" and code is not None:
        raise WorkerError(f"SGLang refused a request ({code}): {reason.get('message')}")
    if kind not in ("stop", "length", "abort"):
        raise WorkerError(f"SGLang ended a request by {reason!r}")
    return Piece(tokens, logprobs, "aborted" if kind == "abort" else kind)


def tells_an_end(error: Exception) -> bool:
    """Whether SGLang's front end says by this error that a request was ended: by a kind of its own before it was sent on (0.5.17),
    or, joining what the request got with the word of its end (0.5.17 to 0.5.23), by looking in vain for a text."""
    return type(error).__name__ == "RequestAbortedError" or (type(error) is KeyError and error.args == ("text",))
