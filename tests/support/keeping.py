"""An engine that keeps pictures, and answers with what it was given: for tests of who sends what, when."""

from __future__ import annotations

from rollout_core.workers.engine import Progress


class KeepingEngine:
    """``room``: pictures that it keeps. A response is the length of each picture's data, over and over."""

    is_read_in_update = False
    version = 0

    def __init__(self, room=1000, forgets_on_abort=False):
        self.room = room
        self.forgets_on_abort = forgets_on_abort
        self.kept = {}  # identity -> data
        self.under_way = {}  # key -> (tokens that are left)
        self.news = []
        self.taken = []  # of each request that came: key, and which of its media had data

    @property
    def is_busy(self):
        return bool(self.under_way or self.news)

    def submit(self, group):
        for request in group.requests:
            self.taken.append((request.key, [item.data is not None for item in request.media]))
            for item in request.media:
                if item.data is not None:
                    self.kept[item.identity] = item.data
                while len(self.kept) > self.room:
                    del self.kept[next(iter(self.kept))]
            missing = [item.identity for item in request.media if item.identity not in self.kept]
            if missing:
                self.news.append(Progress(request.key, [], [], 0, missing=missing))
            else:
                lengths = [len(self.kept[item.identity]) for item in request.media] or [1]
                self.under_way[request.key] = (lengths * group.params.response_length)[: group.params.response_length]

    def abort(self, keys, emit):
        found = [key for key in (list(self.under_way) if keys is None else keys) if key in self.under_way]
        for key in found:
            if self.forgets_on_abort:
                del self.under_way[key]
                emit([Progress(key, [], [], 0, missing=list(self.kept))])
            else:
                del self.under_way[key]
                emit([Progress(key, [], [], 0, "aborted")])
        self.forgets_on_abort = False

    def step(self, emit, between):
        news, self.news = self.news, []
        for key, tokens in list(self.under_way.items()):
            token = tokens.pop(0)
            news.append(Progress(key, [token], [0.0], 0, None if tokens else "length"))
            if not tokens:
                del self.under_way[key]
        emit(news)
        between()

    def forget(self, key=None):
        """All pictures; and a request that is under way, which then misses them."""
        if key is not None:
            del self.under_way[key]
            self.news.append(Progress(key, [], [], 0, missing=list(self.kept)))
        self.kept = {}

    def close(self):
        pass
