"""A process that does not outlive the one that started it. Imports nothing heavy: it runs before torch is loaded."""

from __future__ import annotations

import os
import threading
import time
from typing import Final

_EVERY: Final = 0.5  # seconds between looks


def end_with_parent(parent: int) -> None:
    """End this process, whatever it is doing, soon after the process ``parent``, which started it, has ended.

    A closed channel says so too, but only to a process that reads it, and only once no fork of the parent holds it open. Not
    prctl(PR_SET_PDEATHSIG): that ends with the thread that started the process.
    """

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(_EVERY)
        os._exit(1)

    threading.Thread(target=watch, name="end-with-parent", daemon=True).start()
