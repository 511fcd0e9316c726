"""Use the kit as somebody else's project does: from what pip installed, in an empty folder. Run by `nox -s wheel`; a plain program,
so that no conftest and no configuration of this repository is near."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

SYNC = '''
"""A trainer's packer, with a bug: tensors without elements are dropped."""

import torch


class Packer:
    def pack(self, named_tensors, capacity):
        buckets, bucket, size = [], [], 0
        for name, tensor in named_tensors:
            nbytes = tensor.numel() * tensor.element_size()
            if not nbytes:
                continue
            if bucket and size + nbytes > capacity:
                buckets.append(bucket)
                bucket, size = [], 0
            bucket.append((name, tensor.clone()))
            size += nbytes
        return [*buckets, bucket] if bucket else buckets

    def unpack(self, buckets):
        return [pair for bucket in buckets for pair in bucket]


packer = Packer()
'''

TESTS = """
from rollout_core.testing import parametrize_packer_checks
from mytrainer.sync import Packer

KNOWN = {
    "packer/B1-zero-size": "dropped",
    "packer/B1-dtypes": "torch cannot clone int1 to uint7",
    "packer/B9-duplicate": "names are not compared",
    "packer/B10-once": "a list of pairs",
}


@parametrize_packer_checks([Packer], expected_failures=KNOWN, max_examples=60)
def test_packer(packer, check):
    check(packer)
"""


def main() -> None:
    here = Path(__file__).resolve().parents[2]
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "PYTEST", "HYPOTHESIS"))}
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "mytrainer").mkdir()
        (Path(folder) / "mytrainer" / "__init__.py").write_text("")
        (Path(folder) / "mytrainer" / "sync.py").write_text(SYNC)
        (Path(folder) / "test_sync.py").write_text(TESTS)

        def run(*command: str | Path, code: int = 0) -> str:
            done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
            shown = done.stdout + done.stderr
            print(f"$ {' '.join(map(str, command))}\n{shown}", flush=True)
            assert done.returncode == code, f"exit code {done.returncode}, not {code}"
            return shown

        place = run(
            sys.executable, "-c", "import rollout_core, sys; print(rollout_core.__file__, *sys.path, sep='\\n')"
        ).splitlines()
        assert Path(place[0]).is_relative_to(sysconfig.get_path("purelib")), place[0]
        assert not any(Path(entry or folder).resolve() in (here, here / "src", here / "tests") for entry in place[1:]), place
        script = Path(sys.executable).parent / "rollout-core"
        report = run(script, "check", "mytrainer.sync:packer", "--json", "report.json", "--scripts", "scripts", code=1)
        assert "'a' did not arrive (model: 'a', actual: nothing)" in report
        assert "case: capacity 1 bytes; 'a' f32[0]" in report
        run(sys.executable, "scripts/B1_zero_size.py", code=1)
        run(script, "check", "mytrainer.sync:packer", "--replay", "report.json", code=1)
        shown = run(sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider")
        assert "4 xfailed" in shown
        assert "passed" in shown
        run(script, "check", "rollout_core", "--max-examples", "20")
        caches = {".hypothesis", "__pycache__"}  # of Hypothesis (tables of its text strategies) and of Python
        left = sorted(path.name for path in Path(folder).iterdir() if path.name not in caches)
        assert left == ["mytrainer", "report.json", "scripts", "test_sync.py"], f"the kit left something behind: {left}"
    print("the kit works from an installed wheel in an empty folder")


if __name__ == "__main__":
    main()
