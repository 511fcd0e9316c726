"""What is vLLM's own: its known fault, its options, its refusals."""

import pytest
import torch
import transformers

from rollout_core.errors import WorkerError
from rollout_core.workers import VLLMWorker

OPTIONS = {"max_model_len": 64, "engine_options": {"kv_cache_memory_bytes": 32 << 20}, "timeout": 60}
HEAD = "lm_head.weight"


def tied_model(seed):
    torch.manual_seed(seed)
    config = transformers.Qwen2Config(
        vocab_size=512,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        tie_word_embeddings=True,
        initializer_range=0.3,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=0,
    )
    return transformers.Qwen2ForCausalLM(config).float().eval()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tied")
    tied_model(0).save_pretrained(folder)
    return folder


def refusal_of(worker, model):
    try:
        worker.sync_weights(model)
    except WorkerError as error:
        return str(error)
    return None


def test_as_vllm_leaves_it_a_tied_head_is_right_or_refused(folder):
    """Without the mend: whether vLLM's reload leaves a packed copy of the old weights depends on the machine. W2 reads what logits
    are computed with, so that an update after which it is the old one is no update."""
    with VLLMWorker(folder, mend=False, **OPTIONS) as worker:
        refusal = refusal_of(worker, tied_model(1))
        found = worker.read_tensor(HEAD)
        assert torch.equal(found, tied_model(1 if refusal is None else 0).lm_head.weight)
        assert refusal is None or f"first '{HEAD}'" in refusal
        assert worker.version == (1 if refusal is None else 0)


@pytest.mark.parametrize("case", ["no folder", "no weights", "an unknown option"])
def test_an_engine_that_does_not_start_says_why(folder, tmp_path, case):
    options = dict(OPTIONS)
    if case == "no folder":
        place, message = tmp_path / "nowhere", "has no config.json"
    elif case == "no weights":
        (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
        place, message = tmp_path, "no safetensors file"
    else:
        place, message = folder, "vLLM did not start .*wat"
        options["engine_options"] = {"wat": 1}
    with pytest.raises(Exception, match=message) as raised:
        VLLMWorker(place, **options)
    assert isinstance(raised.value, WorkerError)
    assert str(place) in str(raised.value) or case == "an unknown option"
