"""What a chat template adds when messages follow."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Sequence

from rollout_core.errors import ConversationError, UnstableTemplateError
from rollout_core.multimodal.messages import Message
from rollout_core.multimodal.renderer import Past
from rollout_core.multimodal.templates.shapes import stand_in
from rollout_core.multimodal.templates.verdict import Join, Joined, Render, Verdict

#: Characters on either side of a join that are encoded to see whether the tokenizer merges across it.
TAIL = 96
_ADVICE = (
    "Start the conversation with on_unstable='segment' to open a new segment here, or use a template that keeps history as it was."
)


def begin(render: Render, verdict: Verdict, messages: Sequence[Message]) -> tuple[str, ...]:
    """The text of a conversation's first messages, by message; one text for all where the template does not keep them apart.

    Raises:
        ConversationError: the template refuses the messages.
    """
    roles = [m["role"] for m in messages]
    try:
        whole = render(messages, generation=False)
    except Exception as error:
        raise ConversationError(f"the chat template refuses these messages ({' -> '.join(roles)}): {error}") from error
    later = _pieces(render, verdict, messages[:1], messages[1:])
    rest = "".join(later)
    return (whole[: len(whole) - len(rest)], *later) if whole.endswith(rest) and len(later) == len(messages) - 1 else (whole,)


def _pieces(render: Render, verdict: Verdict, recent: Sequence[Message], messages: Sequence[Message]) -> tuple[str, ...]:
    """What each message adds to the one before it, the first to ``recent``; nothing where the template refuses that, or changes
    the one before. No join is trusted: the caller compares all together with the whole."""
    try:
        return tuple(
            added(render, messages[n - 1 : n] if n else recent, (message,), verdict.parts) for n, message in enumerate(messages)
        )
    except Exception:
        return ()


def generation_prompt(render: Render, verdict: Verdict, joined: Joined, past: Past, check: bool) -> str:
    """The text that opens an assistant's turn."""
    if verdict.generation is not None and not check:
        return verdict.generation
    history = past.messages()
    before, after = render(history, generation=False), render(history, generation=True)
    if not after.startswith(before):
        raise UnstableTemplateError(f"the generation prompt changes earlier text: {difference(before, after)}")
    prompt = after[len(before) :]
    _require_joined(joined, before, prompt)
    return prompt


def add(render: Render, verdict: Verdict, joined: Joined, past: Past, messages: Sequence[Message], check: bool) -> tuple[str, ...]:
    """The text that ``messages`` add, by message; one text for all where the template does not keep them apart.

    It is rendered after the last answer alone where every join is known to hold and ``check`` is not asked for, else after the
    whole past.

    Raises:
        UnstableTemplateError: the template changes what it wrote before; the text names the first message that is changed.
        ConversationError: the template refuses the messages.
    """
    roles = [past.role, *(m["role"] for m in messages)]
    if past.sampled and not verdict.separate:
        raise UnstableTemplateError(f"the tokenizer merges a sampled answer with {verdict.closing!r}, which ends a turn. {_ADVICE}")
    trusted = (verdict.generation_kept or not past.sampled) and "assistant" not in roles[1:]
    known = not check and trusted and all(Join(*pair, past.features) in verdict.stable for pair in itertools.pairwise(roles))
    try:
        recent = past.recent()
        pieces = _pieces(render, verdict, recent, messages)
        whole = None
        if known and pieces:
            # What the template does with these very messages is seen on the whole past.
            with contextlib.suppress(Exception):
                whole = added(render, recent, messages, verdict.parts, joined)
        if whole is None:
            whole = _added_to_all(render, verdict, joined, past, messages)
    except ConversationError:
        raise
    except Exception as error:
        raise ConversationError(f"the chat template refuses these messages ({' -> '.join(roles)}): {error}") from error
    return pieces if "".join(pieces) == whole else (whole,)


def _added_to_all(render: Render, verdict: Verdict, joined: Joined, past: Past, messages: Sequence[Message]) -> str:
    earlier = past.messages()
    before, after = render(earlier, generation=False), render((*earlier, *messages), generation=False)
    if not after.startswith(before):
        raise UnstableTemplateError(_explain(render, earlier, messages, before, after))
    if past.sampled and not verdict.generation_kept:
        prompt = render(earlier[:-1], generation=True)
        if not before.startswith(prompt):
            raise UnstableTemplateError(
                f"message {len(earlier) - 1} (assistant) was sampled after {prompt[-40:]!r}, which the template does not keep in "
                f"a history: {difference(prompt, before)}. {_ADVICE}"
            )
    if past.sampled and not before.endswith(verdict.closing):
        raise UnstableTemplateError(
            f"the template ends message {len(earlier) - 1} (assistant) with {before[-20:]!r} and not with {verdict.closing!r}. "
            f"{_ADVICE}"
        )
    added = after[len(before) :]
    _require_joined(joined, before, added)
    return added


def _require_joined(joined: Joined, before: str, after: str) -> None:
    if not joined(before[-TAIL:], after[:TAIL]):
        raise UnstableTemplateError(f"the tokenizer merges across the join {before[-12:]!r} + {after[:12]!r}. {_ADVICE}")


def _explain(render: Render, history: Sequence[Message], messages: Sequence[Message], before: str, after: str) -> str:
    """Which message of the history comes out differently, and because of which new one."""
    cause = messages[0]
    number = len(history)
    for count in range(1, len(messages) + 1):
        try:
            if not render((*history, *messages[:count]), generation=False).startswith(before):
                cause, number = messages[count - 1], len(history) + count - 1
                break
        except Exception:
            continue
    at = shared_start(before, after)
    changed = len(history) - 1
    for count in range(1, len(history) + 1):
        try:
            if len(render(history[:count], generation=False)) > at:
                changed = count - 1
                break
        except Exception:
            continue
    together = (
        " Tool messages that follow each other must be added in one extend."
        if cause["role"] == history[-1]["role"] == "tool"
        else ""
    )
    return (
        f"message {number} ({cause['role']}) makes the chat template change message {changed} ({history[changed]['role']}): "
        f"{difference(before, after)}.{together} {_ADVICE}"
    )


def added(render: Render, recent: Sequence[Message], messages: Sequence[Message], parts: bool, joined: Joined | None = None) -> str:
    """What ``messages`` add to a short history that ends with ``recent``."""
    base = stand_in(recent, parts)
    before, after = render(base, generation=False), render((*base, *messages), generation=False)
    if not after.startswith(before):
        raise UnstableTemplateError(f"earlier text changes: {difference(before, after)}")
    if joined is not None:
        _require_joined(joined, before, after[len(before) :])
    return after[len(before) :]


def shared_start(one: str, two: str) -> int:
    return next((i for i, (a, b) in enumerate(zip(one, two, strict=False)) if a != b), min(len(one), len(two)))


def difference(one: str, two: str) -> str:
    at = shared_start(one, two)
    return f"...{one[max(at - 20, 0) : at + 30]!r} became ...{two[max(at - 20, 0) : at + 30]!r}"
