"""The checks, by what they are about. Importing this registers them all."""

from rollout_core.testing.checks import (
    agreement,
    conservation,
    end,
    integrity,
    layout,
    manifest,
    memory,
    names,
    ownership,
    sources,
)

__all__ = ["agreement", "conservation", "end", "integrity", "layout", "manifest", "memory", "names", "ownership", "sources"]
