"""B14: manifests of arbitrary bytes."""

from __future__ import annotations

import builtins
import time
from typing import Final

from hypothesis import strategies as st

from rollout_core.testing.cases import PackerCase
from rollout_core.testing.checks.base import must_raise, packer_check, plain_cases, require_refusal
from rollout_core.testing.packers import PackerUnderTest, error_words
from rollout_core.testing.registry import Violation

_SECONDS: Final = 5.0
#: What may stand behind a manifest and is not part of it.
_ENDS: Final = (b"\0", b"\n", b" ", b"\0\0\0\0")
_MODELS = plain_cases(max_size=4, places=2)
#: A pickle, made by hand, of an object that sets builtins.rollout_core_unpickled when it is loaded.
_EVIL: Final = b"cbuiltins\nsetattr\n(cbuiltins\n__import__\n(Vbuiltins\ntRVrollout_core_unpickled\nI01\ntR."


def _must_refuse(statement: str) -> str:
    """The end of a script whose last statement has to raise the declared error."""
    return must_raise(statement, 'getattr(packer, "manifest_errors", ValueError)')


@packer_check(
    "packer/B14-cut",
    "a manifest that was cut off is refused",
    cases=_MODELS,
    needs=["manifest"],
    script="\ndata = packer.manifest(named, capacity)\n" + _must_refuse("packer.read_manifest(data[: {at}[0] % len(data)])"),
)
def cut(packer: PackerUnderTest, case: PackerCase) -> None:
    data = packer.manifest(case.make(packer.device), case.capacity)
    length = case.at[0] % max(len(data), 1)
    error = require_refusal(packer, lambda: packer.read_manifest(data[:length]), f"{length} of {len(data)} bytes were accepted")
    _require_declared(packer, error)


@packer_check(
    "packer/B14-trailing",
    "a manifest with bytes after its end is refused",
    cases=_MODELS,
    needs=["manifest"],
    script=_must_refuse(
        "packer.read_manifest(packer.manifest(named, capacity) + (b'\\0', b'\\n', b' ', b'\\0\\0\\0\\0')[{at}[0] % 4])"
    ),
)
def trailing(packer: PackerUnderTest, case: PackerCase) -> None:
    more = _ENDS[case.at[0] % len(_ENDS)]
    data = packer.manifest(case.make(packer.device), case.capacity) + more
    error = require_refusal(packer, lambda: packer.read_manifest(data), f"{more!r} after the end was accepted")
    _require_declared(packer, error)


@packer_check(
    "packer/B14-changed",
    "a manifest with changed bytes, or noise, is read as a plan or refused with the declared error, and soon",
    cases=st.builds(
        lambda case, data, noise: PackerCase(tensors=case.tensors, capacity=case.capacity, at=case.at, data=data if noise else b""),
        _MODELS,
        st.binary(max_size=40),
        st.booleans(),
    ),
    needs=["manifest"],
    script="""
data = bytearray({data} or packer.manifest(named, capacity))
if not {data}:
    data[{at}[0] % len(data)] ^= 1 + {at}[1] % 255
try:
    packer.read_manifest(bytes(data))
except getattr(packer, "manifest_errors", ValueError) as error:
    print("refused:", error)
""",
)
def changed(packer: PackerUnderTest, case: PackerCase) -> None:
    data = bytearray(case.data or packer.manifest(case.make(packer.device), case.capacity))
    if not case.data and data:
        data[case.at[0] % len(data)] ^= 1 + case.at[1] % 255
    started = time.monotonic()
    error = packer.refusal(lambda: packer.read_manifest(bytes(data)))
    seconds = time.monotonic() - started
    if seconds > _SECONDS:
        raise Violation(f"reading {len(data)} bytes took {seconds:.1f} s")
    if error is not None:
        _require_declared(packer, error)


@packer_check(
    "packer/B14-pickle",
    "reading a manifest runs no code that is in it",
    cases=st.just(PackerCase(data=_EVIL)),
    needs=["manifest"],
    script="""
import builtins

try:
    packer.read_manifest({data})
except Exception as error:
    print("refused:", error)
assert not hasattr(builtins, "rollout_core_unpickled"), "the manifest's bytes were unpickled, and ran"
""",
)
def pickled(packer: PackerUnderTest, case: PackerCase) -> None:
    packer.refusal(lambda: packer.read_manifest(case.data))
    if hasattr(builtins, "rollout_core_unpickled"):
        del builtins.rollout_core_unpickled
        raise Violation("the bytes were unpickled, and what they say was run: whoever sends a manifest runs code here")


def _require_declared(packer: PackerUnderTest, error: Exception) -> None:
    declared = getattr(packer.packer, "manifest_errors", ValueError)
    if not isinstance(error, declared):
        raise Violation(f"it is refused with {error_words(error)} (declared: {_names(declared)})")


def _names(declared: object) -> str:
    kinds = declared if isinstance(declared, tuple) else (declared,)
    return ", ".join(kind.__name__ for kind in kinds)
