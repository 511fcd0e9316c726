"""Prompts with pictures: what of a conversation goes to an engine, and a picture's data only while the engine lacks it (clause W8).

Engines with a processor of their own get the compact ids and, at their placeholders, pictures: each under an identity that no
other picture has, and as a PNG, which loses nothing. A picture that an engine was given goes by its identity alone from then on.
An engine may drop what it was given; it says so, and the request is sent once more with all data. Engines that know pictures by
no name get them with every request, and engines without a processor the tensors that the conversation has.
"""

from __future__ import annotations

import io
import threading
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final, Literal, TypeAlias

import msgspec
import torch

from rollout_core.bucketing.dtypes import DTYPES, WIRE_NAMES
from rollout_core.bucketing.tensors import as_bytes
from rollout_core.errors import RolloutCoreError, WorkerError
from rollout_core.multimodal import Conversation, Item, Picture
from rollout_core.multimodal.media import require_pillow
from rollout_core.workers.contract import SamplingParams
from rollout_core.workers.engine import Group, MediaItem, Request
from rollout_core.workers.rollouts import Rollout

#: In what form an engine takes the media of a prompt, if it does. "pictures": with data once, then by name; "pictures_each_time":
#: with data in every request.
Form: TypeAlias = Literal["none", "pictures", "pictures_each_time", "tensors"]
#: Identities that are remembered as sent. An engine that keeps fewer says what it misses.
_REMEMBERED: Final = 1 << 16


class MediaReport(msgspec.Struct, frozen=True, kw_only=True):
    """What became of the pictures of all requests so far, each counted at every place of every sample where it stands.

    ``sent``: with data, of ``nbytes`` bytes in all, counted each time that the engine is given it; ``named``: by identity alone;
    ``misses``: of these, how many the engine did not have, which were then sent with data. ``hits`` of ``queries``: pictures that
    the engine found in its own cache of what it has processed; None where it does not say."""

    sent: int = 0
    named: int = 0
    misses: int = 0
    nbytes: int = 0
    hits: int | None = None
    queries: int | None = None


@dataclass(frozen=True, slots=True)
class Prompt:
    """What a request is made of. ``ids`` are compact, ``input_ids`` those of a conversation at full length; ``inputs``: see
    ``encode_tensors``."""

    ids: Sequence[int]
    items: tuple[Item, ...] = ()
    input_ids: Sequence[int] = ()
    inputs: bytes = b""


@dataclass(frozen=True, slots=True)
class _Open:
    """A request that may have to be sent again."""

    prompt: Prompt
    params: SamplingParams
    max_batch: int


class Media:
    """The media of one worker's requests. Any thread may call."""

    def __init__(self, form: Form, remembered: int = _REMEMBERED) -> None:
        self._form = form
        self._limit = remembered
        self._lock = threading.Lock()
        self._believed: OrderedDict[str, None] = OrderedDict()
        self._open: dict[int, _Open] = {}
        self._report = MediaReport()

    @property
    def report(self) -> MediaReport:
        return self._report

    def take(self, prompts: Iterable[Sequence[int] | Conversation]) -> list[Prompt]:
        """Prompts, none of which has been sent. ``WorkerError`` for a conversation that this engine cannot be given."""
        return [
            _taken(one, place, self._form) if isinstance(one, Conversation) else Prompt(one) for place, one in enumerate(prompts)
        ]

    def requests(self, prompts: Sequence[Prompt], rollouts: Sequence[Rollout], params: SamplingParams, most: int) -> list[Request]:
        """A request for each of these, in their order; of a picture that is new, the first of them has the data."""
        made = []
        told: set[int] = set()  # places whose tensors an earlier request has
        written: dict[str, bytes] = {}
        for rollout in rollouts:
            place = rollout.prompt_index
            prompt = prompts[place]
            inputs = b"" if place in told else prompt.inputs
            told.add(place)
            made.append(self._request(prompt, rollout, params, most, inputs, written))
        return made

    def again(self, rollout: Rollout, missing: Sequence[str]) -> Group:
        """A request that the engine has forgotten, because it misses these identities, with the data of all its media.

        ``WorkerError`` if it was sent again before, and no token has come since."""
        with self._lock:
            held = self._open.get(rollout.key)
            self._report = _added(self._report, misses=len(missing))
        if held is None or rollout.resent_at == len(rollout.token_ids):
            raise WorkerError(
                f"the engine says that it misses {len(missing)} pictures of prompt {rollout.prompt_index}, first {missing[0]}, "
                "which it was just given: its cache may be too small for them"
            )
        rollout.resent, rollout.resent_at = rollout.resent + 1, len(rollout.token_ids)
        self.forget(item.uuid() for item in held.prompt.items)
        # It may have tokens: an engine that starts requests anew looks for their media again.
        tokens, prompt, params = rollout.token_ids, held.prompt, held.params
        if tokens:
            prompt = replace(prompt, ids=[*prompt.ids, *tokens], input_ids=[*prompt.input_ids, *tokens])
            params = msgspec.structs.replace(params, response_length=params.response_length - len(tokens))
        return Group(params, [self._request(prompt, rollout, params, held.max_batch, b"", {})], held.max_batch)

    def drop(self, prompts: Sequence[Prompt], rollouts: Sequence[Rollout]) -> None:
        """These were refused: nobody knows which of their media the engine has."""
        self.forget(item.uuid() for prompt in prompts for item in prompt.items)
        for rollout in rollouts:
            self._open.pop(rollout.key, None)

    def forget(self, identities: Iterable[str] | None = None) -> None:
        """The engine may not have these any more, or any."""
        with self._lock:
            if identities is None:
                self._believed.clear()
            else:
                for identity in identities:
                    self._believed.pop(identity, None)

    def _request(
        self, prompt: Prompt, rollout: Rollout, params: SamplingParams, most: int, inputs: bytes, written: dict[str, bytes]
    ) -> Request:
        """``written``: of engines that are given a picture each time, the data of those that earlier requests of this call have."""
        media: list[MediaItem] = []
        if self._form == "pictures":
            media = self._media(prompt.items)
        elif self._form == "pictures_each_time":
            media = self._media_each_time(prompt.items, written)
        if self._form == "tensors" and prompt.items:
            with self._lock:
                count = len(prompt.items)
                new = {"sent": count, "nbytes": len(inputs)} if inputs else {"named": count}
                self._report = _added(self._report, **new)
        if media and self._form == "pictures" and rollout.key not in self._open:
            self._open[rollout.key] = _Open(prompt, params, most)
            rollout.future.add_done_callback(lambda _: self._close(rollout.key))
        place, sample = rollout.prompt_index, rollout.sample_index
        return Request(rollout.key, list(prompt.ids), place, sample, media, list(prompt.input_ids), inputs)

    def _close(self, key: int) -> None:
        self._open.pop(key, None)

    def _media(self, items: Sequence[Item]) -> list[MediaItem]:
        found = []
        for item in items:
            identity = item.uuid()
            with self._lock:
                known = identity in self._believed
                self._believed[identity] = None
                self._believed.move_to_end(identity)
                if len(self._believed) > self._limit:
                    self._believed.popitem(last=False)
            data = None if known else encode_picture(item.payload.media)
            with self._lock:
                self._report = _added(self._report, named=1) if data is None else _added(self._report, sent=1, nbytes=len(data))
            found.append(MediaItem(item.modality, identity, data))
        return found

    def _media_each_time(self, items: Sequence[Item], written: dict[str, bytes]) -> list[MediaItem]:
        """Each picture's data comes once in a call, and the engine is given it with each of its requests (``data_in``)."""
        found = []
        for item in items:
            identity = item.uuid()
            known = identity in written
            data = written[identity] if known else encode_picture(item.payload.media)
            written[identity] = data
            with self._lock:
                self._report = _added(self._report, sent=1, nbytes=len(data))
            found.append(MediaItem(item.modality, identity, None if known else data))
        return found


def data_in(requests: Iterable[Request]) -> dict[str, bytes]:
    """The data that came with these requests, by identity: of a call, only the first request that shows a picture has it."""
    return {item.identity: item.data for request in requests for item in request.media if item.data is not None}


def encode_picture(media: Any) -> bytes:
    """A PNG of what a processor is given: RGB, over the renderer's background. Little is spent on its size."""
    assert isinstance(media, Picture)
    file = io.BytesIO()
    media.to_pil().save(file, "PNG", compress_level=1)
    return file.getvalue()


def decode_picture(data: bytes) -> Any:
    """The same as a Pillow image, mode RGB."""
    image = require_pillow().open(io.BytesIO(data), formats=("PNG",))
    image.load()
    return image


class _Tensor(msgspec.Struct, array_like=True):
    dtype: str
    shape: list[int]
    data: bytes


def encode_tensors(tensors: Mapping[str, torch.Tensor]) -> bytes:
    """Tensors by name, as MessagePack."""
    return msgspec.msgpack.encode(
        {name: _Tensor(WIRE_NAMES[one.dtype], list(one.shape), as_bytes(one).numpy().tobytes()) for name, one in tensors.items()}
    )


def decode_tensors(data: bytes) -> dict[str, torch.Tensor]:
    """What ``encode_tensors`` was given."""
    found = msgspec.msgpack.decode(data, type=dict[str, _Tensor])
    return {name: _tensor(one) for name, one in found.items()}


def _tensor(one: _Tensor) -> torch.Tensor:
    if not one.data:
        return torch.empty(one.shape, dtype=DTYPES[one.dtype])
    return torch.frombuffer(bytearray(one.data), dtype=torch.uint8).view(DTYPES[one.dtype]).view(one.shape)


def _taken(conversation: Conversation, place: int, form: Form) -> Prompt:
    where = f"prompt {place}"
    if form == "none":
        raise WorkerError(f"{where} is a conversation, which this worker does not take: pass its input_ids, if it is text alone")
    try:
        conversation = conversation.with_generation_prompt()
    except RolloutCoreError as error:
        raise WorkerError(f"{where} cannot be answered: {error}") from error
    items = conversation.items
    for item in items:
        if item.modality != "image":
            raise WorkerError(f"{where} shows {item.modality} {item.modality_index}: workers take pictures, no other media yet")
        if form != "tensors" and not isinstance(item.payload.media, Picture):
            raise WorkerError(
                f"{where} has no picture for image {item.modality_index}, only what a processor made of it: the engine wants the "
                "picture itself"
            )
    inputs = b""
    if form == "tensors" and items:
        try:
            tensors = {**conversation.multi_modal_inputs(), "position_ids": torch.from_numpy(conversation.position_ids)}
        except RolloutCoreError as error:
            raise WorkerError(f"the media of {where} cannot be given to a model: {error}") from error
        inputs = encode_tensors(tensors)
    return Prompt(conversation.compact_ids.tolist(), items, conversation.input_ids.tolist(), inputs)


def _added(report: MediaReport, *, sent: int = 0, named: int = 0, misses: int = 0, nbytes: int = 0) -> MediaReport:
    return msgspec.structs.replace(
        report, sent=report.sent + sent, named=report.named + named, misses=report.misses + misses, nbytes=report.nbytes + nbytes
    )
