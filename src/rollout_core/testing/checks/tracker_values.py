"""M15, M16: states as values, and what growing one costs."""

from __future__ import annotations

from typing import Final

import msgspec
from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy

from rollout_core.testing.checks.tracker_base import play, require_ids, require_views, tracker_check
from rollout_core.testing.registry import Violation
from rollout_core.testing.tracker_cases import MediumCase, MessageCase, Step, TrackerCase
from rollout_core.testing.tracker_play import Play, turn_of, views
from rollout_core.testing.tracker_strategies import CUT, PLAIN, SAMPLES, SCORED, conversations
from rollout_core.testing.trackers import TrackerUnderTest

_SHOWN: Final = ((("user", "tm"),), (("user", "m"),), (("user", "t"),), (("user", "mm"),), (("tool", "mt"),))


def _branches(found: Play) -> list[Step]:
    """Ways to go on, from which forks are grown."""
    medium = MediumCase(next(iter(found.world.shown)), 4, 4, 9)  # type: ignore[arg-type]
    return [
        Step("extend", (MessageCase("user", ("b",)),)),
        Step("extend", (MessageCase("user", (medium, "b")),)),
        Step("sample", text="b", logprobs="all"),
        Step("sample", text="1", stop=False, finish="length"),
    ]


@tracker_check(
    "tracker/M15-isolated",
    "forks grow as if they were alone, in any order, and what they grew from stays as it was",
    needs=["forks"],
    cases=lambda worlds: conversations(worlds=worlds, max_steps=3, places=2),
    cost=3,
)
def isolated(subject: TrackerUnderTest, case: TrackerCase) -> None:
    base = play(subject, case)
    ways = [step for step in _branches(base) if base.can(step)]
    before = views(base.tracker, base.state)
    picked = [ways[number % len(ways)] for number in case.at]
    grown = [base.applied(base.state, turn_of(base.oracle, step)) for step in picked]
    require_views("growing forks of a state has changed it", before, views(base.tracker, base.state))
    for step, state in zip(picked, grown, strict=True):
        alone = play(subject, case)
        alone.do(step)
        model, actual = views(alone.tracker, alone.state), views(base.tracker, state)
        require_views(f"the fork with {step} is not what it is alone", model, actual)


@tracker_check(
    "tracker/M15-shared",
    "forks share what was processed: growing many processes nothing again",
    traits=("stable", "sums", "counted"),
    needs=["forks"],
    cases=lambda worlds: conversations(worlds=worlds, begun=_SHOWN, added=_SHOWN, samples=PLAIN, texts=("a",), max_steps=2),
)
def shared(subject: TrackerUnderTest, case: TrackerCase) -> None:
    found = play(subject, case)
    assert found.world.counts is not None
    views(found.tracker, found.state)
    before = found.world.counts.items
    turn = turn_of(found.oracle, Step("extend", (MessageCase("user", ("b",)),)))
    for _ in range(3):
        views(found.tracker, found.applied(found.state, turn))
    if found.world.counts.items != before:
        raise Violation(f"three forks without new media processed {found.world.counts.items - before} items")


@tracker_check(
    "tracker/M15-serialise",
    "a state that was written and read is the same, and goes on the same",
    needs=["to_bytes"],
    cases=lambda worlds: conversations(worlds=worlds, samples=(*PLAIN, *CUT, *SCORED), max_steps=5, places=1),
)
def serialise(subject: TrackerUnderTest, case: TrackerCase) -> None:
    found = play(subject, case)
    before = views(found.tracker, found.state)
    data = found.tracker.to_bytes(found.state)
    other = Play(subject, case.world)
    other.state, other.turns = other.tracker.from_bytes(data), found.turns
    require_views("a state is not what was written", before, views(other.tracker, other.state))
    ways = [step for step in _branches(found) if found.can(step)]
    for step in (ways[case.at[0] % len(ways)], ways[1]):
        for each in (found, other):
            each.do(step)
        model, actual = views(found.tracker, found.state), views(other.tracker, other.state)
        require_views(f"a state that was read goes on otherwise with {step}", model, actual)


@tracker_check(
    "tracker/M16-work",
    "each item is processed once, however often the conversation is grown and read",
    traits=("stable", "sums", "counted"),
    cases=lambda worlds: conversations(worlds=worlds, begun=_SHOWN, added=_SHOWN, samples=SAMPLES, texts=("a", ""), max_steps=6),
)
def work(subject: TrackerUnderTest, case: TrackerCase) -> None:
    found = Play(subject, case.world)
    assert found.world.counts is not None
    for place, step in found.steps(case):
        views(found.tracker, found.state)
        if "prompt_ids" in subject.capabilities and step.operation != "sample":
            found.tracker.prompt_ids(found.state)
        given = sum(len(message.media()) for turn in found.turns for message in turn.messages)
        if found.world.counts.items > given:
            raise Violation(
                f"after step {place} ({step.operation}) {found.world.counts.items} items were processed; {given} were added"
            )


@tracker_check(
    "tracker/M16-ten-turns",
    "ten turns with a picture each process eleven pictures or fewer",
    traits=("stable", "sums", "counted"),
    modality="image",
    cases=lambda worlds: st.sampled_from(worlds).map(lambda world: TrackerCase(world=world)),
    cost=10,
)
def ten_turns(subject: TrackerUnderTest, case: TrackerCase) -> None:
    found = Play(subject, case.world)
    assert found.world.counts is not None
    found.do(Step("start", (MessageCase("user", ("a",)),)))
    for turn in range(10):
        found.do(Step("sample", text="a"))
        found.do(Step("extend", (MessageCase("user", ("a", MediumCase(width=4, seed=turn))),)))
        if "multi_modal_inputs" in subject.capabilities:
            found.tracker.multi_modal_inputs(found.state)
    if found.world.counts.items > 11:
        raise Violation(f"ten pictures in ten turns were processed {found.world.counts.items} times")


def _repeated(worlds: list[str]) -> SearchStrategy[TrackerCase]:
    cases = conversations(
        worlds=worlds, begun=_SHOWN, added=_SHOWN, samples=PLAIN, texts=("a", "x y"), min_steps=2, max_steps=2, alternating=True
    )
    return cases.map(lambda case: msgspec.structs.replace(case, steps=(*case.steps, *case.steps[1:] * 9)))


@tracker_check(
    "tracker/M16-proportional",
    "what is encoded for a turn is in proportion to the turn, not to what came before",
    traits=("stable", "sums", "counted", "plain joins"),
    cases=_repeated,
    cost=10,
)
def proportional(subject: TrackerUnderTest, case: TrackerCase) -> None:
    found = Play(subject, case.world)
    counts = found.world.counts
    assert counts is not None
    cost: list[int] = []
    before = counts.characters
    for _, step in found.steps(case):
        if step.operation == "extend":
            cost.append(counts.characters - before)
            before = counts.characters
    if len(cost) < 8:
        return
    early, late = max(cost[1:4]), max(cost[-3:])
    if late > 1.5 * early + 16:
        raise Violation(f"turns 2 to 4 encoded up to {early} characters each, the last three, which say the same, up to {late}")


@tracker_check(
    "tracker/M15-rolled-back",
    "an earlier state can be taken up again, as if what came after it had never been",
    needs=["forks"],
    cases=lambda worlds: conversations(worlds=worlds, max_steps=4, places=2),
    cost=3,
)
def rolled_back(subject: TrackerUnderTest, case: TrackerCase) -> None:
    found = Play(subject, case.world)
    kept = []
    for _ in found.steps(case):
        kept.append((found.state, found.turns))
    found.state, found.turns = kept[case.at[0] % len(kept)]
    ways = [step for step in _branches(found) if found.can(step)]
    found.do(ways[case.at[1] % len(ways)])
    require_ids(found.world, found.expected().ids, found.tracker.input_ids(found.state))
    alone = Play(subject, case.world)
    for turn in found.turns:
        alone.state = alone.applied(alone.state, turn)
    require_views("a state that was taken up again", views(alone.tracker, alone.state), views(found.tracker, found.state))
