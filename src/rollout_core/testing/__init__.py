"""The conformance kit: Hypothesis strategies, oracles, and checks that find the smallest input on which a subject breaks a clause.

    from rollout_core.testing import check_carrier, check_packer, check_tracker, check_worker
    print(check_packer(MyPacker))
    print(check_tracker(MyTracker))
    print(check_carrier(my_carrier))
    print(check_worker(MyWorker))

Importing this package loads neither torch nor hypothesis; a name is loaded when it is first used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from rollout_core.testing import machines, oracles, strategies, worlds
    from rollout_core.testing.adapters import functions_packer, grouping_packer
    from rollout_core.testing.carriers import CARRIER_CAPABILITIES
    from rollout_core.testing.isolation import SubjectError
    from rollout_core.testing.packers import CAPABILITIES
    from rollout_core.testing.parametrize import (
        parametrize_carrier_checks,
        parametrize_packer_checks,
        parametrize_tracker_checks,
        parametrize_worker_checks,
    )
    from rollout_core.testing.registry import Check, Violation, get_check, select_checks
    from rollout_core.testing.report import Report, Result
    from rollout_core.testing.runner import check_carrier, check_packer, check_tracker, check_worker, recheck, replay
    from rollout_core.testing.trackers import TRACKER_CAPABILITIES
    from rollout_core.testing.workers import WORKER_CAPABILITIES
    from rollout_core.testing.worlds import make_world, register_world

_HOMES: Final = {
    "CAPABILITIES": "packers",
    "CARRIER_CAPABILITIES": "carriers",
    "Check": "registry",
    "Report": "report",
    "Result": "report",
    "SubjectError": "isolation",
    "TRACKER_CAPABILITIES": "trackers",
    "Violation": "registry",
    "WORKER_CAPABILITIES": "workers",
    "check_carrier": "runner",
    "check_packer": "runner",
    "check_tracker": "runner",
    "check_worker": "runner",
    "functions_packer": "adapters",
    "get_check": "registry",
    "grouping_packer": "adapters",
    "make_world": "worlds",
    "parametrize_carrier_checks": "parametrize",
    "parametrize_packer_checks": "parametrize",
    "parametrize_tracker_checks": "parametrize",
    "parametrize_worker_checks": "parametrize",
    "recheck": "runner",
    "register_world": "worlds",
    "replay": "runner",
    "select_checks": "registry",
}
_MODULES: Final = ("machines", "oracles", "strategies", "worlds")

__all__ = [
    "CAPABILITIES",
    "CARRIER_CAPABILITIES",
    "TRACKER_CAPABILITIES",
    "WORKER_CAPABILITIES",
    "Check",
    "Report",
    "Result",
    "SubjectError",
    "Violation",
    "check_carrier",
    "check_packer",
    "check_tracker",
    "check_worker",
    "functions_packer",
    "get_check",
    "grouping_packer",
    "machines",
    "make_world",
    "oracles",
    "parametrize_carrier_checks",
    "parametrize_packer_checks",
    "parametrize_tracker_checks",
    "parametrize_worker_checks",
    "recheck",
    "register_world",
    "replay",
    "select_checks",
    "strategies",
    "worlds",
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
