"""A stand-in for a vLLM in a worker's process: it says of itself what its options have."""

from __future__ import annotations

import json
from types import MappingProxyType

from rollout_core.testing.fake_engine import FakeEngine
from rollout_core.workers import VLLMWorker


class Engine(FakeEngine):
    def __init__(self, model, *, options, mend):
        super().__init__(model)
        self.traits = {"device": "cpu", "quantization": "", "sleeps": True, **options["traits"]}

    def call_traits(self, argument):
        return json.dumps(self.traits).encode()


class StandInWorker(VLLMWorker):
    engine_classes = MappingProxyType({"stepped": "unit.workers.vllm_stand_in:Engine"})

    def __init__(self, folder, *, device="cpu", traits=None):
        super().__init__(str(folder), device=device, engine_options={"traits": traits or {}}, timeout=10)
