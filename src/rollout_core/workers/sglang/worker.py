"""SGLangWorker: a rollout worker on SGLang, in a process of its own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Final, Self

from rollout_core.workers.http.server import ServerProcess
from rollout_core.workers.http.worker import ServerWorker
from rollout_core.workers.link.hosts import Spec
from rollout_core.workers.media import Form
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


class SGLangWorker(Worker):
    """SGLang's ``Engine``, which has processes of its own, in a process of its own.

    ``model_dir`` is a folder as ``save_pretrained`` writes it; ``dtype`` a torch dtype's name. ``max_model_len``: most tokens of a
    prompt and its response, the model's positions if None. ``engine_options`` go to ``Engine`` as they are, before any of ours;
    ``environment`` is that of the process, beside this one's. ``timeout`` bounds each answer in seconds, ``start_timeout`` the
    start. The weights are received into the live model: an update that fails after its first bucket leaves weights that the worker
    refuses to use.

    A seed is refused unless SGLang runs with ``enable_deterministic_inference``, which needs a GPU.
    """

    takes_computed = False
    media_form: Form = "pictures_each_time"
    #: What runs in its process, as ``module:class``.
    engine_class: ClassVar[str] = "rollout_core.workers.sglang.engine:SGLangEngine"

    def __init__(
        self,
        model_dir: str,
        *,
        dtype: str = "float32",
        device: str = "cpu",
        max_model_len: int | None = None,
        engine_options: Mapping[str, Any] | None = None,
        environment: Mapping[str, str] | None = None,
        start_timeout: float = 300.0,
        timeout: float = 300.0,
    ) -> None:
        options: dict[str, Any] = {"dtype": dtype, **(_CPU_OPTIONS if device == "cpu" else {"device": device})}
        if max_model_len is not None:
            options["context_length"] = max_model_len
        options |= engine_options or {}
        repeats = bool(options.get("enable_deterministic_inference"))
        self.capabilities = frozenset({"memory", *(("seeds",) if repeats else ())})
        spec = Spec(
            self.engine_class,
            {"model": str(model_dir), "options": options, "timeout": timeout},
            {**_ENVIRONMENT, **(_CPU_ENVIRONMENT if device == "cpu" else {}), **(environment or {})},
            has_children=True,
        )
        super().__init__(spec, start_timeout=start_timeout, timeout=timeout)


class SGLangServerWorker(ServerWorker):
    """An SGLang server by HTTP, on this machine: weights go through shared memory.

    ``url``: of the server, which was started by ``rollout_core.workers.sglang.server.start_server``, or with what that gives it.
    ``model_dir``: the folder of its model, if that is not where the server says. ``timeout`` bounds each answer in seconds, and how
    long a stream may be silent; ``connections``: requests that are under way at once, others wait. ``close`` ends what this worker
    has under way, and leaves the server as it is, with the weights that it has, unless it is the worker's own (``start``).
    """

    capabilities = frozenset({"memory"})
    media_form: Form = "pictures_each_time"

    def __init__(
        self,
        url: str,
        *,
        model_dir: str | None = None,
        timeout: float = 300.0,
        connections: int = 256,
        server: ServerProcess | None = None,
    ) -> None:
        given = {"url": url, "model": None if model_dir is None else str(model_dir), "connections": connections}
        super().__init__("rollout_core.workers.sglang.server:SGLangServerEngine", given, timeout=timeout, server=server)

    @classmethod
    def start(
        cls,
        model_dir: str,
        *,
        dtype: str = "float32",
        device: str = "cpu",
        max_model_len: int | None = None,
        server_options: Sequence[str] = (),
        environment: Mapping[str, str] | None = None,
        start_timeout: float = 300.0,
        timeout: float = 300.0,
    ) -> Self:
        """With a server of its own, for the model in a folder; see ``SGLangWorker`` for what the arguments are. ``server_options``
        are words of SGLang's command line."""
        from rollout_core.workers.sglang.server import start_server

        chosen: dict[str, Any] = dict(_CPU_OPTIONS) if device == "cpu" else {"device": device}
        if max_model_len is not None:
            chosen["context_length"] = max_model_len
        options = [f"--dtype={dtype}", "--incremental-streaming-output", "--log-level=warning"]
        for name, value in chosen.items():
            options.append(f"--{name.replace('_', '-')}" + ("" if value is True else f"={value}"))
        own = {**_ENVIRONMENT, **(_CPU_ENVIRONMENT if device == "cpu" else {}), **(environment or {})}
        server = start_server(model_dir, [*options, *server_options], environment=own, start_timeout=start_timeout)
        return cls(server.url, timeout=timeout, server=server)
