"""The kit's state machine on our own tracker: many programs over the fakes, and as many over real processors.

Run nightly by `nox -s machine`; `nox -s machine -- --examples 200` for a short run.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parent.parent)]

from rollout_core.testing import check_tracker, get_check, make_world  # noqa: E402
from support import torchvision_cpu, worlds  # noqa: E402 - the tests' folder has to be on the path first

ID = "tracker/M1-machine"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--examples", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    torchvision_cpu.prepare()
    real = worlds.register()
    for name in real:
        make_world(name)  # built here, so that the process of the tracker has it
    examples = -(-arguments.examples * 5 // 4) * get_check(ID).cost  # some are drawn twice, and run once
    failed = False
    for words, names in (("fakes", ()), ("real processors", real)):
        began = time.monotonic()
        report = check_tracker(
            "rollout_core-tracker", worlds=names, only=[ID], max_examples=examples, seed=arguments.seed, timeout=60
        )  # fmt: skip
        result = report[ID]
        failed |= result.status != "pass" or result.examples < arguments.examples
        print(f"{words}: {result.status}, {result.examples} programs in {time.monotonic() - began:.0f} s", flush=True)
        if result.status != "pass":
            print(report)
    return int(failed)


if __name__ == "__main__":
    raise SystemExit(main())
