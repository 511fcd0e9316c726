"""A transformers tokenizer as renderers use it: ids with character offsets, of a text's front, middle or plain letters."""

from __future__ import annotations

import contextlib
import copy
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np

from rollout_core.errors import UnsupportedProcessorError
from rollout_core.multimodal.tracks import Encoded

#: Texts with which what follows should not merge, best first; and texts that they are tried with.
_LEADS = ("\n", "\x00", "a")
_AFTER_LEAD = ("a", " a", "\n", "\n\n", "1", "<")
_PLAIN: WeakKeyDictionary[Any, Any] = WeakKeyDictionary()


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
        control = dict(getattr(tokenizer, "added_tokens_decoder", {}))
        self._control = frozenset(control)
        # Not those that take the white space beside them.
        self._walls = tuple(t.content for t in control.values() if not (getattr(t, "lstrip", False) or getattr(t, "rstrip", False)))
        self._lead = self._needs_lead()

    def __call__(self, text: str, *, plain: bool = False, first: bool = False) -> Encoded:
        """Ids and character offsets. ``first`` adds what the tokenizer puts before a sequence, as transformers' processors do
        unless the text begins with it; ``plain`` takes control tokens as ordinary text."""
        bos = getattr(self.tokenizer, "bos_token", None)
        special = first and not self._alone and not (bos and text.startswith(bos))
        lead = self._lead if not first else ""
        use = self._plain() if plain else self.tokenizer
        options = {"split_special_tokens": True} if plain else {}
        out = use(lead + text, add_special_tokens=special, return_offsets_mapping=True, verbose=False, **options)
        ids = np.asarray(out["input_ids"], np.int64).reshape(-1)
        offsets = np.asarray(out["offset_mapping"], np.int64).reshape(-1, 2)
        if lead:
            skip = int((offsets[:, 1] <= len(lead)).sum())
            if not skip or offsets[skip - 1, 1] != len(lead):
                raise UnsupportedProcessorError(
                    f"{type(self.tokenizer).__name__} merges {lead!r} with {text[:20]!r}, so that the middle of a text cannot be "
                    "encoded alone"
                )
            ids, offsets = ids[skip:], np.maximum(offsets[skip:] - len(lead), 0)
        if special and len(ids) and tuple(offsets[-1]) == (0, 0) and text:
            raise UnsupportedProcessorError(
                f"{type(self.tokenizer).__name__} adds a token after the text (id {ids[-1]}): nothing can follow; turn that off in "
                "the tokenizer"
            )
        return Encoded(ids, offsets)

    def joined(self, before: str, after: str) -> bool:
        """Whether two texts, encoded one after the other, give the ids of the two together."""
        one, two = self(before, first=True), self(after)
        return bool(np.array_equal(np.concatenate([one.ids, two.ids]), self(before + after, first=True).ids))

    def apart(self, before: str, after: str) -> bool:
        """The same where a control token stands at the join, without encoding anything: no tokenizer merges across one."""
        return before.endswith(self._walls) or after.startswith(self._walls) or self.joined(before, after)

    def _needs_lead(self) -> str:
        """What to put before the middle of a text, for tokenizers that treat the front unlike it, as SentencePiece's do."""
        self._lead = ""
        try:
            if self.joined("a\n", "a b"):
                return ""
            for lead in _LEADS:
                self._lead = lead
                with contextlib.suppress(UnsupportedProcessorError):
                    if all(len(self(text).ids) for text in _AFTER_LEAD):
                        return lead
        except (KeyError, NotImplementedError) as error:
            raise UnsupportedProcessorError(
                f"{type(self.tokenizer).__name__} gives no character offsets; use a fast tokenizer"
            ) from error
        return self._lead

    def _plain(self) -> Any:
        """A tokenizer for plain text.

        transformers keeps ``split_special_tokens`` in the tokenizer itself, so that asking the shared one would change what other
        threads get.
        """
        if not hasattr(self.tokenizer, "backend_tokenizer"):
            return self.tokenizer
        if self.tokenizer not in _PLAIN:
            _PLAIN[self.tokenizer] = copy.deepcopy(self.tokenizer)
        return _PLAIN[self.tokenizer]

    def id_of(self, text: str) -> int:
        """The id of one token. ``UnsupportedProcessorError`` if there is none."""
        found = self.tokenizer.convert_tokens_to_ids(text)
        if not isinstance(found, int) or found == getattr(self.tokenizer, "unk_token_id", None):
            raise UnsupportedProcessorError(f"{type(self.tokenizer).__name__} has no token {text!r}, which its family needs")
        return found

    def atomic(self, token_id: int) -> bool:
        """Whether an id is a control token, which a tokenizer never merges."""
        return token_id in self._control
