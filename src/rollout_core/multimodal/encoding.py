"""A transformers tokenizer as renderers use it: ids with character offsets, of a text's front, middle or plain letters."""

from __future__ import annotations

from typing import Any

import numpy as np

from rollout_core.errors import UnsupportedProcessorError
from rollout_core.multimodal.tracks import Encoded


class Encoder:
    """Encodes text for one tokenizer.

    Args:
        tokenizer: a fast tokenizer of transformers.
        alone: whether it comes without a processor; then nothing is put before a text, as by its own ``apply_chat_template``.

    Raises:
        UnsupportedProcessorError: it gives no character offsets.
    """

    def __init__(self, tokenizer: Any, *, alone: bool) -> None:
        self.tokenizer = tokenizer
        self._alone = alone
        self._control = frozenset(getattr(tokenizer, "added_tokens_decoder", ()))
        self._anchor = self._needs_anchor()

    def __call__(self, text: str, *, plain: bool = False, first: bool = False) -> Encoded:
        """Ids and character offsets. ``first`` adds what the tokenizer puts before a sequence, as transformers' processors do
        unless the text begins with it; ``plain`` takes control tokens as ordinary text."""
        bos = getattr(self.tokenizer, "bos_token", None)
        special = first and not self._alone and not (bos and text.startswith(bos))
        lead = "\n" if self._anchor and not first else ""
        out = self.tokenizer(
            lead + text, add_special_tokens=special, return_offsets_mapping=True, split_special_tokens=plain, verbose=False
        )
        ids = np.asarray(out["input_ids"], np.int64).reshape(-1)
        offsets = np.asarray(out["offset_mapping"], np.int64).reshape(-1, 2)
        if lead:
            skip = int((offsets[:, 1] <= len(lead)).sum())
            ids, offsets = ids[skip:], np.maximum(offsets[skip:] - len(lead), 0)
        if special and len(ids) and tuple(offsets[-1]) == (0, 0) and text:
            raise UnsupportedProcessorError(
                f"{type(self.tokenizer).__name__} adds a token after the text (id {ids[-1]}): nothing can follow; turn "
                f"that off in the tokenizer"
            )
        return Encoded(ids, offsets)

    def joined(self, before: str, after: str) -> bool:
        """Whether two texts, encoded one after the other, give the ids of the two together."""
        one, two = self(before, first=True), self(after)
        return bool(np.array_equal(np.concatenate([one.ids, two.ids]), self(before + after, first=True).ids))

    def _needs_anchor(self) -> bool:
        """Whether the tokenizer treats the front of a text unlike its middle, as SentencePiece's do."""
        self._anchor = False
        try:
            return not self.joined("a\n", "a b")
        except (KeyError, NotImplementedError) as error:
            raise UnsupportedProcessorError(
                f"{type(self.tokenizer).__name__} gives no character offsets; use a fast tokenizer"
            ) from error

    def id_of(self, text: str) -> int:
        """The id of one token. ``UnsupportedProcessorError`` if there is none."""
        found = self.tokenizer.convert_tokens_to_ids(text)
        if not isinstance(found, int) or found == getattr(self.tokenizer, "unk_token_id", None):
            raise UnsupportedProcessorError(f"{type(self.tokenizer).__name__} has no token {text!r}, which its family needs")
        return found

    def atomic(self, token_id: int) -> bool:
        """Whether an id is a control token, which a tokenizer never merges."""
        return token_id in self._control
