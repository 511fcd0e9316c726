"""Prompts with pictures, as SGLang takes them: compact ids, and the pictures with every request, as it knows them by no name.

It puts them where it finds the id of a placeholder. With more of these than pictures it waits for ever, so they are counted before.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

from rollout_core.errors import WorkerError
from rollout_core.workers.engine import Request

#: What configurations call the id at which a picture stands.
_NAMES: Final = ("image_token_id", "image_token_index")


def placeholder_of(config: Mapping[str, Any]) -> int | None:
    """The id at which a model's pictures stand, if its configuration says it."""
    return next((int(config[name]) for name in _NAMES if isinstance(config.get(name), int)), None)


def pictures_of(request: Request, given: Mapping[str, bytes]) -> list[bytes]:
    """SGLang's ``image_data``."""
    return [given[item.identity] for item in request.media]


def check_placeholders(request: Request, ids: Sequence[int], placeholder: int | None) -> None:
    """Raise ``WorkerError`` for ids among which SGLang would look for more pictures, or fewer, than there are."""
    found, pictures = sum(token == placeholder for token in ids), len(request.media)
    if pictures and found != pictures:
        raise WorkerError(
            f"prompt {request.place} shows {pictures} pictures, and SGLang would look for {found}: the id of a placeholder, "
            f"{placeholder}, was sampled, or stands in the prompt by itself"
        )


def wrong_length(request: Request, tokens: Sequence[int], found: int) -> WorkerError | None:
    """What is wrong if SGLang made another number of ids of a conversation than its tracker (clause W8): it says no more of them.
    ``tokens``: what came of the request before, and was given to SGLang after its prompt."""
    wanted = len(request.input_ids) + len(tokens)
    if not request.input_ids or found == wanted:
        return None
    return WorkerError(
        f"SGLang made {found} tokens of prompt {request.place}, whose conversation has {wanted}. Check that the engine's "
        "processor has the settings of the conversation's"
    )
