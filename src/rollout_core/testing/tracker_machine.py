"""The state machine of trackers: a program over growing, forking, rolling back, cutting, storing and bad input, beside a model
that only remembers what was added. After every step everything that can be seen is compared with the oracles."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy

from rollout_core.testing.registry import Violation
from rollout_core.testing.tracker_cases import Operation, Step, TrackerCase
from rollout_core.testing.tracker_oracles import Turn
from rollout_core.testing.tracker_play import Play, views
from rollout_core.testing.tracker_strategies import ADDED, BEGUN, SAMPLES, TEXTS, messages
from rollout_core.testing.trackers import TrackerUnderTest

#: What a step does, the simplest first. ``number`` picks the state, the length or the kind of bad input.
OPERATIONS: Final[tuple[Operation, ...]] = ("extend", "sample", "fork", "back", "store", "cut", "bad")


def programs(worlds: Sequence[str], *, max_steps: int = 10) -> SearchStrategy[TrackerCase]:
    """A world, what the conversation starts with, and up to ``max_steps`` steps."""
    pick = st.integers(0, 11)
    step = st.tuples(st.sampled_from(OPERATIONS), st.integers(0, 59), pick, pick)
    return st.builds(_program, st.sampled_from(list(worlds)), st.tuples(pick, pick, pick), st.lists(step, max_size=max_steps))


def _program(world: str, first: tuple[int, int, int], drawn: Sequence[tuple[Operation, int, int, int]]) -> TrackerCase:
    steps = [Step("start", messages(world, BEGUN[first[0] % len(BEGUN)], first[1], first[2]))]
    for operation, number, text, medium in drawn:
        if operation == "extend":
            steps.append(Step("extend", messages(world, ADDED[number % len(ADDED)], text, medium)))
        elif operation == "sample":
            steps.append(Step("sample", text=TEXTS[text % len(TEXTS)], **SAMPLES[number % len(SAMPLES)]))
        else:
            steps.append(Step(operation, number=number))
    return TrackerCase(world=world, steps=tuple(steps))


class Machine:
    """A tracker and what is known of it: the state that grows, and those that were kept."""

    def __init__(self, subject: TrackerUnderTest, world: str) -> None:
        self.play = Play(subject, world)
        self.kept: list[tuple[Any, tuple[Turn, ...], dict[str, Any]]] = []

    def step(self, step: Step) -> None:
        """Do one step; a step that has nothing to act on does nothing."""
        play, can = self.play, self.play.tracker.capabilities
        if step.operation in ("start", "extend", "sample"):
            if play.can(step):
                play.do(step)
        elif step.operation == "fork" and "forks" in can:
            self.kept.append((play.state, play.turns, views(play.tracker, play.state)))
        elif step.operation == "back" and self.kept:
            play.state, play.turns, _ = self.kept[-1 - step.number % len(self.kept)]
        elif step.operation == "store" and "to_bytes" in can:
            play.state = play.tracker.from_bytes(play.tracker.to_bytes(play.state))
        elif step.operation == "cut" and {"truncate", "forks"} <= can:
            self._cut(step.number)
        elif step.operation == "bad":
            self._bad(step.number)

    def check(self) -> None:
        """Everything that can be seen of the state, and of those that were kept."""
        from rollout_core.testing.checks import tracker_arrays, tracker_base
        from rollout_core.testing.tracker_oracles import outputs

        play = self.play
        tracker, state, can = play.tracker, play.state, play.tracker.capabilities
        expected = play.expected()
        tracker_base.require_ids(play.world, expected.ids, tracker.input_ids(state))
        tracker_arrays.require_lengths(play, "here")
        if "compact_ids" in can:
            tracker_base.require_ids(
                play.world, expected.compact, tracker.compact_ids(state), "the text with one placeholder per item"
            )
        if "loss_mask" in can:
            tracker_arrays.require_mask(play)
        if "logprobs" in can:
            tracker_arrays.require_logprobs(play)
        if "items" in can:
            tracker_base.require_items(play, expected)
        tracker_arrays.require_positions(play, "here")
        if "multi_modal_inputs" in can:
            model = outputs(play.oracle, expected.items, len(expected.ids))
            tracker_base.require_outputs(model, tracker.multi_modal_inputs(state), play.world.ignored)
        if {"expand", "compact_ids"} <= can:
            short = tracker.compact_ids(state)
            tracker_base.require_ids(play.world, expected.ids, tracker.expand(state, short), "expanding the compact ids")
        for place, (kept, _, before) in enumerate(self.kept):
            tracker_base.require_views(f"state {place}, which was kept, has changed", before, views(tracker, kept))

    def _cut(self, number: int) -> None:
        """A copy is cut; the state goes on as it was."""
        play = self.play
        length = 1 + number % len(play.tracker.input_ids(play.state))
        side = "left" if number % 2 else "right"
        before = views(play.tracker, play.state)
        cut: list[Any] = []
        if play.tracker.refusal(lambda: cut.append(play.tracker.truncate(play.state, length, side, "drop_item"))) is None:
            kept = len(play.tracker.input_ids(cut[0]))
            if kept > length:
                raise Violation(f"truncate to {length} left {kept} tokens")
        from rollout_core.testing.checks.tracker_base import require_views

        require_views("truncating has changed what it was given", before, views(play.tracker, play.state))

    def _bad(self, number: int) -> None:
        """Input that must be refused changes nothing."""
        from rollout_core.testing.checks import tracker_refusals as bad
        from rollout_core.testing.checks.tracker_base import require_views

        play = self.play
        before = views(play.tracker, play.state)
        kinds = [*bad.MESSAGES, *(bad.PICTURES if "image" in play.world.shown else ()), *bad.SAMPLED]
        if play.world.counts is None:  # what a real template does with these is its own affair
            kinds = [kind for kind in kinds if kind not in bad.BY_TEMPLATE]
        kind = kinds[number % len(kinds)]
        if kind in bad.SAMPLED:
            ids, logprobs, finish = bad.SAMPLED[kind](play.world)
            error = play.tracker.refusal(lambda: play.tracker.append_sampled(play.state, ids, logprobs, finish))
        else:
            made = {**bad.MESSAGES, **bad.PICTURES}[kind](play.world)
            error = play.tracker.refusal(lambda: play.tracker.extend(play.state, made))
        if error is None:
            raise Violation(f"{kind}: no error was raised")
        require_views(f"{kind} was refused, and has changed the conversation", before, views(play.tracker, play.state))


def run_program(subject: TrackerUnderTest, case: TrackerCase) -> None:
    """Run the steps of a case; ``Violation`` names the step after which something is not as it must be."""
    machine = Machine(subject, case.world)
    for place, step in enumerate(case.steps):
        try:
            machine.step(step)
            if machine.play.state is not None and step.operation != "fork":
                machine.check()
        except Violation as violation:
            raise Violation(f"step {place} ({step}): {violation}") from violation
