"""Engines on two ranks, with faults in one of them."""

from __future__ import annotations

import os
from contextlib import contextmanager
from pathlib import Path

from rollout_core.workers import SGLangServerWorker, VLLMServerWorker, VLLMWorker
from support.engines import DEVICE, ENGINE, POSITIONS, VLLM_CACHE, VLLM_ENVIRONMENT, VLLM_SHARE, running_server
from support.rank_faults import FILE

TIMEOUT = 30


@contextmanager
def worker_of(kind, folder, faults):
    environment = {FILE: str(faults), "PYTHONPATH": str(Path(__file__).parents[1])}
    server = {"vllm_server_tp2": VLLMServerWorker, "sglang_server_tp2": SGLangServerWorker}.get(kind)
    if server is not None:
        words = ["--tensor-parallel-size=2"]
        os.environ |= {"SGLANG_CPU_OMP_THREADS_BIND": "0|1", "TORCHDYNAMO_DISABLE": "1"}
        with running_server(ENGINE, folder, words) as running, server(running.url, timeout=TIMEOUT) as worker:
            yield worker
        return
    if ENGINE == "sglang":
        from support.rank_faults_sglang import LOADER, FaultyWorker

        environment |= {"SGLANG_CPU_OMP_THREADS_BIND": "0|1"}  # the cores of each rank, which it wants to be told
        options = {"tp_size": 2, "custom_weight_loader": [LOADER]}
        making = FaultyWorker(
            str(folder), max_model_len=POSITIONS, engine_options=options, environment=environment, timeout=TIMEOUT
        )
    else:
        making = VLLMWorker(
            str(folder),
            device=DEVICE,
            mode="async" if kind == "vllm_async_tp2" else "stepped",
            max_model_len=POSITIONS,
            engine_options={
                "tensor_parallel_size": 2,
                "kv_cache_memory_bytes": VLLM_CACHE,
                **VLLM_SHARE,
                "enforce_eager": True,
                "worker_extension_cls": "support.rank_faults_vllm.FaultyExtension",
            },
            environment={**VLLM_ENVIRONMENT, **environment},
            timeout=TIMEOUT,
        )
    with making as worker:
        yield worker


def two_ranks(folder):
    """A worker of ROLLOUT_CORE_ENGINE on two ranks, with nothing wrong."""
    faults = Path(folder) / "no-fault"
    faults.write_text("")
    return worker_of(f"{ENGINE}_tp2", folder, faults)
