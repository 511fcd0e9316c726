"""The engine of ROLLOUT_CORE_ENGINE on two GPUs."""

from __future__ import annotations

from support.engines import ENGINE


def start(folder):
    if ENGINE == "vllm":
        from gpu.vllm.setting import start

        return start(folder, tensor_parallel_size=2)
    from gpu.sglang.setting import OPTIONS, TIMEOUT
    from gpu.small import POSITIONS
    from rollout_core.workers import SGLangWorker

    options = {**OPTIONS, "tp_size": 2}
    return SGLangWorker(str(folder), device="cuda", max_model_len=POSITIONS, engine_options=options, timeout=TIMEOUT)
