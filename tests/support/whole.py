"""Random conversations over real processors, and two oracles for them that know nothing of deltas.

``whole`` renders the finished conversation and gives everything to the processor in one call. ``spliced`` renders it with a mark
for each sampled turn, gives each stretch between to the processor, and puts the sampled ids between them as they are.
"""

from __future__ import annotations

import random
import warnings
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from rollout_core.multimodal import Conversation, HFRenderer, Picture, Sound, Video

TEXTS = ("hello", " leading", "trailing ", "a\n\nb", "42", "é🦊 x", "what?", "\n", "1\n\n", "日本語", "")
ANSWERS = ("fine", "ok then.", "42 é", "a\nb", "```\nx\n```", "done\n\n", "no", " spaced ")
SIZES = ((30, 40), (80, 60), (200, 100), (100, 230), (64, 64), (300, 90), (56, 56))
_MARK = "\ue0ff"


@dataclass
class Drawn:
    """A conversation: messages with their media, and for each assistant's message what was sampled."""

    messages: list[dict[str, Any]]
    sampled: dict[int, list[int]] = field(default_factory=dict)
    raw: bool = False

    @property
    def media(self) -> list[Any]:
        return [
            part[part["type"]]
            for message in self.messages
            for part in message["content"]
            if isinstance(part, dict) and part["type"] in ("image", "video", "audio")
        ]


class Drawer:
    """Draws conversations for one processor. ``alike``: modalities whose items have one size, for processors that need it."""

    def __init__(self, processor: Any, modalities: list[str], seed: int, alike: tuple[str, ...] = ()) -> None:
        self.processor, self.modalities, self.rng, self.alike = processor, modalities, random.Random(seed), alike
        self._size = self.rng.choice(SIZES)
        self._frames = self.rng.randint(2, 5)
        self._seen: list[Any] = []

    def medium(self, modality: str) -> Any:
        again = [m for m in self._seen if m.modality == modality]
        if again and self.rng.random() < 0.15:
            return self.rng.choice(again)
        noise = np.random.default_rng(self.rng.randrange(1 << 40))
        if modality == "image":
            width, height = self._size if "image" in self.alike else self.rng.choice(SIZES)
            made: Any = Picture("RGB", (width, height), noise.integers(0, 256, (height, width, 3), dtype=np.uint8).tobytes())
        elif modality == "video":
            count = self._frames if "video" in self.alike else self.rng.randint(2, 5)
            width, height = (56, 84) if "video" in self.alike else self.rng.choice(SIZES[:5])
            step = self.rng.randint(1, 12)
            frames = noise.integers(0, 256, (count, height, width, 3), dtype=np.uint8)
            made = Video(frames, self.rng.choice([1.0, 2.0, 23.976]), tuple(range(0, count * step, step)), count * step + 3, None)
        else:
            made = Sound((noise.standard_normal(self.rng.randint(2000, 30000)) * 0.3).astype(np.float32), 16000)
        self._seen.append(made)
        return made

    def message(self, role: str) -> dict[str, Any]:
        parts = []
        for _ in range(self.rng.randint(1, 4)):
            if self.modalities and self.rng.random() < 0.5:
                modality = self.rng.choice(self.modalities)
                parts.append({"type": modality, modality: self.medium(modality)})
            else:
                parts.append({"type": "text", "text": self.rng.choice(TEXTS)})
        return {"role": role, "content": parts}

    def conversation(self, turns: int, *, raw: bool = False) -> Drawn:
        """``raw``: sampled ids are any ids, and turns end in any way; else they are what the tokenizer gives for a text."""
        tokenizer = self.processor.tokenizer if hasattr(self.processor, "tokenizer") else self.processor
        drawn = Drawn([self.message("user")], raw=raw)
        for _ in range(turns):
            text = self.rng.choice(ANSWERS)
            ids = tokenizer(text, add_special_tokens=False)["input_ids"]
            if raw:
                ids = [self.rng.randrange(1000) for _ in range(self.rng.randint(0, 5))]
            end = tokenizer.convert_tokens_to_ids("<|im_end|>")
            if not raw or self.rng.random() < 0.5:
                ids = [*ids, end]
            drawn.sampled[len(drawn.messages)] = ids
            drawn.messages.append({"role": "assistant", "content": [{"type": "text", "text": text}]})
            drawn.messages.append(self.message("user"))
        return drawn


def grown(renderer: HFRenderer, drawn: Drawn) -> Conversation:
    """The conversation turn by turn."""
    conversation: Conversation | None = None
    for number, message in enumerate(drawn.messages):
        if number in drawn.sampled:
            assert conversation is not None
            ids = drawn.sampled[number]
            finish = "stop" if not drawn.raw else ("stop", "length", "aborted")[number % 3]
            conversation = conversation.append_sampled(ids, logprobs=[-0.5] * len(ids), finish=finish)
        elif conversation is None:
            conversation = Conversation.start(renderer, [message])
        else:
            conversation = conversation.extend([message])
    assert conversation is not None
    return conversation


def bare(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The messages as a template sees them."""
    strip = ("image", "video", "audio")
    return [{**m, "content": [{k: v for k, v in p.items() if k not in strip} for p in m["content"]]} for m in messages]


def called(
    processor: Any, text: str, media: list[Any], more: dict[str, Any], *, nested: bool = True, **options: Any
) -> dict[str, Any]:
    """The processor's own outputs for a text and all its media at once; ``nested`` gives pictures as those of one conversation."""
    of = {kind: [item for item in media if item.modality == kind] for kind in ("image", "video", "audio")}
    arguments = dict(more)
    if of["image"]:
        pictures = [item.to_pil() for item in of["image"]]
        arguments["images"] = [pictures] if nested else pictures
    if of["video"]:
        arguments["videos"] = [item.frames.copy() for item in of["video"]]
        shown = {"video_metadata": [item.metadata() for item in of["video"]], "do_sample_frames": False}
        arguments["videos_kwargs"] = {**more.get("videos_kwargs", {}), **shown}
    if of["audio"]:
        arguments["audio"] = [item.samples.copy() for item in of["audio"]]
        arguments["audio_kwargs"] = {**more.get("audio_kwargs", {}), "sampling_rate": 16000}
    with quiet():
        return dict(processor(text=[text], return_tensors="pt", **options, **arguments).items())


def quiet() -> Any:
    """numpy 2 warns of how some processors turn tensors into arrays (GLM's search for token types, MiniCPM's videos)."""
    return warnings.catch_warnings(action="ignore", category=DeprecationWarning)


def call(processor: Any, text: str, media: list[Any], more: dict[str, Any], *, first: bool = True) -> dict[str, Any]:
    """The call that transformers' own ``apply_chat_template(tokenize=True)`` makes. ``first``: the text begins the sequence."""
    bos = processor.tokenizer.bos_token
    special = first and not (bos and text.startswith(bos))
    return called(processor, text, media, more, add_special_tokens=special)


def whole(processor: Any, drawn: Drawn, more: dict[str, Any]) -> dict[str, Any]:
    """Everything at once."""
    text = processor.apply_chat_template(bare(drawn.messages), tokenize=False)
    return call(processor, text, drawn.media, more)


def spliced(processor: Any, drawn: Drawn, more: dict[str, Any]) -> list[int]:
    """Expanded ids, with sampled ids verbatim."""
    marked = [
        {"role": "assistant", "content": [{"type": "text", "text": _MARK}]} if number in drawn.sampled else message
        for number, message in enumerate(drawn.messages)
    ]
    stretches = processor.apply_chat_template(bare(marked), tokenize=False).split(_MARK)
    media, turns = list(drawn.media), list(drawn.sampled.values())
    ids: list[int] = []
    taken = 0
    at = 0
    for index, stretch in enumerate(stretches):
        count = sum(len([p for p in m["content"] if p["type"] in ("image", "video", "audio")]) for m in drawn.messages[at : at + 1])
        inside, taken = media[taken : taken + count], taken + count
        part = call(processor, stretch, inside, more, first=index == 0)["input_ids"][0].tolist()
        if index and part[0] == processor.tokenizer.bos_token_id:
            part = part[1:]  # Mllama's call writes one in front of every text that has none
        if index and ids and ids[-1] == part[0] and turns[index - 1]:
            part = part[1:]
        ids += part
        if index < len(turns):
            ids += turns[index]
        at += 2
    return ids


def raw_bytes(value: Any) -> Any:
    """Dtype, shape and bytes of a tensor; other values as they are."""
    if not isinstance(value, torch.Tensor):
        return value
    flat = value.contiguous().reshape(-1)
    return value.dtype, tuple(value.shape), (flat.view(torch.uint8) if flat.numel() else flat).numpy().tobytes()


def differences(conversation: Conversation, processor: Any, drawn: Drawn, more: dict[str, Any]) -> list[str]:
    """What of a grown conversation is not what processing it whole gives; empty if nothing."""
    found = []
    if drawn.raw:
        expected, got = spliced(processor, drawn, more), conversation.input_ids.tolist()
        if expected != got:
            found.append(f"ids: {_first(expected, got)}")
        return found + _tracks(conversation)
    oracle = whole(processor, drawn, more)
    expected, got = oracle.pop("input_ids")[0].tolist(), conversation.input_ids.tolist()
    if expected != got:
        found.append(f"ids: {_first(expected, got)}")
    oracle.pop("attention_mask", None)
    merged = conversation.multi_modal_inputs()
    if "token_type_ids" in oracle and "token_type_ids" not in merged and not oracle["token_type_ids"].any():
        del oracle["token_type_ids"]
    found += [f"output {key!r} is {'missing' if key in oracle else 'new'}" for key in sorted(oracle.keys() ^ merged.keys())]
    found += [
        f"output {key!r} differs"
        for key in sorted(oracle.keys() & merged.keys())
        if raw_bytes(oracle[key]) != raw_bytes(merged[key])
    ]
    return found + _tracks(conversation)


def _tracks(conversation: Conversation) -> list[str]:
    found = []
    ids, compact, spans = conversation.input_ids, conversation.compact_ids, conversation.span_map
    if spans.expand(compact).tolist() != ids.tolist() or spans.compact_ids(ids).tolist() != compact.tolist():
        found.append("the tracks do not expand into each other")
    lengths = {
        len(ids),
        len(conversation.loss_mask),
        len(conversation.logprobs),
        conversation.position_ids.shape[1],
        len(conversation),
    }
    if len(lengths) != 1:
        found.append(f"arrays have lengths {lengths}")
    return found


def _first(expected: list[int], got: list[int]) -> str:
    at = next((i for i, (a, b) in enumerate(zip(expected, got, strict=False)) if a != b), min(len(expected), len(got)))
    return (
        f"first at {at}: {expected[at - 3 : at + 4]} expected, {got[at - 3 : at + 4]} came; {len(expected)} and {len(got)} in all"
    )
