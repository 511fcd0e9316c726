"""What vLLM is as an engine that samples by itself, AsyncLLM in a process of its own and as a server alike."""

from __future__ import annotations

import asyncio
from abc import abstractmethod
from collections.abc import AsyncGenerator, AsyncIterator, Mapping, Sequence
from contextlib import aclosing, suppress
from pathlib import Path
from typing import Any, Final

import msgspec
import torch

from rollout_core.bucketing import TensorSpec
from rollout_core.errors import TransferError, WorkerError
from rollout_core.workers.commands import (
    Abandon,
    Answer,
    Command,
    Expect,
    Layout,
    Settle,
    asked,
    check_versions,
    left_by,
    not_completed,
    unusable_of,
)
from rollout_core.workers.engine import Update
from rollout_core.workers.limits import Limits
from rollout_core.workers.model_dir import Checkpoint
from rollout_core.workers.parts import Parts
from rollout_core.workers.shards import Shard
from rollout_core.workers.streaming import Flight, Piece, StreamingEngine

#: What of ours runs in vLLM's workers.
EXTENSION: Final = "rollout_core.workers.vllm.extension.RolloutExtension"
_FINISHES: Final = {"stop": "stop", "length": "length", "abort": "aborted"}


class VLLMStreamed(StreamingEngine):
    """``folder``: of the model. ``mend``: work around what is known to be wrong in vLLM."""

    def __init__(
        self,
        folder: Path,
        *,
        loop: asyncio.AbstractEventLoop,
        positions: int,
        mend: bool,
        timeout: float,
        at_once: int | None = None,
    ) -> None:
        super().__init__(loop=loop, limits=Limits.of(folder, positions), timeout=timeout, at_once=at_once)
        self._folder = folder
        self._checkpoint = Checkpoint(folder)
        self._parts = Parts(lambda command: self._run(self._ask(command)), self._checkpoint.shapes, values_on="cpu")
        self._mend = mend

    # What differs between AsyncLLM and a server

    @abstractmethod
    def _generate(self, flight: Flight, params: dict[str, Any]) -> AsyncGenerator[Piece, None]:
        """The stream of one request."""

    @abstractmethod
    async def _official(self, call: str, **arguments: Any) -> None:
        """One of vLLM's calls for updates of weights."""

    @abstractmethod
    async def _rpc(self, method: str, *arguments: str) -> list[Any]:
        """``collective_rpc``."""

    @abstractmethod
    async def _sleep(self, sleep: bool) -> None:
        """``sleep``, level 2, or ``wake_up``."""

    @abstractmethod
    async def _reset(self) -> bool:
        """Reset what was computed with old weights: the caches of the encoder and of prefixes."""

    # An engine

    async def _stream(self, flight: Flight) -> AsyncIterator[Piece]:
        async with aclosing(self._generate(flight, self._params(flight))) as pieces:
            async for piece in pieces:
                yield piece

    def _params(self, flight: Flight) -> dict[str, Any]:
        params = flight.params
        return {
            "max_tokens": flight.most,
            "temperature": params.temperature,
            "top_p": params.top_p,
            "top_k": params.top_k,
            "seed": flight.seed,
            "stop_token_ids": self._limits.ends(params),
            "ignore_eos": True,  # said by stop_token_ids: without a tokenizer vLLM knows no EOS
            "logprobs": 0,  # of the sampled token alone
            "detokenize": False,
        }

    def _update(self, update: Update) -> float:
        return self._run(self._updated(update))

    async def _updated(self, update: Update) -> float:
        self._check_resumed()
        before, self._unusable = self._unusable, not_completed(update.version)  # unless the following says otherwise
        try:
            await self._official(
                "init_weight_transfer_engine",
                init_info=init_info(update),
                seconds=update.timeout,
            )
            await self._ask(Expect(update.version))
            await self._official("start_weight_update")
            await self._official("update_weights", update_info={"version": update.version}, seconds=update.timeout)
            try:
                answers = await self._ask(Settle(self._mend, update.address))
                check_versions(answers, update.version)
            except Exception:
                await self._official("finish_weight_update")  # or the next cannot begin
                raise
            await self._official("finish_weight_update", weight_version=str(update.version))
            if not await self._reset():
                raise TransferError("vLLM did not reset its prefix cache, and would go on from what old weights computed")
        except Exception:
            with suppress(Exception):  # the error that led here says more
                self._unusable = left_by(await self._ask(Settle(mend=False, address=update.address)), update.version, before)
            raise
        self._unusable = unusable_of(answers)
        return max(answer.loading for answer in answers)

    def _abandon(self, version: int) -> None:
        self._run(self._ask(Abandon(version, not_completed(version))))

    def _release(self) -> int:
        return self._run(self._released())

    async def _released(self) -> int:
        await self._reset()
        before = sum(map(int, await self._rpc("rollout_core_memory")))
        await self._sleep(True)
        return max(0, before - sum(map(int, await self._rpc("rollout_core_memory"))))

    def _resume(self) -> None:
        self._run(self._sleep(False))

    def call_model_dir(self, argument: bytes) -> bytes:
        """Where the model is."""
        del argument
        return str(self._folder).encode()

    def call_device(self, argument: bytes) -> bytes:
        """Where vLLM has its weights, such as cpu or cuda:0."""
        del argument
        return self._run(self._ask(Layout({})))[0].device.encode()

    def call_traits(self, argument: bytes) -> bytes:
        """What vLLM is: ``Traits`` as JSON."""
        del argument
        return traits_of(self._run(self._ask(Layout({}))))

    def specs(self) -> list[TensorSpec]:
        return self._checkpoint.specs_in(self)

    def digests(self, names: Sequence[str] | None) -> dict[str, str]:
        self._check_resumed()
        return self._parts.digests(names)

    def read_tensor(self, name: str) -> torch.Tensor:
        self._check_resumed()
        return self._parts.read_tensor(name)

    def shards(self) -> list[dict[str, Shard]]:
        self._check_resumed()
        return self._parts.shards()

    def rank_digests(self) -> list[dict[str, str]]:
        self._check_resumed()
        return self._parts.rank_digests()

    async def _ask(self, command: Command) -> list[Answer]:
        return asked(await self._rpc("rollout_core_carry_out", msgspec.json.encode(command).decode()))


def piece_of(tokens: Sequence[int], logprobs: Sequence[float], reason: str | None) -> Piece:
    """What came, in our words."""
    if reason is not None and reason not in _FINISHES:
        raise WorkerError(f"vLLM ended a request by {reason!r}")
    finish: Any = None if reason is None else _FINISHES[reason]
    return Piece(list(tokens), list(logprobs), finish)


class Traits(msgspec.Struct, frozen=True):
    """What vLLM's workers say of themselves: see ``Answer``."""

    device: str
    quantization: str
    sleeps: bool


def traits_of(answers: Sequence[Answer]) -> bytes:
    """``Traits`` as JSON, of the first rank: they are alike in these."""
    first = answers[0]
    return msgspec.json.encode(Traits(first.device, first.quantization, first.sleeps))


def init_info(update: Update) -> dict[str, Any]:
    """What ``init_weight_transfer_engine`` is given: how each of vLLM's workers gets at an update. What goes wrong there is asked
    for by ``Settle``."""
    return {
        "carrier": update.carrier,
        "address": update.address,
        "timeout": update.timeout,
        "by_rank": update.ranks > 1,
        "raises": False,
    }


def options_of(model: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """What vLLM is started with, as an engine of ours."""
    return {
        "model": model,
        "generation_config": "vllm",  # not the folder's: a penalty in it would bend what a trainer believes in
        "worker_extension_cls": EXTENSION,
        **options,
    }
