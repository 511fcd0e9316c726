"""Errors of one process in another: as plain text on the way, and raised as the same class on the other side."""

from __future__ import annotations

import traceback

import rollout_core.errors
from rollout_core.errors import RolloutCoreError
from rollout_core.transfer.protocol.messages import Cause


def cause_of(error: BaseException) -> Cause:
    """Class, text and traceback of an error."""
    texts = (str(error), "".join(traceback.format_exception(error)))
    # A name out of a manifest may hold what UTF-8 cannot.
    message, trace = (text.encode("utf-8", "backslashreplace").decode() for text in texts)
    return Cause(type(error).__name__, message, trace)


def error_of(cause: Cause, otherwise: type[RolloutCoreError], *, who: str) -> RolloutCoreError:
    """The error again. One that is not of this package becomes ``otherwise``, with its class in the text. ``who`` failed, as in
    "the worker"; the traceback of there is a note."""
    kind = getattr(rollout_core.errors, cause.kind, None)
    if isinstance(kind, type) and issubclass(kind, RolloutCoreError):
        error: RolloutCoreError = kind(cause.message)
    else:
        error = otherwise(f"{who} failed with {cause.kind}: {cause.message}")
    if cause.trace:
        error.add_note(f"in {who} process:\n{cause.trace}")
    return error
