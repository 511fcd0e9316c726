"""Tiny random models that see (Qwen2-VL, Qwen2.5-VL, Qwen3-VL) with a tokenizer and a processor, made offline; and what they say
to a whole conversation, found without any of this package."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

VISION = ("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
SPECIAL = ("<pad>", "<eos>", "<|im_start|>", "<|im_end|>", *VISION)
SHOWN = "<|vision_start|><|image_pad|><|vision_end|>"
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% if m['content'] is string %}{{ m['content'] }}{% else %}"
    "{% for c in m['content'] %}{% if c['type'] == 'image' %}" + SHOWN + "{% elif c['type'] == 'video' %}"
    "<|vision_start|><|video_pad|><|vision_end|>{% else %}{{ c['text'] }}{% endif %}{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
FAMILIES = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")
VOCABULARY = 320
POSITIONS = 1024


def make_tokenizer() -> Any:
    """Bytes, and the special tokens."""
    words = [*SPECIAL, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    backend = Tokenizer(models.BPE({word: number for number, word in enumerate(words)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(list(SPECIAL))
    made = transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", eos_token="<|im_end|>", additional_special_tokens=list(SPECIAL[2:])
    )
    made.chat_template = TEMPLATE
    return made


def make_processor(family: str) -> Any:
    tokenizer = make_tokenizer()
    names = {"qwen2_vl": "Qwen2VL", "qwen2_5_vl": "Qwen2_5_VL", "qwen3_vl": "Qwen3VL"}
    video = transformers.Qwen3VLVideoProcessor if family == "qwen3_vl" else transformers.Qwen2VLVideoProcessor
    patch = 16 if family == "qwen3_vl" else 14
    sizes = {"shortest_edge": 4 * (2 * patch) ** 2, "longest_edge": 16 * (2 * patch) ** 2}
    return getattr(transformers, names[family] + "Processor")(
        image_processor=transformers.Qwen2VLImageProcessor(patch_size=patch, size=sizes),
        tokenizer=tokenizer,
        video_processor=video(patch_size=patch),
        chat_template=TEMPLATE,
    )


def make_model(family: str, *, tied: bool = False, seed: int = 0) -> Any:
    ids = {name: SPECIAL.index(name) for name in VISION}
    axes = [8, 4, 4] if family == "qwen3_vl" else [4, 6, 6]
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": axes}
    text = {
        "vocab_size": VOCABULARY,
        "hidden_size": 128,  # 4 heads of 32: vLLM's CPU attention takes no smaller ones
        "intermediate_size": 192,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": POSITIONS,
        "initializer_range": 0.3,
        "bos_token_id": None,
        "eos_token_id": SPECIAL.index("<|im_end|>"),
        "pad_token_id": 0,
        "tie_word_embeddings": tied,
        "rope_parameters": rope | ({"mrope_interleaved": True} if family == "qwen3_vl" else {}),
        **({"head_dim": 32} if family == "qwen3_vl" else {}),
    }
    common = {"depth": 2, "num_heads": 2, "spatial_merge_size": 2, "temporal_patch_size": 2, "initializer_range": 0.3}
    common |= {"in_channels": 3, "in_chans": 3}  # as the published ones say: SGLang has no default for it
    wide = {"hidden_size": 64, "intermediate_size": 128, "out_hidden_size": 128}
    vision = {
        "qwen2_vl": {**common, "embed_dim": 64, "hidden_size": 128, "mlp_ratio": 2, "patch_size": 14},
        "qwen2_5_vl": {**common, **wide, "patch_size": 14, "window_size": 112, "fullatt_block_indexes": [1]},
        "qwen3_vl": {**common, **wide, "patch_size": 16, "num_position_embeddings": 64, "deepstack_visual_indexes": [0]},
    }[family]
    config = transformers.CONFIG_MAPPING[family](
        text_config=text,
        vision_config=vision,
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
        tie_word_embeddings=tied,
    )
    torch.manual_seed(seed)
    made = transformers.AutoModelForImageTextToText.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        made.lm_head.weight[list(ids.values())] = 0  # hardly ever said: transformers would look for a picture there
    return made


def make(folder: Path, family: str, *, tied: bool = False) -> Any:
    """The model, which is also saved there with its processor."""
    model = make_model(family, tied=tied)
    model.save_pretrained(folder)
    make_processor(family).save_pretrained(folder)
    return model


def changed(model: Any, seed: int) -> Any:
    """The model with other weights everywhere, in the tower that sees too."""
    other, generator = copy.deepcopy(model), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tensor in other.parameters():
            tensor += 0.05 * torch.randn(tensor.shape, generator=generator)
    return other


def picture(seed: int, width: int = 112, height: int = 84) -> Image.Image:
    """Noise: no two alike."""
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


class Whole:
    """A conversation written down by hand, piece by piece: text, pictures, sampled ids. It knows what is a picture because it was
    told so, and never looks for one among the ids."""

    def __init__(self, processor: Any) -> None:
        self.processor = processor
        self.compact: list[int] = []
        self.ids: list[int] = []
        self.types: list[int] = []  # 1 for a picture's tokens
        self.pictures: list[Image.Image] = []

    def text(self, text: str) -> Whole:
        return self.sampled(self.processor.tokenizer.encode(text, add_special_tokens=False))

    def sampled(self, ids: list[int]) -> Whole:
        self.compact += ids
        self.ids += ids
        self.types += [0] * len(ids)
        return self

    def show(self, image: Image.Image) -> Whole:
        self.text("<|vision_start|>")
        grid = self.processor.image_processor(images=[image], return_tensors="pt")["image_grid_thw"][0]
        length = int(grid.prod()) // 4
        self.compact.append(SPECIAL.index("<|image_pad|>"))
        self.ids += [SPECIAL.index("<|image_pad|>")] * length
        self.types += [1] * length
        self.pictures.append(image)
        return self.text("<|vision_end|>")

    @torch.no_grad()
    def greedy(self, model: Any, steps: int, ends: tuple[int, ...] = ()) -> list[int]:
        """What the model says to all of it, each token from a forward pass of its own over everything."""
        found: list[int] = []
        seen = self.processor.image_processor(images=self.pictures, return_tensors="pt") if self.pictures else {}
        while len(found) < steps and not (found and found[-1] in ends):
            ids, types = torch.tensor([self.ids + found]), torch.tensor([self.types + [0] * len(found)])
            mask = torch.ones_like(ids)
            grids = {"image_grid_thw": seen["image_grid_thw"]} if seen else {}
            positions, _ = model.model.get_rope_index(ids, mm_token_type_ids=types, attention_mask=mask, **grids)
            logits = model(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False, **seen).logits
            found.append(int(logits[0, -1].argmax()))
        return found
