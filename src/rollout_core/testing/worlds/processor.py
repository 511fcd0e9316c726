"""A processor in pure Python and numpy that is called as those of transformers: everything in one call, joined the naive way."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import torch

from rollout_core.testing.tracker_cases import SAMPLING_RATE
from rollout_core.testing.worlds.kinds import KINDS, Kind
from rollout_core.testing.worlds.templates import CONTROLS, TemplateCase
from rollout_core.testing.worlds.tokenizer import Counts, FakeTokenizer

_MEDIA = {"image": "images", "video": "videos", "audio": "audio"}


class Settings:
    """An image or video processor, or a feature extractor, as far as it has settings."""

    def __init__(self, **values: Any) -> None:
        for name, value in values.items():
            setattr(self, name, value)

    def to_dict(self) -> dict[str, Any]:
        return dict(vars(self))


class FakeProcessor:
    """``template`` writes the text, ``kind`` (of the subclass) says what items become, ``scale`` is a setting that all outputs
    depend on."""

    kind: ClassVar[Kind]

    def __init__(self, template: TemplateCase, *, scale: float = 1.0) -> None:
        self.counts = Counts()
        self.tokenizer = FakeTokenizer((*CONTROLS, *self.kind.tokens()), bos=self.kind.bos, counts=self.counts)
        self.chat_template = f"fake template {template.name}"
        self._template = template
        if "image" in self.kind.make:
            self.image_processor = Settings(scale=scale, merge_size=2)
        if "video" in self.kind.make:
            self.video_processor = Settings(scale=scale, merge_size=2)
        if "audio" in self.kind.make:
            self.feature_extractor = Settings(scale=scale, sampling_rate=SAMPLING_RATE)
        for modality, shown in self.kind.shown.items():
            setattr(self, f"{modality}_token", shown.placeholder)

    def apply_chat_template(
        self,
        conversation: Sequence[Mapping[str, Any]],
        chat_template: str | None = None,
        *,
        tools: Any = None,
        add_generation_prompt: bool = False,
        tokenize: bool = False,
        **options: Any,
    ) -> str:
        if tokenize:
            raise NotImplementedError("this processor renders; encode the text by calling it")
        shown = {modality: str(shown) for modality, shown in self.kind.shown.items()}
        return self._template.render(conversation, shown, generation=add_generation_prompt)

    def decode(self, ids: Sequence[int], **options: Any) -> str:
        return self.tokenizer.decode(ids, **options)

    def __call__(
        self,
        text: Any = None,
        images: Any = None,
        videos: Any = None,
        audio: Any = None,
        *,
        add_special_tokens: bool = True,
        return_tensors: str | None = None,
        return_text_replacement_offsets: bool = False,
        return_mm_token_type_ids: bool = True,
        **options: Any,
    ) -> dict[str, Any]:
        """``input_ids``, ``attention_mask`` and the outputs of all items together. One text; ``ValueError`` where placeholders
        and items do not match, or an item is empty."""
        given = {"image": images, "video": videos, "audio": audio}
        done = {m: self._process(m, media, options) for m, media in given.items() if media is not None and len(media)}
        texts = [text] if isinstance(text, str) else list(text)
        if len(texts) != 1:
            raise ValueError("this processor takes one text")
        whole, offsets = self._replaced(texts[0], {m: [one.replacement for one in items] for m, items in done.items()})
        ids = self.tokenizer(whole, add_special_tokens=add_special_tokens)["input_ids"]
        found: dict[str, Any] = {"input_ids": [ids], "attention_mask": [[1] * len(ids)]}
        for key, join in self.kind.joins.items():
            arrays = [one.outputs[key] for items in done.values() for one in items if key in one.outputs]
            if arrays:
                found[key] = join(arrays)
        if self.kind.undeclared and any(done.values()):
            found[self.kind.undeclared] = np.array([place for items in done.values() for place in range(len(items))])
        if return_mm_token_type_ids or "mm_token_type_ids" not in self.kind.sequence:
            for key, values in self.kind.sequence.items():
                features = {self.tokenizer.convert_tokens_to_ids(s.feature): values[m] for m, s in self.kind.shown.items()}
                found[key] = np.array([[features.get(token, 0) for token in ids]])
        if return_tensors == "pt":
            found = {key: torch.from_numpy(np.asarray(value)) for key, value in found.items()}
        if return_text_replacement_offsets:
            found["text_replacement_offsets"] = [offsets]
        return found

    def _process(self, modality: str, media: Sequence[Any], options: Mapping[str, Any]) -> list[Any]:
        if modality not in self.kind.make:
            raise ValueError(f"{type(self).__name__} takes no {_MEDIA[modality]}")
        part = getattr(self, {"image": "image_processor", "video": "video_processor", "audio": "feature_extractor"}[modality])
        metadata = options.get("videos_kwargs", {}).get("video_metadata") or [{}] * len(media)
        done = []
        for place, medium in enumerate(media):
            pixels = np.asarray(medium.convert("RGB") if hasattr(medium, "convert") else medium)
            if pixels.size == 0:
                raise ValueError(f"{modality} {place} is empty")
            self.counts.items += 1
            known = metadata[place] if modality == "video" else {}
            done.append(self.kind.make[modality](pixels, part.scale, known, len(media)))
        return done

    def _replaced(self, text: str, replacements: Mapping[str, list[str]]) -> tuple[str, list[dict[str, Any]]]:
        """The text with every placeholder replaced, and what was replaced by what, in characters."""
        by_text = {shown.placeholder: modality for modality, shown in self.kind.shown.items()}
        waiting = {modality: iter(found) for modality, found in replacements.items()}
        parts, entries, at, length = [], [], 0, 0
        for match in re.finditer("|".join(map(re.escape, by_text)) or "(?!)", text):
            modality = by_text[match.group()]
            replacement = next(waiting.get(modality, iter(())), None)
            if replacement is None:
                raise ValueError(f"the text has more placeholders {match.group()!r} than there are {_MEDIA[modality]}")
            parts += [text[at : match.start()], replacement]
            start = length + match.start() - at
            length, at = start + len(replacement), match.end()
            entries.append(
                {
                    "type": modality,
                    "text": match.group(),
                    "replacement": replacement,
                    "span": match.span(),
                    "new_span": (start, length),
                }
            )
        for modality, left in waiting.items():
            if next(left, None) is not None:
                raise ValueError(f"there are more {_MEDIA[modality]} than placeholders for them")
        return "".join([*parts, text[at:]]), entries


#: A class for each kind: processors are known by the names of their classes.
PROCESSORS: dict[str, type[FakeProcessor]] = {
    name: type(kind.class_name, (FakeProcessor,), {"kind": kind, "__module__": __name__}) for name, kind in KINDS.items()
}
