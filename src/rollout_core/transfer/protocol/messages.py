"""What sender and receiver tell each other in one update. Tensor bytes travel beside these, in slots that a carrier provides."""

from __future__ import annotations

from typing import Annotated, Final, TypeAlias

import msgspec

#: Version of what is said, and in which order. Both ends speak the same one, or the update is refused.
PROTOCOL: Final = 1
#: How long an end bears silence. Less would have the other speak without end, and what is no number could not be compared.
Seconds: TypeAlias = Annotated[float, msgspec.Meta(ge=1e-6)]


class Cause(msgspec.Struct, frozen=True, array_like=True):
    """Why an update failed: the class of the error and its text, and on the other end its traceback."""

    kind: str
    message: str
    trace: str = ""


class Hello(msgspec.Struct, frozen=True, tag=True):
    """Sender: an update begins. Nothing else moves before every receiver has said ``Welcome`` (clause B7)."""

    protocol: int
    version: int  # of the weights, once committed
    plan_digest: bytes  # 16 bytes; empty for a stream, whose buckets carry their layouts
    manifest: bytes  # the plan, so that a refusal can name the first difference; empty for a stream
    slots: int  # buffers that buckets travel in
    slot_nbytes: int  # bytes of each
    rendezvous: bool  # whether moving a bucket takes both ends at once, as a collective does
    ticket: bytes  # how the receiver's carrier reaches the slots
    timeout: Seconds  # of silence that the sender bears


class Welcome(msgspec.Struct, frozen=True, tag=True):
    """Receiver: the plan and the version are fine."""

    version: int  # of the weights it has
    timeout: Seconds  # of silence that the receiver bears


class Filled(msgspec.Struct, frozen=True, tag=True):
    """Sender: a bucket lies in a slot, or with ``rendezvous`` is about to be moved. The slot is the receiver's until ``Free``."""

    index: int
    slot: int
    nbytes: int
    plan_digest: bytes
    algorithm: str
    digest: bytes | None
    header: bytes  # a stream's layout of this bucket; empty with a plan


class Free(msgspec.Struct, frozen=True, tag=True):
    """Receiver: nothing of this bucket is read any more; its slot may be written."""

    index: int


class End(msgspec.Struct, frozen=True, tag=True):
    """Sender: that was the last bucket."""

    buckets: int


class Ready(msgspec.Struct, frozen=True, tag=True):
    """Receiver: everything arrived, was verified, and is applied or staged."""


class Commit(msgspec.Struct, frozen=True, tag=True):
    """Sender: every receiver is ready; the version counts from here."""


class Committed(msgspec.Struct, frozen=True, tag=True):
    """Receiver: the weights are those of this version."""

    version: int


class Abort(msgspec.Struct, frozen=True, tag=True):
    """Either end: the update has failed. The sender says how many buckets it announced: those are moved to their end, so that no
    collective is left half done, and dropped."""

    cause: Cause
    announced: int = 0


class Aborted(msgspec.Struct, frozen=True, tag=True):
    """Receiver: nothing of the update is under way here. ``cause`` if it failed here, after ``Commit``."""

    cause: Cause | None = None


class Beat(msgspec.Struct, frozen=True, tag=True):
    """Either end: still here, with nothing to say."""


FromSender: TypeAlias = Hello | Filled | End | Commit | Abort | Beat
FromReceiver: TypeAlias = Welcome | Free | Ready | Committed | Abort | Aborted | Beat
Body: TypeAlias = FromSender | FromReceiver


class Envelope(msgspec.Struct, frozen=True, array_like=True):
    """A message with its update and its place in it: what comes late, twice or out of order is told apart."""

    attempt: int  # one number for one update, not used again on this carrier
    number: int  # from 0, on each way between two ends
    body: Body
