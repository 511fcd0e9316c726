"""The engines' doors against the engines' own classes. A package that is missing fails these tests: none is skipped."""

from __future__ import annotations

import importlib
import os

import pytest

from rollout_core.testing.peers.loading import PeerPackage

# Before vLLM is imported: it reads them once.
os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
os.environ["VLLM_NO_USAGE_STATS"] = "1"
os.environ["TORCHDYNAMO_DISABLE"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"

#: SGLang as it is, without what its top packages import. Its own Python of one file or package each.
SGLANG = PeerPackage(
    "sglang",
    "0.5.23",
    "sglang",
    run_init=["sglang.srt.utils", "sglang.srt.platforms", "sglang.srt.plugins"],
    stubs={"triton": "writes kernels for GPUs", "orjson": "writes the JSON of HTTP answers"},
)


@pytest.fixture(scope="module")  # not longer: vLLM imports triton, too
def sglang_door():
    SGLANG.load("sglang.srt.weight_sync.tensor_bucket")
    SGLANG.load("sglang.srt.utils")
    with SGLANG:  # its classes are pickled by the names of their modules
        yield importlib.import_module("rollout_core.transfer.doors.sglang")
