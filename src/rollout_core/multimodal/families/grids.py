"""Families whose items are patches with a grid, and those that take sounds: Qwen, Gemma, GLM, Kimi and their kin.

Every rule here was compared with one call over all items, in transformers 5.23.
"""

from __future__ import annotations

from operator import attrgetter
from typing import Final

from rollout_core.multimodal.families import rows
from rollout_core.multimodal.families.family import Family, Support
from rollout_core.multimodal.families.shared import (
    AUDIO,
    CAT,
    FULL_LENGTH,
    GRID_IMAGES,
    GRID_VIDEOS,
    IMAGE,
    MASKED_SOUNDS,
    SOUNDS,
    TYPES,
    VIDEO,
    grid_image,
    grid_video,
    image,
    refused,
)
from rollout_core.multimodal.merge import PerToken

QWEN: Final = (
    Family(
        "qwen2-vl",
        ("Qwen2VLProcessor",),
        {"image": grid_image(), "video": grid_video(rows.video_grid)},
        {**GRID_IMAGES, **GRID_VIDEOS},
        {"mm_token_type_ids": TYPES},
        positions="qwen2-vl@2",
    ),
    Family(
        "qwen2.5-vl",
        ("Qwen2_5_VLProcessor",),
        {"image": grid_image(), "video": grid_video(rows.timed_video_grid)},
        {**GRID_IMAGES, **GRID_VIDEOS, "second_per_grid_ts": CAT},
        {"mm_token_type_ids": TYPES},
        positions="qwen2.5-vl@2",
    ),
    Family(
        "qwen3-vl",
        ("Qwen3VLProcessor",),
        {"image": grid_image(), "video": grid_video(rows.frame_grids)},
        {**GRID_IMAGES, **GRID_VIDEOS},
        {"mm_token_type_ids": TYPES},
        positions="qwen3-vl@1",
    ),
    Family(
        "qwen2-audio",
        ("Qwen2AudioProcessor",),
        {"audio": Support(AUDIO, AUDIO, rows.whisper_frames)},
        SOUNDS,
    ),
    # Positions with sound in them have no rule yet; the name says which it would be.
    Family(
        "qwen2.5-omni",
        ("Qwen2_5OmniProcessor",),
        {"image": grid_image(), "video": grid_video(None), "audio": Support(AUDIO, AUDIO, rows.whisper_frames)},
        {**GRID_IMAGES, **GRID_VIDEOS, **SOUNDS, "video_second_per_grid": CAT},
        positions="qwen2.5-omni@1",
    ),
    Family(
        "qwen3-omni",
        ("Qwen3OmniMoeProcessor",),
        {
            "image": grid_image(),
            "video": grid_video(None),
            "audio": Support(
                AUDIO,
                AUDIO,
                rows.chunked_frames,
                refuse="sounds must be padded to full length for one to come out as among others, and its call drops audio_kwargs "
                "(transformers 5.23)",
            ),
        },
        {**GRID_IMAGES, **GRID_VIDEOS, **SOUNDS, "video_second_per_grid": CAT},
        positions="qwen3-omni@1",
    ),
)

GOOGLE: Final = (
    # The placeholder is <start_of_image>; crops of pan-and-scan add text and tiles to the same item.
    Family(
        "gemma3",
        ("Gemma3Processor",),
        image(rows.tiles("image_seq_length"), attrgetter("tokenizer.image_token")),
        {"pixel_values": CAT},
        {"token_type_ids": PerToken((("image", 1),))},
    ),
    Family(
        "gemma3n",
        ("Gemma3nProcessor",),
        {
            **image(rows.tiles("image_seq_length")),
            "audio": Support(AUDIO, AUDIO, rows.constant("audio_seq_length"), pins=(FULL_LENGTH,)),
        },
        {"pixel_values": CAT, **MASKED_SOUNDS},
        {"token_type_ids": PerToken((("image", 1), ("audio", 3)))},
    ),
    Family(
        "gemma4",
        ("Gemma4Processor",),
        {
            **image(rows.placed_patches("image_position_ids", "image_processor")),
            "video": Support(VIDEO, VIDEO, rows.placed_patches("video_position_ids", "video_processor")),
            "audio": Support(AUDIO, AUDIO, rows.quartered_frames, pins=(FULL_LENGTH,)),
        },
        {
            **dict.fromkeys(("pixel_values", "image_position_ids"), CAT),
            **dict.fromkeys(("pixel_values_videos", "video_position_ids", "num_frames_per_video"), CAT),
            **MASKED_SOUNDS,
        },
        {"mm_token_type_ids": TYPES},
    ),
    refused(
        "paligemma",
        "PaliGemmaProcessor",
        "it writes <bos> after the last picture and a newline after the text, so its text does not grow by appending",
    ),
)

GLM_VISION: Final = {"image": grid_image(), "video": grid_video(rows.frame_grids, IMAGE)}

GRIDS: Final = (
    # A frame of a video is written with the picture's token, between timestamps.
    Family(
        "glm4v",
        ("Glm4vProcessor", "Glm46VProcessor"),
        GLM_VISION,
        {**GRID_IMAGES, **GRID_VIDEOS},
        {"mm_token_type_ids": TYPES},
        positions="qwen3-vl@1",
    ),
    # The same text and outputs, with plain positions.
    Family(
        "glm5-next",
        ("Glm5NextProcessor",),
        {"image": grid_image(None), "video": grid_video(None, IMAGE)},
        {**GRID_IMAGES, **GRID_VIDEOS},
        {"mm_token_type_ids": TYPES},
    ),
    Family(
        "patches",
        ("Exaone4_5_Processor", "Lfm3VlProcessor"),
        {"image": grid_image(None), "video": grid_video(None)},
        {**GRID_IMAGES, **GRID_VIDEOS},
    ),
    Family(
        "paddleocr-vl",
        ("PaddleOCRVLProcessor",),
        {"image": grid_image()},
        GRID_IMAGES,
        {"mm_token_type_ids": PerToken((("image", 1),))},
        positions="qwen2-vl@2",
    ),
    # A video is cut into chunks of frames, one row of the grid each.
    Family(
        "kimi-k2.5",
        ("Kimi_K25Processor",),
        {"image": grid_image(None)} | {"video": Support(VIDEO, VIDEO, rows.pooled_grid("video_grid_thw", "video_processor"))},
        {**GRID_IMAGES, **GRID_VIDEOS},
    ),
    Family(
        "videollama3",
        ("VideoLlama3Processor",),
        {
            "image": grid_image(None),
            "video": Support(VIDEO, VIDEO, rows.compressed_video),
        },
        {
            **GRID_IMAGES,
            **GRID_VIDEOS,
            **dict.fromkeys(("image_merge_sizes", "video_merge_sizes", "video_compression_mask"), CAT),
        },
    ),
)
