"""This project's own tracker under the kit, over the fakes: the same decorator that a trainer uses."""

import pytest

from rollout_core.errors import ConversationError
from rollout_core.testing import make_world, parametrize_tracker_checks
from rollout_core.testing.own_tracker import ConversationTracker
from rollout_core.testing.worlds import world_names


@pytest.fixture(scope="module", autouse=True)
def probed():
    """Templates are probed once here, and not in the process of every check: forked processes have the verdicts."""
    for name in world_names():
        try:
            assert ConversationTracker(make_world(name).processor).renderer.verdict
        except ConversationError:
            assert name == "chatml+coupled"  # refused by name


@parametrize_tracker_checks(["rollout_core-tracker", "rollout_core-segments"], max_examples=40)
def test_tracker(tracker, check):
    check(tracker)
