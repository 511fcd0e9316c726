"""M11: after a cut an item is whole or gone, and everything else still holds."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from hypothesis.strategies import SearchStrategy

from rollout_core.testing.checks.tracker_base import play, require_equal, require_ids, require_outputs, tracker_check
from rollout_core.testing.registry import Violation
from rollout_core.testing.tracker_cases import TrackerCase
from rollout_core.testing.tracker_encoding import ExpectedItem
from rollout_core.testing.tracker_oracles import Expected, Turn, outputs, positions, splice
from rollout_core.testing.tracker_play import Play
from rollout_core.testing.tracker_strategies import CUT, PLAIN, SCORED, conversations
from rollout_core.testing.trackers import TrackerUnderTest
from rollout_core.testing.worlds import TEMPLATES

_SIDES: Final = ("right", "left")
_SHOWN: Final = ((("user", "tm"),), (("user", "mt"),), (("user", "mn"),), (("user", "t"),), (("tool", "m"),))
#: Messages given together, whose roles seldom or never meet in this order: probing a template hardly sees that.
_TOGETHER: Final = (
    (("user", "tm"), ("system", "s")),
    (("system", "t"), ("user", "tm"), ("system", "tn")),
    (("user", "t"), ("assistant", "sc"), ("user", "t"), ("user", "sm")),
)


@dataclass
class _Cut:
    """A conversation before and after; ``at``: where it was cut, counted in the tokens before; ``items``: those that stayed, at
    their new places."""

    found: Play
    expected: Expected
    ids: list[int]
    side: str
    at: int

    @property
    def items(self) -> list[ExpectedItem]:
        if self.side == "right":
            return [item for item in self.expected.items if item.region[1] <= self.at]
        return [item.moved(-self.at) for item in self.expected.items if item.region[0] >= self.at]


def _cases(worlds: list[str]) -> SearchStrategy[TrackerCase]:
    return conversations(
        worlds=worlds, begun=_SHOWN, added=_SHOWN, samples=(*PLAIN, *CUT, *SCORED), texts=("a", "x y", ""), max_steps=3, places=2
    )


def _together(worlds: list[str]) -> SearchStrategy[TrackerCase]:
    """The same; and fakes in which nothing but the next message ends one, so that a tracker has to know where that begins."""
    endless = [name for name in worlds if name.partition("+")[0] in TEMPLATES and not TEMPLATES[name.partition("+")[0]].end]
    single = _cases(worlds)
    if not endless:
        return single
    return single | conversations(worlds=endless, begun=_TOGETHER, texts=("a", "x y", ""), max_steps=0, places=2)


def _cut(subject: TrackerUnderTest, case: TrackerCase, policy: str = "drop_item") -> _Cut | None:
    """The conversation of a case, cut as its numbers say. None where nothing could stay, or ``error`` was right."""
    found = play(subject, case)
    expected = found.expected()
    total = len(expected.ids)
    length, side = 1 + case.at[0] % total, _SIDES[case.at[1] % 2]
    wanted = length if side == "right" else total - length
    through = [item for item in expected.items if item.envelope[0] < wanted < item.envelope[1]]
    error = found.tracker.refusal(lambda: setattr(found, "state", found.tracker.truncate(found.state, length, side, policy)))
    what = f"truncate to {length} of {total} at the {side}, {policy}"
    if error is not None:
        start, stop = through[0].envelope if through else (wanted, wanted)
        nothing = start == 0 if side == "right" else stop == total
        if policy == "drop_message" or (policy == "error" and through) or nothing:
            return None
        raise Violation(f"{what} raised {type(error).__name__}: {error}")
    if policy == "error" and through:
        raise Violation(f"{what} raised nothing, and the cut is inside {through[0].medium} at {through[0].envelope}")
    ids = found.tracker.input_ids(found.state)
    if len(ids) > length:
        raise Violation(f"{what} left {len(ids)} tokens")
    model = expected.ids[: len(ids)] if side == "right" else expected.ids[total - len(ids) :]
    require_ids(found.world, model, ids, f"the {'beginning' if side == 'right' else 'end'} of what was there")
    return _Cut(found, expected, ids, side, len(ids) if side == "right" else total - len(ids))


@tracker_check(
    "tracker/M11-items",
    "a cut keeps an item whole or drops it whole, with its spans where they now are",
    needs=["truncate"],
    cases=_cases,
)
def items(subject: TrackerUnderTest, case: TrackerCase) -> None:
    cut = _cut(subject, case)
    if cut is None:
        return
    for item in cut.expected.items:
        if item.region[0] < cut.at < item.region[1]:
            raise Violation(f"the cut at {cut.at} is inside {item.medium} at {item.region}")
    if "items" in subject.capabilities:
        rows = cut.found.tracker.items(cut.found.state)
        model = [(item.medium.modality, list(item.spans)) for item in cut.items]
        require_equal("modality and spans of the items that stay", model, [(modality, spans) for modality, spans, _ in rows])


@tracker_check(
    "tracker/M11-openers",
    "what the template wrote around an item goes with it",
    needs=["truncate"],
    cases=_cases,
)
def openers(subject: TrackerUnderTest, case: TrackerCase) -> None:
    cut = _cut(subject, case)
    for item in cut.expected.items if cut else ():
        assert cut is not None
        if item.envelope[0] < cut.at < item.envelope[1]:
            raise Violation(f"the cut at {cut.at} leaves a part of what stands around {item.medium}, which is at {item.envelope}")


@tracker_check(
    "tracker/M11-payload",
    "after a cut the outputs are those of the items that stay",
    needs=["truncate", "multi_modal_inputs"],
    cases=_cases,
)
def payload(subject: TrackerUnderTest, case: TrackerCase) -> None:
    cut = _cut(subject, case)
    if cut is not None:
        model = outputs(cut.found.oracle, cut.items, len(cut.ids))
        actual = cut.found.tracker.multi_modal_inputs(cut.found.state)
        require_outputs(model, actual, cut.found.world.ignored, "one call over the items that stay")


@tracker_check(
    "tracker/M11-arrays",
    "after a cut positions are those of recomputing, and mask and logprobs those of the tokens that stay",
    needs=["truncate"],
    cases=_cases,
)
def arrays(subject: TrackerUnderTest, case: TrackerCase) -> None:
    cut = _cut(subject, case)
    if cut is None:
        return
    tracker, state, rule = cut.found.tracker, cut.found.state, cut.found.oracle.positions
    kept = slice(0, cut.at) if cut.side == "right" else slice(cut.at, None)
    if "loss_mask" in subject.capabilities:
        require_equal("the mask after the cut", cut.expected.mask[kept], tracker.loss_mask(state))
    if "logprobs" in subject.capabilities:
        require_equal("logprobs after the cut", cut.expected.logprobs[kept], tracker.logprobs(state))
    if "position_ids" in subject.capabilities and rule is not None:
        model = positions(rule, len(cut.ids), cut.items)
        require_equal("positions after the cut", model.tolist(), tracker.position_ids(state).tolist())
    if "compact_ids" in subject.capabilities and "expand" in subject.capabilities:
        require_ids(cut.found.world, cut.ids, tracker.expand(state, tracker.compact_ids(state)), "input_ids after the cut")


@tracker_check(
    "tracker/M11-error",
    "under the policy error a cut inside an item raises, and no other does",
    traits=("stable", "sums", "plain joins"),
    needs=["truncate"],
    cases=_cases,
)
def error_policy(subject: TrackerUnderTest, case: TrackerCase) -> None:
    _cut(subject, case, "error")


@tracker_check(
    "tracker/M11-messages",
    "under the policy drop_message the cut is between messages",
    needs=["truncate"],
    cases=_together,
)
def message_policy(subject: TrackerUnderTest, case: TrackerCase) -> None:
    cut = _cut(subject, case, "drop_message")
    if cut is None:
        return
    single: list[Turn] = []
    for turn in cut.found.turns:
        single += [turn] if turn.ids is not None else [Turn(messages=(message,)) for message in turn.messages]
    bounds = {0, len(cut.expected.ids)}
    for count in range(1, len(single) + 1):
        try:
            part = splice(cut.found.oracle, single[:count])
        except ValueError:  # a template may need more messages than these
            continue
        bounds |= {len(part.ids), len(part.ids) + len(part.tail)}
    if cut.at not in bounds:
        raise Violation(f"the cut at {cut.at} is inside a message; messages end at {sorted(bounds)}")
