"""Looks at every world of ``support.network`` that can be reached, and tells how one came to be that breaks an invariant."""

from __future__ import annotations

import gc
from collections import deque
from dataclasses import dataclass, field
from typing import Any

from rollout_core.transfer.protocol.messages import Envelope
from support.invariants import INVARIANTS, check, t2_no_time_is_lost
from support.network import Broken, Network, Step, World, name_of, target_of


@dataclass(frozen=True, slots=True)
class Explored:
    """How much was looked at. ``ends``: worlds in which all ends are over."""

    worlds: int
    steps: int
    ends: int
    again: int  # second updates that began


@dataclass
class Explorer:
    """Looks at every world that can be reached from the start, with at most ``faults`` faults, and then at every second update."""

    network: Network
    faults: int = 0
    limit: int = 5_000_000
    _from: dict[World, tuple[World, Step | str] | None] = field(default_factory=dict)
    moves: int = 0
    _at: Any = None
    _step: Any = None
    invariants = (*INVARIANTS, t2_no_time_is_lost)

    def run(self) -> Explored:
        # Millions of small objects, none of which could go: looking for cycles among them takes longer than all the rest.
        collecting = gc.isenabled()
        gc.disable()
        try:
            return self._run()
        finally:
            if collecting:
                gc.enable()

    def _run(self) -> Explored:
        first = self.network.start(self.faults)
        self._from[first] = None
        todo = deque([first])
        ends = again = 0
        try:
            check(first, self.invariants)
            while todo:
                world = todo.popleft()
                steps = self.network.steps(world)
                self.moves += len(steps)
                for step in steps:
                    self._reach(world, step, todo)
                for step in self.network.faults(world):
                    self.moves += 1
                    self._reach(world, step, todo)
                if world.is_over:
                    ends += 1
                    following = self.network.again(world)
                    if following is not None and world.attempt == 1 and following not in self._from:
                        again += 1
                        self._from[following] = (world, "again")
                        todo.append(following)
                elif not steps:
                    self._at = world
                    waiting = [name_of(place) for place, end in enumerate(world.ends) if end.is_running]
                    raise Broken("t2_no_deadlock", f"all come to an end; {waiting} wait for nothing")
        except Broken as broken:
            raise Broken(broken.invariant, f"{broken.message}\n{self._trace()}") from None
        return Explored(len(self._from), self.moves, ends, again)

    def _reach(self, world: World, step: Step, todo: deque[World]) -> None:
        self._at, self._step = world, step
        following = self.network.after(world, step)
        if following in self._from:
            return
        self._from[following] = (world, step)
        self._at = following
        check(following, self.invariants)
        if len(self._from) > self.limit:
            raise Broken("t2_no_livelock", f"there are at most {self.limit} worlds; there are more")
        todo.append(following)

    def _trace(self) -> str:
        """How the world at hand came to be."""
        lines, world = [], self._at
        while (link := self._from.get(world)) is not None:
            before, step = link
            lines.append(told(before, step) if isinstance(step, Step) else step)
            world = before
        lines.reverse()
        return "\n".join([f"after {len(self._from)} worlds:", *(f"  {line}" for line in lines), f"  last: {self._step}"])


def told(world: World, step: Step) -> str:
    """A step in words."""
    match step:
        case Step("deliver" | "lose" | "repeat" | "late", way, _):
            message = world.ways[way].queue[0]
            what = f"{message.attempt}/{message.number} {message.body}" if isinstance(message, Envelope) else message
            return f"{world.now:6.2f} {step.kind} to {name_of(target_of(way))}: {what}"
        case Step("stray", way, which):
            message = world.ways[way].strays[which]
            return f"{world.now:6.2f} stray to {name_of(target_of(way))}: {message.attempt}/{message.number} {message.body}"
        case Step("finish" | "fail" | "slow", place, which):
            return f"{world.now:6.2f} {step.kind} at {name_of(place)}: {world.ends[place].tasks[which].action}"
        case _:
            return f"{world.now:6.2f} {step.kind} {name_of(step.at)}"
