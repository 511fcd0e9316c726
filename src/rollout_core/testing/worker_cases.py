"""Cases of workers: a program of what a trainer asks of one, as plain data."""

from __future__ import annotations

from typing import Literal, TypeAlias

import msgspec

#: ``submit``: a call of ``prompts`` (by number), under ids ``id``, ``id`` + 1, ..., or without ids if it is -1. ``resume from``:
#: request ``at`` of those that were aborted goes on from its tokens, for what is left of its budget. ``abort``: ``ids``.
#: ``step``: go on for so many ``steps``, and pause. ``run``: until all have ended, and pause. ``go``: go on, beside what follows.
#: ``sync``: the weights of number ``weights``. ``fail``: an update whose source fails at its last tensor. ``free``: memory is
#: released and resumed, each ``times`` times, and weights ``weights`` are sent. ``kill``: the engine's processes; nothing follows.
Do: TypeAlias = Literal[
    "submit", "resume from", "abort", "abort all", "pause", "step", "run", "go", "sync", "fail", "free", "kill"
]  # fmt: skip

NO_ID = -1


def id_name(number: int) -> str:
    """The request id of a number."""
    return f"r{number}"


class Step(msgspec.Struct, frozen=True, omit_defaults=True):
    """One step. ``length``: the most tokens of each response; ``n`` samples of each prompt, all greedy. ``stop``: EOS ends a
    response, and so does the token that the first prompt's has at this place, counted from 1; 0: neither does."""

    do: Do
    prompts: tuple[int, ...] = ()
    id: int = NO_ID
    length: int = 1
    n: int = 1
    stop: int = 0
    at: int = 0
    ids: tuple[int, ...] = ()
    steps: int = 1
    weights: int = 0
    times: int = 1

    def __str__(self) -> str:
        match self.do:
            case "submit":
                prompts = ", ".join(map(str, self.prompts))
                words = f"submit prompt{'s' if len(self.prompts) != 1 else ''} {prompts} for {self.length} tokens"
                if self.id != NO_ID:
                    words += " as " + ", ".join(id_name(self.id + place) for place in range(len(self.prompts)))
                words += f", {self.n} samples" if self.n > 1 else ""
                return words + (f", or until token {self.stop} of the first or an EOS comes" if self.stop else "")
            case "resume from":
                return f"resume what was aborted, from {self.at}"
            case "abort":
                return f"abort {', '.join(map(id_name, self.ids)) or 'nothing'}"
            case "step":
                return f"step {self.steps}"
            case "sync":
                return f"sync weights {self.weights}"
            case "fail":
                return "an update fails"
            case "free":
                return f"release and resume memory{f' {self.times} times' if self.times > 1 else ''}, sync weights {self.weights}"
            case "kill":
                return "the engine is killed"
            case _:
                return self.do


class WorkerCase(msgspec.Struct, frozen=True, omit_defaults=True):
    """A program on a worker that is paused, has weights 0 and no request; without steps, what the check itself does."""

    steps: tuple[Step, ...] = ()

    def __str__(self) -> str:
        return "; ".join(map(str, self.steps))
