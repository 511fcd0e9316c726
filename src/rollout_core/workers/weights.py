"""What an engine says of its weights: names, dtypes and shapes, the parts that its ranks have, and what is read back."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from rollout_core.bucketing import BucketPlan, TensorSpec
from rollout_core.bucketing.dtypes import DTYPES
from rollout_core.errors import PlanMismatchError, WorkerError
from rollout_core.workers.digests import SentDigests
from rollout_core.workers.link.link import Link
from rollout_core.workers.link.messages import (
    Digests,
    RankDigests,
    ReadDigests,
    ReadRankDigests,
    ReadShards,
    ReadSpecs,
    ReadTensor,
    Shards,
    Specs,
    TensorBytes,
)
from rollout_core.workers.names import EMBEDDING, HEAD, canonical
from rollout_core.workers.shards import Expected, Shard


class EngineWeights:
    """Those behind a link. What does not change while the engine runs is asked once, when it is wanted."""

    def __init__(self) -> None:
        self._specs: dict[str, TensorSpec] | None = None
        self._layout: list[dict[str, Shard]] | None = None
        self._checked: BucketPlan | None = None  # the last that had the engine's specs

    def specs(self, link: Link) -> dict[str, TensorSpec]:
        """The engine's tensors by name, which an update has to have; none where it looks at an update itself."""
        if self._specs is None:
            answer = link.ask(ReadSpecs(), Specs)
            assert isinstance(answer, Specs)
            listed = answer.specs or []
            self._specs = {name: TensorSpec(name, DTYPES[dtype], shape) for name, dtype, shape in listed}
        return self._specs

    def check(self, link: Link, plan: BucketPlan) -> None:
        """Raise ``PlanMismatchError`` if these are not the engine's tensors, where that does not say so itself."""
        wanted = self.specs(link)
        if wanted and plan is not self._checked:
            check_specs(plan, wanted)
            self._checked = plan

    def layout(self, link: Link) -> list[dict[str, Shard]]:
        """By rank of the engine, the parts of tensors that it has; empty if there is one rank."""
        if self._layout is None:
            answer = link.ask(ReadShards(), Shards)
            assert isinstance(answer, Shards)
            self._layout = answer.ranks
        return self._layout


def digests_of(link: Link) -> dict[str, str]:
    """32 hexadecimal digits of every tensor that the engine has now, by name."""
    answer = link.ask(ReadDigests(None), Digests)
    assert isinstance(answer, Digests)
    return answer.digests


def read_tensor(link: Link, name: str) -> torch.Tensor:
    """One of the engine's tensors, as a copy on the CPU."""
    if not isinstance(name, str):
        raise WorkerError(f"{name!r} is no name of a tensor: pass a str")
    answer = link.ask(ReadTensor(name), TensorBytes)
    assert isinstance(answer, TensorBytes)
    dtype = DTYPES[answer.dtype]
    if not answer.data:
        return torch.empty(answer.shape, dtype=dtype)
    return torch.frombuffer(bytearray(answer.data), dtype=torch.uint8).view(dtype).view(answer.shape)


def read_back(link: Link, sent: SentDigests, expected: Expected | None) -> dict[str, str]:
    """The digests of what the engine has, found right; ``expected``: of each rank, if there are several. ``WorkerError`` names the
    first tensor that is not what was sent."""
    if expected is not None:
        answer = link.ask(ReadRankDigests(), RankDigests)
        assert isinstance(answer, RankDigests)
        return expected.check(sent.of_parts, answer.ranks)
    found, wanted = digests_of(link), dict(sent.digests)
    known = {canonical(name): digest for name, digest in found.items()}
    embedding = next((name for name in wanted if canonical(name) == EMBEDDING), None)
    if HEAD in found and HEAD not in wanted and embedding is not None:
        wanted[HEAD] = wanted[embedding]  # tied, or it would have had to be sent
    wrong = [name for name, digest in wanted.items() if known.get(canonical(name)) != digest]
    if wrong:
        raise WorkerError(
            f"{len(wrong)} of {len(wanted)} tensors read back from the worker are not what was sent, first {wrong[0]!r}: "
            f"sent {wanted[wrong[0]]}, found {known.get(canonical(wrong[0]))}; the worker's weights are not the trainer's"
        )
    return found


def check_specs(plan: BucketPlan, wanted: Mapping[str, TensorSpec]) -> None:
    """Raise ``PlanMismatchError`` naming the first tensor of a plan that is not among these, or that it leaves out. A tied tensor
    is there under any of its names."""
    known = {canonical(name): spec for name, spec in wanted.items()}
    for spec in plan.specs:
        mine = known.get(canonical(spec.name))
        if mine is None:
            raise PlanMismatchError(f"the update has a tensor {spec.name!r} ({spec}), and the model has none of that name")
        if (mine.dtype, mine.shape) != (spec.dtype, spec.shape):
            raise PlanMismatchError(f"tensor {spec.name!r} is {spec} in the update and {mine} in the model")
    sent = {canonical(spec.name) for spec in plan.specs}
    missing = next((name for name in wanted if canonical(name) not in sent), None)
    if missing is not None and not (missing == HEAD and EMBEDDING in sent):
        raise PlanMismatchError(f"the model's tensor {missing!r} is not in the update; send every parameter and persistent buffer")
