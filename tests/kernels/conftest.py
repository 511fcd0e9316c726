"""The Triton kernels on the CPU, in Triton's interpreter. Without Triton these tests fail: there is nothing that they could say."""

import os

os.environ["TRITON_INTERPRET"] = "1"  # before Triton is imported

import pytest

from rollout_core.bucketing import cuda


@pytest.fixture(autouse=True)
def kernels(monkeypatch):
    """The kernels serve CPU tensors, and the calls of each are counted."""
    from rollout_core.bucketing.cuda import launching

    monkeypatch.setattr(cuda, "possible", lambda device: device.type == "cpu")
    monkeypatch.setattr(launching, "usable", lambda device: True)
    calls = {"gather": 0, "copy": 0, "digest_lanes": 0, "digest_rows": 0}
    for name in calls:
        monkeypatch.setattr(launching, name, _counted(calls, name, getattr(launching, name)))
    return calls


def _counted(calls, name, original):
    def counted(*args, **kwargs):
        calls[name] += 1
        return original(*args, **kwargs)

    return counted
