"""A worker process: started by HFWorker as ``python -m rollout_core.workers.hf_process``, never by hand."""

from __future__ import annotations

import argparse
import traceback
from typing import assert_never

from rollout_core.bucketing import Bucket, BucketPlan
from rollout_core.bucketing.dtypes import WIRE_NAMES
from rollout_core.bucketing.tensors import as_bytes
from rollout_core.errors import TransferError
from rollout_core.transfer.arena import Arena
from rollout_core.transfer.channel import Channel
from rollout_core.workers.hf_model import HFModel
from rollout_core.workers.messages import (
    Abandon,
    Answer,
    Begin,
    Close,
    Commit,
    Completions,
    Digests,
    Done,
    Failed,
    Generate,
    Load,
    Loaded,
    ReadDigests,
    ReadTensor,
    Request,
    TensorBytes,
)


def main() -> None:
    parser = argparse.ArgumentParser()
    for name in ("model", "dtype", "device"):
        parser.add_argument(f"--{name}", required=True)
    for name in ("channel", "arena", "threads"):
        parser.add_argument(f"--{name}", type=int, required=True)
    arguments = parser.parse_args()
    channel: Channel[Request] = Channel(arguments.channel, Request)
    arena = Arena(arguments.arena)
    try:
        try:
            if arguments.threads:
                import torch

                torch.set_num_threads(arguments.threads)
            model = HFModel(arguments.model, dtype=arguments.dtype, device=arguments.device)
        except Exception as error:
            channel.send(_failure(error))
            return
        channel.send(Done())
        serve(channel, arena, model)
    except TransferError:
        pass  # the trainer is gone: nobody is left to tell
    finally:
        arena.close()


def serve(channel: Channel[Request], arena: Arena, model: HFModel) -> None:
    """Carry out requests until told to close or the other side is gone."""
    while True:
        request = channel.receive(None)
        if isinstance(request, Close):
            channel.send(Done())
            return
        try:
            answer = carry_out(request, arena, model)
        except Exception as error:
            answer = _failure(error)
        channel.send(answer)


def carry_out(request: Request, arena: Arena, model: HFModel) -> Answer:
    match request:
        case Begin():
            model.begin(BucketPlan.from_bytes(request.manifest), request.version)
            arena.attach(request.arena_nbytes)
            return Done()
        case Load():
            bucket = Bucket(
                index=request.index,
                buffer=arena.view(request.offset, request.nbytes),
                plan_digest=request.plan_digest,
                version=request.version,
                algorithm=request.algorithm,
                digest=request.digest,
            )
            model.load(bucket)
            return Loaded(request.offset)
        case Commit():
            model.commit()
            arena.detach()
            return Done()
        case Abandon():
            model.abandon()
            arena.detach()
            return Done()
        case Generate():
            return Completions(model.generate(request.prompts, request.params, request.max_batch))
        case ReadDigests():
            return Digests(model.digests())
        case ReadTensor():
            tensor = model.read_tensor(request.name)
            return TensorBytes(WIRE_NAMES[tensor.dtype], tuple(tensor.shape), as_bytes(tensor).numpy().tobytes())
        case Close():
            return Done()
    assert_never(request)


def _failure(error: Exception) -> Failed:
    return Failed(type(error).__name__, str(error), "".join(traceback.format_exception(error)))


if __name__ == "__main__":
    main()
