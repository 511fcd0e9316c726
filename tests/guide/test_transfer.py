"""docs/transfer.md, followed literally: its two programs, and its carrier under the kit."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

GUIDE = (Path(__file__).parents[2] / "docs" / "transfer.md").read_text()
WORKER, TRAINER, CARRIER = re.findall(r"```python\n(.*?)```", GUIDE, re.DOTALL)
TEXTS = re.findall(r"```text\n(.*?)```", GUIDE, re.DOTALL)


@pytest.fixture
def run(tmp_path):
    def run(*command):
        environment = {**os.environ, "PYTHONPATH": str(tmp_path), "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=environment, timeout=200)
        return done.returncode, done.stdout + done.stderr

    return run


def test_a_trainer_and_its_worker(run, tmp_path):
    (tmp_path / "worker.py").write_text(WORKER)
    (tmp_path / "trainer.py").write_text(TRAINER)
    code, shown = run(sys.executable, "trainer.py", f"guide-{os.getpid()}")
    assert code == 0, shown
    for line in TEXTS[0].splitlines():  # both write to one place, and one line may begin in another
        assert line in shown
    assert "sent version 2 to 1 receiver" in shown


def test_the_carrier_has_under_100_lines():
    assert sum(bool(line.strip()) for line in CARRIER.splitlines()) == 89


def test_the_kit_finds_nothing_wrong_with_the_carrier(run, tmp_path):
    (tmp_path / "mycarrier.py").write_text(CARRIER)
    code, shown = run(Path(sys.executable).parent / "rollout-core", "check", "mycarrier:tcp_carrier", "--max-examples", "30")
    assert code == 0, shown
    assert TEXTS[2].strip() in shown


def test_the_kit_finds_a_bug_in_it(run, tmp_path):
    broken = CARRIER.replace("del self.inbox[:end]", "self.inbox.clear()")
    assert broken != CARRIER
    (tmp_path / "mycarrier.py").write_text(broken)
    code, shown = run(
        Path(sys.executable).parent / "rollout-core", "check", "mycarrier:tcp_carrier", "--only", "T4-messages", "--scripts", "bugs"
    )
    assert code == 1
    assert "fail  carrier/T4-messages" in shown
    assert run(sys.executable, "bugs/T4_messages.py")[0] == 1
