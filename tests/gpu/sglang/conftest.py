"""A running SGLangWorker, and the models that it is given."""

from __future__ import annotations

import pytest

from gpu.sglang.setting import OPTIONS, TIMEOUT
from gpu.small import POSITIONS, Place, changed, make_model, used_memory
from rollout_core.workers import SGLangWorker


@pytest.fixture(scope="module")
def models():
    model = make_model()
    return [changed(model, seed).cuda() for seed in (1, 2)]


@pytest.fixture(scope="module")
def folder(models, tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    models[0].save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def place(models, folder):
    """With CUDA graphs, which are SGLang's default."""
    before = used_memory()
    with SGLangWorker(str(folder), device="cuda", max_model_len=POSITIONS, engine_options=OPTIONS, timeout=TIMEOUT) as worker:
        yield Place(worker, models, before)
