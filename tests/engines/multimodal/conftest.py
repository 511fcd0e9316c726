"""Conversations with pictures on every engine: ROLLOUT_CORE_ENGINE says which. One that is missing fails them: none is skipped.

vLLM has a processor of its own, is given pictures and keeps them; SGLang has one, too, and is given pictures each time;
transformers is given tensors, each time anew.
"""

import os
from typing import NamedTuple

import pytest
import transformers

from rollout_core.multimodal import HFRenderer
from rollout_core.workers import HFWorker, SGLangServerWorker, SGLangWorker, VLLMWorker
from support import tiny_vl
from support.forgetful import FORGET, forgetful


class Ways(NamedTuple):
    """What the engines do differently. ``kinds``: families that are run, and how; ``keeps``: pictures, which go by name then;
    ``shares``: of the samples of one prompt, the first alone is sent a picture; ``checkpoint``: weights go by a checkpoint's names,
    too; ``stray``: of the words for a placeholder that was sampled; ``expands``: of those for other ids than the conversation's,
    "" for an engine that makes none of its own."""

    kinds: tuple[str, ...]
    keeps: bool
    shares: bool
    checkpoint: bool
    stray: str
    expands: str


ENGINE = os.environ.get("ROLLOUT_CORE_ENGINE", "hf")
#: Of an engine that is slow to start, one family is run, and all with ROLLOUT_CORE_FAMILIES=all.
FAMILIES = tiny_vl.FAMILIES if ENGINE != "sglang" or os.environ.get("ROLLOUT_CORE_FAMILIES") == "all" else ("qwen2_5_vl",)
STRAY = "shows 2 pictures, and SGLang would look for 3"
WAYS = {
    "hf": Ways(FAMILIES, keeps=False, shares=True, checkpoint=False, stray="it was sampled", expands=""),
    "vllm": Ways(
        (*FAMILIES, "qwen2_5_vl-async"),
        keeps=True,
        shares=True,
        checkpoint=True,
        stray="the first difference is at",
        expands="vLLM made",
    ),
    "sglang": Ways(
        (*FAMILIES, "qwen2_5_vl-server"), keeps=False, shares=False, checkpoint=True, stray=STRAY, expands="SGLang made"
    ),
}[ENGINE]


def make_worker(folder, mode):
    if ENGINE == "hf":
        return HFWorker(str(folder), threads=1, timeout=60)
    if ENGINE == "sglang":
        making = SGLangServerWorker.start if mode == "server" else SGLangWorker
        return making(str(folder), max_model_len=tiny_vl.POSITIONS, timeout=60)
    with forgetful():
        engine = {"kv_cache_memory_bytes": 32 << 20}
        return VLLMWorker(folder, mode=mode or "stepped", max_model_len=tiny_vl.POSITIONS, engine_options=engine, timeout=60)


class Place:
    """A running worker, the models that it is given, and what renders conversations for it."""

    def __init__(self, worker, model, folder, mode):
        self.worker, self.folder, self.mode = worker, folder, mode
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
        if WAYS.keeps:
            self.worker.read_tensor(FORGET)


@pytest.fixture(scope="session", params=WAYS.kinds)
def running(request, tmp_path_factory):
    family, _, mode = request.param.partition("-")
    folder = tmp_path_factory.mktemp(request.param)
    model = tiny_vl.make(folder, family, tied=family == "qwen3_vl")
    with make_worker(folder, mode) as worker:
        yield Place(worker, model, folder, mode)


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
