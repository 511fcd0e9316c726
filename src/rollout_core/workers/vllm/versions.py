"""What differs among the versions of vLLM that are served (``workers.versions``): asked of what is there, not of its number.

Seen in 0.26.0 beside 0.32.0: ``finish_weight_update`` is told no version of the weights; a server has its route for tokens without
being asked for it, and knows no ``--enable-scale-out``; the stream of a request that was aborted ends there without a word. All
else that is used of both is alike.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final

from rollout_core.workers.versions import check_version

#: Where a server's flags are declared, in newer versions and in older ones.
_FLAGS: Final = ("entrypoints/launchers/cli_args.py", "entrypoints/openai/cli_args.py")
_ROUTES: Final = "--enable-scale-out"


def check_installed() -> None:
    """Raise ``WorkerError`` if the vLLM that is installed is not served."""
    import vllm

    check_version("vLLM", str(vllm.__version__))


def taken_by(call: Callable[..., Any], arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Those of the arguments that a call of vLLM's takes."""
    known = inspect.signature(call).parameters
    return {name: value for name, value in arguments.items() if name in known}


def route_words(root: Path | None = None) -> list[str]:
    """What of a server's command line opens its route for tokens, as the vLLM at ``root`` declares it: that which is installed, and
    is not imported for it."""
    if root is None:
        spec = find_spec("vllm")
        root = Path(spec.origin).parent if spec is not None and spec.origin is not None else Path()
    declared = "".join((root / file).read_text() for file in _FLAGS if (root / file).is_file())
    return [_ROUTES] if "enable_scale_out:" in declared else []
