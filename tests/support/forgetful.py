"""vLLM's engines with a door for tests: they can be made to forget pictures, as vLLM may at any time."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch

from rollout_core.workers.link.hosts import Spec
from rollout_core.workers.vllm.async_engine import VLLMAsyncEngine
from rollout_core.workers.vllm.engine import VLLMEngine

FORGET = "forget all pictures"


class ForgetfulEngine(VLLMEngine):
    def read_tensor(self, name: str) -> torch.Tensor:
        if name == FORGET:
            self._engine.reset_mm_cache()
            return torch.empty(0)
        return super().read_tensor(name)


class ForgetfulAsyncEngine(VLLMAsyncEngine):
    def read_tensor(self, name: str) -> torch.Tensor:
        if name == FORGET:
            self._run(self._llm.reset_mm_cache())
            return torch.empty(0)
        return super().read_tensor(name)


@contextmanager
def forgetful() -> Iterator[None]:
    """A VLLMWorker that is made within it has such an engine."""

    def spec(*given: object, **more: object) -> Spec:
        made = Spec(*given, **more)
        return replace(made, place=f"{__name__}:{'ForgetfulAsyncEngine' if 'async' in made.place else 'ForgetfulEngine'}")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("rollout_core.workers.vllm.worker.Spec", spec)
        yield
