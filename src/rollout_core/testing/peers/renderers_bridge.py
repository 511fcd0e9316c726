"""prime-rl's ``renderers``: ``Qwen3VLRenderer``, whose ``bridge_to_next_turn`` renders only what came after a sampled turn.

The calls are those of the client that drives it, ``RendererClient`` of verifiers:

- ``render(messages, add_generation_prompt=True)`` for the first prompt;
- after a sampled turn ``bridge_to_next_turn`` with the prompt before it, what was sampled, the new messages, the pictures so far;
- where that gives None, ``render`` over all messages, with the sampled turn as ``parse_response`` reads it;
- for the trainer the pictures' outputs put together as ``renderers.client._build_qwen_vl_features`` does, and token types by
  ``mm_token_type_id_map``, as the property's docstring says.

There is no call for messages that follow messages: what stands between two sampled turns is given at once. Such cases are not
judged, nor videos, which it refuses by name. Newer clients do not bridge a conversation that shows pictures, and render it anew
each turn (``_has_multimodal_content``); here it is bridged, as the method's docstring offers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from rollout_core.testing.peers.loading import PeerPackage
from rollout_core.testing.registry import Skipped

PACKAGE = PeerPackage("renderers", "0.1.12", "renderers")


@dataclass(frozen=True, slots=True)
class Turn:
    """A step of a rollout: a prompt with its generation prompt, its pictures, what was sampled after it, the messages so far."""

    prompt: tuple[int, ...]
    media: Any
    sampled: tuple[int, ...]
    messages: tuple[Any, ...]


class Bridge:
    """``Qwen3VLRenderer`` as a tracker."""

    capabilities = frozenset({"forks", "loads", "groups tools"})

    def __init__(self, processor: Any) -> None:
        made = PACKAGE.load("renderers.qwen3_vl").Qwen3VLRenderer
        with PACKAGE:
            self._renderer = made(processor.tokenizer, processor=processor)
            # Of the view without a generation prompt, which prompts of this package always have.
            probe = [{"role": "user", "content": "a"}]
            longer = self._renderer.render_ids(probe, add_generation_prompt=True)
            self._opener = len(longer) - len(self._renderer.render_ids(probe))

    def start(self, messages: Sequence[Any]) -> Turn:
        return self._rendered([_given(message) for message in messages])

    def extend(self, state: Turn, messages: Sequence[Any]) -> Turn:
        if not state.sampled:
            raise Skipped("renderers takes all messages between two sampled turns in one call")
        new = [_given(message) for message in messages]
        with PACKAGE:
            found = self._renderer.bridge_to_next_turn(
                list(state.prompt), list(state.sampled), new, previous_multi_modal_data=state.media
            )
            parsed = self._renderer.parse_response(list(state.sampled), prompt_ids=list(state.prompt))
        said = {"role": "assistant", "content": parsed.content}
        if parsed.reasoning_content:
            said["reasoning_content"] = parsed.reasoning_content
        everything = [*state.messages, said, *new]
        if found is None:
            return self._rendered(everything)
        return Turn(tuple(found.token_ids), found.multi_modal_data, (), tuple(everything))

    def append_sampled(self, state: Turn, ids: Any, logprobs: Any, finish: str) -> Turn:
        return replace(state, sampled=(*state.sampled, *ids))

    def input_ids(self, state: Turn) -> list[int]:
        return [*state.prompt, *state.sampled] if state.sampled else list(state.prompt[: -self._opener])

    def prompt_ids(self, state: Turn) -> list[int]:
        return list(state.prompt)

    def items(self, state: Turn) -> list[tuple[str, list[tuple[int, int]], str]]:
        if state.media is None:
            return []
        places, hashes = state.media.mm_placeholders.get("image", []), state.media.mm_hashes.get("image", [])
        return [("image", [(at.offset, at.offset + at.length)], name) for at, name in zip(places, hashes, strict=True)]

    def multi_modal_inputs(self, state: Turn) -> dict[str, Any]:
        items = state.media.mm_items.get("image", []) if state.media else []
        keys = ("pixel_values", "image_grid_thw") if items else ()
        found = {key: torch.cat([torch.as_tensor(item[key]) for item in items], dim=0) for key in keys}
        kinds = self._renderer.mm_token_type_id_map
        return {**found, "mm_token_type_ids": np.array([[kinds.get(token, 0) for token in self.input_ids(state)]], np.int64)}

    def identity(self, modality: str, part: Any) -> str:
        media = self._rendered([_given({"role": "user", "content": [part]})]).media
        return str(media.mm_hashes[modality][0])

    def _rendered(self, messages: list[Any]) -> Turn:
        with PACKAGE:
            found = self._renderer.render(messages, add_generation_prompt=True)
        return Turn(tuple(found.token_ids), found.multi_modal_data, (), tuple(messages))


def _given(message: Any) -> Any:
    """The message itself, unless it shows what the package refuses by name."""
    parts = message.get("content") if isinstance(message, dict) else None
    for part in parts if isinstance(parts, list) else ():
        if isinstance(part, dict) and part.get("type") in ("video", "audio"):
            raise Skipped(f"renderers takes no {part['type']} for Qwen3-VL")
        if isinstance(part, dict) and isinstance(part.get("image"), np.ndarray):
            raise Skipped("renderers takes pictures as Pillow images, bytes, paths and URLs, not as arrays")
    return message
