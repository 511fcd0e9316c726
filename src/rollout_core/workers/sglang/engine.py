"""What SGLang is as an engine of ours, in process and as a server; and the engine of an SGLangWorker, over SGLang's ``Engine``.

Its own traps, each of which was seen: ``ignore_eos`` turns ``stop_token_ids`` off, too; an error of a request is told as an abort
with a status code; a request that it does not know yet cannot be aborted; from 0.5.21 on an update has to stand between
``begin_weight_update`` and ``end_weight_update``, which 0.5.20 does not have.
"""

from __future__ import annotations

import asyncio
import math
import tempfile
import time
from abc import abstractmethod
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import torch

from rollout_core.bucketing import TensorSpec
from rollout_core.errors import WorkerError
from rollout_core.workers.commands import (
    Abandon,
    Answer,
    Command,
    Digests,
    Read,
    Receive,
    left_by,
    not_completed,
    raise_failed,
    unusable_of,
)
from rollout_core.workers.contract import SamplingParams
from rollout_core.workers.engine import Request, Update
from rollout_core.workers.limits import Limits
from rollout_core.workers.model_dir import Checkpoint, config_of
from rollout_core.workers.names import name_among
from rollout_core.workers.sglang.commands import LOADER, Named, Order, packed, read_answers
from rollout_core.workers.sglang.media import check_placeholders, pictures_of, placeholder_of, wrong_length
from rollout_core.workers.streaming import Flight, Piece, StreamingEngine

_NO_SEEDS: Final = "SGLang repeats samples only under enable_deterministic_inference, whose attention needs a GPU"
_LETS_GO: Final = 5.0  # seconds in which SGLang has let go of what has ended
_INTERVAL: Final = 16  # tokens that are told at once; a first one is told by itself


class SGLangBase(StreamingEngine):
    """``folder``: of the model. ``repeats``: whether it was started so that seeds hold."""

    #: Where its weights are: cuda, cpu.
    _device: str

    def __init__(
        self,
        folder: Path,
        *,
        loop: asyncio.AbstractEventLoop,
        positions: int,
        is_incremental: bool,
        repeats: bool,
        timeout: float,
    ) -> None:
        limits = Limits.of(folder, positions, no_seeds="" if repeats else _NO_SEEDS)
        super().__init__(loop=loop, limits=limits, timeout=timeout)
        self._is_incremental = is_incremental
        self._folder = folder
        self._checkpoint = Checkpoint(folder)
        self._placeholder = placeholder_of(config_of(folder))

    # What differs between an Engine and a server

    @abstractmethod
    def _generate(self, request: dict[str, Any]) -> AsyncIterator[dict[str, Any]]:
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
        async for answer in self._generate(request):
            piece = _piece(answer, seen)
            seen += 0 if self._is_incremental else len(piece.token_ids)
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

    def specs(self) -> list[TensorSpec]:
        return self._checkpoint.specs_in(self)

    def digests(self, names: Sequence[str] | None) -> dict[str, str]:
        shapes = self._checkpoint.shapes
        wanted = shapes if names is None else {name: shapes[name] for name in names if name in shapes}
        with self._on_the_ground():  # SGLang's loaders wait for what is in the air
            return self._ask(Digests(wanted))[0].digests

    def read_tensor(self, name: str) -> torch.Tensor:
        own = name_among(name, self._checkpoint.shapes)
        if own is None:
            raise WorkerError(f"the worker has no tensor {name!r}")
        with self._on_the_ground():
            return self._ask(Read(own, self._checkpoint.shapes[own]))[0].tensor

    def _ask(self, what: Command) -> list[Answer]:
        """Have each rank carry this out."""
        self._check_resumed()
        before, changes = self._unusable, isinstance(what, Receive | Abandon)
        if changes:
            self._unusable = self._unusable or "an update to them was not completed"  # unless the following says otherwise
        with tempfile.TemporaryDirectory(prefix="rollout-core-") as folder:
            with self._in_session():
                # What was computed with other weights is flushed, too: nothing is in the air that would need it.
                worked, said = self._load(packed(Order(what, folder)), changes)
            answers = read_answers(Path(folder), said=said)
        failed = any(answer.failed is not None for answer in answers)
        if isinstance(what, Receive):
            self._unusable = left_by(answers, what.update.version, before) if failed else unusable_of(answers)
        raise_failed(answers, "SGLang's loader")
        if changes and not worked and not self._is_flushed():
            self._unusable = f"SGLang did not flush what it computed with others: {said}"
            raise WorkerError(self._unusable)
        return answers

    def _is_flushed(self) -> bool:
        """SGLang tells of a request's end a little before it lets go of it, and flushes nothing until then."""
        end = time.monotonic() + _LETS_GO
        while not self._flush():
            if time.monotonic() > end:
                return False
            time.sleep(0.02)
        return True

    def _release(self) -> int:
        # Asked for its memory while it has a request, its scheduler would end.
        if not self._is_flushed():
            raise WorkerError("SGLang has requests of others, and keeps its memory: wait for them, or end them")
        before = used_memory(self._device)
        self._occupy(False)
        return max(0, before - used_memory(self._device))

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


def _piece(answer: Mapping[str, Any], seen: int) -> Piece:
    """What of an answer was not seen before."""
    meta = answer["meta_info"]
    tokens = list(answer.get("output_ids") or ())[seen:]
    rows = (meta.get("output_token_logprobs") or ())[seen:]
    logprobs = [math.nan if row[0] is None else float(row[0]) for row in rows]
    reason = meta.get("finish_reason")
    if reason is None:
        return Piece(tokens, logprobs)
    kind, code = reason.get("type"), reason.get("status_code")
    if kind == "abort" and code is not None:
        raise WorkerError(f"SGLang refused a request ({code}): {reason.get('message')}")
    if kind not in ("stop", "length", "abort"):
        raise WorkerError(f"SGLang ended a request by {reason!r}")
    return Piece(tokens, logprobs, "aborted" if kind == "abort" else kind)


class SGLangEngine(SGLangBase):
    """SGLang's ``Engine``. ``options`` go to it as they are. Made in the main thread: it sets handlers of signals."""

    def __init__(self, model: str, *, options: Mapping[str, Any], timeout: float) -> None:
        folder = Path(model)
        config = config_of(folder)  # if there is none, SGLang would take it for the name of a model to download
        from sglang import Engine

        given = {
            "model_path": model,
            "skip_tokenizer_init": True,
            "custom_weight_loader": [LOADER],
            "skip_server_warmup": True,
            "log_level": "error",
            "stream_interval": _INTERVAL,
            **({"enable_multimodal": True} if "vision_config" in config else {}),
            **options,
        }
        if "incremental_streaming_output" in _fields():
            given.setdefault("incremental_streaming_output", True)
        try:
            self._engine: Any = Engine(**given)
        except Exception as error:  # of many kinds; what the operator needs is the folder and the cause
            raise WorkerError(f"SGLang did not start with the model in {model}: {type(error).__name__}: {error}") from error
        self._device = str(given.get("device", "cuda"))
        arguments, self._manager = self._engine.server_args, self._engine.tokenizer_manager
        super().__init__(
            folder,
            loop=self._engine.loop,
            positions=int(self._manager.model_config.context_len),
            is_incremental=bool(getattr(arguments, "incremental_streaming_output", False)),
            repeats=bool(arguments.enable_deterministic_inference),
            timeout=timeout,
        )

    async def _generate(self, request: dict[str, Any]) -> AsyncIterator[dict[str, Any]]:
        async for answer in await self._engine.async_generate(**request):
            yield answer

    async def _end(self, names: Sequence[str]) -> None:
        for name in names:
            self._manager.abort_request(name)

    def _load(self, named: Named, flush: bool) -> tuple[bool, str]:
        worked, said = self._engine.update_weights_from_tensor(named, load_format=LOADER, flush_cache=flush)
        return bool(worked), str(said)

    def _session(self, begin: bool) -> None:
        call = getattr(self._engine, "begin_weight_update" if begin else "end_weight_update", None)
        if call is not None:
            done, message = call()
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


def used_memory(device: str) -> int:
    """Bytes of a device that are in use, by whomever; 0 on a CPU, where SGLang lets go of nothing."""
    if device == "cpu":
        return 0
    free, total = torch.cuda.mem_get_info()
    return int(total - free)


def _fields() -> frozenset[str]:
    """The options that this SGLang has."""
    from sglang.srt.server_args import ServerArgs

    return frozenset(getattr(ServerArgs, "__struct_fields__", ()) or getattr(ServerArgs, "__dataclass_fields__", ()))
