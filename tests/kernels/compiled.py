"""Compiles every Triton kernel for a GPU that need not be there, and looks at what it reads: run as ``python compiled.py``.

What the interpreter takes, a compiler may not; and a kernel that lost its wide accesses is right, and slow.
"""

from __future__ import annotations

import re
import sys
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from rollout_core.bucketing.cuda import kernels

HOPPER = GPUTarget("cuda", 90, 32)
TABLES = "*i32"
#: By kernel: the types of its arguments, and which of its accesses are of 16 bytes: loads, stores.
KERNELS: dict[str, tuple[dict[str, str], str]] = {
    "gather_aligned": (
        {"target": "i64", "count": "i32", **dict.fromkeys(("blocks", "ones", "others", "splits", "ends"), TABLES)}
        | {"bases": "*i64", "partials": "*i64"},
        "ld st",
    ),
    "gather_shifted": (
        {"target": "i64", "count": "i32", "blocks": TABLES, "ones": TABLES, "bases": "*i64", "partials": "*i64"},
        "st",
    ),
    "gather_parts": (
        {"target": "i64", "nbytes": "i64", "count": "i32", **dict.fromkeys(("blocks", "rows", "stops"), TABLES)}
        | dict.fromkeys(("bases", "row_starts", "row_ends", "partials"), "*i64"),
        "ld st",
    ),
    "digest_aligned": ({"source": "i64", "words_in_all": "i64", "blocks": "i32", "partials": "*i64"}, "ld"),
    "digest_part": ({"source": "i64", "nbytes": "i32", "block": "i32", "partials": "*i64"}, "ld"),
    "digest_rows": (
        {**dict.fromkeys(("count", "each", "payloads"), "i32"), **dict.fromkeys(("rows", "table", "lanes"), "*i64")},
        "ld",
    ),
    "gather_whole": ({"target": "i64", "blocks": TABLES, "sources": "*i64"}, "ld st"),
    **{
        name: ({"source": "i64", "starts": "*i64", "targets": "*i64", "sizes": TABLES}, wide)
        for name, wide in (("copy_aligned", "ld st"), ("copy_shifted", "st"), ("copy_parts", "ld st"))
    },
}


def compiled(name: str, switch: str | None, on: bool | None) -> str:
    """The assembly of one kernel, tables beginning at multiples of 16 bytes as torch allocates them."""
    kernel: Any = getattr(kernels, name)
    types = dict(KERNELS[name][0])
    places = {argument: (kernel.arg_names.index(argument),) for argument in types}
    hints = {places[argument]: [["tt.divisibility", 16]] for argument, kind in types.items() if kind.startswith("*")}
    constants = {}
    if switch is not None:
        types[switch], constants[switch] = "constexpr", on
        if switch == "DIGEST" and not on:
            types["partials"], constants["partials"] = "constexpr", None
            hints.pop(places["partials"])
    return str(triton.compile(ASTSource(kernel, types, constants, hints), target=HOPPER, options={"num_warps": 4}).asm["ptx"])


def main() -> int:
    print(f"Triton {triton.__version__}")
    wrong = 0
    for name in (name for name, kernel in vars(kernels).items() if isinstance(kernel, triton.JITFunction) and name[0] != "_"):
        switch = next((word for word in getattr(kernels, name).arg_names if word in ("DIGEST", "ALIGNED")), None)
        for on in (None,) if switch is None else (True, False):
            ptx = compiled(name, switch, on)
            wide = {access: len(re.findall(rf"\b{access}\.global\.v4\.b32", ptx)) for access in ("ld", "st")}
            print(f"{name}{'' if switch is None else f', {switch} {on}'}: {wide} accesses of 16 bytes")
            wrong += " ".join(access for access, count in wide.items() if count) != KERNELS[name][1]
    return wrong


if __name__ == "__main__":
    sys.exit(main())
