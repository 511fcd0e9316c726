"""The same tests on every engine: ROLLOUT_CORE_ENGINE says which, ROLLOUT_CORE_DEVICE where. An engine that is missing fails them,
and so does a GPU: none is skipped."""

import os

import pytest
import torch

from support.engines import DEVICE, ENGINE, changed, make_model, running_worker

#: The workers of an engine, each with a model whose embeddings are tied or not: both where an update is read by other code.
KINDS = {
    "hf": ("hf-untied", "hf-tied"),
    "vllm": ("vllm-untied", "vllm-tied", "vllm_async-tied", "vllm_server-untied"),
    "sglang": ("sglang-untied", "sglang-tied", "sglang_server-untied"),
}

#: transformers is no server, and has one rank. Two ranks want two GPUs, which tests/gpu/two has. What a sharded trainer does for
#: an engine on several ranks is alike for both: SGLang, slow to start, has it with ROLLOUT_CORE_RANKS=all.
collect_ignore = [
    *(["test_servers.py"] if ENGINE == "hf" else []),
    *(["test_ranks.py", "test_sharded_trainer.py"] if ENGINE == "hf" or DEVICE == "cuda" else []),
    *(["test_sharded_trainer.py"] if ENGINE == "sglang" and os.environ.get("ROLLOUT_CORE_RANKS") != "all" else []),
]


@pytest.fixture(autouse=True, scope="session")
def a_device():
    if DEVICE == "cuda" and not torch.cuda.is_available():
        pytest.fail("ROLLOUT_CORE_DEVICE is cuda, and no GPU is here")


class Place:
    """A running worker, and the models that it is given: one with the weights that it has, and another."""

    def __init__(self, worker, model, folder):
        self.worker, self.folder = worker, folder
        self.model, self.other = changed(model, 1), changed(model, 2)


@pytest.fixture(scope="module", params=KINDS[ENGINE])  # not longer: an engine takes memory, and time, while it is there
def running(request, tmp_path_factory):
    kind, _, embeddings = request.param.partition("-")
    folder = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    model = make_model(tied=embeddings == "tied")
    model.save_pretrained(folder)
    with running_worker(kind, folder) as worker:
        yield Place(worker, model, folder)


@pytest.fixture
def place(running):
    """Left as it was found: serving, with the weights of ``model``, and with nothing under way."""
    running.worker.sync_weights(running.model)
    yield running
    running.worker.resume()
    assert running.worker.abort() == []
    running.worker.sync_weights(running.model)
