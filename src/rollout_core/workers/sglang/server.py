"""The engine of an SGLangServerWorker: an SGLang server by HTTP, on this machine, with our loader in its ranks."""

from __future__ import annotations

import asyncio
import base64
import io
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from typing import Any, Final

from rollout_core.errors import WorkerError
from rollout_core.workers.commands import Settle, unusable_of
from rollout_core.workers.http.client import Client, RequestError, Timeouts
from rollout_core.workers.http.server import ServerProcess, start_module
from rollout_core.workers.model_dir import config_of
from rollout_core.workers.sglang.answers import ENDED
from rollout_core.workers.sglang.commands import LOADER, Named
from rollout_core.workers.sglang.engine import SGLangBase
from rollout_core.workers.sglang.features import Features, room_of

#: What belongs to a server's environment: logprobs of the logits themselves, before temperature.
_ENVIRONMENT: Final = {"SGLANG_RETURN_ORIGINAL_LOGPROB": "1"}
#: Seconds in which a server has sent a request with pictures on to its scheduler, or has heard of its first token.
_SENT_ON: Final = 2.0
#: Calls that are under way at once to end requests.
_AT_ONCE: Final = 32


class SGLangServerEngine(SGLangBase):
    """``url``: of the server. ``model``: the folder of its model, if that is not where it says. ``positions``: most tokens of a
    prompt and its response, as many as there is room for if None."""

    def __init__(self, url: str, *, model: str | None, timeout: float, connections: int, positions: int | None = None) -> None:
        timeouts = Timeouts(total=timeout, silence=timeout)
        self._streams = Client(url, timeout=timeouts, connections=connections)
        self._client = Client(url, timeout=timeouts)  # for what ends requests, and must not wait until some have ended
        loop = asyncio.new_event_loop()
        try:
            info = loop.run_until_complete(_server_info(self._client))
            features = Features.of(str(info.get("version")), is_incremental=bool(info.get("incremental_streaming_output")))
            if LOADER not in (info.get("custom_weight_loader") or ()):
                raise WorkerError(f"the server at {url} was started without --custom-weight-loader {LOADER}: start it with that")
            folder = Path(model or info["model_path"])
            if not (folder / "config.json").is_file():
                raise WorkerError(f"{url} serves the model in {folder}, which is not on this machine: pass model_dir")
            context = int(info.get("context_length") or config_of(folder).get("max_position_embeddings") or 2**31)
            room = room_of(info, context)
            super().__init__(
                folder,
                loop=loop,
                features=features,
                arguments=info,
                positions=room if positions is None else min(positions, room),
                timeout=timeout,
                at_once=connections,
            )
            self._payloads = int(info.get("tp_size") or 1)
            self._unsent: dict[str, float] = {}  # requests with pictures of which nothing was heard yet, and when each was sent
            # Whether the loader is really there, and whether somebody has left the weights half done.
            self._unusable = unusable_of(self._ask(Settle(mend=False)))
        except BaseException:
            loop.run_until_complete(self._close_clients())
            loop.close()
            raise

    async def _generate(self, request: dict[str, Any]) -> AsyncGenerator[Mapping[str, Any], None]:
        name = request["rid"]
        if "image_data" in request:
            urls = ["data:image/png;base64," + base64.b64encode(picture).decode() for picture in request["image_data"]]
            request = {**request, "image_data": urls}
            self._unsent[name] = self._loop.time()
        try:
            async with aclosing(self._streams.stream("/generate", request)) as events:
                async for event in events:
                    self._unsent.pop(name, None)
                    yield event
        except RequestError as error:
            if f"Request {name} was aborted" not in str(error):  # 0.5.17's word for one that it had not sent on
                raise
            yield ENDED
        finally:
            self._unsent.pop(name, None)

    async def _end(self, names: Sequence[str]) -> None:
        # Told of one whose pictures it still looks at, SGLang (0.5.20 and later) forgets it, and does not listen again.
        before = self._loop.time() - _SENT_ON
        told = [name for name in names if self._unsent.get(name, before) <= before]
        # Side by side: meanwhile the server goes on to sample for those that it was not told of.
        for start in range(0, len(told), _AT_ONCE):
            try:
                async with asyncio.TaskGroup() as group:
                    for name in told[start : start + _AT_ONCE]:
                        group.create_task(self._client.post("/abort_request", {"rid": name}))
            except ExceptionGroup as errors:
                raise errors.exceptions[0] from None

    async def _ping(self) -> None:
        await self._client.get("/health")

    def _load(self, named: Named, flush: bool) -> tuple[bool, str]:
        # As SGLang's MultiprocessingSerializer writes it, without SGLang.
        written = io.BytesIO()
        ForkingPickler(written).dump(named)
        text = base64.b64encode(written.getvalue()).decode()
        body = {"serialized_named_tensors": [text] * self._payloads, "load_format": LOADER, "flush_cache": flush}
        try:
            return True, str(self._run(self._client.post("/update_weights_from_tensor", body)))
        except RequestError as error:
            if error.status is None:
                raise
            return False, str(error)

    def _session(self, begin: bool) -> None:
        if self._features.has_sessions:
            self._run(self._client.post("/begin_weight_update" if begin else "/end_weight_update", {}))

    def _flush(self) -> bool:
        try:
            self._run(self._client.post("/flush_cache"))
        except RequestError as error:
            if error.status is None:
                raise
            return False
        return True

    def _occupy(self, memory: bool) -> None:
        self._run(self._client.post("/resume_memory_occupation" if memory else "/release_memory_occupation", {}))

    def close(self) -> None:
        super().close()
        self._run(self._close_clients())
        self._loop.close()

    async def _close_clients(self) -> None:
        await self._streams.close()
        await self._client.close()


async def _server_info(client: Client) -> Mapping[str, Any]:
    try:
        found = await client.get("/server_info")
    except RequestError:  # before it was called so
        found = await client.get("/get_server_info")
    if not isinstance(found, Mapping):
        raise WorkerError(f"{client.url} is no server of SGLang: its /get_server_info is {str(found)[:80]!r}")
    return found


def start_server(
    model_dir: str,
    options: Sequence[str] = (),
    *,
    environment: Mapping[str, str] | None = None,
    port: int | None = None,
    log: str | None = None,
    start_timeout: float = 300.0,
) -> ServerProcess:
    """An SGLang server for an ``SGLangServerWorker`` on the loopback interface of this machine, which ends with this process.

    ``options`` are words of its command line, beside those that it needs to be one; ``workers.arguments.command_line`` makes them
    of a configuration. ``environment`` goes beside what this process has. Raises ``WorkerError`` with the end of its log if it does
    not come up.
    """
    return start_module(
        "sglang.launch_server",
        [
            *("--model-path", str(model_dir), "--custom-weight-loader", LOADER),
            *("--skip-tokenizer-init", "--skip-server-warmup", *options),
        ],
        environment={**_ENVIRONMENT, **(environment or {})},
        port=port,
        log=log,
        start_timeout=start_timeout,
    )
