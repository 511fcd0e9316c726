"""Real processors of transformers as worlds of the kit."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from rollout_core.testing import register_world
from rollout_core.testing.worlds import Positions, Shown, World
from support import processors

_QWEN = {
    "image": Shown("<|image_pad|>", "<|image_pad|>", "<|vision_start|>", "<|vision_end|>"),
    "video": Shown("<|video_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>"),
}
_TYPES = {"mm_token_type_ids": {"image": 1, "video": 2}}


def _image(token: str, feature: str = "", before: str = "", after: str = "") -> dict[str, Shown]:
    return {"image": Shown(token, feature or token, before, after)}


#: name -> what the templates of tests/support/processors.py write, outputs per token, and how positions are counted.
REAL: dict[str, tuple[dict[str, Shown], dict[str, Any], Positions | None]] = {
    "qwen2_vl": ({"image": _QWEN["image"]}, _TYPES, Positions(3, resume="sides")),
    "qwen2_5_vl": ({"image": _QWEN["image"]}, _TYPES, Positions(3, resume="sides")),
    "qwen3_vl": ({"image": _QWEN["image"]}, _TYPES, Positions(3)),
    "gemma3": (_image("<start_of_image>", "<image_soft_token>"), {"token_type_ids": {"image": 1}}, Positions()),
    "llava_next": (_image("<image>"), {}, Positions()),
    "pixtral": (_image("[IMG]"), {}, Positions()),
    "idefics3": (_image("<image>"), {}, Positions()),
    "internvl": (_image("<IMG_CONTEXT>"), {}, Positions()),
}


@functools.cache
def _processor(name: str) -> Any:
    return processors.PROCESSORS[name]()


def _builder(name: str) -> Callable[[], World]:
    shown, sequence, positions = REAL[name]

    def measure(medium: Any) -> Any:
        if name.startswith("qwen"):
            processor = _processor(name)
            called = processor(text=["<|image_pad|>"], images=[medium.image().convert("RGB")], return_tensors="pt")
            _, height, width = (int(side) for side in called["image_grid_thw"][0])
            return height * width // 4, ((1, height // 2, width // 2, None),)
        return None, ()

    return lambda: World(
        name=f"real:{name}",
        processor=_processor(name),
        shown=shown,
        stops=("<|im_end|>",),
        positions=positions,
        measure=measure,
        sequence=sequence,
    )


def register() -> list[str]:
    """Register them; their names."""
    for name, (shown, _, _) in REAL.items():
        traits = ["stable", "sums", "positions", "tool media", "plain joins"]
        register_world(f"real:{name}", _builder(name), modalities=shown, traits=traits)
    return [f"real:{name}" for name in REAL]
