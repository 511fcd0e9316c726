"""Real engines on two ranks, in one of which something goes wrong: a file says what, ``RANK KIND``, such as ``1 fails``.

``fails``: it takes some of the next update's tensors, and no more. ``changes NAME``: once it has committed it, it changes the first
value of its part of a parameter. The rest of the engine is as it comes.
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


def failing(load):
    """A target's ``load`` that works once: after that its weights are neither the old nor the new ones."""
    loaded = []

    def load_once(pairs):
        if loaded:
            raise WorkerError("this rank cannot load")
        load(pairs)
        loaded.append(True)

    return load_once


@torch.no_grad()
def change(model, name):
    dict(model.named_parameters())[name].view(-1)[0] += 1
