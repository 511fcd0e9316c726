"""SGLang 0.5.17 makes 8 bits of its weights when it starts, and has no way to do so again: an update in 16 is refused."""

from __future__ import annotations

import pytest

from gpu.sglang.setting import OPTIONS, TIMEOUT
from gpu.small import POSITIONS
from rollout_core.errors import WorkerError
from rollout_core.workers import SamplingParams, SGLangWorker

PROMPTS = [[5], [17, 3, 60], list(range(100, 137))]
GREEDY = SamplingParams(response_length=16, ignore_eos=True)


def test_t5_an_update_of_quantized_weights_leaves_them_as_they_are(folder, models):
    options = {**OPTIONS, "quantization": "fp8", "disable_cuda_graph": True}
    with SGLangWorker(str(folder), device="cuda", max_model_len=POSITIONS, engine_options=options, timeout=TIMEOUT) as worker:
        tokens = [one.token_ids for one in worker.generate(PROMPTS, GREEDY)]
        with pytest.raises(WorkerError, match="quantized its weights when it started"):
            worker.sync_weights(models[1], readback=False)
        assert worker.version == 0
        assert [one.token_ids for one in worker.generate(PROMPTS, GREEDY)] == tokens
        with pytest.raises(WorkerError, match="quantized its weights when it started"):  # wherever they come from
            worker.sync_weights({name: tensor.cpu() for name, tensor in models[1].state_dict().items()}, readback=False)
