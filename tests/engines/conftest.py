"""With ``--dist loadscope``, tests that share a running engine go to one process, and so do the others of one file."""

import re
from typing import Final

import pytest

#: What the ids of a fixture that runs an engine look like; they come first.
ENGINE: Final = re.compile(r"\[(?:(?:hf|vllm|sglang)[a-z_]*-(?:un)?tied|qwen[0-9a-z_]+(?:-async|-server)?)(?=[-\]])")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    from xdist.scheduler import LoadScopeScheduling

    class ByEngine(LoadScopeScheduling):
        def _split_scope(self, nodeid):
            engine = ENGINE.search(nodeid)
            return nodeid.partition("::")[0] + (engine.group() if engine is not None else "")

    return ByEngine(config, log) if config.getoption("dist") == "loadscope" else None
