"""Families whose pictures are tiles, crops or whole frames of pixels, and those that are refused.

Every rule here was compared with one call over all items, in transformers 5.23, and every reason for a refusal was seen there,
except that of DeepSeek-VL2, whose own processing_deepseek_vl_v2.py has it (``cropping=len(images) <= 2``).
"""

from __future__ import annotations

from collections.abc import Sequence
from operator import attrgetter
from typing import Final

import torch

from rollout_core.multimodal.families import rows
from rollout_core.multimodal.families.family import Family, Pin, Support
from rollout_core.multimodal.families.shared import AUDIO, CAT, IMAGE, VIDEO, image, literal, refused
from rollout_core.multimodal.merge import Cat, Outputs, PadCat, Rebuild, Spans


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


NUMBERED: Final = Pin(None, "use_image_id", False, "an item's text then has its number in the call in it")

TILES: Final = (
    Family("llava", ("LlavaProcessor",), image(rows.patches), {"pixel_values": CAT}),
    # Absent tiles are zeros up to the most tiles of a picture.
    Family("llava-next", ("LlavaNextProcessor",), image(rows.anyres), {"pixel_values": PadCat((1,)), "image_sizes": CAT}),
    # Pictures keep their sizes, and are filled up with zeros to the highest and the widest.
    Family(
        "pixtral",
        ("PixtralProcessor", "LightOnOcrProcessor"),
        image(rows.sized_patches),
        {"pixel_values": PadCat((2, 3)), "image_sizes": CAT},
    ),
    # Pictures and videos share pixel_values, in token order. Videos of different lengths merge here; one call cannot take them.
    Family(
        "internvl",
        ("InternVLProcessor",),
        {**image(rows.tiles("image_seq_length")), "video": Support(VIDEO, IMAGE, rows.tiles("image_seq_length"))},
        {"pixel_values": CAT},
    ),
    Family(
        "idefics3",
        ("Idefics3Processor",),
        image(rows.tiles("image_seq_len", 1)),
        {"pixel_values": Cat(1), "pixel_attention_mask": Cat(1)},
    ),
    Family(
        "smolvlm",
        ("SmolVLMProcessor",),
        {
            **image(rows.tiles("image_seq_len", 1)),
            "video": Support(
                VIDEO,
                IMAGE,
                refuse="the text of every video gives the number of frames of the longest one in the call, and videos and pictures "
                "overwrite each other's pixel_values; send the frames as pictures",
            ),
        },
        {"pixel_values": Cat(1), "pixel_attention_mask": Cat(1)},
    ),
    Family(
        "mllama",
        ("MllamaProcessor",),
        {"image": Support(IMAGE, IMAGE, rows.one, verbatim=True)},
        {"pixel_values": Cat(1), "aspect_ratio_ids": Cat(1), "aspect_ratio_mask": Cat(1)},
        {"cross_attention_mask": Rebuild(cross_attention)},
    ),
    Family("llama4", ("Llama4Processor",), image(rows.shuffled_tiles, literal("<|patch|>")), {"pixel_values": CAT}),
    Family(
        "aria",
        ("AriaProcessor",),
        image(
            rows.aria_queries,
            pins=(
                Pin("images_kwargs", "split_image", False, "every picture's text then has the tokens of the one with most crops"),
            ),
        ),
        {"pixel_values": CAT, "pixel_mask": CAT},
    ),
    Family("aya-vision", ("AyaVisionProcessor",), image(rows.square_tiles, attrgetter("img_patch_token")), {"pixel_values": CAT}),
    Family("cohere2-vision", ("Cohere2VisionProcessor",), image(rows.halved_tiles), {"pixel_values": CAT}),
    Family(
        "lfm2-vl",
        ("Lfm2VlProcessor",),
        image(rows.spatial_shapes),
        {"pixel_values": CAT, "pixel_attention_mask": CAT, "spatial_shapes": CAT},
    ),
    # Absent crops are zeros, and ones in the mask.
    Family(
        "phi4-multimodal",
        ("Phi4MultimodalProcessor",),
        {
            **image(rows.phi4_crops),
            "audio": Support(
                AUDIO,
                AUDIO,
                refuse="the frames past the end of a shorter clip differ from those of the clip alone, and a mask appears with the "
                "second clip",
            ),
        },
        {"image_pixel_values": PadCat((1,)), "image_sizes": CAT, "image_attention_mask": PadCat((1,), value=1.0)},
    ),
    Family("ovis2", ("Ovis2Processor",), image(rows.tiles("image_seq_length"), literal("<IMG_ATOM>")), {"pixel_values": CAT}),
    # Pictures of different numbers of tiles do not fit one call, and do not merge.
    Family(
        "perception-lm",
        ("PerceptionLMProcessor",),
        {
            **image(rows.pooled_tiles("pixel_values")),
            "video": Support(VIDEO, VIDEO, rows.pooled_tiles("pixel_values_videos")),
        },
        {"pixel_values": CAT, "pixel_values_videos": CAT},
    ),
    Family(
        "minicpm-v-4.6",
        ("MiniCPMV4_6Processor",),
        {
            "image": Support(IMAGE, IMAGE, rows.resampled_slices("target_sizes", "image_processor"), pins=(NUMBERED,)),
            "video": Support(VIDEO, VIDEO, rows.resampled_slices("target_sizes_videos", "video_processor"), pins=(NUMBERED,)),
        },
        {"pixel_values": Cat(-1), "target_sizes": CAT, "pixel_values_videos": Cat(-1), "target_sizes_videos": CAT},
    ),
)

REFUSED: Final = (
    refused(
        "llava-onevision",
        "LlavaOnevisionProcessor",
        "a picture is cut into tiles only while it is the only one, so the second picture changes the first",
    ),
    refused(
        "deepseek-vl2",
        "DeepseekVLV2Processor",
        "a picture is cut into tiles only while there are at most two, so the third picture changes the others",
    ),
    refused(
        "idefics2",
        "Idefics2Processor",
        "the text of a picture depends on its neighbours: pictures side by side share a token, and a space is put before a letter",
    ),
    refused(
        "voxtral", "VoxtralProcessor", "its call takes no sound; only its chat template does, and it takes whole conversations"
    ),
)
