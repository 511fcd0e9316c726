"""Weights of a live vLLM model by the names of its checkpoint (clause W2): out of fused layers, and out of what a CPU has packed.

vLLM fuses ``q_proj``, ``k_proj`` and ``v_proj`` into ``qkv_proj``, and ``gate_proj`` and ``up_proj`` into ``gate_up_proj``; a
model's ``packed_modules_mapping`` says so. On a CPU a linear layer's weight is packed for oneDNN and then removed
(``dispatch_cpu_unquantized_gemm``): what is left is a function that multiplies by it. That, given the identity, is the weight as
the engine uses it, value for value: products with 0 and 1 and sums with 0 are exact, only the sign of a zero is lost, and a NaN or
an infinity fills its row with NaN. On a GPU what is read is the weight itself, where it is; of a layer that vLLM has quantized to 8
bits, what it multiplies by.

With tensor parallelism a layer has a part: see ``layers``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Final

import torch

from rollout_core.errors import WorkerError
from rollout_core.workers.experts import AbsentWeight, Experts, expert_weight
from rollout_core.workers.layers import shard_of
from rollout_core.workers.shards import Shard

_FP8: Final = (torch.float8_e4m3fn, torch.float8_e5m2)
#: Where a model does not say it.
_FUSED: Final = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_proj", "up_proj"]}


class Directory:
    """Where a model's weights are, for who reads many of them while they do not change: to find that takes longer than to read
    one."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.modules: Mapping[str, Any] = dict(model.named_modules(remove_duplicate=False))
        self.experts: dict[str, Experts] = {}
        mapper: Any = getattr(model, "hf_to_vllm_mapper", None)
        if hasattr(mapper, "orig_to_new_stacked"):  # newer mappers name the fused layer
            mapper = replace(mapper, orig_to_new_stacked={})
        self._mapper = mapper

    def name_of(self, name: str) -> str:
        """The name in vLLM's model of what a checkpoint has under this one, as if nothing were fused."""
        return name if self._mapper is None else str(next(iter(self._mapper.apply_list([name])), name))


def read_weight(model: Any, name: str, directory: Directory | None = None) -> torch.Tensor:
    """The tensor that a checkpoint calls ``name``, where the model has it: a view of its weights, or what was made of them.
    ``AbsentWeight``, a ``WorkerError``, if this model has nothing of that name. ``directory``: the model's."""
    return _found(directory or Directory(model), name)[0]


def read_part(model: Any, name: str, shape: Sequence[int], directory: Directory | None = None) -> tuple[torch.Tensor, Shard]:
    """``read_weight`` of a rank that has a part of it, without padding: and which part, ``shape`` being that of the whole.
    ``WorkerError`` also if it is not known which, or if there is something else than zeros in the padding, which would be
    computed with."""
    tensor, module, part = _found(directory or Directory(model), name)
    shard = shard_of(module, part, tuple(tensor.shape), tuple(shape), name)
    real = list(shape)
    if not shard.is_whole:
        real[shard.dim] = shard.size
    if list(tensor.shape) == real or len(tensor.shape) != len(real):
        return tensor, shard
    cut = tensor
    for dim, size in enumerate(real):
        cut = cut.narrow(dim, 0, min(size, cut.shape[dim]))
    if int(tensor.count_nonzero()) != int(cut.count_nonzero()):
        raise WorkerError(f"the padding of {name!r}, {list(tensor.shape)} for {real}, is not zero")
    return cut.contiguous(), shard


def _found(directory: Directory, name: str) -> tuple[torch.Tensor, Any, int | None]:
    """The tensor, the module that has it, and which part of that it is if it is fused there."""
    path, _, leaf = directory.name_of(name).rpartition(".")
    if leaf == "weight" and (expert := expert_weight(path, directory.modules, directory.experts)) is not None:
        return *expert, None
    module, part = _module_of(directory.model, path, directory.modules)
    tensor = None if module is None else getattr(module, leaf, None)
    if module is None or not isinstance(tensor, torch.Tensor):
        raise AbsentWeight(f"the worker has no tensor {name!r}")
    # An output layer that is the embeddings too has both a weight and what was packed of it, and multiplies by the latter.
    is_output = path.rpartition(".")[2] == "lm_head"
    if leaf == "weight" and hasattr(module, "cpu_linear") and (tensor.numel() == 0 or is_output):
        tensor = _multiplied_out(module, tensor.dtype)
    elif leaf == "weight" and tensor.dtype in _FP8:
        tensor = _dequantized(module, tensor, name)
    if part is not None:
        sizes = list(module.output_partition_sizes)
        tensor = tensor.narrow(0, sum(sizes[:part]), sizes[part])
    elif hasattr(module, "org_vocab_size"):
        indices = getattr(module, "shard_indices", None)
        rows = module.org_vocab_size if indices is None else indices.org_vocab_end_index - indices.org_vocab_start_index
        tensor = tensor[:rows]  # the rest pads it
    return tensor.detach(), module, part


def _module_of(model: Any, path: str, modules: Mapping[str, Any]) -> tuple[Any, int | None]:
    """The module at this path, or the fused one that has it as a part, and which."""
    if path in modules:
        return modules[path], None
    parent, _, last = path.rpartition(".")
    for fused, parts in {**_FUSED, **getattr(model, "packed_modules_mapping", {})}.items():
        place = f"{parent}.{fused}" if parent else fused
        if last in parts and place in modules:
            return modules[place], list(parts).index(last)
    return None, None


def _dequantized(module: Any, weight: torch.Tensor, name: str) -> torch.Tensor:
    """The values that a layer in 8 bits multiplies by, in float32, rows first: vLLM lays some of its weights the other way."""
    rows = sum(module.output_partition_sizes) if hasattr(module, "output_partition_sizes") else weight.shape[0]
    is_turned = weight.stride(0) == 1 and weight.stride(1) != 1
    weight = weight.t() if is_turned else weight
    scale = getattr(module, "weight_scale", None)
    scale = getattr(module, "weight_scale_inv", None) if scale is None else scale
    if isinstance(scale, torch.Tensor) and weight.shape[0] == rows:
        if scale.numel() == 1:
            return weight.float() * scale.float().reshape(())
        if scale.numel() == rows:
            return weight.float() * scale.float().reshape(rows, 1)
        block = getattr(module, "weight_block_size", None)
        if block is not None and scale.dim() == 2:
            for dim, size in enumerate(block):
                scale = scale.repeat_interleave(size, dim).narrow(dim, 0, weight.shape[dim])
            return weight.float() * scale.float()
    raise WorkerError(f"{name!r} is quantized in a way that is not read back: {weight.dtype}, {list(weight.shape)}")


def _multiplied_out(module: Any, dtype: torch.dtype) -> torch.Tensor:
    sizes = ("input_size_per_partition", "input_size", "embedding_dim")
    width = next(getattr(module, size) for size in sizes if hasattr(module, size))
    identity = torch.eye(width, dtype=dtype)
    product: torch.Tensor = module.cpu_linear(identity, getattr(module, "weight", None), None)
    return product.t().contiguous()
