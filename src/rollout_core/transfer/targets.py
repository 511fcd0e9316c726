"""Where received weights go: what an update does to them, and what is left of them when it fails (clause T5)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol, TypeAlias, runtime_checkable

import torch

from rollout_core.bucketing import BucketLayout, BucketPlan, TensorSpec, cuda
from rollout_core.bucketing.looks import Seen
from rollout_core.bucketing.scatter import Scatter
from rollout_core.bucketing.sources import Pair
from rollout_core.bucketing.tensors import as_bytes, describe, own_copy, same_bits_copy, view_key
from rollout_core.errors import PlanMismatchError, TransferError
from rollout_core.transfer.fitting import check_apart, check_memory, check_tied

#: A module, or its tensors by name.
Weights: TypeAlias = torch.nn.Module | Mapping[str, torch.Tensor]


@runtime_checkable
class Target(Protocol):
    """What ``receive`` loads into. An update is ``begin``, ``load`` any number of times, ``prepare``, ``commit``; or ``abort``,
    once, at any place after ``begin`` returned.

    A target may have ``memory_for(spec)``, too: the bytes of the tensor that a split one is joined in, see ``JoinMemory``. What is
    joined there comes to ``load`` as well, once it is whole. And ``write_bucket(layout, buffer)``, which takes a plan's buckets
    whole, see ``WriteBucket``: nothing of them comes to ``load`` then.
    """

    @property
    def version(self) -> int:
        """Of the weights; only ``commit`` changes it."""
        ...

    def begin(self, plan: BucketPlan | None, version: int) -> None:
        """An update is offered; raise to refuse it. Nothing may have changed then. ``plan`` is None for a stream."""
        ...

    def load(self, pairs: list[Pair]) -> None:
        """Some of its tensors, tied names after the tensor they name. They may be views of memory that is used again: read them
        before this returns, on a GPU on the stream that is current then, or on one that it waits for."""
        ...

    def prepare(self) -> None:
        """Everything was loaded. Raise what can still be raised: after this only ``commit`` or ``abort`` comes."""
        ...

    def commit(self, version: int) -> None:
        """The weights are those of this version. If this raises, ``abort`` follows."""
        ...

    def abort(self, version: int) -> None:
        """The update to ``version`` failed, wherever it was, in rare cases after ``commit`` returned (an interrupt)."""
        ...


class DirectWeights:
    """Loads into a model's own tensors as they come, without memory of its own. An update that fails after the first of them leaves
    weights that are ``unusable``, and says so until one completes. On a GPU, where all are contiguous and no two are one, a bucket
    is written in one launch.

    ``weights``: a module (its parameters and buffers, under each name, as they are when an update begins) or a mapping of tensors.
    ``version``: what they are now. The model must not be used while an update is under way.
    """

    def __init__(self, weights: Weights, *, version: int = 0) -> None:
        self.version = version
        #: Why the weights are of no use; None if they are those of ``version``.
        self.unusable: str | None = None
        self._weights = weights
        self.tensors = _named(weights)
        self._computed = _non_persistent(weights) if isinstance(weights, torch.nn.Module) else frozenset()
        self._agreed = False  # whether the update under way has a plan, all of which was looked at before it began
        self._came: set[str] = set()
        self._loaded: dict[object, str] = {}  # tensors of this update that are in the model, by their view, with their first name
        self._dirty: set[str] = set()  # changed by an update that is not, or not yet, complete
        self._before: tuple[int, set[str]] = (0, set())  # version and _dirty before the last commit
        self._updating = 0
        self._seen: tuple[BucketPlan, Seen] | None = None  # that were found to fit
        self._scatter: Scatter | None = None

    def check_usable(self) -> None:
        """Raise ``TransferError`` if an update has left the weights half done."""
        if self.unusable is not None:
            raise TransferError(f"the weights are unusable: {self.unusable}; send them again")

    def begin(self, plan: BucketPlan | None, version: int) -> None:
        """Raises ``PlanMismatchError`` naming the first tensor that is not this model's, or that the update leaves out."""
        self.tensors = _named(self._weights)  # a module may have got others: by to(), to_empty(), load_state_dict(assign=True)
        if self._is_as_before(plan):
            if self._scatter is not None:
                self._scatter.take_up(self.tensors)
        else:
            self._seen = self._scatter = None
            self._check_all(plan)
            if plan is not None:
                self._seen = (plan, Seen(self.tensors))
                self._scatter = self._scatter_of(plan)
        self._agreed = plan is not None
        self._came, self._loaded = set(), {}
        self._updating = version

    def load(self, pairs: list[Pair]) -> None:
        """Raises ``PlanMismatchError`` for a stream's tensor that is not this model's (of ``pairs`` nothing was loaded then), and
        for two names of one tensor of the model that come with different values."""
        self._look_at(pairs)
        self._overwrite(pairs)

    def write_bucket(self, layout: BucketLayout, buffer: torch.Tensor) -> bool:
        """Write all of a bucket at once, if that can be; it has been verified."""
        if self._scatter is None:
            return False
        assert self._seen is not None
        tied = self._seen[0].tied
        self._spoil([name for slot in layout.slots for name in (slot.name, *tied.get(slot.name, ()))])
        self._scatter.write(layout, buffer)
        return True

    def memory_for(self, spec: TensorSpec) -> torch.Tensor | None:
        """The tensor's own memory, so that its pieces are copied once."""
        self._check(spec)
        mine = self.tensors[spec.name].detach()
        if not mine.is_contiguous() or view_key(mine) in self._loaded:
            return None
        self._spoil([spec.name])
        return as_bytes(mine)

    def prepare(self) -> None:
        """Raises ``PlanMismatchError`` for a stream that left a tensor out."""
        if not self._agreed:
            self._check_complete(self._came)

    def commit(self, version: int) -> None:
        self._before = (self.version, self._dirty)
        self.version = version  # first: interrupted after it, abort takes all of this back
        self.unusable, self._dirty = None, set()
        self._let_go()

    def abort(self, version: int) -> None:
        if self.version == version:
            self.version, self._dirty = self._before
            self.unusable = f"the update to version {version} was not completed"
        self._let_go()

    def _let_go(self) -> None:
        """Of memory that the model may get rid of between updates."""
        if self._scatter is not None:
            self._scatter.let_go()

    def _is_as_before(self, plan: BucketPlan | None) -> bool:
        """Whether the checks have passed on this plan and these tensors."""
        return self._seen is not None and plan is self._seen[0] and not self._dirty and self._seen[1].same(self.tensors)

    def _check_all(self, plan: BucketPlan | None) -> None:
        """Raise ``PlanMismatchError`` for what cannot be loaded into, or is not what the plan says."""
        for name, mine in self.tensors.items():
            check_memory(name, mine)
        check_apart(self.tensors)
        if plan is not None:
            for spec in plan.specs:
                self._check(spec)
            self._check_complete({spec.name for spec in plan.specs})

    def _scatter_of(self, plan: BucketPlan) -> Scatter | None:
        """What writes this plan's buckets at once: where a GPU may, into tensors each of which is written once, and whole."""
        mine = {spec.name: self.tensors[spec.name] for spec in plan.specs}
        if type(self).load is not DirectWeights.load or not any(cuda.possible(tensor.device) for tensor in mine.values()):
            return None
        if not all(tensor.is_contiguous() and not tensor.is_conj() and not tensor.is_neg() for tensor in mine.values()):
            return None
        if any(spec.alias_of and view_key(mine[spec.name]) != view_key(mine[spec.alias_of]) for spec in plan.specs):
            return None  # two tensors here that are one there
        travelling = [mine[spec.name] for spec in plan.specs if not spec.alias_of and spec.nbytes]
        if len({(tensor.device, tensor.data_ptr()) for tensor in travelling}) < len(travelling):
            return None  # one tensor here that is two there: their values have to be held against each other
        return Scatter(plan, mine)

    def _look_at(self, pairs: list[Pair]) -> None:
        """Check what no plan has said before."""
        if not self._agreed:
            for name, tensor in pairs:
                self._check(TensorSpec(name, tensor.dtype, tuple(tensor.shape)))
            self._came.update(name for name, _ in pairs)

    def _overwrite(self, pairs: list[Pair]) -> None:
        self._spoil([name for name, _ in pairs])
        just: dict[object, torch.Tensor] = {}
        for name, tensor in pairs:
            mine = self.tensors[name].detach()
            key = view_key(mine)
            if just.get(key) is tensor:
                continue  # a tied name, of which the update says so too
            if key is not None and key in self._loaded:
                check_tied(self._loaded[key], mine, name, tensor)
            elif mine.data_ptr() != tensor.data_ptr() or not mine.is_contiguous():  # else joined where it belongs
                same_bits_copy(mine, tensor)
            just[key] = tensor
            self._loaded.setdefault(key, name)

    def _spoil(self, names: list[str]) -> None:
        """Note that these are not the old weights any more."""
        self.unusable = self.unusable or f"the update to version {self._updating} was not completed"
        self._dirty.update(names)

    def _check(self, spec: TensorSpec) -> None:
        mine = self.tensors.get(spec.name)
        if mine is None:
            raise PlanMismatchError(f"the update has a tensor {spec.name!r} ({spec}), and the model has none of that name")
        if (mine.dtype, tuple(mine.shape)) != (spec.dtype, spec.shape):
            words = describe(mine.dtype, tuple(mine.shape))
            raise PlanMismatchError(f"tensor {spec.name!r} is {spec} in the update and {words} in the model")

    def _check_complete(self, sent: set[str]) -> None:
        """A tied weight sent under its other name is covered; what the model computes from its config may be left out, unless an
        update that failed has put something else in its place."""
        covered = {view_key(self.tensors[name]) for name in sent}
        for name, mine in self.tensors.items():
            if name in sent or not mine.numel() or view_key(mine) in covered:
                continue
            if name in self._dirty:
                raise PlanMismatchError(
                    f"an update that was not completed changed the model's tensor {name!r}, and this update leaves it out; "
                    "send it too: a module has it, and a state dict has not if it is a buffer that is not persistent"
                )
            if name not in self._computed:
                raise PlanMismatchError(
                    f"the model's tensor {name!r} is not in the update; send every parameter and persistent buffer"
                )


class StagedWeights(DirectWeights):
    """Keeps an update in memory of its own, and loads it into the model's tensors at the commit: until then they are the old ones,
    and a failed update leaves them so. Takes the model's size in memory while an update is under way."""

    def __init__(self, weights: Weights, *, version: int = 0) -> None:
        super().__init__(weights, version=version)
        self._stage = _Stage()

    def begin(self, plan: BucketPlan | None, version: int) -> None:
        super().begin(plan, version)
        self._stage = _Stage()

    def load(self, pairs: list[Pair]) -> None:
        self._look_at(pairs)
        self._stage.add(pairs)

    def prepare(self) -> None:
        """As ``DirectWeights``; two names of one tensor that came with different values are refused here."""
        super().prepare()
        first: dict[object, str] = {}
        for name, tensor in self._stage.tensors.items():
            key = view_key(self.tensors[name])
            other = first.setdefault(key, name)
            if key is not None and self._stage.tensors[other] is not tensor:
                check_tied(other, self._stage.tensors[other], name, tensor)

    def memory_for(self, spec: TensorSpec) -> torch.Tensor | None:
        self._check(spec)
        return self._stage.memory_for(spec, self.tensors[spec.name].device)

    def commit(self, version: int) -> None:
        stage, self._stage = self._stage, _Stage()
        self._overwrite(list(stage.tensors.items()))
        super().commit(version)

    def abort(self, version: int) -> None:
        self._stage = _Stage()
        super().abort(version)


class CollectedWeights:
    """Collects an update in memory of its own: ``weights`` has the tensors by name once it is committed."""

    def __init__(self, version: int = 0) -> None:
        self.version = version
        self.weights: dict[str, torch.Tensor] = {}
        self._stage = _Stage()

    def begin(self, plan: BucketPlan | None, version: int) -> None:
        del plan, version
        self._stage = _Stage()

    def load(self, pairs: list[Pair]) -> None:
        self._stage.add(pairs)

    def prepare(self) -> None:
        pass

    def commit(self, version: int) -> None:
        self.version, self.weights, self._stage = version, self._stage.tensors, _Stage()

    def abort(self, version: int) -> None:
        del version
        self._stage = _Stage()


class _Stage:
    """Tensors of an update in memory of their own; what is one tensor under several names stays one."""

    def __init__(self) -> None:
        self.tensors: dict[str, torch.Tensor] = {}
        self._joined: set[int] = set()  # addresses of those that were joined here, and need no other copy

    def add(self, pairs: list[Pair]) -> None:
        self.tensors.update(pair for pair in pairs if pair[1].data_ptr() in self._joined)
        self.tensors.update(own_copies([pair for pair in pairs if pair[1].data_ptr() not in self._joined]))

    def memory_for(self, spec: TensorSpec, device: torch.device) -> torch.Tensor:
        memory = torch.empty(spec.nbytes, dtype=torch.uint8, device=device)
        self._joined.add(memory.data_ptr())
        return memory


def named_weights(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Every parameter and buffer of a module by name: tied ones under each name, non-persistent buffers included."""
    return {
        **dict(model.named_parameters(remove_duplicate=False)),
        **dict(model.named_buffers(remove_duplicate=False)),
    }


def persistent_weights(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """``named_weights`` without the buffers that a state dict leaves out, which a model computes from its config."""
    computed = _non_persistent(model)
    return {name: tensor for name, tensor in named_weights(model).items() if name not in computed}


def _named(weights: Weights) -> dict[str, torch.Tensor]:
    return named_weights(weights) if isinstance(weights, torch.nn.Module) else dict(weights)


def own_copies(pairs: list[Pair]) -> list[Pair]:
    """The pairs in memory of their own; what is one tensor under several names stays one."""
    copies = {id(tensor): own_copy(tensor) for _, tensor in pairs}
    return [(name, copies[id(tensor)]) for name, tensor in pairs]


def _non_persistent(model: torch.nn.Module) -> frozenset[str]:
    """Names of the buffers that a state dict leaves out."""
    return frozenset(
        f"{prefix}.{name}" if prefix else name
        for prefix, module in model.named_modules(remove_duplicate=False)
        for name in module._non_persistent_buffers_set
    )
