"""What ``bench pack`` packs: named tensors of random bytes, and the methods beside ours."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from typing import Any, Final

import torch

from rollout_core.bench.planning import qwen3_30b_a3b
from rollout_core.bucketing import BucketLayout, TensorSpec

Tensors = dict[str, torch.Tensor]
BF16: Final = torch.bfloat16


def dense() -> list[TensorSpec]:
    return _like([(11264 - 512 * (i % 3), 2048) for i in range(24)])


def moe() -> list[TensorSpec]:
    return _like([(768, 2048)] * 341)


def tiny() -> list[TensorSpec]:
    return _like([(4, 1024)] * 16384)


def qwen3() -> list[TensorSpec]:
    """The first layers of Qwen3-30B-A3B, with the small tensors between the large ones."""
    return [spec for spec in qwen3_30b_a3b() if spec.name.startswith("model.layers.")]


def mixed() -> list[TensorSpec]:
    """Layers of float8 weights, their float32 scales, bf16 norms, a bool mask and an int64 counter: offsets that are even for each
    dtype, and multiples of 16 for few."""
    specs = []
    for i in range(300):
        shapes = {
            "weight": (torch.float8_e4m3fn, (1536, 2048)),
            "scale": (torch.float32, (12, 16)),
            "norm": (BF16, (2049,)),
            "mask": (torch.bool, (77,)),
            "steps": (torch.int64, ()),
            "bias": (torch.float16, (1531,)),
        }
        specs += [TensorSpec(f"layers.{i}.{name}", dtype, shape) for name, (dtype, shape) in shapes.items()]
    return specs


def odd() -> list[TensorSpec]:
    """Bytes and bf16 of odd numbers: hardly a tensor lies on a multiple of 16, or of 4, in its bucket."""
    return [TensorSpec(f"w{i}", torch.uint8 if i % 2 else BF16, (1023 + 2 * i, 1021)) for i in range(400)]


CASES: Final[dict[str, Callable[[], list[TensorSpec]]]] = {
    "dense: 24 large tensors": dense,
    "MoE: 341 x 3 MiB": moe,
    "tiny: 16384 x 8 KiB": tiny,
    "Qwen3-30B-A3B, cut": qwen3,
    "mixed dtypes": mixed,
    "odd sizes": odd,
}


def _like(shapes: list[tuple[int, ...]]) -> list[TensorSpec]:
    return [TensorSpec(f"w{i}", BF16, shape) for i, shape in enumerate(shapes)]


def cut(specs: list[TensorSpec], nbytes: int) -> list[TensorSpec]:
    """The first of them, up to ``nbytes``."""
    kept: list[TensorSpec] = []
    total = 0
    for spec in specs:
        total += spec.nbytes
        if total > nbytes and kept:
            break
        kept.append(spec)
    return kept


def random_tensors(specs: list[TensorSpec], device: torch.device) -> Tensors:
    """Each in memory of its own, of random bytes; bools are 0 or 1."""

    def one(spec: TensorSpec) -> torch.Tensor:
        high = 2 if spec.dtype is torch.bool else 256
        flat = torch.randint(0, high, (spec.nbytes,), dtype=torch.uint8, device=device)
        return flat.view(spec.dtype).view(spec.shape)

    return {spec.name: one(spec) for spec in specs}


def flat_bytes(tensors: Tensors) -> list[torch.Tensor]:
    """The tensors' bytes, as the peers view them."""
    return [t.reshape(-1).view(torch.uint8) for t in tensors.values()]


def expected(layout: BucketLayout, tensors: Tensors, device: torch.device) -> torch.Tensor:
    """What the bucket's buffer has to be: slot by slot, zeros between."""
    buffer = torch.zeros(layout.nbytes, dtype=torch.uint8, device=device)
    for slot in layout.slots:
        buffer[slot.offset : slot.end] = tensors[slot.name].reshape(-1).view(torch.uint8)
    return buffer


def loop_into(target: torch.Tensor, tensors: Tensors) -> torch.Tensor:
    """Slice by slice, as checkpoint-engine, NeMo RL's and vLLM's IPC paths and verl copy."""
    start = 0
    for tensor in tensors.values():
        flat = tensor.reshape(-1).view(torch.uint8)
        target[start : start + flat.numel()].copy_(flat)
        start += flat.numel()
    return target


def peers(tensors: Tensors) -> dict[str, Callable[[], torch.Tensor]]:
    """The packing functions of engines, where they are installed: each makes one buffer of all tensors."""
    found: dict[str, Callable[[], torch.Tensor]] = {}
    sglang = _module("sglang.srt.weight_sync.tensor_bucket")
    if sglang is not None:
        found["SGLang FlattenedTensorBucket"] = lambda: sglang.FlattenedTensorBucket(
            named_tensors=list(tensors.items())
        ).get_flattened_tensor()
    vllm = _module("vllm.distributed.weight_transfer.packed_tensor")
    if vllm is not None and hasattr(vllm, "pack_tensors"):
        total = sum(t.nbytes for t in tensors.values())
        found["vLLM pack_tensors"] = lambda: vllm.pack_tensors(_named(tensors), lambda item: item[1], total).packed_tensor
    return found


def _named(tensors: Tensors) -> Iterator[tuple[str, torch.Tensor]]:
    return iter(tensors.items())


def _module(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except Exception:  # not installed, or not for this machine: whatever an engine's import raises
        return None
