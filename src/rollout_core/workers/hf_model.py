"""The engine side of an HFWorker: a transformers model that takes weights from buckets and generates."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import xxhash

from rollout_core.bucketing import Bucket, BucketPlan, Unpacker
from rollout_core.bucketing.tensors import as_bytes, describe, same_bits_copy, view_key
from rollout_core.errors import IncompleteStreamError, PlanMismatchError, WorkerError
from rollout_core.workers.contract import Completion, SamplingParams
from rollout_core.workers.hf_generate import generate


def named_weights(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Every parameter and buffer of a module by name: tied ones under each name, non-persistent buffers included."""
    return {
        **dict(model.named_parameters(remove_duplicate=False)),
        **dict(model.named_buffers(remove_duplicate=False)),
    }


def weight_digest(tensor: torch.Tensor) -> str:
    """Hexadecimal xxh3-128 of a tensor's bytes."""
    return xxhash.xxh3_128_hexdigest(as_bytes(tensor.detach()).cpu().numpy().data)


class HFModel:
    """A transformers causal language model from a folder, and the update of its weights that is under way."""

    def __init__(self, model_dir: str, *, dtype: str = "float32", device: str = "cpu") -> None:
        from transformers import AutoModelForCausalLM
        from transformers.utils import logging

        logging.disable_progress_bar()
        if not Path(model_dir).is_dir():  # transformers would take it for the name of a model to download
            raise WorkerError(f"{model_dir} is no folder; pass the folder that save_pretrained wrote")
        try:
            # Code from the folder is never run, and False rather than None keeps transformers from asking at the terminal.
            self.model: Any = AutoModelForCausalLM.from_pretrained(
                model_dir, dtype=getattr(torch, dtype), local_files_only=True, trust_remote_code=False
            ).to(device)
        except Exception as error:  # transformers raises many kinds; what the operator needs is the folder and the cause
            raise WorkerError(f"the model in {model_dir} could not be loaded: {type(error).__name__}: {error}") from error
        self.model.requires_grad_(False).eval()
        self.version = 0
        self._weights = named_weights(self.model)
        self._unpacker: Unpacker | None = None
        self._broken: str | None = None  # why the weights are of no use, if they are
        self._dirty: set[str] = set()  # changed by an update that is not, or not yet, complete
        self._before: tuple[int, set[str]] = (0, set())  # version and _dirty before the last commit

    def begin(self, plan: BucketPlan, version: int) -> None:
        """Accept an update, or raise ``PlanMismatchError`` naming the first tensor that is not this model's: nothing has moved."""
        if version <= self.version:
            raise WorkerError(f"the update has version {version}, which is not newer than the worker's {self.version}")
        self._check(plan)
        self._unpacker = Unpacker(plan, version=version)

    def load(self, bucket: Bucket) -> None:
        """Copy a bucket's tensors into the model once its digest is found right."""
        pairs = self._update().feed(bucket)
        self._broken = self._broken or f"the update to version {bucket.version} was not completed"
        self._dirty.update(name for name, _ in pairs)
        for name, tensor in pairs:
            same_bits_copy(self._weights[name].detach(), tensor)

    def commit(self) -> None:
        """The update is complete: its version is this model's from now on. Raises ``IncompleteStreamError`` if it is not."""
        unpacker = self._update()
        unpacker.close()
        self._before = (self.version, self._dirty)
        if unpacker.version is not None:
            self.version = unpacker.version  # first: interrupted after it, abandon takes all of this back
        self._unpacker, self._broken, self._dirty = None, None, set()

    def abandon(self, version: int) -> None:
        """Forget the update to ``version``. If any of it was loaded, the weights are of no use until the next one completes; so too
        if it was committed, and the trainer was interrupted before it heard so: to the trainer that update has failed."""
        self._unpacker = None
        if self.version == version:
            self.version, self._dirty = self._before
            self._broken = f"the update to version {version} was not completed"

    def generate(self, prompts: Sequence[Sequence[int]], params: SamplingParams, max_batch: int) -> list[Completion]:
        if self._broken is not None:
            raise WorkerError(f"the worker's weights are unusable: {self._broken}; call sync_weights again")
        eos = self._eos_token_ids()
        config = self.model.config.get_text_config()
        # Any id serves, as masks say what is padding; some configs have none, or -1.
        pad = config.pad_token_id if config.pad_token_id in range(config.vocab_size) else 0
        return generate(
            self.model,
            prompts,
            params,
            eos_token_ids=eos,
            pad_token_id=pad,
            weight_version=self.version,
            max_batch=max_batch,
        )

    def digests(self) -> dict[str, str]:
        """Hexadecimal xxh3-128 of every parameter and buffer, by name."""
        return {name: weight_digest(tensor) for name, tensor in self._weights.items()}

    def read_tensor(self, name: str) -> torch.Tensor:
        """One parameter or buffer as it is now, on the CPU."""
        if name not in self._weights:
            raise WorkerError(f"the worker has no tensor {name!r}")
        return self._weights[name].detach().cpu().clone()

    def _update(self) -> Unpacker:
        if self._unpacker is None:
            raise IncompleteStreamError("no update is under way; begin one with its plan first")
        return self._unpacker

    def _eos_token_ids(self) -> list[int]:
        for config in (getattr(self.model, "generation_config", None), self.model.config.get_text_config()):
            eos = getattr(config, "eos_token_id", None)
            if eos is not None:
                return [eos] if isinstance(eos, int) else list(eos)
        return []

    def _check(self, plan: BucketPlan) -> None:
        for spec in plan.specs:
            mine = self._weights.get(spec.name)
            if mine is None:
                raise PlanMismatchError(
                    f"the update has a tensor {spec.name!r} ({spec}), and the worker's model has none of that name"
                )
            if (mine.dtype, tuple(mine.shape)) != (spec.dtype, spec.shape):
                words = describe(mine.dtype, tuple(mine.shape))
                raise PlanMismatchError(f"tensor {spec.name!r} is {spec} in the update and {words} in the worker")
        # A tied weight sent under its other name is covered; what the model computes from its config may be left out, unless an
        # update that failed has put something else in its place.
        sent = {spec.name for spec in plan.specs}
        covered = {view_key(self._weights[name]) for name in sent}
        computed = self._non_persistent()
        for name, mine in self._weights.items():
            if name in sent or not mine.numel() or view_key(mine) in covered:
                continue
            if name in self._dirty:
                raise PlanMismatchError(
                    f"an update that was not completed changed the worker's tensor {name!r}, and this update leaves it out; "
                    "send it too: a module has it, and a state dict has not if it is a buffer that is not persistent"
                )
            if name not in computed:
                raise PlanMismatchError(
                    f"the worker's tensor {name!r} is not in the update; send every parameter and persistent buffer"
                )

    def _non_persistent(self) -> set[str]:
        return {
            f"{prefix}.{name}" if prefix else name
            for prefix, module in self.model.named_modules()
            for name in module._non_persistent_buffers_set
        }
