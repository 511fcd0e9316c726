"""The NCCL carrier between two GPUs, and how near it comes to plain broadcasts of the same bytes."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

RANK = Path(__file__).with_name("nccl_rank.py")


def test_an_update_over_nccl_arrives_and_costs_what_broadcasts_cost():
    if torch.cuda.device_count() < 2:
        pytest.fail("these tests need two GPUs")
    ranks = torch.cuda.device_count()
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    words = [[sys.executable, str(RANK), str(rank), str(ranks), str(port)] for rank in range(ranks)]
    started = [subprocess.Popen(one, env=environment, stdout=subprocess.PIPE, text=True) for one in words]
    try:
        said = [process.communicate(timeout=240)[0] for process in started]
    finally:
        for process in started:
            process.kill()
    assert [process.returncode for process in started] == [0] * ranks
    found = [json.loads(one.splitlines()[-1]) for one in said]
    assert len({one["hash"] for one in found}) == 1
    sender = found[0]
    gib = sender["nbytes"] / 2**30
    for kind in ("unverified", "verified"):
        print(
            f"\n{kind}: {gib / sender[kind]:.1f} GiB/s to {ranks - 1} ranks, broadcasts alone {gib / sender['floor']:.1f}: "
            f"{sender[kind] / sender['floor']:.2f} times as long",
            end="",
        )
