from __future__ import annotations

from collections.abc import Callable

import pytest

from rollout_core.testing import search


@pytest.fixture
def shrink_to_the_end(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Called where the smallest case is compared: however slow the machine, the search does not give up shrinking before it."""
    return lambda: monkeypatch.setattr(search, "SHRINK_SECONDS", 600.0)
