"""This project's own carriers, and the reference, under the kit: the same decorator that somebody with a carrier uses."""

from rollout_core.testing import parametrize_carrier_checks


@parametrize_carrier_checks(["rollout_core-memory", "rollout_core-local", "reference-carrier"], max_examples=60)
def test_carrier(carrier, check):
    check(carrier)
