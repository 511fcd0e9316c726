"""The README's first example, run as it stands."""

from __future__ import annotations

import re
from pathlib import Path

import torch

import rollout_core.bucketing


def test_the_bucket_example_runs():
    readme = (Path(__file__).parents[2] / "README.md").read_text()
    code = next(block for block in re.findall(r"```python\n(.*?)```", readme, re.DOTALL) if "plan_buckets" in block)
    model = torch.nn.Linear(3, 2)
    received: list[rollout_core.bucketing.Bucket] = []
    parameters = {name: torch.zeros_like(tensor) for name, tensor in model.state_dict().items()}
    exec(code, {"model": model, "send": received.append, "received": received, "parameters": parameters})
    assert all(torch.equal(parameters[name], tensor) for name, tensor in model.state_dict().items())


def test_the_names_it_mentions_exist():
    readme = (Path(__file__).parents[2] / "README.md").read_text()
    for name in ("pack_stream", "unpack_stream", "iter_buckets", "aiter_buckets", "save_buckets", "pack"):
        assert f"`{name}" in readme or f" {name}(" in readme
        assert name in rollout_core.bucketing.__all__


def test_the_conversation_example_runs():
    from rollout_core.multimodal import Picture
    from rollout_core.testing.worlds import make_world

    readme = (Path(__file__).parents[2] / "README.md").read_text()
    code = next(block for block in re.findall(r"```python\n(.*?)```", readme, re.DOTALL) if "HFRenderer" in block)
    names = {
        "processor": make_world("chatml+rows").processor,
        "ids": [65, 66],
        "logprobs": [-0.5, -0.25],
        "picture": Picture("RGB", (8, 8), bytes(8 * 8 * 3)),
    }
    exec(code, names)
    assert len(names["conv"].items) == 1
    assert len(names["prompt"]) < len(names["batch"].input_ids)
    assert "pixel_values" in names["inputs"]
