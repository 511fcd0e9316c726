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

    options = {
        **OPTIONS,
        "tp_size": 2,
        # A cache of its own size, whatever share of the memory others take while this starts.
        "mem_fraction_static": 0.8,
        "max_total_tokens": 1 << 16,
        # For mixtures it compiles CUDA code at its first start, for minutes, and wants multicast over NVLink.
        "enforce_disable_flashinfer_allreduce_fusion": True,
    }
    return SGLangWorker(
        str(folder),
        device="cuda",
        max_model_len=POSITIONS,
        engine_options=options,
        environment={"SGLANG_ENABLE_TP_MEMORY_INBALANCE_CHECK": "0"},
        timeout=TIMEOUT,
    )
