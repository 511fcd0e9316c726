import os
from contextlib import nullcontext

import pytest
import torch

from rollout_core.workers import Completion, to_batch

from .conftest import ENGINE, check_run

#: In the session of each engine; the others under ROLLOUT_CORE_EXAMPLES=all.
WORKERS = {"hf": ("hf",), "vllm": ("vllm",), "sglang": ("sglang",)}
if os.environ.get("ROLLOUT_CORE_EXAMPLES") == "all":
    WORKERS = {"hf": ("hf",), "vllm": ("vllm", "vllm-async", "vllm by url"), "sglang": ("sglang", "sglang by url")}
CPU = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


def start_server(folder):
    """A server of the engine, on a CPU."""
    if ENGINE == "vllm":
        from rollout_core.workers.vllm.server import start_server

        words = ["--dtype=float32", "--enforce-eager", "--max-model-len=64", f"--kv-cache-memory-bytes={32 << 20}"]
        environment = {**CPU, "TORCHDYNAMO_DISABLE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    else:
        from rollout_core.workers.sglang.server import start_server

        words = ["--device=cpu", "--dtype=float32", "--attention-backend=torch_native", "--sampling-backend=pytorch"]
        words += ["--grammar-backend=none", "--disable-cuda-graph", "--disable-overlap-schedule", "--max-total-tokens=16384"]
        words += ["--max-running-requests=64", "--context-length=64", "--incremental-streaming-output"]
        environment = {**CPU, "SGLANG_USE_CPU_ENGINE": "1"}
    return start_server(str(folder), words, environment=environment)


@pytest.mark.parametrize("worker", WORKERS[ENGINE])
def test_w5_the_reward_rises_with_every_worker(run, policy_gradient, tmp_path, worker):
    name, _, url = worker.partition(" by ")
    policy_gradient.make_model(str(tmp_path))
    with start_server(tmp_path) if url else nullcontext() as server:
        where = ("--url", server.url, "--model", tmp_path) if url else ()
        check_run(run("policy_gradient.py", "--worker", name, "--steps", 24, *where), 24, 0.2)
        assert server is None or server.alive


@pytest.mark.parametrize(("versions", "refused"), [((3, 3), False), ((2, 3), True), ((2, 2), True)])
def test_w5_a_sample_of_older_weights_is_not_trained_on(policy_gradient, versions, refused):
    completions = [
        Completion(
            token_ids=(5, 6),
            logprobs=(-1.0, -1.0),
            status="length",
            weight_version=of[-1],
            token_versions=of,
            prompt_index=0,
            sample_index=number,
        )
        for number, of in enumerate([(3, 3), versions])
    ]
    batch = to_batch([[1]], completions, response_length=4, pad_token_id=0)
    with pytest.raises(SystemExit, match="versions") if refused else nullcontext():
        policy_gradient.check_versions(batch, 3)


def test_the_reward_counts_even_ids_of_the_response_and_no_padding(policy_gradient):
    row = {"logprobs": None, "status": "length", "weight_version": 0, "prompt_index": 0}
    completions = [Completion(token_ids=ids, sample_index=number, **row) for number, ids in enumerate([(4, 6, 9), (8,), (3, 5)])]
    batch = to_batch([[2, 2]], completions, response_length=4, pad_token_id=0)
    assert torch.equal(policy_gradient.even_share(batch), torch.tensor([0.5, 0.25, 0.0]))
