"""Command lines that vLLM's own parser, with all options of its server, reads back."""

import argparse
import warnings

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rollout_core.errors import WorkerError
from rollout_core.workers.arguments import command_line, round_trip

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # vLLM's and its dependencies' own, on import
    from vllm.entrypoints.launchers.cli_args import make_arg_parser
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    PARSER = make_arg_parser(FlexibleArgumentParser())
UNTOUCHED = vars(PARSER.parse_args([]))
#: Python 3.11's argparse takes "--" out of every value; a command line has no NUL.
TEXT = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=8).filter("--".__ne__) | st.sampled_from(
    ["-", "-O3", "-O.5", "--enforce-eager", "--no_enforce_eager", "--a_b.c=d", "-1", "serve", "=", "", " -x", "{}", "a_b", "1k"]
)
PLAIN = TEXT.filter(lambda text: not text.startswith("-"))
FLOATS = st.floats(allow_nan=False, allow_infinity=False)
READS_A_FILE = {"config"}


def values(action):
    """What an option takes, as a strategy; None for what is not tried here."""
    if isinstance(action, argparse.BooleanOptionalAction) or type(action) is argparse._StoreTrueAction:
        return st.booleans()
    if type(action) is not argparse._StoreAction or action.dest in READS_A_FILE:
        return None
    if action.choices is not None and action.nargs is None:
        return st.sampled_from([choice for choice in action.choices if choice is not None])
    single = {int: st.integers(), float: FLOATS, str: TEXT if action.nargs is None else PLAIN}.get(action.type)
    if single is None or action.nargs is None:
        return single
    return st.lists(single.filter(lambda item: not isinstance(item, int) or item >= 0), min_size=1) if action.nargs == "+" else None


#: By the name in a configuration.
SIMPLE = {action.dest: strategy for action in PARSER._actions if action.option_strings and (strategy := values(action)) is not None}
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | FLOATS | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=6,
)
MAPPING = st.dictionaries(TEXT, JSON, min_size=1, max_size=3)
NAMED = TEXT.filter(lambda text: text not in ("", "None"))
MORE = {
    "max_model_len": st.integers(1, 10**6),
    "kv_cache_memory_bytes": st.integers(0, 2**40),
    "kv_offloading_size": FLOATS,
    "max_num_batched_tokens": st.integers(1, 10**6),
    "revision": NAMED,
    "quantization": NAMED,
    "chat_template": NAMED,
    "served_model_name": st.lists(NAMED.filter(lambda text: not text.startswith("-")), min_size=1),
    "api_key": NAMED.map(lambda text: [text]),
    "middleware": st.lists(TEXT, max_size=3),
    "hf_overrides": MAPPING,
    "additional_config": MAPPING,
    "model_loader_extra_config": MAPPING,
    "mm_processor_kwargs": MAPPING,
    "override_generation_config": MAPPING,
    "default_chat_template_kwargs": MAPPING,
    "limit_mm_per_prompt": st.dictionaries(st.sampled_from(["image", "video"]), st.integers(0, 99), min_size=1),
    "allowed_origins": st.lists(TEXT, max_size=3),
    "hf_token": st.just(True) | TEXT,
    "collect_detailed_traces": st.lists(st.sampled_from(["model", "worker", "all"]), min_size=1),
}
CONFIGS = st.lists(st.sampled_from(sorted(SIMPLE | MORE)), max_size=8, unique=True).flatmap(
    lambda names: st.fixed_dictionaries({name: (SIMPLE | MORE)[name] for name in names})
)


@settings(max_examples=400, suppress_health_check=[HealthCheck.too_slow])
@given(CONFIGS)
def test_vllm_reads_the_configuration_back(config):
    parsed = vars(PARSER.parse_args(command_line(config, PARSER)))
    for name, value in config.items():
        assert parsed[name] == value
        assert isinstance(parsed[name], bool) == isinstance(value, bool)
    for name in parsed.keys() - config.keys():  # and nothing else has changed
        assert repr(parsed[name]) == repr(UNTOUCHED[name])


def test_most_of_vllms_options_are_among_these():
    assert len(SIMPLE) > 150
    assert {
        "tensor_parallel_size",
        "gpu_memory_utilization",
        "seed",
        "dtype",
        "host_",
        "port",
        "enforce_eager",
    } - SIMPLE.keys() == {"host_"}


@pytest.mark.parametrize("value", [True, False])
@pytest.mark.parametrize(
    "name", [name for name, action in ((a.dest, a) for a in PARSER._actions) if action.nargs == 0 and name in SIMPLE]
)
def test_every_flag_of_vllm(name, value):
    """``enable_prefix_caching=False`` has to arrive, whatever the default is."""
    words = command_line({name: value}, PARSER)
    assert getattr(PARSER.parse_args(words), name) is value
    assert len(words) <= 1


def test_vllms_own_configurations():
    config = {
        "compilation_config": {"mode": 0, "cudagraph_mode": "NONE"},
        "kv_transfer_config": {"kv_connector": "SomeConnector", "kv_role": "kv_both"},
        "eplb_config": {"window_size": 5},
        "weight_transfer_config": {"backend": "nccl"},
        "lora_modules": [{"name": "a", "path": "b"}],
        "offload_params": ["a", "b"],
        "cudagraph_capture_sizes": [1, 2, 4],
    }
    read = round_trip(config, PARSER)
    assert read["compilation_config"].mode == 0
    assert read["compilation_config"].cudagraph_mode.name == "NONE"
    assert read["kv_transfer_config"].kv_connector == "SomeConnector"
    assert read["eplb_config"].window_size == 5
    assert read["lora_modules"][0].path == "b"
    assert read["offload_params"] == ["a", "b"]
    assert command_line({"model_tag": "folder", "served_model_name": ["a", "b"]}, PARSER)[0] == "folder"


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"device_ids": [0, 1]}, "device_ids is"),  # it wants "0,1"
        ({"revision": "None"}, "revision is 'None', which the parser reads as None"),
        ({"kv_offloading_size": float("nan")}, "kv_offloading_size is nan"),
        ({"hf_overrides": {"a": float("inf")}}, "hf_overrides.a is inf"),
        ({"compilation_config": {"no_such_key": 1}}, "compilation"),
        ({"enforce_eagre": True}, "did you mean 'enforce_eager'"),
        ({"port": "8000a"}, "invalid int value"),
        ({"api_key": ["a", "-b"]}, "api_key has '-b'"),
    ],
    ids=str,
)
def test_what_vllm_would_not_read_so_is_refused(config, said):
    with pytest.raises(WorkerError, match=said):
        command_line(config, PARSER)
