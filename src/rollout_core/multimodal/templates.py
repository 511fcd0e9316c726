"""What a chat template adds when messages follow, and whether what it wrote before stays as it was.

Nothing is assumed about a template: it is rendered over many small conversations (`probe`), and each step of each of them is
compared with the render of the whole. A join of two roles that held in every one of them is rendered from a short stand-in for
the history from then on, so that a turn costs what the turn costs; any other join is rendered in full, compared, and refused
where it changes the past.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from rollout_core.errors import ConversationError, UnstableTemplateError
from rollout_core.multimodal.renderer import Past

Message = Mapping[str, Any]
#: What of a history may change how a template renders later or earlier messages.
FEATURES = ("thinking", "tool_calls")


#: Whether two texts, encoded one after the other, give the ids of the two together.
Joined = Callable[[str, str], bool]


class Render(Protocol):
    """Renders messages with a chat template; raises whatever the template raises."""

    def __call__(self, messages: Sequence[Message], *, generation: bool) -> str: ...


@dataclass(frozen=True, slots=True, order=True)
class Join:
    """Where two messages meet: the role before, the role after, and what the history holds."""

    before: str
    after: str
    features: tuple[str, ...] = ()

    def __str__(self) -> str:
        return f"{self.before} -> {self.after}" + (f" (history with {', '.join(self.features)})" if self.features else "")


@dataclass(frozen=True, slots=True)
class Break:
    """One probed conversation that the template did not leave as it was."""

    join: Join
    what: str


@dataclass(frozen=True, slots=True)
class Verdict:
    """What probing found: joins that always held, joins that did not, and text that is the same everywhere.

    Attributes:
        stable: joins where the new text depends on the last message's role only and the old text stays.
        breaks: an example for each join where the old text changed, or where the new text depends on more.
        closing: what the template writes after an assistant's content, e.g. ``<|im_end|>`` and a line break.
        generation: the generation prompt, e.g. ``<|im_start|>assistant`` and a line break; None where it depends on the history.
        generation_kept: whether an assistant message in a history starts with the generation prompt.
        separate: whether the tokenizer keeps the text that ends a turn apart from the answer before it.
        parts: whether the template takes contents only as lists of parts.
        envelopes: per modality, the text that the template writes before and after a placeholder and drops with the medium.
        probed: conversations rendered.
    """

    stable: frozenset[Join]
    breaks: tuple[Break, ...]
    closing: str
    generation: str | None
    generation_kept: bool
    separate: bool
    parts: bool
    envelopes: Mapping[str, tuple[str, str]]
    probed: int

    @property
    def groups_tools(self) -> bool:
        """Whether consecutive tool messages must be added together (M17's exception)."""
        return any(b.join.before == b.join.after == "tool" for b in self.breaks)


def features(messages: Iterable[Message]) -> tuple[str, ...]:
    """Which of `FEATURES` the assistant messages among ``messages`` have."""
    found = set()
    for message in messages:
        if message["role"] == "assistant":
            content = message.get("content")
            texts = [content] if isinstance(content, str) else [p.get("text", "") for p in content or () if isinstance(p, Mapping)]
            if (
                message.get("reasoning_content")
                or message.get("reasoning")
                or any("<think>" in t or "</think>" in t for t in texts)
            ):
                found.add("thinking")
            if message.get("tool_calls"):
                found.add("tool_calls")
    return tuple(f for f in FEATURES if f in found)


# ------------------------------------------------------------------------------------------------ probing

_CALL = {"type": "function", "id": "c0", "function": {"name": "look", "arguments": {"where": "left"}}}
_ASSISTANTS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("plain", {"role": "assistant", "content": "a plain answer"}),
    ("thinking", {"role": "assistant", "content": "<think>\nfirst this, then that\n</think>\n\nan answer"}),
    ("reasoning", {"role": "assistant", "content": "an answer", "reasoning_content": "first this, then that"}),
    ("call", {"role": "assistant", "content": "", "tool_calls": [_CALL]}),
    ("thinking call", {"role": "assistant", "content": "<think>\nlet me look\n</think>\n\n", "tool_calls": [_CALL]}),
)
_USERS: tuple[dict[str, Any], ...] = (
    {"role": "user", "content": "a question"},
    {"role": "user", "content": [{"type": "text", "text": "parts\nof text"}]},
)
_TOOL = {"role": "tool", "content": "a result"}
_OPENINGS: tuple[tuple[dict[str, Any], ...], ...] = ((), ({"role": "system", "content": "be brief"},))


def _shapes(modalities: Sequence[str]) -> Iterable[tuple[Message, ...]]:
    """Conversations of up to seven messages: every kind of assistant turn, tools, pictures, with and without a system message."""
    pictured = [
        {"role": role, "content": [{"type": m}, {"type": "text", "text": f"what of this {m}?"}]}
        for m in modalities
        for role in ("user", "tool")
    ]
    user, later = _USERS[0], {"role": "user", "content": "and then?"}
    for opening in _OPENINGS:
        for _, turn in _ASSISTANTS:
            called = bool(turn.get("tool_calls"))
            follow: list[Message] = (
                [_TOOL, *(p for p in pictured if p["role"] == "tool")] if called else [later, *_USERS[1:], *pictured]
            )
            for message in follow:
                for _, second in _ASSISTANTS[:3]:
                    yield (*opening, user, turn, message, second, later, _ASSISTANTS[0][1], later)
            if called:
                yield (*opening, user, turn, _TOOL, _TOOL, _ASSISTANTS[0][1], later)
                yield (*opening, user, turn, _TOOL, later, _ASSISTANTS[0][1])
                yield (*opening, user, turn, _TOOL, turn, _TOOL, turn, _TOOL)
        yield (*opening, user, later, later)
        for first, second in itertools.product(pictured, repeat=2):
            if first["role"] == second["role"] == "user":
                yield (*opening, first, _ASSISTANTS[0][1], second, _ASSISTANTS[0][1], first)


def stand_in(role: str) -> tuple[Message, ...]:
    """A short history that ends with a message of ``role``."""
    user, answer = {"role": "user", "content": "x"}, {"role": "assistant", "content": "x"}
    ends = {
        "user": (user, answer, user),
        "assistant": (user, answer),
        "tool": (user, {"role": "assistant", "content": "", "tool_calls": [_CALL]}, {"role": "tool", "content": "x"}),
        "system": ({"role": "system", "content": "x"},),
    }
    return ends.get(role, (user, answer, {"role": role, "content": "x"}))


def probe(render: Render, placeholders: Mapping[str, str], joined: Joined) -> Verdict:
    """Render many small conversations, and say where the template is stable.

    Args:
        render: the template, with the tools it will be used with.
        placeholders: by modality that the processor takes, the placeholder as the template writes it.
        joined: whether encoding two texts apart equals encoding them together; a tokenizer may merge across the join.

    Raises:
        UnstableTemplateError: the template renders no assistant turn at all, or its text around one is not constant.
    """
    good: set[Join] = set()
    broken: dict[Join, str] = {}
    kept = constant = True
    probed = 0
    parts = _wants_parts(render)
    render = _remembering(render, parts)
    closing, generation = _turn_texts(render)
    for shape in dict.fromkeys(_Key(s) for s in _shapes(tuple(placeholders))):
        messages = shape.messages
        try:
            whole = [render(messages[:n], generation=False) for n in range(1, len(messages) + 1)]
        except Exception:  # noqa: BLE001, S112 - a template may refuse any shape, with any error
            continue
        probed += 1
        for n in range(1, len(messages)):
            join = Join(messages[n - 1]["role"], messages[n]["role"], features(messages[:n]))
            problem = _problem(render, messages, n, whole, closing, joined)
            if problem:
                broken.setdefault(join, problem)
            else:
                good.add(join)
            if messages[n]["role"] != "assistant":
                continue
            prompt = render(messages[:n], generation=True)
            constant = constant and prompt == whole[n - 1] + generation
            if not whole[n].startswith(prompt):
                kept = False
    separate = all(joined(answer, closing) for answer in _ENDINGS)
    if not separate:
        broken.setdefault(Join("assistant", "user"), f"the tokenizer merges an answer with the text that ends a turn, {closing!r}")
    envelopes = {m: e for m, p in placeholders.items() if (e := _envelope(render, m, p)) is not None}
    breaks = tuple(Break(join, what) for join, what in sorted(broken.items()))
    return Verdict(frozenset(good - set(broken)), breaks, closing, generation if constant else None, kept, separate, parts, envelopes, probed)


def both(one: Verdict, two: Verdict) -> Verdict:
    """What holds in two settings of one template, such as with and without tools."""
    breaks = {b.join: b for b in (*two.breaks, *one.breaks)}
    if one.closing != two.closing:
        raise UnstableTemplateError(f"what ends a turn depends on the tools: {one.closing!r} and {two.closing!r}")
    return Verdict(
        one.stable & two.stable - set(breaks),
        tuple(breaks[join] for join in sorted(breaks)),
        one.closing,
        one.generation if one.generation == two.generation else None,
        one.generation_kept and two.generation_kept,
        one.separate and two.separate,
        one.parts,
        {modality: around for modality, around in one.envelopes.items() if two.envelopes.get(modality) == around},
        one.probed + two.probed,
    )


class _Key:
    """Messages that can stand in a dictionary."""

    def __init__(self, messages: tuple[Message, ...]) -> None:
        self.messages = messages

    def __hash__(self) -> int:
        return hash(repr(self.messages))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Key) and self.messages == other.messages


def _problem(
    render: Render, messages: Sequence[Message], n: int, whole: Sequence[str], closing: str, joined: Joined
) -> str | None:
    before, after = whole[n - 1], whole[n]
    if not after.startswith(before):
        return f"a {messages[n]['role']} message changes earlier text: {_difference(before, after)}"
    if messages[n - 1]["role"] == "assistant" and not before.endswith(closing):
        return f"the template ends this turn with {before[-len(closing):]!r} and others with {closing!r}"
    try:
        short = _added(render, messages[n - 1]["role"], messages[n : n + 1])
    except Exception as error:  # noqa: BLE001 - see above
        return f"the template refuses a short history: {error}"
    if short != after[len(before) :]:
        return f"what a {messages[n]['role']} message adds depends on earlier ones: {_difference(after[len(before) :], short)}"
    if not joined(before, short):
        return f"the tokenizer merges across the join {before[-12:]!r} + {short[:12]!r}"
    return None


#: Answers that tokenizers may merge with what follows.
_ENDINGS = ("an answer", "done.", "5", "a\n", "so ", "x <", "(", "\u00e9\u00e9", "```")


def _wants_parts(render: Render) -> bool:
    """Whether the template writes an assistant's content only if it is a list of parts."""
    user, answer = {"role": "user", "content": "x"}, {"role": "assistant", "content": "\ue000"}
    for parts in (False, True):
        try:
            shown = render(tuple(formed(m, parts) for m in (user, answer)), generation=False)
        except Exception:  # noqa: BLE001, S112 - a template may refuse either form, with any error
            continue
        if "\ue000" in shown:
            return parts
    return False


def formed(message: Message, parts: bool) -> Message:
    """A message whose content is text, as text or as a list of one part."""
    if parts and isinstance(message.get("content"), str):
        return {**message, "content": [{"type": "text", "text": message["content"]}]}
    return message


def _remembering(render: Render, parts: bool) -> Render:
    """The same, with contents as the template takes them, and every render made once."""
    known: dict[str, str] = {}

    def once(messages: Sequence[Message], *, generation: bool) -> str:
        key = repr((messages, generation))
        if key not in known:
            known[key] = render(tuple(formed(m, parts) for m in messages), generation=generation)
        return known[key]

    return once


def _turn_texts(render: Render) -> tuple[str, str]:
    """What stands after an assistant's content, and the generation prompt."""
    user = ({"role": "user", "content": "x"},)
    mark = "\ue000"
    try:
        base, prompt = render(user, generation=False), render(user, generation=True)
        turn = render((*user, {"role": "assistant", "content": mark}), generation=False)
    except Exception as error:
        raise UnstableTemplateError(f"the chat template cannot render a user and an assistant message: {error}") from error
    if mark not in turn:
        raise UnstableTemplateError("the chat template does not write the content of an assistant message")
    if not prompt.startswith(base):
        raise UnstableTemplateError(f"the generation prompt changes earlier text: {_difference(base, prompt)}")
    return turn.partition(mark)[2], prompt[len(base) :]


def _envelope(render: Render, modality: str, placeholder: str) -> tuple[str, str] | None:
    """The text before and after a placeholder that the template writes because of the medium."""
    text = [{"type": "text", "text": "\ue000"}, {"type": modality}, {"type": "text", "text": "\ue001"}]
    try:
        shown = render(({"role": "user", "content": text},), generation=False)
        bare = render(({"role": "user", "content": [text[0], text[2]]},), generation=False)
    except Exception:  # noqa: BLE001 - a template may know no such part
        return None
    start = _common(shown, bare)
    stop = len(shown) - min(_common(shown[::-1], bare[::-1]), len(bare) - start)
    prefix, found, suffix = shown[start:stop].partition(placeholder)
    return (prefix, suffix) if found else None


# ------------------------------------------------------------------------------------------------ use


def _added(render: Render, role: str, messages: Sequence[Message], parts: bool = False) -> str:
    base = tuple(formed(m, parts) for m in stand_in(role))
    before, after = render(base, generation=False), render((*base, *messages), generation=False)
    if not after.startswith(before):
        raise UnstableTemplateError(f"after a {role} message earlier text changes: {_difference(before, after)}")
    return after[len(before) :]


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
    if any(Join(*pair, features(messages[:n])) not in verdict.stable for n, pair in enumerate(itertools.pairwise(roles), 1)):
        return (whole,)
    later = [_added(render, role, (message,), verdict.parts) for role, message in zip(roles, messages[1:], strict=False)]
    rest = "".join(later)
    return (whole[: len(whole) - len(rest)], *later) if whole.endswith(rest) else (whole,)


def generation_prompt(render: Render, verdict: Verdict, past: Past) -> str:
    """The text that opens an assistant's turn."""
    if verdict.generation is not None:
        return verdict.generation
    history = past.messages()
    before, after = render(history, generation=False), render(history, generation=True)
    if not after.startswith(before):
        raise UnstableTemplateError(f"the generation prompt changes earlier text: {_difference(before, after)}. {_ADVICE}")
    return after[len(before) :]


def add(render: Render, verdict: Verdict, joined: Joined, past: Past, messages: Sequence[Message]) -> tuple[str, ...]:
    """The text that ``messages`` add, by message; one text for all where the template does not keep them apart.

    It is rendered after a stand-in for the history where every join is known to hold, else from the whole past.

    Raises:
        UnstableTemplateError: the template changes what it wrote before; the text names the first message that is changed.
        ConversationError: the template refuses the messages.
    """
    roles = [past.role, *(m["role"] for m in messages)]
    if past.sampled and not verdict.separate:
        raise UnstableTemplateError(f"the tokenizer merges a sampled answer with {verdict.closing!r}, which ends a turn. {_ADVICE}")
    trusted = verdict.generation_kept or not past.sampled
    known = trusted and all(Join(*pair, past.features) in verdict.stable for pair in itertools.pairwise(roles)) and not features(messages)
    try:
        if not known:
            return (_added_to_all(render, verdict, joined, past, messages),)
        pieces = tuple(_added(render, role, (message,), verdict.parts) for role, message in zip(roles, messages, strict=False))
        whole = pieces[0] if len(pieces) == 1 else _added(render, roles[0], messages, verdict.parts)
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
                f"message {len(earlier) - 1} (assistant) was sampled after {prompt[-40:]!r}, which the template does not keep in a history: "
                f"{_difference(prompt, before)}. {_ADVICE}"
            )
    if past.sampled and not before.endswith(verdict.closing):
        raise UnstableTemplateError(
            f"the template ends message {len(earlier) - 1} (assistant) with {before[-20:]!r} and not with {verdict.closing!r}. {_ADVICE}"
        )
    added = after[len(before) :]
    if not joined(before[-_TAIL:], added[:_TAIL]):
        raise UnstableTemplateError(f"the tokenizer merges across the join {before[-12:]!r} + {added[:12]!r}. {_ADVICE}")
    return added


#: Characters on either side of a join that are encoded to see whether the tokenizer merges across it.
_TAIL = 256
_ADVICE = (
    "Start the conversation with on_unstable='segment' to open a new segment here, or use a template that keeps history as it was."
)


def _explain(render: Render, history: Sequence[Message], messages: Sequence[Message], before: str, after: str) -> str:
    """Which message of the history comes out differently, and because of which new one."""
    cause = messages[0]
    number = len(history)
    for count in range(1, len(messages) + 1):
        try:
            if not render((*history, *messages[:count]), generation=False).startswith(before):
                cause, number = messages[count - 1], len(history) + count - 1
                break
        except Exception:  # noqa: BLE001, S112 - only the whole may be acceptable to the template
            continue
    at = _common(before, after)
    changed = len(history) - 1
    for count in range(1, len(history) + 1):
        try:
            if len(render(history[:count], generation=False)) > at:
                changed = count - 1
                break
        except Exception:  # noqa: BLE001, S112
            continue
    together = (
        " Tool messages that follow each other must be added in one extend."
        if cause["role"] == history[-1]["role"] == "tool"
        else ""
    )
    return (
        f"message {number} ({cause['role']}) makes the chat template change message {changed} ({history[changed]['role']}): "
        f"{_difference(before, after)}.{together} {_ADVICE}"
    )


def _common(one: str, two: str) -> int:
    return next((i for i, (a, b) in enumerate(zip(one, two, strict=False)) if a != b), min(len(one), len(two)))


def _difference(one: str, two: str) -> str:
    at = _common(one, two)
    return f"...{one[max(at - 20, 0) : at + 30]!r} became ...{two[max(at - 20, 0) : at + 30]!r}"
