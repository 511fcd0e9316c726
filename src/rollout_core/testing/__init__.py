"""The conformance kit: Hypothesis strategies, oracles, and checks that find the smallest input on which a packer breaks a clause.

    from rollout_core.testing import check_packer
    print(check_packer(MyPacker))

Importing this package loads neither torch nor hypothesis; a name is loaded when it is first used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from rollout_core.testing import machines, oracles, strategies
    from rollout_core.testing.adapters import functions_packer, grouping_packer
    from rollout_core.testing.isolation import SubjectError
    from rollout_core.testing.packers import CAPABILITIES
    from rollout_core.testing.parametrize import parametrize_packer_checks
    from rollout_core.testing.registry import Check, Violation, get_check, select_checks
    from rollout_core.testing.report import Report, Result
    from rollout_core.testing.runner import check_packer, replay

_HOMES: Final = {
    "CAPABILITIES": "packers",
    "Check": "registry",
    "Report": "report",
    "Result": "report",
    "SubjectError": "isolation",
    "Violation": "registry",
    "check_packer": "runner",
    "functions_packer": "adapters",
    "get_check": "registry",
    "grouping_packer": "adapters",
    "parametrize_packer_checks": "parametrize",
    "replay": "runner",
    "select_checks": "registry",
}
_MODULES: Final = ("machines", "oracles", "strategies")

__all__ = [
    "CAPABILITIES",
    "Check",
    "Report",
    "Result",
    "SubjectError",
    "Violation",
    "check_packer",
    "functions_packer",
    "get_check",
    "grouping_packer",
    "machines",
    "oracles",
    "parametrize_packer_checks",
    "replay",
    "select_checks",
    "strategies",
]


def __getattr__(name: str) -> Any:
    import importlib

    if name in _MODULES:
        return importlib.import_module(f"{__name__}.{name}")
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{home}"), name)


def __dir__() -> list[str]:
    return __all__
