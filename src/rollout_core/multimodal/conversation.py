"""A conversation that grows by deltas: immutable, shared by its forks, and at every moment what processing it whole would give."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeVar

import numpy as np
import numpy.typing as npt

from rollout_core.errors import ConversationError, UnstableTemplateError
from rollout_core.multimodal import cutting, stored, verifying
from rollout_core.multimodal.arrays import Arrays, ConversationDelta, optional
from rollout_core.multimodal.deltas import SAMPLED, Bytes, Delta, Item, Payload, Tokens
from rollout_core.multimodal.messages import Message, plain_tools, take
from rollout_core.multimodal.renderer import Renderer, Tools
from rollout_core.multimodal.sampled import Finish, check_sampled
from rollout_core.multimodal.steps import delta_of, messages_of, past_of, refilled, step
from rollout_core.multimodal.tracks import Ids, SpanMap

Number = TypeVar("Number", np.int64, np.float64, np.uint8)
OnUnstable = Literal["refuse", "segment"]


@dataclass(frozen=True, slots=True, eq=False)
class Conversation:
    """An immutable conversation. Every method returns another one, or fails and changes nothing.

    Start one with `Conversation.start`; the constructor is private. A fork is another reference; rolling back is dropping one.

    Attributes:
        renderer: what turns messages into tokens.
        tip: the last delta; all before it are its ancestors.
        tools: tool schemas that the template shows.
        on_unstable: what `extend` does when the template changes what it wrote before.
        segments: what this conversation was before each change of that kind, oldest first; each is a training sample of its own.
        cut: whether `truncate` removed tokens: it is a sample to train on, nothing can follow, and it has no messages.
    """

    renderer: Renderer
    tip: Delta
    tools: Tools = None
    on_unstable: OnUnstable = "refuse"
    segments: tuple[Conversation, ...] = ()
    cut: bool = False

    # ---------------------------------------------------------------- growing

    @classmethod
    def start(
        cls, renderer: Renderer, messages: Iterable[Message], tools: Tools = None, *, on_unstable: OnUnstable = "refuse"
    ) -> Conversation:
        """Begin with messages: a system prompt, a question, or a whole history.

        Args:
            renderer: e.g. `HFRenderer`.
            messages: see `rollout_core.multimodal.messages`.
            tools: JSON schemas for the template.
            on_unstable: ``refuse``: an extension after which the template would write earlier messages differently raises
                UnstableTemplateError. ``segment``: it begins a new segment, with the whole history rendered anew as its prompt.

        Raises:
            ConversationError: messages or media cannot be used; MediaError, UnsupportedProcessorError and UnstableTemplateError are
                kinds of it.
        """
        if on_unstable not in ("refuse", "segment"):
            raise ConversationError(f"on_unstable is {on_unstable!r}; it is 'refuse' or 'segment'")
        tools = plain_tools(tools)
        taken = take(messages)
        laid = renderer.begin(taken, tools)
        return cls(renderer, delta_of(renderer, None, "messages", laid, taken.items), tools, on_unstable)

    def extend(self, messages: Iterable[Message]) -> Conversation:
        """Add messages of users, tools or anyone but the policy. Only they are rendered, encoded and processed.

        A sampled turn before them is ended with what the template writes there and the policy did not sample.

        Raises:
            UnstableTemplateError: the template changes earlier text (with ``on_unstable="refuse"``); it names the message.
            ConversationError: a generation prompt is open; the conversation was cut at its end; messages or media cannot be used.
        """
        self._may_grow()
        if self.tip.kind == "generation_prompt":
            raise ConversationError(
                "the assistant's turn is open: add what was sampled, or extend the conversation from before the prompt"
            )
        messages = list(messages) if isinstance(messages, Iterator) else messages
        taken = take(messages, first=self.tip.message_count)
        past = past_of(self.renderer, self.tip)
        try:
            laid = self.renderer.add(past, taken, self.tools)
        except UnstableTemplateError:
            if self.on_unstable != "segment":
                raise
            return self._segment(messages)
        return self._with(delta_of(self.renderer, self.tip, "messages", laid, taken.items, earlier=past.features))

    def with_generation_prompt(self) -> Conversation:
        """Open the assistant's turn: what an engine must see before it samples. Harmless if it is open already."""
        self._may_grow()
        if self.tip.turn == "open":
            return self
        if self.tip.turn == "stopped":
            raise ConversationError("the assistant's turn has ended: extend the conversation with messages before sampling again")
        past = past_of(self.renderer, self.tip)
        laid = self.renderer.generation_prompt(past, self.tools)
        return self._with(delta_of(self.renderer, self.tip, "generation_prompt", laid, (), earlier=past.features, turn="open"))

    def append_sampled(
        self,
        ids: Sequence[int] | Any,
        *,
        logprobs: Sequence[float | None] | Any = None,
        finish: Finish = "stop",
        message: Message | None = None,
    ) -> Conversation:
        """Add what the policy sampled, verbatim; the generation prompt first, where it is not there yet.

        Args:
            ids: sampled token ids, as the engine returned them: list, array or tensor.
            logprobs: one per id, None where there is none; or None for no logprobs at all.
            finish: ``stop``: the policy ended its turn. ``length``: it was cut by a limit. ``aborted``: it was interrupted. After
                the last two the turn stays open: more may be sampled, or messages may follow.
            message: the turn as a message, if the template must see it parsed (tool calls, reasoning); the decoded text otherwise.

        Raises:
            ConversationError: ids that are no token ids or outside the vocabulary; logprobs of another length or not finite; an
                unknown finish; a turn that has ended already.
        """
        self._may_grow()
        sampled, values = check_sampled(ids, logprobs, finish, self.renderer.vocab_size)
        parsed = None if message is None else take([message], first=self.tip.message_count)
        if parsed is not None and (parsed.items[0]["role"] != "assistant" or parsed.media):
            raise ConversationError("the message of a sampled turn has role 'assistant' and no media")
        at = self.with_generation_prompt()
        resumed = at.tip.kind == "sampled"
        number = at.tip.message_count - resumed
        n = len(sampled)
        tokens = Tokens(sampled, sampled.copy(), values, np.full(n, SAMPLED, np.uint8), np.full(n, number, np.int64))
        tip = step(
            self.renderer,
            at.tip,
            "sampled",
            tokens,
            (),
            () if parsed is None else parsed.items,
            message_count=number + 1,
            found=at.tip.features,
            turn="stopped" if finish == "stop" else "open",
            finish=finish,
            role="assistant",
        )
        return at._with(tip)

    def truncate(
        self,
        max_length: int,
        side: Literal["right", "left"] = "right",
        policy: Literal["drop_item", "drop_message", "error"] = "drop_item",
    ) -> Conversation:
        """At most ``max_length`` expanded tokens; those at ``side`` go. See `rollout_core.multimodal.cutting`.

        Args:
            max_length: tokens to keep at most, at least 1.
            side: ``right`` removes the end, ``left`` the beginning.
            policy: where the cut would fall inside an item. ``drop_item``: the whole item goes, with what the template wrote around
                it. ``drop_message``: cut only between messages. ``error``: raise.

        Raises:
            TruncationError: nothing would be left; or the cut falls inside an item under ``error``.
        """
        tip = cutting.truncated(self.renderer.rule, self.tip, max_length, side, policy)
        return self if tip is self.tip else replace(self, tip=tip, cut=True)

    # ---------------------------------------------------------------- reading

    def __len__(self) -> int:
        """Expanded tokens."""
        return self.tip.length

    @property
    def tokens(self) -> Tokens:
        """All tokens with all that is known of each."""
        return Tokens.concatenate([delta.tokens for delta in self.tip.path()])

    @property
    def input_ids(self) -> Ids:
        """(n,) int64: expanded ids, as the trainer needs them."""
        return _joined(self.tip, lambda d: d.tokens.input_ids)

    @property
    def compact_ids(self) -> Ids:
        """(m,) int64: with one placeholder per item, as vLLM and SGLang accept them."""
        return _joined(self.tip, lambda d: d.tokens.compact_ids)

    @property
    def loss_mask(self) -> Ids:
        """(n,) int64: 1 where the policy sampled the token."""
        return _joined(self.tip, lambda d: d.tokens.loss_mask)

    @property
    def logprobs(self) -> list[float | None]:
        """Per token the logprob that came with it, None where there is none."""
        return optional(_joined(self.tip, lambda d: d.tokens.logprobs))

    @property
    def origin(self) -> Bytes:
        """(n,) uint8: index into `ORIGINS` for each token."""
        return _joined(self.tip, lambda d: d.tokens.origin)

    @property
    def message_ids(self) -> Ids:
        """(n,) int64: the number of the message that each token belongs to."""
        return _joined(self.tip, lambda d: d.tokens.message)

    @property
    def position_ids(self) -> Ids:
        """(axes, n) int64 by the renderer's position rule: one axis, or time, height and width."""
        return np.concatenate([delta.positions for delta in self.tip.path()], axis=1)

    @property
    def items(self) -> tuple[Item, ...]:
        """Pictures, videos and sounds, in token order."""
        return tuple(item for delta in self.tip.path() for item in delta.items)

    @property
    def span_map(self) -> SpanMap:
        """How the two tracks lie beside each other; `SpanMap.expand` and `SpanMap.compact_ids` go from one to the other."""
        items, ids, compact = self.items, self.input_ids, self.compact_ids
        return SpanMap(
            tuple(item.region for item in items),
            tuple(compact[item.region.compact_start : item.region.compact_stop] for item in items),
            tuple(ids[item.region.start : item.region.stop] for item in items),
            len(compact),
            len(ids),
        )

    @property
    def messages(self) -> tuple[Message, ...]:
        """All messages as a template sees them; media are bare parts, in the order of `items` per modality.

        Raises:
            ConversationError: the conversation was truncated.
        """
        if self.cut:
            raise ConversationError("a truncated conversation has tokens and no messages; ask the one it was cut from")
        return tuple(messages_of(self.renderer, self.tip))

    @property
    def finish(self) -> str | None:
        """How the last sampled turn ended, if it is the last thing here."""
        return self.tip.finish

    def multi_modal_inputs(self) -> dict[str, Any]:
        """The processor's outputs other than ids and attention mask, as one call over everything would give them: torch tensors."""
        return self.renderer.merged(self.items, self.input_ids)

    def arrays(self, backend: Literal["numpy", "torch"] = "numpy") -> Arrays:
        """Everything a trainer batches, of one length, as numpy arrays or torch tensors."""
        return Arrays.of(self.tokens, self.position_ids, backend)

    def delta(self, since: Conversation | None = None) -> ConversationDelta:
        """What came after ``since``, an earlier state of this conversation; everything without it.

        Raises:
            ConversationError: this conversation does not go on from ``since``.
        """
        start = None if since is None else since.tip
        try:
            steps = self.tip.path(start)
        except LookupError:
            raise ConversationError(
                "this conversation does not go on from the one given as since: it is another fork, was truncated, or a new "
                "segment began; send it whole"
            ) from None
        return ConversationDelta.of(steps, start, self.renderer.rule.axes)

    # ---------------------------------------------------------------- storing

    def to_bytes(self, *, payloads: bool = True) -> bytes:
        """This conversation as MessagePack. Each item's payload is stored once, by identity; or not at all."""
        return stored.encode(self, payloads=payloads)

    @classmethod
    def from_bytes(cls, renderer: Renderer, data: bytes, payloads: Mapping[str, Payload] | None = None) -> Conversation:
        """The conversation that `to_bytes` stored.

        Args:
            renderer: with the fingerprint of the one that the conversation was made with.
            data: from `to_bytes`.
            payloads: by artifact identity, for conversations stored without.

        Raises:
            ConversationError: other bytes; another renderer; a payload that is missing.
        """
        tip, tools, on_unstable, cut, earlier = stored.decode(renderer, data, payloads or {})
        found = {
            item.artifact: item.payload for one in (tip, *(old for old, _ in earlier)) for step in one.path() for item in step.items
        }
        renderer.adopt(found.values())
        parts = tuple(cls(renderer, old, tools, on_unstable, (), was_cut) for old, was_cut in earlier)
        parts = tuple(replace(part, segments=parts[:index]) for index, part in enumerate(parts))
        return cls(renderer, tip, tools, on_unstable, parts, cut)

    def verify(self) -> None:
        """Grow this conversation again from its messages and sampled ids, comparing each step with the render of the whole past.

        For now and then: it costs in proportion to the square of the turns. No item is processed again.

        Raises:
            UnstableTemplateError: the template, asked about the whole, writes something else than what was tracked: it looks
                further than probing could see.
            ConversationError: the conversation was truncated.
        """
        verifying.verify(self)

    def __copy__(self) -> Conversation:
        return self

    def __deepcopy__(self, memo: Any) -> Conversation:
        return self

    def __reduce__(self) -> Any:
        raise TypeError("a Conversation holds a processor and is not pickled: send to_bytes(), and use from_bytes(renderer, data)")

    def __repr__(self) -> str:
        return (
            f"<Conversation of {len(self)} tokens ({self.tip.compact_length} compact), {sum(self.tip.item_counts.values())} items, "
            f"{self.tip.message_count} messages, segment {len(self.segments)}>"
        )

    # ---------------------------------------------------------------- inside

    def _with(self, tip: Delta) -> Conversation:
        return replace(self, tip=tip)

    def _may_grow(self) -> None:
        if self.cut:
            raise ConversationError("this conversation was truncated; grow the one it was cut from, and truncate that again")

    def _segment(self, messages: Iterable[Message]) -> Conversation:
        """A new segment: the whole history and the new messages, rendered at once, as the prompt of what follows."""
        past = refilled(self.messages, self.items)
        fresh = type(self).start(self.renderer, [*past, *messages], self.tools, on_unstable=self.on_unstable)
        return replace(fresh, segments=(*self.segments, self))


def _joined(tip: Delta, get: Callable[[Delta], npt.NDArray[Number]]) -> npt.NDArray[Number]:
    """What the deltas up to ``tip`` have of something, in one new array."""
    parts = [get(delta) for delta in tip.path()]
    return parts[0].copy() if len(parts) == 1 else np.concatenate(parts)
