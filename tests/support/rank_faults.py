"""Real engines on two ranks, in one of which something goes wrong: a file says what, ``RANK KIND``, such as ``1 fails``.

``fails``: it does not take the next update's tensors. ``changes NAME``: once it has committed it, it changes the first value of its
part of a parameter. The rest of the engine is as it comes.
"""

from __future__ import annotations

import os
from pathlib import Path

import torch

from rollout_core.errors import WorkerError

FILE = "ROLLOUT_CORE_TEST_FAULT"


def fault_of(rank):
    """What goes wrong in this rank now."""
    number, _, kind = Path(os.environ[FILE]).read_text().partition(" ")
    return kind if number == str(rank) else ""


def fail(pairs):
    raise WorkerError("this rank cannot load")


@torch.no_grad()
def change(model, name):
    dict(model.named_parameters())[name].view(-1)[0] += 1
