"""vLLM on the GPU as these tests start it: in bfloat16, with CUDA graphs of decoding, and without torch.compile, which takes
minutes."""

from __future__ import annotations

from gpu.small import POSITIONS
from rollout_core.workers import VLLMWorker

TIMEOUT = 120
CACHE = 16 << 30
GRAPHS = {"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY", "cudagraph_capture_sizes": [1, 2, 4, 8, 16, 32, 64]}
#: The share is what has to be free at the start, and no more: the cache has its own size.
OPTIONS = {
    "kv_cache_memory_bytes": CACHE,
    "gpu_memory_utilization": 0.15,
    "enforce_eager": False,
    "compilation_config": GRAPHS,
    "max_num_seqs": 64,
}
#: FlashInfer's sampler would be compiled first.
ENVIRONMENT = {"VLLM_USE_FLASHINFER_SAMPLER": "0", "VLLM_LOGGING_LEVEL": "WARNING"}


def start(folder, **options):
    return VLLMWorker(
        str(folder),
        dtype="bfloat16",
        device="cuda",
        max_model_len=POSITIONS,
        engine_options={**OPTIONS, **options},
        environment=ENVIRONMENT,
        timeout=TIMEOUT,
    )
