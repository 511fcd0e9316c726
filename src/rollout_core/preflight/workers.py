"""The workers that preflight can check, by the names that its command line has for them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Final, Literal

if TYPE_CHECKING:
    from rollout_core.workers.http.worker import ServerWorker
    from rollout_core.workers.worker import Worker

_ENGINE: Final = {"heads": 4, "head_dim": 32}
#: The shape of a small model's attention that a worker's kernels take.
KINDS: Final[Mapping[str, Mapping[str, int]]] = {
    "hf": {"heads": 6, "head_dim": 20},
    **dict.fromkeys(("vllm", "vllm-async", "vllm-server", "sglang", "sglang-server"), _ENGINE),
}
#: GiB of vLLM's cache. It has room for the four pictures of a conversation, 1.0 MB as float32, and not for 16 others, 1.2 MB as
#: bytes: what vLLM 0.32 keeps of them where it normalizes pixels by itself.
_FEW: Final = {"mm_processor_cache_gb": 0.001}
#: Those that a server's address can be given for.
SERVERS: Final = ("vllm", "sglang")


def make_worker(kind: str, folder: Path, *, threads: int, keeps_few: bool = False) -> Worker:
    """Start a worker of one of ``KINDS`` on the model in a folder, with so many threads for the model. ``keeps_few``: with room for
    the small model's pictures, and for a few others, in vLLM's cache of what its processor made: it drops some then."""
    environment = {"OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1"}
    if kind == "hf":
        from rollout_core.workers.hf.worker import HFWorker

        return HFWorker(str(folder), threads=threads)
    if kind in ("vllm", "vllm-async"):
        from rollout_core.workers.vllm.worker import VLLMWorker

        mode: Literal["stepped", "async"] = "stepped" if kind == "vllm" else "async"
        return VLLMWorker(str(folder), mode=mode, engine_options=_FEW if keeps_few else None, environment=environment)
    if kind == "vllm-server":
        from rollout_core.workers.vllm.worker import VLLMServerWorker

        return VLLMServerWorker.start(str(folder), environment=environment)
    if kind == "sglang":
        from rollout_core.workers.sglang.worker import SGLangWorker

        return SGLangWorker(str(folder), environment=environment)
    from rollout_core.workers.sglang.worker import SGLangServerWorker

    return SGLangServerWorker.start(str(folder), environment=environment)


def connect(kind: str, url: str, folder: Path | None) -> ServerWorker:
    """A worker on somebody's server of one of ``SERVERS``, and of the model in a folder if that is not where the server says."""
    model_dir = None if folder is None else str(folder)
    if kind == "vllm":
        from rollout_core.workers.vllm.worker import VLLMServerWorker

        return VLLMServerWorker(url, model_dir=model_dir)
    from rollout_core.workers.sglang.worker import SGLangServerWorker

    return SGLangServerWorker(url, model_dir=model_dir)
