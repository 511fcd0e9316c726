"""What the kernels do, on the CPU: with TRITON_INTERPRET=1 they themselves, in Triton's interpreter, as session kernels runs them;
else what stands in for them, so that all that is around them is run without Triton, too."""

import os

import pytest

from rollout_core.bucketing import cuda
from rollout_core.bucketing.cuda import launching
from support import kernel_stand_in

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


@pytest.fixture(autouse=True)
def kernels(monkeypatch):
    """The kernels serve CPU tensors, and the calls of each are counted."""
    monkeypatch.setattr(cuda, "possible", lambda device: device.type == "cpu")
    monkeypatch.setattr(launching, "usable", lambda device: True)
    calls = {"gather": 0, "copy": 0, "digest_lanes": 0, "digest_rows": 0}
    for name in calls:
        monkeypatch.setattr(launching, name, _counted(calls, name, getattr(launching if INTERPRETED else kernel_stand_in, name)))
    return calls


def _counted(calls, name, original):
    def counted(*args, **kwargs):
        calls[name] += 1
        return original(*args, **kwargs)

    return counted
