"""What differs among versions of vLLM is asked of what is there."""

import pytest

from rollout_core.workers.vllm.versions import route_words, taken_by


def test_a_call_is_given_what_it_takes():
    def older():
        pass

    def newer(weight_version=None):
        pass

    assert taken_by(older, {"weight_version": "7"}) == {}
    assert taken_by(newer, {"weight_version": "7"}) == {"weight_version": "7"}


@pytest.mark.parametrize(
    ("file", "line", "words"),
    [
        ("entrypoints/launchers/cli_args.py", "    enable_scale_out: bool = False\n", ["--enable-scale-out"]),
        ("entrypoints/openai/cli_args.py", "    enable_scale_out: bool = False\n", ["--enable-scale-out"]),
        ("entrypoints/openai/cli_args.py", "    allow_credentials: bool = False\n", []),
        ("elsewhere.py", "    enable_scale_out: bool = False\n", []),
    ],
)
def test_a_servers_route_is_asked_for_where_it_has_to_be(tmp_path, file, line, words):
    (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / file).write_text(line)
    assert route_words(tmp_path) == words


def test_a_vllm_that_is_not_installed_has_no_flags():
    assert route_words() == []
