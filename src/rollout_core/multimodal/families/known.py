"""The families that this package knows. Every rule was compared with one call over all items, in transformers 5.23.

Where a single item does not come out as it does among others, the family (or one of its modalities) either needs a setting, a
``Pin``, or is refused with the reason. The text that stands for an item must not depend on its neighbours either.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from operator import attrgetter
from typing import Any, Final

import torch

from rollout_core.multimodal.families import rows
from rollout_core.multimodal.families.family import Family, Pin, Support
from rollout_core.multimodal.merge import Cat, OutputRule, Outputs, PadCat, PerToken, Rebuild, Spans

_IMAGE: Final = attrgetter("image_token")
_VIDEO: Final = attrgetter("video_token")
_AUDIO: Final = attrgetter("audio_token")
_CAT: Final = Cat()
_TYPES: Final = PerToken((("image", 1), ("video", 2), ("audio", 3)))
_GRID_IMAGES: Final[Mapping[str, OutputRule]] = {"pixel_values": _CAT, "image_grid_thw": _CAT}
_GRID_VIDEOS: Final[Mapping[str, OutputRule]] = {"pixel_values_videos": _CAT, "video_grid_thw": _CAT}
_SOUNDS: Final[Mapping[str, OutputRule]] = {"input_features": _CAT, "feature_attention_mask": _CAT}
_MASKED_SOUNDS: Final[Mapping[str, OutputRule]] = {"input_features": _CAT, "input_features_mask": _CAT}
#: Padding to the longest clip of a call changes the features of the last frames of a shorter one, or their signs of zero.
_FULL_LENGTH: Final = Pin("audio_kwargs", "padding", "max_length", "a clip's features then depend on the longest clip of the call")


def _text(text: str) -> Callable[[Any], str]:
    return lambda processor: text


def _grid_image() -> Support:
    return Support(_IMAGE, _IMAGE, rows.merged_grid("image_grid_thw", "image_processor"), rows.image_grid)


def _grid_video(grids: rows.Grids | None, feature: Callable[[Any], str] = _VIDEO) -> Support:
    return Support(_VIDEO, feature, rows.merged_grid("video_grid_thw", "video_processor"), grids)


def _image(count: rows.Rows, feature: Callable[[Any], str] = _IMAGE, *, pins: tuple[Pin, ...] = ()) -> Mapping[str, Support]:
    return {"image": Support(_IMAGE, feature, count, pins=pins)}


def _refused(name: str, processors: Sequence[str], reason: str) -> Family:
    return Family(name, tuple(processors), refuse=reason)


def cross_attention(length: int, items: Sequence[Outputs], spans: Sequence[Spans]) -> torch.Tensor:
    """Mllama's ``cross_attention_mask``, int64 (1, length, items, tiles): which tokens look at which tiles.

    A picture is seen from its token up to the next picture's; pictures side by side are seen up to the end of the last of them
    (transformers 5.23, processing_mllama.py, ``get_cross_attention_token_mask``).
    """
    starts = [runs[0][0] for runs in spans]
    mask = torch.zeros(1, length, len(items), items[0]["aspect_ratio_mask"].shape[-1], dtype=torch.int64)
    for index, outputs in enumerate(items):
        after = index + 1
        while after < len(items) and starts[after] == starts[after - 1] + 1:
            after += 1
        stop = starts[after] if after < len(items) else length
        mask[0, starts[index] : stop, index, : int(outputs["aspect_ratio_mask"].sum())] = 1
    return mask


_QWEN: Final = (
    Family(
        "qwen2-vl",
        ("Qwen2VLProcessor",),
        {"image": _grid_image(), "video": _grid_video(rows.video_grid)},
        {**_GRID_IMAGES, **_GRID_VIDEOS},
        {"mm_token_type_ids": _TYPES},
        positions="qwen2-vl@2",
    ),
    Family(
        "qwen2.5-vl",
        ("Qwen2_5_VLProcessor",),
        {"image": _grid_image(), "video": _grid_video(rows.timed_video_grid)},
        {**_GRID_IMAGES, **_GRID_VIDEOS, "second_per_grid_ts": _CAT},
        {"mm_token_type_ids": _TYPES},
        positions="qwen2.5-vl@2",
    ),
    Family(
        "qwen3-vl",
        ("Qwen3VLProcessor",),
        {"image": _grid_image(), "video": _grid_video(rows.frame_grids)},
        {**_GRID_IMAGES, **_GRID_VIDEOS},
        {"mm_token_type_ids": _TYPES},
        positions="qwen3-vl@1",
    ),
    Family(
        "qwen2-audio",
        ("Qwen2AudioProcessor",),
        {"audio": Support(_AUDIO, _AUDIO, rows.whisper_frames)},
        _SOUNDS,
    ),
    # Positions with sound in them have no rule yet; the name says which it would be.
    Family(
        "qwen2.5-omni",
        ("Qwen2_5OmniProcessor",),
        {"image": _grid_image(), "video": _grid_video(None), "audio": Support(_AUDIO, _AUDIO, rows.whisper_frames)},
        {**_GRID_IMAGES, **_GRID_VIDEOS, **_SOUNDS, "video_second_per_grid": _CAT},
        positions="qwen2.5-omni@1",
    ),
    Family(
        "qwen3-omni",
        ("Qwen3OmniMoeProcessor",),
        {
            "image": _grid_image(),
            "video": _grid_video(None),
            "audio": Support(_AUDIO, _AUDIO, rows.chunked_frames, pins=(_FULL_LENGTH,)),
        },
        {**_GRID_IMAGES, **_GRID_VIDEOS, **_SOUNDS, "video_second_per_grid": _CAT},
        positions="qwen3-omni@1",
    ),
)

_GOOGLE: Final = (
    # The placeholder is <start_of_image>; crops of pan-and-scan add text and tiles to the same item.
    Family(
        "gemma3",
        ("Gemma3Processor",),
        _image(rows.tiles("image_seq_length"), attrgetter("tokenizer.image_token")),
        {"pixel_values": _CAT},
        {"token_type_ids": PerToken((("image", 1),))},
    ),
    Family(
        "gemma3n",
        ("Gemma3nProcessor",),
        {
            **_image(rows.tiles("image_seq_length")),
            "audio": Support(_AUDIO, _AUDIO, rows.constant("audio_seq_length"), pins=(_FULL_LENGTH,)),
        },
        {"pixel_values": _CAT, **_MASKED_SOUNDS},
        {"token_type_ids": PerToken((("image", 1), ("audio", 3)))},
    ),
    Family(
        "gemma4",
        ("Gemma4Processor",),
        {
            **_image(rows.placed_patches("image_position_ids", "image_processor")),
            "video": Support(_VIDEO, _VIDEO, rows.placed_patches("video_position_ids", "video_processor")),
            "audio": Support(_AUDIO, _AUDIO, rows.quartered_frames, pins=(_FULL_LENGTH,)),
        },
        {
            **dict.fromkeys(("pixel_values", "image_position_ids"), _CAT),
            **dict.fromkeys(("pixel_values_videos", "video_position_ids", "num_frames_per_video"), _CAT),
            **_MASKED_SOUNDS,
        },
        {"mm_token_type_ids": _TYPES},
    ),
    _refused(
        "paligemma",
        ("PaliGemmaProcessor",),
        "it writes <bos> after the last picture and a newline after the text, so its text does not grow by appending",
    ),
)

_GLM_VISION: Final = {"image": _grid_image(), "video": _grid_video(rows.frame_grids, _IMAGE)}

_GRIDS: Final = (
    # A frame of a video is written with the picture's token, between timestamps.
    Family(
        "glm4v",
        ("Glm4vProcessor", "Glm46VProcessor"),
        _GLM_VISION,
        {**_GRID_IMAGES, **_GRID_VIDEOS},
        {"mm_token_type_ids": _TYPES},
        positions="qwen3-vl@1",
    ),
    # A video is cut into chunks of frames, one row of the grid each.
    Family(
        "kimi-k2.5",
        ("Kimi_K25Processor",),
        {"image": Support(_IMAGE, _IMAGE, rows.merged_grid("image_grid_thw", "image_processor"))}
        | {"video": Support(_VIDEO, _VIDEO, rows.pooled_grid("video_grid_thw", "video_processor"))},
        {**_GRID_IMAGES, **_GRID_VIDEOS},
    ),
    Family(
        "videollama3",
        ("VideoLlama3Processor",),
        {
            "image": Support(_IMAGE, _IMAGE, rows.merged_grid("image_grid_thw", "image_processor")),
            "video": Support(_VIDEO, _VIDEO, rows.compressed_video),
        },
        {
            **_GRID_IMAGES,
            **_GRID_VIDEOS,
            **dict.fromkeys(("image_merge_sizes", "video_merge_sizes", "video_compression_mask"), _CAT),
        },
    ),
)

_NUMBERED: Final = Pin(None, "use_image_id", False, "an item's text then has its number in the call in it")

_TILES: Final = (
    Family("llava", ("LlavaProcessor",), _image(rows.patches), {"pixel_values": _CAT}),
    # Absent tiles are zeros up to the most tiles of a picture.
    Family("llava-next", ("LlavaNextProcessor",), _image(rows.anyres), {"pixel_values": PadCat((1,)), "image_sizes": _CAT}),
    # Pictures keep their sizes, and are filled up with zeros to the highest and the widest.
    Family("pixtral", ("PixtralProcessor",), _image(rows.sized_patches), {"pixel_values": PadCat((2, 3)), "image_sizes": _CAT}),
    # Pictures and videos share pixel_values, in token order. Videos of different lengths merge here; one call cannot take them.
    Family(
        "internvl",
        ("InternVLProcessor",),
        {**_image(rows.tiles("image_seq_length")), "video": Support(_VIDEO, _IMAGE, rows.tiles("image_seq_length"))},
        {"pixel_values": _CAT},
    ),
    Family(
        "idefics3",
        ("Idefics3Processor",),
        _image(rows.tiles("image_seq_len", 1)),
        {"pixel_values": Cat(1), "pixel_attention_mask": Cat(1)},
    ),
    Family(
        "smolvlm",
        ("SmolVLMProcessor",),
        {
            **_image(rows.tiles("image_seq_len", 1)),
            "video": Support(
                _VIDEO,
                _IMAGE,
                refuse="the text of every video gives the number of frames of the longest one in the call, and videos and pictures "
                "overwrite each other's pixel_values; send the frames as pictures",
            ),
        },
        {"pixel_values": Cat(1), "pixel_attention_mask": Cat(1)},
    ),
    Family(
        "mllama",
        ("MllamaProcessor",),
        {"image": Support(_IMAGE, _IMAGE, rows.one, verbatim=True)},
        {"pixel_values": Cat(1), "aspect_ratio_ids": Cat(1), "aspect_ratio_mask": Cat(1)},
        {"cross_attention_mask": Rebuild(cross_attention)},
    ),
    Family("llama4", ("Llama4Processor",), _image(rows.shuffled_tiles, _text("<|patch|>")), {"pixel_values": _CAT}),
    Family(
        "aria",
        ("AriaProcessor",),
        _image(
            rows.aria_queries,
            pins=(
                Pin("images_kwargs", "split_image", False, "every picture's text then has the tokens of the one with most crops"),
            ),
        ),
        {"pixel_values": _CAT, "pixel_mask": _CAT},
    ),
    Family("aya-vision", ("AyaVisionProcessor",), _image(rows.square_tiles, attrgetter("img_patch_token")), {"pixel_values": _CAT}),
    Family("cohere2-vision", ("Cohere2VisionProcessor",), _image(rows.halved_tiles), {"pixel_values": _CAT}),
    Family(
        "lfm2-vl",
        ("Lfm2VlProcessor",),
        _image(rows.spatial_shapes),
        {"pixel_values": _CAT, "pixel_attention_mask": _CAT, "spatial_shapes": _CAT},
    ),
    # Absent crops are zeros, and ones in the mask.
    Family(
        "phi4-multimodal",
        ("Phi4MultimodalProcessor",),
        {
            **_image(rows.phi4_crops),
            "audio": Support(
                _AUDIO,
                _AUDIO,
                refuse="the frames past the end of a shorter clip differ from those of the clip alone, and a mask appears with the "
                "second clip",
            ),
        },
        {"image_pixel_values": PadCat((1,)), "image_sizes": _CAT, "image_attention_mask": PadCat((1,), value=1.0)},
    ),
    Family("ovis2", ("Ovis2Processor",), _image(rows.tiles("image_seq_length"), _text("<IMG_ATOM>")), {"pixel_values": _CAT}),
    # Pictures of different numbers of tiles do not fit one call, and do not merge.
    Family(
        "perception-lm",
        ("PerceptionLMProcessor",),
        {
            **_image(rows.pooled_tiles("pixel_values")),
            "video": Support(_VIDEO, _VIDEO, rows.pooled_tiles("pixel_values_videos")),
        },
        {"pixel_values": _CAT, "pixel_values_videos": _CAT},
    ),
    Family(
        "minicpm-v-4.6",
        ("MiniCPMV4_6Processor",),
        {
            "image": Support(_IMAGE, _IMAGE, rows.resampled_slices("target_sizes", "image_processor"), pins=(_NUMBERED,)),
            "video": Support(_VIDEO, _VIDEO, rows.resampled_slices("target_sizes_videos", "video_processor"), pins=(_NUMBERED,)),
        },
        {"pixel_values": Cat(-1), "target_sizes": _CAT, "pixel_values_videos": Cat(-1), "target_sizes_videos": _CAT},
    ),
)

_REFUSED: Final = (
    _refused(
        "llava-onevision",
        ("LlavaOnevisionProcessor",),
        "a picture is cut into tiles only while it is the only one, so the second picture changes the first",
    ),
    _refused(
        "deepseek-vl2",
        ("DeepseekVLV2Processor",),
        "a picture is cut into tiles only while there are at most two, so the third picture changes the others",
    ),
    _refused(
        "idefics2",
        ("Idefics2Processor",),
        "the text of a picture depends on its neighbours: pictures side by side share a token, and a space is put before a letter",
    ),
    _refused(
        "voxtral", ("VoxtralProcessor",), "its call takes no sound; only its chat template does, and it takes whole conversations"
    ),
)

_TEXT: Final = Family("text", ("PreTrainedTokenizerBase",))

KNOWN: Final[tuple[Family, ...]] = (*_QWEN, *_GOOGLE, *_GRIDS, *_TILES, *_REFUSED, _TEXT)
