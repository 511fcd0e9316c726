"""The checks of a rollout worker, in the order in which an operator wants to know. Each returns its figure or fails with words."""

from __future__ import annotations

from typing import Final

from rollout_core.errors import RolloutCoreError
from rollout_core.preflight.checks.context import Check, CheckFailed, Context, MakeWorker
from rollout_core.preflight.checks.ends import death_is_reported, nothing_is_left, worker_starts
from rollout_core.preflight.checks.pictures import pictures_go_once
from rollout_core.preflight.checks.requests import aborts_end, batch_holds, greedy_equals, weights_change_under_requests
from rollout_core.preflight.checks.updates import Failing, damage_is_refused, half_an_update_is_no_update, memory_comes_back
from rollout_core.preflight.checks.weights import compare, plan_agrees, put_back, starts_equal, weights_arrive

__all__ = [
    "CHECKS",
    "EXPECTED",
    "Check",
    "CheckFailed",
    "Context",
    "Failing",
    "MakeWorker",
    "aborts_end",
    "batch_holds",
    "compare",
    "damage_is_refused",
    "death_is_reported",
    "greedy_equals",
    "half_an_update_is_no_update",
    "memory_comes_back",
    "nothing_is_left",
    "pictures_go_once",
    "plan_agrees",
    "put_back",
    "starts_equal",
    "weights_arrive",
    "weights_change_under_requests",
    "worker_starts",
]

CHECKS: Final = (
    Check("plan agrees with its manifest", "B7", plan_agrees),
    Check("worker starts", "-", worker_starts, "plan agrees with its manifest"),
    Check("weights equal at the start", "W2", starts_equal, "worker starts"),
    Check("changed weights arrive", "B1 W2", weights_arrive, "worker starts"),
    Check("greedy tokens equal", "W1 W5", greedy_equals, "changed weights arrive"),
    Check("batch shapes", "W3", batch_holds, "worker starts"),
    Check("pictures go once", "W8", pictures_go_once, "changed weights arrive"),
    Check("aborts end", "W4", aborts_end, "changed weights arrive"),
    Check("weights change under requests", "W5", weights_change_under_requests, "changed weights arrive"),
    Check("a flipped bit is refused", "B13 T5", damage_is_refused, "changed weights arrive"),
    Check("half an update is refused", "B16 T5", half_an_update_is_no_update, "changed weights arrive"),
    Check("memory comes back", "W6", memory_comes_back, "changed weights arrive"),
    Check("death is reported", "W7 T2", death_is_reported, "changed weights arrive"),
    Check("nothing is left behind", "T3", nothing_is_left, "worker starts"),
)

EXPECTED: Final = (CheckFailed, RolloutCoreError)
