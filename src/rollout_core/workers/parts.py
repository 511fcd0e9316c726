"""What an engine's ranks have of a model's tensors, read by commands to each of them: see ``commands`` and ``shards``."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch

from rollout_core.errors import WorkerError
from rollout_core.workers.commands import Answer, Command, Digests, Layout, Read, tensor_of
from rollout_core.workers.digests import algorithm_on, weight_digest
from rollout_core.workers.names import name_among
from rollout_core.workers.shards import Shard


class Parts:
    """The tensors of an engine. ``ask``: has each rank carry a command out, and gives their answers in the order of ranks;
    ``shapes``: of a checkpoint, by its names. ``device``: where the ranks have them, unless their answers say so; ``values_on``:
    the device on which digests are of values; ``ranks``: how many there are, None if that is not known yet."""

    def __init__(
        self,
        ask: Callable[[Command], Sequence[Answer]],
        shapes: Mapping[str, tuple[int, ...]],
        *,
        device: str = "",
        values_on: str = "",
        ranks: int | None = None,
    ) -> None:
        self._ask = ask
        self._shapes = shapes
        self._device = device
        self._values_on = values_on
        self._ranks = ranks

    def shards(self) -> list[dict[str, Shard]]:
        """By rank, which part it has of the tensors that it has; empty if there is one rank."""
        return [] if self._are_whole() else [answer.shards for answer in self._ask(Layout(dict(self._shapes)))]

    def rank_digests(self) -> list[dict[str, str]]:
        """By rank, ``weight_digest`` of the parts that it has."""
        return [answer.digests for answer in self._ask(Digests(dict(self._shapes)))]

    def digests(self, names: Sequence[str] | None) -> dict[str, str]:
        """``weight_digest`` of whole tensors, of all without ``names``. Those of several ranks are read and joined here, one after
        the other, which takes as long as reading the model does."""
        wanted = {name: shape for name, shape in self._shapes.items() if names is None or name in names}
        if self._are_whole():
            return self._ask(Digests(wanted))[0].digests
        found = self._ask(Layout(wanted))
        device = found[0].device or self._device
        known = {name for answer in found for name in answer.shards}
        return {
            name: weight_digest(self.read_tensor(name), values=device == self._values_on, algorithm=algorithm_on(device))
            for name in wanted
            if name in known
        }

    def read_tensor(self, name: str) -> torch.Tensor:
        """A copy on the CPU. ``WorkerError`` for a name that no rank knows, and where two ranks have different values."""
        own = name_among(name, self._shapes)
        if own is None:
            raise WorkerError(f"the worker has no tensor {name!r}")
        return tensor_of(own, self._shapes[own], self._ask(Read(own, self._shapes[own])))

    def _are_whole(self) -> bool:
        """Whether there is one rank."""
        if self._ranks is None:
            self._ranks = len(self._ask(Layout({})))
        return self._ranks == 1
