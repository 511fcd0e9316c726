"""Models that see: a small one made on the spot with its processor, offline, and the processor of a folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

import torch

from rollout_core.errors import WorkerError
from rollout_core.transfer.targets import named_weights

_VISION: Final = ("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
_SPECIAL: Final = ("<pad>", "<|im_start|>", "<|im_end|>", *_VISION)
_TEMPLATE: Final = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% if m['content'] is string %}{{ m['content'] }}{% else %}"
    "{% for part in m['content'] %}{% if part['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
_PATCH: Final = 14
_TOKEN: Final = (2 * _PATCH) ** 2  # pixels of a picture for each of its tokens


def make_small_vision_model(folder: Path, *, heads: int = 6, head_dim: int = 20) -> None:
    """Write a random Qwen2.5-VL of about 0.5 million float32 parameters with its processor: two layers that see and two that speak,
    tied embeddings, a tokenizer of bytes, and EOS ids that are met. ``heads`` and ``head_dim``: as of ``make_small_model``.

    It hardly ever says a placeholder: it would be taken for the place of a picture that is not there.
    """
    import transformers

    ids = {name: _SPECIAL.index(name) for name in _VISION}
    words = [*_SPECIAL, *_letters()]
    end = _SPECIAL.index("<|im_end|>")
    time = head_dim // 8
    text = {
        "vocab_size": len(words),
        "hidden_size": heads * head_dim,
        "intermediate_size": 192,
        "num_hidden_layers": 2,
        "num_attention_heads": heads,
        "num_key_value_heads": 2,
        "max_position_embeddings": 1024,
        "initializer_range": 0.3,
        "bos_token_id": None,
        "eos_token_id": [end, 57, 100, 200],
        "pad_token_id": 0,
        "tie_word_embeddings": True,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 10000.0,
            "mrope_section": [time, (head_dim // 2 - time + 1) // 2, (head_dim // 2 - time) // 2],
        },
    }
    vision = {
        "depth": 2,
        "hidden_size": 64,
        "intermediate_size": 128,
        "out_hidden_size": heads * head_dim,
        "num_heads": 2,
        "patch_size": _PATCH,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
        "window_size": 112,
        "fullatt_block_indexes": [1],
        "initializer_range": 0.3,
        "in_channels": 3,
        "in_chans": 3,  # as the published ones say: SGLang has no default for it
    }
    config = transformers.Qwen2_5_VLConfig(
        text_config=text,
        vision_config=vision,
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
        tie_word_embeddings=True,
    )
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        model = transformers.Qwen2_5_VLForConditionalGeneration(config).float()
    with torch.no_grad():
        model.lm_head.weight[list(ids.values())] = 0
    model.save_pretrained(folder)
    _save_processor(folder, words)


def load_processor(folder: Path) -> Any:
    """The processor of a model that sees. Without torchvision it has the image processor's other backend, and takes no videos.

    ``WorkerError`` if the folder has none that can be loaded.
    """
    from transformers import AutoProcessor
    from transformers.utils import is_torchvision_available

    try:
        try:
            return AutoProcessor.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
        except ImportError:
            if is_torchvision_available():
                raise
            return _without_videos(folder)
    except Exception as error:  # transformers raises many kinds; what the operator needs is the folder and the cause
        raise WorkerError(f"the processor in {folder} could not be loaded: {type(error).__name__}: {error}") from error


def sees(model: Any) -> bool:
    """Whether a model takes pictures."""
    return hasattr(model.config, "vision_config")


def placeholders(config: Any) -> set[int]:
    """The ids that say where pictures are, of a model's config: they have no place in a prompt of text."""
    names = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id", "image_token_index")
    found = (getattr(config, name, None) for name in names)
    return {one for one in found if isinstance(one, int)}


def seeing_weights(model: Any) -> frozenset[str]:
    """The names of the tensors that make something of pixels: those of neither the model of text nor its head."""
    text = [model.get_decoder(), model.get_output_embeddings()]
    theirs = {id(tensor) for module in text for tensor in (*module.parameters(), *module.buffers())}
    return frozenset(name for name, tensor in named_weights(model).items() if id(tensor) not in theirs)


def _letters() -> list[str]:
    from tokenizers import pre_tokenizers

    return sorted(pre_tokenizers.ByteLevel.alphabet())


def _save_processor(folder: Path, words: list[str]) -> None:
    import transformers
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers.utils import is_torchvision_available

    backend = Tokenizer(models.BPE({word: number for number, word in enumerate(words)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(list(_SPECIAL))
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", eos_token="<|im_end|>", additional_special_tokens=list(_VISION)
    )
    tokenizer.chat_template = _TEMPLATE
    size = {"shortest_edge": 4 * _TOKEN, "longest_edge": 16 * _TOKEN}
    if not is_torchvision_available():  # a processor of transformers cannot be saved without its part for videos
        tokenizer.save_pretrained(folder)
        transformers.Qwen2VLImageProcessorPil(patch_size=_PATCH, size=size).save_pretrained(folder)
        return
    transformers.Qwen2_5_VLProcessor(
        image_processor=transformers.Qwen2VLImageProcessor(patch_size=_PATCH, size=size),
        tokenizer=tokenizer,
        video_processor=transformers.Qwen2VLVideoProcessor(),
        chat_template=_TEMPLATE,
    ).save_pretrained(folder)


def _without_videos(folder: Path) -> Any:
    """The processor of a folder without its part for videos, which needs torchvision; transformers insists on one otherwise."""
    import transformers
    from transformers.models.auto.processing_auto import PROCESSOR_MAPPING_NAMES

    where: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
    config = transformers.AutoConfig.from_pretrained(str(folder), **where)
    name = PROCESSOR_MAPPING_NAMES[config.model_type]
    wanted: Any = getattr(transformers, name)

    def check(self: Any, argument: str, value: Any) -> Any:
        return None if argument == "video_processor" else wanted.check_argument_for_proper_class(self, argument, value)

    tokenizer = transformers.AutoTokenizer.from_pretrained(str(folder), **where)
    made: Any = type(name, (wanted,), {"check_argument_for_proper_class": check, "__module__": wanted.__module__})
    return made(
        image_processor=transformers.AutoImageProcessor.from_pretrained(str(folder), **where),
        tokenizer=tokenizer,
        video_processor=None,
        chat_template=tokenizer.chat_template,
    )
