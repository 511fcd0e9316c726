"""A worker process: started by HFWorker, never by hand."""

from __future__ import annotations

import argparse
import signal
from typing import assert_never

import torch

from rollout_core.bucketing import Bucket, BucketPlan
from rollout_core.bucketing.dtypes import WIRE_NAMES
from rollout_core.bucketing.tensors import as_bytes
from rollout_core.transfer.arena import Arena
from rollout_core.transfer.causes import cause_of
from rollout_core.transfer.channel import Channel, PeerGone
from rollout_core.workers.hf_model import HFModel
from rollout_core.workers.messages import (
    Abandon,
    Answer,
    Answered,
    Asked,
    Begin,
    Close,
    Commit,
    Completions,
    Digests,
    Done,
    Failed,
    Generate,
    Load,
    ReadDigests,
    ReadTensor,
    Request,
    TensorBytes,
)


def main() -> None:
    # Ctrl-C reaches every process of the terminal; whether this one ends is for the trainer to say.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parser = argparse.ArgumentParser()
    for name in ("model", "dtype", "device"):
        parser.add_argument(f"--{name}", required=True)
    for name in ("channel", "arena", "threads"):
        parser.add_argument(f"--{name}", type=int, required=True)
    arguments = parser.parse_args()
    channel: Channel[Asked] = Channel(arguments.channel, Asked)
    arena = Arena(arguments.arena)
    try:
        try:
            if arguments.threads:
                torch.set_num_threads(arguments.threads)
            model = HFModel(arguments.model, dtype=arguments.dtype, device=arguments.device)
        except Exception as error:
            channel.send(Answered(0, Failed(cause_of(error))))
            return
        channel.send(Answered(0, Done()))
        serve(channel, arena, model)
    except PeerGone:
        pass  # the trainer is gone: nobody is left to tell
    finally:
        arena.close()


def serve(channel: Channel[Asked], arena: Arena, model: HFModel) -> None:
    """Carry out requests until told to close or the other side is gone."""
    while True:
        asked = channel.receive(None)
        try:
            answer = carry_out(asked.request, arena, model)
        except Exception as error:
            answer = Failed(cause_of(error))
        try:
            channel.send(Answered(asked.number, answer))
        except (TypeError, ValueError, OverflowError) as error:  # not encodable: larger than MessagePack can say, for one
            channel.send(Answered(asked.number, Failed(cause_of(error))))
        if isinstance(asked.request, Close):
            return


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
            return Done()
        case Commit():
            model.commit()
            arena.detach()
            return Done()
        case Abandon():
            model.abandon(request.version)
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
