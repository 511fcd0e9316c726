"""The engine of a VLLMWorker: vLLM's ``LLM`` in this process, step by step."""

from __future__ import annotations

import math
import signal
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Final

import msgspec
import torch

from rollout_core.bucketing import TensorSpec
from rollout_core.errors import RolloutCoreError, TransferError, WorkerError
from rollout_core.transfer.causes import cause_of
from rollout_core.transfer.protocol.messages import Cause
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
from rollout_core.workers.contract import SamplingParams, Status
from rollout_core.workers.engine import AWAITED, RELEASED, Emit, Group, Progress, Request, Update
from rollout_core.workers.limits import Limits, seed_of
from rollout_core.workers.media import data_in
from rollout_core.workers.model_dir import Checkpoint, config_of
from rollout_core.workers.parts import Parts
from rollout_core.workers.shards import Shard
from rollout_core.workers.vllm.media import check_expanded, hits_of, missing_in, prompt_of, reading_options
from rollout_core.workers.vllm.streamed import init_info, options_of, traits_of
from rollout_core.workers.vllm.versions import check_installed, taken_by

_STATUSES: Final[dict[str, Status]] = {"stop": "stop", "length": "length", "abort": "aborted"}


class VLLMEngine:
    """``model`` is a folder, ``options`` go to ``LLM`` as they are. ``mend``: work around what is known to be wrong in vLLM, unless
    somebody wants to see it."""

    is_read_in_update: Final = False

    def __init__(self, model: str, *, options: Mapping[str, Any], mend: bool = True) -> None:
        folder = Path(model)
        config = config_of(folder)  # if there is none, vLLM would take it for the name of a model to download
        self._checkpoint = Checkpoint(folder)

        from vllm import LLM
        from vllm.config import WeightTransferConfig

        check_installed()
        try:
            self._llm: Any = LLM(
                **options_of(
                    model,
                    {
                        **reading_options(config),
                        "weight_transfer_config": WeightTransferConfig(backend="rollout_core"),
                        "async_scheduling": False,  # a step is one, and nothing is under way between two
                        **options,
                    },
                )
            )
        except Exception as error:  # of many kinds; what the operator needs is the folder and the cause
            raise WorkerError(f"vLLM did not start with the model in {model}: {type(error).__name__}: {error}") from error
        self._engine: Any = self._llm.llm_engine
        ranks = int(self._engine.vllm_config.parallel_config.world_size)
        self._parts = Parts(self._ask, self._checkpoint.shapes, values_on="cpu", ranks=ranks)
        self._is_parallel = ranks > 1
        self._lost: str | None = None  # why vLLM has to be started again, if it has
        self._limits = Limits.of(folder, int(self._llm.model_config.max_model_len))
        self._mend = mend
        self._version = self._before = 0  # the one before the last update, too
        self._unusable: str | None = None
        self._is_released = False
        self._names: dict[int, str] = {}  # of the requests under way, as vLLM calls them
        self._keys: dict[str, int] = {}
        self._started: dict[int, Request] = {}  # those of conversations of which nothing was heard yet
        self._missed: dict[int, list[str]] = {}  # of those that are not under way, as their media are missing

    @property
    def version(self) -> int:
        return self._version

    @property
    def is_busy(self) -> bool:
        return bool(self._names or self._missed) and not self._is_released and self._unusable is not AWAITED

    def submit(self, group: Group) -> None:
        self._check_usable()
        for request in group.requests:
            self._check(request, group.params)
        given = data_in(group.requests)
        for request in group.requests:
            missing = missing_in(request, given, self._engine.renderer.mm_processor_cache)
            if missing:
                self._missed[request.key] = missing
                continue
            params = self._params(group.params, request)
            try:
                name = self._engine.add_request(str(request.key), prompt_of(request, given), params)
            except Exception as error:  # of its processor; what else it may refuse was looked for before
                self.abort([other.key for other in group.requests], lambda progress: None)
                raise WorkerError(f"vLLM does not take prompt {request.place}: {type(error).__name__}: {error}") from error
            self._names[request.key], self._keys[str(request.key)] = name, request.key
            if request.input_ids:
                self._started[request.key] = request

    def abort(self, keys: Sequence[int] | None, emit: Emit) -> None:
        found = list(self._names) if keys is None else [key for key in keys if key in self._names]
        if found:
            self._engine.abort_request([self._names[key] for key in found], internal=True)
            emit([self._ended(key, "aborted") for key in found])
        missed = list(self._missed) if keys is None else [key for key in keys if key in self._missed]
        for key in missed:
            del self._missed[key]
        emit([Progress(key, [], [], self._version, "aborted") for key in missed])

    def step(self, emit: Emit, between: Callable[[], None]) -> None:
        if self._unusable is not None or self._lost is not None:  # what an update that failed has left is not sampled from
            self._fail_all(emit)
        missed, self._missed = self._missed, {}
        progress = [Progress(key, [], [], self._version, missing=missing) for key, missing in missed.items()]
        for output in self._stepped():
            key = self._keys.get(output.request_id)
            if key is not None:
                progress += self._progress(key, output)
        emit(progress)
        between()

    def _stepped(self) -> Sequence[Any]:
        """What a step gave."""
        try:
            return self._engine.step() if self._names else ()
        except Exception as error:
            if not self._is_parallel:
                raise
            self._lose(error)
            return ()

    def _lose(self, error: Exception) -> TransferError:
        """One of vLLM's several workers has ended or failed. Which of their answers belong to which call is not known any more: see
        ``doors.vllm``."""
        ended = []
        with suppress(Exception):
            for worker in self._engine.engine_core.engine_core.model_executor.workers:
                if worker.proc.exitcode not in (None, 0, -signal.SIGTERM):  # the others are told to end
                    ended.append(f"rank {worker.rank} ended with exit code {worker.proc.exitcode}")
        why = ", ".join(ended) or f"{type(error).__name__}: {error}"
        self._lost = self._lost or f"vLLM has lost a rank, and has to be started again: {why}"
        return TransferError(self._lost)

    def _fail_all(self, emit: Emit) -> None:
        lost = None if self._lost is None else TransferError(self._lost)
        cause = cause_of(lost or WorkerError(f"the worker's weights are unusable: {self._unusable}"))
        self._engine.abort_request(list(self._names.values()), internal=True)
        emit([self._ended(key, "failed", cause) for key in list(self._names)])
        emit([Progress(key, [], [], self._version, "failed", cause) for key in self._missed])
        self._missed = {}

    def update(self, update: Update) -> float:
        self._check_resumed()
        llm, before = self._llm, self._unusable
        self._unusable = not_completed(update.version)  # unless the following says otherwise
        try:
            llm.init_weight_transfer_engine({"init_info": init_info(update)})
            self._ask(Expect(update.version))
            llm.start_weight_update()
            llm.update_weights({"update_info": {"version": update.version}})
            try:
                answers = self._ask(Settle(self._mend, update.address))
                check_versions(answers, update.version)
            except Exception:
                llm.finish_weight_update()  # or the next cannot begin
                raise
            llm.finish_weight_update(**taken_by(llm.finish_weight_update, {"weight_version": str(update.version)}))
            # What was computed with the old weights: requests under way are computed anew, and no other may build on them.
            self._engine.reset_encoder_cache()
            if not self._engine.reset_prefix_cache(reset_running_requests=True):
                raise TransferError("vLLM did not reset its prefix cache, and would go on from what the old weights computed")
        except Exception as error:
            with suppress(Exception):  # the error that led here says more
                self._unusable = left_by(self._ask(Settle(mend=False, address=update.address)), update.version, before)
            if self._is_parallel and not isinstance(error, RolloutCoreError):
                raise self._lose(error) from error
            raise
        self._before, self._version = self._version, update.version
        self._unusable = unusable_of(answers)
        return max(answer.loading for answer in answers)

    def abandon(self, version: int) -> None:
        if self._version == version:
            self._version, self._unusable = self._before, not_completed(version)
            self._ask(Abandon(version, not_completed(version)))

    def _ask(self, command: Command) -> list[Answer]:
        written = msgspec.json.encode(command).decode()
        try:
            found = self._llm.collective_rpc("rollout_core_carry_out", args=(written,))
        except Exception as error:
            if self._is_parallel:
                raise self._lose(error) from error
            raise
        return asked(found)

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

    def release_memory(self) -> int:
        if self._is_released:
            return 0
        check_can_sleep(self._llm.model_config, self._llm.llm_engine.vllm_config.device_config)
        self._engine.reset_prefix_cache(reset_running_requests=True)  # what was under way waits, and is computed anew
        before = int(sum(self._llm.collective_rpc("rollout_core_memory")))
        self._llm.sleep(level=2, mode="keep")  # its default ends what is under way
        self._is_released = True
        return max(0, before - int(sum(self._llm.collective_rpc("rollout_core_memory"))))

    def resume_memory(self) -> None:
        if self._is_released:
            self._llm.wake_up()
            self._is_released, self._unusable = False, AWAITED

    def media_hits(self) -> tuple[int, int] | tuple[None, None]:
        """Of vLLM's cache of what its processor made: pictures that were in it, and that were looked for."""
        return hits_of(self._engine.renderer.mm_processor_cache)

    def close(self) -> None:
        self._engine.engine_core.shutdown()

    def call_traits(self, argument: bytes) -> bytes:
        """What vLLM is: ``Traits`` as JSON."""
        del argument
        return traits_of(self._ask(Layout({})))

    def specs(self) -> list[TensorSpec]:
        return self._checkpoint.specs_in(self)

    def _params(self, params: SamplingParams, request: Request) -> Any:
        from vllm import SamplingParams as Their
        from vllm.sampling_params import RequestOutputKind

        return Their(
            max_tokens=params.response_length,
            temperature=params.temperature,
            top_p=params.top_p,
            top_k=params.top_k,
            seed=seed_of(params, request),
            stop_token_ids=self._limits.ends(params),
            ignore_eos=True,  # said by stop_token_ids: without a tokenizer vLLM knows no EOS
            logprobs=0,  # of the sampled token alone
            detokenize=False,
            output_kind=RequestOutputKind.DELTA,
        )

    def _check(self, request: Request, params: SamplingParams) -> None:
        """Raise ``WorkerError`` for what vLLM would refuse in words of its own, or cut short, or fail on."""
        if request.media and not self._llm.model_config.is_multimodal_model:
            raise WorkerError(f"prompt {request.place} shows {len(request.media)} pictures, and the model takes none")
        self._limits.check(request, params)

    def _progress(self, key: int, whole: Any) -> list[Progress]:
        request, output = self._started.pop(key, None), whole.outputs[0]
        if request is not None:
            try:
                check_expanded(request, whole.prompt_token_ids)
            except WorkerError as error:
                self._engine.abort_request([self._names[key]], internal=True)
                return [self._ended(key, "failed", cause_of(error))]
        tokens = list(output.token_ids)
        logprobs = [float(table[token].logprob) for token, table in zip(tokens, output.logprobs or (), strict=True)]
        if any(math.isnan(logprob) for logprob in logprobs):
            cause = cause_of(WorkerError("the model gave NaN logits: check the weights it was last given"))
            self._engine.abort_request([self._names[key]], internal=True)
            return [self._ended(key, "failed", cause)]
        if output.finish_reason is None:
            return [Progress(key, tokens, logprobs, self._version)]
        ended = self._ended(key, _STATUSES.get(output.finish_reason, "failed"))
        return [msgspec.structs.replace(ended, token_ids=tokens, logprobs=logprobs)]

    def _ended(self, key: int, status: Status, cause: Cause | None = None) -> Progress:
        del self._names[key], self._keys[str(key)]
        self._started.pop(key, None)
        return Progress(key, [], [], self._version, status, cause)

    def _check_resumed(self) -> None:
        if self._lost is not None:
            raise TransferError(self._lost)
        if self._is_released:
            raise WorkerError(RELEASED)

    def _check_usable(self) -> None:
        self._check_resumed()
        if self._unusable is not None:
            raise WorkerError(f"the worker's weights are unusable: {self._unusable}; call sync_weights again")


def check_can_sleep(model_config: Any, device_config: Any) -> None:
    """Raise ``WorkerError`` for a vLLM that keeps its memory. On a CPU it sleeps, too, and frees nothing."""
    if device_config.device_type != "cpu" and not model_config.enable_sleep_mode:
        raise WorkerError("vLLM keeps its memory: start it with enable_sleep_mode=True")
