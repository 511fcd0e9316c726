"""Multimodal conversations that grow by deltas: each picture is processed once, and nothing else comes out differently for it."""

from rollout_core.multimodal.arrays import ConversationDelta
from rollout_core.multimodal.conversation import Conversation
from rollout_core.multimodal.deltas import ORIGINS, Item, Payload
from rollout_core.multimodal.families import Family, families, family_of, register_family
from rollout_core.multimodal.hf import HFRenderer
from rollout_core.multimodal.media import Picture, Sound, Video
from rollout_core.multimodal.positions import PositionRule, register_rule, rule
from rollout_core.multimodal.tracks import SpanMap

__all__ = [
    "ORIGINS",
    "Conversation",
    "ConversationDelta",
    "Family",
    "HFRenderer",
    "Item",
    "Payload",
    "Picture",
    "PositionRule",
    "Sound",
    "SpanMap",
    "Video",
    "families",
    "family_of",
    "register_family",
    "register_rule",
    "rule",
]
