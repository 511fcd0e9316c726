"""What one step adds to a conversation: tokens on both tracks with everything known of each, and the items among them.

Deltas form a tree: each knows the one before it. They are never changed, so any number of conversations share them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from rollout_core.multimodal.identity import engine_uuid
from rollout_core.multimodal.media import Media
from rollout_core.multimodal.positions import Segment
from rollout_core.multimodal.tracks import Ids, Region

#: Where a token comes from, by its code in `Tokens.origin`.
ORIGINS = ("template", "sampled", "environment", "boundary")
TEMPLATE, SAMPLED, ENVIRONMENT, BOUNDARY = range(4)

Bytes = npt.NDArray[np.uint8]
Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True, eq=False, weakref_slot=True)
class Payload:
    """One item as processed: shared by every conversation and place that shows it.

    Attributes:
        artifact: identity of the content together with the processor that processed it (hex).
        identity: identity of the content alone (hex).
        media: the picture, video or sound itself, for engines that process it again.
        outputs: the processor's outputs for this item alone, unpadded, by key.
        replacement: the text that the processor put in the placeholder's place.
        rows: feature rows that the model will put in the place of the item's feature tokens; None where the family cannot say.
        grids: per span of feature tokens, its sizes for the position rule; empty where the rule needs none.
    """

    artifact: str
    identity: str
    media: Media | None
    outputs: Mapping[str, Any]
    replacement: str
    rows: int | None
    grids: tuple[Segment, ...]


@dataclass(frozen=True, slots=True, eq=False)
class Item:
    """One picture, video or sound at its place.

    Attributes:
        modality: ``image``, ``video`` or ``audio``.
        index: its place among all items, by token order; ``modality_index`` is its place among those of its modality.
        message: the message that shows it.
        region: the tokens that stand for it on both tracks.
        spans: the runs of feature tokens, as ``(start, stop)`` on the expanded track; several for tiles, rows and video frames.
        envelope: ``(start, stop)`` on the expanded track with what the template wrote around it, such as ``<|vision_start|>``.
    """

    modality: str
    index: int
    modality_index: int
    message: int
    region: Region
    spans: tuple[tuple[int, int], ...]
    envelope: tuple[int, int]
    payload: Payload

    @property
    def identity(self) -> str:
        """Identity of the content (hex)."""
        return self.payload.identity

    @property
    def artifact(self) -> str:
        """Identity of the content and of the processor (hex)."""
        return self.payload.artifact

    def uuid(self, salt: str = "") -> str:
        """The name under which an engine may keep this item; a salt keeps runs apart."""
        return engine_uuid(self.payload.artifact, salt)

    def moved(self, by: int, compact_by: int, index: int, modality_index: int) -> Item:
        """The same item further on or back, by tokens on each track, and with new places in the order."""
        return replace(
            self,
            index=index,
            modality_index=modality_index,
            region=self.region.shifted(by, compact_by),
            spans=tuple((start + by, stop + by) for start, stop in self.spans),
            envelope=(self.envelope[0] + by, self.envelope[1] + by),
        )


@dataclass(frozen=True, slots=True, eq=False)
class Tokens:
    """Tokens of a delta, and what is known of each. All arrays but ``compact_ids`` have one length n; none may be written to.

    Attributes:
        input_ids: (n,) int64, expanded.
        compact_ids: (m,) int64.
        logprobs: (n,) float64; not a number where there is none.
        origin: (n,) uint8, a code of `ORIGINS`.
        message: (n,) int64, the number of the message that the token belongs to.
    """

    input_ids: Ids
    compact_ids: Ids
    logprobs: Floats
    origin: Bytes
    message: Ids

    def __post_init__(self) -> None:
        for array in (self.input_ids, self.compact_ids, self.logprobs, self.origin, self.message):
            array.flags.writeable = False

    def __len__(self) -> int:
        return len(self.input_ids)

    @property
    def loss_mask(self) -> Ids:
        """(n,) int64: 1 where the policy sampled the token, else 0."""
        mask: Ids = (self.origin == SAMPLED).astype(np.int64)
        return mask

    @staticmethod
    def concatenate(parts: list[Tokens]) -> Tokens:
        """One after the other."""
        if len(parts) == 1:
            return parts[0]

        def joined(get: Callable[[Tokens], Any], dtype: Any) -> Any:
            return np.concatenate([get(part) for part in parts]) if parts else np.zeros(0, dtype)

        return Tokens(
            joined(lambda p: p.input_ids, np.int64),
            joined(lambda p: p.compact_ids, np.int64),
            joined(lambda p: p.logprobs, np.float64),
            joined(lambda p: p.origin, np.uint8),
            joined(lambda p: p.message, np.int64),
        )

    def sliced(self, start: int, stop: int, compact_start: int, compact_stop: int) -> Tokens:
        """Copies of a stretch of both tracks."""
        return Tokens(
            self.input_ids[start:stop].copy(),
            self.compact_ids[compact_start:compact_stop].copy(),
            self.logprobs[start:stop].copy(),
            self.origin[start:stop].copy(),
            self.message[start:stop].copy(),
        )


@dataclass(frozen=True, slots=True, eq=False)
class Delta:
    """One step of a conversation, and all before it through ``parent``.

    Attributes:
        kind: ``messages``, ``generation_prompt``, ``sampled`` or ``truncated``.
        tokens, items: what the step adds; items stand at their places in the whole sequence.
        segments: the added tokens as the position rule sees them.
        positions: (axes, n) int64.
        messages: messages that the step adds, as a template sees them.
        length, compact_length, item_counts, message_count, next_position: of everything up to and with this step.
        features: what the messages so far have that templates look at (`templates.features`).
        turn: ``open`` after a generation prompt or an aborted or cut turn, ``stopped`` after one that ended, else ``none``.
        role: of the last message.
    """

    parent: Delta | None = field(repr=False)
    kind: str
    tokens: Tokens
    items: tuple[Item, ...]
    segments: tuple[Segment, ...]
    positions: Ids
    messages: tuple[Mapping[str, Any], ...]
    length: int
    compact_length: int
    item_counts: Mapping[str, int]
    message_count: int
    next_position: int
    features: tuple[str, ...]
    turn: str
    finish: str | None
    role: str

    def path(self, since: Delta | None = None) -> list[Delta]:
        """The deltas after ``since`` up to this one, in order; all of them without it.

        Raises LookupError if ``since`` is neither this one nor an ancestor of it.
        """
        found: list[Delta] = []
        step: Delta | None = self
        while step is not since:
            if step is None:
                raise LookupError("not an ancestor")
            found.append(step)
            step = step.parent
        return found[::-1]
