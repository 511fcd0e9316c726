"""Set everything up and run it, with nothing but Python 3.11 or newer and pip:

python3 run.py preflight    check a rollout worker on this machine
python3 run.py tests        run all tests that need no GPU
python3 run.py SESSION...   run any sessions of noxfile.py; what follows `--` goes to them
"""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import venv
from collections.abc import Sequence
from pathlib import Path

HERE = Path(__file__).resolve().parent
TOOLS = HERE / ".nox" / "tools"
#: All tests that need no GPU, in two lanes that run side by side: one computes while the other installs, or waits for an engine.
LANES = (
    ("lint", "typing", "unit", "kernels", "kit", "wheel"),
    ("engines_vllm", "engines_sglang", "engines_hf", "processors"),
)
WIDTH = 300  # characters of a line that is said again


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
    options = ["--", *arguments[arguments.index("--") + 1 :]] if rest else []
    if sessions == "tests":
        return run_lanes(python)
    return subprocess.run([*nox(python, sessions.split()), *options]).returncode


def nox(python: Path, sessions: Sequence[str]) -> list[str]:
    return [str(python), "-m", "nox", "-f", str(HERE / "noxfile.py"), "-s", *sessions]


def run_lanes(python: Path) -> int:
    """Each line comes with the number of its lane; what failed is said again at the end."""
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    running = [
        subprocess.Popen(nox(python, sessions), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=environment)
        for sessions in LANES
    ]
    summaries: list[list[str]] = [[] for _ in LANES]

    def show(lane: int) -> None:
        output = running[lane].stdout
        assert output is not None
        for line in output:
            text = line.decode(errors="replace").rstrip()
            print(f"{lane + 1} | {text}", flush=True)
            if text.startswith(("nox > * ", "FAILED ", "ERROR ")):  # nox's summary of sessions, and pytest's of tests
                summaries[lane].append(text.removeprefix("nox > ")[:WIDTH])

    threads = [threading.Thread(target=show, args=(lane,)) for lane in range(len(LANES))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    codes = [process.wait() for process in running]
    print("\n".join(line for summary in summaries for line in summary), flush=True)
    return max(codes)


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
