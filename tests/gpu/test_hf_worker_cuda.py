"""HFWorker on a GPU: the trainer on either device, the worker in its own process."""

from __future__ import annotations

import pytest
import torch
from transformers import Qwen2ForCausalLM

from rollout_core.preflight.models import eos_token_ids, make_small_model, perturb
from rollout_core.testing.oracles import bytes_of
from rollout_core.transfer.targets import named_weights
from rollout_core.workers import HFWorker, SamplingParams

PROMPTS = [[5], [9, 8, 7], [3] * 20, [2, 11, 2]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    make_small_model(path)
    return path


@pytest.fixture(scope="module", params=[True, False], ids=["own process", "this process"])
def worker(folder, request):
    with HFWorker(str(folder), device="cuda", process=request.param) as made:
        yield made


def reference(model, prompt, length, eos):
    ids, tokens = list(prompt), []
    with torch.no_grad():
        while len(tokens) < length and not (tokens and tokens[-1] in eos):
            tokens.append(int(model(torch.tensor([ids], device=model.device), use_cache=False).logits[0, -1].argmax()))
            ids.append(tokens[-1])
    return tokens


@pytest.mark.parametrize("device", ["cuda", "cpu"])
def test_w1_w2_weights_and_greedy_tokens(folder, worker, device):
    trainer = Qwen2ForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    perturb(trainer, 0.05, seed=worker.version + 1)
    trainer.to(device)
    report = worker.sync_weights(trainer, capacity=100_000)
    assert report.version == worker.version
    for name, tensor in named_weights(trainer).items():
        assert bytes_of(worker.read_tensor(name)) == bytes_of(tensor.detach().cpu()), name
    trainer.to("cuda")
    completions = worker.generate(PROMPTS, SamplingParams(response_length=12))
    eos = eos_token_ids(trainer)
    assert [list(c.token_ids) for c in completions] == [reference(trainer, p, 12, eos) for p in PROMPTS]


def test_w3_seeded_sampling_repeats(worker):
    params = SamplingParams(response_length=8, n=3, temperature=1.0, seed=3)
    assert worker.generate(PROMPTS, params) == worker.generate(PROMPTS, params)
