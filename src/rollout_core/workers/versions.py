"""Which versions of the engines are served."""

from __future__ import annotations

import re
from typing import Final

from rollout_core.errors import WorkerError

#: The oldest that has what the workers use, with what that is. docs/workers.md says which were tested.
_OLDEST: Final = {
    "vLLM": ((0, 26), "its calls for updates of weights"),
    "SGLang": ((0, 5, 17), "loaders of weights, and versions of them"),
}


def check_version(engine: str, found: str) -> None:
    """Raise ``WorkerError`` for a version that is too old, or no version."""
    oldest, why = _OLDEST[engine]
    match = re.match(r"(\d+)\.(\d+)(?:\.(\d+))?", found)
    if match is None:
        raise WorkerError(f"{engine} says that it is version {found!r}, which is none")
    if tuple(int(part or 0) for part in match.groups()) < oldest:
        words = ".".join(map(str, oldest))
        raise WorkerError(f"{engine} {found} is not served: from {words} on it has {why}; install a newer one")
