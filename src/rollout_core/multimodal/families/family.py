"""The values that describe a family."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from rollout_core.errors import UnsupportedProcessorError
from rollout_core.multimodal.merge import OutputRule, Outputs, SequenceRule
from rollout_core.multimodal.positions import Segment

#: The keyword groups of a transformers processor call, and the part of the processor that each belongs to.
GROUPS: Mapping[str, tuple[str, ...]] = {
    "images_kwargs": ("image_processor",),
    "videos_kwargs": ("video_processor",),
    "audio_kwargs": ("feature_extractor", "audio_processor"),
}


@dataclass(frozen=True, slots=True)
class Pin:
    """A setting without which a single item does not come out as it does among others.

    ``group`` is ``images_kwargs``, ``videos_kwargs`` or ``audio_kwargs``, or None for a setting of the processor itself.
    """

    group: str | None
    key: str
    value: Any
    reason: str

    def check(self, processor: Any, processor_kwargs: Mapping[str, Any]) -> None:
        """``UnsupportedProcessorError`` unless the call would use ``value``. The order of precedence is that of transformers 5.23
        (processing_utils.py, ``ProcessorMixin._merge_kwargs``)."""
        places = [processor_kwargs.get(self.group, {}) if self.group else {}, processor_kwargs]
        if self.group:
            places.append(getattr(processor, self.group, {}))
        for part in [getattr(processor, name, None) for name in GROUPS[self.group]] if self.group else [processor]:
            places.extend([{self.key: getattr(part, self.key)}] if hasattr(part, self.key) else [])
        found = next((place[self.key] for place in places if self.key in place), None)
        if found != self.value:
            ask = {self.group: {self.key: self.value}} if self.group else {self.key: self.value}
            raise UnsupportedProcessorError(
                f"{type(processor).__name__} has {self.key}={found!r}, and {self.reason}; pass processor_kwargs={ask!r}"
            )


@dataclass(frozen=True, slots=True)
class Support:
    """How a family treats one modality.

    Attributes:
        placeholder: gives the text that stands for one item in a compact prompt, as the processor replaces it.
        feature: gives the text of the token that the model replaces by one feature row; it stands in the replacement.
        rows: gives the number of feature rows of one item from its outputs, by the model's arithmetic and not from the text; None
            where the family cannot say.
        grids: gives one grid per span of feature tokens, for position rules with several axes; None for the plain rule.
        verbatim: whether the placeholder is itself the replacement (the model attends to features instead of placing them).
        pins: settings that must hold.
        refuse: why this modality cannot be taken apart; None if it can.
    """

    placeholder: Callable[[Any], str]
    feature: Callable[[Any], str]
    rows: Callable[[Any, Outputs], int] | None = None
    grids: Callable[[Any, Outputs], tuple[Segment, ...]] | None = None
    verbatim: bool = False
    pins: tuple[Pin, ...] = ()
    refuse: str | None = None


@dataclass(frozen=True, slots=True)
class Family:
    """Processors that work alike.

    Attributes:
        name: of the family.
        processors: class names; a subclass belongs to the family of its nearest named ancestor.
        modalities: ``image``, ``video``, ``audio`` -> how they are treated.
        outputs: output key of an item -> rule that merges it.
        sequence: output key of the whole token sequence -> rule that computes it.
        positions: name of the position rule that transformers 5.23 follows (``multimodal.positions``).
        refuse: why single items of this family do not add up; None if they do.
    """

    name: str
    processors: tuple[str, ...]
    modalities: Mapping[str, Support] = field(default_factory=dict)
    outputs: Mapping[str, OutputRule] = field(default_factory=dict)
    sequence: Mapping[str, SequenceRule] = field(default_factory=dict)
    positions: str = "plain@1"
    refuse: str | None = None

    def check(self, processor: Any) -> None:
        """``UnsupportedProcessorError`` with the reason, if this family is refused."""
        if self.refuse is not None:
            raise UnsupportedProcessorError(f"{self._of(processor)} is refused: {self.refuse}")

    def support(self, processor: Any, modality: str) -> Support:
        """How this family treats a modality. ``UnsupportedProcessorError`` if it does not, or refuses it, with the reason."""
        self.check(processor)
        name = self._of(processor)
        if modality not in self.modalities:
            takes = ", ".join(self.modalities) or "text only"
            raise UnsupportedProcessorError(f"{name} does not take modality {modality!r}; it takes {takes}")
        support = self.modalities[modality]
        if support.refuse is not None:
            raise UnsupportedProcessorError(f"{name} is refused for modality {modality!r}: {support.refuse}")
        return support

    def _of(self, processor: Any) -> str:
        """What to call a processor of this family in a message; None is any."""
        return f"family {self.name!r}" if processor is None else f"{type(processor).__name__} (family {self.name!r})"
