"""``specs_from_dir`` on the configs and checkpoints of small transformers models."""

import json

import pytest
import safetensors.torch as safetensors_torch
import torch
import transformers

from rollout_core.errors import DuplicateNameError, SourceError
from rollout_core.preflight.model_dir import specs_from_dir

TOKENS = {"vocab_size": 100, "bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
TEXT = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    **TOKENS,
}
QWEN2 = {"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"], **TEXT}
QWEN2_VL = {
    "model_type": "qwen2_vl",
    "text_config": {"model_type": "qwen2_vl_text", "rope_scaling": {"type": "mrope", "mrope_section": [2, 2, 4]}, **TEXT},
    "vision_config": {"depth": 2, "embed_dim": 32, "num_heads": 2, "hidden_size": 64, "mlp_ratio": 2},
}


def folder(tmp_path, config):
    (tmp_path / "config.json").write_text(config if isinstance(config, str) else json.dumps(config))
    return tmp_path


def by_name(specs):
    return {spec.name: spec for spec in specs}


def of_module(model):
    """What ``specs_from_dir`` should find, read off a real model's state dict and buffers, weights and all."""
    tensors = {**model.state_dict(), **dict(model.named_buffers())}
    return {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("key", ["dtype", "torch_dtype"])
def test_a_config_gives_the_tensors_of_its_model(tmp_path, dtype, key):
    specs, words = specs_from_dir(folder(tmp_path, {**QWEN2, key: dtype}))
    real = transformers.Qwen2ForCausalLM._from_config(transformers.Qwen2Config(**TEXT), dtype=getattr(torch, dtype))
    assert {spec.name: (spec.dtype, spec.shape) for spec in specs} == of_module(real)
    assert specs[0].name == "model.embed_tokens.weight"
    assert words == "config.json (Qwen2ForCausalLM, meta device)"
    assert [file.name for file in tmp_path.iterdir()] == ["config.json"]


@pytest.mark.parametrize("tie", [True, False])
def test_tied_weights_are_found(tmp_path, tie):
    specs, _ = specs_from_dir(folder(tmp_path, {**QWEN2, "tie_word_embeddings": tie}))
    aliases = {spec.name: spec.alias_of for spec in specs if spec.alias_of}
    assert aliases == ({"lm_head.weight": "model.embed_tokens.weight"} if tie else {})


def test_a_model_larger_than_any_memory_is_described(tmp_path):
    specs, _ = specs_from_dir(folder(tmp_path, {**QWEN2, "vocab_size": 1 << 40}))
    assert specs[0].shape == (1 << 40, 64)


def test_experts_are_stacked_and_the_words_say_so(tmp_path):
    config = {"model_type": "qwen3_moe", "num_experts": 4, "moe_intermediate_size": 32, "head_dim": 16, **TEXT}
    specs, words = specs_from_dir(folder(tmp_path, config))
    assert by_name(specs)["model.layers.1.mlp.experts.gate_up_proj"].shape == (4, 64, 64)
    assert words == (
        "config.json (Qwen3MoeForCausalLM, meta device, module names with stacked experts: a checkpoint may name each expert)"
    )


@pytest.mark.parametrize("architectures", [None, [], ["Qwen2VLForConditionalGeneration"]])
def test_a_vision_language_config_gives_both_towers(tmp_path, architectures):
    specs, words = specs_from_dir(folder(tmp_path, {**QWEN2_VL, "architectures": architectures, "dtype": "bfloat16"}))
    names = by_name(specs)
    assert names["model.visual.blocks.1.attn.qkv.weight"].shape == (96, 32)
    assert names["model.language_model.layers.1.mlp.up_proj.weight"].dtype == torch.bfloat16
    assert "lm_head.weight" in names
    assert words == "config.json (Qwen2VLForConditionalGeneration, meta device)"


def test_the_named_architecture_is_built(tmp_path):
    specs, words = specs_from_dir(folder(tmp_path, {**QWEN2, "architectures": ["Qwen2ForSequenceClassification"]}))
    assert by_name(specs)["score.weight"].shape == (2, 64)
    assert words.startswith("config.json (Qwen2ForSequenceClassification,")


def test_a_model_without_a_language_head_is_built_bare(tmp_path):
    config = {"model_type": "vit", "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    specs, words = specs_from_dir(folder(tmp_path, config))
    assert "embeddings.cls_token" in by_name(specs)
    assert words == "config.json (ViTModel, meta device)"


@pytest.mark.parametrize("name", ["MyOwnForCausalLM", "Trainer", "AutoTokenizer"])
def test_an_architecture_that_is_no_model_of_transformers_is_replaced_aloud(tmp_path, name):
    """Trainer and AutoTokenizer are in transformers: a name from a config must not make anything but a model."""
    _, words = specs_from_dir(folder(tmp_path, {**QWEN2, "architectures": [name]}))
    assert words == f"config.json (Qwen2ForCausalLM, as this transformers has no {name}, meta device)"


def test_the_words_say_what_differs_from_the_loaded_model(tmp_path):
    _, words = specs_from_dir(folder(tmp_path, {**QWEN2, "quantization_config": {"quant_method": "fp8"}}))
    assert "unquantized: quantization_config is not applied" in words
    t5 = {"model_type": "t5", "d_model": 16, "d_ff": 16, "num_layers": 1, "num_heads": 2, "d_kv": 8, "vocab_size": 100}
    t5["architectures"] = ["T5ForConditionalGeneration"]
    assert "from_pretrained may keep wo in float32" in specs_from_dir(folder(tmp_path, {**t5, "dtype": "float16"}))[1]
    assert "float32" not in specs_from_dir(folder(tmp_path, t5))[1]


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ("{,", "is no readable JSON"),
        ("", "is no readable JSON"),
        ("[" * 100_000, "is no readable JSON"),
        ("\udcff", "is no readable JSON"),
        ("[1]", "holds a JSON list, not an object"),
        ({**QWEN2, "architectures": [3]}, "architectures in .* is \\[3\\]; it is a list of class names"),
        ({**QWEN2, "model_type": "wat"}, "cannot read .*wat.*a newer transformers may know the model"),
        ({"hidden_size": 3}, "cannot read .*model_type"),
        ({**QWEN2, "dtype": "float99"}, "float99"),
        ({**QWEN2, "num_attention_heads": "four"}, "cannot read .*num_attention_heads"),
        ({**QWEN2, "hidden_act": "wat"}, "cannot build Qwen2ForCausalLM .*correct the config"),
        ({"model_type": "wat", "auto_map": {"AutoConfig": "conf.Foo"}}, "cannot read .*custom code"),
    ],
)
def test_a_bad_config_is_a_source_error_that_advises(tmp_path, config, message):
    if isinstance(config, str):
        (tmp_path / "config.json").write_bytes(config.encode(errors="surrogateescape"))
    else:
        folder(tmp_path, config)
    with pytest.raises(SourceError, match=message) as raised:
        specs_from_dir(tmp_path)
    assert "\n" not in str(raised.value)
    assert "config.json" in str(raised.value)


def test_code_in_the_directory_is_never_run(tmp_path, capsys):
    witness = tmp_path / "ran"
    (tmp_path / "conf.py").write_text(f"open({str(witness)!r}, 'w')\n")
    folder(tmp_path, {"model_type": "wat", "auto_map": {"AutoConfig": "conf.Foo", "AutoModelForCausalLM": "conf.Foo"}})
    with pytest.raises(SourceError):
        specs_from_dir(tmp_path)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["conf.py", "config.json"]
    assert "y/N" not in "".join(capsys.readouterr()), "nobody was asked at the terminal"


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ([], "has no \\*.safetensors and no config.json; pass the directory"),
        (["pytorch_model.bin", "weights.pth"], "there is pytorch_model.bin, a format that is not read"),
        (["model.safetensors.index.json"], "none of the files that it lists"),
    ],
)
def test_a_directory_with_neither_is_said_to_have_neither(tmp_path, files, message):
    for name in files:
        (tmp_path / name).write_text("{}")
    with pytest.raises(SourceError, match=message):
        specs_from_dir(tmp_path)


def test_what_is_not_there_or_no_checkpoint_is_refused(tmp_path):
    with pytest.raises(SourceError, match="nowhere does not exist"):
        specs_from_dir(tmp_path / "nowhere")
    with pytest.raises(SourceError, match="does not end in .safetensors"):
        specs_from_dir(folder(tmp_path, QWEN2) / "config.json")


# Safetensors

SHARDS = {
    "model-b.safetensors": {"z": torch.zeros(3, dtype=torch.bfloat16), "a": torch.zeros(2, 2, dtype=torch.float8_e4m3fn)},
    "model-a.safetensors": {"m": torch.zeros((), dtype=torch.float64), "empty": torch.zeros(0, 5, dtype=torch.int8)},
}


def sharded(tmp_path):
    for name, tensors in SHARDS.items():
        safetensors_torch.save_file(tensors, tmp_path / name)
    return tmp_path


def described(specs):
    return {spec.name: (spec.dtype, spec.shape) for spec in specs}


ALL = {name: (tensor.dtype, tuple(tensor.shape)) for tensors in SHARDS.values() for name, tensor in tensors.items()}


def test_headers_come_before_the_config(tmp_path):
    specs, words = specs_from_dir(folder(sharded(tmp_path), QWEN2))
    assert words == "safetensors headers"
    assert described(specs) == ALL
    assert {spec.name for spec in specs[:2]} == {"m", "empty"}, "without an index files go by name"


def test_one_file_is_a_source_too(tmp_path):
    specs, words = specs_from_dir(sharded(tmp_path) / "model-b.safetensors")
    assert described(specs) == {name: ALL[name] for name in ("z", "a")}
    assert words == "safetensors headers"


def test_shards_go_in_the_order_of_the_index(tmp_path):
    weight_map = {name: file for file, tensors in SHARDS.items() for name in tensors}
    (sharded(tmp_path) / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    specs, _ = specs_from_dir(tmp_path)
    assert described(specs) == ALL
    assert {spec.name for spec in specs[:2]} == {"z", "a"}, "the index lists model-b first"


def test_a_saved_model_has_the_tensors_of_its_config(tmp_path):
    """The two routes agree where they can: on what the checkpoint holds, that is without buffers and tied names."""
    config = transformers.Qwen2Config(**TEXT, tie_word_embeddings=True, dtype="bfloat16")
    transformers.Qwen2ForCausalLM._from_config(config).save_pretrained(tmp_path / "saved", max_shard_size="100KB")
    assert (tmp_path / "saved" / "model.safetensors.index.json").exists()
    headers, _ = specs_from_dir(tmp_path / "saved")
    meta, _ = specs_from_dir(folder(tmp_path, (tmp_path / "saved" / "config.json").read_text()))
    persistent = {spec.name: (spec.dtype, spec.shape) for spec in meta if spec.alias_of is None and "inv_freq" not in spec.name}
    assert described(headers) == persistent


def test_a_name_in_two_files_names_both(tmp_path):
    safetensors_torch.save_file({"w": torch.zeros(3)}, tmp_path / "one.safetensors")
    safetensors_torch.save_file({"w": torch.zeros(3)}, tmp_path / "two.safetensors")
    with pytest.raises(DuplicateNameError, match=r"'w' .*one\.safetensors .*two\.safetensors"):
        specs_from_dir(tmp_path)


@pytest.mark.parametrize("keep", [0, 4, 20, -1])
def test_a_truncated_file_is_named(tmp_path, keep):
    file = sharded(tmp_path) / "model-b.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(SourceError, match=r"model-b\.safetensors"):
        specs_from_dir(tmp_path)


def test_a_shard_that_is_missing_is_named(tmp_path):
    index = {"weight_map": {"z": "model-b.safetensors", "q": "model-c.safetensors"}}
    (sharded(tmp_path) / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(SourceError, match=r"model-c\.safetensors"):
        specs_from_dir(tmp_path)
