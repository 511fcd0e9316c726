"""This project's own carriers between processes, as carriers under test: all ends in one process."""

from __future__ import annotations

import socket

from rollout_core.transfer.carriers.memory import MemoryReceiver, MemorySender


def memory_carrier(receivers: int) -> tuple[MemorySender, list[MemoryReceiver]]:
    """The shared memory carrier, its ends connected by socket pairs."""
    pairs = [socket.socketpair() for _ in range(receivers)]
    try:
        sender = MemorySender([ours for ours, _ in pairs])
        return sender, [MemoryReceiver(theirs) for _, theirs in pairs]
    finally:
        for pair in pairs:  # duplicated by the ends
            for one in pair:
                one.close()
