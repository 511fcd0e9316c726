"""Where thousands of tensors lie, and whether each is what it has to be, in one pass."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any, Final

import numpy as np
import torch

from rollout_core.bucketing.dtypes import ITEMSIZES
from rollout_core.compiled.library import Integers, Library

#: Of so many tensors and more it pays, as compiling takes a tenth of a second.
MANY: Final = 64
_WANTED: Final = np.dtype([("code", "i4"), ("bits", "i4"), ("lanes", "i4"), ("ndim", "i4"), ("first", "i8")])


class Finder:
    """Finds tensors of given dtypes and shapes, in their order, on one device, by ``library``."""

    @classmethod
    def of(cls, dtypes: Sequence[torch.dtype], shapes: Sequence[tuple[int, ...]], device: torch.device) -> Finder | None:
        """None where there is no compiled code, or none for these: complex tensors may be lazily conjugated, empty ones lie
        nowhere, and DLPack has no name for bits."""
        library = compiled()
        if library is None or not library.names.keys() >= set(dtypes) or not all(map(all, shapes)):
            return None
        try:
            return cls(library, dtypes, shapes, device)
        except RuntimeError:  # within one of torch's transforms, say, where tensors are something else
            return None

    def __init__(
        self, library: Library, dtypes: Sequence[torch.dtype], shapes: Sequence[tuple[int, ...]], device: torch.device
    ) -> None:
        names = [library.names[dtype] for dtype in dtypes]
        counts = np.array([len(shape) for shape in shapes], np.int64)
        self._wanted = np.empty(len(dtypes), _WANTED)
        for column, numbers in zip(("code", "bits", "lanes"), zip(*names, strict=True), strict=True):
            self._wanted[column] = numbers
        self._wanted["ndim"] = counts
        self._wanted["first"] = np.cumsum(counts) - counts
        self._sizes = np.array([size for shape in shapes for size in shape], np.int64)
        self._tables = (self._wanted.ctypes.data, self._sizes.ctypes.data)
        self.library = library
        here = library.described(torch.empty(1, dtype=torch.uint8, device=device))
        self._where = (here.device_type, here.device_id)
        # DLPack has one name for int4 and int8, each in a byte.
        self._homonyms = [(place, dtype) for place, dtype in enumerate(dtypes) if dtype in library.homonyms]

    def __deepcopy__(self, memo: object) -> Finder:
        return self  # it does not change, and keeps no tensor

    def addresses(self, rows: list[torch.Tensor]) -> Integers | None:
        """Of each row's first byte, int64; None if one is no plain contiguous tensor, or not as it has to be."""
        found = np.empty(len(self._wanted), np.int64)
        if len(rows) != len(found):
            return None
        count = self.library.addresses(rows, len(found), *self._tables, *self._where, found)
        # Their number once more, as Python may have run meanwhile.
        if count != len(found) or len(rows) != count or any(rows[place].dtype is not dtype for place, dtype in self._homonyms):
            return None
        return found


def compiled() -> Library | None:
    """The compiled code, where it can be had and sees what it is here for: made when it is first asked for."""
    found = compiled_or_reason()
    return found if isinstance(found, Library) else None


def why_not_compiled() -> str | None:
    """Why torch is asked instead; None if it is not."""
    found = compiled_or_reason()
    return None if isinstance(found, Library) else found


@cache
def compiled_or_reason() -> Library | str:
    try:
        library = Library(ITEMSIZES)
        return library if _works(library) else "it does not find what it should"
    except Exception as error:  # whatever another torch, or a compiler, raises; kept itself, it would keep its callers' tensors
        said = getattr(error, "stderr", None) or b""
        return f"{type(error).__name__}: {error} {said.decode(errors='replace')[-500:]}".rstrip()


def _works(library: Library) -> bool:
    """Whether it finds tensors where they are, sees everything else, and copies."""
    with torch.inference_mode(False):  # whatever is on where it is first asked
        here = torch.device("cpu")
        square = torch.arange(4, dtype=torch.float32, device=here).view(2, 2)
        freed = [torch.zeros(8, device=here)[skip:][:4].view(2, 2) for skip in (0, 4)]
        for tensor in freed:
            tensor.untyped_storage().resize_(0)
        finder = Finder(library, [square.dtype] * 2, [(2, 2)] * 2, here)
        like = [square, torch.nn.Parameter(square[:1].expand(2, 2).contiguous())]
        others: tuple[Any, ...] = (
            *(square.t(), square.view(4), square[:1], square.view(torch.int32), square.to("meta"), square.double()),
            *(torch._neg_view(square), *freed, square.to_sparse(), square.expand(2, 2, 2)[0].t(), torch.Tensor, None),
        )
        found = finder.addresses(like)
        if found is None or found.tolist() != [tensor.data_ptr() for tensor in like]:
            return False
        copied = torch.zeros(9, device=here)
        library.gather(found, np.array([16, 0]), np.array([16, 16]), copied.data_ptr())
        same = copied.tolist() == [0, 1, 0, 1, 0, 1, 2, 3, 0]
        return same and all(finder.addresses([square, other]) is None for other in others)
