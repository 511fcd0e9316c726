"""Mutation testing of rollout_core.bucketing with its unit tests: `nox -s mutation` (docs/mutation.md).

One process imports torch and collects the tests; every mutant is a fork of it. A mutant inside a function is made by giving the
function other code, and runs the tests that cover its line, likely killers first, until one fails. A mutant that takes effect at
import (a table, a decorator, a field's default) is a fork from before the import, and runs all tests.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import functools
import importlib.abc
import importlib.machinery
import importlib.metadata
import importlib.util
import json
import os
import pickle
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
import tomllib
import types
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from inspect import getattr_static
from pathlib import Path
from typing import Any

os.environ["ROLLOUT_CORE_HYPOTHESIS"] = "mutation"
os.environ["OMP_NUM_THREADS"] = "1"

import coverage
import pytest

sys.path.insert(0, str(Path(__file__).parent))
from mutants import Mutant, mutants_of

ROOT = Path(__file__).parents[2]
TESTS = "tests/unit/bucketing"
PACKAGE = "rollout_core.bucketing"
EXPLAINED = Path(__file__).with_name("equivalent.toml")
MINIMUM = 0.95
#: Seconds for one test: a constant for a busy machine, and a multiple of what the test takes without a mutant.
PATIENCE, PATIENCE_FACTOR, IMPORT_PATIENCE = 5.0, 10.0, 60.0
MEMORY = 6 << 30  # bytes that a mutant may map more than its parent: an absurd size fails, and does not fill the machine
BROKEN = 70  # exit status of a process that could not make its mutant: no kill
QUIET = ("-q", "-x", "-s", "--tb=no", "--no-header", "--no-summary", "-p", "no:cacheprovider", "-o", "faulthandler_timeout=0")


@dataclass
class Outcome:
    mutant: Mutant
    status: str  # killed, timeout, crash or survived
    by: str  # the test that failed, or was running
    seconds: float


# ------------------------------------------------------------------------------------------------------------------ processes


def run_all(tasks: Iterable[Any], work: Callable[[Any, int], None], jobs: int) -> Iterator[tuple[Any, int, str, float]]:
    """Run ``work(task, note)`` for each task in a fork of its own: (task, wait status, what it wrote to file ``note``, seconds)."""
    running: dict[int, tuple[Any, Path, float]] = {}
    tasks = iter(tasks)
    waiting = next(tasks, None)
    while running or waiting is not None:
        if waiting is not None and len(running) < jobs:
            folder = Path(tempfile.mkdtemp(prefix="mutation-"))
            (folder / "note").touch()
            child = os.fork()
            if child == 0:
                _child(functools.partial(work, waiting), folder)
            running[child] = (waiting, folder, time.monotonic())
            waiting = next(tasks, None)
            continue
        child, status = os.wait()
        task, folder, start = running.pop(child)
        written = (folder / "note").read_text()
        shutil.rmtree(folder, ignore_errors=True)
        yield task, status, written, time.monotonic() - start


def _child(work: Callable[[int], None], folder: Path) -> None:
    try:
        silence = os.open(os.devnull, os.O_RDWR)
        for stream in (0, 1, 2):
            os.dup2(silence, stream)
        os.environ["PYTEST_DEBUG_TEMPROOT"] = tempfile.tempdir = str(folder)
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        limit = pages * resource.getpagesize() + MEMORY
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        work(os.open(folder / "note", os.O_WRONLY))
    except BaseException:  # whatever a mutant raises past pytest is a kill as well
        os._exit(1)
    os._exit(0)


class Watch:
    """Lets a process die of SIGALRM when a test takes too long, tells the parent which test runs, and sees the first failure."""

    def __init__(self, note: int, seconds: dict[str, float]) -> None:
        self._note, self._seconds = note, seconds
        self.failed = False
        self.took: dict[str, float] = defaultdict(float)

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        signal.setitimer(signal.ITIMER_REAL, PATIENCE + PATIENCE_FACTOR * self._seconds.get(nodeid, 2.0))
        os.ftruncate(self._note, 0)
        os.pwrite(self._note, nodeid.encode("utf-8", "backslashreplace"), 0)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self.failed |= report.failed
        self.took[report.nodeid] += report.duration


def must_survive(mutants: list[Mutant], work: Callable[[Mutant, int], None]) -> None:
    """Stop unless all tests pass, in another order too, on a mutant that changes nothing."""
    for _, status, by, _ in run_all([mutant.unchanged() for mutant in mutants], work, 1):
        if status:
            raise SystemExit(f"the tests fail without a mutant ({by}); run them with ROLLOUT_CORE_HYPOTHESIS=mutation")


def measure(file: Path, note: int) -> None:
    """Run all tests without a mutant, and write the seconds of each."""
    watch = Watch(note, {})
    if pytest.main([*QUIET, TESTS], plugins=[watch]):
        os._exit(1)
    file.write_bytes(pickle.dumps(dict(watch.took)))


def outcome(mutant: Mutant, status: int, by: str, seconds: float) -> Outcome:
    if os.WIFEXITED(status) and os.WEXITSTATUS(status) == BROKEN:
        raise SystemExit(f"this mutant could not be made: {mutant.key}")
    if os.WIFSIGNALED(status):
        return Outcome(mutant, "timeout" if os.WTERMSIG(status) == signal.SIGALRM else "crash", by, seconds)
    return Outcome(mutant, "killed" if os.WEXITSTATUS(status) else "survived", by, seconds)


# ------------------------------------------------------------------------------------------------- mutants that act at import


class Instead(importlib.abc.MetaPathFinder):
    """Imports the mutant in the place of its module."""

    def __init__(self, mutant: Mutant) -> None:
        self._module, self._tree = mutant.module, mutant.apply()

    def find_spec(self, name: str, path: Any, target: Any = None) -> Any:
        if name != self._module:
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path)
        tree = self._tree

        class Loader(importlib.machinery.SourceFileLoader):
            def get_code(self, fullname: str) -> types.CodeType:
                return compile(tree, self.path, "exec", dont_inherit=True)

        spec.loader = Loader(name, spec.origin)
        return spec


class AtImport:
    """Imports and runs everything anew for each mutant: likely killers first, then the fast tests."""

    def __init__(self, seconds: dict[str, float]) -> None:
        self._seconds = seconds
        self._kills: dict[str, Counter[str]] = defaultdict(Counter)

    def run_all(self, mutants: list[Mutant], jobs: int) -> Iterator[Outcome]:
        must_survive(mutants[:1], self._run)
        for mutant, status, by, seconds in run_all(mutants, self._run, jobs):
            result = outcome(mutant, status, by, seconds)
            if result.status != "survived":
                self._kills[mutant.module][by] += 1
            yield result

    def _run(self, mutant: Mutant, note: int) -> None:
        signal.setitimer(signal.ITIMER_REAL, IMPORT_PATIENCE)
        self._instead = Instead(mutant)
        sys.meta_path.insert(0, self._instead)
        self._kills_here = self._kills[mutant.module]
        if pytest.main([*QUIET, TESTS], plugins=[Watch(note, self._seconds), self]):
            os._exit(1)

    def pytest_sessionstart(self) -> None:
        # pytest rewrites the modules of a distribution that has a plugin, as this one has: its finder would come first.
        sys.meta_path.remove(self._instead)
        sys.meta_path.insert(0, self._instead)

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        items.sort(key=lambda item: (-self._kills_here[item.nodeid], self._seconds.get(item.nodeid, 0.0)))


# ------------------------------------------------------------------------------------------------------ mutants in functions


def install(mutant: Mutant) -> None:
    """Give the function that holds the mutant its changed code and defaults."""
    names = mutant.scope.split(".")
    owner: Any = sys.modules[mutant.module]
    for name in names[:-1]:
        owner = getattr_static(owner, name)
    function: Any = getattr_static(owner, names[-1])
    for inner in ("fget", "func", "__func__"):  # property, cached_property, classmethod
        function = getattr(function, inner, None) or function
    tree = mutant.apply()
    code = compile(tree, function.__code__.co_filename, "exec", dont_inherit=True)
    definition: Any = tree
    for name in names:
        code = next(const for const in code.co_consts if isinstance(const, types.CodeType) and const.co_name == name)
        definition = next(node for node in definition.body if getattr(node, "name", None) == name)

    def value(node: ast.expr) -> Any:
        return eval(compile(ast.Expression(node), "<default>", "eval"), function.__globals__)

    arguments = definition.args
    function.__code__ = code
    function.__defaults__ = tuple(map(value, arguments.defaults)) or None
    named = zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True)
    function.__kwdefaults__ = {argument.arg: value(node) for argument, node in named if node} or None


class Campaign:
    """A pytest plugin that, in the place of running the collected tests, runs them on mutants."""

    def __init__(self, mutants: list[Mutant], jobs: int, seconds: dict[str, float], note: Callable[[Outcome], None]) -> None:
        self._mutants, self._jobs, self._seconds, self._note = mutants, jobs, seconds, note
        self._kills: dict[str, Counter[int]] = defaultdict(Counter)

    def pytest_runtestloop(self, session: pytest.Session) -> bool:
        self._items = session.items
        self._hook = session.config.hook
        self._manager = session.config.pluginmanager
        with tempfile.TemporaryDirectory(prefix="mutation-") as folder:
            file = Path(folder, "lines")
            list(run_all([file], self._lines_of_each, 1))
            self._covering = pickle.loads(file.read_bytes())
        must_survive(self._mutants[:1], self._run)
        places = {item.nodeid: place for place, item in enumerate(self._items)}
        for mutant, status, written, seconds in run_all(self._mutants, self._run, self._jobs):
            result = outcome(mutant, status, written, seconds)
            if result.status != "survived":
                self._kills[mutant.name][places.get(result.by, -1)] += 1
            self._note(result)
        return True

    def _lines_of_each(self, file: Path, note: int) -> None:
        """Which tests run each line of each module. A test that measures memory may fail here: it finds that of the recorder."""
        package = Path(sys.modules[PACKAGE].__file__).parent
        recorder = coverage.Coverage(data_file=None, config_file=False, include=[f"{package}/*"])
        recorder.start()
        for item, after in self._with_next(range(len(self._items))):
            recorder.switch_context(item.nodeid)
            self._hook.pytest_runtest_protocol(item=item, nextitem=after)
        recorder.stop()
        data = recorder.get_data()
        places = {item.nodeid: place for place, item in enumerate(self._items)}
        covering = {}
        for name, module in sys.modules.items():
            if name.startswith(PACKAGE):
                lines = data.contexts_by_lineno(module.__file__)
                covering[name] = {line: {places[test] for test in tests if test} for line, tests in lines.items()}
        file.write_bytes(pickle.dumps(covering))

    def _run(self, mutant: Mutant, note: int) -> None:
        watch = Watch(note, self._seconds)
        self._manager.register(watch)
        try:
            install(mutant)
        except Exception:
            os._exit(BROKEN)
        for item, after in self._with_next(self._order(mutant)):
            self._hook.pytest_runtest_protocol(item=item, nextitem=after)
            if watch.failed:
                os._exit(1)

    def _order(self, mutant: Mutant) -> list[int]:
        """The tests that cover the mutant: first those that killed its neighbours, then the fast ones."""
        covering = self._covering[mutant.module]
        tests = set().union(*(covering.get(line, ()) for line in mutant.lines)) if mutant.key else range(len(self._items))
        kills = self._kills[mutant.name]
        return sorted(tests, key=lambda place: (-kills[place], self._seconds[self._items[place].nodeid]))

    def _with_next(self, places: Iterable[int]) -> Iterator[tuple[pytest.Item, pytest.Item | None]]:
        items = [self._items[place] for place in places]
        return zip(items, [*items[1:], None], strict=False)


# ----------------------------------------------------------------------------------------------------------------- the session


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--module", action="append", help="only this module, for example placement; may be given again")
    parser.add_argument("--match", default="", help="only mutants whose name contains this")
    parser.add_argument("--kind", choices=["import", "function"], help="only mutants that act at import, or those inside functions")
    parser.add_argument("--sample", type=int, help="only so many mutants, drawn with --seed")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--survivors-of", type=Path, metavar="REPORT", help="only those that survived there or are not in it")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="mutants at a time (default: one per core)")
    parser.add_argument("--list", action="store_true", help="name the mutants and run none")
    parser.add_argument("--explained", action="store_true", help="print equivalent.toml as docs/mutation.md has it, and run none")
    parser.add_argument("--report", type=Path, help="write every mutant's outcome there, as JSON lines")
    options = parser.parse_args()
    os.chdir(ROOT)

    # find_spec of the parent package only: importing bucketing here would be before the mutants that act at import.
    folder = Path(importlib.util.find_spec("rollout_core").submodule_search_locations[0], "bucketing")
    every = [mutant for path in sorted(folder.glob("*.py")) for mutant in mutants_of(f"{PACKAGE}.{path.stem}", path)]
    entries = tomllib.loads(EXPLAINED.read_text()).get("equivalent", [])
    explained = {key for entry in entries for key in entry["mutants"]}
    chosen = [m for m in every if options.match in m.key and (not options.module or m.module.rpartition(".")[2] in options.module)]
    if options.kind:
        chosen = [mutant for mutant in chosen if bool(mutant.scope) == (options.kind == "function")]
    if options.survivors_of:
        outcomes = map(json.loads, options.survivors_of.read_text().splitlines())
        dead = {entry["key"] for entry in outcomes if entry["status"] != "survived"}
        chosen = [mutant for mutant in chosen if mutant.key not in dead]
    if options.sample is not None:
        chosen = random.Random(options.seed).sample(chosen, min(options.sample, len(chosen)))
    if options.explained:
        for entry in entries:
            print(f"\n{entry['reason']}\n", "```text", *entry["mutants"], "```", sep="\n")
        return 0
    if options.list:
        print(*(mutant.key for mutant in chosen), sep="\n")
        return 0

    results: list[Outcome] = []
    began = time.monotonic()

    def note(result: Outcome) -> None:
        results.append(result)
        if result.status == "survived" and result.mutant.key not in explained:
            print(f"SURVIVED {result.mutant.key}", flush=True)
        if len(results) % 100 == 0:
            print(f"{len(results)} of {len(chosen)}, {time.monotonic() - began:.0f} s", flush=True)
        if options.report:
            line = {"key": result.mutant.key, "status": result.status, "by": result.by, "seconds": round(result.seconds, 3)}
            with options.report.open("a") as file:
                file.write(json.dumps(line) + "\n")

    import safetensors.torch  # noqa: F401  # what takes long to import is imported once, for every mutant
    import torch
    import torch.distributed.tensor

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="mutation-") as folder:
        file = Path(folder, "seconds")
        ((_, status, by, _),) = run_all([file], measure, 1)
        if status:
            raise SystemExit(f"the tests fail without a mutant ({by}); run them with ROLLOUT_CORE_HYPOTHESIS=mutation")
        took = pickle.loads(file.read_bytes())
    for result in AtImport(took).run_all([mutant for mutant in chosen if not mutant.scope], options.jobs):
        note(result)
    inside = [mutant for mutant in chosen if mutant.scope]
    if inside and pytest.main([*QUIET, TESTS], plugins=[Campaign(inside, options.jobs, took, note)]) not in (0, 5):
        return 2
    return verdict(results, {mutant.key for mutant in every}, explained, time.monotonic() - began)


def verdict(results: list[Outcome], every: set[str], explained: set[str], seconds: float) -> int:
    count = Counter(result.status for result in results)
    survivors = {result.mutant.key for result in results if result.status == "survived"}
    dead = {result.mutant.key for result in results} - survivors
    score = 1 - len(survivors) / max(len(results), 1)
    unexplained = sorted(survivors - explained)
    stale = sorted(explained - every) + sorted(dead & explained)
    print(
        f"{len(results)} mutants: killed by tests {count['killed']}, by timeouts {count['timeout']}, by crashes {count['crash']}; "
        f"survived {len(survivors)}, {len(survivors) - len(unexplained)} of them explained; {score:.2%} killed; {seconds:.0f} s"
    )
    tools = ("torch", "numpy", "msgspec", "pytest", "hypothesis", "coverage")
    print("Python", sys.version.split()[0], *(f"{name} {importlib.metadata.version(name)}" for name in tools))
    for key in unexplained:
        print(f"not killed and not in {EXPLAINED.name}: {key}")
    for key in stale:
        print(f"stale in {EXPLAINED.name} (no such mutant, or it was killed): {key}")
    too_low = score < MINIMUM and len(results) == len(every)  # a part of the mutants may well be the part that survives
    if too_low:
        print(f"the score is below {MINIMUM:.0%}")
    return 1 if unexplained or stale or too_low else 0


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        sys.exit(main())
    sys.exit(130)
