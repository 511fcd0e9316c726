"""What an engine's tensors are by what its folder stores, and by what the engine says of a few."""

import json

import pytest
import torch
from safetensors.torch import save_file

from rollout_core.errors import WorkerError
from rollout_core.workers.model_dir import Checkpoint

STORED = {
    "model.embed_tokens.weight": torch.zeros(8, 4, dtype=torch.bfloat16),
    "model.norm.weight": torch.zeros(4, dtype=torch.bfloat16),
    "model.layers.0.mlp.gate.e_score_correction_bias": torch.zeros(2),
    "model.layers.1.mlp.gate.e_score_correction_bias": torch.zeros(2),
}


class Engine:
    """With weights in float16, the routers' biases as they are stored, and one of them unknown."""

    def __init__(self):
        self.asked = []

    def read_tensor(self, name):
        self.asked.append(name)
        if "layers.1" in name:
            raise WorkerError("the worker has no such tensor")
        return torch.zeros(1, dtype=torch.float32 if "bias" in name else torch.float16)


def test_each_dtype_is_the_engines():
    """The smallest tensor may be the one of another dtype, of which the others do not follow."""
    engine = Engine()
    found = {spec.name: spec.dtype for spec in checkpoint().specs_in(engine)}
    biases = [name for name in STORED if "bias" in name]
    assert found == dict.fromkeys(STORED, torch.float16) | dict.fromkeys(biases, torch.float32)
    assert sorted(engine.asked) == sorted(["model.norm.weight", *biases])


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def checkpoint():
    from pathlib import Path

    save_file(STORED, "model.safetensors")
    Path("config.json").write_text(json.dumps({"tie_word_embeddings": False}))
    return Checkpoint(Path())
