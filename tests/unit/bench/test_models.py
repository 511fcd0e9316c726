"""Shapes of real models are those of transformers' own classes, and a folder without weights is one that it loads."""

from __future__ import annotations

import pytest
import torch
import transformers
from safetensors import safe_open

from rollout_core.bench.models import CONFIGS, config_of, random_weights, tensors_of, write_folder
from rollout_core.bucketing import specs_of
from rollout_core.errors import WorkerError

#: Small, with all widths different.
SMALL = {
    "vocab_size": 97,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 4,
    "moe_intermediate_size": 10,
    "num_experts": 3,
    "num_experts_per_tok": 2,
}


def small(name):
    config = config_of(name)
    return config | {key: value for key, value in SMALL.items() if key in config}


@pytest.mark.parametrize("name", CONFIGS)
def test_tensors_are_those_that_transformers_saves(name, tmp_path):
    config = small(name)
    model = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(**config), dtype=torch.bfloat16)
    model.save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as saved:
        expected = {key: (saved.get_tensor(key).dtype, tuple(saved.get_tensor(key).shape)) for key in saved.keys()}  # noqa: SIM118
    assert {spec.name: (spec.dtype, spec.shape) for spec in tensors_of(config, torch.bfloat16)} == expected


@pytest.mark.parametrize("name", CONFIGS)
def test_a_folder_loads_and_has_no_weights(name, tmp_path):
    write_folder(tmp_path / "model", small(name), torch.float32)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32)
    assert not any(tensor.any() for tensor in model.parameters())
    assert {(spec.name, spec.shape) for spec in specs_of(tmp_path / "model")} == {
        (spec.name, spec.shape) for spec in tensors_of(small(name), torch.float32)
    }


def test_sizes_are_the_real_ones():
    """Parameters as the models' cards give them."""
    counts = {name: sum(spec.numel for spec in tensors_of(config_of(name), torch.bfloat16)) for name in CONFIGS}
    assert counts == {"SmolLM2-135M": 134_515_008, "Qwen2.5-7B": 7_615_616_512, "Qwen3-30B-A3B": 30_532_122_624}
    assert len(tensors_of(config_of("Qwen3-30B-A3B"), torch.bfloat16)) == 18_867


def test_weights_are_drawn_from_the_seed():
    config = small("Qwen2.5-7B")
    one, same, other = (random_weights(config, torch.float32, seed=seed) for seed in (1, 1, 2))
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert not torch.equal(one["model.embed_tokens.weight"], other["model.embed_tokens.weight"])
    assert bool((one["model.norm.weight"] == 1).all())
    assert not one["model.layers.0.self_attn.q_proj.bias"].any()


def test_an_unknown_shape_and_too_many_layers_are_refused():
    with pytest.raises(WorkerError, match=r"there is no shape 'GPT-5': pass SmolLM2-135M"):
        config_of("GPT-5")
    with pytest.raises(WorkerError, match="has 28 layers, not 29"):
        config_of("Qwen2.5-7B", 29)
