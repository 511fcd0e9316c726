"""What the checks of a rollout worker share, and what a check is."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from rollout_core.preflight import models
from rollout_core.transfer.targets import named_weights, persistent_weights
from rollout_core.workers.contract import Completion, SamplingParams
from rollout_core.workers.expert_names import in_checkpoint_names
from rollout_core.workers.worker import Worker

MakeWorker = Callable[[Path], Worker]


class CheckFailed(Exception):
    """A check does not hold; the message says what was expected and what was found."""


@dataclass
class Context:
    """What the checks share: the model folder, the trainer's copy, the worker once it runs."""

    folder: Path
    make_worker: MakeWorker
    capacity: int
    response_length: int = 12
    perturbation: float = 0.05
    trainer: Any = None
    worker: Worker | None = None
    prompts: list[list[int]] = field(default_factory=list)
    first_tokens: list[tuple[int, ...]] = field(default_factory=list)  # the worker's, greedy, before the first sync
    existing: set[str] = field(default_factory=set)  # what ``resources`` gave before the worker started
    models: Any = models  # where the functions that know the model are found

    def weights(self) -> dict[str, torch.Tensor]:
        """The trainer's tensors that an update brings."""
        return named_weights(self.trainer) if self.running().takes_computed else persistent_weights(self.trainer)

    def running(self) -> Worker:
        if self.worker is None:
            raise CheckFailed("the worker does not run")
        return self.worker

    def stops(self) -> tuple[int, int, int]:
        """For requests that are stopped on their way: how many tokens they want, after how many steps, and the most they have then.
        An engine that samples on its own makes more before it stops."""
        steps = self.response_length // 3
        if self.running().steps_exactly:
            return self.response_length, steps, steps
        return 8 * self.response_length, steps, 8 * self.response_length


@dataclass(frozen=True)
class Check:
    """One line of the report. Without ``needs`` having passed it cannot be judged."""

    id: str
    clause: str
    run: Callable[[Context], str]
    needs: str | None = None


def named_as_in(weights: dict[str, torch.Tensor], names: Collection[str]) -> dict[str, torch.Tensor]:
    """A trainer's tensors by a worker's names: experts one by one, if it has them so."""
    found = in_checkpoint_names(weights, names)
    assert isinstance(found, dict)
    return found


def expect(condition: bool, message: str) -> None:
    if not condition:
        raise CheckFailed(message)


def greedy(context: Context) -> list[Completion]:
    return context.running().generate(context.prompts, SamplingParams(response_length=context.response_length))
