"""Whether a conversation is what growing it again gives, with every addition compared with the render of the whole past."""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

import numpy as np

from rollout_core.errors import ConversationError, UnstableTemplateError
from rollout_core.multimodal.sampled import Finish
from rollout_core.multimodal.steps import refilled

if TYPE_CHECKING:
    from rollout_core.multimodal.conversation import Conversation


def verify(conversation: Conversation) -> None:
    """See `Conversation.verify`."""
    if conversation.cut:
        raise ConversationError("a truncated conversation cannot be verified; verify the one it was cut from")
    grown = _regrown(conversation)
    ours, theirs = conversation.input_ids, grown.input_ids
    if not np.array_equal(ours, theirs):
        same = min(len(ours), len(theirs))
        at = next((n for n in range(same) if ours[n] != theirs[n]), same)
        raise UnstableTemplateError(
            f"token {at} is {ours[at : at + 1].tolist()} here, and {theirs[at : at + 1].tolist()} where every addition is "
            f"compared with the whole past ({len(ours)} and {len(theirs)} tokens): use HFRenderer(check_history=True) with "
            "this template"
        )


def _regrown(conversation: Conversation) -> Conversation:
    """The same conversation from its messages and sampled ids, by a renderer that trusts no probing."""
    grown: Conversation | None = None
    for delta in conversation.tip.path():
        if grown is None:
            checking = conversation.renderer.checking()
            grown = type(conversation).start(checking, refilled(delta.messages, delta.items), conversation.tools)
        elif delta.kind == "messages":
            grown = grown.extend(refilled(delta.messages, delta.items))
        elif delta.kind == "sampled":
            said = delta.messages[0] if delta.messages else None
            grown = grown.append_sampled(delta.tokens.input_ids, finish=cast("Finish", delta.finish), message=said)
    assert grown is not None
    if conversation.tip.kind == "generation_prompt":
        grown = grown.with_generation_prompt()
    return grown
