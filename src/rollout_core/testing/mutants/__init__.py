"""Mutants: the reference packer, this project's tracker, the reference carrier and the fake worker with one bug each, most of them
bugs that trainers have shipped. The kit has to find every one by the clause that it breaks: so is the kit itself tested.
``python -m rollout_core.testing.mutants`` runs them and prints the tables.
"""

from rollout_core.testing.mutants import (
    carrier_messages,
    carrier_slots,
    content,
    layout,
    ownership,
    protocol,
    sources,
    tracker_arrays,
    tracker_cuts,
    tracker_ids,
    tracker_items,
    tracker_media,
    tracker_states,
    worker_requests,
    worker_weights,
)
from rollout_core.testing.mutants.registry import MUTANTS, SOUND, Mutant, mutants_of

__all__ = [
    "MUTANTS",
    "SOUND",
    "Mutant",
    "carrier_messages",
    "carrier_slots",
    "content",
    "layout",
    "mutants_of",
    "ownership",
    "protocol",
    "sources",
    "tracker_arrays",
    "tracker_cuts",
    "tracker_ids",
    "tracker_items",
    "tracker_media",
    "tracker_states",
    "worker_requests",
    "worker_weights",
]
