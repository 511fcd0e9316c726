"""Reproduction scripts of trackers: the world built, the tracker's methods called one by one, and the check itself at the end."""

from __future__ import annotations

import msgspec

from rollout_core.testing.registry import Check
from rollout_core.testing.tracker_cases import MessageCase, Step, TrackerCase
from rollout_core.testing.tracker_play import turn_of
from rollout_core.testing.worlds import World, make_world

_HEAD = '''\
"""{id}: {title}

{text}
"""

import sys

sys.path.insert(0, "")  # run this where the tracker can be imported
{imports}
from rollout_core.testing import make_world, recheck
from rollout_core.testing.tracker_cases import MediumCase

case = {case!r}


def calls():
    world = make_world({world!r})
    tracker = {tracker}(world.processor)
{calls}    print(list(tracker.input_ids(state)))


try:
    calls()
except Exception as error:
    print(type(error).__name__, error)
recheck({tracker}, {id!r}, case)
'''


def tracker_script(check: Check, case: TrackerCase, imports: str, make: str, text: str) -> str:
    """The script for a case of a check of trackers."""
    world = make_world(case.world)
    return _HEAD.format(
        id=check.id,
        title=check.title,
        text=text,
        imports=imports,
        case=msgspec.json.encode(case).decode(),
        world=case.world,
        tracker=make,
        calls="".join(f"    {line}\n" for step in case.steps for line in _call(world, step)) or "    state = None\n",
    )


def _call(world: World, step: Step) -> list[str]:
    """A step as calls of the tracker."""
    if step.operation in ("start", "extend"):
        messages = ", ".join(map(_message, step.messages))
        if step.operation == "start":
            return [f"state = tracker.start([{messages}])"]
        return [f"state = tracker.extend(state, [{messages}]) or state"]
    if step.operation == "sample":
        turn = turn_of(world, step)
        logprobs = list(turn.logprobs) if turn.logprobs else None
        return [f"state = tracker.append_sampled(state, {list(turn.sampled)}, {logprobs}, {turn.finish!r}) or state"]
    return [f"# then: {step}"]


def _message(case: MessageCase) -> str:
    if len(case.content) == 1 and isinstance(case.content[0], str):
        return repr({"role": case.role, "content": case.content[0], **case.called()})
    parts = [repr({"type": "text", "text": part}) if isinstance(part, str) else f"{part!r}.part()" for part in case.content]
    called = f", **{case.called()!r}" if case.call else ""
    return f"{{'role': {case.role!r}, 'content': [{', '.join(parts)}]{called}}}"
