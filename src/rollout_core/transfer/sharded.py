"""Parameters of which each rank has a part, such as those of FSDP2, as whole tensors, one at a time.

Rank by rank each part is broadcast into its place in the whole tensor: no memory but the tensor's own, however unevenly it is cut.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final, Self, TypeAlias

import torch
import torch.distributed as dist

from rollout_core.bucketing.tensors import as_bytes, is_sharded, same_bits_copy, view_key
from rollout_core.errors import DuplicateNameError, SourceError, TransferError
from rollout_core.transfer.lockstep import FailedElsewhere, Lockstep
from rollout_core.transfer.targets import named_weights, persistent_weights

#: A module, or its tensors by name.
Sharded: TypeAlias = torch.nn.Module | Mapping[str, torch.Tensor]
#: Parts of names that wrappers put in: of torch.compile, activation checkpointing and the first FSDP.
WRAPPERS: Final = frozenset({"_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module"})
#: Bytes beside a tensor that is cut along another dimension than its first: what goes through here has to be contiguous.
STAGE: Final = 4 << 20
_WAIT, _END, _FIRST = 0, 1, 2  # what a rank says before each step; from _FIRST on it is the number of a tensor


def plain_name(name: str) -> str:
    """A parameter's name without the parts that wrappers put in, wherever they stand. ``module``, which DDP puts in front, is a
    name that models use, too: pass the module within."""
    return ".".join(part for part in name.split(".") if part not in WRAPPERS)


class Deferred(torch.Tensor):
    """A tensor that ``full_tensor`` makes when it is asked for: its dtype, whole shape and device are known, and it has no memory.
    To a packer it is what a DTensor is."""

    make: Callable[[], torch.Tensor]

    def __new__(cls, like: torch.Tensor, dtype: torch.dtype, device: torch.device, make: Callable[[], torch.Tensor]) -> Self:
        made: Self = torch.Tensor._make_wrapper_subclass(cls, like.shape, dtype=dtype, device=device)
        made.make = make
        return made

    def full_tensor(self) -> torch.Tensor:
        return self.make()

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        del tensor_contents
        return f"Deferred({self.dtype}, {list(self.shape)})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        raise SourceError(f"{func} was called on a tensor that is not gathered yet: call full_tensor()")


class Parts:
    """The tensors of a model, whole ones made of all ranks' parts on request; every rank makes this of its own part of the model,
    with the same names in the same order.

    On one rank, ``tensors`` go into a packer, and gather when it asks for their data; meanwhile the others ``follow``, until that
    rank is done and calls ``end``. ``dtype`` is what floating-point parameters become before they are gathered; a mapping's
    tensors count as parameters all. ``computed``: also buffers that a state dict leaves out. ``rename``: applied to each
    ``plain_name``.
    """

    def __init__(
        self,
        steps: Lockstep,
        source: Sharded,
        *,
        dtype: torch.dtype | None = None,
        computed: bool = True,
        rename: Callable[[str], str] | None = None,
    ) -> None:
        self._steps = steps
        self._ways: list[Way] = []
        #: By name; those that all ranks have whole, and that keep their dtype, as they are.
        self.tensors: dict[str, torch.Tensor] = {}
        self._over = False
        parameters: set[int] | None = None
        if isinstance(source, torch.nn.Module):
            reshard(source)
            parameters = {id(tensor) for tensor in source.parameters()}
        places: dict[str, str] = {}
        made: dict[Any, torch.Tensor] = {}
        for given, tensor in _tensors(source, computed).items():
            name = plain_name(given) if rename is None else rename(plain_name(given))
            if (first := places.setdefault(name, given)) != given:
                raise DuplicateNameError(f"{first!r} and {given!r} are both {name!r} without what wrappers put in")
            casts = dtype is not None and tensor.is_floating_point() and (parameters is None or id(tensor) in parameters)
            wanted = dtype if casts and dtype is not None else tensor.dtype
            key = view_key(tensor) or name
            if key not in made:  # tied tensors stay one
                made[key] = self._deferred(name, tensor, wanted)
            self.tensors[name] = made[key]

    @property
    def groups(self) -> set[dist.ProcessGroup]:
        """That tensors are gathered over."""
        return {group for way in self._ways for group in way.groups}

    def follow(self) -> None:
        """Take part in what another rank gathers, until it is done. ``FailedElsewhere`` if this rank has to leave for another."""
        while (word := self._steps.agree(_WAIT)) != _END:
            self._gather(self._ways[word - _FIRST], keep=False)
        self._over = True

    def end(self) -> None:
        """Let the others go. Harmless when they have left."""
        if not self._over and self._steps.broken is None:
            self._over = True
            self._steps.agree(_END)

    def _deferred(self, name: str, tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        if not is_sharded(tensor):
            if tensor.dtype == dtype:
                return tensor.detach()
            return Deferred(tensor, dtype, tensor.device, lambda: tensor.detach().to(dtype))
        way = way_of(name, tensor, dtype)
        number = len(self._ways)
        self._ways.append(way)

        def make() -> torch.Tensor:
            if self._over:
                raise TransferError(f"tensor {name!r} can be gathered no more: the other ranks have gone on")
            self._steps.agree(_FIRST + number)
            whole = self._gather(way, keep=True)
            assert whole is not None
            return whole

        return Deferred(tensor, dtype, way.device, make)

    def _gather(self, way: Way, *, keep: bool) -> torch.Tensor | None:
        """One tensor, on all ranks; each has the memory for it before any begins, or none does."""
        whole: torch.Tensor | None = None
        error: Exception | None = None
        try:
            whole = way.start()
        except Exception as raised:  # out of memory, or a part that is not what it has to be
            error = raised
        if self._steps.agree(int(error is not None)):
            self._over = True
            raise error or FailedElsewhere(f"another rank could not gather {way.name!r}")
        assert whole is not None
        whole = way.gather(self._steps, whole)
        return whole if keep else None


@dataclass(frozen=True, slots=True)
class Way:
    """How one sharded tensor is made whole. ``dim``: which of its dimensions is cut, and ``ranks`` have the parts, in order (global
    ranks, in ``group``); None if it is not cut, or in a way that is left to torch (``by_torch``)."""

    name: str
    tensor: Any  # a DTensor
    dtype: torch.dtype
    device: torch.device  # where it is gathered
    dim: int | None
    ranks: tuple[int, ...]
    here: int  # which part this rank has
    group: dist.ProcessGroup | None
    groups: tuple[dist.ProcessGroup, ...]
    by_torch: bool

    def start(self) -> torch.Tensor:
        """Memory for the whole tensor, with this rank's part in it. Nothing of other ranks."""
        local = self.tensor.detach().to_local()
        if self.by_torch:
            return torch.empty(0)
        if self.dim is None and local.dtype == self.dtype and local.device == self.device:
            return local  # type: ignore[no-any-return]
        whole = torch.empty(self.tensor.shape, dtype=self.dtype, device=self.device)
        mine = whole
        if self.dim is not None:
            start, end = part(self.tensor.shape[self.dim], len(self.ranks), self.here)
            mine = whole.narrow(self.dim, start, end - start)
        if mine.shape != local.shape:
            raise SourceError(
                f"tensor {self.name!r}: this rank has {list(local.shape)} of it, and torch.chunk gives it {list(mine.shape)}"
            )
        if local.dtype == self.dtype:
            same_bits_copy(mine, local)
        else:
            mine.copy_(local)
        return whole

    def gather(self, steps: Lockstep, whole: torch.Tensor) -> torch.Tensor:
        if self.by_torch:
            try:
                return self.tensor.detach().to(self.device, self.dtype).full_tensor()  # type: ignore[no-any-return]
            except BaseException as error:  # the other ranks may be in the middle of it
                steps.abort(f"gathering {self.name!r} failed: {error}")
                if isinstance(error, RuntimeError):  # torch's own class for whatever a backend says
                    raise TransferError(f"gathering {self.name!r} failed: {error}") from error
                raise
        if self.dim is None:
            return whole
        for block in self._blocks(whole):
            steps.finish(f"gathering {self.name!r}", block)
        return whole

    def _blocks(self, whole: torch.Tensor) -> Iterator[Callable[[], list[Any]]]:
        """The broadcasts that bring every rank's part into its place, as many at once as need no memory of their own."""
        assert self.dim is not None
        shape = whole.shape
        outer, inner = math.prod(shape[: self.dim]), math.prod(shape[self.dim + 1 :])
        rows = as_bytes(whole).view(outer, shape[self.dim], inner * whole.dtype.itemsize)
        direct: list[tuple[int, torch.Tensor]] = []  # contiguous parts
        for place, rank in enumerate(self.ranks):
            start, end = part(shape[self.dim], len(self.ranks), place)
            mine = rows[:, start:end]
            if not mine.numel():
                continue
            if mine.is_contiguous():
                direct.append((rank, mine))
                continue
            step = max(1, STAGE // mine[0].numel())
            for at in range(0, outer, step):
                block = mine[at : at + step]
                if len(block) == 1:
                    direct.append((rank, block))
                    continue
                staged = torch.empty(block.shape, dtype=torch.uint8, device=block.device)
                if place == self.here:
                    staged.copy_(block)
                yield lambda staged=staged, rank=rank: [self._broadcast(staged, rank)]  # type: ignore[misc]
                if place != self.here:
                    block.copy_(staged)
        if direct:
            yield lambda: [self._broadcast(piece, rank) for rank, piece in direct]

    def _broadcast(self, piece: torch.Tensor, rank: int) -> Any:
        return dist.broadcast(piece.view(-1), src=rank, group=self.group, async_op=True)


def way_of(name: str, tensor: Any, dtype: torch.dtype) -> Way:
    """How a DTensor is made whole. What is cut along one dimension of its mesh only is gathered here, anything else (tensor
    parallel under FSDP, partial sums) by torch's ``full_tensor``."""
    from torch.distributed.tensor import Replicate, Shard

    mesh, placements = tensor.device_mesh, tensor.placements
    kind = mesh.device_type
    device = torch.device(kind, torch.cuda.current_device()) if kind == "cuda" else torch.device(kind)
    cut = [place for place, placement in enumerate(placements) if not isinstance(placement, Replicate)]
    groups = tuple(mesh.get_group(place) for place in cut)
    # Exactly: torch's strided shards have a class of their own, which may be a subclass.
    plain = len(cut) == 1 and type(placements[cut[0]]) is Shard
    if not plain:
        return Way(name, tensor, dtype, device, None, (), 0, None, groups, by_torch=bool(cut))
    (place,) = cut
    here = list(mesh.get_coordinate())
    ranks = tuple(mesh.mesh[tuple(slice(None) if i == place else at for i, at in enumerate(here))].tolist())
    return Way(name, tensor, dtype, device, placements[place].dim, ranks, here[place], groups[0], groups, by_torch=False)


def part(size: int, parts: int, place: int) -> tuple[int, int]:
    """Where a part begins and ends, as torch.chunk cuts: all of one size but the last that has any; those after it have none."""
    step = -(-size // parts)
    return min(size, place * step), min(size, (place + 1) * step)


def _tensors(source: Sharded, computed: bool) -> Mapping[str, torch.Tensor]:
    if not isinstance(source, torch.nn.Module):
        return source
    return named_weights(source) if computed else persistent_weights(source)


def reshard(model: torch.nn.Module) -> None:
    """Let FSDP2's modules hold their shards again: after a forward pass the outermost keeps whole parameters, perhaps in another
    dtype, which an optimizer's step does not change."""
    from torch.distributed.fsdp import FSDPModule

    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
