"""Envelopes as bytes: MessagePack, never pickle."""

from __future__ import annotations

from typing import Final

import msgspec

from rollout_core.errors import TransferError
from rollout_core.transfer.protocol.messages import Envelope

#: More than any manifest may have (see ``BucketPlan.from_bytes``); what is longer is not read.
MAX_NBYTES: Final = 80 << 20
_ENCODER: Final = msgspec.msgpack.Encoder()
_DECODER: Final = msgspec.msgpack.Decoder(Envelope)


def encode(envelope: Envelope) -> bytes:
    return _ENCODER.encode(envelope)


def decode(data: bytes) -> Envelope:
    """The envelope, or ``TransferError`` for what is none."""
    if len(data) > MAX_NBYTES:
        raise TransferError(f"a message of {len(data)} bytes; none has more than {MAX_NBYTES}")
    try:
        return _DECODER.decode(data)
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise TransferError(f"{len(data)} bytes that are no message of this protocol: {error}") from error
