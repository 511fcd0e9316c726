"""What a turn of a long conversation costs: at turn 20 and at turn 200, and beside rendering and processing everything again.

The processor is LLaVA's of transformers, with a byte-level tokenizer made here and a ChatML template, so that nothing has to be at
hand; a real one's tokenizer changes the milliseconds and not how they grow.
"""

from __future__ import annotations

import gc
import statistics
import time
import tracemalloc
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from rollout_core.bench.timing import Timing
from rollout_core.multimodal import Conversation, HFRenderer, Picture

EARLY, LATE = 20, 200
_NEAR = 3  # turns on either side are measured too
_SIDE = 112
_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{% if message['content'] is string %}{{ message['content'] }}"
    "{% else %}{% for part in message['content'] %}{% if part['type'] == 'image' %}<image>{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


class Turns(NamedTuple):
    """Milliseconds and peak bytes allocated of a turn, early and late; ``whole``: the same turn by processing everything again.
    ``fork``: microseconds to append one token on each of two branches at the late turn."""

    timings: dict[str, Timing]
    early_bytes: int
    late_bytes: int
    fork: float


def bench_conversation(repeats: int, *, pictures: bool = True) -> Turns:
    """Grow conversations to turn 200: sample an answer, extend by a tool's result, take the delta."""
    processor = _processor()
    renderer = HFRenderer(processor)
    assert renderer.verdict.stable
    seconds: dict[str, list[float]] = {f"turn {EARLY}": [], f"turn {LATE}": []}
    peaks: dict[int, list[int]] = {EARLY: [], LATE: []}
    last = None
    for repeat in range(repeats):
        noise = np.random.default_rng(repeat)
        conversation = Conversation.start(renderer, [{"role": "user", "content": "look around and report"}])
        for turn in range(1, LATE + 1):
            step = _turn(renderer, turn, noise if pictures else None)
            near = next((at for at in (EARLY, LATE) if abs(turn - at) <= _NEAR), None)
            traced = near is not None and repeat % 2 == 1
            gc.collect() if near else None
            gc.disable()
            if traced:
                tracemalloc.start()
            began = time.perf_counter()
            conversation = step(conversation)
            taken = time.perf_counter() - began
            if traced and near is not None:
                peaks[near].append(tracemalloc.get_traced_memory()[1])
                tracemalloc.stop()
            elif near is not None:
                seconds[f"turn {near}"].append(1e3 * taken)
            gc.enable()
        last = conversation
    assert last is not None
    for at in (EARLY, LATE):
        seconds[f"everything again at turn {at}"] = [_again(processor, last, at) for _ in range(max(3, repeats // 2))]
    timings = {name: Timing(statistics.median(taken), min(taken), max(taken)) for name, taken in seconds.items()}
    early, late = (int(statistics.median(peaks[at] or [0])) for at in (EARLY, LATE))
    return Turns(timings, early, late, _fork(last))


def _turn(renderer: HFRenderer, turn: int, noise: np.random.Generator | None) -> Callable[[Conversation], Conversation]:
    ids = renderer.encode(f"let me look at {turn}<|im_end|>").ids
    part: list[dict[str, Any]] = [{"type": "text", "text": f"this is view {turn} of the room, as asked for"}]
    if noise is not None:
        pixels = noise.integers(0, 256, 3 * _SIDE * _SIDE, dtype=np.uint8).tobytes()
        part.insert(0, {"type": "image", "image": Picture("RGB", (_SIDE, _SIDE), pixels)})

    def step(conversation: Conversation) -> Conversation:
        grown = conversation.append_sampled(ids, logprobs=[-0.5] * len(ids)).extend([{"role": "tool", "content": part}])
        grown.delta(conversation)
        return grown

    return step


def _again(processor: Any, conversation: Conversation, turn: int) -> float:
    """Milliseconds for rendering, encoding and processing all messages up to a turn."""
    messages = conversation.messages[: 1 + 2 * turn]
    pictures = [item.payload.media.to_pil() for item in conversation.items[:turn] if isinstance(item.payload.media, Picture)]
    began = time.perf_counter()
    text = processor.apply_chat_template(list(messages), tokenize=False)
    processor(text=[text], images=pictures or None, return_tensors="pt")
    return 1e3 * (time.perf_counter() - began)


def _fork(conversation: Conversation) -> float:
    """Microseconds to go two ways from one conversation: one sampled token is appended on each.

    The fork itself is a second reference and copies nothing, so that alone there would be nothing to measure.
    """
    rounds = 1000
    here = conversation.with_generation_prompt()
    began = time.perf_counter()
    for _ in range(rounds):
        there = here
        here.append_sampled([0])
        there.append_sampled([1])
    return 1e6 * (time.perf_counter() - began) / rounds


def _processor() -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import CLIPImageProcessorPil, LlavaProcessor, PreTrainedTokenizerFast

    words = {letter: place for place, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    backend = Tokenizer(models.BPE(vocab=words, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token="<|im_end|>",
        additional_special_tokens=["<|im_start|>"],
        extra_special_tokens={"image_token": "<image>"},
    )
    size = {"height": _SIDE, "width": _SIDE}
    image = CLIPImageProcessorPil(size={"shortest_edge": _SIDE}, crop_size=size)
    return LlavaProcessor(
        image,
        tokenizer,
        patch_size=14,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=_TEMPLATE,
    )
