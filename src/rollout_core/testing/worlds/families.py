"""The fake processors as families of ``rollout_core.multimodal``: what its users would write for processors of their own."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

from rollout_core.multimodal.families import Family, register_family
from rollout_core.multimodal.families.family import Support
from rollout_core.multimodal.merge import Cat, OutputRule, PadCat, PerToken
from rollout_core.multimodal.positions import Grid
from rollout_core.testing.worlds.kinds import KINDS, Join, Kind

_RULES = {"rows": "qwen2-vl@2", "bare": "qwen2-vl@1", "timed": "qwen2.5-vl@2", "framed": "qwen3-vl@1", "undeclared": "qwen2-vl@1"}


@cache
def register() -> None:
    """Register the families of all kinds, once."""
    for kind in KINDS.values():
        register_family(_family(kind), replace=True)


def _family(kind: Kind) -> Family:
    if kind.refused:
        return Family(f"fake-{kind.name}", (kind.class_name,), refuse="a picture becomes something else beside another")
    return Family(
        f"fake-{kind.name}",
        (kind.class_name,),
        {modality: _support(kind, modality) for modality in kind.shown},
        {key: _rule(join) for key, join in kind.joins.items()},
        {key: PerToken(tuple(values.items())) for key, values in kind.sequence.items()},
        positions=_RULES.get(kind.name, "plain@1"),
    )


def _rule(join: Join) -> OutputRule:
    return PadCat(join.pads, join.dim, join.value) if join.pads else Cat(join.dim)


def _support(kind: Kind, modality: str) -> Support:
    shown = kind.shown[modality]
    return Support(_constant(shown.placeholder), _constant(shown.feature), _rows(kind, modality), _grids(kind, modality))


def _constant(text: str) -> Callable[[Any], str]:
    return lambda processor: text


def _rows(kind: Kind, modality: str) -> Callable[[Any, Any], int]:
    """Feature rows from the outputs, as a model would count them."""

    def rows(processor: Any, outputs: Any) -> int:
        if modality == "audio":
            return int(outputs["feature_attention_mask"].sum())
        for key in ("video_grid_thw", "image_grid_thw"):
            if key in outputs:
                return int(outputs[key].prod()) // 4
        tiles = int(outputs["pixel_values"].shape[1])
        if kind.name == "sized":
            return int(outputs["image_sizes"].prod()) // 4
        return {"tiles": 2 * tiles + 1, "heard": 2 * tiles + 1, "stacked": 2 * tiles, "soft": 3}[kind.name]

    return rows


def _grids(kind: Kind, modality: str) -> Callable[[Any, Any], Any] | None:
    if kind.positions.axes == 1:
        return None

    def grids(processor: Any, outputs: Any) -> Any:
        t, h, w = (int(side) for side in outputs["image_grid_thw" if modality == "image" else "video_grid_thw"][0])
        if modality == "image":
            return (Grid("image", t, h // 2, w // 2),)
        if kind.name == "framed":
            return (Grid("video", 1, h // 2, w // 2),) * t
        seconds = float(outputs["second_per_grid_ts"][0]) if "second_per_grid_ts" in outputs else None
        return (Grid("video", t, h // 2, w // 2, seconds),)

    return grids
