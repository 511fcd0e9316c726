"""Conversations with pictures on every engine: ROLLOUT_CORE_ENGINE says which. One that is missing fails them: none is skipped.

vLLM has a processor of its own, is given pictures and keeps them; transformers is given tensors, each time anew.
"""

import os

import pytest
import transformers

from rollout_core.multimodal import HFRenderer
from rollout_core.workers import HFWorker, VLLMWorker
from support import tiny_vl
from support.forgetful import FORGET, forgetful

ENGINE = os.environ.get("ROLLOUT_CORE_ENGINE", "hf")
KEEPS = ENGINE != "hf"  # whether the engine keeps pictures


def make_worker(folder, **options):
    if ENGINE == "hf":
        return HFWorker(str(folder), threads=1, timeout=60, **options)
    assert ENGINE == "vllm", f"ROLLOUT_CORE_ENGINE is {ENGINE!r}"
    engine = {"kv_cache_memory_bytes": 32 << 20, **options.pop("engine_options", {})}
    with forgetful():
        return VLLMWorker(folder, max_model_len=tiny_vl.POSITIONS, engine_options=engine, timeout=60, **options)


class Place:
    """A running worker, the models that it is given, and what renders conversations for it."""

    def __init__(self, worker, model, folder):
        self.worker, self.folder = worker, folder
        self.model, self.other = tiny_vl.changed(model, 1), tiny_vl.changed(model, 2)
        self.processor = transformers.AutoProcessor.from_pretrained(folder)
        self.renderer = HFRenderer(self.processor, vocab_size=tiny_vl.VOCABULARY)
        self._seen = worker.media_report()

    def whole(self):
        return tiny_vl.Whole(self.processor)

    def sent(self):
        """Pictures with data, and by name alone, since the last call."""
        before, self._seen = self._seen, self.worker.media_report()
        return self._seen.sent - before.sent, self._seen.named - before.named

    def forget(self):
        """Make vLLM forget all pictures, behind the worker's back."""
        if KEEPS:
            self.worker.read_tensor(FORGET)


@pytest.fixture(scope="session", params=tiny_vl.FAMILIES)
def running(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    model = tiny_vl.make(folder, request.param, tied=request.param == "qwen3_vl")
    with make_worker(folder) as worker:
        yield Place(worker, model, folder)


@pytest.fixture
def place(running):
    """With the weights of ``model``, nothing under way, and no picture known."""
    running.worker.sync_weights(running.model)
    running.forget()
    running.worker._media.forget()
    running.sent()
    yield running
    running.worker.resume()
    assert running.worker.abort() == []
