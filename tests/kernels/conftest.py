"""What the kernels do, on the CPU: with TRITON_INTERPRET=1 they themselves, in Triton's interpreter, as session kernels runs them;
else what stands in for them, so that all that is around them is run without Triton, too."""

import os

import pytest

from rollout_core.bucketing import cuda
from rollout_core.bucketing.cuda import launching, packing
from rollout_core.bucketing.finding import compiled
from support import kernel_stand_in
from support.kernel_checks import count_launches

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


@pytest.fixture(autouse=True)
def kernels(monkeypatch):
    """The kernels serve CPU tensors, and the calls of each are counted."""
    monkeypatch.setattr(cuda, "possible", lambda device: device.type == "cpu")
    monkeypatch.setattr(launching, "usable", lambda device: True)
    return count_launches(monkeypatch, by=launching if INTERPRETED else kernel_stand_in)


@pytest.fixture(params=["torch"] if INTERPRETED else ["torch", "compiled"])
def found_by(request, monkeypatch):
    """Who says where tensors lie, and whether they are the plan's: for few torch, for many our compiled code."""
    if request.param == "compiled":
        assert compiled() is not None, "no C compiler, or no DLPack exchange API: packing would be slower, not wrong"
        monkeypatch.setattr(packing, "MANY", 1)
    return request.param
