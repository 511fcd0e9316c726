"""Cases of trackers: a world and a program of steps, as plain data. Pictures, videos and sounds are recipes, made late."""

from __future__ import annotations

import io
from typing import Any, Final, Literal, TypeAlias

import msgspec
import numpy as np

Modality: TypeAlias = Literal["image", "video", "audio"]
#: How a picture is handed over. Each form but ``pil`` needs the claim ``loads``.
Form: TypeAlias = Literal["pil", "array", "bytes", "path"]
Finish: TypeAlias = Literal["stop", "length", "aborted"]
#: How the ids of a sampled turn come from its text: as the tokenizer would encode it; byte by byte, as a policy may and no
#: tokenizer would; with a placeholder of the first modality before the text; with a feature token there; or with the turn's end in
#: the middle.
Spelling: TypeAlias = Literal["encoded", "spelled", "placeholder", "feature", "ended early"]
Logprobs: TypeAlias = Literal["none", "all", "some", "zero"]
#: ``start`` and ``extend`` take messages. ``sample`` is a turn of the policy. ``fork`` keeps the state, ``back`` goes on from a
#: kept one. ``store`` writes it to bytes and goes on from what was read. ``cut`` truncates a copy. ``bad`` is an input that must be
#: refused.
Operation: TypeAlias = Literal["start", "extend", "sample", "fork", "back", "store", "cut", "bad"]

#: A setting of which the kit makes sounds; processors take one rate only.
SAMPLING_RATE: Final = 16_000


class MediumCase(msgspec.Struct, frozen=True, omit_defaults=True):
    """The recipe of a picture, a video or a sound. ``width`` and ``height`` in pixels; ``frames`` of a video; ``height`` times
    100 is the number of samples of a sound. Equal ``seed`` and sizes give equal content. ``fps`` of a video: 0 is unknown."""

    modality: Modality = "image"
    width: int = 2
    height: int = 2
    seed: int = 0
    frames: int = 2
    fps: float = 0.0
    mode: str = "RGB"
    form: Form = "pil"

    def __str__(self) -> str:
        if self.modality == "audio":
            return f"<sound of {100 * self.height} samples{self._seed()}>"
        words = f"{self.frames} frames of " if self.modality == "video" else ""
        mode = f" {self.mode}" if self.mode != "RGB" else ""
        form = f" as {self.form}" if self.form != "pil" else ""
        return f"<{words}{self.width}x{self.height}{mode}{self._seed()}{form}>"

    def _seed(self) -> str:
        return f" no. {self.seed}" if self.seed else ""

    def pixels(self, channels: int = 3) -> np.ndarray[Any, np.dtype[np.uint8]]:
        """uint8 (height, width, channels), or (frames, height, width, 3) of a video: neighbours differ."""
        shape = (self.height, self.width, channels)
        if self.modality == "video":
            shape = (self.frames, *shape)  # type: ignore[assignment]
        places = np.arange(int(np.prod(shape)))
        return ((37 * places + 101 * self.seed + 11) % 251).astype(np.uint8).reshape(shape)

    def samples(self) -> np.ndarray[Any, np.dtype[np.float32]]:
        """float32 (100 * height,), between -1 and 1."""
        places = np.arange(100 * self.height)
        return (((17 * places + 29 * self.seed) % 199) / 100 - 0.99).astype(np.float32)

    def make(self) -> Any:
        """A new object: a ``PIL.Image.Image`` or another form of a picture, uint8 frames of a video, float32 samples of a sound."""
        if self.modality == "video":
            return self.pixels()
        if self.modality == "audio":
            return self.samples()
        if self.form == "array":
            return self.pixels()
        image = self.image()
        if self.form == "pil":
            return image
        data = io.BytesIO()
        image.save(data, "PNG")
        return data.getvalue()

    def image(self) -> Any:
        """The picture as Pillow has it."""
        from PIL import Image

        size = (self.width, self.height)
        if self.mode == "P":
            image = Image.frombytes("P", size, (self.pixels(1) % 4).tobytes())
            image.putpalette([(50 * i + self.seed) % 256 for i in range(12)])
            return image
        channels = {"L": 1, "RGB": 3, "RGBA": 4}[self.mode]
        return Image.frombytes(self.mode, size, self.pixels(channels).tobytes())

    def part(self) -> dict[str, Any]:
        """The part of a message's content that shows it."""
        options: dict[str, Any] = {}
        if self.modality == "video" and self.fps:
            options["metadata"] = {"fps": self.fps}
        if self.modality == "audio":
            options["sampling_rate"] = SAMPLING_RATE
        return {"type": self.modality, self.modality: self.make(), **options}


class MessageCase(msgspec.Struct, frozen=True, omit_defaults=True):
    """A message. Content of one text alone is given as a string, any other as a list of parts. ``call``: a tool that it calls."""

    role: str = "user"
    content: tuple[str | MediumCase, ...] = ("a",)
    call: str = ""

    def make(self) -> dict[str, Any]:
        """A new message for a tracker or a template."""
        if len(self.content) == 1 and isinstance(self.content[0], str):
            return {"role": self.role, "content": self.content[0], **self.called()}
        parts = [{"type": "text", "text": part} if isinstance(part, str) else part.part() for part in self.content]
        return {"role": self.role, "content": parts, **self.called()}

    def called(self) -> dict[str, Any]:
        """The key of a message that calls a tool."""
        if not self.call:
            return {}
        return {"tool_calls": [{"type": "function", "id": "c0", "function": {"name": self.call, "arguments": {"at": "1"}}}]}

    def media(self) -> list[MediumCase]:
        return [part for part in self.content if isinstance(part, MediumCase)]

    def __str__(self) -> str:
        words = " ".join(repr(part) if isinstance(part, str) else str(part) for part in self.content)
        return f"{self.role} {words}" + (f" and a call of {self.call}" if self.call else "")


class Step(msgspec.Struct, frozen=True, omit_defaults=True):
    """One step of a program.

    ``messages`` of start and extend. Of a sampled turn: ``text``, how it becomes ids, how it ended, which logprobs came with it,
    and whether the token that ends a turn is among the ids. ``number``: which kept state, where to cut, which kind of bad input.
    """

    operation: Operation = "extend"
    messages: tuple[MessageCase, ...] = ()
    text: str = ""
    spelling: Spelling = "encoded"
    finish: Finish = "stop"
    stop: bool = True
    logprobs: Logprobs = "none"
    number: int = 0

    def __str__(self) -> str:
        if self.operation in ("start", "extend"):
            return f"{self.operation} [{', '.join(map(str, self.messages))}]"
        if self.operation == "sample":
            words = [f"sample {self.text!r}"]
            words += [self.spelling] if self.spelling != "encoded" else []
            words += [] if self.stop else ["without its end"]
            words += [self.finish] if self.finish != "stop" else []
            words += [f"logprobs {self.logprobs}"] if self.logprobs != "none" else []
            return ", ".join(words)
        return f"{self.operation} {self.number}"


class TrackerCase(msgspec.Struct, frozen=True, omit_defaults=True, kw_only=True):
    """What a tracker is tried on: the name of a world, a program, and numbers that a check reads in its own way."""

    world: str = "chatml+rows"
    steps: tuple[Step, ...] = ()
    at: tuple[int, ...] = ()
    media: tuple[MediumCase, ...] = ()
    kind: str = ""

    def __str__(self) -> str:
        words = [f"world {self.world}"]
        words += [self.kind] if self.kind else []
        words += [str(medium) for medium in self.media]
        words += [str(step) for step in self.steps]
        words += [f"at {list(self.at)}"] if self.at else []
        return "; ".join(words)
