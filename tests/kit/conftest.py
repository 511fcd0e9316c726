from __future__ import annotations

from collections.abc import Callable

import pytest

from rollout_core.testing import search


@pytest.fixture
def shrinking(monkeypatch: pytest.MonkeyPatch) -> Callable[[bool], None]:
    """Called with whether the smallest case is wanted: then the search gives up when Hypothesis does, after five minutes."""
    return lambda wanted: monkeypatch.setattr(search, "SHRINK_SECONDS", 300.0 if wanted else 1.0)
