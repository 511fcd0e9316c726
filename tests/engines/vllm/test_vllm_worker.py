"""What is vLLM's own: its known fault, its options, its refusals."""

import pytest
import torch
import transformers

from rollout_core.errors import WorkerError
from rollout_core.workers import SamplingParams, VLLMWorker

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


@pytest.mark.parametrize("mend", [pytest.param(False, marks=pytest.mark.slow), True])
def test_the_head_of_a_tied_model_whose_update_names_the_embeddings_alone(folder, mend):
    """As checkpoints of tied models do. vLLM's reload then leaves what it had packed of the head as it was: without the mend W2
    names the tensor, and the worker does not count on."""
    weights = {name: tensor for name, tensor in tied_model(1).state_dict().items() if name != HEAD}
    with VLLMWorker(folder, mend=mend, **OPTIONS) as worker:
        if mend:
            assert worker.sync_weights(weights).version == 1
        else:
            with pytest.raises(WorkerError, match=f"1 of 27 tensors read back .* first '{HEAD}'"):
                worker.sync_weights(weights)
            assert worker.version == 0
            with pytest.raises(WorkerError, match="weights are unusable"):
                worker.generate([[1]], SamplingParams(response_length=1))
        assert torch.equal(worker.read_tensor(HEAD), tied_model(1 if mend else 0).lm_head.weight)
        assert torch.equal(worker.read_tensor("model.embed_tokens.weight"), tied_model(1).lm_head.weight)


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
