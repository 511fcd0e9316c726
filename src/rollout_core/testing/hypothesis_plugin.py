"""The entry point that Hypothesis calls when it is imported: ``st.from_type(TensorSpec)`` and ``st.from_type(BucketPlan)`` work.

Nothing heavy is imported here: the types are registered when their modules are, and their strategies are loaded when one is asked
for.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any, Final

#: Module -> its type and the strategy for it, by name.
_TYPES: Final = {
    "rollout_core.bucketing.specs": ("TensorSpec", "tensor_specs"),
    "rollout_core.bucketing.plan": ("BucketPlan", "plans"),
}


def register() -> None:
    """Register the types whose modules are loaded, and see to the others once they are."""
    waiting = set()
    for name in _TYPES:
        module = sys.modules.get(name)
        if module is not None:
            _register(module)
        else:
            waiting.add(name)
    if waiting:
        sys.meta_path.insert(0, _AfterImport(waiting))


def _register(module: ModuleType) -> None:
    from hypothesis import strategies as st

    type_name, strategy_name = _TYPES[module.__name__]

    def strategy(_type: Any) -> Any:
        from rollout_core.testing import strategies

        return getattr(strategies, strategy_name)()

    st.register_type_strategy(getattr(module, type_name), strategy)


class _AfterImport(MetaPathFinder):
    """Finds the modules that are waited for as the other finders do, and registers their types after they have run."""

    def __init__(self, waiting: set[str]) -> None:
        self._waiting = waiting

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name not in self._waiting:
            return None
        self._waiting.discard(name)  # what follows asks the other finders, and must not come back here
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.loader is not None:
            spec.loader = _ThenRegister(spec.loader)
        return spec


class _ThenRegister(Loader):
    """A loader that registers the module's type after another one has run the module."""

    def __init__(self, loader: Loader) -> None:
        self._loader = loader  # may be shared by many modules, so it is wrapped and not changed

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self._loader.exec_module(module)
        _register(module)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loader, name)
