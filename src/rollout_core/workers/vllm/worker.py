"""VLLMWorker: a rollout worker on vLLM, in a process of its own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Final, Literal, Self

import msgspec

from rollout_core.errors import WorkerError
from rollout_core.workers.carriers import CarrierChoice, is_cuda
from rollout_core.workers.http.server import ServerProcess
from rollout_core.workers.http.worker import ServerWorker
from rollout_core.workers.link.hosts import Spec
from rollout_core.workers.media import Form
from rollout_core.workers.vllm.streamed import Traits
from rollout_core.workers.worker import Worker

#: What vLLM is started with, unless the caller's own environment says otherwise.
_ENVIRONMENT: Final = {
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "WARNING",
}
_CPU_CACHE: Final = 256 << 20  # bytes; vLLM itself takes half of the machine's memory
_CPU_ENVIRONMENT: Final = {"TORCHDYNAMO_DISABLE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
#: Its attention in float32 is a Triton kernel, which would multiply TF32.
_FLOAT32_ENVIRONMENT: Final = {"TRITON_F32_DEFAULT": "ieee"}


def _environment(device: str, dtype: str) -> dict[str, str]:
    more = _CPU_ENVIRONMENT if device == "cpu" else _FLOAT32_ENVIRONMENT if dtype == "float32" else {}
    return {**_ENVIRONMENT, **more}


def _options(device: str, dtype: str) -> dict[str, Any]:
    """What vLLM is started with unless the caller says otherwise."""
    if device == "cpu":
        return {"dtype": dtype, "enforce_eager": True}
    return {"dtype": dtype, "enable_sleep_mode": True}


class _VLLM(Worker):
    def _is_on(self, device: str, carrier: CarrierChoice) -> None:
        super()._is_on(device, carrier)
        self.reads_values = not is_cuda(device)  # a CPU's packed weights; see readback.py

    def _look(self) -> str:
        """What the engine is, once it runs; returns where it has its weights."""
        try:
            traits = msgspec.json.decode(self.call("traits"), type=Traits)
        except BaseException:
            self.close()
            raise
        self.is_quantized = bool(traits.quantization)  # also by the checkpoint's own config
        self.capabilities = frozenset({"seeds", *(["memory"] if traits.sleeps else [])})
        return traits.device


def _check_device(device: str) -> None:
    """Raise ``WorkerError`` for one GPU of several, which vLLM is not told by name."""
    number = device.partition(":")[2]
    if number:
        raise WorkerError(
            f"device is {device!r}, and vLLM takes the first GPUs that it sees: pass device='cuda', and "
            f"environment={{'CUDA_VISIBLE_DEVICES': '{number}'}}"
        )


class VLLMWorker(_VLLM):
    """vLLM in a process of its own: its ``LLM``, stepped there, or with ``mode="async"`` its ``AsyncLLM``, whose core samples by
    itself in another process.

    ``model_dir`` is a folder as ``save_pretrained`` writes it; ``dtype`` a torch dtype's name; ``device`` "cpu" or "cuda", and
    ``carrier``: see ``Worker``. ``max_model_len``: most tokens of a
    prompt and its response, the model's positions if None. ``engine_options`` go to ``LLM`` as they are, before any of ours;
    ``environment`` is that of the process, beside this one's.
    ``timeout`` bounds each answer in seconds, ``start_timeout`` the start. The weights are received into the live model: an update
    that fails after its first bucket leaves weights that the worker refuses to use. ``mend``: work around what is known to be
    wrong in vLLM; see ``rollout_core.workers.vllm.extension``.
    """

    takes_computed = False
    media_form: Form = "pictures"
    #: What runs in its process, as ``module:class``, by mode.
    engine_classes: ClassVar[Mapping[str, str]] = {
        "stepped": "rollout_core.workers.vllm.engine:VLLMEngine",
        "async": "rollout_core.workers.vllm.async_engine:VLLMAsyncEngine",
    }

    def __init__(
        self,
        model_dir: str,
        *,
        dtype: str = "float32",
        device: str = "cpu",
        carrier: CarrierChoice = "auto",
        mode: Literal["stepped", "async"] = "stepped",
        max_model_len: int | None = None,
        engine_options: Mapping[str, Any] | None = None,
        environment: Mapping[str, str] | None = None,
        mend: bool = True,
        start_timeout: float = 300.0,
        timeout: float = 300.0,
    ) -> None:
        _check_device(device)
        options = _options(device, dtype)
        if max_model_len is not None:
            options["max_model_len"] = max_model_len
        options |= engine_options or {}
        if device == "cpu" and not {"kv_cache_memory_bytes", "gpu_memory_utilization"} & options.keys():
            options["kv_cache_memory_bytes"] = _CPU_CACHE
        if mode not in self.engine_classes:
            raise WorkerError(f"mode is {mode!r}: pass {' or '.join(map(repr, self.engine_classes))}")
        given = {"model": str(model_dir), "options": options, "mend": mend}
        own = {
            **_environment(device, dtype),
            "VLLM_ENABLE_V1_MULTIPROCESSING": str(int(mode == "async")),  # or stepped where it is served
        }
        if mode == "async":
            given["timeout"] = timeout
        spec = Spec(self.engine_classes[mode], given, {**own, **(environment or {})}, has_children=True)
        super().__init__(spec, device=device, carrier=carrier, start_timeout=start_timeout, timeout=timeout)
        found = self._look()
        if is_cuda(found) != is_cuda(device):
            self.close()
            raise WorkerError(f"device is {device!r}, and this vLLM has its weights on {found!r}: pass device={_kind(found)!r}")


class VLLMServerWorker(_VLLM, ServerWorker):
    """A vLLM server by HTTP, on this machine: weights go through shared memory, or by CUDA IPC; ``carrier``: see ``Worker``.

    ``url``: of the server, which was started by ``rollout_core.workers.vllm.server.start_server``, or with what that gives it.
    ``model_dir``: the folder of its model, if that is not where the server says. ``timeout`` bounds each answer in seconds, and how
    long a stream may be silent; ``connections``: requests that are under way at once, others wait. ``close`` ends what this worker
    has under way, and leaves the server as it is, with the weights that it has, unless it is the worker's own (``start``).
    """

    def __init__(
        self,
        url: str,
        *,
        model_dir: str | None = None,
        carrier: CarrierChoice = "auto",
        mend: bool = True,
        timeout: float = 300.0,
        connections: int = 256,
        server: ServerProcess | None = None,
    ) -> None:
        given = {"url": url, "model": None if model_dir is None else str(model_dir), "mend": mend, "connections": connections}
        place = "rollout_core.workers.vllm.server:VLLMServerEngine"
        super().__init__(place, given, carrier=carrier, timeout=timeout, server=server)
        self._look()

    @classmethod
    def start(
        cls,
        model_dir: str,
        *,
        dtype: str = "float32",
        device: str = "cpu",
        carrier: CarrierChoice = "auto",
        max_model_len: int | None = None,
        server_options: Sequence[str] = (),
        environment: Mapping[str, str] | None = None,
        start_timeout: float = 300.0,
        timeout: float = 300.0,
    ) -> Self:
        """With a server of its own, for the model in a folder; see ``VLLMWorker`` for what the arguments are. ``server_options``
        are words of vLLM's command line."""
        from rollout_core.workers.vllm.server import start_server

        _check_device(device)
        options = [word for name, value in _options(device, dtype).items() for word in _words(name, value)]
        options += [] if max_model_len is None else [f"--max-model-len={max_model_len}"]
        if device == "cpu" and not any(word.startswith("--kv-cache-memory-bytes") for word in server_options):
            options.append(f"--kv-cache-memory-bytes={_CPU_CACHE}")
        own = {**_environment(device, dtype), **(environment or {})}
        server = start_server(model_dir, [*options, *server_options], environment=own, start_timeout=start_timeout)
        return cls(server.url, carrier=carrier, timeout=timeout, server=server)


def _kind(device: str) -> str:
    return device.partition(":")[0]


def _words(name: str, value: Any) -> list[str]:
    """Of a command line, for an option that is no flag or is set."""
    flag = f"--{name.replace('_', '-')}"
    return [flag] if value is True else [f"{flag}={value}"]
