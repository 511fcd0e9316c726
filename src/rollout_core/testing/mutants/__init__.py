"""Mutants: the reference packer with one bug each, most of them bugs that trainers have shipped. The kit has to find every one by
the clause that it breaks: so is the kit itself tested. ``python -m rollout_core.testing.mutants`` runs them and prints the table.
"""

from rollout_core.testing.mutants import content, layout, ownership, protocol, sources
from rollout_core.testing.mutants.registry import MUTANTS, Mutant

__all__ = ["MUTANTS", "Mutant", "content", "layout", "ownership", "protocol", "sources"]
