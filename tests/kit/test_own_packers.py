"""This project's own packers, and the reference, under the kit: the same decorator that a trainer uses."""

from rollout_core.testing import parametrize_packer_checks

TIED = {"packer/B10-once": "a list of pairs has no way to say that two names are one tensor; pack and pack_stream send it once"}


@parametrize_packer_checks(["reference", "rollout_core", "rollout_core-stream"], max_examples=60)
def test_packer(packer, check):
    check(packer)


@parametrize_packer_checks(["rollout_core-grouping"], max_examples=60, expected_failures=TIED)
def test_grouping(packer, check):
    check(packer)
