"""Command lines that SGLang's own parser, with all options of its server, reads back."""

import argparse
import json
import os
import warnings

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rollout_core.errors import WorkerError
from rollout_core.workers.arguments import command_line, round_trip

os.environ["SGLANG_USE_CPU_ENGINE"] = "1"  # before SGLang is imported
with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # SGLang's and its dependencies' own, on import
    from sglang.srt.server_args import ServerArgs

PARSER = argparse.ArgumentParser()
ServerArgs.add_cli_args(PARSER)
MODEL = {"model_path": "folder"}  # it requires one
UNTOUCHED = vars(PARSER.parse_args(["--model-path", "folder"]))
#: Python 3.11's argparse takes "--" out of every value; a command line has no NUL.
TEXT = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=8).filter("--".__ne__) | st.sampled_from(
    ["-", "-1", "--trust-remote-code", "--tp", "--a_b=c", "=", "", " -x", "{}", "a_b", "1k", "None"]
)
PLAIN = TEXT.filter(lambda text: not text.startswith("-"))
FLOATS = st.floats(allow_nan=False, allow_infinity=False)
SMALL_FLOATS = st.integers(-1000, 1000).map(lambda number: number / 8)  # written without an exponent
READS_A_FILE = {"config"}


def values(action):
    """What an option takes, as a strategy; None for what is not tried here."""
    if isinstance(action, argparse.BooleanOptionalAction):
        return st.booleans()
    if type(action) is argparse._StoreTrueAction:
        return st.booleans() if action.default is False else st.just(True)
    if type(action) is not argparse._StoreAction or action.dest in READS_A_FILE:
        return None
    if action.choices is not None:
        return st.sampled_from(list(action.choices)) if action.nargs is None and action.type in (None, str, int) else None
    many = action.nargs in ("+", "*")
    single = {int: st.integers(), float: SMALL_FLOATS if many else FLOATS, str: PLAIN if many else TEXT}.get(action.type)
    if single is None or action.nargs is None:
        return single
    return st.lists(single, min_size=action.nargs == "+") if many else None


#: By the name in a configuration.
SIMPLE = {action.dest: strategy for action in PARSER._actions if action.option_strings and (strategy := values(action)) is not None}
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | FLOATS | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=6,
)
MAPPING = st.dictionaries(TEXT, JSON, min_size=1, max_size=3)
MORE = {
    "context_length": st.integers(1, 10**6),
    "max_total_tokens": st.integers(1, 10**6),
    "preferred_sampling_params": MAPPING,
    "default_chat_template_kwargs": MAPPING,
    "mm_process_config": MAPPING,
    "limit_mm_data_per_request": MAPPING,
    "forward_hooks": st.lists(MAPPING),
    "sidecar_args": st.lists(TEXT),
    "lora_paths": st.lists(
        st.just("name=path") | st.fixed_dictionaries({"lora_name": PLAIN, "lora_path": PLAIN}), min_size=1, max_size=2
    ),
    "enable_dp_attention": st.booleans(),
}
CONFIGS = st.lists(st.sampled_from(sorted(SIMPLE | MORE)), max_size=8, unique=True).flatmap(
    lambda names: st.fixed_dictionaries({**{name: (SIMPLE | MORE)[name] for name in names}, "model_path": st.just("folder")})
)


@settings(max_examples=400, suppress_health_check=[HealthCheck.too_slow])
@given(CONFIGS)
def test_sglang_reads_the_configuration_back(config):
    parsed = vars(PARSER.parse_args(command_line(config, PARSER)))
    for name, value in config.items():
        assert parsed[name] == value
        assert isinstance(parsed[name], bool) == isinstance(value, bool)
    for name in parsed.keys() - config.keys():  # and nothing else has changed
        assert repr(parsed[name]) == repr(UNTOUCHED[name])


def test_most_of_sglangs_options_are_among_these():
    assert len(SIMPLE) > 400
    assert (
        not {"tp_size", "mem_fraction_static", "random_seed", "dtype", "port", "disable_radix_cache", "attention_backend"}
        - SIMPLE.keys()
    )


@pytest.mark.parametrize("value", [True, False])
@pytest.mark.parametrize(
    "action", [a for a in PARSER._actions if a.nargs == 0 and a.dest != "help"], ids=lambda action: action.dest
)
def test_every_flag_of_sglang(action, value):
    config = {**MODEL, action.option_strings[0]: value}
    if value is False and not isinstance(action, argparse.BooleanOptionalAction) and action.default is None:
        with pytest.raises(WorkerError, match=f"{action.option_strings[0]} is False, which .* cannot say"):
            command_line(config, PARSER)
    else:
        assert getattr(PARSER.parse_args(command_line(config, PARSER)), action.dest) is value


def test_sglangs_own_configurations():
    config = {
        **MODEL,
        "tensor-parallel-size": 2,  # what stores tp_size
        "json_model_override_args": {"num_hidden_layers": 2, "nested": [1, {"a": None}]},  # SGLang keeps the text
        "cuda_graph_config": {"decode": {"backend": "full"}},
    }
    read = round_trip(config, PARSER)
    assert read["tensor-parallel-size"] == 2
    assert json.loads(read["json_model_override_args"]) == config["json_model_override_args"]
    assert command_line(MODEL, PARSER) == ["--model-path", "folder"]


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"enable_lora": False}, "enable_lora is False, which --enable-lora cannot say"),  # None there means: as lora_paths says
        ({"mem_fraction_static": float("inf")}, "mem_fraction_static is inf"),
        ({"preferred_sampling_params": {"a": float("nan")}}, "preferred_sampling_params.a is nan"),
        ({"served_model_name": ["a"]}, "served_model_name is .'a'., which the parser reads as"),
        ({"dtype": "float31"}, "invalid choice"),
        ({"disable_radix_cash": True}, "did you mean 'disable_radix_cache'"),
        ({"lora_paths": [{"name": "a"}]}, "lora_name"),
        ({"encoder_urls": ["a", "--b"]}, "encoder_urls has '--b'"),
    ],
    ids=str,
)
def test_what_sglang_would_not_read_so_is_refused(config, said):
    with pytest.raises(WorkerError, match=said):
        command_line({**MODEL, **config}, PARSER)


def test_the_model_is_required():
    with pytest.raises(WorkerError, match="required: --model-path"):
        command_line({"tp_size": 2}, PARSER)
