"""Errors of one process in another: as plain text on the way, and raised as the same class on the other side."""

from __future__ import annotations

import traceback
from collections.abc import Callable

import rollout_core.errors
from rollout_core.errors import RolloutCoreError
from rollout_core.transfer.protocol.messages import Cause


def cause_of(error: BaseException) -> Cause:
    """Class, text and traceback of an error. The text of one that is not of this package begins with its class. One that is more
    special than ``rollout_core.errors`` says is the nearest that stands there."""
    public = (kind.__name__ for kind in type(error).__mro__ if getattr(rollout_core.errors, kind.__name__, None) is kind)
    name = next(public, type(error).__name__)
    message = str(error) if isinstance(error, RolloutCoreError) else f"{name}: {error}" if str(error) else name
    # A name out of a manifest may hold what UTF-8 cannot.
    texts = (message, "".join(traceback.format_exception(error)))
    return Cause(name, *(text.encode("utf-8", "backslashreplace").decode() for text in texts))


def error_of(cause: Cause, otherwise: Callable[[str], RolloutCoreError]) -> RolloutCoreError:
    """The error again; ``otherwise`` for one that is not of this package. The traceback of the other process is a note."""
    kind = getattr(rollout_core.errors, cause.kind, None)
    ours = isinstance(kind, type) and issubclass(kind, RolloutCoreError)
    error: RolloutCoreError = (kind if ours and kind else otherwise)(cause.message)
    if cause.trace:
        error.add_note(f"in the other process:\n{cause.trace}")
    return error
