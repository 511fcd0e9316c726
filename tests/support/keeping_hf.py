"""transformers behind an engine that takes pictures as vLLM does: with data once, then by name; it has a processor of its own,
expands ids itself, and drops what it has no room for."""

from __future__ import annotations

from collections import OrderedDict

import msgspec
import torch
import transformers

from rollout_core.errors import WorkerError
from rollout_core.workers.engine import Group, Progress
from rollout_core.workers.hf.engine import HFEngine
from rollout_core.workers.media import data_in, decode_picture, encode_tensors


class KeepingHFEngine(HFEngine):
    """``room``: pictures that it keeps. ``compares``: its ids with the conversation's."""

    room = 8
    compares = True

    def __init__(self, model, **options):
        super().__init__(model, **options)
        self.processor = transformers.AutoProcessor.from_pretrained(model)
        self.kept = OrderedDict()  # identity -> picture, the one that was shown last at the end
        self.news = []

    @property
    def is_busy(self):
        return bool(self.news) or super().is_busy

    def submit(self, group):
        given = data_in(group.requests)
        ready = []
        for request in group.requests:
            missing = self.keep([item.identity for item in request.media], given)
            if missing:
                self.news.append(self.missed(request, missing))
            else:
                ready.append(self.expanded(request) if request.media else request)
        if ready:
            super().submit(Group(group.params, ready, group.max_batch))

    def keep(self, names, given):
        """Those of these names that it has not."""
        for name in names:
            if name in given:
                self.kept[name] = decode_picture(given[name])
            if name in self.kept:
                self.kept.move_to_end(name)
            while len(self.kept) > self.room:
                self.kept.popitem(last=False)
        return [name for name in dict.fromkeys(names) if name not in self.kept]

    def missed(self, request, missing):
        return Progress(request.key, [], [], self.version, missing=missing)

    def step(self, emit, between):
        news, self.news = self.news, []
        emit(news)
        if super().is_busy:
            super().step(emit, between)
        else:
            between()

    def expanded(self, request):
        """The request with the ids and tensors that it makes of it."""
        prompt, pictures = self.shown(request)
        seen = self.processor.image_processor(images=pictures, return_tensors="pt")
        lengths = (seen["image_grid_thw"].prod(1) // 4).tolist()
        ids, types = [], []
        for token in prompt:
            count = lengths.pop(0) if token == self.model.config.image_token_id else 0
            ids += [token] * (count or 1)
            types += [1] * count or [0]
        if self.compares and ids != request.input_ids:
            raise WorkerError(f"{len(ids)} ids were made of a conversation of {len(request.input_ids)}")
        tensors = {**seen, "mm_token_type_ids": torch.tensor([types]), "position_ids": self.positions(ids, types, seen)}
        return msgspec.structs.replace(request, input_ids=ids, inputs=encode_tensors(tensors))

    def shown(self, request):
        """Compact ids, and a picture for each placeholder among them."""
        return request.prompt, [self.kept[item.identity] for item in request.media]

    def positions(self, ids, types, seen):
        ids = torch.tensor([ids])
        more = {"mm_token_type_ids": torch.tensor([types]), "attention_mask": torch.ones_like(ids)}
        return self.model.model.get_rope_index(ids, image_grid_thw=seen["image_grid_thw"], **more)[0][:, 0]
