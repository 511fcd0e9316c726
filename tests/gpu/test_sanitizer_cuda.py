"""compute-sanitizer, of CUDA's toolkit, over the kernels: no access outside memory, no race within a program over memory that its
threads share. Without the tool these tests fail."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = Path(__file__).with_name("sanitized.py")
FOUND = 99


def watched(tool: str, *words: str) -> subprocess.CompletedProcess[str]:
    apart = ["--padding", "256"] if tool == "memcheck" else []  # else an access beside memory may be one in the next
    command = ["compute-sanitizer", "--tool", tool, *apart, "--error-exitcode", str(FOUND), sys.executable, str(PROGRAM), *words]
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)


@pytest.mark.parametrize("tool", ["memcheck", "racecheck", "synccheck"])
def test_b1_kernels_are_clean(tool):
    run = watched(tool)
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-1000:]
    assert "reached the end" in run.stdout


def test_a_kernel_that_reads_too_far_is_told():
    run = watched("memcheck", "wrong")
    assert run.returncode == FOUND, run.stdout[-3000:] + run.stderr[-1000:]
    assert "Invalid __global__ read" in run.stdout
