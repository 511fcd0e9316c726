"""The engine of a VLLMWorker with ``mode="async"``: vLLM's ``AsyncLLM``, whose core has a process of its own."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Iterator, Mapping, Sequence
from contextlib import aclosing, contextmanager
from pathlib import Path
from typing import Any, Final

import msgspec

from rollout_core.errors import RolloutCoreError, TransferError, WorkerError
from rollout_core.workers.contract import SamplingParams
from rollout_core.workers.engine import Request
from rollout_core.workers.model_dir import config_of
from rollout_core.workers.streaming import Flight, MissingMedia, Piece
from rollout_core.workers.vllm.engine import check_can_sleep
from rollout_core.workers.vllm.media import check_expanded, hits_of, missing_in, prompt_of, reading_options
from rollout_core.workers.vllm.streamed import VLLMStreamed, options_of, piece_of
from rollout_core.workers.vllm.versions import check_installed, taken_by

_ENDED: Final = "vLLM's engine core has ended"


class VLLMAsyncEngine(VLLMStreamed):
    """``model`` is a folder, ``options`` go to ``AsyncEngineArgs`` as they are."""

    def __init__(self, model: str, *, options: Mapping[str, Any], mend: bool = True, timeout: float = 300.0) -> None:
        from vllm import AsyncEngineArgs
        from vllm.config import WeightTransferConfig
        from vllm.v1.engine.async_llm import AsyncLLM

        check_installed()
        config = config_of(Path(model))  # if there is none, vLLM would take it for the name of a model to download
        transfer = WeightTransferConfig(backend="rollout_core")
        given = options_of(model, {**reading_options(config), "weight_transfer_config": transfer, **options})
        loop = asyncio.new_event_loop()
        asyncio.set_event_loop(loop)

        async def start() -> Any:
            return AsyncLLM.from_engine_args(AsyncEngineArgs(**given))

        try:
            self._llm: Any = loop.run_until_complete(start())
        except Exception as error:  # of many kinds; what the operator needs is the folder and the cause
            raise WorkerError(f"vLLM did not start with the model in {model}: {type(error).__name__}: {error}") from error
        self._model_config = self._llm.vllm_config.model_config
        super().__init__(Path(model), loop=loop, positions=int(self._model_config.max_model_len), mend=mend, timeout=timeout)

    def _check(self, request: Request, params: SamplingParams) -> None:
        if request.media and not self._model_config.is_multimodal_model:
            raise WorkerError(f"prompt {request.place} shows {len(request.media)} pictures, and the model takes none")
        super()._check(request, params)

    async def _generate(self, flight: Flight, params: dict[str, Any]) -> AsyncGenerator[Piece, None]:
        from vllm import SamplingParams as Their
        from vllm.sampling_params import RequestOutputKind
        from vllm.v1.engine.exceptions import EngineDeadError

        theirs = Their(**params, output_kind=RequestOutputKind.DELTA)
        request = msgspec.structs.replace(flight.request, prompt=flight.prompt)
        self._check_media(flight)
        before, is_first = list(flight.tokens), True
        try:
            async with aclosing(self._llm.generate(prompt_of(request, flight.given), theirs, request_id=flight.name)) as outputs:
                async for whole in outputs:
                    if is_first:
                        check_expanded(request, whole.prompt_token_ids, before)
                        is_first = False
                    output = whole.outputs[0]
                    rows = zip(output.token_ids, output.logprobs or (), strict=True)
                    yield piece_of(output.token_ids, [float(table[token].logprob) for token, table in rows], output.finish_reason)
        except RolloutCoreError:
            raise
        except Exception as error:
            if isinstance(error, EngineDeadError) or self._llm.errored:
                raise TransferError(_ENDED) from error
            if is_first:  # others may have driven its pictures out of the cache between two looks at it
                self._check_media(flight)
            raise

    def _check_media(self, flight: Flight) -> None:
        """Raise ``MissingMedia`` for pictures that came without data and that vLLM does not have."""
        missing = missing_in(flight.request, flight.given, self._llm.renderer.mm_processor_cache) if flight.request.media else []
        if missing:
            raise MissingMedia(missing)

    def media_hits(self) -> tuple[int, int] | tuple[None, None]:
        """Of vLLM's cache of what its processor made: pictures that were in it, and that were looked for."""
        return hits_of(self._llm.renderer.mm_processor_cache)

    async def _end(self, names: Sequence[str]) -> None:
        await self._llm.abort(list(names))

    async def _ping(self) -> None:
        if self._llm.errored:
            raise TransferError(_ENDED)

    async def _official(self, call: str, seconds: float = 0.0, **arguments: Any) -> None:
        del seconds  # the link's own timeout ends a process that does not answer
        from vllm.distributed.weight_transfer.base import WeightTransferInitRequest, WeightTransferUpdateRequest

        kinds: dict[str, Any] = {
            "init_weight_transfer_engine": WeightTransferInitRequest,
            "update_weights": WeightTransferUpdateRequest,
        }
        method = getattr(self._llm, call)
        with _ended_core():
            if call in kinds:
                await method(kinds[call](**arguments))
            else:
                await method(**taken_by(method, arguments))

    async def _rpc(self, method: str, *arguments: str) -> list[Any]:
        with _ended_core():
            return list(await self._llm.collective_rpc(method, args=arguments))

    async def _sleep(self, sleep: bool) -> None:
        if sleep:
            check_can_sleep(self._llm.vllm_config.model_config, self._llm.vllm_config.device_config)
            await self._llm.sleep(level=2)
        else:
            await self._llm.wake_up()

    async def _reset(self) -> bool:
        await self._llm.reset_encoder_cache()
        return bool(await self._llm.reset_prefix_cache(reset_running_requests=True))

    def close(self) -> None:
        super().close()
        self._llm.shutdown(timeout=1)


@contextmanager
def _ended_core() -> Iterator[None]:
    """In our words, that vLLM's core has ended: by itself, or with one of its ranks."""
    from vllm.v1.engine.exceptions import EngineDeadError

    try:
        yield
    except EngineDeadError as error:
        raise TransferError(_ENDED) from error
