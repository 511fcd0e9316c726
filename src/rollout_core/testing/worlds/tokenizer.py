"""A tokenizer in pure Python that behaves like a fast one of transformers, small and with every trap that joins have.

An id below 256 is a byte, so that any text can be encoded. Longer tokens are runs of newlines, pairs of digits, a space with the
letter after it, and a sign with the newlines after it: encoding two texts apart often differs from encoding them together, and a
policy can spell a text in ways in which no tokenizer would. Control tokens are atomic wherever they stand.
"""

from __future__ import annotations

import re
import string
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, Final

_MERGED: Final = (
    *(f"{number:02d}" for number in range(100)),
    *("\n\n\n\n", "\n\n\n", "\n\n"),
    *(f"{sign}\n\n" for sign in ".:?"),
    *(f"{sign}\n" for sign in ".:?"),
    *(f" {letter}" for letter in string.ascii_lowercase),
)
_PIECE: Final = re.compile("|".join(map(re.escape, _MERGED)) + "|.", re.DOTALL)
_BYTES: Final = 256


@dataclass
class Counts:
    """What a processor and its tokenizer were asked to do."""

    characters: int = 0
    items: int = 0


@dataclass(frozen=True)
class ControlToken:
    """What ``added_tokens_decoder`` has."""

    content: str
    special: bool = True


class FakeTokenizer:
    """``specials``: control tokens. ``bos``: one of them that is put before a sequence. ``counts`` is shared with the processor."""

    is_fast = True
    unk_token_id = None

    def __init__(self, specials: Iterable[str], *, bos: str | None = None, counts: Counts | None = None) -> None:
        self.bos_token = bos
        self.counts = counts or Counts()
        self._ids, self._texts, self._split = _vocabulary(tuple(specials))
        self.added_tokens_decoder = {self._ids[text]: ControlToken(text) for text in specials}

    def __len__(self) -> int:
        return len(self._ids)

    def get_vocab(self) -> dict[str, int]:
        return dict(self._ids)

    def convert_tokens_to_ids(self, tokens: Any) -> Any:
        if isinstance(tokens, str):
            return self._ids.get(tokens)
        return [self._ids.get(token) for token in tokens]

    def __call__(
        self,
        text: Any,
        *,
        add_special_tokens: bool = True,
        return_offsets_mapping: bool = False,
        split_special_tokens: bool = False,
        verbose: bool = True,
        **options: Any,
    ) -> dict[str, Any]:
        if not isinstance(text, str):
            rows = [self(one, add_special_tokens=add_special_tokens, split_special_tokens=split_special_tokens) for one in text]
            return {key: [row[key] for row in rows] for key in ("input_ids", "attention_mask")}
        self.counts.characters += len(text)
        ids: list[int] = []
        offsets: list[tuple[int, int]] = []
        if add_special_tokens and self.bos_token:
            ids.append(self._ids[self.bos_token])
            offsets.append((0, 0))
        at = 0
        for place, part in enumerate([text] if split_special_tokens else self._split.split(text)):
            if place % 2:
                ids.append(self._ids[part])
                offsets.append((at, at + len(part)))
            else:
                self._encode(part, at, ids, offsets)
            at += len(part)
        found: dict[str, Any] = {"input_ids": ids, "attention_mask": [1] * len(ids)}
        if return_offsets_mapping:
            found["offset_mapping"] = offsets
        return found

    def encode(self, text: str, add_special_tokens: bool = True, **options: Any) -> list[int]:
        ids: list[int] = self(text, add_special_tokens=add_special_tokens, **options)["input_ids"]
        return ids

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = False, **options: Any) -> str:
        parts = []
        for token in ids:
            if skip_special_tokens and int(token) in self.added_tokens_decoder:
                continue
            parts.append(self._texts[int(token)])
        return b"".join(parts).decode("utf-8", "replace")

    def _encode(self, text: str, at: int, ids: list[int], offsets: list[tuple[int, int]]) -> None:
        for match in _PIECE.finditer(text):
            piece, start = match.group(), at + match.start()
            if piece.isascii() and len(piece) == 1:
                ids.append(ord(piece))
                offsets.append((start, start + 1))
            elif piece in self._ids:
                ids.append(self._ids[piece])
                offsets.append((start, start + len(piece)))
            else:
                data = piece.encode()  # a lone surrogate is an error, as in Rust
                ids.extend(data)
                offsets.extend([(start, start + 1)] * len(data))


@cache
def _vocabulary(specials: tuple[str, ...]) -> tuple[dict[str, int], list[bytes], re.Pattern[str]]:
    texts = [bytes([byte]) for byte in range(_BYTES)] + [text.encode() for text in (*_MERGED, *specials)]
    ids = {f"<0x{byte:02X}>": byte for byte in range(_BYTES)}
    ids |= {text: _BYTES + place for place, text in enumerate((*_MERGED, *specials))}
    longest = sorted(specials, key=len, reverse=True)
    return ids, texts, re.compile("(" + "|".join(map(re.escape, longest)) + ")")
