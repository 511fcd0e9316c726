"""The engine side of an HFWorker: a transformers model that takes weights from buckets and generates."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import xxhash

from rollout_core.bucketing import Bucket, BucketPlan, Unpacker
from rollout_core.bucketing.tensors import as_bytes
from rollout_core.errors import IncompleteStreamError, WorkerError
from rollout_core.transfer.targets import DirectWeights
from rollout_core.workers.contract import Completion, SamplingParams
from rollout_core.workers.hf_generate import generate


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
        self._weights = DirectWeights(self.model)
        self._unpacker: Unpacker | None = None

    @property
    def version(self) -> int:
        return self._weights.version

    def begin(self, plan: BucketPlan, version: int) -> None:
        """Accept an update, or raise ``PlanMismatchError`` naming the first tensor that is not this model's: nothing has moved."""
        if version <= self.version:
            raise WorkerError(f"the update has version {version}, which is not newer than the worker's {self.version}")
        self._weights.begin(plan, version)
        self._unpacker = Unpacker(plan, version=version)

    def load(self, bucket: Bucket) -> None:
        """Copy a bucket's tensors into the model once its digest is found right."""
        self._weights.load(self._update().feed(bucket))

    def commit(self) -> None:
        """The update is complete: its version is this model's from now on. Raises ``IncompleteStreamError`` if it is not."""
        unpacker = self._update()
        unpacker.close()
        if unpacker.version is not None:
            self._weights.commit(unpacker.version)
        self._unpacker = None

    def abandon(self, version: int) -> None:
        """Forget the update to ``version``. If any of it was loaded, the weights are of no use until the next one completes; so too
        if it was committed, and the trainer was interrupted before it heard so: to the trainer that update has failed."""
        self._unpacker = None
        self._weights.abort(version)

    def generate(self, prompts: Sequence[Sequence[int]], params: SamplingParams, max_batch: int) -> list[Completion]:
        if self._weights.unusable is not None:
            raise WorkerError(f"the worker's weights are unusable: {self._weights.unusable}; call sync_weights again")
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
        return {name: weight_digest(tensor) for name, tensor in self._weights.tensors.items()}

    def read_tensor(self, name: str) -> torch.Tensor:
        """One parameter or buffer as it is now, on the CPU."""
        if name not in self._weights.tensors:
            raise WorkerError(f"the worker has no tensor {name!r}")
        return self._weights.tensors[name].detach().cpu().clone()

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
