"""How many feature rows the model makes of one item, from the item's outputs, and the grids that position rules need.

Each formula follows the vision or audio tower of the model in transformers 5.23 (``models/*/modeling_*.py``): patches, pooling,
merging, and separators that are features. None reads the text, so comparing with placeholder tokens means something.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, TypeAlias

from rollout_core.multimodal.merge import Outputs
from rollout_core.multimodal.positions import Grid, Segment

Rows: TypeAlias = Callable[[Any, Outputs], int]
Grids: TypeAlias = Callable[[Any, Outputs], tuple[Segment, ...]]


def _ceil(value: int, by: int) -> int:
    return -(-value // by)


def constant(attribute: str) -> Rows:
    """As many as an attribute of the processor says."""
    return lambda processor, outputs: int(getattr(processor, attribute))


def one(processor: Any, outputs: Outputs) -> int:
    """One token stands for the item, and the model looks at the features elsewhere (cross attention)."""
    return 1


def merged_grid(key: str, part: str) -> Rows:
    """``t * h * w / merge_size**2`` over the rows of a grid."""

    def rows(processor: Any, outputs: Outputs) -> int:
        return int(outputs[key].prod(-1).sum()) // int(getattr(processor, part).merge_size) ** 2

    return rows


def pooled_grid(key: str, part: str) -> Rows:
    """``h * w / merge_size**2`` over the rows of a grid: the frames of a row are averaged (Kimi K2.5's patch merger)."""

    def rows(processor: Any, outputs: Outputs) -> int:
        return int(outputs[key][:, 1:].prod(-1).sum()) // int(getattr(processor, part).merge_size) ** 2

    return rows


def tiles(attribute: str, dim: int = 0) -> Rows:
    """Tiles (``pixel_values`` along ``dim``) times the rows of one tile."""
    return lambda processor, outputs: outputs["pixel_values"].shape[dim] * int(getattr(processor, attribute))


def patches(processor: Any, outputs: Outputs) -> int:
    """LLaVA-1.5: a ViT's patches and its extra tokens, of which the strategy ``default`` drops the first (CLS)."""
    height, width = outputs["pixel_values"].shape[-2:]
    kept = (height // processor.patch_size) * (width // processor.patch_size) + processor.num_additional_image_tokens
    return int(kept - (processor.vision_feature_select_strategy == "default"))


def anyres(processor: Any, outputs: Outputs) -> int:
    """LLaVA-NeXT: the whole picture once, and its tiles without their padding, with a newline after each row (``unpad_image``)."""
    height, width = (int(side) for side in outputs["image_sizes"][0])
    tile = outputs["pixel_values"].shape[-1]
    side = tile // processor.patch_size

    def fit(area: list[int]) -> tuple[int, int]:
        scale = min(area[0] / height, area[1] / width)
        used = min(int(height * scale) * int(width * scale), height * width)
        return used, used - area[0] * area[1]

    best = max(processor.image_processor.image_grid_pinpoints, key=fit)
    rows, columns = best[0] // tile * side, best[1] // tile * side
    if width / height > columns / rows:
        rows -= (rows - int(round(height * columns / width, 7))) // 2 * 2
    else:
        columns -= (columns - int(round(width * rows / height, 7))) // 2 * 2
    base = side * side + processor.num_additional_image_tokens - (processor.vision_feature_select_strategy == "default")
    return int(base + rows * columns + rows)


def sized_patches(processor: Any, outputs: Outputs) -> int:
    """Pixtral: patches of the picture at its own size, merged; breaks and ends of rows are text."""
    side = processor.patch_size * processor.spatial_merge_size
    height, width = (int(length) for length in outputs["image_sizes"][0])
    return int(height // side * (width // side))


def shuffled_tiles(processor: Any, outputs: Outputs) -> int:
    """Llama 4: patches of each tile, pixels shuffled into channels (``pixel_shuffle``)."""
    count, _, height, width = outputs["pixel_values"].shape
    return int(count * ((height // processor.patch_size) * (width // processor.patch_size) // processor.downsample_ratio))


def aria_queries(processor: Any, outputs: Outputs) -> int:
    """Aria: the projector has a fixed number of queries for each resolution."""
    count, _, height, _ = outputs["pixel_values"].shape
    return count * int(processor.size_conversion[height])


def square_tiles(processor: Any, outputs: Outputs) -> int:
    """Aya Vision: tiles times the square of the patches along a side, after downsampling (``patch_size`` has it in it)."""
    count, _, height, _ = outputs["pixel_values"].shape
    return int(count * (height // processor.patch_size) ** 2)


def halved_tiles(processor: Any, outputs: Outputs) -> int:
    """Command A Vision: patches of each tile, two by two (``downsample_factor`` of its config)."""
    count, _, height, width = outputs["pixel_values"].shape
    side = processor.image_processor.patch_size
    return int(count * (height // side // 2) * (width // side // 2))


def spatial_shapes(processor: Any, outputs: Outputs) -> int:
    """LFM2-VL: per tile the patches along each side, divided by the downsampling factor and rounded up."""
    factor = int(processor.image_processor.downsample_factor)
    return sum(_ceil(int(height), factor) * _ceil(int(width), factor) for height, width in outputs["spatial_shapes"])


def phi4_crops(processor: Any, outputs: Outputs) -> int:
    """Phi-4 multimodal: 16x16 of the whole picture and of each crop, padding left out, a newline after each row, one separator."""
    side = outputs["image_pixel_values"].shape[-1]
    down, across = (int(length) // side for length in outputs["image_sizes"][0])
    crops = outputs["image_attention_mask"][0, 1 : 1 + down * across, ::2, ::2]
    high, wide = crops.shape[-2:]
    mask = crops.reshape(down, across, high, wide).transpose(1, 2).reshape(down * high, across * wide)
    rows, columns = int(mask[:, 0].sum()), int(mask[0].sum())
    return high * (wide + 1) + 1 + rows * (columns + 1)


def pooled_tiles(key: str) -> Rows:
    """Perception LM: patches of each tile or frame, pooled."""

    def rows(processor: Any, outputs: Outputs) -> int:
        _, count, _, height, width = outputs[key].shape
        side = processor.patch_size
        return int(count * (height // side // processor.pooling_ratio) * (width // side // processor.pooling_ratio))

    return rows


def placed_patches(key: str, part: str) -> Rows:
    """Gemma 4: patches that have a place (padding is at -1), pooled."""

    def rows(processor: Any, outputs: Outputs) -> int:
        return int((outputs[key][..., 0] >= 0).sum()) // int(getattr(processor, part).pooling_kernel_size) ** 2

    return rows


def quartered_frames(processor: Any, outputs: Outputs) -> int:
    """Gemma 4: frames that are no padding, halved twice by convolutions, rounded up."""
    return _ceil(int(outputs["input_features_mask"].sum()), 4)


def whisper_frames(processor: Any, outputs: Outputs) -> int:
    """Qwen2-Audio and Qwen2.5-Omni: a convolution of stride 2, then pooling by 2."""
    return ((int(outputs["feature_attention_mask"].sum()) - 1) // 2 + 1 - 2) // 2 + 1


def chunked_frames(processor: Any, outputs: Outputs) -> int:
    """Qwen3-Omni: 13 rows for each ``2 * n_window`` frames (100 as released); the rest is halved three times, rounded up."""
    whole, rest = divmod(int(outputs["feature_attention_mask"].sum()), 2 * processor.n_window)
    return int(whole * 13 + _ceil(_ceil(_ceil(rest, 2), 2), 2))


def compressed_video(processor: Any, outputs: Outputs) -> int:
    """VideoLLaMA 3: the patches that differ enough from the frame before."""
    return int(outputs["video_compression_mask"].sum())


def resampled_slices(key: str, part: str) -> Rows:
    """MiniCPM-V 4.6: per slice its patches, merged four or sixteen to one."""

    def rows(processor: Any, outputs: Outputs) -> int:
        divisor = 4 if getattr(processor, part).downsample_mode == "4x" else 16
        return sum(int(height) * int(width) // divisor for height, width in outputs[key])

    return rows


def _sides(processor: Any, outputs: Outputs, key: str, part: str) -> tuple[int, int, int]:
    merge = int(getattr(processor, part).merge_size)
    steps, height, width = (int(side) for side in outputs[key][0])
    return steps, height // merge, width // merge


def image_grid(processor: Any, outputs: Outputs) -> tuple[Segment, ...]:
    """One grid: the picture in tokens."""
    return (Grid("image", *_sides(processor, outputs, "image_grid_thw", "image_processor")),)


def _video_grid(processor: Any, outputs: Outputs, seconds_key: str | None) -> tuple[Segment, ...]:
    seconds = float(outputs[seconds_key][0]) if seconds_key is not None else None
    return (Grid("video", *_sides(processor, outputs, "video_grid_thw", "video_processor"), seconds=seconds),)


#: One grid for the whole video (Qwen2-VL), with the seconds of one time step (Qwen2.5-VL).
video_grid: Grids = partial(_video_grid, seconds_key=None)
timed_video_grid: Grids = partial(_video_grid, seconds_key="second_per_grid_ts")


def frame_grids(processor: Any, outputs: Outputs) -> tuple[Segment, ...]:
    """One grid per time step, because timestamps stand between them (Qwen3-VL, GLM-4V)."""
    steps, height, width = _sides(processor, outputs, "video_grid_thw", "video_processor")
    return (Grid("video", 1, height, width),) * steps
