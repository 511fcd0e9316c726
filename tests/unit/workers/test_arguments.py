"""Command lines: the parser gives the configuration back, or it is refused by name."""

import argparse
import json
import math
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rollout_core.errors import WorkerError
from rollout_core.workers.arguments import command_line, round_trip


def size(text):
    return int(text[:-1]) * 1000 if text.endswith("k") else int(text)


def none_or(kind):
    return lambda text: None if text in ("", "None") else kind(text)


class Config(argparse.Namespace):
    """What an option makes of JSON, with defaults of its own."""

    def __init__(self, text):
        super().__init__(**{"depth": 1, **json.loads(text)})


def make_parser(**options):
    parser = argparse.ArgumentParser(prog="engine", **options)
    parser.add_argument("model", nargs="?")
    parser.add_argument("--eager", action=argparse.BooleanOptionalAction, default=False)
    parser.add_argument("--prefix-caching", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--chunked", "-c", action=argparse.BooleanOptionalAction)
    parser.add_argument("--flag", action="store_true")
    parser.add_argument("--flag-of-three", action="store_true", default=None)
    parser.add_argument("--off", dest="on", action="store_false")
    parser.add_argument("--const", action="store_const", const=7, default=3)
    parser.add_argument("--name")
    parser.add_argument("--other-name", type=str, default="other")
    parser.add_argument("--maybe", type=none_or(str))
    parser.add_argument("--count", "-n", type=int, default=4)
    parser.add_argument("--share", type=float, default=0.5)
    parser.add_argument("--size", type=size)
    parser.add_argument("--choice", choices=["a", "b"], default="a")
    parser.add_argument("--token", nargs="?", const=True)
    parser.add_argument("--names", nargs="+")
    parser.add_argument("--numbers", nargs="+", type=int)
    parser.add_argument("--shares", nargs="*", type=float)
    parser.add_argument("--pair", nargs=2, type=int)
    parser.add_argument("--chosen", nargs="+", default=[])
    parser.add_argument("--as-set", nargs="+", default=set(), type=str, action=AsSet)
    parser.add_argument("--again", action="append", default=[])
    parser.add_argument("--json", type=json.loads)
    parser.add_argument("--jsons", nargs="+", type=json.loads)
    parser.add_argument("--config", type=Config)
    parser.add_argument("--modules", nargs="+", action=AsModules)
    parser.add_argument("--devices", type=lambda text: text.split(","))
    parser.add_argument("--verbosity", "--loud", dest="log_level", type=int)
    parser.add_argument("--quiet", dest="log_level", action="store_const", const=0)
    return parser


class AsSet(argparse.Action):
    def __call__(self, parser, namespace, values, option_string=None):
        setattr(namespace, self.dest, set(values))


class Module:
    """Of an engine's own: equal to no other, and each with a number of its own."""

    made = 0

    def __init__(self, name):
        self.name, self.number = name, Module.made
        Module.made += 1


class AsModules(argparse.Action):
    def __call__(self, parser, namespace, values, option_string=None):
        setattr(namespace, self.dest, [Module(**json.loads(value)) for value in values])


def lines(config):
    return command_line(config, make_parser())


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({}, []),
        ({"eager": True}, ["--eager"]),
        ({"eager": False}, ["--no-eager"]),
        ({"prefix_caching": False}, ["--no-prefix-caching"]),  # not dropped: its default is True
        ({"chunked": False}, ["--no-chunked"]),
        ({"flag": True}, ["--flag"]),
        ({"flag": False}, []),
        ({"on": False}, ["--off"]),
        ({"on": True}, []),
        ({"const": 7}, ["--const"]),
        ({"const": 3}, []),
        ({"name": None, "count": None}, []),
        ({"name": ""}, ["--name", ""]),
        ({"name": "a b"}, ["--name", "a b"]),
        ({"name": "-v"}, ["--name=-v"]),
        ({"name": "--eager"}, ["--name=--eager"]),
        ({"name": Path("/a/b")}, ["--name", "/a/b"]),
        ({"count": 3}, ["--count", "3"]),
        ({"count": -3}, ["--count=-3"]),
        ({"share": 1e-7}, ["--share", "1e-07"]),
        ({"share": 1}, ["--share", "1"]),
        ({"size": 4000}, ["--size", "4000"]),
        ({"size": "4k"}, ["--size", "4k"]),
        ({"other_name": "x"}, ["--other-name", "x"]),
        ({"other-name": "x"}, ["--other-name", "x"]),
        ({"log_level": 2}, ["--verbosity", "2"]),
        ({"loud": 2}, ["--verbosity", "2"]),
        ({"quiet": 0}, ["--quiet"]),
        ({"token": True}, ["--token"]),
        ({"token": "abc"}, ["--token", "abc"]),
        ({"names": ["a", "b c"]}, ["--names", "a", "b c"]),
        ({"names": ["-a"]}, ["--names=-a"]),
        ({"names": ("a",)}, ["--names", "a"]),
        ({"numbers": [1, -2, -3]}, ["--numbers", "1", "-2", "-3"]),
        ({"shares": []}, ["--shares"]),
        ({"shares": [0.5, -0.25]}, ["--shares", "0.5", "-0.25"]),
        ({"pair": [1, 2]}, ["--pair", "1", "2"]),
        ({"chosen": []}, []),
        ({"as_set": ["a", "b"]}, ["--as-set", "a", "b"]),
        ({"again": ["a", "-b"]}, ["--again", "a", "--again=-b"]),
        ({"again": []}, []),
        ({"json": {"a": [1, None, {"b": True}]}}, ["--json", '{"a": [1, null, {"b": true}]}']),
        ({"json": [{"a": 1}, "ä"]}, ["--json", '[{"a": 1}, "\\u00e4"]']),
        ({"json": True}, ["--json", "true"]),
        ({"name": {"a": 1}}, ["--name", '{"a": 1}']),  # SGLang has options that keep JSON as text
        ({"jsons": [{"a": 1}, [2]]}, ["--jsons", '{"a": 1}', "[2]"]),
        ({"config": {"width": 2}}, ["--config", '{"width": 2}']),
        ({"modules": [{"name": "a"}, {"name": "b"}]}, ["--modules", '{"name": "a"}', '{"name": "b"}']),
        ({"devices": "0,1"}, ["--devices", "0,1"]),
        ({"names": ["a"], "model": "folder"}, ["folder", "--names", "a"]),  # else it would be one of the names
    ],
    ids=str,
)
def test_words(config, words):
    assert lines(config) == words


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"egaer": True}, "no option 'egaer': did you mean 'eager'"),
        ({3: True}, "no option 3"),
        ({"help": True}, "no option 'help'"),
        ({"no_eager": True}, "negation"),
        ({"other_name": "a", "other-name": "b"}, "one option"),
        ({"log_level": 1, "loud": 1}, "one option"),
        ({"eager": "yes"}, "eager is 'yes': it takes True or False"),
        ({"eager": 1}, "eager is 1"),
        ({"flag": 1}, "flag is 1"),
        ({"flag": "true"}, "flag is 'true'"),
        ({"flag_of_three": False}, "flag_of_three is False, which --flag-of-three cannot say"),
        ({"const": 5}, "const is 5"),
        ({"name": 5}, "name is 5, which the parser reads as '5'"),
        ({"name": True}, "name is True, which the parser reads as 'true'"),
        ({"name": ["a"]}, "name is .'a'., which the parser reads as"),
        ({"other_name": ["a"]}, "other_name is"),
        ({"maybe": "None"}, "maybe is 'None', which the parser reads as None"),
        ({"name": "a\0b"}, "no NUL"),
        ({"name": "\ud800"}, "no surrogates"),
        ({"count": "three"}, "invalid int value: 'three'"),
        ({"count": 1.5}, "invalid int value: '1.5'"),
        ({"count": "3"}, None),
        ({"choice": "c"}, "invalid choice: 'c'"),
        ({"share": math.nan}, "share is nan"),
        ({"share": -math.inf}, "share is -inf"),
        ({"json": {"a": [math.inf]}}, r"json.a\[0\] is inf"),
        ({"json": {1: 2}}, "json has the key 1"),
        ({"json": {"a": {1, 2}}}, "json.a is a set"),
        ({"json": b"a"}, "json is a bytes"),
        ({"json": object()}, "json is a object"),
        ({"json": "no JSON"}, "the parser does not take"),
        ({"names": []}, "names is empty"),
        ({"names": ["a", "-b"]}, "names has '-b' among others"),
        ({"names": ["a", 1]}, "names is .*, which the parser reads as"),
        ({"names": "a"}, "names is 'a', which the parser reads as .'a'."),
        ({"devices": [0, 1]}, "devices is .0, 1., which the parser reads as"),
        ({"devices": ["a", "b"]}, "devices is .*, which the parser reads as"),
        ({"pair": [1]}, "expected 2 arguments"),
        ({"model": "-m"}, "by its place"),
        ({"config": {"width": 2, "json": "[", 3: 1}}, "has the key 3"),
    ],
    ids=lambda value: str(value).partition(" at 0x")[0],  # an object's place is another in each process
)
def test_what_cannot_be_said_is_refused_by_name(config, said):
    if said is None:
        assert round_trip(config, make_parser()) == {"count": 3}  # the option's own reading of a string
        return
    with pytest.raises(WorkerError, match=said):
        lines(config)


def test_nothing_is_said_on_the_terminal(capsys):
    with pytest.raises(WorkerError):
        lines({"choice": "c"})
    assert capsys.readouterr() == ("", "")


def test_what_a_parser_requires_has_to_be_there():
    parser = make_parser()
    parser.add_argument("--path", required=True)
    with pytest.raises(WorkerError, match="required: --path"):
        command_line({"count": 3}, parser)
    assert command_line({"count": 3, "path": "a"}, parser) == ["--count", "3", "--path", "a"]


def test_a_file_of_words_is_not_read(tmp_path):
    words = tmp_path / "words"
    words.write_text("--eager\n")
    config = {"name": f"@{words}"}
    assert round_trip(config, make_parser(fromfile_prefix_chars="@")) == config


def test_negative_numbers_beside_options_that_look_like_them():
    parser = make_parser()
    parser.add_argument("-1", dest="one", action="store_true")
    assert round_trip({"numbers": [-1]}, parser) == {"numbers": [-1]}
    with pytest.raises(WorkerError, match="numbers has '-2'"):
        command_line({"numbers": [1, -2]}, parser)


def test_two_dashes_are_what_they_were_or_refused():
    """Python 3.11 takes them out of every value."""
    if make_parser().parse_args(["--name=--"]).name == "--":
        assert round_trip({"name": "--"}, make_parser()) == {"name": "--"}
    else:
        with pytest.raises(WorkerError, match="name is '--', which the parser reads as"):
            command_line({"name": "--"}, make_parser())


def test_none_is_the_default():
    assert round_trip({"count": None, "name": None}, make_parser()) == {"count": 4, "name": None}


def test_an_engines_own_exception_is_one_of_ours():
    parser = argparse.ArgumentParser()
    parser.add_argument("--x", type=lambda text: {}[text])
    with pytest.raises(WorkerError, match="KeyError"):
        command_line({"x": "a"}, parser)


TEXT = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=8).filter("--".__ne__) | st.sampled_from(
    ["-", "-c", "--eager", "--no-eager", "-1", "-0.5", "--name=x", "@a", "serve", "=", "", " -x", "{", "null"]
)
PLAIN = TEXT.filter(lambda text: not text.startswith("-"))
NUMBER = st.floats(allow_nan=False, allow_infinity=False)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | NUMBER | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=8,
)
CONFIGS = st.fixed_dictionaries(
    {},
    optional={
        "model": PLAIN,
        "eager": st.booleans(),
        "prefix-caching": st.booleans(),
        "chunked": st.booleans(),
        "flag": st.booleans(),
        "on": st.booleans(),
        "const": st.sampled_from([3, 7]),
        "name": TEXT,
        "other_name": TEXT,
        "maybe": TEXT.filter(lambda text: text not in ("", "None")),
        "count": st.integers(),
        "share": NUMBER,
        "size": st.integers(),
        "choice": st.sampled_from("ab"),
        "token": st.just(True) | TEXT,
        "names": st.lists(PLAIN, min_size=1) | TEXT.map(lambda text: [text]),
        "numbers": st.lists(st.integers(), min_size=1),
        "shares": st.lists(st.floats(min_value=-1e3, max_value=1e3).map(lambda x: round(x, 3))),
        "pair": st.lists(st.integers(), min_size=2, max_size=2),
        "chosen": st.lists(PLAIN),
        "again": st.lists(TEXT),
        "json": JSON.filter(lambda value: value is not None and not isinstance(value, str)),
        "jsons": st.lists(st.lists(JSON), min_size=1),
        "loud": st.integers(),
    },
)


@given(CONFIGS, st.randoms(use_true_random=False))
def test_parsing_gives_the_configuration_back(config, random):
    """Read by argparse alone, in whatever order the options come."""
    keys = list(config)
    random.shuffle(keys)
    words = lines({key: config[key] for key in keys})
    assert all(type(word) is str for word in words)
    parsed = vars(make_parser().parse_args(words))
    untouched = vars(make_parser().parse_args([]))
    wanted = {{"loud": "log_level"}.get(key, key).replace("-", "_"): value for key, value in config.items()}
    assert parsed == {**untouched, **wanted}
    assert json.dumps(parsed, default=str) == json.dumps({**untouched, **wanted}, default=str)  # True is not 1 there
    assert round_trip(config, make_parser()) == config
