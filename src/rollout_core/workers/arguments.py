"""Command lines out of configurations, such that an engine's own parser gives the configuration back."""

from __future__ import annotations

import argparse
import contextlib
import difflib
import io
import json
import math
import os
from collections.abc import Mapping, Sequence, Set
from typing import Any, Final

from rollout_core.errors import WorkerError

_MANY: Final = ("+", "*")


def command_line(config: Mapping[str, Any], parser: argparse.ArgumentParser) -> list[str]:
    """The words that ``parser`` reads ``config`` from. Names are those of the parser's options, or what it stores them as, with
    dashes or underscores; values are None, bools, numbers, strings, paths, and lists and mappings of these.

    - None is left out, and so has the parser's default. True is ``--x``; False is ``--no-x``, or left out where it is the default.
    - A list is one value after another, ``--x`` again and again, or JSON, as the option takes it; a mapping is JSON, and so are
      lists and mappings within a list. NaN and infinities are refused, and so are mappings whose keys are no strings.
    - A value that looks like an option is ``--x=-v``; among several of one option only a negative number can look so.

    The words are read by the parser before they are given out. Raises ``WorkerError``, naming the option, for what it does not
    have, does not take, or would read as something else. Options that the parser requires have to be in ``config``.
    """
    chosen = _chosen(config, parser)
    values = {key: _plain(config[key], key) for key in chosen}
    positional = [key for key, action in chosen.items() if not action.option_strings]
    words: list[str] = []
    for key in [*positional, *(key for key in chosen if key not in positional)]:  # an option of many values would take these too
        if values[key] is not None:
            words += _words(key, values[key], chosen[key], parser)
    _check(values, chosen, words, parser)
    return words


def round_trip(config: Mapping[str, Any], parser: argparse.ArgumentParser) -> dict[str, Any]:
    """What the parser reads from ``command_line(config, parser)``, under the keys of ``config``: parsed, and for None the default.

    Raises as ``command_line`` does.
    """
    parsed = _parsed(command_line(config, parser), parser)
    return {key: getattr(parsed, action.dest) for key, action in _chosen(config, parser).items()}


def _chosen(config: Mapping[str, Any], parser: argparse.ArgumentParser) -> dict[str, argparse.Action]:
    """The option of each key."""
    actions = [action for action in parser._actions if not isinstance(action, _NO_OPTIONS)]
    by_name = {action.dest: action for action in reversed(actions)}  # of several that store the same, the first
    by_name |= {_bare(name): action for action in actions for name in action.option_strings if name.startswith("--")}
    chosen: dict[str, argparse.Action] = {}
    for key in config:
        action = by_name.get(_bare(key)) if isinstance(key, str) else None
        if action is None:
            near = difflib.get_close_matches(str(key), by_name, 1)
            raise WorkerError(f"there is no option {key!r}" + (f": did you mean {near[0]!r}?" if near else ""))
        if isinstance(action, argparse.BooleanOptionalAction) and _negative(action) == "--" + _bare(key).replace("_", "-"):
            raise WorkerError(f"{key} is the negation of an option: give {action.dest} True or False")
        twin = next((other for other, taken in chosen.items() if taken.dest == action.dest), None)
        if twin is not None:
            raise WorkerError(f"{key} and {twin} are one option: give one of them")
        chosen[key] = action
    return chosen


_NO_OPTIONS: Final = (argparse._HelpAction, argparse._VersionAction, argparse._SubParsersAction)


def _bare(name: str) -> str:
    return name.removeprefix("--").replace("-", "_")


def _words(key: str, value: Any, action: argparse.Action, parser: argparse.ArgumentParser) -> list[str]:
    name = _name(action)
    if isinstance(action, argparse.BooleanOptionalAction):
        if not isinstance(value, bool):
            raise WorkerError(f"{key} is {value!r}: it takes True or False")
        return [name if value else _negative(action)]
    if action.nargs == 0:
        return _flag(key, value, action)
    if isinstance(action, argparse._AppendAction) and isinstance(value, list) and action.nargs is None:
        return [word for item in value for word in _one(name, _text(item), parser)]
    if isinstance(value, list) and (action.nargs in _MANY or isinstance(action.nargs, int)):
        return _many(key, name, [_text(item) for item in value], action, parser)
    if action.nargs == "?" and value is not False and value == action.const and isinstance(value, type(action.const)):
        return [name]
    return _one(name, _text(value), parser)


def _flag(key: str, value: Any, action: argparse.Action) -> list[str]:
    if value == action.const and type(value) is type(action.const):
        return [_name(action)]
    if value == action.default and type(value) is type(action.default):
        return []
    raise WorkerError(
        f"{key} is {value!r}, which {_name(action)} cannot say: it gives {action.const!r}, and {action.default!r} without"
    )


def _one(name: str, text: str, parser: argparse.ArgumentParser) -> list[str]:
    if not name:
        if _is_taken_for_another(text, parser):
            raise WorkerError(f"{text!r} looks like an option: it cannot be given by its place")
        return [text]
    return [f"{name}={text}"] if _is_taken_for_another(text, parser) else [name, text]


def _many(key: str, name: str, texts: list[str], action: argparse.Action, parser: argparse.ArgumentParser) -> list[str]:
    if len(texts) == 1 and name and isinstance(action.nargs, str):
        return _one(name, texts[0], parser)
    if not texts and action.nargs != "*":
        if action.default in ([], (), set()):
            return []
        raise WorkerError(f"{key} is empty: {name or key} takes at least one value; leave it out, or None, for its default")
    for text in texts:
        if _is_taken_for_another(text, parser, is_number_one=False):
            raise WorkerError(f"{key} has {text!r} among others, which looks like an option: {name or key} can have it alone only")
    return [*([name] if name else []), *texts]


def _is_taken_for_another(text: str, parser: argparse.ArgumentParser, *, is_number_one: bool = True) -> bool:
    """Whether it looks like an option, or names a file to read words from."""
    if not is_number_one and not parser._has_negative_number_optionals and parser._negative_number_matcher.match(text):
        return False
    return text.startswith(tuple(parser.prefix_chars) + tuple(parser.fromfile_prefix_chars or ""))


def _name(action: argparse.Action) -> str:
    """The option's long name, or any; ``""`` for one that has its value by its place."""
    names = [name for name in action.option_strings if name.startswith("--")] or list(action.option_strings)
    return names[0] if names else ""


def _negative(action: argparse.Action) -> str:
    return "--no-" + _name(action)[2:]


def _plain(value: Any, where: str) -> Any:
    """A value as JSON has it."""
    if value is None or isinstance(value, bool | int):
        return value
    if isinstance(value, float):
        if not math.isfinite(value):
            raise WorkerError(f"{where} is {value!r}: JSON has no such number")
        return value
    if isinstance(value, os.PathLike):
        value = os.fspath(value)
    if isinstance(value, str):
        if "\0" in value or any("\ud800" <= character <= "\udfff" for character in value):
            raise WorkerError(f"{where} is {value!r}: a command line has no NUL and no surrogates")
        return value
    if isinstance(value, Mapping):
        for key in value:
            if not isinstance(key, str):
                raise WorkerError(f"{where} has the key {key!r}: pass strings, as JSON has no other keys")
        return {_plain(key, where): _plain(inner, f"{where}.{key}") for key, inner in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, bytes | bytearray):
        return [_plain(inner, f"{where}[{position}]") for position, inner in enumerate(value)]
    raise WorkerError(f"{where} is a {type(value).__name__}: pass None, bools, numbers, strings, lists and mappings")


def _text(value: Any) -> str:
    """One value as one word."""
    return value if isinstance(value, str) else json.dumps(value, allow_nan=False)


def _check(
    values: Mapping[str, Any], chosen: Mapping[str, argparse.Action], words: list[str], parser: argparse.ArgumentParser
) -> None:
    parsed = _parsed(words, parser)
    for key, value in values.items():
        read = getattr(parsed, chosen[key].dest, None)
        if value is not None and not _is_same(value, read, chosen[key], parser):
            raise WorkerError(f"{key} is {value!r}, which the parser reads as {read!r}: give it as the option takes it")


def _parsed(words: list[str], parser: argparse.ArgumentParser) -> argparse.Namespace:
    shown = io.StringIO()
    try:
        with contextlib.redirect_stderr(shown):
            return parser.parse_args(list(words))
    except SystemExit:
        said = shown.getvalue().strip().splitlines()
        raise WorkerError(f"the parser does not take {words}: {said[-1] if said else 'it does not say why'}") from None
    except Exception as error:  # a parser of an engine's own may raise what it likes
        raise WorkerError(f"the parser does not take {words}: {type(error).__name__}: {error}") from error


def _is_same(given: Any, read: Any, action: argparse.Action, parser: argparse.ArgumentParser) -> bool:
    """Whether what was read is the plain value that was given, or what the option makes of its words: ``1k`` is a number to some
    options, JSON a configuration of the engine's own to others."""
    if _equals(given, read):
        return True
    if isinstance(given, dict) and isinstance(read, str):
        return _equals(given, json.loads(read))  # an option that keeps JSON as text
    is_one_word = action.nargs is None and not isinstance(action, argparse._AppendAction)
    if isinstance(given, list) and isinstance(read, Set):
        return len(read) == len(given) and all(item in read for item in given if not isinstance(item, list | dict))
    if isinstance(given, list) and is_one_word:
        return False  # JSON that was not read as JSON
    try:
        made = _made(given, action, parser)
    except Exception:  # an engine's own code may raise what it likes
        return False
    if isinstance(given, list):
        same_length = all(isinstance(each, list | tuple) and len(each) == len(given) for each in (read, made))
        return same_length and all(_is_made_of(*each) for each in zip(given, read, made, strict=True))
    return _is_made_of(given, read, made)


def _made(given: Any, action: argparse.Action, parser: argparse.ArgumentParser) -> Any:
    """What the option makes of a value's words, without a command line in between."""
    read = action.type if callable(action.type) else str
    made: Any = [read(_text(item)) for item in given] if isinstance(given, list) else read(_text(given))
    if type(action).__module__ == argparse.__name__:
        return made
    # An action of the engine's own may make more of it.
    into = argparse.Namespace()
    action(parser, into, made, _name(action) or None)
    return getattr(into, action.dest)


def _is_made_of(given: Any, read: Any, made: Any) -> bool:
    if _equals(given, read):
        return True
    if isinstance(given, str):
        return read is not None and (made == read or repr(made) == repr(read))  # None: it was not given
    if not isinstance(given, dict) or isinstance(read, Mapping) or type(made) is not type(read):
        return False
    # The rest of it are the engine's defaults, some of them new each time.
    both = [(getattr(read, key, None), getattr(made, key, None)) for key in given]
    return all(hasattr(read, key) for key in given) and all(one == other or repr(one) == repr(other) for one, other in both)


def _equals(given: Any, read: Any) -> bool:
    if isinstance(given, bool) or isinstance(read, bool) or given is None:
        return given is read
    if isinstance(given, list):
        is_list = isinstance(read, list | tuple) and len(read) == len(given)
        return is_list and all(_equals(one, other) for one, other in zip(given, read, strict=True))
    if isinstance(given, dict):
        return isinstance(read, Mapping) and given.keys() == read.keys() and all(_equals(given[key], read[key]) for key in given)
    return bool(given == read)
