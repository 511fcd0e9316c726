"""HFWorker on a GPU: the trainer on either device, the worker in its own process."""

from __future__ import annotations

import pytest
import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

from gpu.small import used_memory
from rollout_core.preflight.models import eos_token_ids, make_small_model, perturb
from rollout_core.testing.oracles import bytes_of
from rollout_core.transfer.targets import named_weights
from rollout_core.workers import HFWorker, SamplingParams

MIB = 1 << 20
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
    assert report.carrier == {"cuda": "cuda_ipc", "cpu": "memory"}[device]
    for name, tensor in named_weights(trainer).items():
        assert bytes_of(worker.read_tensor(name)) == bytes_of(tensor.detach().cpu()), name
    trainer.to("cuda")
    completions = worker.generate(PROMPTS, SamplingParams(response_length=12))
    eos = eos_token_ids(trainer)
    assert [list(c.token_ids) for c in completions] == [reference(trainer, p, 12, eos) for p in PROMPTS]


def test_w3_seeded_sampling_repeats(worker):
    params = SamplingParams(response_length=8, n=3, temperature=1.0, seed=3)
    assert worker.generate(PROMPTS, params) == worker.generate(PROMPTS, params)


def test_w6_nine_tenths_of_what_the_engine_held_come_back(tmp_path):
    """A model of a size that matters: the rest is what CUDA itself takes for a process."""
    config = Qwen2Config(
        vocab_size=1_000_000,
        hidden_size=2048,
        intermediate_size=2048,
        num_hidden_layers=1,
        num_attention_heads=16,
        num_key_value_heads=16,
        tie_word_embeddings=False,
    )
    with torch.device("cuda"):
        trainer = Qwen2ForCausalLM(config).eval()
    trainer.save_pretrained(tmp_path)
    before = used_memory()
    with HFWorker(str(tmp_path), device="cuda") as worker:
        report = worker.sync_weights(trainer, capacity=256 * MIB)
        print(f"\n{report}")
        tokens = worker.generate(PROMPTS, SamplingParams(response_length=8))
        held = used_memory()
        kept = worker.free_buffers()
        assert kept >= 2 * 256 * MIB, "two buckets"
        assert held - used_memory() >= kept, "and they are the trainer's again"
        held = used_memory() - before
        freed = worker.release_memory()
        came_back = held - (used_memory() - before)
        print(f"held {held / MIB:.0f} MiB, freed {freed / MIB:.0f} MiB as it says, {came_back / MIB:.0f} MiB as measured")
        assert came_back > 0.9 * held
        assert abs(freed - came_back) < 0.02 * held
        assert worker.release_memory() == 0
        worker.resume_memory()
        worker.sync_weights(trainer, capacity=256 * MIB)
        again = worker.generate(PROMPTS, SamplingParams(response_length=8))
        assert [one.token_ids for one in again] == [one.token_ids for one in tokens]


def test_t3_memory_is_flat_over_200_updates(folder, worker):
    trainers = [Qwen2ForCausalLM.from_pretrained(folder, dtype=torch.float32) for _ in range(2)]
    perturb(trainers[1], 0.05, seed=9)
    trainers = [trainer.cuda() for trainer in trainers]

    def update(count):
        for turn in range(count):
            worker.sync_weights(trainers[turn % 2], capacity=100_000)
        return used_memory()

    few = update(10)
    assert update(200) - few < 32 * MIB
