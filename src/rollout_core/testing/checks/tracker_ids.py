"""M1, M2, M17: ids never change, equal those of the whole conversation, and do not depend on how messages were added."""

from __future__ import annotations

from functools import partial

from rollout_core.testing.checks.tracker_base import play, require_ids, tracker_check
from rollout_core.testing.registry import Violation
from rollout_core.testing.tracker_cases import Step, TrackerCase
from rollout_core.testing.tracker_oracles import render, splice, whole
from rollout_core.testing.tracker_play import Play, turn_of
from rollout_core.testing.tracker_strategies import CUT, PLAIN, SPELLED, conversations
from rollout_core.testing.trackers import TrackerUnderTest

_SHOWN = ((("user", "m"),), (("user", "tm"),), (("user", "mn"),), (("tool", "mt"),), (("user", "t"),))
_TEXT = ((("user", "t"),), (("tool", "t"),))


@tracker_check("tracker/M1-prefix", "what stands there stays there, whatever is added")
def prefix(subject: TrackerUnderTest, case: TrackerCase) -> None:
    found = Play(subject, case.world)
    before: list[int] = []
    for place, step in found.steps(case):
        ids = found.tracker.input_ids(found.state)
        if ids[: len(before)] != before:
            try:
                require_ids(found.world, before, ids[: len(before)], "the state before")
            except Violation as violation:
                raise Violation(f"step {place} ({step.operation}) changed earlier ids: {violation}") from None
        before = ids


@tracker_check(
    "tracker/M1-verbatim",
    "sampled ids are kept as they were sampled, and stay so",
    cases=lambda worlds: conversations(worlds=worlds, samples=(*SPELLED, *PLAIN, *CUT), min_steps=1),
)
def verbatim(subject: TrackerUnderTest, case: TrackerCase) -> None:
    found = Play(subject, case.world)
    kept: list[tuple[int, tuple[int, ...]]] = []
    for place, _ in found.steps(case):
        ids = found.tracker.input_ids(found.state)
        turn = found.turns[-1]
        if turn.ids is not None:
            tail = splice(found.oracle, found.turns).tail
            more = len(tail) if tail and ids[-len(tail) :] == tail and tuple(ids[-len(turn.ids) :]) != turn.ids else 0
            kept.append((len(ids) - more - len(turn.ids), turn.ids))
        for at, sampled in kept:
            try:
                require_ids(found.world, sampled, ids[max(at, 0) : at + len(sampled)], "the policy")
            except Violation as violation:
                raise Violation(f"after step {place} sampled ids are not what was sampled: {violation}") from None


@tracker_check(
    "tracker/M2-template",
    "the ids are those of the whole conversation rendered and encoded at once",
    cases=lambda worlds: conversations(worlds=worlds, samples=(*PLAIN, *CUT)),
)
def template(subject: TrackerUnderTest, case: TrackerCase) -> None:
    found = play(subject, case)
    expected = splice(found.oracle, found.turns)
    if not expected.clean:
        return
    model, _ = whole(found.oracle, found.turns)
    ids = found.tracker.input_ids(found.state)
    tail = expected.tail
    if tail and model[-len(tail) :] == tail and len(ids) == len(model) - len(tail):
        model = model[: -len(tail)]
    require_ids(found.world, model, ids)


@tracker_check("tracker/M2-splice", "around sampled ids stands what the template writes there, once")
def spliced(subject: TrackerUnderTest, case: TrackerCase) -> None:
    found = play(subject, case)
    require_ids(found.world, found.expected().ids, found.tracker.input_ids(found.state))


@tracker_check(
    "tracker/M2-separator",
    "what ends a turn and is never sampled stands between the turn and the next message",
    cases=lambda worlds: conversations(
        worlds=worlds, begun=_TEXT[:1], added=_TEXT, samples=PLAIN, texts=("a", "b"), min_steps=1, max_steps=3, alternating=True
    ),
)
def separator(subject: TrackerUnderTest, case: TrackerCase) -> None:
    spliced(subject, case)


@tracker_check(
    "tracker/M2-cut-turn",
    "a turn without its end gets the template's when messages follow",
    cases=lambda worlds: conversations(
        worlds=worlds, begun=_TEXT[:1], added=_TEXT, samples=CUT, texts=("a", "b"), min_steps=2, max_steps=4
    ),
)
def cut_turn(subject: TrackerUnderTest, case: TrackerCase) -> None:
    spliced(subject, case)


@tracker_check(
    "tracker/M2-history",
    "what a template writes for a message from what came before, such as the number of a picture, is right",
    only=("numbered+rows", "media-first+rows", "system+rows", "trims+soft"),
    cases=lambda worlds: conversations(worlds=worlds, begun=_SHOWN, added=_SHOWN, samples=PLAIN, texts=("a", "b"), max_steps=3),
)
def history(subject: TrackerUnderTest, case: TrackerCase) -> None:
    spliced(subject, case)


@tracker_check(
    "tracker/M2-prompt",
    "the policy is shown the template's generation prompt, and its answer stands right after it",
    needs=["prompt_ids"],
    cases=lambda worlds: conversations(worlds=worlds, samples=(*PLAIN, *SPELLED), max_steps=4),
)
def prompt(subject: TrackerUnderTest, case: TrackerCase) -> None:
    found = Play(subject, case.world)
    for _, step in found.steps(case):
        if step.operation == "sample":
            continue
        seen = found.tracker.prompt_ids(found.state)
        sampled = Step("sample", text="a", stop=False, finish="length")
        other = Play(subject, case.world)
        other.turns = found.turns
        expected = splice(other.oracle, [*found.turns, turn_of(other.oracle, sampled)])
        model = expected.ids[: expected.sampled_at[-1][0]]
        require_ids(found.world, model, seen, f"the prompt {render(found.oracle, found.turns, generation=True)[-24:]!r}")


def _one_by_one(case: TrackerCase) -> TrackerCase:
    """The same program with every message in a call of its own."""
    steps: list[Step] = []
    for step in case.steps:
        if step.operation == "sample":
            steps.append(step)
            continue
        for message in step.messages:
            alone = step.operation == "start" and message.role == "system"
            begins = not steps or (len(steps) == 1 and steps[0].messages[-1].role == "system")
            if begins and not alone and steps:
                steps[0] = Step("start", (*steps[0].messages, message))  # some templates need a user's message at once
            else:
                steps.append(Step("extend" if steps else "start", (message,)))
    return TrackerCase(world=case.world, steps=tuple(steps))


@tracker_check(
    "tracker/M17-together",
    "messages added together give what they give one at a time",
    cases=lambda worlds: conversations(worlds=worlds, samples=PLAIN, max_steps=4),
)
def together(subject: TrackerUnderTest, case: TrackerCase) -> None:
    one, other = play(subject, case), play(subject, _one_by_one(case))
    ids = [found.tracker.input_ids(found.state) for found in (one, other)]
    require_ids(one.world, ids[0], ids[1], "adding the messages together")


@tracker_check(
    "tracker/M17-tools",
    "tool messages that the template groups come out as it writes them, or are refused one at a time",
    traits=("sums",),
    only=("groups-tools+rows",),
    cases=lambda worlds: conversations(
        worlds=worlds, begun=_TEXT[:1], added=(*_TEXT[1:], (("tool", "t"), ("tool", "s"))), samples=PLAIN, min_steps=1, max_steps=4
    ),
)
def tools(subject: TrackerUnderTest, case: TrackerCase) -> None:
    found = Play(subject, case.world)
    for step in case.steps:
        if not found.can(step):
            continue
        error = found.tracker.refusal(partial(found.do, step))
        after_tool = bool(found.turns) and bool(found.turns[-1].messages) and found.turns[-1].messages[-1].role == "tool"
        if error is None:
            continue
        if not (after_tool and step.operation == "extend" and step.messages[0].role == "tool"):
            raise Violation(f"{step} was refused, and nothing that the template wrote changes by it: {error}")
        if not subject.capabilities & {"groups tools", "refuses"}:
            raise Violation(f"{step} was refused, and the tracker does not claim 'groups tools': {error}")
        return
    model = found.expected()
    if "segments" in subject.capabilities:
        return
    require_ids(found.world, model.ids, found.tracker.input_ids(found.state))
