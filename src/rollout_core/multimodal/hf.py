"""The renderer for tokenizers and processors of transformers, or anything that behaves like them."""

from __future__ import annotations

import contextlib
import copy
import hashlib
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any
from weakref import WeakValueDictionary

import numpy as np

from rollout_core.errors import ConversationError, MediaError, RolloutCoreError, UnstableTemplateError, UnsupportedProcessorError
from rollout_core.multimodal import templates
from rollout_core.multimodal.contents import Marks, Write, bounds_of, contents_of, guard, marks_for
from rollout_core.multimodal.deltas import Item, Payload
from rollout_core.multimodal.encoding import Encoder
from rollout_core.multimodal.families import Family, family_of
from rollout_core.multimodal.fingerprint import processor_fingerprint, tokenizer_fingerprint
from rollout_core.multimodal.identity import artifact_identity
from rollout_core.multimodal.layout import Laid, Medium, Script, lay_out, media_in
from rollout_core.multimodal.loading import load_picture, load_sound, load_video
from rollout_core.multimodal.media import WHITE, Media, Picture, Sound, Video
from rollout_core.multimodal.messages import MediaSource, Messages, replaced, texts
from rollout_core.multimodal.positions import PositionRule, rule
from rollout_core.multimodal.processing import merge_outputs, process_one, sequence_outputs
from rollout_core.multimodal.renderer import Past, Tools
from rollout_core.multimodal.templates import Verdict
from rollout_core.multimodal.tracks import Ids, overlap
from rollout_core.multimodal.values import check_colour

#: Verdicts by the hash of template, its settings and tokenizer: probing one takes a moment, and a trainer makes many renderers.
_VERDICTS: dict[str, Verdict] = {}
_TOOL = {
    "type": "function",
    "function": {
        "name": "look",
        "description": "look somewhere",
        "parameters": {"type": "object", "properties": {"where": {"type": "string"}}, "required": ["where"]},
    },
}


class HFRenderer:
    """Renders with a chat template of transformers, and processes items one at a time with its processor.

    Args:
        processor: a processor, or a tokenizer for text alone. It must have a fast tokenizer (character offsets) and a chat
            template.
        chat_template: another template (Jinja) instead of the processor's own.
        template_kwargs: passed to the template, e.g. ``{"enable_thinking": False}``.
        processor_kwargs: passed to the processor for every item, e.g. ``{"images_kwargs": {"do_pan_and_scan": True}}``.
        background: RGB colour under transparent pixels.
        positions: a position rule or its full name; by default that of the processor's family.
        vocab_size: sampled ids are below it; by default the tokenizer's length. Models with padded embeddings can sample more.
        family: how the processor's outputs merge; by default found by its class name.
        check_history: compare every addition with the render of the whole past, instead of trusting what probing found. A turn then
            costs in proportion to the history.

    Threads may share a renderer, as far as the processor itself allows; two that add the same new picture may both process it.

    Raises:
        UnsupportedProcessorError: no chat template, no character offsets, or a family that is unknown or cannot be taken apart.
        UnstableTemplateError: a template that cannot render a user and an assistant message one after the other.
    """

    def __init__(
        self,
        processor: Any,
        *,
        chat_template: str | None = None,
        template_kwargs: Mapping[str, Any] | None = None,
        processor_kwargs: Mapping[str, Any] | None = None,
        background: tuple[int, int, int] = WHITE,
        positions: PositionRule | str | None = None,
        vocab_size: int | None = None,
        family: Family | None = None,
        check_history: bool = False,
    ) -> None:
        self.processor = processor
        self.tokenizer = getattr(processor, "tokenizer", processor)
        if not callable(self.tokenizer) or not hasattr(self.tokenizer, "convert_tokens_to_ids"):
            raise UnsupportedProcessorError(f"a {type(processor).__name__} is no tokenizer, and no processor with one")
        self.encode = Encoder(self.tokenizer, alone=self.tokenizer is processor)
        self.family = family or family_of(processor)
        self.family.check(processor)
        self._template = chat_template or getattr(processor, "chat_template", None)
        if not self._template:
            raise UnsupportedProcessorError(f"{type(processor).__name__} has no chat template; give chat_template=")
        self._check_history = check_history
        self._words = len(self.tokenizer)
        self._own_template = chat_template is not None
        self._template_kwargs = dict(template_kwargs or {})
        self._processor_kwargs = dict(processor_kwargs or {})
        self._background = check_colour(background, "background")
        self.rule: PositionRule = positions if isinstance(positions, PositionRule) else _rule(positions, self.family)
        self.vocab_size: int = len(self.tokenizer) if vocab_size is None else vocab_size
        self._usable = {m: s for m, s in self.family.modalities.items() if s.refuse is None}
        self._placeholders = {m: s.placeholder(processor) for m, s in self._usable.items()}
        self._feature_ids = {m: (self.encode.id_of(s.feature(processor)),) for m, s in self._usable.items()}
        self._artifact = self._processing_fingerprint()
        self._payloads: WeakValueDictionary[str, Payload] = WeakValueDictionary()

    def __repr__(self) -> str:
        return f"<HFRenderer of {type(self.processor).__name__}, family {self.family.name!r}, positions {self.rule.name!r}>"

    # ---------------------------------------------------------------- Renderer

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 (hex) over template, template settings, tokenizer, processor with its settings, background and position rule."""
        return _sha(self._template_key, self._artifact, self.rule.name)

    @cached_property
    def verdict(self) -> Verdict:
        """What probing the template found."""
        if self._template_key not in _VERDICTS:
            verdict = self._probe(None)
            # Without a second opinion from a template that cannot render tools.
            with contextlib.suppress(UnstableTemplateError):
                verdict = templates.both(verdict, self._probe((_TOOL,)))
            _VERDICTS[self._template_key] = verdict
        return _VERDICTS[self._template_key]

    def begin(self, messages: Messages, tools: Tools) -> Laid:
        """The first tokens of a conversation."""
        marks = marks_for([*texts(list(messages.items)), *texts(list(tools or ()))])
        guards: dict[str, str] = {}
        guarded = None if tools is None else [self._guarded(tool, guards, marks) for tool in tools]

        def write(given: Sequence[Mapping[str, Any]]) -> tuple[str, ...]:
            pieces = templates.begin(self._render_with(guarded), self.verdict, given)
            self._check_front("".join(pieces))
            return pieces

        return self._lay_out(messages, 0, "", np.zeros(0, np.int64), write, marks, guards, first=True)

    def add(self, past: Past, messages: Messages, tools: Tools) -> Laid:
        """Tokens that messages add, with those that end a sampled turn before them."""

        def write(given: Sequence[Mapping[str, Any]]) -> tuple[str, ...]:
            return templates.add(self._render_with(tools), self.verdict, self.encode.apart, past, given, self._check_history)

        closing = self.verdict.closing if past.sampled else ""
        marks = marks_for(texts(list(messages.items)))
        return self._lay_out(messages, past.message_count, closing, past.tail, write, marks, {}, first=False)

    def generation_prompt(self, past: Past, tools: Tools) -> Laid:
        """Tokens that open an assistant's turn."""
        text = templates.generation_prompt(self._render_with(tools), self.verdict, self.encode.joined, past, self._check_history)
        script = Script(text, {}, (), (0,), (), past.message_count, 0, first=False)
        return lay_out(script, self.encode, {}, self.encode.atomic, np.zeros(0, np.int64))

    def said(self, ids: Ids) -> Mapping[str, Any]:
        """Sampled ids as an assistant's message, without the tokens that end a turn."""
        end = self._closing_ids
        length = overlap(ids, end, len(end))
        kept = ids[: len(ids) - length] if length and self.encode.atomic(int(end[0])) else ids
        text = str(self.tokenizer.decode(kept.tolist(), skip_special_tokens=False, clean_up_tokenization_spaces=False))
        return templates.formed({"role": "assistant", "content": text}, self.verdict.parts)

    def merged(self, items: Sequence[Item], input_ids: Ids) -> dict[str, Any]:
        """The processor's outputs for a whole sequence, from those of its items: torch tensors."""
        given = [(item.modality, item.payload.outputs) for item in items]
        spans = [item.spans for item in items]
        return {**merge_outputs(self.family, given), **sequence_outputs(self.family, len(input_ids), given, spans)}

    def adopt(self, payloads: Iterable[Payload]) -> None:
        """Know these payloads, so that their items are not processed again."""
        for payload in payloads:
            self._payloads.setdefault(payload.artifact, payload)

    def checking(self) -> HFRenderer:
        """The same renderer with ``check_history``."""
        made = copy.copy(self)
        made._check_history = True
        return made

    # ---------------------------------------------------------------- text

    def _check_front(self, text: str) -> None:
        """Some processors write in front of a text themselves (Mllama a bos token), unless it begins with one."""
        bos = getattr(self.tokenizer, "bos_token", None)
        if bos and text.startswith(bos):
            return
        if not np.array_equal(self._processed_ids, self.encode("a", first=True).ids):
            raise UnsupportedProcessorError(
                f"{type(self.processor).__name__} writes something of its own before a text that does not begin with {bos!r}: let "
                "the chat template begin with it"
            )

    @cached_property
    def _processed_ids(self) -> Ids:
        """The ids of a text of one letter as the processor's own call gives them."""
        return np.asarray(self.processor(text=["a"])["input_ids"], np.int64).reshape(-1)

    @cached_property
    def _closing_ids(self) -> Ids:
        return self.encode(self.verdict.closing).ids

    # ---------------------------------------------------------------- template

    @cached_property
    def _template_key(self) -> str:
        settings = json.dumps([self._template, self._template_kwargs], sort_keys=True, default=repr)
        return _sha(
            settings, tokenizer_fingerprint(self.tokenizer), self.family.name, json.dumps(self._placeholders, sort_keys=True)
        )

    def _render_with(self, tools: Tools) -> Callable[..., str]:
        if not self._own_template and getattr(self.processor, "chat_template", None) != self._template:
            raise ConversationError("the processor's chat template was changed after the renderer was made: make a new renderer")
        options = {"chat_template": self._template} if self._own_template else {}

        def render(messages: Sequence[Mapping[str, Any]], *, generation: bool) -> str:
            return str(
                self.processor.apply_chat_template(
                    [dict(m) for m in messages],
                    tools=None if tools is None else list(tools),
                    add_generation_prompt=generation,
                    tokenize=False,
                    **options,
                    **self._template_kwargs,
                )
            )

        return render

    def _probe(self, tools: Tools) -> Verdict:
        return templates.probe(self._render_with(tools), self._placeholders, self.encode.joined)

    def _lay_out(
        self,
        messages: Messages,
        number: int,
        closing: str,
        tail: Ids,
        write: Write,
        marks: Marks,
        guards: dict[str, str],
        *,
        first: bool,
    ) -> Laid:
        if len(self.tokenizer) != self._words:
            raise ConversationError("the tokenizer was changed after the renderer was made: make a new renderer")
        for source in messages.media:
            self.family.support(self.processor, source.modality)
        guarded = [self._guarded(message, guards, marks) for message in messages.items]
        pieces = write(guarded)
        contents, owned = contents_of(pieces, guarded, write, marks)
        media = [Medium(s.modality, s.message, self.process(s)) for s in messages.media]
        shown = media_in("".join(pieces), media, self._placeholders, self.verdict.envelopes)
        owned += [(entry.outer_start, entry.outer_stop, entry.medium.message - number) for entry in shown]
        bounds = bounds_of(pieces, len(guarded), owned, self.verdict.closing)
        shift = len(closing)
        script = Script(
            closing + "".join(pieces),
            guards,
            tuple((start + shift, stop + shift) for start, stop in contents),
            (0, *(bound + shift for bound in bounds)) if shift else bounds,
            tuple(entry.moved(shift) for entry in shown),
            number - 1 if shift else number,
            shift,
            first,
        )
        return lay_out(script, self.encode, self._feature_ids, self.encode.atomic, tail)

    def _guarded(self, value: Any, guards: dict[str, str], marks: Marks) -> Any:
        return replaced(value, lambda text: guard(text, self._literals, guards, marks))

    @cached_property
    def _literals(self) -> re.Pattern[str]:
        """Text that must come from the template alone: placeholders and feature tokens."""
        features = [support.feature(self.processor) for support in self._usable.values()]
        words = sorted({*self._placeholders.values(), *features}, key=len, reverse=True)
        return re.compile("|".join(map(re.escape, words)) or "(?!)")

    # ---------------------------------------------------------------- items

    def process(self, source: MediaSource) -> Payload:
        """An item processed, once: the same picture again, here or in another conversation, is found by its identity.

        Raises:
            ConversationError: a payload of another processor; a processor that was changed after the renderer was made.
            MediaError: the medium cannot be read.
            UnsupportedProcessorError: see `processing.process_one`.
        """
        if isinstance(source.source, Payload):
            if source.source.artifact != artifact_identity(source.source.identity, self._artifact):
                raise ConversationError(f"{source.where()} holds what another processor, or this one with other settings, has made")
            return source.source
        media = self.load(source)
        if self._processing_fingerprint() != self._artifact:
            raise ConversationError(
                "the processor was changed after the renderer was made: make a new renderer and a new conversation"
            )
        artifact = artifact_identity(media.identity, self._artifact)
        known = self._payloads.get(artifact)
        if known is not None:
            return known
        done = process_one(self.processor, self.family, source.modality, media, processor_kwargs=self._processor_kwargs)
        grids = done.grids if self.rule.axes > 1 else ()
        payload = Payload(artifact, media.identity, media, done.outputs, done.replacement, done.rows, grids)
        self._payloads[artifact] = payload
        return payload

    def load(self, source: MediaSource) -> Media:
        """A medium as it is processed: loaded, a picture over this renderer's background. ``MediaError`` if it cannot be read."""
        if isinstance(source.source, (Picture, Video, Sound)):
            if source.source.modality != source.modality:
                raise MediaError(f"{source.where()} holds a {source.source.modality}")
            if isinstance(source.source, Picture) and source.source.background != self._background:
                return replace(source.source, background=self._background)
            return source.source
        try:
            if source.modality == "image":
                return load_picture(source.source, background=self._background)
            if source.modality == "video":
                return load_video(source.source, source.options.get("metadata"))
            return load_sound(source.source, source.options.get("sampling_rate"))
        except RolloutCoreError as error:
            raise MediaError(f"{source.where()}: {error}") from error

    def _processing_fingerprint(self) -> str:
        return _sha(processor_fingerprint(self.processor, self._processor_kwargs), repr(tuple(self._background)))


def _rule(name: str | None, family: Family) -> PositionRule:
    if name is not None:
        return rule(name)
    try:
        return rule(family.positions)
    except ConversationError as error:
        raise UnsupportedProcessorError(
            f"models of family {family.name!r} count positions as {family.positions!r}, which is not known here: register_rule() "
            "it, or pass positions='plain@1' if your trainer lets the model count them itself"
        ) from error


def _sha(*parts: str) -> str:
    digest = hashlib.sha256()
    for part in parts:
        data = part.encode("utf-8", "surrogatepass")
        digest.update(len(data).to_bytes(8, "little"))
        digest.update(data)
    return digest.hexdigest()
