"""A running VLLMWorker, and the models that it is given."""

from __future__ import annotations

import pytest

from gpu.small import Place, changed, make_model, used_memory
from gpu.vllm.setting import start


@pytest.fixture(scope="session")
def models():
    model = make_model()
    return [changed(model, seed).cuda() for seed in (1, 2)]


@pytest.fixture(scope="session")
def folders(models, tmp_path_factory):
    """Of each model."""
    made = [tmp_path_factory.mktemp("model") for _ in models]
    for folder, model in zip(made, models, strict=True):
        model.save_pretrained(folder)
    return made


@pytest.fixture(scope="module")
def place(models, folders):
    before = used_memory()
    with start(folders[0]) as worker:
        yield Place(worker, models, before)
