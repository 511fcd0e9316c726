"""What SGLang is as an engine of ours, in process and as a server; and the engine of an SGLangWorker, over SGLang's ``Engine``.

Its own traps, each of which was seen: ``ignore_eos`` turns ``stop_token_ids`` off, too; an error of a request is told as an abort
with a status code; a request that it does not know yet cannot be aborted. What differs between its versions is in ``features``.
"""

from __future__ import annotations

import asyncio
import os
import tempfile
import time
from abc import abstractmethod
from collections.abc import AsyncGenerator, AsyncIterator, Mapping, Sequence
from contextlib import aclosing, contextmanager
from pathlib import Path
from typing import Any, Final

import torch

from rollout_core.bucketing import TensorSpec
from rollout_core.errors import WorkerError
from rollout_core.workers.commands import (
    Abandon,
    Answer,
    Receive,
    check_versions,
    left_by,
    not_completed,
    raise_failed,
    unusable_of,
)
from rollout_core.workers.contract import SamplingParams
from rollout_core.workers.engine import Request, Update
from rollout_core.workers.limits import Limits
from rollout_core.workers.model_dir import Checkpoint, config_of
from rollout_core.workers.parts import Parts
from rollout_core.workers.sglang.answers import ENDED, piece_of, tells_an_end
from rollout_core.workers.sglang.commands import LOADER, Asked, Named, Order, Where, packed, read_answers
from rollout_core.workers.sglang.features import Features, capabilities_of, context_for, room_of
from rollout_core.workers.sglang.media import check_placeholders, pictures_of, placeholder_of, wrong_length
from rollout_core.workers.sglang.memory import used_memory
from rollout_core.workers.shards import Shard
from rollout_core.workers.streaming import Flight, Piece, StreamingEngine

_NO_SEEDS: Final = "SGLang repeats samples only under enable_deterministic_inference, whose attention needs a GPU"
_LETS_GO: Final = 5.0  # seconds in which SGLang has let go of what has ended
_INTERVAL: Final = 16  # tokens that are told at once; a first one is told by itself
#: What is asked of the arguments that SGLang was started with.
ARGUMENTS: Final = ("device", "tp_size", "pp_size", "enable_memory_saver", "enable_deterministic_inference")


class SGLangBase(StreamingEngine):
    """``folder``: of the model. ``arguments``: what SGLang was started with. ``positions``: most tokens of a prompt and its
    response."""

    def __init__(
        self,
        folder: Path,
        *,
        loop: asyncio.AbstractEventLoop,
        features: Features,
        arguments: Mapping[str, Any],
        positions: int,
        timeout: float,
        at_once: int | None = None,
    ) -> None:
        self._repeats = bool(arguments.get("enable_deterministic_inference"))
        limits = Limits.of(folder, positions, no_seeds="" if self._repeats else _NO_SEEDS)
        super().__init__(loop=loop, limits=limits, timeout=timeout, at_once=at_once)
        self._features = features
        self._device = str(arguments.get("device") or "cuda")  # that its weights are on: cuda, cpu
        self._ranks = int(arguments.get("tp_size") or 1) * int(arguments.get("pp_size") or 1)
        self._frees = bool(arguments.get("enable_memory_saver"))
        self._folder = folder
        self._checkpoint = Checkpoint(folder)
        self._parts = Parts(self._ask, self._checkpoint.shapes, device=self._device, ranks=self._ranks)
        self._placeholder = placeholder_of(config_of(folder))

    # What differs between an Engine and a server

    @abstractmethod
    def _generate(self, request: dict[str, Any]) -> AsyncGenerator[Mapping[str, Any], None]:
        """The stream of one request, in SGLang's words."""

    @abstractmethod
    def _load(self, named: Named, flush: bool) -> tuple[bool, str]:
        """``update_weights_from_tensor`` through the loader, with its ``flush_cache``; returns whether it worked, and what SGLang
        says."""

    @abstractmethod
    def _flush(self) -> bool:
        """``flush_cache``: whether it was done, which it is not while there are requests."""

    @abstractmethod
    def _occupy(self, memory: bool) -> None:
        """``release_memory_occupation`` or ``resume_memory_occupation``."""

    @abstractmethod
    def _session(self, begin: bool) -> None:
        """``begin_weight_update`` or ``end_weight_update``, where there is such a thing."""

    # An engine

    def _check(self, request: Request, params: SamplingParams) -> None:
        if request.media and self._placeholder is None:
            raise WorkerError(f"prompt {request.place} shows {len(request.media)} pictures, and the model takes none")
        super()._check(request, params)

    async def _stream(self, flight: Flight) -> AsyncIterator[Piece]:
        cuts = set(flight.params.stop_token_ids) if flight.params.ignore_eos else set()
        request = {
            "input_ids": flight.prompt,
            "sampling_params": self._params(flight),
            "return_logprob": True,
            "stream": True,
            "rid": flight.name,
        }
        if flight.request.media:
            check_placeholders(flight.request, flight.prompt, self._placeholder)
            request["image_data"] = pictures_of(flight.request, flight.given)
        before = list(flight.tokens)
        wrong: WorkerError | None = None
        seen = 0  # where each answer has all tokens so far
        cut = False
        async with aclosing(self._generate(request)) as answers:
            async for answer in answers:
                piece = piece_of(answer, seen)
                seen += 0 if self._features.is_incremental else len(piece.token_ids)
                if cut or wrong is not None:
                    continue  # until SGLang has ended it
                if piece.token_ids:  # one that was ended before it began says nothing of its prompt
                    wrong = wrong_length(flight.request, before, answer["meta_info"]["prompt_tokens"])
                if wrong is not None:
                    await self._end([flight.name])
                    continue
                place = next((place for place, token in enumerate(piece.token_ids) if token in cuts), None)
                if place is None:
                    yield piece
                    continue
                cut = True
                yield Piece(piece.token_ids[: place + 1], piece.logprobs[: place + 1], "stop")
                if piece.finish is None:
                    await self._end([flight.name])
        if wrong is not None:
            raise wrong

    def _params(self, flight: Flight) -> dict[str, Any]:
        params = flight.params
        greedy = params.temperature == 0
        return {
            "max_new_tokens": flight.most,
            "temperature": params.temperature,
            "top_p": params.top_p if not greedy else 1.0,
            "top_k": params.top_k if params.top_k and not greedy else -1,
            "stop_token_ids": [] if params.ignore_eos else self._limits.ends(params),
            "ignore_eos": params.ignore_eos,
            "skip_special_tokens": False,
            **({} if flight.seed is None else {"sampling_seed": flight.seed}),
        }

    def _update(self, update: Update) -> float:
        return max(answer.loading for answer in self._ask(Receive(update)))

    def _abandon(self, version: int) -> None:
        self._ask(Abandon(version, not_completed(version)))

    def call_model_dir(self, argument: bytes) -> bytes:
        """Where the model is."""
        del argument
        return str(self._folder).encode()

    def call_device(self, argument: bytes) -> bytes:
        """Where its weights are: cuda, cpu."""
        del argument
        return self._device.encode()

    def call_capabilities(self, argument: bytes) -> bytes:
        """What ``Worker.capabilities`` are, in words with spaces between."""
        del argument
        return " ".join(capabilities_of(self._device, frees=self._frees, repeats=self._repeats)).encode()

    def specs(self) -> list[TensorSpec]:
        return self._checkpoint.specs_in(self)

    def digests(self, names: Sequence[str] | None) -> dict[str, str]:
        with self._on_the_ground():  # SGLang's loaders wait for what is in the air
            return self._parts.digests(names)

    def read_tensor(self, name: str) -> torch.Tensor:
        with self._on_the_ground():
            return self._parts.read_tensor(name)

    def shards(self) -> list[dict[str, Shard]]:
        with self._on_the_ground():
            return self._parts.shards()

    def rank_digests(self) -> list[dict[str, str]]:
        with self._on_the_ground():
            return self._parts.rank_digests()

    def _ask(self, what: Asked) -> list[Answer]:
        """Have each rank carry this out."""
        self._check_resumed()
        before, changes = self._unusable, isinstance(what, Receive | Abandon)
        if changes:
            self._unusable = self._unusable or "an update to them was not completed"  # unless the following says otherwise
        with tempfile.TemporaryDirectory(prefix="rollout-core-") as folder:
            with self._in_session():
                # What was computed with other weights is flushed, too: nothing is in the air that would need it.
                flush = changes and self._features.flushes_in_update
                worked, said = self._load(packed(Order(what, folder)), flush)
            answers = read_answers(Path(folder), self._ranks, said=said)
        if isinstance(what, Receive):
            version = what.update.version
            well = all(answer.failed is None and answer.version == version for answer in answers)
            self._unusable = unusable_of(answers) if well else left_by(answers, version, before)
        raise_failed(answers, "SGLang's loader")
        if isinstance(what, Receive):
            check_versions(answers, what.update.version)
        if changes and not (flush and worked) and not self._is_flushed():
            self._unusable = f"SGLang did not flush what it computed with others: {said}"
            raise WorkerError(self._unusable)
        return answers

    def _is_flushed(self) -> bool:
        """SGLang tells of a request's end a little before it lets go of it, and flushes nothing until then."""
        end = time.monotonic() + _LETS_GO
        while not self._flush():
            if time.monotonic() > end:
                return False
            time.sleep(0.005)
        return True

    def _release(self) -> int:
        on_gpu = self._device != "cpu"  # on a CPU it lets go of nothing
        if on_gpu and not self._frees:
            raise WorkerError("SGLang was started without enable_memory_saver (--enable-memory-saver), and keeps its memory")
        gpus = [answer.device for answer in self._ask(Where())] if on_gpu else []
        before = used_memory(gpus)
        # Asked for its memory while it has a request, its scheduler would end.
        if not self._is_flushed():
            raise WorkerError("SGLang has requests of others, and keeps its memory: wait for them, or end them")
        self._occupy(False)
        return max(0, before - used_memory(gpus))

    def _resume(self) -> None:
        self._occupy(True)

    @contextmanager
    def _in_session(self) -> Any:
        try:
            self._session(True)
        except WorkerError as error:
            if "already open" not in str(error):
                raise
            # Somebody was lost in the middle of an update, or an answer of this call was: the one that was left open is of no use.
            self._session(False)
            self._session(True)
        try:
            yield
        finally:
            self._session(False)


class SGLangEngine(SGLangBase):
    """SGLang's ``Engine``. ``options`` go to it as they are. ``positions``: most tokens of a prompt and its response, as many as
    there is room for if None. Made in the main thread: it sets handlers of signals."""

    def __init__(self, model: str, *, options: Mapping[str, Any], timeout: float, positions: int | None = None) -> None:
        folder = Path(model)
        config = config_of(folder)  # if there is none, SGLang would take it for the name of a model to download
        context = {} if positions is None else {"context_length": context_for(positions, config, os.environ)}
        import sglang
        from sglang import Engine

        given = {
            "model_path": model,
            "skip_tokenizer_init": True,
            "custom_weight_loader": [LOADER],
            "skip_server_warmup": True,
            "log_level": "error",
            "stream_interval": _INTERVAL,
            **({"enable_multimodal": True} if "vision_config" in config else {}),
            **context,
            **options,
        }
        if "incremental_streaming_output" in _fields():
            given.setdefault("incremental_streaming_output", True)
        features = Features.of(sglang.__version__, is_incremental=bool(given.get("incremental_streaming_output")))
        try:
            self._engine: Any = Engine(**given)
        except Exception as error:  # of many kinds; what the operator needs is the folder and the cause
            raise WorkerError(f"SGLang did not start with the model in {model}: {type(error).__name__}: {error}") from error
        arguments, self._manager = self._engine.server_args, self._engine.tokenizer_manager
        started = {"page_size": getattr(arguments, "page_size", None), **self._engine._scheduler_init_result.scheduler_infos[0]}
        room = room_of(started, int(self._manager.model_config.context_len))
        super().__init__(
            folder,
            loop=self._engine.loop,
            features=features,
            arguments={name: getattr(arguments, name, None) for name in ARGUMENTS},
            positions=room if positions is None else min(positions, room),
            timeout=timeout,
        )

    async def _generate(self, request: dict[str, Any]) -> AsyncGenerator[Mapping[str, Any], None]:
        try:
            async with aclosing(await self._engine.async_generate(**request)) as answers:
                async for answer in answers:
                    yield answer
        except (ValueError, KeyError) as error:
            if not tells_an_end(error):
                raise
            yield ENDED

    async def _end(self, names: Sequence[str]) -> None:
        for name in names:
            # Told of one that it has not sent on yet, 0.5.20 and later forget it, and do not listen again.
            if getattr(self._manager.rid_to_state.get(name), "dispatched", True):
                self._manager.abort_request(name)

    def _load(self, named: Named, flush: bool) -> tuple[bool, str]:
        worked, said = self._engine.update_weights_from_tensor(named, load_format=LOADER, flush_cache=flush)
        return bool(worked), str(said)

    def _session(self, begin: bool) -> None:
        if self._features.has_sessions:
            done, message = self._engine.begin_weight_update() if begin else self._engine.end_weight_update()
            if not done:
                raise WorkerError(f"SGLang did not {'begin' if begin else 'end'} an update: {message}")

    def _flush(self) -> bool:
        return bool(self._engine.flush_cache().success)

    def _occupy(self, memory: bool) -> None:
        if memory:
            self._engine.resume_memory_occupation()
        else:
            self._engine.release_memory_occupation()

    def close(self) -> None:
        super().close()
        self._engine.shutdown()


def _fields() -> frozenset[str]:
    """The options that this SGLang has."""
    from sglang.srt.server_args import ServerArgs

    return frozenset(getattr(ServerArgs, "__struct_fields__", ()) or getattr(ServerArgs, "__dataclass_fields__", ()))
