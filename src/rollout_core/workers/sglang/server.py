"""The engine of an SGLangServerWorker: an SGLang server by HTTP, on this machine, with our loader in its ranks."""

from __future__ import annotations

import asyncio
import base64
import io
import sys
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import aclosing
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from typing import Any, Final

import torch

from rollout_core.errors import WorkerError
from rollout_core.workers.http.client import Client, Timeouts
from rollout_core.workers.sglang.commands import LOADER, Named
from rollout_core.workers.sglang.engine import SGLangBase
from rollout_core.workers.versions import check_version

#: From here on an update stands between calls that begin and end it.
_SESSIONS: Final = (0, 5, 21)


class SGLangServerEngine(SGLangBase):
    """``url``: of the server. ``model``: the folder of its model, if that is not where it says."""

    def __init__(self, url: str, *, model: str | None, timeout: float, connections: int) -> None:
        loop = asyncio.new_event_loop()
        self._client = Client(url, timeout=Timeouts(total=timeout, silence=timeout), connections=connections)
        try:
            info = loop.run_until_complete(_server_info(self._client))
            version = str(info.get("version"))
            check_version("SGLang", version)
            if LOADER not in (info.get("custom_weight_loader") or ()):
                raise WorkerError(f"the server at {url} was started without --custom-weight-loader {LOADER}: start it with that")
            folder = Path(model or info["model_path"])
            if not (folder / "config.json").is_file():
                raise WorkerError(f"{url} serves the model in {folder}, which is not on this machine: pass model_dir")
            self._ranks = int(info.get("tp_size") or 1)
            self._has_sessions = tuple(int(part) for part in version.split(".")[:3] if part.isdigit()) >= _SESSIONS
            super().__init__(
                folder,
                loop=loop,
                positions=int(info.get("context_length") or _positions(info)),
                dtype=_dtype(info, folder),
                is_incremental=bool(info.get("incremental_streaming_output")),
                repeats=bool(info.get("enable_deterministic_inference")),
                timeout=timeout,
            )
        except BaseException:
            loop.run_until_complete(self._client.close())
            loop.close()
            raise

    async def _generate(self, request: dict[str, Any]) -> AsyncIterator[dict[str, Any]]:
        async with aclosing(self._client.stream("/generate", request)) as events:
            async for event in events:
                yield event

    async def _end(self, names: Sequence[str]) -> None:
        for name in names:
            await self._client.post("/abort_request", {"rid": name})

    async def ping(self) -> None:
        await self._client.get("/health")

    def _load(self, named: Named) -> str:
        # As SGLang's MultiprocessingSerializer writes it, without SGLang.
        written = io.BytesIO()
        ForkingPickler(written).dump(named)
        text = base64.b64encode(written.getvalue()).decode()
        body = {"serialized_named_tensors": [text] * self._ranks, "load_format": LOADER, "flush_cache": False}
        return str(self._run(self._client.post("/update_weights_from_tensor", body)))

    def _session(self, begin: bool) -> None:
        if self._has_sessions:
            self._run(self._client.post("/begin_weight_update" if begin else "/end_weight_update", {}))

    def _flush(self) -> bool:
        self._run(self._client.post("/flush_cache"))  # a refusal is no success, and raises
        return True

    def close(self) -> None:
        super().close()
        self._run(self._client.close())
        self._loop.close()


async def _server_info(client: Client) -> Mapping[str, Any]:
    found = await client.get("/get_server_info")
    if not isinstance(found, Mapping):
        raise WorkerError(f"{client.url} is no server of SGLang: its /get_server_info is {str(found)[:80]!r}")
    return found


def _positions(info: Mapping[str, Any]) -> int:
    for place in (info, *(state for state in info.get("internal_states") or () if isinstance(state, Mapping))):
        for name in ("max_req_input_len", "context_len", "max_total_num_tokens"):
            if place.get(name):
                return int(place[name])
    raise WorkerError("the server does not say how many positions it has: start it with --context-length")


def _dtype(info: Mapping[str, Any], folder: Path) -> torch.dtype:
    named = getattr(torch, str(info.get("dtype")), None)
    if isinstance(named, torch.dtype):
        return named
    raise WorkerError(f"the server's dtype is {info.get('dtype')!r}: start it with --dtype, for example --dtype float32 ({folder})")


def server_command(model: str, port: int, options: Sequence[str] = ()) -> list[str]:
    """The command line of a server that an ``SGLangServerWorker`` can be given."""
    return [
        *(sys.executable, "-m", "sglang.launch_server", "--model-path", model, "--host", "127.0.0.1", "--port", str(port)),
        *("--custom-weight-loader", LOADER, "--skip-tokenizer-init", "--skip-server-warmup", *options),
    ]


#: What belongs to its environment.
SERVER_ENVIRONMENT: Final[Mapping[str, str]] = {"SGLANG_RETURN_ORIGINAL_LOGPROB": "1"}
