"""Stands in for triton on a machine without a GPU: modules and kernels of any name can be imported and defined, none can be run."""

from __future__ import annotations

import sys
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any


class _Kernel:
    """What ``@triton.jit`` leaves of a function."""

    def __init__(self, function: Any) -> None:
        self.fn = function
        self.__name__ = getattr(function, "__name__", "kernel")
        self.__doc__ = getattr(function, "__doc__", None)

    def __getitem__(self, grid: Any) -> Any:
        raise NotImplementedError(f"triton kernel {self.__name__} needs a GPU; this triton is a stand-in")

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self[None]


class _Base:
    """A class of triton's that somebody inherits from, or makes."""

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__()

    def __init__(self, *args: Any, **options: Any) -> None:
        pass


class _Anything(ModuleType):
    """A module in which every name is found: a class where it begins with a capital, else a module that can be called."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.__path__: list[str] = []
        self.__file__ = __file__

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") and name.endswith("__"):
            raise AttributeError(name)
        full = f"{self.__name__}.{name}"
        if full in sys.modules:
            return sys.modules[full]
        found: Any
        if name[:1].isupper():
            found = type(name, (_Base,), {"__module__": self.__name__})
        else:
            found = sys.modules[full] = _Anything(full)
            found.__spec__ = ModuleSpec(full, _Finder, is_package=True)
        setattr(self, name, found)
        return found

    def __call__(self, *args: Any, **options: Any) -> Any:
        """As a decorator, with arguments or without."""

        def decorate(function: Any) -> Any:
            return function if isinstance(function, _Kernel | type) else _Kernel(function)

        return decorate(args[0]) if len(args) == 1 and callable(args[0]) and not options else decorate


class _Finder(MetaPathFinder, Loader):
    @classmethod
    def find_spec(cls, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        return ModuleSpec(name, cls, is_package=True) if name.startswith("triton.") else None

    @classmethod
    def create_module(cls, spec: ModuleSpec) -> ModuleType:
        return _Anything(spec.name)

    @classmethod
    def exec_module(cls, module: ModuleType) -> None:
        pass


sys.meta_path.insert(0, _Finder)
_triton: Any = _Anything("triton")
_triton.__spec__ = __spec__
_triton.__version__ = "3.0.0"
_triton.cdiv = lambda a, b: -(-a // b)
_triton.next_power_of_2 = lambda n: 1 << (n - 1).bit_length() if n > 0 else 1
sys.modules["triton"] = _triton
