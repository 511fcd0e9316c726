"""The kit on an SGLangWorker on a GPU, and seeds: an engine without CUDA graphs, whose arithmetic does not depend on the batch."""

from __future__ import annotations

import pytest

from gpu.sglang import wide_gaps
from gpu.sglang.setting import OPTIONS, TIMEOUT
from rollout_core.testing import check_worker, select_checks
from rollout_core.workers import SamplingParams, SGLangWorker

PROMPTS = [[5], [17, 3, 60], list(range(100, 137)), [9, 2, 2, 12, 7, 55]]
#: Those that end the engine's processes, or want one that has just started, are made on HFWorker, whose processes start at once.
ONLY = [
    check.id
    for check in select_checks("worker")
    if check.id not in ("worker/W2-start", "worker/T3-left-behind", "worker/W4-killed")
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wide")
    wide_gaps.make_small_model(folder)
    return folder


@pytest.fixture(scope="module")
def worker(folder):
    options = {**OPTIONS, "enable_deterministic_inference": True, "disable_cuda_graph": True}
    with SGLangWorker(str(folder), device="cuda", max_model_len=512, engine_options=options, timeout=TIMEOUT) as worker:
        yield worker


def test_the_kit_finds_nothing(worker, folder):
    class Here:
        """The worker that runs; the kit closes what it makes."""

        models = wide_gaps

        def __init__(self, folder):
            self.capabilities = worker.capabilities

        def __getattr__(self, name):
            return getattr(worker, name)

        def close(self):
            worker.resume()
            worker.abort()

    report = check_worker(Here, model=folder, only=ONLY, max_examples=3, timeout=60)
    print(f"\n{report}")
    assert report.ok, str(report)


def test_w3_a_seed_repeats_samples_in_any_company(worker):
    params = SamplingParams(response_length=24, n=3, temperature=30.0, seed=5)
    assert "seeds" in worker.capabilities
    completions = worker.generate(PROMPTS, params)
    assert worker.generate(PROMPTS, params) == completions
    assert len({one.token_ids for one in completions}) > len(PROMPTS)
    alone = worker.generate(PROMPTS[:1], params)
    assert [one.token_ids for one in alone] == [one.token_ids for one in completions[:3]]
