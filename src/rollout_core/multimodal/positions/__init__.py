"""Position ids under explicit, named and versioned rules. The rules and their sources are in ``rules``."""

from __future__ import annotations

from rollout_core.multimodal.positions.rules import (
    PLAIN,
    QWEN2_5_VL_V1,
    QWEN2_5_VL_V2,
    QWEN2_5_VL_WHOLE,
    QWEN2_VL_V1,
    QWEN2_VL_V2,
    QWEN3_VL,
    RULE_OF_MODEL_TYPE,
    PositionRule,
    register_rule,
    rule,
)
from rollout_core.multimodal.positions.segments import Grid, Modality, Segment, Text

__all__ = [
    "PLAIN",
    "QWEN2_5_VL_V1",
    "QWEN2_5_VL_V2",
    "QWEN2_5_VL_WHOLE",
    "QWEN2_VL_V1",
    "QWEN2_VL_V2",
    "QWEN3_VL",
    "RULE_OF_MODEL_TYPE",
    "Grid",
    "Modality",
    "PositionRule",
    "Segment",
    "Text",
    "register_rule",
    "rule",
]
