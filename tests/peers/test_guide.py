"""docs/checking.md, followed literally, on the real SGLang."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import textwrap
from pathlib import Path

GUIDE = (Path(__file__).parents[2] / "docs" / "checking.md").read_text()
PYTHON, SHOWN = (re.findall(rf"```{language}\n(.*?)```", GUIDE, re.DOTALL) for language in ("python", "text"))


def words(text):
    """The words of a text, however its lines are broken, without an ellipsis at its end."""
    return " ".join(text.split()).removesuffix(" ...")


def test_the_guide_finds_what_it_says(tmp_path):
    def run(*command):
        environment = {**os.environ, "PYTHONPATH": str(tmp_path), "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=environment)
        return done.returncode, words(done.stdout + done.stderr)

    check = Path(sys.executable).parent / "rollout-core"
    packer, slots, test = PYTHON[:3]
    (tmp_path / "mysync.py").write_text(packer)
    code, shown = run(check, "check", "mysync:Packer")
    assert code == 1
    for part in re.split(r"(?=^fail)", SHOWN[0], flags=re.MULTILINE):
        assert words(part) in shown, part
    (tmp_path / "mysync.py").write_text(packer + "\n" + textwrap.indent(slots, "    "))
    code, shown = run(check, "check", "mysync:Packer", "--scripts", "bugs/", "--json", "report.json")
    assert code == 1
    assert words(SHOWN[1]) in shown
    code, shown = run(sys.executable, "bugs/B3_alignment.py")
    assert code == 1
    assert "AssertionError: ('b', torch.float32, 2)" in shown
    assert run(check, "check", "mysync:Packer", "--replay", "report.json")[0] == 1
    (tmp_path / "test_mysync.py").write_text(test)
    code, shown = run(sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", "B1-strided or B10-once or B12-empty")
    assert code == 0, shown
    assert "1 passed" in shown
    assert "2 xfailed" in shown
