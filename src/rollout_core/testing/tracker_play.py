"""A program of a case on a tracker: every step done, and remembered for the oracles."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from rollout_core.testing.tracker_cases import Step, TrackerCase
from rollout_core.testing.tracker_oracles import Expected, Turn, splice
from rollout_core.testing.trackers import Calls, TrackerUnderTest
from rollout_core.testing.worlds import World, make_world


class Play:
    """A tracker in a world of its own, its state, and what was added to it.

    ``turns``: what the state holds. ``oracle``: another world of the same kind, whose counters are nobody's.
    """

    def __init__(self, subject: TrackerUnderTest, world: str) -> None:
        self.world = make_world(world)
        self.oracle = make_world(world)
        self.tracker: Calls = subject.on(self.world.processor)
        self.state: Any = None
        self.turns: tuple[Turn, ...] = ()

    def run(self, case: TrackerCase) -> None:
        """All steps."""
        for _ in self.steps(case):
            pass

    def steps(self, case: TrackerCase) -> Iterator[tuple[int, Step]]:
        """Step by step; each is given after it was done. Steps that cannot be done are left out."""
        for place, step in enumerate(case.steps):
            if self.can(step):
                self.do(step)
                yield place, step

    def can(self, step: Step) -> bool:
        """Whether a step has something to act on: after a turn that ended the policy samples nothing."""
        if step.operation == "sample":
            return bool(self.turns) and not (self.turns[-1].ids is not None and self.turns[-1].finish == "stop")
        return step.operation in ("start", "extend") and (step.operation == "start") == (self.state is None)

    def do(self, step: Step) -> None:
        turn = turn_of(self.oracle, step)
        self.state = self.applied(self.state, turn)
        self.turns = (*self.turns, turn)

    def applied(self, state: Any, turn: Turn) -> Any:
        """The state after a turn."""
        if turn.ids is not None:
            given = list(turn.logprobs) if turn.logprobs else None
            return self.tracker.append_sampled(state, list(turn.ids), given, turn.finish)
        messages = [message.make() for message in turn.messages]
        return self.tracker.start(messages) if state is None else self.tracker.extend(state, messages)

    def expected(self) -> Expected:
        """What the state must be, with the end that it has."""
        return splice(self.oracle, self.turns).ending_as(self.tracker.input_ids(self.state))


def turn_of(world: World, step: Step) -> Turn:
    """What a step adds."""
    if step.operation != "sample":
        return Turn(messages=step.messages)
    ids = sampled_ids(world, step)
    return Turn(ids=tuple(ids), logprobs=_logprobs(step, len(ids)), finish=step.finish)


def sampled_ids(world: World, step: Step) -> list[int]:
    """The ids of a sampled turn, at least one."""
    shown = next(iter(world.shown.values()))
    encoded = list(world.tokenizer(step.text or "a", add_special_tokens=False, verbose=False)["input_ids"])
    end = [world.token(world.stops[0])] if world.stops else []
    match step.spelling:
        case "spelled":
            encoded = [part for letter in step.text or "a" for part in _letter(world, letter)]
        case "placeholder":
            encoded = [world.token(shown.placeholder), *encoded]
        case "feature":
            encoded = [*encoded, world.token(shown.feature), world.token(shown.feature)]
        case "ended early":
            encoded = [*end, *encoded]
    return encoded + (end if step.stop else [])


def _letter(world: World, letter: str) -> list[int]:
    return list(world.tokenizer(letter, add_special_tokens=False, verbose=False)["input_ids"])


def _logprobs(step: Step, count: int) -> tuple[float | None, ...]:
    match step.logprobs:
        case "none":
            return ()
        case "all":
            return tuple(-(place + 1) / 8 for place in range(count))
        case "zero":
            return (0.0,) * count
        case "some":
            return tuple(None if place % 2 else -(place + 1) / 8 for place in range(count))


def views(tracker: Calls, state: Any) -> dict[str, Any]:
    """Everything that a tracker shows of a state, in a form that can be compared."""
    shown: dict[str, Any] = {"input_ids": tracker.input_ids(state)}
    for name in ("compact_ids", "loss_mask", "logprobs"):
        if name in tracker.capabilities:
            shown[name] = getattr(tracker, name)(state)
    if "position_ids" in tracker.capabilities:
        shown["position_ids"] = tracker.position_ids(state).tolist()
    if "items" in tracker.capabilities:
        shown["items"] = tracker.items(state)
    if "multi_modal_inputs" in tracker.capabilities:
        shown["multi_modal_inputs"] = plain(tracker.multi_modal_inputs(state))
    return shown


def plain(outputs: dict[str, Any]) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    """Outputs as dtype, shape and bytes."""
    import numpy as np
    import torch

    found = {}
    for key, value in outputs.items():
        if key in ("input_ids", "attention_mask"):
            continue
        tensor = value if isinstance(value, torch.Tensor) else torch.as_tensor(np.asarray(value))
        tensor = tensor.detach().cpu().contiguous()
        data = tensor.reshape(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b""
        found[key] = (str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape), data)
    return found
