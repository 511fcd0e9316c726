"""Rendering many small conversations, to learn where a chat template is stable."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache

from rollout_core.errors import UnstableTemplateError
from rollout_core.multimodal.messages import Message
from rollout_core.multimodal.templates.additions import added, difference, shared_start
from rollout_core.multimodal.templates.shapes import recent_of, shapes
from rollout_core.multimodal.templates.verdict import Break, Join, Joined, Render, Verdict, features, formed

#: Characters on either side of a join that are encoded. The probed texts are short, so that this is a message's end and beginning.
_NEAR = 48
#: Answers that tokenizers may merge with what follows.
_ENDINGS = ("an answer", "done.", "5", "a\n", "so ", "x <", "(", "\u00e9\u00e9", "```")


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
    render, joined = _remembering(render, parts), cache(joined)
    closing, generation = _turn_texts(render)
    for messages in {repr(shape): shape for shape in shapes(tuple(placeholders))}.values():
        try:
            whole = [render(messages[:n], generation=False) for n in range(1, len(messages) + 1)]
        except Exception:
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
            constant = constant and prompt == whole[n - 1] + generation and joined(whole[n - 1][-_NEAR:], generation)
            if not whole[n].startswith(prompt):
                kept = False
    separate = all(joined(answer, closing) for answer in _ENDINGS)
    if not separate:
        broken.setdefault(Join("assistant", "user"), f"the tokenizer merges an answer with the text that ends a turn, {closing!r}")
    envelopes = {m: e for m, p in placeholders.items() if (e := _envelope(render, m, p)) is not None}
    breaks = tuple(Break(join, what) for join, what in sorted(broken.items()))
    return Verdict(
        frozenset(good - set(broken)), breaks, closing, generation if constant else None, kept, separate, parts, envelopes, probed
    )


def _problem(render: Render, messages: Sequence[Message], n: int, whole: Sequence[str], closing: str, joined: Joined) -> str | None:
    before, after = whole[n - 1], whole[n]
    if not after.startswith(before):
        return f"a {messages[n]['role']} message changes earlier text: {difference(before, after)}"
    if messages[n - 1]["role"] == "assistant" and not before.endswith(closing):
        return f"the template ends this turn with {before[-len(closing) :]!r} and others with {closing!r}"
    try:
        short = added(render, recent_of(messages[:n]), messages[n : n + 1], parts=False)
    except Exception as error:
        return f"the template refuses a short history: {error}"
    if short != after[len(before) :]:
        return f"what a {messages[n]['role']} message adds depends on earlier ones: {difference(after[len(before) :], short)}"
    if not joined(before[-_NEAR:], short[:_NEAR]):
        return f"the tokenizer merges across the join {before[-12:]!r} + {short[:12]!r}"
    return None


def _wants_parts(render: Render) -> bool:
    """Whether the template writes an assistant's content only if it is a list of parts."""
    user, answer = {"role": "user", "content": "x"}, {"role": "assistant", "content": "\ue000"}
    for parts in (False, True):
        try:
            shown = render(tuple(formed(m, parts) for m in (user, answer)), generation=False)
        except Exception:
            continue
        if "\ue000" in shown:
            return parts
    return False


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
        raise UnstableTemplateError(f"the generation prompt changes earlier text: {difference(base, prompt)}")
    return turn.partition(mark)[2], prompt[len(base) :]


def _envelope(render: Render, modality: str, placeholder: str) -> tuple[str, str] | None:
    """The text before and after a placeholder that the template writes because of the medium."""
    text = [{"type": "text", "text": "\ue000"}, {"type": modality}, {"type": "text", "text": "\ue001"}]
    try:
        shown = render(({"role": "user", "content": text},), generation=False)
        bare = render(({"role": "user", "content": [text[0], text[2]]},), generation=False)
    except Exception:
        return None
    start = shared_start(shown, bare)
    stop = len(shown) - min(shared_start(shown[::-1], bare[::-1]), len(bare) - start)
    prefix, found, suffix = shown[start:stop].partition(placeholder)
    return (prefix, suffix) if found else None
