import re

import pytest

from .conftest import ENGINE, check_run


def test_w8_a_policy_learns_to_look_at_what_a_tool_shows(run):
    done = run("pictures.py", "--worker", ENGINE)
    check_run(done, 24, 0.29)
    (sent, named) = map(int, re.search(r"pictures: (\d+) with data, (\d+) by name", done.out).groups())
    left_out = sum(map(int, re.findall(r"left out (\d+)", done.out)))
    assert 24 * 32 - left_out <= sent + named <= 24 * 32  # one for each conversation, but for those that ended without


@pytest.mark.slow
def test_without_learning_there_is_no_rise(run):
    done = run("pictures.py", "--worker", ENGINE, "--steps", 10, "--learning-rate", 0)
    assert done.code == 1
    assert abs(done.rise()) < 0.2
