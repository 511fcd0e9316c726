"""Experts out of a live vLLM or SGLang, by the names of a checkpoint (clause W2).

A checkpoint has three matrices for each expert: ``experts.5.gate_proj.weight``, ``up_proj`` and ``down_proj``, or ``w1``, ``w3``
and ``w2``. The engines have two tensors for all experts of a layer: ``w13_weight`` [experts, gate and up rows, hidden] and
``w2_weight`` [experts, hidden, intermediate], which a kernel may want in another order.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Final

import torch

from rollout_core.bucketing.tensors import as_bytes
from rollout_core.errors import WorkerError

_PLACE: Final = re.compile(r"(.+\.experts)\.(\d+)\.(\w+)")
_GATE, _UP, _DOWN = "gate", "up", "down"
_PARTS: Final = {"gate_proj": _GATE, "up_proj": _UP, "down_proj": _DOWN, "w1": _GATE, "w3": _UP, "w2": _DOWN}
#: vLLM's kernels that take experts as they come, and one that wants the up rows first.
_AS_THEY_ARE: Final = frozenset({"TRITON", "BATCHED_TRITON"})
_UP_FIRST: Final = "FLASHINFER_CUTLASS"


@dataclass(frozen=True, slots=True)
class Rank:
    """Which part of each expert's intermediate size a rank has: what ``layers`` asks a module for."""

    tp_rank: int
    tp_size: int


class UnknownLayout(WorkerError):
    """The engine has it in a way of which it is not known where its values are: nothing can be said of it."""


class AbsentWeight(WorkerError):
    """This model, or this rank's part of it, has nothing of that name."""


@dataclass(frozen=True, slots=True)
class Experts:
    """The matrices of one layer's experts that this rank has, each kind in the order of its own numbers for them."""

    matrices: Mapping[str, Sequence[torch.Tensor]]
    rank: Rank
    number_here: Callable[[int], int]

    @classmethod
    def of(cls, module: Any, place: str) -> Experts:
        """``UnknownLayout`` where it cannot be told where their values are, ``WorkerError`` for padding that is not zero."""
        w13, w2, up_first = _plain(module, place)
        config = getattr(module, "moe_config", None)
        is_gated = _is_gated(module)
        half = w13.shape[1] // 2 if is_gated else w13.shape[1]
        width = getattr(config, "intermediate_size_per_partition_unpadded", None) or half
        hidden = getattr(config, "hidden_dim_unpadded", None) or w13.shape[2]
        for rest in (w13[:, width:half], w13[:, half + width :], w13[:, :, hidden:], w2[:, hidden:], w2[:, :, width:]):
            if rest.numel() and int(rest.count_nonzero()):
                raise WorkerError(f"the padding of {place!r} is not zero")
        rows = [w13[:, start : start + width, :hidden].unbind() for start in range(0, w13.shape[1], half)]
        kinds = [_UP] if not is_gated else [_UP, _GATE] if up_first else [_GATE, _UP]
        here = getattr(module, "_map_global_expert_id_to_local_expert_id", int)
        matrices = dict(zip(kinds, rows, strict=True))
        return cls({**matrices, _DOWN: w2[:, :hidden, :width].unbind()}, _rank_of(module), here)


def expert_weight(path: str, modules: Mapping[str, Any], known: dict[str, Experts]) -> tuple[torch.Tensor, Rank] | None:
    """The matrix of one expert, of which ``path`` is the name without ``.weight``, out of the tensors of its layer, and which part
    of it that is. None if it is no name of an expert, or the model has none there. ``known``: the layer that was asked for last, as
    long as its weights do not change; no more, as what is unpacked is a copy. ``AbsentWeight`` for an expert of another rank, and
    see ``Experts.of``."""
    found = _PLACE.fullmatch(path)
    if found is None or found[3] not in _PARTS:
        return None
    layer = known.get(found[1])
    if layer is None:
        places = (f"{found[1]}.routed_experts", found[1])  # vLLM's, and SGLang's
        module = next((modules[place] for place in places if hasattr(modules.get(place), "w13_weight")), None)
        if module is None:
            return None
        known.clear()
        layer = known[found[1]] = Experts.of(module, found[1])
    matrices, number = layer.matrices.get(_PARTS[found[3]], ()), int(layer.number_here(int(found[2])))
    if not 0 <= number < len(matrices):
        raise AbsentWeight(f"the worker has no expert {path!r}: another rank may")
    return matrices[number], layer.rank


def _plain(module: Any, place: str) -> tuple[torch.Tensor, torch.Tensor, bool]:
    """A layer's ``w13`` and ``w2`` in rows, and whether the rows of up come first."""
    w13, w2 = module.w13_weight.detach(), module.w2_weight.detach()
    method = getattr(module, "quant_method", None)
    backend = getattr(getattr(method, "unquantized_backend", None), "name", None)
    if w13.dtype.itemsize == 1:
        raise UnknownLayout(f"the experts of {place!r} are quantized, and not read back: pass readback=False")
    # SGLang's flags: packed for AMX, gate and up row by row, in blocks for TensorRT-LLM's kernels; columns first, and up first.
    if getattr(module, "use_intel_amx_backend", False) or getattr(method, "w13_swiglu_interleaved", False) or w13.dim() != 3:
        raise UnknownLayout(f"the experts of {place!r} are packed for SGLang's kernels, and not read back: pass readback=False")
    if getattr(module, "use_triton_kernels", False):
        return w13.transpose(1, 2), w2.transpose(1, 2), False
    if backend is None:
        return w13, w2, bool(getattr(method, "load_up_proj_weight_first", False))
    if backend == "CPU":
        experts = getattr(getattr(method, "moe_kernel", None), "fused_experts", None)
        if experts is None or getattr(experts, "_use_zentorch", False):
            return w13, w2, False
        w13, w2 = (torch.stack([_unpacked(one, experts.isa, place) for one in packed]) for packed in (w13, w2))
        return w13, w2, False
    if backend != _UP_FIRST and backend not in _AS_THEY_ARE:
        raise UnknownLayout(
            f"the experts of {place!r} are laid out for vLLM's {backend} kernels, and not read back: pass readback=False"
        )
    return w13, w2, backend == _UP_FIRST


def _is_gated(module: Any) -> bool:
    """Whether there is a gate beside up."""
    if hasattr(module, "moe_config"):
        return bool(getattr(module.moe_config, "is_act_and_mul", True))
    return bool(getattr(getattr(module, "moe_runner_config", None), "is_gated", True))


def _rank_of(module: Any) -> Rank:
    config = getattr(module, "moe_config", None)
    if config is not None:
        return Rank(config.tp_rank, config.tp_size)
    return Rank(getattr(module, "moe_tp_rank", 0), getattr(module, "moe_tp_size", 1))


def _unpacked(packed: torch.Tensor, isa: str, place: str) -> torch.Tensor:
    """One expert's matrix as it was before vLLM packed it for its CPU kernels, which moves values and changes none: where each went
    is seen by packing numbers."""
    matrix = torch.empty_like(packed).view(-1)
    matrix[_packed_order(tuple(packed.shape), packed.dtype, isa)] = packed.reshape(-1)
    matrix = matrix.view(packed.shape)
    if not torch.equal(as_bytes(_pack(matrix, isa)), as_bytes(packed)):
        raise UnknownLayout(f"the experts of {place!r} are packed in a way that is not known: pass readback=False")
    return matrix


@lru_cache(maxsize=2)  # one for each of a layer's tensors
def _packed_order(shape: tuple[int, int], dtype: torch.dtype, isa: str) -> torch.Tensor:
    """For each place of a packed matrix the place that its value has in the plain one; digit by digit, as the dtype has not all
    numbers."""
    base = 1 << 8  # which every floating-point dtype of 16 bits and more counts to
    numbers = torch.arange(shape[0] * shape[1])
    order, unit = torch.zeros_like(numbers), 1
    while unit < len(numbers):
        digits = (numbers // unit % base).to(dtype).view(shape)
        order += _pack(digits, isa).reshape(-1).to(torch.int64) * unit
        unit *= base
    return order


def _pack(matrix: torch.Tensor, isa: str) -> torch.Tensor:
    from vllm._custom_ops import cpu_prepack_moe_weight

    packed: torch.Tensor = cpu_prepack_moe_weight(matrix[None], isa)
    return packed[0]
