"""M7, M8, M12: payloads, positions and arrays, each beside what the whole conversation gives."""

from __future__ import annotations

from rollout_core.testing.checks.tracker_base import one_of_each, play, require_equal, require_outputs, tracker_check
from rollout_core.testing.packers import Raised
from rollout_core.testing.registry import Violation
from rollout_core.testing.tracker_cases import TrackerCase
from rollout_core.testing.tracker_oracles import outputs, positions, splice, whole
from rollout_core.testing.tracker_play import Play
from rollout_core.testing.tracker_strategies import CUT, PLAIN, POSED, SCORED, conversations
from rollout_core.testing.trackers import TrackerUnderTest

_SHOWN = ((("user", "m"),), (("user", "mn"),), (("user", "tm"),), (("user", "mm"),), (("tool", "mt"),))
_TURNS = (*PLAIN, *POSED, *CUT)


@tracker_check(
    "tracker/M7-payload",
    "the outputs are those of one call over all items, byte for byte",
    needs=["multi_modal_inputs"],
    cases=lambda worlds: conversations(worlds=one_of_each(worlds), begun=_SHOWN, added=_SHOWN, samples=_TURNS, max_steps=4),
)
def payload(subject: TrackerUnderTest, case: TrackerCase) -> None:
    found = play(subject, case)
    expected = found.expected()
    model = outputs(found.oracle, expected.items, len(expected.ids))
    require_outputs(model, found.tracker.multi_modal_inputs(found.state), found.world.ignored, "one call over all items")


@tracker_check(
    "tracker/M7-joins",
    "outputs of items of different sizes are padded and joined as in one call over all of them",
    only=("chatml+tiles", "chatml+stacked", "chatml+sized"),
    needs=["multi_modal_inputs"],
    cases=lambda worlds: conversations(
        worlds=worlds, begun=_SHOWN, added=_SHOWN, samples=PLAIN, texts=("a",), min_steps=1, max_steps=4
    ),
)
def joins(subject: TrackerUnderTest, case: TrackerCase) -> None:
    payload(subject, case)


@tracker_check(
    "tracker/M7-whole",
    "the outputs are those of one call over the whole text with all items",
    needs=["multi_modal_inputs"],
    cases=lambda worlds: conversations(worlds=worlds, begun=_SHOWN, added=_SHOWN, samples=PLAIN, texts=("a",), max_steps=4),
)
def whole_payload(subject: TrackerUnderTest, case: TrackerCase) -> None:
    found = play(subject, case)
    expected = splice(found.oracle, found.turns)
    if not expected.clean or (expected.tail and found.world.sequence and found.turns[-1].ids is not None):
        return
    _, model = whole(found.oracle, found.turns)
    require_outputs(model, found.tracker.multi_modal_inputs(found.state), found.world.ignored, "one call over the whole text")


def _refused_or_equal(subject: TrackerUnderTest, case: TrackerCase) -> None:
    try:
        found = Play(subject, case.world)
        found.run(case)
        actual = found.tracker.multi_modal_inputs(found.state)
    except Raised as raised:
        if isinstance(raised.error, Exception):
            return
        raise
    _, model = whole(found.oracle, found.turns)
    require_outputs(model, actual, (), "one call over the whole text")


@tracker_check(
    "tracker/M7-coupled",
    "a processor that makes something else of an item beside others is refused, or comes out right",
    traits=(),
    lacks=("sums",),
    only=("chatml+coupled",),
    needs=["multi_modal_inputs"],
    cases=lambda worlds: conversations(worlds=worlds, begun=_SHOWN, added=_SHOWN, samples=PLAIN, texts=("a",), max_steps=2),
)
def coupled(subject: TrackerUnderTest, case: TrackerCase) -> None:
    _refused_or_equal(subject, case)


@tracker_check(
    "tracker/M7-unknown-key",
    "an output that nobody has a rule for is refused, or comes out right: never dropped, never joined by guess",
    traits=(),
    lacks=("sums",),
    only=("chatml+undeclared",),
    needs=["multi_modal_inputs"],
    cases=lambda worlds: conversations(worlds=worlds, begun=_SHOWN, added=_SHOWN, samples=PLAIN, texts=("a",), max_steps=2),
)
def unknown_key(subject: TrackerUnderTest, case: TrackerCase) -> None:
    _refused_or_equal(subject, case)


@tracker_check(
    "tracker/M8-recompute",
    "position ids are those of recomputing the whole, after every step",
    traits=("stable", "sums", "positions"),
    needs=["position_ids"],
)
def recompute(subject: TrackerUnderTest, case: TrackerCase) -> None:
    found = Play(subject, case.world)
    for place, step in found.steps(case):
        require_positions(found, f"after step {place} ({step.operation})")


@tracker_check(
    "tracker/M8-after-item",
    "positions go on rightly in a delta that begins right after an item",
    traits=("stable", "sums", "positions"),
    only=("glm+bare", "chatml+bare", "no-separator+tiles", "glm+framed", "chatml+timed", "media-first+timed"),
    needs=["position_ids"],
    cases=lambda worlds: conversations(
        worlds=worlds, begun=_SHOWN, added=_SHOWN, samples=(*PLAIN, *CUT), texts=("a",), max_steps=4
    ),
)
def after_item(subject: TrackerUnderTest, case: TrackerCase) -> None:
    recompute(subject, case)


@tracker_check(
    "tracker/M8-text",
    "without items positions are 0 to n-1",
    traits=("stable", "sums", "positions"),
    needs=["position_ids"],
    cases=lambda worlds: conversations(
        worlds=worlds, begun=((("user", "t"),),), added=((("user", "t"),), (("tool", "t"),)), max_steps=3
    ),
)
def text_positions(subject: TrackerUnderTest, case: TrackerCase) -> None:
    found = play(subject, case)
    rows = found.tracker.position_ids(found.state).tolist()
    length = len(found.tracker.input_ids(found.state))
    for row in rows:
        require_equal("positions of text", [*range(length)], row)


def require_positions(found: Play, when: str) -> None:
    """``Violation`` unless the positions are those of the oracle."""
    expected = found.expected()
    rule = found.oracle.positions
    if rule is None or "position_ids" not in found.tracker.capabilities:
        return
    model = positions(rule, len(expected.ids), expected.items)
    actual = found.tracker.position_ids(found.state)
    if model.shape == actual.shape:
        wrong = (model != actual).any(axis=0).nonzero()[0]
        if not len(wrong):
            return
        at = int(wrong[0])
        raise Violation(f"{when} token {at} has position {actual[:, at].tolist()}; recomputing gives {model[:, at].tolist()}")
    raise Violation(f"{when} position_ids has shape {list(actual.shape)}; recomputing gives {list(model.shape)}")


@tracker_check("tracker/M12-lengths", "ids and every array per token have one length", cost=3)
def lengths(subject: TrackerUnderTest, case: TrackerCase) -> None:
    found = Play(subject, case.world)
    for place, step in found.steps(case):
        require_lengths(found, f"after step {place} ({step.operation})")


def require_lengths(found: Play, when: str) -> None:
    """``Violation`` unless all arrays are as long as the ids."""
    tracker, state = found.tracker, found.state
    length = len(tracker.input_ids(state))
    arrays: dict[str, int] = {}
    for name in ("loss_mask", "logprobs"):
        if name in tracker.capabilities:
            arrays[name] = len(getattr(tracker, name)(state))
    if "position_ids" in tracker.capabilities:
        arrays["position_ids"] = tracker.position_ids(state).shape[1]
    for name, count in arrays.items():
        if count != length:
            raise Violation(f"{when} there are {length} ids and {count} entries of {name}")


@tracker_check("tracker/M12-mask", "the loss mask is 1 for what was sampled, and 0 for everything else", needs=["loss_mask"])
def mask(subject: TrackerUnderTest, case: TrackerCase) -> None:
    found = play(subject, case)
    require_mask(found)


def require_mask(found: Play) -> None:
    """``Violation`` unless the loss mask is the oracle's."""
    model, actual = found.expected().mask, found.tracker.loss_mask(found.state)
    if model != actual:
        at = next((i for i, (a, b) in enumerate(zip(model, actual, strict=False)) if a != b), min(len(model), len(actual)))
        raise Violation(f"the mask of token {at} differs (model: {model[at : at + 8]}, actual: {actual[at : at + 8]})")


@tracker_check(
    "tracker/M12-logprobs",
    "a sampled token has the logprob that came with it, 0.0 too; one without is None, not 0.0",
    needs=["logprobs"],
    cases=lambda worlds: conversations(worlds=worlds, samples=(*SCORED, *PLAIN), min_steps=1, max_steps=4),
)
def logprobs(subject: TrackerUnderTest, case: TrackerCase) -> None:
    found = play(subject, case)
    require_logprobs(found)


def require_logprobs(found: Play) -> None:
    """``Violation`` unless the logprobs are the oracle's."""
    model, actual = found.expected().logprobs, found.tracker.logprobs(found.state)
    if model != actual:
        at = next((i for i, (a, b) in enumerate(zip(model, actual, strict=False)) if a != b), min(len(model), len(actual)))
        raise Violation(f"the logprob of token {at} differs (model: {model[at : at + 4]}, actual: {actual[at : at + 4]})")
