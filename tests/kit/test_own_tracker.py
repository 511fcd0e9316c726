"""This project's own tracker under the kit, over the fakes: the same decorator that a trainer uses."""

from rollout_core.testing import parametrize_tracker_checks


@parametrize_tracker_checks(["rollout_core-tracker", "rollout_core-segments"], max_examples=40)
def test_tracker(tracker, check):
    check(tracker)
