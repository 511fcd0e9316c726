"""What processors make of one item, each after a real one, in numpy."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

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


#: Makes one item: the medium as pixels or samples, a scale that is a setting, metadata, and how many items are in the call.
Make: TypeAlias = Callable[[Array, float, Mapping[str, Any], int], Done]


def _sides(height: int, width: int) -> tuple[int, int]:
    """Tokens along each side: one for two pixels, at least one."""
    return (height + 1) // 2, (width + 1) // 2


def _resampled(pixels: Array, rows: int, columns: int, scale: float) -> Array:
    """float32 (rows, columns, 3): the nearest pixels, from -1 to 1 times the scale."""
    height, width = pixels.shape[:2]
    down, across = np.arange(rows) * height // rows, np.arange(columns) * width // columns
    picked: Array = (pixels[down][:, across].astype(np.float32) / 127.5 - 1.0) * np.float32(scale)
    return picked.astype(np.float32)


def patches(pixels: Array, scale: float, metadata: Mapping[str, Any], count: int) -> Done:
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
    outputs = {
        "pixel_values_videos": np.concatenate(parts).reshape(-1, 3),
        "video_grid_thw": np.array([[steps, 2 * rows, 2 * columns]]),
    }
    return outputs, steps, rows, columns


def whole_video(frames: Array, scale: float, metadata: Mapping[str, Any], count: int) -> Done:
    outputs, steps, rows, columns = _video(frames, scale)
    tokens = steps * rows * columns
    return Done(outputs, "<|video_pad|>" * tokens, tokens, ((steps, rows, columns, None),))


def timed_video(frames: Array, scale: float, metadata: Mapping[str, Any], count: int) -> Done:
    """Qwen2.5-VL: the seconds of one time step beside it."""
    outputs, steps, rows, columns = _video(frames, scale)
    seconds = 2.0 / (metadata.get("fps") or 2.0)
    tokens = steps * rows * columns
    outputs["second_per_grid_ts"] = np.array([seconds], np.float32)
    return Done(outputs, "<|video_pad|>" * tokens, tokens, ((steps, rows, columns, seconds),))


def framed_video(frames: Array, scale: float, metadata: Mapping[str, Any], count: int) -> Done:
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


def padded_tiles(pixels: Array, scale: float, metadata: Mapping[str, Any], count: int) -> Done:
    """LLaVA-NeXT: (1, tiles, 3, 2, 2), which one call pads to the most tiles."""
    values = _tile_values(pixels, scale)
    tokens = 2 * len(values) + 1
    outputs = {"pixel_values": values[None], "image_sizes": np.array([pixels.shape[:2]])}
    return Done(outputs, "<image>" * tokens, tokens, ((1, 1, tokens, None),))


def stacked_tiles(pixels: Array, scale: float, metadata: Mapping[str, Any], count: int) -> Done:
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


def sized(pixels: Array, scale: float, metadata: Mapping[str, Any], count: int) -> Done:
    """Pixtral: the picture at its own size, which one call pads, and a break after every row of tokens."""
    rows, columns = _sides(*pixels.shape[:2])
    values = _resampled(pixels, 2 * rows, 2 * columns, scale).transpose(2, 0, 1)[None].copy()
    text = "[IMG_BREAK]".join(["[IMG]" * columns] * rows) + "[IMG_END]"
    outputs = {"pixel_values": values, "image_sizes": np.array([[2 * rows, 2 * columns]])}
    return Done(outputs, text, rows * columns, ((1, 1, columns, None),) * rows)


def soft(pixels: Array, scale: float, metadata: Mapping[str, Any], count: int) -> Done:
    """Gemma 3: line breaks around it, which merge with those of the text, and another token for its features."""
    values = _resampled(pixels, 2, 2, scale).transpose(2, 0, 1)[None].copy()
    return Done({"pixel_values": values}, f"\n\n<start>{'<soft>' * 3}<end>\n\n", 3, ((1, 1, 3, None),))


def sound(samples: Array, scale: float, metadata: Mapping[str, Any], count: int) -> Done:
    """Qwen2-Audio: features of one length for all, and a mask."""
    frames = min(1 + len(samples) // 100, 8)
    features = np.zeros((1, 2, 8), np.float32)
    features[0, :, :frames] = np.resize(samples, (2, frames)) * np.float32(scale)
    mask = (np.arange(8) < frames).astype(np.int64)[None]
    return Done({"input_features": features, "feature_attention_mask": mask}, "<|AUDIO|>" * frames, frames, ((1, 1, frames, None),))


def coupled(pixels: Array, scale: float, metadata: Mapping[str, Any], count: int) -> Done:
    """LLaVA-OneVision: a picture has tiles only while it is alone."""
    if count > 1:
        return Done({"pixel_values": _tile_values(pixels, scale)[-1:]}, "<image><image>", 2, ((1, 1, 2, None),))
    values = _tile_values(pixels, scale)
    return Done({"pixel_values": values}, "<image><image>" * len(values), 2 * len(values), ((1, 1, 2 * len(values), None),))
