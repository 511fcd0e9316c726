"""Families of processors: how outputs merge, what stands for an item in the text, how many feature rows it has."""

from __future__ import annotations

from rollout_core.multimodal.families.family import Family, Pin, Support
from rollout_core.multimodal.families.registry import families, family_of, register_family

__all__ = ["Family", "Pin", "Support", "families", "family_of", "register_family"]
