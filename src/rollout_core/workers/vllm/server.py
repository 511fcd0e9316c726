"""The engine of a VLLMServerWorker: a vLLM server by HTTP, on this machine, with our extension in its workers."""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

from rollout_core.errors import WorkerError
from rollout_core.workers.commands import Layout, unusable_of
from rollout_core.workers.http.client import Client, RequestError, Timeouts
from rollout_core.workers.http.server import ServerProcess, start_module
from rollout_core.workers.streaming import Flight, Piece
from rollout_core.workers.versions import check_version
from rollout_core.workers.vllm.streamed import EXTENSION, VLLMStreamed, piece_of
from rollout_core.workers.vllm.versions import route_words

#: What belongs to a server's environment.
_ENVIRONMENT: Final = {"VLLM_SERVER_DEV_MODE": "1", "VLLM_NO_USAGE_STATS": "1"}
#: What a vLLM server writes for a logprob that is no number.
_NO_LOGPROB: Final = -9999.0
_ADVICE: Final = (
    f"start it with VLLM_SERVER_DEV_MODE=1, --enable-scale-out where it has that, --worker-extension-cls {EXTENSION} and "
    """--weight-transfer-config '{"backend": "rollout_core"}', on this machine"""
)


class VLLMServerEngine(VLLMStreamed):
    """``url``: of the server. ``model``: the folder of its model, if that is not where it says. ``timeout``: seconds that an answer
    may take, and for which a stream may be silent. ``connections``: most that are open at once."""

    def __init__(self, url: str, *, model: str | None, mend: bool, timeout: float, connections: int) -> None:
        timeouts = Timeouts(total=timeout, silence=timeout)
        self._streams = Client(url, timeout=timeouts, connections=connections)
        self._client = Client(url, timeout=timeouts)  # for what ends requests, and must not wait until some have ended
        loop = asyncio.new_event_loop()
        try:
            check_version("vLLM", str(loop.run_until_complete(self._client.get("/version"))["version"]))
            listed = loop.run_until_complete(self._client.get("/v1/models"))["data"][0]
            folder = Path(model or listed["root"])
            if not (folder / "config.json").is_file():
                raise WorkerError(f"{url} serves the model in {folder}, which is not on this machine: pass model_dir")
            positions = int(listed["max_model_len"])
            super().__init__(folder, loop=loop, positions=positions, mend=mend, timeout=timeout, at_once=connections)
            # Whether the extension is there, and whether somebody has left the weights half done.
            self._unusable = unusable_of(self._run(self._ask(Layout({}))))
        except BaseException:
            loop.run_until_complete(self._close_clients())
            loop.close()
            raise

    async def _generate(self, flight: Flight, params: dict[str, Any]) -> AsyncGenerator[Piece, None]:
        request = {"request_id": flight.name, "token_ids": flight.prompt, "sampling_params": params, "stream": True}
        reason = None
        try:
            async with aclosing(self._streams.stream("/inference/v1/generate", request)) as events:
                async for event in events:
                    for choice in event["choices"]:
                        rows = (choice.get("logprobs") or {}).get("content") or ()
                        logprobs, reason = [_logprob(row["logprob"]) for row in rows], choice.get("finish_reason")
                        yield piece_of(choice.get("token_ids") or (), logprobs, reason)
            if reason is None and flight.is_called_back:  # an older vLLM's way to end one that was aborted: see ``versions``
                yield piece_of((), (), "abort")
        except RequestError as error:
            if "Out of range float values" in str(error):  # what vLLM says of a NaN that it cannot write
                raise WorkerError("the model gave NaN logits: check the weights it was last given") from error
            raise

    async def _end(self, names: Sequence[str]) -> None:
        # The server puts a word of its own before a request's name.
        await self._client.post("/abort_requests", {"request_ids": [*names, *(f"generate-tokens-{name}" for name in names)]})

    async def _ping(self) -> None:
        await self._client.get("/health")

    async def _official(self, call: str, seconds: float = 0.0, **arguments: Any) -> None:
        timeout = self._client.timeout
        longer = replace(timeout, total=max(seconds, timeout.total or 0.0), silence=max(seconds, timeout.silence or 0.0))
        await self._client.post(f"/{call}", arguments or None, timeout=longer)

    async def _rpc(self, method: str, *arguments: str) -> list[Any]:
        try:
            found = await self._client.post("/collective_rpc", {"method": method, "args": list(arguments)})
        except RequestError as error:
            raise WorkerError(f"the server cannot be asked for its weights: {_ADVICE} ({error})") from error
        return list(found["results"])

    async def _sleep(self, sleep: bool) -> None:
        await self._client.post("/sleep?level=2" if sleep else "/wake_up")

    async def _reset(self) -> bool:
        await self._client.post("/reset_encoder_cache")
        found = await self._client.post("/reset_prefix_cache?reset_running_requests=true")
        return bool(found["success"])

    def close(self) -> None:
        super().close()
        self._run(self._close_clients())
        self._loop.close()

    async def _close_clients(self) -> None:
        await self._streams.close()
        await self._client.close()


def _logprob(said: float | None) -> float:
    """NaN for what the server writes in its place, so that JSON can say it: no sampled token has such a logprob otherwise."""
    return math.nan if said is None or said <= _NO_LOGPROB else float(said)


def start_server(
    model_dir: str,
    options: Sequence[str] = (),
    *,
    environment: Mapping[str, str] | None = None,
    port: int | None = None,
    log: str | None = None,
    start_timeout: float = 300.0,
) -> ServerProcess:
    """A vLLM server for a ``VLLMServerWorker`` on the loopback interface of this machine, which ends with this process.

    ``options`` are words of its command line, beside those that it needs to be one; ``workers.arguments.command_line`` makes them
    of a configuration. ``environment`` goes beside what this process has. Raises ``WorkerError`` with the end of its log if it does
    not come up.
    """
    return start_module(
        "vllm.entrypoints.openai.api_server",
        [
            *("--model", str(model_dir), "--worker-extension-cls", EXTENSION),
            *("--weight-transfer-config", '{"backend": "rollout_core"}', "--generation-config", "vllm"),
            *("--skip-tokenizer-init", *route_words(), *options),
        ],
        environment={**_ENVIRONMENT, **(environment or {})},
        port=port,
        log=log,
        start_timeout=start_timeout,
    )
