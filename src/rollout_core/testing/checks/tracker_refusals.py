"""M3, M10: what cannot be added is refused, and leaves everything as it was."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Final

import msgspec
import numpy as np
from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy

from rollout_core.testing.checks.tracker_base import (
    require_ids,
    require_items,
    require_outputs,
    require_views,
    shown,
    tracker_check,
)
from rollout_core.testing.registry import Violation
from rollout_core.testing.tracker_cases import MediumCase, MessageCase, Step, TrackerCase
from rollout_core.testing.tracker_oracles import outputs, render, splice, whole
from rollout_core.testing.tracker_play import Play, turn_of, views
from rollout_core.testing.tracker_strategies import PLAIN, conversations
from rollout_core.testing.trackers import TrackerUnderTest
from rollout_core.testing.worlds import World, world_info

_TEXT = ((("user", "t"),), (("tool", "t"),), (("user", "tm"),), (("tool", "t"), ("tool", "s")))
_THOUGHTS = ("a", "<think>b</think>a", "b\n", "<think>\n</think>\na.")
_UNSTABLE = ("strips-thinking+rows", "counts-media+rows", "groups-tools+rows", "plain-end+rows")


def _unstable(worlds: Sequence[str]) -> SearchStrategy[TrackerCase]:
    made = partial(conversations, worlds=worlds, begun=_TEXT[:1], added=_TEXT, samples=PLAIN, texts=_THOUGHTS)
    return made(min_steps=1, max_steps=5) | made(min_steps=2, max_steps=4, alternating=True)


@tracker_check(
    "tracker/M3-changed",
    "where the template changes what it wrote, the tracker refuses or begins a new segment, and never goes on as if nothing were",
    traits=("sums",),
    lacks=("stable",),
    only=_UNSTABLE,
    cases=_unstable,
)
def changed(subject: TrackerUnderTest, case: TrackerCase) -> None:
    found = Play(subject, case.world)
    for step in case.steps:
        if not found.can(step):
            continue
        before = found.tracker.input_ids(found.state) if found.state is not None else []
        turns = (*found.turns, turn_of(found.oracle, step))
        error = found.tracker.refusal(partial(found.do, step))
        if step.operation == "sample":
            if error is not None:
                return  # a generation prompt that depends on what follows
            continue
        model, _ = whole(found.oracle, turns)
        breaks = model[: len(before)] != before
        if error is not None:
            if breaks and "segments" in subject.capabilities:
                raise Violation(f"{step} changes earlier ids, and the tracker, which claims 'segments', refused it: {error}")
            return
        ids = found.tracker.input_ids(found.state)
        if breaks and "refuses" in subject.capabilities:
            at = next(i for i, (a, b) in enumerate(zip([*model, -1], before, strict=False)) if a != b)
            raise Violation(
                f"{step} was accepted, and changes ids from {at} on: the template now gives "
                f"{shown(found.world, model[at : at + 5])}, before it gave {shown(found.world, before[at : at + 5])}"
            )
        require_ids(found.world, model, ids, "the template, over the whole conversation,")


@tracker_check(
    "tracker/M3-names",
    "a refusal says which message broke it",
    traits=("sums",),
    lacks=("stable",),
    only=_UNSTABLE[:2],
    needs=["refuses"],
    cases=_unstable,
)
def names(subject: TrackerUnderTest, case: TrackerCase) -> None:
    found = Play(subject, case.world)
    for step in case.steps:
        if not found.can(step):
            continue
        turns = (*found.turns, turn_of(found.oracle, step))
        before = render(found.oracle, found.turns) if found.turns else ""
        after = render(found.oracle, turns)
        error = found.tracker.refusal(partial(found.do, step))
        if error is None:
            continue
        if after.startswith(before):
            return
        count = sum(len(turn.messages) or 1 for turn in found.turns)
        numbers = [str(number) for number in range(count + len(step.messages))]
        if not any(number in str(error) for number in numbers):
            raise Violation(f"{step} was refused, and the error names no message: {error}")
        return


# ------------------------------------------------------------------------------------------------ M10

_FILE: Final = MediumCase(width=3, height=3, form="bytes")


def _part(modality: str, medium: Any) -> dict[str, Any]:
    return {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": modality, modality: medium}]}


def _good(world: World) -> dict[str, Any]:
    return MessageCase("user", ("a", next(iter(_media(world))))).make()


def _media(world: World) -> list[MediumCase]:
    return [MediumCase(modality, 4, 4, 7) for modality in world_info(world.name).modalities]  # type: ignore[arg-type]


#: Messages that nobody can add, by what is wrong with them.
MESSAGES: Final[dict[str, Callable[[World], list[Any]]]] = {
    "no messages": lambda world: [],
    "a message that is none": lambda world: ["a"],
    "a message without role": lambda world: [{"content": "a"}],
    "a lone surrogate": lambda world: [{"role": "user", "content": "a\ud800"}],
    "a part of unknown type": lambda world: [{"role": "user", "content": [{"type": "smell", "smell": "a"}]}],
    "a modality that the processor has not": lambda world: [_part(_lacking(world), np.ones(9, np.float32))],
    "a good message, then one without role": lambda world: [_good(world), {"content": "a"}],
}  # fmt: skip
#: Those of them that templates refuse, if they do.
BY_TEMPLATE: Final = ("a part of unknown type", "a modality that the processor has not")
#: Pictures that are none.
PICTURES: Final[dict[str, Callable[[World], list[Any]]]] = {
    "a picture part without picture": lambda world: [{"role": "user", "content": [{"type": "image"}]}],
    "a picture of no pixels": lambda world: [_part("image", np.zeros((0, 4, 3), np.uint8))],
    "bytes that are no picture": lambda world: [_part("image", b"no picture")],
    "a file cut short": lambda world: [_part("image", _FILE.make()[:50])],
    "None for a picture": lambda world: [_part("image", None)],
    "a good picture, then one of no pixels": lambda world: [_good(world), _part("image", np.zeros((4, 0, 3), np.uint8))],
    "a good picture and bytes that are none in one message": lambda world: [
        {"role": "user", "content": [*_good(world)["content"], *_part("image", b"no picture")["content"]]}
    ],
}
#: Sampled ids, logprobs and finish that are none.
SAMPLED: Final[dict[str, Callable[[World], tuple[Any, Any, Any]]]] = {
    "an id beyond the vocabulary": lambda world: ([97, len(world.tokenizer)], None, "stop"),
    "a negative id": lambda world: ([97, -1], None, "stop"),
    "an id that is no whole number": lambda world: ([97, 1.5], None, "stop"),
    "text for ids": lambda world: ("ab", None, "stop"),
    "fewer logprobs than ids": lambda world: ([97, 98], [-0.5], "stop"),
    "more logprobs than ids": lambda world: ([97], [-0.5, -0.25], "stop"),
    "an unknown finish": lambda world: ([97], None, "exploded"),
}


def _lacking(world: World) -> str:
    return next(modality for modality in ("audio", "video", "image") if modality not in world.shown)


def _with_kind(kinds: Sequence[str], worlds: Sequence[str]) -> SearchStrategy[TrackerCase]:
    cases = conversations(worlds=worlds, samples=PLAIN, texts=("a", "b"), max_steps=2)
    return st.builds(lambda kind, case: msgspec.structs.replace(case, kind=kind), st.sampled_from(tuple(kinds)), cases)


@tracker_check(
    "tracker/M10-message",
    "messages that cannot be added are refused, and change nothing",
    traits=("stable", "sums", "counted"),
    only=("chatml+rows", "chatml+tiles", "glm+bare", "system+rows", "chatml+heard"),
    cases=partial(_with_kind, tuple(MESSAGES)),
)
def bad_message(subject: TrackerUnderTest, case: TrackerCase) -> None:
    _refused(subject, case, MESSAGES[case.kind])


@tracker_check(
    "tracker/M10-picture",
    "pictures that cannot be read are refused with all that came with them, and change nothing",
    traits=("stable", "sums", "counted"),
    only=("chatml+rows", "chatml+tiles", "glm+bare", "chatml+stacked"),
    cases=partial(_with_kind, tuple(PICTURES)),
)
def bad_picture(subject: TrackerUnderTest, case: TrackerCase) -> None:
    _refused(subject, case, PICTURES[case.kind])


@tracker_check(
    "tracker/M10-template",
    "messages that the template refuses are refused, and change nothing",
    traits=("stable", "sums"),
    lacks=("tool media",),
    only=("text-tools+rows",),
    cases=lambda worlds: conversations(worlds=worlds, samples=PLAIN, texts=("a", "b"), max_steps=2),
)
def bad_for_the_template(subject: TrackerUnderTest, case: TrackerCase) -> None:
    _refused(subject, case, lambda world: [MessageCase("tool", ("a", MediumCase(width=4))).make()], "media in a tool message")


@tracker_check(
    "tracker/M10-sampled",
    "ids outside the vocabulary and logprobs of another length are refused, and change nothing",
    traits=("stable", "sums", "counted"),
    only=("chatml+rows", "glm+bare"),
    cases=partial(_with_kind, tuple(SAMPLED)),
)
def bad_sample(subject: TrackerUnderTest, case: TrackerCase) -> None:
    found = Play(subject, case.world)
    found.run(case)
    if not found.can(Step("sample")):
        return
    ids, logprobs, finish = SAMPLED[case.kind](found.world)
    _unchanged(found, case.kind, lambda: found.tracker.append_sampled(found.state, ids, logprobs, finish))


def _refused(subject: TrackerUnderTest, case: TrackerCase, make: Callable[[World], list[Any]], what: str = "") -> None:
    found = Play(subject, case.world)
    found.run(case)
    _unchanged(found, what or case.kind, lambda: found.tracker.extend(found.state, make(found.world)))


def _unchanged(found: Play, what: str, call: Callable[[], Any]) -> None:
    """A call is refused, what is seen stays, and what comes after is what it would have been."""
    before = views(found.tracker, found.state)
    if found.tracker.refusal(call) is None:
        raise Violation(f"{what}: no error was raised")
    require_views(f"{what} was refused, and has changed the conversation", before, views(found.tracker, found.state))
    found.do(Step("extend", (MessageCase("user", ("b", *_media(found.oracle)[:1])),)))
    expected = splice(found.oracle, found.turns)
    try:
        require_ids(found.world, expected.ids, found.tracker.input_ids(found.state))
        if "items" in found.tracker.capabilities:
            require_items(found, expected)
        if "multi_modal_inputs" in found.tracker.capabilities:
            model = outputs(found.oracle, expected.items, len(expected.ids))
            require_outputs(model, found.tracker.multi_modal_inputs(found.state), found.world.ignored)
    except Violation as violation:
        raise Violation(f"{what} was refused; after the next message {violation}") from None
