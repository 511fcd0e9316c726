"""The families that this package knows.

Where a single item does not come out as it does among others, the family (or one of its modalities) either needs a setting, a
``Pin``, or is refused with the reason. The text that stands for an item must not depend on its neighbours either.
"""

from __future__ import annotations

from typing import Final

from rollout_core.multimodal.families.family import Family
from rollout_core.multimodal.families.grids import GOOGLE, GRIDS, QWEN
from rollout_core.multimodal.families.tiles import REFUSED, TILES

#: A tokenizer alone.
TEXT: Final = Family("text", ("PreTrainedTokenizerBase",))

KNOWN: Final[tuple[Family, ...]] = (*QWEN, *GOOGLE, *GRIDS, *TILES, *REFUSED, TEXT)
