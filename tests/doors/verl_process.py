"""A rollout worker of verl in a process of its own, as far as its checkpoint engine goes: made by verl's registry, asked for its
weights as ``CheckpointEngineWorker`` asks. Arguments: a JSON object. Prints one JSON line."""

from __future__ import annotations

import asyncio
import importlib
import json
import sys
import time

from rollout_core.testing.peers.verl import PACKAGE


def registry():
    """verl's own, with our engine in it."""
    base = PACKAGE.load("verl.checkpoint_engine.base")
    with PACKAGE:
        importlib.import_module("rollout_core.transfer.doors.verl")
    return base.CheckpointEngineRegistry


async def take(engine, global_steps, got, *, at_most=None, hold=0.0, patience=None):
    """Take weights into ``got`` as a rollout worker does; all is held to the end, as the SGLang rollout holds several.

    ``at_most``: stop after so many; ``hold``: seconds over each; ``patience``: seconds for all of them."""
    weights = engine.receive_weights(global_steps=global_steps)
    try:
        async with asyncio.timeout(patience):
            async for pair in weights:
                got.append(pair)
                if len(got) == at_most:
                    break
                await asyncio.sleep(hold)
    finally:
        await weights.aclose()


def main() -> None:
    from rollout_core.testing.oracles import bytes_of

    told = json.loads(sys.argv[1])
    engine = registry().new("rollout_core", bucket_size=told["bucket_size"], timeout=told["timeout"], **told.get("more", {}))
    start = time.monotonic()
    answer = {"metadata": engine.prepare()}
    got = []
    try:
        engine.init_process_group(**told["topology"])
        asyncio.run(take(engine, told["global_steps"], got, **told.get("taking", {})))
    except Exception as error:
        answer |= {"error": type(error).__name__, "message": str(error)}
    engine.finalize()
    answer["got"] = [(name, str(tensor.dtype), list(tensor.shape), bytes_of(tensor).hex()) for name, tensor in got]
    print(json.dumps({**answer, "seconds": time.monotonic() - start}), flush=True)


if __name__ == "__main__":
    main()
