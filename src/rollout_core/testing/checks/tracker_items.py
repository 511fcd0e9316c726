"""M4, M5, M6, M9: items at their places on both tracks, in order, and from rendering alone."""

from __future__ import annotations

from collections.abc import Sequence

from rollout_core.testing.checks.tracker_base import play, require_equal, require_ids, require_items, require_outputs, tracker_check
from rollout_core.testing.registry import Violation
from rollout_core.testing.tracker_cases import MediumCase, MessageCase, Step, TrackerCase
from rollout_core.testing.tracker_oracles import outputs
from rollout_core.testing.tracker_play import Play
from rollout_core.testing.tracker_strategies import PLAIN, POSED, conversations
from rollout_core.testing.trackers import TrackerUnderTest

_SHOWN = ((("user", "m"),), (("user", "tm"),), (("user", "mt"),), (("user", "mm"),), (("user", "tmsnt"),), (("tool", "mt"),))


@tracker_check(
    "tracker/M4-rows",
    "an item's spans are as long as the feature rows that the model makes of it",
    needs=["items"],
    cases=lambda worlds: conversations(worlds=worlds, added=_SHOWN, samples=PLAIN, max_steps=3),
)
def rows(subject: TrackerUnderTest, case: TrackerCase) -> None:
    found = play(subject, case)
    media = [medium for turn in found.turns for message in turn.messages for medium in message.media()]
    items = found.tracker.items(found.state)
    require_equal("number of items", len(media), len(items))
    rows_of = _rows(found, media)
    if rows_of is None:
        return
    wanted = sorted(zip([m.modality for m in media], rows_of, strict=True))
    actual = sorted((modality, sum(stop - start for start, stop in spans)) for modality, spans, _ in items)
    require_equal("feature rows of the items and lengths of their spans differ", wanted, actual)


def _rows(found: Play, media: Sequence[MediumCase]) -> list[int] | None:
    """Feature rows of media, or None where the kit does not know."""
    if found.oracle.measure is None:
        return None
    known = [found.oracle.measure(medium)[0] for medium in media]
    return [count for count in known if count is not None] if None not in known else None


@tracker_check(
    "tracker/M4-spans",
    "spans are where the processor wrote feature tokens: ordered, disjoint, complete",
    needs=["items"],
    cases=lambda worlds: conversations(worlds=worlds, begun=_SHOWN, added=_SHOWN, samples=(*PLAIN, *POSED), max_steps=4),
)
def spans(subject: TrackerUnderTest, case: TrackerCase) -> None:
    found = play(subject, case)
    length = len(found.tracker.input_ids(found.state))
    flat = [edge for _, runs, _ in found.tracker.items(found.state) for run in runs for edge in run]
    if flat != sorted(flat) or (flat and (flat[0] < 0 or flat[-1] > length)):
        raise Violation(
            f"spans are not in order, overlap, or leave the {length} ids: {[row[1] for row in found.tracker.items(found.state)]}"
        )
    require_items(found, found.expected())


@tracker_check(
    "tracker/M5-sampled-placeholder",
    "a placeholder or feature token that the policy sampled makes no item, and moves none",
    needs=["items"],
    cases=lambda worlds: conversations(worlds=worlds, samples=POSED, texts=("a", "b"), min_steps=1, max_steps=3),
)
def sampled_placeholder(subject: TrackerUnderTest, case: TrackerCase) -> None:
    found = play(subject, case)
    expected = found.expected()
    require_ids(found.world, expected.ids, found.tracker.input_ids(found.state))
    require_items(found, expected)
    if "multi_modal_inputs" in subject.capabilities:
        model = outputs(found.oracle, expected.items, len(expected.ids))
        require_outputs(model, found.tracker.multi_modal_inputs(found.state), found.world.ignored, "one call over the real items")


@tracker_check(
    "tracker/M5-literal-placeholder",
    "text of a user or a tool that looks like a placeholder makes no item",
    needs=["items"],
    cases=lambda worlds: conversations(
        worlds=worlds, added=_SHOWN, samples=PLAIN, texts=("a", "@", "a@b", "#"), min_steps=0, max_steps=3
    ),
)
def literal_placeholder(subject: TrackerUnderTest, case: TrackerCase) -> None:
    found = Play(subject, case.world)
    for step in case.steps:
        if found.can(step):
            found.do(Step(step.operation, tuple(_posed(found, m) for m in step.messages), text="a"))
    media = [medium for turn in found.turns for message in turn.messages for medium in message.media()]
    items = found.tracker.items(found.state)
    require_equal("the items are not those of the messages", sorted(m.modality for m in media), sorted(row[0] for row in items))
    ids = found.tracker.input_ids(found.state)
    for modality, runs, _ in items:
        feature = found.world.token(found.world.shown[modality].feature)
        for start, stop in runs:
            require_ids(found.world, [feature] * (stop - start), ids[start:stop], f"the {modality} at {start}")
    rows_of = _rows(found, media)
    if rows_of is not None:
        lengths = [sum(stop - start for start, stop in runs) for _, runs, _ in items]
        require_equal("feature rows of the items and lengths of their spans differ", sorted(rows_of), sorted(lengths))


def _posed(found: Play, message: MessageCase) -> MessageCase:
    """A message with placeholders for ``@`` and feature tokens for ``#`` in its texts."""
    shown = next(iter(found.world.shown.values()))
    parts = [p.replace("@", shown.placeholder).replace("#", shown.feature) if isinstance(p, str) else p for p in message.content]
    return MessageCase(message.role, tuple(parts))


@tracker_check("tracker/M6-compact", "compact ids have one placeholder per item", needs=["compact_ids"])
def compact(subject: TrackerUnderTest, case: TrackerCase) -> None:
    found = play(subject, case)
    require_ids(
        found.world, found.expected().compact, found.tracker.compact_ids(found.state), "the text with one placeholder per item"
    )


@tracker_check(
    "tracker/M6-round-trip", "compact(expand(x)) is x, and expand gives the expanded ids", needs=["compact_ids", "expand"]
)
def round_trip(subject: TrackerUnderTest, case: TrackerCase) -> None:
    found = play(subject, case)
    ids, short = found.tracker.input_ids(found.state), found.tracker.compact_ids(found.state)
    expanded = found.tracker.expand(found.state, short)
    require_ids(found.world, ids, expanded, "input_ids")
    require_ids(found.world, short, found.tracker.compact(found.state, expanded), "compact_ids")


@tracker_check(
    "tracker/M6-twice",
    "ids that are expanded already are refused",
    needs=["compact_ids", "expand"],
    cases=lambda worlds: conversations(worlds=worlds, begun=_SHOWN[:3], samples=(*PLAIN, *POSED), max_steps=2),
)
def twice(subject: TrackerUnderTest, case: TrackerCase) -> None:
    found = play(subject, case)
    ids, short = found.tracker.input_ids(found.state), found.tracker.compact_ids(found.state)
    if ids == short:
        return
    expanded: list[list[int]] = []
    if found.tracker.refusal(lambda: expanded.append(found.tracker.expand(found.state, ids))) is None:
        raise Violation(f"expand took {len(ids)} ids that are expanded ({len(short)} are compact) and gave {len(expanded[0])}")


@tracker_check("tracker/M9-order", "items come in the order of their tokens", needs=["items"])
def order(subject: TrackerUnderTest, case: TrackerCase) -> None:
    found = play(subject, case)
    starts = [runs[0][0] for _, runs, _ in found.tracker.items(found.state) if runs]
    require_equal("the first tokens of the items are not in order", sorted(starts), starts)
    require_equal(
        "modalities in the order of the tokens",
        [item.medium.modality for item in found.expected().items],
        [modality for modality, _, _ in found.tracker.items(found.state)],
    )


@tracker_check(
    "tracker/M9-repeated",
    "the same medium twice keeps two places, and other media are not taken for it",
    needs=["items"],
    cases=lambda worlds: conversations(worlds=worlds, begun=_SHOWN, added=_SHOWN, samples=PLAIN, texts=("a", ""), max_steps=3),
)
def repeated(subject: TrackerUnderTest, case: TrackerCase) -> None:
    found = play(subject, case)
    items = found.tracker.items(found.state)
    expected = found.expected().items
    require_equal("number of items", len(expected), len(items))
    for one in range(len(items)):
        for other in range(one):
            same = _content(expected[one].medium) == _content(expected[other].medium)
            if same != (items[one][2] == items[other][2]):
                words = "the same content and other identities" if same else "other content and the same identity"
                raise Violation(f"items {other} and {one} have {words}: {expected[other].medium} and {expected[one].medium}")


def _content(medium: MediumCase) -> tuple[object, ...]:
    size = (0, medium.height) if medium.modality == "audio" else (medium.width, medium.height)
    frames = (medium.frames, medium.fps) if medium.modality == "video" else ()
    return medium.modality, size, medium.seed, medium.mode, frames


@tracker_check(
    "tracker/M9-delta",
    "what came after an earlier state is what is new, and nothing else",
    needs=["forks", "delta", "items", "compact_ids"],
)
def delta(subject: TrackerUnderTest, case: TrackerCase) -> None:
    found = Play(subject, case.world)
    earlier = []
    for _ in found.steps(case):
        earlier.append((found.state, *(len(view) for view in _three(found))))
        ids, short, items = _three(found)
        for state, length, compact_length, count in earlier:
            new = found.tracker.delta(found.state, state)
            require_ids(found.world, ids[length:], new[0], f"the ids after the first {length}")
            require_ids(found.world, short[compact_length:], new[1], f"the compact ids after the first {compact_length}")
            require_equal(f"items after the first {count}", items[count:], new[2])


def _three(found: Play) -> tuple[list[int], list[int], list[object]]:
    tracker, state = found.tracker, found.state
    return tracker.input_ids(state), tracker.compact_ids(state), list(tracker.items(state))
