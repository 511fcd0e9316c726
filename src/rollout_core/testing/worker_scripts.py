"""Reproduction scripts of workers: the steps in words, and the check itself on the case."""

from __future__ import annotations

import msgspec

from rollout_core.testing.registry import Check
from rollout_core.testing.worker_cases import WorkerCase

_HEAD = '''\
"""{id}: {title}

{text}
{steps}"""

import sys

sys.path.insert(0, "")  # run this where the worker can be imported
{imports}
from rollout_core.testing import recheck

recheck({make}, {id!r}, {case!r}{model})
'''


def worker_script(check: Check, case: WorkerCase, imports: str, make: str, text: str, model: str) -> str:
    """The script for a case of a check of workers; ``model``: the folder that it was found with, or empty."""
    steps = "".join(f"{number}. {step}\n" for number, step in enumerate(case.steps, 1))
    return _HEAD.format(
        id=check.id,
        title=check.title,
        text=text,
        steps=f"\n{steps}" if steps else "",
        imports=imports,
        make=make,
        case=msgspec.json.encode(case).decode(),
        model=f", model={model!r}" if model else "",
    )
