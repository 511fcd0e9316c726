"""The program of an engine's process: started by a worker, never by hand."""

from __future__ import annotations

import argparse
import importlib
import json
from collections.abc import Callable, Mapping
from typing import Any

from rollout_core.transfer.causes import cause_of
from rollout_core.transfer.channel import Channel, PeerGone
from rollout_core.workers.engine import Engine
from rollout_core.workers.link.messages import Answered, Asked, Done, Failed
from rollout_core.workers.link.serving import Serving


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--channel", type=int, required=True)
    for name in ("engine", "options"):
        parser.add_argument(f"--{name}", required=True)
    arguments = parser.parse_args()
    serve(arguments.channel, arguments.engine, json.loads(arguments.options))


def serve(descriptor: int, place: str, options: Mapping[str, Any], made: Callable[[Engine], None] | None = None) -> None:
    """Make an engine (``place``: ``module:class``) and serve it until its worker is gone or wants no more; ``made`` sees it."""
    channel: Channel[Asked] = Channel(descriptor, Asked)
    engine: Engine | None = None
    try:
        try:
            engine = make_engine(place, options)
            if made is not None:
                made(engine)
        except Exception as error:
            channel.send(Answered(0, Failed(cause_of(error))))
            return
        channel.send(Answered(0, Done()))
        Serving(channel, engine).run()
    except PeerGone:
        pass  # nobody is left to tell
    finally:
        if engine is not None:
            engine.close()
        channel.close()


def make_engine(place: str, options: Mapping[str, Any]) -> Engine:
    module, _, name = place.partition(":")
    engine: Engine = getattr(importlib.import_module(module), name)(**options)
    return engine
