"""What happens to a machine (events) and what it asks for (actions). The driver carries actions out and answers with events."""

from __future__ import annotations

from typing import TypeAlias

import msgspec

from rollout_core.transfer.protocol.messages import Cause, Envelope, Filled, Hello

# Events of both machines.


class Came(msgspec.Struct, frozen=True):
    """A message came, from receiver ``peer`` (0 at the receiver, which has one peer)."""

    envelope: Envelope
    peer: int = 0


class Gone(msgspec.Struct, frozen=True):
    """The way to ``peer`` is lost: it closed it, or ended."""

    reason: str
    peer: int = 0


class Failed(msgspec.Struct, frozen=True):
    """Something went wrong at this end, whatever it was doing. Where that was a ``Pack`` or a ``Load``, what ends those follows
    (``SourceEnded``, ``Loaded``): until then the slot is in use."""

    cause: Cause


class Tick(msgspec.Struct, frozen=True):
    """Time has passed."""


# Events of the sender.


class Begin(msgspec.Struct, frozen=True):
    """The caller wants the update."""


class Packed(msgspec.Struct, frozen=True):
    """The bucket asked for by ``Pack`` lies in its slot."""

    filled: Filled


class SourceEnded(msgspec.Struct, frozen=True):
    """There was no further bucket to pack: a ``Pack`` is over without one."""


class Pushed(msgspec.Struct, frozen=True):
    """This end's part in moving a bucket is over. ``digest``: of its bytes, if ``Packed`` came without; a bucket that is announced
    before it is moved has to have it by then."""

    index: int
    digest: bytes | None = None


# Events of the receiver.


class Examined(msgspec.Struct, frozen=True):
    """The plan and version of the ``Hello`` are fine."""

    version: int  # of the weights here


class Pulled(msgspec.Struct, frozen=True):
    """A bucket's bytes are here."""

    index: int


class Loaded(msgspec.Struct, frozen=True):
    """A bucket was verified and loaded, unless ``Failed`` said otherwise before; nothing of it is read any more."""

    index: int


class Prepared(msgspec.Struct, frozen=True):
    """All buckets are there, and everything that can fail before the commit has not."""


class Applied(msgspec.Struct, frozen=True):
    """The weights are those of the new version."""


SenderEvent: TypeAlias = Came | Gone | Failed | Tick | Begin | Packed | SourceEnded | Pushed
ReceiverEvent: TypeAlias = Came | Gone | Failed | Tick | Examined | Pulled | Loaded | Prepared | Applied


# Actions of both machines.


class Post(msgspec.Struct, frozen=True):
    """Send a message to ``peer``."""

    envelope: Envelope
    peer: int = 0


class Done(msgspec.Struct, frozen=True):
    """The update is over: well if ``cause`` is None. ``reusable``: the carrier is quiet and can take another."""

    cause: Cause | None
    reusable: bool


# Actions of the sender.


class Pack(msgspec.Struct, frozen=True):
    """Fill a free slot with the next bucket; answered by ``Packed``, ``SourceEnded`` or ``Failed``."""

    index: int
    slot: int


class Push(msgspec.Struct, frozen=True):
    """Move a slot's bytes; answered by ``Pushed`` or ``Failed``."""

    index: int
    slot: int
    nbytes: int


# Actions of the receiver.


class Examine(msgspec.Struct, frozen=True):
    """Look at the plan and version, and make ready for the slots; answered by ``Examined`` or ``Failed``."""

    hello: Hello


class Pull(msgspec.Struct, frozen=True):
    """Get a bucket's bytes; answered by ``Pulled`` or ``Failed``."""

    index: int
    slot: int
    nbytes: int


class Load(msgspec.Struct, frozen=True):
    """Verify a bucket and load it; answered by ``Loaded`` or ``Failed``."""

    filled: Filled

    @property
    def index(self) -> int:
        return self.filled.index


class Prepare(msgspec.Struct, frozen=True):
    """Make sure that nothing is missing; answered by ``Prepared`` or ``Failed``."""


class Apply(msgspec.Struct, frozen=True):
    """Make the new version count; answered by ``Applied`` or ``Failed``."""

    version: int


SenderAction: TypeAlias = Post | Pack | Push | Done
ReceiverAction: TypeAlias = Post | Examine | Pull | Load | Prepare | Apply | Done
