"""SGLangWorker: a rollout worker on SGLang, in a process of its own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Final, Self

from rollout_core.errors import WorkerError
from rollout_core.workers.carriers import CarrierChoice, is_cuda
from rollout_core.workers.http.server import ServerProcess
from rollout_core.workers.http.worker import ServerWorker
from rollout_core.workers.link.hosts import Spec
from rollout_core.workers.media import Form
from rollout_core.workers.model_dir import config_of
from rollout_core.workers.sglang.features import capabilities_of, context_for
from rollout_core.workers.worker import Worker

#: What SGLang is started with, unless the caller's own environment says otherwise.
_ENVIRONMENT: Final = {"SGLANG_RETURN_ORIGINAL_LOGPROB": "1"}  # of the logits themselves, before temperature, as every worker
_CPU_ENVIRONMENT: Final = {"SGLANG_USE_CPU_ENGINE": "1", "TORCHDYNAMO_DISABLE": "1"}
_CPU_OPTIONS: Final = {
    "device": "cpu",
    "attention_backend": "torch_native",
    "sampling_backend": "pytorch",
    "grammar_backend": "none",
    "disable_cuda_graph": True,
    "disable_overlap_schedule": True,
    "max_total_tokens": 16_384,  # of the cache; SGLang itself takes most of the memory
    "max_running_requests": 64,
    "sleep_on_idle": True,  # or its scheduler takes a whole core while there is nothing to do
}
_CUDA_OPTIONS: Final = {
    "device": "cuda",
    "enable_memory_saver": True,  # or it keeps its memory
    "sleep_on_idle": True,
}


class SGLangWorker(Worker):
    """SGLang's ``Engine``, which has processes of its own, in a process of its own.

    ``model_dir`` is a folder as ``save_pretrained`` writes it. ``device``: "cpu", "cuda" or "cuda:1"; ``carrier``: see ``Worker``.
    ``dtype``: a torch dtype's name; by default float32 on a CPU, and bfloat16 on a GPU, where SGLang's kernels take no float32.
    ``max_model_len``: most tokens of a prompt and its response; None: a few less than the model's positions. ``engine_options`` go
    to ``Engine`` as they are, before any of ours: on a GPU, ``mem_fraction_static`` is the part of its memory that SGLang takes.
    ``environment`` is that of the process, beside this one's. ``timeout`` bounds each answer in seconds, ``start_timeout`` the
    start. The weights are received into the live model: an update that fails after its first bucket leaves weights that the worker
    refuses to use.

    A seed is refused unless SGLang runs with ``enable_deterministic_inference``, which needs a GPU. Memory is released with
    ``enable_memory_saver``, which is on unless it is turned off.
    """

    takes_computed = False
    media_form: Form = "pictures_each_time"
    #: What runs in its process, as ``module:class``.
    engine_class: ClassVar[str] = "rollout_core.workers.sglang.engine:SGLangEngine"

    def __init__(
        self,
        model_dir: str,
        *,
        dtype: str | None = None,
        device: str = "cpu",
        carrier: CarrierChoice = "auto",
        max_model_len: int | None = None,
        engine_options: Mapping[str, Any] | None = None,
        environment: Mapping[str, str] | None = None,
        start_timeout: float = 300.0,
        timeout: float = 300.0,
    ) -> None:
        given, chosen = dict(engine_options or {}), _options_on(device)
        if given.get("device", chosen["device"]) != chosen["device"]:
            raise WorkerError(f"engine_options has device={given['device']!r}, and device is {device!r}: pass device= alone")
        options = {"dtype": dtype or _dtype_on(device), **chosen, **given}
        self.capabilities = capabilities_of(
            str(options["device"]),
            frees=bool(options.get("enable_memory_saver")),
            repeats=bool(options.get("enable_deterministic_inference")),
        )
        spec = Spec(
            self.engine_class,
            {"model": str(model_dir), "options": options, "timeout": timeout, "positions": max_model_len},
            {**_environment_on(device), **(environment or {})},
            has_children=True,
        )
        super().__init__(spec, device=device, carrier=carrier, start_timeout=start_timeout, timeout=timeout)


class SGLangServerWorker(ServerWorker):
    """An SGLang server by HTTP, on this machine: weights go through shared memory, or by CUDA IPC; ``carrier``: see ``Worker``.

    ``url``: of the server, which was started by ``rollout_core.workers.sglang.server.start_server``, or with what that gives it.
    ``model_dir``: the folder of its model, if that is not where the server says. ``max_model_len``: most tokens of a prompt and its
    response, if fewer than the server has room for. ``timeout`` bounds each answer in seconds, and how long a stream may be silent;
    ``connections``: requests that are under way at once, others wait. ``close`` ends what this worker has under way, and leaves the
    server as it is, with the weights that it has, unless it is the worker's own (``start``).
    """

    media_form: Form = "pictures_each_time"

    def __init__(
        self,
        url: str,
        *,
        model_dir: str | None = None,
        carrier: CarrierChoice = "auto",
        max_model_len: int | None = None,
        timeout: float = 300.0,
        connections: int = 256,
        server: ServerProcess | None = None,
    ) -> None:
        model = None if model_dir is None else str(model_dir)
        given = {"url": url, "model": model, "connections": connections, "positions": max_model_len}
        place = "rollout_core.workers.sglang.server:SGLangServerEngine"
        super().__init__(place, given, carrier=carrier, timeout=timeout, server=server)
        self.capabilities = frozenset(self.call("capabilities").decode().split())

    @classmethod
    def start(
        cls,
        model_dir: str,
        *,
        dtype: str | None = None,
        device: str = "cpu",
        carrier: CarrierChoice = "auto",
        max_model_len: int | None = None,
        server_options: Sequence[str] = (),
        environment: Mapping[str, str] | None = None,
        start_timeout: float = 300.0,
        timeout: float = 300.0,
    ) -> Self:
        """With a server of its own, for the model in a folder; see ``SGLangWorker`` for what the arguments are. ``server_options``
        are words of SGLang's command line."""
        from rollout_core.workers.sglang.server import start_server

        chosen = _options_on(device)
        own = {**_environment_on(device), **(environment or {})}
        if max_model_len is not None:
            chosen["context_length"] = context_for(max_model_len, config_of(Path(model_dir)), own)
        options = [f"--dtype={dtype or _dtype_on(device)}", "--incremental-streaming-output", "--log-level=warning"]
        for name, value in chosen.items():
            options.append(f"--{name.replace('_', '-')}" + ("" if value is True else f"={value}"))
        server = start_server(model_dir, [*options, *server_options], environment=own, start_timeout=start_timeout)
        return cls(server.url, carrier=carrier, max_model_len=max_model_len, timeout=timeout, server=server)


def _options_on(device: str) -> dict[str, Any]:
    """Of SGLang, unless the caller says otherwise, but for the dtype."""
    if not is_cuda(device):
        return dict(_CPU_OPTIONS) if device == "cpu" else {"device": device}
    number = device.partition(":")[2]
    return {**_CUDA_OPTIONS, **({"base_gpu_id": int(number)} if number else {})}


def _environment_on(device: str) -> dict[str, str]:
    return {**_ENVIRONMENT, **(_CPU_ENVIRONMENT if device == "cpu" else {})}


def _dtype_on(device: str) -> str:
    return "bfloat16" if is_cuda(device) else "float32"
