"""The examples as a user runs them, on the engine of ROLLOUT_CORE_ENGINE. One that is missing fails them: none is skipped."""

import importlib.util
import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

ENGINE = os.environ.get("ROLLOUT_CORE_ENGINE", "hf")
#: The example with pictures takes minutes where an engine starts: on HF in every run, on the others under this. Without learning
#: all are alike: HF only.
collect_ignore = [] if ENGINE == "hf" or os.environ.get("ROLLOUT_CORE_EXAMPLES") == "all" else ["test_pictures.py"]
collect_ignore += [] if ENGINE == "hf" else ["test_without_learning.py"]
FOLDER = Path(__file__).parents[2] / "examples"
STEP = re.compile(r"^step (\d+)  reward (\d\.\d+)  .*weights (\d+) in (\d+) buckets.*logprobs differ by (\S+)$", re.MULTILINE)


@dataclass(frozen=True)
class Run:
    """What an example printed, and each step of it: number, reward, weight version, buckets, largest difference of logprobs."""

    code: int
    out: str
    err: str
    steps: list[tuple[int, float, int, int, float]]

    def rise(self) -> float:
        """Of the mean reward, from the first five steps to the last five."""
        rewards = [step[1] for step in self.steps]
        return sum(rewards[-5:]) / 5 - sum(rewards[:5]) / 5


def check_run(run, count, margin):
    """It ended well, and what it printed says the same."""
    assert run.code == 0, run.out[-2000:] + run.err[-4000:]
    assert [step[0] for step in run.steps] == list(range(count))
    assert [step[2] for step in run.steps] == list(range(1, count + 1))
    assert all(step[3] > 1 for step in run.steps)
    assert all(0 <= step[1] <= 1 for step in run.steps)
    assert run.rise() > margin
    assert 0 < max(step[4] for step in run.steps) < 1e-3


@pytest.fixture(scope="session")
def run():
    def started(name, *options):
        command = [sys.executable, str(FOLDER / name), *map(str, options)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
        kinds = (int, float, int, int, float)
        steps = [tuple(kind(value) for kind, value in zip(kinds, found, strict=True)) for found in STEP.findall(done.stdout)]
        assert steps, f"{name} ended with {done.returncode}:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
        return Run(done.returncode, done.stdout, done.stderr, steps)

    return started


@pytest.fixture(scope="session")
def policy_gradient():
    """The example as a module."""
    spec = importlib.util.spec_from_file_location("policy_gradient", FOLDER / "policy_gradient.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
