"""What workers on servers have in common: the server may be their own, and ends with them then."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from rollout_core.workers.carriers import CarrierChoice
from rollout_core.workers.http.server import ServerProcess
from rollout_core.workers.link.hosts import Spec
from rollout_core.workers.worker import Worker

#: Calls of a server that one of ours may take: what bounds each says more of what is wrong than what bounds all of them.
_CALLS: Final = 4


class ServerWorker(Worker):
    """A worker whose engine is a server, which says itself on what device it is. ``server``: one that ends when this worker is
    closed; None: it is somebody else's."""

    takes_computed = False

    def __init__(
        self,
        place: str,
        options: Mapping[str, Any],
        *,
        carrier: CarrierChoice = "auto",
        timeout: float,
        server: ServerProcess | None,
    ) -> None:
        self.server = server
        try:
            spec = Spec(place, {**options, "timeout": timeout})
            super().__init__(spec, process=False, start_timeout=2 * timeout, timeout=_CALLS * timeout)
            try:
                self._is_on(self.call("device").decode(), carrier)
            except BaseException:
                self.close()
                raise
        except BaseException:
            if server is not None:
                server.stop(0)
            raise

    @property
    def model_dir(self) -> str:
        """The folder of the server's model."""
        return self.call("model_dir").decode()

    def processes(self) -> list[int]:
        return [] if self.server is None else self.server.processes

    def close(self) -> None:
        try:
            super().close()
        finally:
            if self.server is not None:
                self.server.stop()
