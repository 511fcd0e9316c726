"""The same tests on every engine: ROLLOUT_CORE_ENGINE says which. An engine that is missing fails them: none is skipped."""

import copy
import os

import pytest
import torch
import transformers

from rollout_core.workers import HFWorker, SGLangWorker, VLLMWorker

ENGINE = os.environ.get("ROLLOUT_CORE_ENGINE", "hf")
POSITIONS = 256


def make_worker(folder, **options):
    if ENGINE == "hf":
        return HFWorker(str(folder), threads=1, timeout=60, **options)
    if ENGINE == "sglang":
        return SGLangWorker(str(folder), max_model_len=POSITIONS, timeout=60, **options)
    assert ENGINE in ("vllm", "vllm_async"), f"ROLLOUT_CORE_ENGINE is {ENGINE!r}"
    mode = "async" if ENGINE == "vllm_async" else "stepped"
    return VLLMWorker(
        str(folder), mode=mode, max_model_len=POSITIONS, engine_options={"kv_cache_memory_bytes": 32 << 20}, timeout=60, **options
    )


def make_model(*, tied):
    config = transformers.Qwen2Config(
        vocab_size=512,
        hidden_size=128,  # 4 heads of 32: vLLM's CPU attention takes no smaller ones
        intermediate_size=200,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=POSITIONS,
        tie_word_embeddings=tied,
        initializer_range=0.3,
        bos_token_id=None,
        eos_token_id=[2, 7],
        pad_token_id=0,
    )
    return transformers.Qwen2ForCausalLM(config).float().eval()


def changed(model, seed):
    """The model with other weights, biases included, which transformers begins with zeros."""
    other, generator = copy.deepcopy(model), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tensor in other.parameters():
            tensor += 0.05 * torch.randn(tensor.shape, generator=generator)
    return other


class Place:
    """A running worker, and the models that it is given: one with the weights that it has, and another."""

    def __init__(self, worker, model, folder):
        self.worker, self.folder = worker, folder
        self.model, self.other = changed(model, 1), changed(model, 2)


@pytest.fixture(scope="session", params=["untied", "tied"])
def running(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    model = make_model(tied=request.param == "tied")
    model.save_pretrained(folder)
    with make_worker(folder) as worker:
        yield Place(worker, model, folder)


@pytest.fixture
def place(running):
    """Left as it was found: serving, with the weights of ``model``, and with nothing under way."""
    running.worker.sync_weights(running.model)
    yield running
    running.worker.resume()
    assert running.worker.abort() == []
    running.worker.sync_weights(running.model)
