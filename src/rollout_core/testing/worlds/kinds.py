"""Processing as data: what each kind of processor makes of one item, and how its outputs of one call over several lie together.

The joins here are the kit's own, in numpy: nothing of ``rollout_core.multimodal`` is used. Each kind is named after what is odd about it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Literal, TypeAlias

import numpy as np

Array: TypeAlias = np.ndarray[Any, Any]
#: (time steps, rows, columns, seconds of a time step or None) of one span, in tokens.
Grid: TypeAlias = tuple[int, int, int, float | None]


@dataclass(frozen=True)
class Done:
    """One item processed: outputs by key, with the leading dimensions of a call for it alone; the text that takes the placeholder's
    place; the feature rows that a model makes of it; and the grid of each of its spans."""

    outputs: Mapping[str, Array]
    replacement: str
    rows: int
    grids: tuple[Grid, ...]


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


#: Makes one item: the medium as pixels or samples, a scale that is a setting, metadata, and how many items are in the call.
Make: TypeAlias = Callable[[Array, float, Mapping[str, Any], int], Done]


@dataclass(frozen=True)
class Kind:
    """``sequence``: output per token -> its value on the feature tokens of each modality. ``refused``: what one item becomes depends on the
    others, so that nothing can be put together from single items. ``undeclared``: an output that no rule knows."""

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


def _sides(height: int, width: int) -> tuple[int, int]:
    """Tokens along each side: one for two pixels, at least one."""
    return (height + 1) // 2, (width + 1) // 2


def _resampled(pixels: Array, rows: int, columns: int, scale: float) -> Array:
    """float32 (rows, columns, 3): the nearest pixels, from -1 to 1 times the scale."""
    height, width = pixels.shape[:2]
    down, across = np.arange(rows) * height // rows, np.arange(columns) * width // columns
    picked: Array = (pixels[down][:, across].astype(np.float32) / 127.5 - 1.0) * np.float32(scale)
    return picked.astype(np.float32)


def _patches(pixels: Array, scale: float, metadata: Mapping[str, Any], count: int) -> Done:
    """Qwen2-VL: rows of patches, four to a token."""
    rows, columns = _sides(*pixels.shape[:2])
    values = _resampled(pixels, 2 * rows, 2 * columns, scale).reshape(-1, 3)
    grid = np.array([[1, 2 * rows, 2 * columns]])
    done = {"pixel_values": values, "image_grid_thw": grid}
    return Done(done, "<|image_pad|>" * (rows * columns), rows * columns, ((1, rows, columns, None),))


def _video(frames: Array, scale: float) -> tuple[dict[str, Array], int, int, int]:
    steps = (len(frames) + 1) // 2
    rows, columns = _sides(*frames.shape[1:3])
    parts = [_resampled(frames[min(2 * step, len(frames) - 1)], 2 * rows, 2 * columns, scale) for step in range(steps)]
    outputs = {"pixel_values_videos": np.concatenate(parts).reshape(-1, 3), "video_grid_thw": np.array([[steps, 2 * rows, 2 * columns]])}
    return outputs, steps, rows, columns


def _whole_video(frames: Array, scale: float, metadata: Mapping[str, Any], count: int) -> Done:
    outputs, steps, rows, columns = _video(frames, scale)
    tokens = steps * rows * columns
    return Done(outputs, "<|video_pad|>" * tokens, tokens, ((steps, rows, columns, None),))


def _timed_video(frames: Array, scale: float, metadata: Mapping[str, Any], count: int) -> Done:
    """Qwen2.5-VL: the seconds of one time step beside it."""
    outputs, steps, rows, columns = _video(frames, scale)
    seconds = 2.0 / (metadata.get("fps") or 2.0)
    tokens = steps * rows * columns
    outputs["second_per_grid_ts"] = np.array([seconds], np.float32)
    return Done(outputs, "<|video_pad|>" * tokens, tokens, ((steps, rows, columns, seconds),))


def _framed_video(frames: Array, scale: float, metadata: Mapping[str, Any], count: int) -> Done:
    """Qwen3-VL: a span for each time step, with its time as text before it."""
    outputs, steps, rows, columns = _video(frames, scale)
    seconds = 2.0 / (metadata.get("fps") or 2.0)
    frame = "<|vision_start|>" + "<|video_pad|>" * (rows * columns) + "<|vision_end|>"
    text = "".join(f"<{step * seconds:.1f} seconds>{frame}" for step in range(steps))
    return Done(outputs, text, steps * rows * columns, ((1, rows, columns, None),) * steps)


def _tiles(pixels: Array) -> tuple[int, int]:
    return 1 + (pixels.shape[0] > 3), 1 + (pixels.shape[1] > 3)


def _tile_values(pixels: Array, scale: float) -> Array:
    """float32 (tiles, 3, 2, 2): the parts of a grid, and the whole last."""
    down, across = _tiles(pixels)
    parts = _resampled(pixels, 2 * down, 2 * across, scale)
    tiles = [parts[2 * i : 2 * i + 2, 2 * j : 2 * j + 2] for i in range(down) for j in range(across)] if down * across > 1 else []
    return np.stack([*tiles, _resampled(pixels, 2, 2, scale)]).transpose(0, 3, 1, 2).copy()


def _padded_tiles(pixels: Array, scale: float, metadata: Mapping[str, Any], count: int) -> Done:
    """LLaVA-NeXT: (1, tiles, 3, 2, 2), which one call pads to the most tiles."""
    values = _tile_values(pixels, scale)
    tokens = 2 * len(values) + 1
    outputs = {"pixel_values": values[None], "image_sizes": np.array([pixels.shape[:2]])}
    return Done(outputs, "<image>" * tokens, tokens, ((1, 1, tokens, None),))


def _stacked_tiles(pixels: Array, scale: float, metadata: Mapping[str, Any], count: int) -> Done:
    """Idefics3: tiles side by side in dimension 1, and in the text a row of tiles ends with a line break."""
    values = _tile_values(pixels, scale)
    down, across = _tiles(pixels)
    text = ""
    if down * across > 1:
        for row in range(down):
            text += "".join(f"<fake><row_{row + 1}_col_{column + 1}><image><image>" for column in range(across)) + "\n"
        text += "\n"
    text += "<fake><global-img><image><image><fake>"
    mask = np.ones((1, len(values), 2, 2), np.int64)
    return Done({"pixel_values": values[None], "pixel_mask": mask}, text, 2 * len(values), ((1, 1, 2, None),) * len(values))


def _sized(pixels: Array, scale: float, metadata: Mapping[str, Any], count: int) -> Done:
    """Pixtral: the picture at its own size, which one call pads, and a break after every row of tokens."""
    rows, columns = _sides(*pixels.shape[:2])
    values = _resampled(pixels, 2 * rows, 2 * columns, scale).transpose(2, 0, 1)[None].copy()
    text = "[IMG_BREAK]".join(["[IMG]" * columns] * rows) + "[IMG_END]"
    outputs = {"pixel_values": values, "image_sizes": np.array([[2 * rows, 2 * columns]])}
    return Done(outputs, text, rows * columns, ((1, 1, columns, None),) * rows)


def _soft(pixels: Array, scale: float, metadata: Mapping[str, Any], count: int) -> Done:
    """Gemma 3: line breaks around it, which merge with those of the text, and another token for its features."""
    values = _resampled(pixels, 2, 2, scale).transpose(2, 0, 1)[None].copy()
    return Done({"pixel_values": values}, f"\n\n<start>{'<soft>' * 3}<end>\n\n", 3, ((1, 1, 3, None),))


def _sound(samples: Array, scale: float, metadata: Mapping[str, Any], count: int) -> Done:
    """Qwen2-Audio: features of one length for all, and a mask."""
    frames = min(1 + len(samples) // 100, 8)
    features = np.zeros((1, 2, 8), np.float32)
    features[0, :, :frames] = np.resize(samples, (2, frames)) * np.float32(scale)
    mask = (np.arange(8) < frames).astype(np.int64)[None]
    return Done({"input_features": features, "feature_attention_mask": mask}, "<|AUDIO|>" * frames, frames, ((1, 1, frames, None),))


def _coupled(pixels: Array, scale: float, metadata: Mapping[str, Any], count: int) -> Done:
    """LLaVA-OneVision: a picture has tiles only while it is alone."""
    if count > 1:
        return Done({"pixel_values": _tile_values(pixels, scale)[-1:]}, "<image><image>", 2, ((1, 1, 2, None),))
    values = _tile_values(pixels, scale)
    return Done({"pixel_values": values}, "<image><image>" * len(values), 2 * len(values), ((1, 1, 2 * len(values), None),))


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
        Kind("rows", _QWEN, {"image": _patches, "video": _whole_video}, _QWEN_JOINS, Positions(3, resume="sides"), _TYPES),
        Kind(
            "bare",
            {m: Shown(s.placeholder, s.feature) for m, s in _QWEN.items()},
            {"image": _patches, "video": _whole_video},
            _QWEN_JOINS,
            Positions(3),
            _TYPES,
        ),
        Kind(
            "timed",
            _QWEN,
            {"image": _patches, "video": _timed_video},
            {**_QWEN_JOINS, "second_per_grid_ts": Join()},
            Positions(3, "seconds", "sides", 2),
            _TYPES,
        ),
        Kind(
            "framed",
            {**_QWEN, "video": Shown("<|video_pad|>", "<|video_pad|>")},
            {"image": _patches, "video": _framed_video},
            _QWEN_JOINS,
            Positions(3),
            _TYPES,
        ),
        Kind("tiles", _TILE, {"image": _padded_tiles}, {"pixel_values": Join(0, (1,)), "image_sizes": Join()}),
        Kind(
            "stacked",
            _TILE,
            {"image": _stacked_tiles},
            {"pixel_values": Join(1), "pixel_mask": Join(1)},
            controls=("<fake>", "<global-img>", *(f"<row_{row}_col_{column}>" for row in (1, 2) for column in (1, 2))),
        ),
        Kind(
            "sized",
            {"image": Shown("[IMG]", "[IMG]")},
            {"image": _sized},
            {"pixel_values": Join(0, (2, 3)), "image_sizes": Join()},
            controls=("[IMG_BREAK]", "[IMG_END]"),
        ),
        Kind(
            "soft",
            {"image": Shown("<start>", "<soft>")},
            {"image": _soft},
            {"pixel_values": Join()},
            sequence={"token_type_ids": {"image": 1}},
            controls=("<end>",),
            bos="<bos>",
        ),
        Kind(
            "heard",
            {"image": _TILE["image"], "audio": Shown("<|AUDIO|>", "<|AUDIO|>", "<|audio_bos|>", "<|audio_eos|>")},
            {"image": _padded_tiles, "audio": _sound},
            {"pixel_values": Join(0, (1,)), "image_sizes": Join(), "input_features": Join(), "feature_attention_mask": Join()},
        ),
        Kind("coupled", _TILE, {"image": _coupled}, {"pixel_values": Join()}, refused=True),
        Kind("undeclared", _QWEN, {"image": _patches, "video": _whole_video}, _QWEN_JOINS, Positions(3), undeclared="item_numbers"),
    )
}
