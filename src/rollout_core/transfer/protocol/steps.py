"""What happens to a machine (events) and what it asks for (actions). The driver carries actions out and answers with events."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

from rollout_core.transfer.protocol.messages import Cause, Envelope, Filled, Hello

# Events of both machines.


@dataclass(frozen=True, slots=True)
class Came:
    """A message came, from receiver ``peer`` (0 at the receiver, which has one peer)."""

    envelope: Envelope
    peer: int = 0


@dataclass(frozen=True, slots=True)
class Gone:
    """The way to ``peer`` is lost: it closed it, or ended."""

    reason: str
    peer: int = 0


@dataclass(frozen=True, slots=True)
class Failed:
    """Something went wrong at this end, whatever it was doing. Where that was a ``Pack`` or a ``Load``, what ends those follows
    (``SourceEnded``, ``Loaded``): until then the slot is in use."""

    cause: Cause


@dataclass(frozen=True, slots=True)
class Tick:
    """Time has passed."""


# Events of the sender.


@dataclass(frozen=True, slots=True)
class Begin:
    """The caller wants the update."""


@dataclass(frozen=True, slots=True)
class Packed:
    """The bucket asked for by ``Pack`` lies in its slot."""

    filled: Filled


@dataclass(frozen=True, slots=True)
class SourceEnded:
    """There was no further bucket to pack: a ``Pack`` is over without one."""


@dataclass(frozen=True, slots=True)
class Pushed:
    """This end's part in moving a bucket is over."""

    index: int


# Events of the receiver.


@dataclass(frozen=True, slots=True)
class Examined:
    """The plan and version of the ``Hello`` are fine."""

    version: int  # of the weights here


@dataclass(frozen=True, slots=True)
class Pulled:
    """A bucket's bytes are here."""

    index: int


@dataclass(frozen=True, slots=True)
class Loaded:
    """A bucket was verified and loaded, unless ``Failed`` said otherwise before; nothing of it is read any more."""

    index: int


@dataclass(frozen=True, slots=True)
class Prepared:
    """All buckets are there, and everything that can fail before the commit has not."""


@dataclass(frozen=True, slots=True)
class Applied:
    """The weights are those of the new version."""


SenderEvent: TypeAlias = Came | Gone | Failed | Tick | Begin | Packed | SourceEnded | Pushed
ReceiverEvent: TypeAlias = Came | Gone | Failed | Tick | Examined | Pulled | Loaded | Prepared | Applied


# Actions of both machines.


@dataclass(frozen=True, slots=True)
class Post:
    """Send a message to ``peer``."""

    envelope: Envelope
    peer: int = 0


@dataclass(frozen=True, slots=True)
class Done:
    """The update is over: well if ``cause`` is None. ``reusable``: the carrier is quiet and can take another."""

    cause: Cause | None
    reusable: bool


# Actions of the sender.


@dataclass(frozen=True, slots=True)
class Pack:
    """Fill a free slot with the next bucket; answered by ``Packed``, ``SourceEnded`` or ``Failed``."""

    index: int
    slot: int


@dataclass(frozen=True, slots=True)
class Push:
    """Move a slot's bytes; answered by ``Pushed`` or ``Failed``."""

    index: int
    slot: int
    nbytes: int


# Actions of the receiver.


@dataclass(frozen=True, slots=True)
class Examine:
    """Look at the plan and version, and make ready for the slots; answered by ``Examined`` or ``Failed``."""

    hello: Hello


@dataclass(frozen=True, slots=True)
class Pull:
    """Get a bucket's bytes; answered by ``Pulled`` or ``Failed``."""

    index: int
    slot: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class Load:
    """Verify a bucket and load it; answered by ``Loaded`` or ``Failed``."""

    filled: Filled

    @property
    def index(self) -> int:
        return self.filled.index


@dataclass(frozen=True, slots=True)
class Prepare:
    """Make sure that nothing is missing; answered by ``Prepared`` or ``Failed``."""


@dataclass(frozen=True, slots=True)
class Apply:
    """Make the new version count; answered by ``Applied`` or ``Failed``."""

    version: int


SenderAction: TypeAlias = Post | Pack | Push | Done
ReceiverAction: TypeAlias = Post | Examine | Pull | Load | Prepare | Apply | Done
