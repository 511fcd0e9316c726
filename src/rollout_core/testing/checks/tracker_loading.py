"""M14: a picture is the same in whatever form it comes."""

from __future__ import annotations

import io
import tempfile
from pathlib import Path
from typing import Final

import msgspec

from rollout_core.testing.checks.tracker_base import require_ids, require_outputs, tracker_check
from rollout_core.testing.checks.tracker_media import OBLONG, WIDE, Part, image_part, medium_case
from rollout_core.testing.registry import Violation
from rollout_core.testing.tracker_cases import MessageCase, Step, TrackerCase
from rollout_core.testing.tracker_play import Play
from rollout_core.testing.trackers import TrackerUnderTest

FORMS: Final = ("array", "bytes", "path")
#: EXIF orientation -> how Pillow turns an upright picture into the one that is stored.
STORED: Final = {
    2: "FLIP_LEFT_RIGHT",
    3: "ROTATE_180",
    4: "FLIP_TOP_BOTTOM",
    5: "TRANSPOSE",
    6: "ROTATE_90",
    7: "TRANSVERSE",
    8: "ROTATE_270",
}


def _come_in(subject: TrackerUnderTest, case: TrackerCase, what: str, part: Part) -> None:
    """A picture that came in some way gives what it gives as a Pillow image."""
    plain = case.media[0]
    found = Play(subject, case.world)
    found.do(Step("start", (MessageCase("user", ("a", plain)),)))
    other = Play(subject, case.world)
    state = other.tracker.start([{"role": "user", "content": [{"type": "text", "text": "a"}, part]}])
    whose = f"the picture itself (not {what})"
    require_ids(found.world, found.tracker.input_ids(found.state), other.tracker.input_ids(state), whose)
    if "multi_modal_inputs" in subject.capabilities:
        model, actual = found.tracker.multi_modal_inputs(found.state), other.tracker.multi_modal_inputs(state)
        require_outputs(model, actual, (), whose)
    if "items" in subject.capabilities:
        one, two = (play.tracker.items(it)[0][2] for play, it in ((found, found.state), (other, state)))
        if one != two:
            raise Violation(f"{what} has another identity than the picture itself: {two!r:.20} and {one!r:.20}")


@tracker_check(
    "tracker/M14-forms",
    "a picture is the same as a path, as bytes, as a Pillow image and as an array",
    only=("chatml+rows", "chatml+tiles"),
    needs=["loads"],
    cases=medium_case(FORMS, WIDE),
)
def forms(subject: TrackerUnderTest, case: TrackerCase) -> None:
    medium = case.media[0]
    if case.kind == "array":
        _come_in(subject, case, "as an array", image_part(medium.pixels()))
        return
    data = msgspec.structs.replace(medium, form="bytes").make()
    if case.kind == "bytes":
        _come_in(subject, case, "as bytes", image_part(data))
        return
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "picture.png"
        path.write_bytes(data)
        _come_in(subject, case, "as a path", image_part(str(path)))


@tracker_check(
    "tracker/M14-orientation",
    "a picture that is stored turned, with an EXIF orientation, is the upright picture",
    only=("chatml+rows", "chatml+tiles"),
    needs=["loads"],
    cases=medium_case(tuple(map(str, STORED)), OBLONG),
)
def orientation(subject: TrackerUnderTest, case: TrackerCase) -> None:
    from PIL import Image

    number = int(case.kind)
    turned = case.media[0].image().transpose(getattr(Image.Transpose, STORED[number]))
    exif = Image.Exif()
    exif[0x0112] = number
    data = io.BytesIO()
    turned.save(data, "PNG", exif=exif)
    _come_in(subject, case, f"with EXIF orientation {number}", image_part(data.getvalue()))
