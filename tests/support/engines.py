"""Workers and servers of every engine as the tests start them: on the CPU, or with ROLLOUT_CORE_DEVICE=cuda on a GPU.

Both compute in float32, and without TF32 (vLLM's workers see to that themselves), so that greedy tokens are the reference's, one by
one. SGLang's kernels for a GPU take no float32: what is tested of it there is in tests/gpu/sglang.
"""

import copy
import os
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
import transformers

from rollout_core.workers import HFWorker, SGLangServerWorker, SGLangWorker, VLLMServerWorker, VLLMWorker

ENGINE = os.environ.get("ROLLOUT_CORE_ENGINE", "hf")
DEVICE = os.environ.get("ROLLOUT_CORE_DEVICE", "cpu")
POSITIONS = 256
TIMEOUT = 60
CPU = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
VLLM_CPU = {**CPU, "TORCHDYNAMO_DISABLE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_LOGGING_LEVEL": "WARNING"}
#: FlashInfer's sampler would be compiled first, and has no float32.
VLLM_CUDA = {**CPU, "VLLM_USE_FLASHINFER_SAMPLER": "0", "VLLM_LOGGING_LEVEL": "WARNING", "TRITON_F32_DEFAULT": "ieee"}
VLLM_ENVIRONMENT = {"cpu": VLLM_CPU, "cuda": VLLM_CUDA}[DEVICE]
VLLM_CACHE = {"cpu": 32 << 20, "cuda": 256 << 20}[DEVICE]
#: What has to be free on a GPU at the start: others may be at work on it.
VLLM_SHARE = {"cpu": {}, "cuda": {"gpu_memory_utilization": 0.05}}[DEVICE]
VLLM_SERVER = [
    *("--dtype=float32", "--enforce-eager", f"--max-model-len={POSITIONS}", f"--kv-cache-memory-bytes={VLLM_CACHE}"),
    *(f"--{name.replace('_', '-')}={value}" for name, value in VLLM_SHARE.items()),
    *(["--enable-sleep-mode"] if DEVICE == "cuda" else []),
]
SGLANG_SERVER = [
    *("--device=cpu", "--dtype=float32", "--attention-backend=torch_native", "--sampling-backend=pytorch"),
    *("--grammar-backend=none", "--disable-cuda-graph", "--disable-overlap-schedule", "--max-total-tokens=16384"),
    *(
        "--max-running-requests=64",
        f"--context-length={POSITIONS + 6}",  # which it keeps to itself
        "--incremental-streaming-output",
        "--log-level=warning",
        "--sleep-on-idle",
    ),
]


def started(pids):
    """These processes and when they were started, by which they are told from others that have got their numbers since."""
    found = set()
    for pid in pids:
        with suppress(OSError):
            found.add((pid, Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]))
    return found


@contextmanager
def running_server(kind, folder, options=()):
    """A server of an engine; nothing of it is left after."""
    if kind == "vllm":
        from rollout_core.workers.vllm.server import start_server

        server = start_server(str(folder), [*VLLM_SERVER, *options], environment=VLLM_ENVIRONMENT, start_timeout=180)
    else:
        from rollout_core.workers.sglang.server import start_server

        environment = {**CPU, "SGLANG_USE_CPU_ENGINE": "1", "SGLANG_ALLOW_OVERWRITE_LONGER_CONTEXT_LEN": "1"}
        server = start_server(str(folder), [*SGLANG_SERVER, *options], environment=environment, start_timeout=180)
    with server:
        processes = started(server.processes)
        yield server
    assert not processes & started(pid for pid, _ in processes)


@contextmanager
def running_worker(kind, folder):
    folder = str(folder)
    if kind == "hf":
        making = HFWorker(folder, threads=1, device=DEVICE, timeout=TIMEOUT)
    elif kind == "sglang":
        making = SGLangWorker(folder, max_model_len=POSITIONS, timeout=TIMEOUT)
    elif kind in ("vllm", "vllm_async"):
        making = VLLMWorker(
            folder,
            device=DEVICE,
            mode="stepped" if kind == "vllm" else "async",
            max_model_len=POSITIONS,
            engine_options={"kv_cache_memory_bytes": VLLM_CACHE, "enforce_eager": True, **VLLM_SHARE},
            environment=VLLM_ENVIRONMENT if DEVICE == "cuda" else None,
            timeout=TIMEOUT,
        )
    else:
        assert kind in ("vllm_server", "sglang_server"), kind
        with running_server(kind.partition("_")[0], folder) as server:
            class_ = VLLMServerWorker if kind == "vllm_server" else SGLangServerWorker
            with class_(server.url, timeout=TIMEOUT / 2) as worker:
                yield worker
        return
    with making as worker:
        yield worker


def make_model(*, tied):
    config = transformers.Qwen2Config(
        vocab_size=512,
        hidden_size=128,  # 4 heads of 32: vLLM's CPU attention takes no smaller ones
        intermediate_size=200,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=POSITIONS,
        tie_word_embeddings=tied,
        initializer_range=0.3,
        bos_token_id=None,
        eos_token_id=[2, 7],
        pad_token_id=0,
    )
    return transformers.Qwen2ForCausalLM(config).float().eval()


def changed(model, seed):
    """The model with other weights, biases included, which transformers begins with zeros; where the engines are."""
    other, generator = copy.deepcopy(model), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tensor in other.parameters():
            tensor += 0.05 * torch.randn(tensor.shape, generator=generator)
    return other.to(DEVICE)
