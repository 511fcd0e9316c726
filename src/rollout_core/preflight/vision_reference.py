"""A conversation with pictures, and what a transformers model says to all of it at once: no tracker, no cache, no engine."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

import torch

Message = dict[str, Any]
#: Width and height of a picture.
SIZE: Final = (112, 84)
_WIDER: Final = (140, 84)
_LARGER: Final = (112, 112)
_ANSWER: Final = "The first one, I think."


def picture(seed: int, size: tuple[int, int] = SIZE) -> Any:
    """A Pillow image of noise over a colour: no two seeds give pictures that are alike."""
    from PIL import Image

    generator = torch.Generator().manual_seed(seed)
    width, height = size
    noise = torch.randint(0, 128, (height, width, 3), generator=generator)
    colour = torch.randint(0, 128, (3,), generator=generator)
    return Image.frombytes("RGB", size, bytes((noise + colour).to(torch.uint8).flatten().tolist()))


def turns(*, exchanged: bool = False) -> list[list[Message]]:
    """What a user says in each of three turns: two pictures side by side, one of another size, and the first again beside a new
    one. ``exchanged``: the first two in the other order."""
    first, second, wider, fourth = picture(1), picture(2), picture(3, _WIDER), picture(4)
    pair = (second, first) if exchanged else (first, second)
    return [
        [_user("Look:", *pair, "Which is it?")],
        [_user(wider, "And now?")],
        [_user("Again,", first, fourth, "what is new?")],
    ]


def others(pictures: int) -> list[list[Message]]:
    """Short conversations with so many other pictures, in pairs."""
    seeds = range(100, 100 + pictures, 2)
    return [[_user(picture(seed, _LARGER), picture(seed + 1, _LARGER), "And these?")] for seed in seeds]


def answered(messages: Sequence[Message], more: Sequence[Message]) -> list[Message]:
    """Messages, the assistant's answer, and what follows it."""
    return [*messages, {"role": "assistant", "content": [{"type": "text", "text": _ANSWER}]}, *more]


def _user(*parts: Any) -> Message:
    content = [{"type": "text", "text": part} if isinstance(part, str) else {"type": "image", "image": part} for part in parts]
    return {"role": "user", "content": content}


class Reference:
    """transformers over whole conversations. ``eos``: ids that end a response."""

    def __init__(self, model: Any, processor: Any, eos: set[int]) -> None:
        self._model, self._processor, self._eos = model, processor, eos

    def inputs(self, messages: Sequence[Message]) -> dict[str, Any]:
        """What one call of the processor makes of all messages and their pictures, up to where the assistant speaks."""
        found = self._processor.apply_chat_template(
            list(messages), add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
        )
        return dict(found)

    def answer(self, messages: Sequence[Message]) -> list[int]:
        """The ids of the answer that ``answered`` puts after these messages, as the tokenizer writes them there."""
        text = self._processor.apply_chat_template(list(messages), add_generation_prompt=True, tokenize=False)

        def ids(text: str) -> list[int]:
            return list(self._processor.tokenizer(text, add_special_tokens=False)["input_ids"])

        return ids(text + _ANSWER)[len(ids(text)) :]

    @torch.no_grad()
    def greedy(self, inputs: Mapping[str, Any], length: int) -> list[int]:
        """At most ``length`` tokens, each from a forward pass over everything; the last may be an EOS."""
        found, tokens = dict(inputs), list[int]()
        while len(tokens) < length and not (tokens and tokens[-1] in self._eos):
            logits = self._model(**found, use_cache=False).logits
            tokens.append(int(logits[0, -1].argmax()))
            found = {name: _longer(name, value, tokens[-1]) for name, value in found.items()}
        return tokens


def _longer(name: str, value: Any, token: int) -> Any:
    """What the processor would have given with a token of text more."""
    if name == "input_ids":
        return torch.cat([value, torch.tensor([[token]])], 1)
    if name in ("attention_mask", "cross_attention_mask"):
        return torch.cat([value, value[:, -1:]], 1)
    if name.endswith("token_type_ids"):
        return torch.cat([value, torch.zeros_like(value[:, :1])], 1)
    return value
