"""Reproduction scripts of carriers: the steps in words, and the check itself on the case."""

from __future__ import annotations

import msgspec

from rollout_core.testing.carrier_cases import CarrierCase
from rollout_core.testing.registry import Check

_HEAD = '''\
"""{id}: {title}

{text}

{steps}
"""

import sys

sys.path.insert(0, "")  # run this where the carrier can be imported
{imports}
from rollout_core.testing import recheck

recheck({make}, {id!r}, {case!r})
'''


def carrier_script(check: Check, case: CarrierCase, imports: str, make: str, text: str) -> str:
    """The script for a case of a check of carriers."""
    words = str(case).split("; ")
    return _HEAD.format(
        id=check.id,
        title=check.title,
        text=text,
        steps="\n".join(f"{number}. {step}" for number, step in enumerate(words, 1)),
        imports=imports,
        make=make,
        case=msgspec.json.encode(case).decode(),
    )
