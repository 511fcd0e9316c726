"""What is vLLM's own: its known fault, its options, its refusals."""

from pathlib import Path

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


@pytest.mark.parametrize("mend", [False, True])
def test_a_tied_head_that_is_packed_is_found_and_mended(folder, monkeypatch, mend):
    """vLLM's own fault: where its CPU path packs the output layer, its reload leaves that of tied embeddings as it was. Whether
    oneDNN packs depends on the machine, so here it is packed in any case. W2 names the tensor, and the worker does not count on."""
    monkeypatch.syspath_prepend(Path(__file__).parent)
    options = {**OPTIONS, "engine_options": {**OPTIONS["engine_options"], "worker_extension_cls": "packing.PackingExtension"}}
    with VLLMWorker(folder, mend=mend, **options) as worker:
        worker.tensor_digests()  # packs
        if mend:
            assert worker.sync_weights(tied_model(1)).version == 1
            assert torch.equal(worker.read_tensor(HEAD), tied_model(1).lm_head.weight)
            return
        with pytest.raises(WorkerError, match=f"1 of 27 tensors read back .* first '{HEAD}'"):
            worker.sync_weights(tied_model(1))
        assert worker.version == 0
        assert torch.equal(worker.read_tensor(HEAD), tied_model(0).lm_head.weight), "the old one"
        assert torch.equal(worker.read_tensor("model.embed_tokens.weight"), tied_model(1).lm_head.weight), "the new one"
        with pytest.raises(WorkerError, match="weights are unusable"):
            worker.generate([[1]], SamplingParams(response_length=1))


def test_as_vllm_leaves_it_a_tied_head_is_right_or_refused(folder):
    """On this machine, without the mend."""
    with VLLMWorker(folder, mend=False, **OPTIONS) as worker:
        try:
            worker.sync_weights(tied_model(1))
        except WorkerError as error:
            assert f"first '{HEAD}'" in str(error)
            assert torch.equal(worker.read_tensor(HEAD), tied_model(0).lm_head.weight)
        else:
            assert torch.equal(worker.read_tensor(HEAD), tied_model(1).lm_head.weight)


@pytest.mark.parametrize("case", ["no folder", "no weights", "an unknown option"])
def test_an_engine_that_does_not_start_says_why(folder, tmp_path, case):
    options = dict(OPTIONS)
    if case == "no folder":
        place, message = tmp_path / "nowhere", "has no config.json"
    elif case == "no weights":
        (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
        place, message = tmp_path, "model|weights"
    else:
        place, message = folder, "vLLM did not start .*wat"
        options["engine_options"] = {"wat": 1}
    with pytest.raises(Exception, match=message) as raised:
        VLLMWorker(place, **options)
    assert isinstance(raised.value, WorkerError)
    assert str(place) in str(raised.value) or case == "an unknown option"
