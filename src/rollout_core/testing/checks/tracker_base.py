"""What the checks of trackers share: how one is declared, which worlds it is tried in, and how differences are told."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any, Final, TypeAlias

from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy

from rollout_core.testing.registry import Check, Skipped, Violation, register
from rollout_core.testing.tracker_cases import TrackerCase
from rollout_core.testing.tracker_oracles import Expected
from rollout_core.testing.tracker_play import Play, plain
from rollout_core.testing.tracker_strategies import conversations
from rollout_core.testing.trackers import TrackerUnderTest
from rollout_core.testing.worlds import World, world_names

RunTracker: TypeAlias = Callable[[TrackerUnderTest, TrackerCase], Any]
#: From the names of worlds the cases of a check.
Cases: TypeAlias = Callable[[list[str]], SearchStrategy[TrackerCase]]

#: How a world is asked for among a subject's capabilities: ``check_tracker(..., worlds=[...])``.
ASKED: Final = "world="


def tracker_check(
    id: str,
    title: str,
    *,
    cases: Cases | None = None,
    traits: Collection[str] = ("stable", "sums"),
    lacks: Collection[str] = (),
    modality: str | None = None,
    only: Sequence[str] = (),
    needs: Collection[str] = (),
    cost: int = 1,
) -> Callable[[RunTracker], RunTracker]:
    """Declare a check of trackers. It is tried in the worlds that have all ``traits``, none that it ``lacks``, and the
    ``modality``; where ``only`` names fakes, in those of them. ``cases``: from the names of these worlds; conversations of any
    kind unless given."""

    def strategy(capabilities: frozenset[str]) -> SearchStrategy[TrackerCase]:
        asked = sorted(word.removeprefix(ASKED) for word in capabilities if word.startswith(ASKED))
        names = world_names(*traits, modality=modality, among=asked or only or None)
        names = [name for name in names if not any(name in world_names(trait, among=[name]) for trait in lacks)]
        return (cases or (lambda found: conversations(worlds=found)))(names) if names else st.just(TrackerCase(world=""))

    def declare(run: RunTracker) -> RunTracker:
        def judged(subject: TrackerUnderTest, case: TrackerCase) -> Any:
            if not case.world:
                what = [*traits, *(f"no {word}" for word in lacks), *([f"takes {modality}"] if modality else [])]
                raise Skipped(f"none of the worlds that were asked for is one with: {', '.join(what)}")
            return run(subject, case)

        register(
            Check(
                id=id,
                title=title,
                run=judged,
                cases=strategy,
                case_type=TrackerCase,
                needs=frozenset(needs),
                script="tracker",
                cost=cost,
            )
        )
        return run

    return declare


def one_of_each(worlds: Sequence[str]) -> list[str]:
    """The first fake of each kind of processing, and all worlds that are no fakes."""
    found: dict[str, str] = {}
    for name in worlds:
        found.setdefault(name.partition("+")[2] or name, name)
    return list(found.values())


def play(subject: TrackerUnderTest, case: TrackerCase) -> Play:
    """The program of a case, done; ``Violation`` where the tracker refuses a step."""
    found = Play(subject, case.world)
    found.run(case)
    return found


def require_ids(world: World, model: Sequence[int], actual: Sequence[int], whose: str = "the template") -> None:
    """``Violation`` unless the ids are equal; it shows the first difference in words."""
    if list(model) == list(actual):
        return
    at = next((i for i, (a, b) in enumerate(zip(model, actual, strict=False)) if a != b), min(len(model), len(actual)))
    raise Violation(
        f"{whose} gives {len(model)} ids, the tracker {len(actual)}; the first difference is at {at}: "
        f"{shown(world, model[at : at + 6])}, the tracker has {shown(world, actual[at : at + 6])}"
    )


def shown(world: World, ids: Sequence[int]) -> str:
    """Ids as text."""
    if not ids:
        return "the end"
    try:
        text = world.tokenizer.decode(list(ids), skip_special_tokens=False)
    except (IndexError, KeyError, OverflowError):
        return str(list(ids))
    return f"{text!r} {list(ids)}"


def require_equal(what: str, model: Any, actual: Any) -> None:
    """``Violation`` that shows both unless they are equal."""
    if model != actual:
        raise Violation(f"{what} (model: {_short(model)}, actual: {_short(actual)})")


def require_items(found: Play, expected: Expected) -> None:
    """``Violation`` unless the tracker has these items at these spans."""
    rows = found.tracker.items(found.state)
    model = [(item.medium.modality, list(item.spans)) for item in expected.items]
    require_equal("modality and spans of the items differ", model, [(modality, spans) for modality, spans, _ in rows])


def require_outputs(model: dict[str, Any], actual: dict[str, Any], ignored: Collection[str] = (), whose: str = "one call") -> None:
    """``Violation`` unless the outputs are equal, byte for byte."""
    one, other = ({key: value for key, value in plain(each).items() if key not in ignored} for each in (model, actual))
    if one.keys() != other.keys():
        raise Violation(f"{whose} gives outputs {sorted(one)}, the tracker {sorted(other)}")
    for key in one:
        if one[key][:2] != other[key][:2]:
            raise Violation(
                f"{whose} gives {key} {one[key][0]}{list(one[key][1])}, the tracker {other[key][0]}{list(other[key][1])}"
            )
        if one[key] != other[key]:
            width = max(1, len(one[key][2]) // max(1, _count(one[key][1])))
            at = next(i for i, (a, b) in enumerate(zip(one[key][2], other[key][2], strict=True)) if a != b)
            raise Violation(f"{key} {one[key][0]}{list(one[key][1])} has other bytes than {whose}, first in element {at // width}")


def require_views(what: str, model: dict[str, Any], actual: dict[str, Any]) -> None:
    """``Violation`` that names the first thing in which two states differ."""
    for name in model:
        if model[name] != actual[name]:
            if name == "multi_modal_inputs":
                changed = [key for key in {**model[name], **actual[name]} if model[name].get(key) != actual[name].get(key)]
                raise Violation(f"{what}: {name} differ in {sorted(changed)}")
            raise Violation(f"{what}: {name} (before: {_short(model[name])}, after: {_short(actual[name])})")


def _count(shape: Sequence[int]) -> int:
    count = 1
    for side in shape:
        count *= side
    return count


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 300 else f"{text[:200]} ... {text[-60:]}"
