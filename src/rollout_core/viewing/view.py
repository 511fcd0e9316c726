"""What there is to see of a conversation: its turns, where their tokens come from, their items, and what each had to process.

Frozen values, which `reading.view_of` makes of a conversation, and which the table, the JSON and the picture are made of.
"""

from __future__ import annotations

from dataclasses import dataclass

from rollout_core.multimodal.media import Media


@dataclass(frozen=True, slots=True)
class Run:
    """Tokens ``[start, stop)`` of one origin, on the expanded track of their segment."""

    origin: str
    start: int
    stop: int


@dataclass(frozen=True, slots=True)
class ShownItem:
    """An item at its place.

    Attributes:
        name: modality and number within it, such as ``image 0``.
        start, stop: its tokens on the expanded track; ``compact`` is how many stand for it on the compact one.
        spans: the runs of feature tokens among them.
        what: its size in words.
        identity: of the content (hex).
        same_as: the name of the first item with the same payload, if that is another: this one was not processed again.
        media: the picture, video or sound; None where it was not stored.
    """

    name: str
    modality: str
    start: int
    stop: int
    compact: int
    spans: tuple[tuple[int, int], ...]
    what: str
    identity: str
    same_as: str | None
    media: Media | None

    @property
    def tokens(self) -> int:
        return self.stop - self.start


@dataclass(frozen=True, slots=True)
class Turn:
    """What one call added: messages together, or one turn of the policy with the prompt that opened it.

    Attributes:
        number: counted from 0 over all segments; ``segment`` from 0.
        title: who spoke; how a sampled turn ended, if it did not stop by itself.
        text: the beginning of what was said.
        start, stop: tokens on the expanded track of the segment; ``compact`` is how many it added to the compact one.
        rendered: compact tokens that came from the template and the messages: what the tokenizer had to encode.
        loss: sampled tokens; ``logprobs`` is how many of them have one.
        prompt: whether messages were added here, so that others would render everything again.
        runs: the tokens by origin, in order and without gaps.
        marks: places of sampled ids that are placeholders.
    """

    number: int
    segment: int
    title: str
    text: str
    start: int
    stop: int
    compact: int
    rendered: int
    loss: int
    logprobs: int
    prompt: bool
    runs: tuple[Run, ...]
    items: tuple[ShownItem, ...]
    marks: tuple[int, ...]
    warnings: tuple[str, ...]

    @property
    def tokens(self) -> int:
        """On the expanded track."""
        return self.stop - self.start

    @property
    def processed(self) -> int:
        """Items that went through the processor in this turn."""
        return sum(item.same_as is None for item in self.items)

    @property
    def reused(self) -> int:
        """Items whose payload was there already."""
        return len(self.items) - self.processed


@dataclass(frozen=True, slots=True)
class View:
    """All turns of all segments, in order."""

    turns: tuple[Turn, ...]

    @property
    def segments(self) -> int:
        return self.turns[-1].segment + 1

    @property
    def rendered(self) -> int:
        return sum(turn.rendered for turn in self.turns)

    @property
    def loss(self) -> int:
        return sum(turn.loss for turn in self.turns)

    @property
    def processed(self) -> int:
        return sum(turn.processed for turn in self.turns)

    @property
    def reused(self) -> int:
        return sum(turn.reused for turn in self.turns)

    def whole(self) -> tuple[int, int]:
        """Compact tokens encoded and items processed if everything so far were done again whenever messages are added."""
        tokens = items = all_tokens = all_items = 0
        for before, turn in zip((None, *self.turns), self.turns, strict=False):
            if before is None or before.segment != turn.segment:
                tokens = items = 0
            tokens, items = tokens + turn.compact, items + len(turn.items)
            if turn.prompt:
                all_tokens, all_items = all_tokens + tokens, all_items + items
            else:  # the prompt that opens the policy's turn is new either way
                all_tokens += turn.rendered
        return all_tokens, all_items
