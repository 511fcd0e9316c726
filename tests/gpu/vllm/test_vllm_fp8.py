"""vLLM that computes in 8 bits what it is sent in 16: after an update it has what one has that was started with those weights."""

from __future__ import annotations

import pytest
import torch

from gpu.vllm.setting import start
from rollout_core.errors import WorkerError
from rollout_core.workers import SamplingParams

PROMPTS = [[5], [17, 3, 60], list(range(100, 137))]
GREEDY = SamplingParams(response_length=16, ignore_eos=True)
OPTIONS = {
    "quantization": "fp8",
    "enforce_eager": True,
    "compilation_config": {"mode": 0},
    "kv_cache_memory_bytes": 256 << 20,
    "gpu_memory_utilization": 0.05,
}
Q_PROJ = "model.layers.0.self_attn.q_proj.weight"


@pytest.fixture(scope="module")
def fresh(folders):
    """Of each model: digests, tokens and a weight of an engine that was started with it."""
    found = []
    for folder in folders:
        with start(folder, **OPTIONS) as worker:
            tokens = [one.token_ids for one in worker.generate(PROMPTS, GREEDY)]
            found.append((worker.tensor_digests(), tokens, worker.read_tensor(Q_PROJ)))
    assert found[0] != found[1]
    return found


def test_updates_give_what_a_start_gives(fresh, folders, models):
    with start(folders[0], **OPTIONS) as worker:
        for number in (1, 0, 1, 1):
            report = worker.sync_weights(models[number], readback=False, capacity=1 << 20)
            assert report.carrier == "cuda_ipc"
            digests, tokens, _ = fresh[number]
            assert worker.tensor_digests() == digests
            assert [one.token_ids for one in worker.generate(PROMPTS, GREEDY)] == tokens
        with pytest.raises(WorkerError, match="quantizes its weights.*readback=False"):
            worker.sync_weights(models[0])


def test_what_is_read_is_the_weight_within_the_steps_of_8_bits(fresh, models):
    """e4m3 has 3 bits behind the point, so that a value is off by a sixteenth of itself at most; near 0 by half of the smallest
    step, 2**-9 of the scale, which is the largest value of the fused layer over 448."""
    for (_, _, found), model in zip(fresh, models, strict=True):
        attention = model.model.layers[0].self_attn
        whole = torch.cat([attention.q_proj.weight, attention.k_proj.weight, attention.v_proj.weight]).float().cpu()
        exact = attention.q_proj.weight.float().cpu()
        step = whole.abs().max() / 448 * 2**-9
        assert bool(((found - exact).abs() <= exact.abs() / 16 + step / 2 + 1e-6).all())
        assert not torch.equal(found, exact)
