"""Set everything up and run it, with nothing but Python 3.11 or newer and pip:

python3 run.py preflight    check a rollout worker on this machine
python3 run.py tests        run all tests that need no GPU
python3 run.py SESSION...   run any sessions of noxfile.py; what follows `--` goes to them
"""

from __future__ import annotations

import subprocess
import sys
import venv
from pathlib import Path

HERE = Path(__file__).resolve().parent
TOOLS = HERE / ".nox" / "tools"
TESTS = ("lint", "typing", "unit", "kit", "wheel", "processors", "engines_hf", "engines_vllm", "faults")


def main(arguments: list[str]) -> int:
    if sys.version_info < (3, 11):  # noqa: UP036 - this file is what an older Python is asked to run first
        print(f"this is Python {sys.version.split()[0]}; rollout_core needs 3.11 or newer", file=sys.stderr)
        return 2
    if not arguments:
        print(__doc__)
        return 2
    python = TOOLS / "bin" / "python"
    if not python.exists():
        venv.create(TOOLS, with_pip=True)
    subprocess.run([python, "-m", "pip", "install", "--quiet", "nox==2026.10.20"], check=True)
    sessions, _, rest = " ".join(arguments).partition(" -- ")
    names = TESTS if sessions == "tests" else tuple(sessions.split())
    options = ["--", *arguments[arguments.index("--") + 1 :]] if rest else []
    return subprocess.run([python, "-m", "nox", "-f", HERE / "noxfile.py", "-s", *names, *options]).returncode


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
