"""Import single modules of a peer without running the packages around them.

``import vllm.distributed.weight_transfer.packed_tensor`` first runs ``vllm/__init__.py`` and everything that it imports, which
takes minutes, a GPU build or both. A ``PeerPackage`` runs the wanted module's own file, unmodified, and puts shells in place of
the packages above it. Inside the ``with`` block of a ``PeerPackage`` its modules stand in ``sys.modules``, because a peer's
functions import more modules when they run and its pickles name their classes by module. Outside the block they do not: a program
that uses the real package as well finds it untouched.

A peer that the program has imported already is used as it is.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.machinery
import importlib.metadata
import sys
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any
from unittest import mock

from rollout_core.errors import RolloutCoreError


class PeerMissingError(RolloutCoreError, ImportError):
    """A peer's distribution is not installed; the message names the command that installs it."""


class PeerVersionWarning(UserWarning):
    """A peer's distribution is installed in another version than the one that its adapter was written for."""


class StubUsedError(RolloutCoreError):
    """Code under test called into a module that was stubbed because it should never be used."""


def installed_version(distribution: str, tested: str) -> str:
    """The version of an installed distribution. Raises PeerMissingError; warns if it is not the tested one."""
    try:
        found = importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        raise PeerMissingError(
            f"{distribution} is not installed: run `pip install --no-deps {distribution}=={tested}`, "
            "then install what rollout_core/testing/peers/requirements.txt lists for it"
        ) from None
    if found.partition("+")[0] != tested:
        warnings.warn(
            f"{distribution} {found} is installed; the adapter was tested with {tested}", PeerVersionWarning, stacklevel=3
        )
    return found


class _StubType(type):
    """Type of every name taken from a stub, so that the name serves as base class, decorator, annotation and enum alike."""

    _sealed: Callable[[], bool]

    def __getattr__(cls, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        cls._refuse(name)
        return _stub_name(f"{cls.__name__}.{name}", cls._sealed)

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        if "_stub" not in cls.__dict__:  # a class of the peer that derives from a stub
            return super().__call__(*args, **kwargs)
        cls._refuse("()")
        # A bare decorator returns what it decorates, a decorator with arguments returns such a decorator.
        return args[0] if len(args) == 1 and callable(args[0]) and not kwargs else (lambda decorated: decorated)

    def _refuse(cls, what: str) -> None:
        if cls._sealed():
            raise StubUsedError(f"the peer used {cls.__name__} ({what}), which its adapter stubs as never used")


def _stub_name(name: str, sealed: Callable[[], bool]) -> Any:
    return _StubType(name, (), {"_stub": True, "_sealed": staticmethod(sealed)})


def _add_stub_names(module: ModuleType, sealed: Callable[[], bool]) -> ModuleType:
    """Let every name be imported from a module. Once sealed, no name that was not imported before can be taken or called."""

    def __getattr__(name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        if sealed():
            raise StubUsedError(f"the peer used {module.__name__}.{name}, which its adapter stubs as never used")
        value = _stub_name(f"{module.__name__}.{name}", sealed)
        setattr(module, name, value)
        return value

    module.__getattr__ = __getattr__  # type: ignore[method-assign]
    return module


class _ShellLoader:
    """Creates a package without running its file."""

    def __init__(self, stub: Callable[[ModuleType], ModuleType] | None) -> None:
        self._stub = stub

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        module = ModuleType(spec.name)
        return self._stub(module) if self._stub else module

    def exec_module(self, module: ModuleType) -> None:
        """Nothing runs: that is the point."""


class PeerPackage:
    """One package of an installed distribution, loaded module by module.

    ``run_init`` names the subpackages whose own ``__init__`` must run, because the code under test takes names from it. ``stubs``
    maps module names to the reason why each may be replaced by an empty module that hands out any name: it is imported at the top
    of a file and not used by the code under test. Use of a stub after the import raises StubUsedError.
    """

    def __init__(
        self, distribution: str, version: str, package: str, *, run_init: Sequence[str] = (), stubs: dict[str, str] | None = None
    ) -> None:
        self.distribution, self.version, self.package = distribution, version, package
        self.stubs = dict(stubs or {})
        self._run_init = frozenset(run_init)
        self._own: dict[str, ModuleType] = {}
        self._displaced: dict[str, ModuleType] = {}
        self._depth = 0
        self._loading = 0
        self._real = False
        self._lock = threading.RLock()

    def load(self, name: str) -> ModuleType:
        """The module, its own file run as it is."""
        installed_version(self.distribution, self.version)
        with self:
            self._loading += 1
            try:
                return importlib.import_module(name)
            finally:
                self._loading -= 1

    def __enter__(self) -> PeerPackage:
        with self._lock:
            if self._depth == 0:
                # Once loaded from shells, always from shells: a peer's classes must not exist twice in one round trip.
                self._real = self.package in sys.modules and not self._own
                if not self._real:
                    ours = {*self._own, *(name for name in sys.modules if self._is_inside(name))}
                    self._displaced = {name: sys.modules.pop(name) for name in ours if name in sys.modules}
                    sys.modules.update(self._own)
                    sys.meta_path.insert(0, self)
            self._depth += 1
        return self

    def __exit__(self, *exc_info: object) -> None:
        with self._lock:
            self._depth -= 1
            if self._depth == 0 and not self._real:
                sys.meta_path.remove(self)
                # Only what this package brought: the peer's third-party imports are real modules, and stay.
                self._own = {name: module for name, module in sys.modules.items() if self._is_ours(name, module)}
                for name in self._own:
                    del sys.modules[name]
                sys.modules.update(self._displaced)
                self._displaced = {}

    def find_spec(self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None) -> ModuleSpec | None:
        """The import system's hook: shells for packages, stubs for stubs, the normal course for everything else."""
        inside = self._is_inside(name)
        if not inside and name not in self.stubs:
            return None
        stub = self._stub if name in self.stubs else None
        if not inside:
            spec = ModuleSpec(name, _ShellLoader(stub), is_package=True)  # type: ignore[arg-type]
            spec.submodule_search_locations = []
            return spec
        found = importlib.machinery.PathFinder.find_spec(name, path)
        if found is None or found.submodule_search_locations is None:
            return ModuleSpec(name, _ShellLoader(stub)) if stub else found  # type: ignore[arg-type]
        if name in self._run_init:
            return found
        shell = ModuleSpec(name, _ShellLoader(stub), is_package=True)  # type: ignore[arg-type]
        shell.submodule_search_locations = list(found.submodule_search_locations)
        return shell

    def _stub(self, module: ModuleType) -> ModuleType:
        return _add_stub_names(module, lambda: self._loading == 0)

    def _is_inside(self, name: str) -> bool:
        return name == self.package or name.startswith(self.package + ".")

    def _is_ours(self, name: str, module: ModuleType) -> bool:
        loader = getattr(getattr(module, "__spec__", None), "loader", None)
        return self._is_inside(name) or (name in self.stubs and isinstance(loader, _ShellLoader))


@contextlib.contextmanager
def replaced(module: ModuleType, **names: Any) -> Iterator[None]:
    """Replace names in one module's globals for the length of a call. The module's code stays as it is."""
    with contextlib.ExitStack() as stack:
        for name, value in names.items():
            stack.enter_context(mock.patch.object(module, name, value))
        yield


class Overlay:
    """A module seen through replacements of some of its attributes: everything not replaced is the module's own."""

    def __init__(self, module: Any, **attributes: Any) -> None:
        self.__dict__.update(attributes)
        self.__dict__["_module"] = module

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_module"], name)
