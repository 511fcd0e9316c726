"""Which part of a tensor a rank's layer has, as its attributes say it, which vLLM and SGLang call alike.

Rows of ``ColumnParallelLinear``, columns of ``RowParallelLinear``, rows of a padded vocabulary, and heads of ``qkv_proj``: with
fewer heads of keys and values than ranks, several ranks have the same. What else has the shape that a checkpoint says is whole. A
part that passes the end of the tensor is padding there.
"""

from __future__ import annotations

from math import prod
from typing import Any

from rollout_core.errors import WorkerError
from rollout_core.workers.shards import WHOLE, Shard


def shard_of(module: Any, part: int | None, local: tuple[int, ...], shape: tuple[int, ...], name: str) -> Shard:
    """Which part of a tensor of this ``shape`` is ``local``, the shape that it has in ``module``, padded or not; ``part``: which of
    a fused layer's, if the tensor is not fused. ``WorkerError`` if that is not known."""
    indices = getattr(module, "shard_indices", None)
    if indices is not None:
        return _of_ranges(0, [(indices.org_vocab_start_index, indices.org_vocab_end_index)], shape)
    if len(local) != len(shape) and prod(local) == prod(shape):
        return WHOLE  # a convolution as a product, or the other way round
    differ = [dim for dim, (mine, whole) in enumerate(zip(local, shape, strict=False)) if mine != whole]
    rank, ranks = _place_of(module, part)
    if ranks == 1 and len(local) == len(shape) and all(local[dim] >= shape[dim] for dim in differ):
        return WHOLE  # padded
    dim = _cut_of(module, len(shape))
    if dim is None and not differ:
        return WHOLE
    if dim is None and len(differ) == 1 and ranks > 1:
        dim = differ[0]
    if dim is None or len(local) != len(shape) or not {dim}.issuperset(differ):
        raise WorkerError(f"{name!r} is {list(local)} here and {list(shape)} in a checkpoint, in a way that is not known")
    sizes = list(getattr(module, "output_partition_sizes", ()))
    if part is None and dim == 0 and len(sizes) > 1:
        return _of_ranges(0, _fused_ranges(module, sizes, shape[0], name), shape)
    return _of_ranges(dim, [(rank * local[dim], (rank + 1) * local[dim])], shape)


def _cut_of(module: Any, dims: int) -> int | None:
    """The dimension along which a layer's tensors of so many dimensions are dealt out; None if it does not say so."""

    def is_cut(size: str) -> bool:
        whole, mine = getattr(module, size, None), getattr(module, f"{size}_per_partition", None)
        return whole is not None and mine is not None and whole != mine

    return 1 if dims == 2 and is_cut("input_size") else 0 if is_cut("output_size") else None


def _fused_ranges(module: Any, sizes: list[int], rows: int, name: str) -> list[tuple[int, int]]:
    """Of a layer that is fused in the checkpoint, too: this rank's rows of each of its parts."""
    wholes = _whole_sizes(module)
    if sum(wholes) != rows or len(wholes) != len(sizes):
        raise WorkerError(f"{name!r} is fused of {wholes} here, and has {rows} rows in a checkpoint")
    ranges, start = [], 0
    for part, (mine, whole) in enumerate(zip(sizes, wholes, strict=True)):
        index, _ = _place_of(module, part)
        ranges.append((start + index * mine, start + (index + 1) * mine))
        start += whole
    return ranges


def _of_ranges(dim: int, ranges: list[tuple[int, int]], shape: tuple[int, ...]) -> Shard:
    """What of these ranges is no padding behind the end."""
    size = shape[dim]
    found = tuple((min(start, size), min(end, size)) for start, end in ranges)
    return WHOLE if found == ((0, size),) else Shard(dim, found)


def _place_of(module: Any, part: int | None) -> tuple[int, int]:
    """Which part a layer's rank has, and how many ranks there are."""
    is_shared = part in (1, 2) and hasattr(module, "num_kv_head_replicas")
    group = getattr(module, "kv_tp_group" if is_shared else "tp_group", None)  # newer versions of SGLang
    if group is not None:
        rank, ranks = group.rank_in_group, group.world_size
    else:
        rank, ranks = getattr(module, "tp_rank", 0), getattr(module, "tp_size", 1)
    return rank // (module.num_kv_head_replicas if is_shared else 1), ranks


def _whole_sizes(module: Any) -> list[int]:
    """Rows of the parts of a fused layer, over all ranks; what several ranks have is counted once."""
    if not hasattr(module, "total_num_kv_heads"):
        return list(module.output_sizes)
    keys = module.total_num_kv_heads * module.head_size
    values = module.total_num_kv_heads * getattr(module, "v_head_size", module.head_size)
    return [module.total_num_heads * module.head_size, keys, values]
