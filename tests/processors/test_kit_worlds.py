"""The kit over real processors: our own tracker passes there what it passes over the fakes."""

from __future__ import annotations

import pytest

from rollout_core.testing import check_tracker, make_world
from support import worlds

ONLY = [
    "M1-machine",
    "M2-splice",
    "M2-template",
    "M4",
    "M5",
    "M6-round-trip",
    "M7-payload",
    "M8-recompute",
    "M11-items",
    "M15-serialise",
]
NAMES = worlds.register()


#: One of each way to place pictures in a prompt; the others are slow.
FEW = {"real:qwen2_vl", "real:gemma3", "real:pixtral"}


@pytest.mark.parametrize("name", [name if name in FEW else pytest.param(name, marks=pytest.mark.slow) for name in NAMES])
def test_our_tracker_passes(name):
    make_world(name)  # built here, so that the process of the tracker has it
    report = check_tracker("rollout_core-tracker", worlds=[name], only=ONLY, max_examples=6, timeout=60)
    assert report.ok, str(report)
    assert not report.skipped()
