"""The engine of an HFWorker: a transformers model that takes updates and generates, a group of requests after the other."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import torch

from rollout_core.errors import WorkerError
from rollout_core.transfer import DirectWeights, receive
from rollout_core.transfer.causes import cause_of
from rollout_core.transfer.targets import persistent_weights
from rollout_core.workers.carriers import receiver_of
from rollout_core.workers.digests import algorithm_on, weight_digests
from rollout_core.workers.engine import AWAITED, RELEASED, Emit, Group, Progress, Request, Update
from rollout_core.workers.hf.generate import check, decode_watched, ends_of, eos_ids_of, pad_id_of, plain, seeded, settings_of
from rollout_core.workers.hf.media import inputs_of
from rollout_core.workers.hf.memory import ReleasedWeights, reserved


@dataclass(eq=False, slots=True)
class _Row:
    """A request and what it has so far."""

    request: Request
    tokens: list[int] = field(default_factory=list)


@dataclass(eq=False, slots=True)
class _Queued:
    """A group and those of its requests that have not ended; ``waiting`` are those that are not being decoded."""

    group: Group
    ends: set[int]  # ids that end a response
    rows: dict[int, _Row]
    waiting: deque[_Row]
    inputs: dict[int, bytes]  # by the place of a prompt that has media


class HFEngine:
    """A transformers model from a folder, of text or of pictures and text; ``threads``: torch's, 0 for its own choice."""

    is_read_in_update: Final = True

    def __init__(self, model: str, *, dtype: str = "float32", device: str = "cpu", threads: int = 0) -> None:
        from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText
        from transformers.utils import logging

        logging.disable_progress_bar()
        if threads:
            torch.set_num_threads(threads)
        if not Path(model).is_dir():  # transformers would take it for the name of a model to download
            raise WorkerError(f"{model} is no folder; pass the folder that save_pretrained wrote")
        try:
            # Code from the folder is never run, and False rather than None keeps transformers from asking at the terminal.
            config = AutoConfig.from_pretrained(model, local_files_only=True, trust_remote_code=False)
            self._sees = hasattr(config, "vision_config")
            loader = AutoModelForImageTextToText if self._sees else AutoModelForCausalLM
            self.model: Any = loader.from_pretrained(
                model, dtype=getattr(torch, dtype), local_files_only=True, trust_remote_code=False
            ).to(device)
        except Exception as error:  # transformers raises many kinds; what the operator needs is the folder and the cause
            raise WorkerError(f"the model in {model} could not be loaded: {type(error).__name__}: {error}") from error
        self.model.requires_grad_(False).eval()
        self.weights = DirectWeights(self.model)
        self._queue: deque[_Queued] = deque()
        self._running: _Queued | None = None
        self._released: ReleasedWeights | None = None
        self._is_new = False  # whether the weights are other ones than those that the step under way began with

    @property
    def version(self) -> int:
        return self.weights.version

    @property
    def is_busy(self) -> bool:
        return not self._waits_for_weights and (bool(self._queue) or self._running is not None)

    def submit(self, group: Group) -> None:
        self._check_usable()
        params, eos = group.params, eos_ids_of(self.model)
        prompts: dict[int, list[int]] = {request.place: _prompt(request) for request in group.requests}
        inputs = {request.place: request.inputs for request in group.requests if request.inputs}
        if inputs and not self._sees:
            raise WorkerError(f"prompt {min(inputs)} shows pictures, and the model takes none")
        stops = {"eos_token_ids": eos, "stop_token_ids": params.stop_token_ids}
        check(self.model, [prompts[place] for place in sorted(prompts)], params.response_length, stops)
        rows = {request.key: _Row(request) for request in group.requests}
        if rows:
            self._queue.append(_Queued(group, ends_of(params, eos), rows, deque(rows.values()), inputs))

    def abort(self, keys: Sequence[int] | None, emit: Emit) -> None:
        groups = [*self._queue, *([self._running] if self._running is not None else [])]
        for queued in groups:
            found = list(queued.rows) if keys is None else [key for key in keys if key in queued.rows]
            for key in found:
                del queued.rows[key]
            emit([Progress(key, [], [], self.version, "aborted") for key in found])
        self._queue = deque(queued for queued in self._queue if queued.rows)

    def step(self, emit: Emit, between: Callable[[], None]) -> None:
        """A whole group: transformers' ``generate`` does not return before. Its rows are decoded in batches, in their order."""
        queued = self._running = self._queue.popleft()
        params = queued.group.params
        try:
            self._check_usable()
            with plain(self.model), seeded(None if params.temperature == 0 else params.seed, self.model.device):
                while queued.rows and not self._waits_for_weights:
                    self._decode(queued, emit, between)
        except WorkerError as error:
            cause = cause_of(error)
            emit([Progress(key, [], [], self.version, "failed", cause) for key in queued.rows])
            queued.rows.clear()
        finally:
            self._running = None
        if queued.rows:  # they wait for weights
            self._queue.appendleft(queued)

    def update(self, update: Update) -> float:
        self._check_resumed()
        with closing(receiver_of(update, self.model.device)) as carrier:
            report = receive(carrier, self.weights, timeout=update.timeout)
        self._is_new = True
        return report.loading

    def abandon(self, version: int) -> None:
        """If any of it was loaded, the weights are of no use until an update completes; so too if it was committed, and the trainer
        was interrupted before it heard so: to the trainer that update has failed."""
        if self.version == version:
            self.weights.abort(version)

    def specs(self) -> None:
        """The target compares an update's plan with the model."""

    def digests(self, names: Sequence[str] | None) -> dict[str, str]:
        """Of every parameter and buffer; transformers' names are a checkpoint's."""
        self._check_resumed()
        algorithm = algorithm_on(str(self.model.device))
        found = weight_digests(self.weights.tensors.items(), algorithm=algorithm)
        return found if names is None else {name: found[name] for name in names if name in found}

    def read_tensor(self, name: str) -> torch.Tensor:
        self._check_resumed()
        if name not in self.weights.tensors:
            raise WorkerError(f"the worker has no tensor {name!r}")
        return self.weights.tensors[name].detach().cpu().clone()

    def release_memory(self) -> int:
        if self._released is not None:
            return 0
        self._is_new = True  # what is being decoded waits
        before = reserved(self.model.device)
        self._released = ReleasedWeights(persistent_weights(self.model).values())
        return self._released.nbytes if before is None else before - (reserved(self.model.device, emptied=True) or 0)

    def resume_memory(self) -> None:
        if self._released is not None:
            self._released.resume()
            self._released, self.weights.unusable = None, AWAITED

    def close(self) -> None:
        self.weights.tensors.clear()
        self._queue.clear()
        self.model = None

    def _decode(self, queued: _Queued, emit: Emit, between: Callable[[], None]) -> None:
        """One batch, until all of it has ended, or other weights have come: what it has then waits in front of the others."""
        params, ends = queued.group.params, queued.ends
        batch: list[_Row] = []
        while queued.waiting and len(batch) < queued.group.max_batch:
            row = queued.waiting[0]
            if batch and len(row.tokens) != len(batch[0].tokens):
                break  # transformers counts all of a batch's new tokens alike
            if batch and (row.request.place in queued.inputs or batch[0].request.place in queued.inputs):
                break  # each prompt with media is decoded alone
            queued.waiting.popleft()
            if row.request.key in queued.rows:
                batch.append(row)
        if not batch:
            return
        self._is_new = False

        def watch(tokens: list[int], logprobs: list[float]) -> list[bool]:
            progress = []
            for row, token, logprob in zip(batch, tokens, logprobs, strict=True):
                key = row.request.key
                if key in queued.rows:
                    row.tokens.append(token)
                    status = "stop" if token in ends else "length" if len(row.tokens) == params.response_length else None
                    progress.append(Progress(key, [token], [logprob], self.version, status))  # type: ignore[arg-type]
                    if status is not None:
                        del queued.rows[key]
            emit(progress)
            between()
            if not self._waits_for_weights:
                self._check_usable()
            return [self._is_new or row.request.key not in queued.rows for row in batch]

        left = params.response_length - len(batch[0].tokens)
        settings = settings_of(params, ends, pad_id_of(self.model), left)
        prompts: list[Sequence[int]] = [[*_prompt(row.request), *row.tokens] for row in batch]
        places = [row.request.place for row in batch]
        try:
            data = queued.inputs.get(places[0])
            more = None if data is None else inputs_of(data, prompts[0], places[0], self.model)
        except WorkerError as error:
            del queued.rows[batch[0].request.key]
            emit([Progress(batch[0].request.key, [], [], self.version, "failed", cause_of(error))])
            return
        decode_watched(self.model, prompts, settings, places, watch, more)
        queued.waiting.extendleft(row for row in reversed(batch) if row.request.key in queued.rows)

    @property
    def _waits_for_weights(self) -> bool:
        return self._released is not None or self.weights.unusable is AWAITED

    def _check_resumed(self) -> None:
        if self._released is not None:
            raise WorkerError(RELEASED)

    def _check_usable(self) -> None:
        self._check_resumed()
        if self.weights.unusable is not None:
            raise WorkerError(f"the worker's weights are unusable: {self.weights.unusable}; call sync_weights again")


def _prompt(request: Request) -> list[int]:
    """What the model sees: a conversation with its items at full length."""
    return request.input_ids or request.prompt
