"""M1: everything together, in any order."""

from __future__ import annotations

from rollout_core.testing.checks.tracker_base import tracker_check
from rollout_core.testing.tracker_machine import programs, run_program

tracker_check(
    "tracker/M1-machine",
    "after any program of growing, forking, cutting, storing and bad input everything is what the whole conversation gives",
    traits=("stable", "sums"),
    cases=programs,
    cost=1,
)(run_program)
