"""Processing as data: what each kind of processor makes of one item, and how its outputs of one call over several lie together.

The joins here are the kit's own, in numpy: nothing of ``rollout_core.multimodal`` is used. Each kind is named after what is odd
about it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final, Literal

import numpy as np

from rollout_core.testing.worlds import making
from rollout_core.testing.worlds.making import Array, Make


@dataclass(frozen=True)
class Shown:
    """A medium in a template: the text before and after its placeholder, and the token that stands for one feature row."""

    placeholder: str
    feature: str
    before: str = ""
    after: str = ""

    def __str__(self) -> str:
        return self.before + self.placeholder + self.after


@dataclass(frozen=True)
class Positions:
    """How positions are counted; ``time`` of the steps of a video, ``resume`` of the text after a grid."""

    axes: int = 1
    time: Literal["steps", "seconds"] = "steps"
    resume: Literal["largest", "sides"] = "largest"
    rate: int = 1


@dataclass(frozen=True)
class Join:
    """How an output of several items lies: padded at the end of ``pads`` with ``value``, then concatenated along ``dim``."""

    dim: int = 0
    pads: tuple[int, ...] = ()
    value: float = 0.0

    def __call__(self, arrays: Sequence[Array]) -> Array:
        shape = [max(array.shape[axis] for array in arrays) for axis in range(arrays[0].ndim)]
        padded = []
        for array in arrays:
            room = [(0, shape[axis] - array.shape[axis] if axis in self.pads else 0) for axis in range(array.ndim)]
            padded.append(np.pad(array, room, constant_values=self.value))
        return np.concatenate(padded, axis=self.dim)


@dataclass(frozen=True)
class Kind:
    """``sequence``: output per token -> its value on the feature tokens of each modality. ``refused``: what one item becomes
    depends on the others, so that nothing can be put together from single items. ``undeclared``: an output that no rule knows."""

    name: str
    shown: Mapping[str, Shown]
    make: Mapping[str, Make]
    joins: Mapping[str, Join]
    positions: Positions = Positions()
    sequence: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    controls: tuple[str, ...] = ()
    bos: str | None = None
    refused: bool = False
    undeclared: str = ""

    @property
    def class_name(self) -> str:
        return "Fake" + "".join(word.capitalize() for word in self.name.split("-")) + "Processor"

    def tokens(self) -> tuple[str, ...]:
        """Control tokens of the vocabulary."""
        own = [text for shown in self.shown.values() for text in (shown.before, shown.placeholder, shown.after, shown.feature)]
        return tuple(dict.fromkeys(text for text in (*own, *self.controls, *([self.bos] if self.bos else [])) if text))


_QWEN: Final = {
    "image": Shown("<|image_pad|>", "<|image_pad|>", "<|vision_start|>", "<|vision_end|>"),
    "video": Shown("<|video_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>"),
}
_TYPES: Final = {"mm_token_type_ids": {"image": 1, "video": 2, "audio": 3}}
_QWEN_JOINS: Final = {key: Join() for key in ("pixel_values", "image_grid_thw", "pixel_values_videos", "video_grid_thw")}
_TILE: Final = {"image": Shown("<image>", "<image>")}
#: By name, the plainest first.
KINDS: Final[dict[str, Kind]] = {
    kind.name: kind
    for kind in (
        Kind(
            "rows", _QWEN, {"image": making.patches, "video": making.whole_video}, _QWEN_JOINS, Positions(3, resume="sides"), _TYPES
        ),
        Kind(
            "bare",
            {m: Shown(s.placeholder, s.feature) for m, s in _QWEN.items()},
            {"image": making.patches, "video": making.whole_video},
            _QWEN_JOINS,
            Positions(3),
            _TYPES,
        ),
        Kind(
            "timed",
            _QWEN,
            {"image": making.patches, "video": making.timed_video},
            {**_QWEN_JOINS, "second_per_grid_ts": Join()},
            Positions(3, "seconds", "sides", 2),
            _TYPES,
        ),
        Kind(
            "framed",
            {**_QWEN, "video": Shown("<|video_pad|>", "<|video_pad|>")},
            {"image": making.patches, "video": making.framed_video},
            _QWEN_JOINS,
            Positions(3),
            _TYPES,
        ),
        Kind("tiles", _TILE, {"image": making.padded_tiles}, {"pixel_values": Join(0, (1,)), "image_sizes": Join()}),
        Kind(
            "stacked",
            _TILE,
            {"image": making.stacked_tiles},
            {"pixel_values": Join(1), "pixel_mask": Join(1)},
            controls=("<fake>", "<global-img>", *(f"<row_{row}_col_{column}>" for row in (1, 2) for column in (1, 2))),
        ),
        Kind(
            "sized",
            {"image": Shown("[IMG]", "[IMG]")},
            {"image": making.sized},
            {"pixel_values": Join(0, (2, 3)), "image_sizes": Join()},
            controls=("[IMG_BREAK]", "[IMG_END]"),
        ),
        Kind(
            "soft",
            {"image": Shown("<start>", "<soft>")},
            {"image": making.soft},
            {"pixel_values": Join()},
            sequence={"token_type_ids": {"image": 1}},
            controls=("<end>",),
            bos="<bos>",
        ),
        Kind(
            "heard",
            {"image": _TILE["image"], "audio": Shown("<|AUDIO|>", "<|AUDIO|>", "<|audio_bos|>", "<|audio_eos|>")},
            {"image": making.padded_tiles, "audio": making.sound},
            {"pixel_values": Join(0, (1,)), "image_sizes": Join(), "input_features": Join(), "feature_attention_mask": Join()},
        ),
        Kind("coupled", _TILE, {"image": making.coupled}, {"pixel_values": Join()}, refused=True),
        Kind(
            "undeclared",
            _QWEN,
            {"image": making.patches, "video": making.whole_video},
            _QWEN_JOINS,
            Positions(3),
            undeclared="item_numbers",
        ),
    )
}
