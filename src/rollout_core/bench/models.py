"""Models of real shape with random weights, in folders that need no hub and hardly any disk.

A folder has a config.json and a model.safetensors of the right length that was never written: a sparse file, whose tensors read as
zeros. Weights come by an update, as they do in training.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

import torch

from rollout_core.bucketing import TensorSpec
from rollout_core.errors import WorkerError

_COMMON: Final = {"hidden_act": "silu", "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
#: By name, what stands in the config.json of HuggingFaceTB/SmolLM2-135M, Qwen/Qwen2.5-7B and Qwen/Qwen3-30B-A3B, without what
#: tells of their training.
CONFIGS: Final[Mapping[str, Mapping[str, Any]]] = {
    "SmolLM2-135M": {
        **_COMMON,
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": 49_152,
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": True,
    },
    "Qwen2.5-7B": {
        **_COMMON,
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "vocab_size": 152_064,
        "hidden_size": 3584,
        "intermediate_size": 18_944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "max_position_embeddings": 32_768,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1e6,
        "tie_word_embeddings": False,
    },
    "Qwen3-30B-A3B": {
        **_COMMON,
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        "vocab_size": 151_936,
        "hidden_size": 2048,
        "intermediate_size": 6144,
        "moe_intermediate_size": 768,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "norm_topk_prob": True,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "num_hidden_layers": 48,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "head_dim": 128,
        "max_position_embeddings": 40_960,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1e6,
        "tie_word_embeddings": False,
    },
}


def config_of(name: str, layers: int | None = None) -> dict[str, Any]:
    """The config of that name, with so many layers instead of its own, to fit a smaller device."""
    if name not in CONFIGS:
        raise WorkerError(f"there is no shape {name!r}: pass {', '.join(CONFIGS)}")
    config = dict(CONFIGS[name])
    if layers is not None:
        if not 1 <= layers <= config["num_hidden_layers"]:
            raise WorkerError(f"{name} has {config['num_hidden_layers']} layers, not {layers}")
        config["num_hidden_layers"] = layers
    return config


def tensors_of(config: Mapping[str, Any], dtype: torch.dtype) -> list[TensorSpec]:
    """The tensors of a checkpoint with this config, by the names that transformers saves them under, in its order."""
    return [TensorSpec(name, dtype, shape) for name, shape in _shapes(config)]


def _shapes(config: Mapping[str, Any]) -> Iterator[tuple[str, tuple[int, ...]]]:
    hidden, kind = config["hidden_size"], config["model_type"]
    size = config.get("head_dim") or hidden // config["num_attention_heads"]
    queries, keys = config["num_attention_heads"] * size, config["num_key_value_heads"] * size
    yield "model.embed_tokens.weight", (config["vocab_size"], hidden)
    for layer in range(config["num_hidden_layers"]):
        place = f"model.layers.{layer}"
        yield f"{place}.input_layernorm.weight", (hidden,)
        for name, width in (("q", queries), ("k", keys), ("v", keys)):
            yield f"{place}.self_attn.{name}_proj.weight", (width, hidden)
            if kind == "qwen2":
                yield f"{place}.self_attn.{name}_proj.bias", (width,)
        if kind.startswith("qwen3"):
            yield f"{place}.self_attn.q_norm.weight", (size,)
            yield f"{place}.self_attn.k_norm.weight", (size,)
        yield f"{place}.self_attn.o_proj.weight", (hidden, queries)
        yield f"{place}.post_attention_layernorm.weight", (hidden,)
        if "num_experts" in config:
            yield f"{place}.mlp.gate.weight", (config["num_experts"], hidden)
            for expert in range(config["num_experts"]):
                yield from _mlp(f"{place}.mlp.experts.{expert}", hidden, config["moe_intermediate_size"])
        else:
            yield from _mlp(f"{place}.mlp", hidden, config["intermediate_size"])
    yield "model.norm.weight", (hidden,)
    if not config["tie_word_embeddings"]:
        yield "lm_head.weight", (config["vocab_size"], hidden)


def _mlp(place: str, hidden: int, width: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield f"{place}.gate_proj.weight", (width, hidden)
    yield f"{place}.up_proj.weight", (width, hidden)
    yield f"{place}.down_proj.weight", (hidden, width)


def write_folder(folder: Path, config: Mapping[str, Any], dtype: torch.dtype) -> None:
    """A folder that engines start from; all of its weights are zeros."""
    folder.mkdir(parents=True, exist_ok=True)
    torch_name = str(dtype).removeprefix("torch.")
    (folder / "config.json").write_text(json.dumps({**config, "torch_dtype": torch_name}, indent=1))
    wire = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}[dtype]
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for spec in tensors_of(config, dtype):
        start, end = end, end + math.prod(spec.shape) * dtype.itemsize
        header[spec.name] = {"dtype": wire, "shape": list(spec.shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)


def random_weights(
    config: Mapping[str, Any], dtype: torch.dtype, device: torch.device | str = "cpu", seed: int = 0
) -> dict[str, torch.Tensor]:
    """Weights of a model with this config, drawn as transformers initialises: standard deviation 0.02, norms 1, biases 0."""
    generator = torch.Generator(device).manual_seed(seed)
    weights = {}
    for spec in tensors_of(config, dtype):
        tensor = torch.empty(spec.shape, dtype=dtype, device=device)
        if spec.name.endswith("norm.weight"):
            tensor.fill_(1)
        elif spec.name.endswith(".bias"):
            tensor.zero_()
        else:
            tensor.normal_(0, 0.02, generator=generator)
        weights[spec.name] = tensor
    return weights
