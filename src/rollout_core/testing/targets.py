"""What is to be checked, by name: ``package.module:attribute``, or the short name of a shipped adapter."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Mapping
from typing import Any, Final

from rollout_core.testing.isolation import Subject, SubjectError
from rollout_core.testing.packers import CAPABILITIES, PackerUnderTest, resolve
from rollout_core.testing.peers import PEERS, TRACKER_PEERS
from rollout_core.testing.registry import SubjectKind

#: This project's own packers.
OWN: Final = {
    "rollout_core": "rollout_core.testing.own:PlannedPacker",
    "rollout_core-stream": "rollout_core.testing.own:StreamPacker",
    "rollout_core-grouping": "rollout_core.testing.own:GroupingPacker",
    "reference": "rollout_core.testing.reference:ReferencePacker",
}
#: This project's own trackers.
OWN_TRACKERS: Final = {
    "rollout_core-tracker": "rollout_core.testing.own_tracker:ConversationTracker",
    "rollout_core-segments": "rollout_core.testing.own_tracker:SegmentsTracker",
}
#: This project's own carriers that work within one process, and one with which both ends take part in every move.
OWN_CARRIERS: Final = {
    "rollout_core-local": "rollout_core.transfer.carriers.local:local_carrier",
    "rollout_core-memory": "rollout_core.testing.own_carriers:memory_carrier",
    "reference-carrier": "rollout_core.testing.reference_carrier:ReferenceCarrier",
}
#: A worker whose engine is a hash, in a thread of this process.
OWN_WORKERS: Final = {"fake-worker": "rollout_core.testing.fake_engine:FakeWorker"}
_ALL_OWN: Final = {**OWN, **OWN_TRACKERS, **OWN_CARRIERS, **OWN_WORKERS}


def full_name(target: str) -> str:
    """``package.module:attribute`` for a short name; what is no short name comes back as it is. ``SubjectError`` for neither."""
    if target in _ALL_OWN:
        return _ALL_OWN[target]
    if target in PEERS:
        return PEERS[target].target
    if target in TRACKER_PEERS:
        return TRACKER_PEERS[target].target
    module, colon, attribute = target.partition(":")
    if not (module and colon and attribute):
        shipped = ", ".join([*_ALL_OWN, *PEERS, *TRACKER_PEERS])
        raise SubjectError(f"{target!r} is neither package.module:attribute nor a shipped adapter ({shipped})")
    return target


def load_target(target: str) -> Any:
    """The object of a name. Modules in the working directory are found too. ``SubjectError`` says what of the name is wrong."""
    module_name, _, path = full_name(target).partition(":")
    if os.getcwd() not in sys.path and "" not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        found: Any = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name and (module_name == error.name or module_name.startswith(error.name + ".")):
            raise SubjectError(
                f"{target}: there is no module {error.name!r} (searched the working directory and sys.path)"
            ) from error
        raise SubjectError(f"{target}: importing {module_name} failed: {error}") from error
    except ImportError as error:
        raise SubjectError(f"{target}: importing {module_name} failed: {error}") from error
    for part in path.split("."):
        if not hasattr(found, part):
            raise SubjectError(f"{target}: {module_name} has no {path!r}")
        found = getattr(found, part)
    return found


def wrap(kind: SubjectKind, target: Any, phase: Any) -> Subject:
    """A target as the checks of its kind call it. ``TypeError`` if it is no such subject."""
    if kind == "packer":
        return PackerUnderTest(resolve(target), phase)
    if kind == "tracker":
        from rollout_core.testing.trackers import TrackerUnderTest

        return TrackerUnderTest(target, phase)
    if kind == "carrier":
        from rollout_core.testing.carriers import CarrierUnderTest

        return CarrierUnderTest(target, phase)
    from rollout_core.testing.workers import WorkerUnderTest

    return WorkerUnderTest(target, phase=phase)


def kind_of(target: Any) -> SubjectKind:
    """What a target is meant to be: a carrier if it takes ``receivers``, a worker if it takes ``folder`` or is a class of workers,
    a tracker if it has a tracker's methods or takes a processor, else a packer."""
    from rollout_core.testing.carriers import looks_like_a_carrier
    from rollout_core.testing.trackers import looks_like_a_tracker
    from rollout_core.testing.workers import looks_like_a_worker

    if looks_like_a_carrier(target):
        return "carrier"
    if looks_like_a_worker(target):
        return "worker"
    return "tracker" if looks_like_a_tracker(target) else "packer"


def capability_words(kind: str) -> Mapping[str, str]:
    """What a subject of a kind may have beyond what it must: name -> what it is."""
    if kind == "tracker":
        from rollout_core.testing.trackers import TRACKER_CAPABILITIES

        return TRACKER_CAPABILITIES
    if kind == "carrier":
        from rollout_core.testing.carriers import CARRIER_CAPABILITIES

        return CARRIER_CAPABILITIES
    if kind == "worker":
        from rollout_core.testing.workers import WORKER_CAPABILITIES

        return WORKER_CAPABILITIES
    return CAPABILITIES
