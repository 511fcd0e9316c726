"""Prompts with pictures, as vLLM takes them: compact ids, and at each placeholder a picture or the name of one that it has."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import zip_longest
from typing import Any

from rollout_core.errors import WorkerError
from rollout_core.workers.engine import Request
from rollout_core.workers.media import decode_picture


def reading_options(config: Mapping[str, Any]) -> dict[str, Any]:
    """What of vLLM's options says who makes a model's inputs: nobody for one of text, which gets ids; its processor for one that
    sees, which would look for videos, too, and take memory for them."""
    return {"limit_mm_per_prompt": {"video": 0}} if "vision_config" in config else {"skip_tokenizer_init": True}


def hits_of(cache: Any) -> tuple[int, int] | tuple[None, None]:
    """Of ``renderer.mm_processor_cache``: pictures that were in it, and that were looked for; None without a cache."""
    if cache is None:
        return None, None
    found = cache.make_stats()
    return found.hits, found.total


def missing_in(request: Request, given: Mapping[str, bytes], cache: Any) -> list[str]:
    """Identities of a request's pictures of which nobody has the data: neither ``given``, nor ``cache``, which is vLLM's of what
    its processor made (``renderer.mm_processor_cache``, None if it is switched off)."""
    wanted = list(dict.fromkeys(item.identity for item in request.media if item.identity not in given))
    return wanted if cache is None else [name for name, known in zip(wanted, cache.is_cached(wanted), strict=True) if not known]


def prompt_of(request: Request, given: Mapping[str, bytes]) -> dict[str, Any]:
    """What ``add_request`` takes. A picture without data is one that is in vLLM's cache: vLLM would take another picture under the
    same uuid for it, without a word, so the uuid is the identity of the content."""
    prompt: dict[str, Any] = {"prompt_token_ids": request.prompt}
    if request.media:
        names = [item.identity for item in request.media]
        prompt["multi_modal_data"] = {"image": [decode_picture(given[name]) if name in given else None for name in names]}
        prompt["multi_modal_uuids"] = {"image": names}
    return prompt


def check_expanded(request: Request, found: Sequence[int], tokens: Sequence[int] = ()) -> None:
    """Raise ``WorkerError`` if vLLM made other ids of a conversation than its tracker (clause W8). ``tokens``: what came of the
    request before, and was given to vLLM after its prompt."""
    wanted = [*request.input_ids, *tokens]
    if not request.input_ids or list(found) == wanted:
        return
    place = next(at for at, (ours, theirs) in enumerate(zip_longest(wanted, found)) if ours != theirs)
    ours, theirs = (str(ids[place]) if place < len(ids) else "the end" for ids in (wanted, found))
    raise WorkerError(
        f"vLLM made {len(found)} tokens of prompt {request.place}, whose conversation has {len(wanted)}; the first difference is "
        f"at position {place}: {theirs} instead of {ours}. Check that the engine's processor has the settings of the "
        "conversation's, and that no placeholder was sampled"
    )
