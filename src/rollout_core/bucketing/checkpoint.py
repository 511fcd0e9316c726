"""Buckets on disk are safetensors: write an update as a plain file, read files lazily. The one module here that opens a file."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import torch

from rollout_core.bucketing.bucket import Bucket
from rollout_core.bucketing.dtypes import DTYPES
from rollout_core.bucketing.plan import BucketPlan
from rollout_core.bucketing.specs import TensorSpec
from rollout_core.bucketing.unpacker import Unpacker
from rollout_core.errors import DuplicateNameError, SourceError

if TYPE_CHECKING:
    from rollout_core.bucketing.placement import Slot

#: The dtype names of the safetensors format, https://github.com/huggingface/safetensors (safetensors/src/tensor.rs, enum Dtype).
_FORMAT_NAMES: Final = {
    "bool": "BOOL",
    "uint8": "U8",
    "uint16": "U16",
    "uint32": "U32",
    "uint64": "U64",
    "int8": "I8",
    "int16": "I16",
    "int32": "I32",
    "int64": "I64",
    "float16": "F16",
    "bfloat16": "BF16",
    "float32": "F32",
    "float64": "F64",
    "complex64": "C64",
    "float8_e4m3fn": "F8_E4M3",
    "float8_e5m2": "F8_E5M2",
    "float8_e8m0fnu": "F8_E8M0",
    "float8_e4m3fnuz": "F8_E4M3FNUZ",
    "float8_e5m2fnuz": "F8_E5M2FNUZ",
}
_TO_FORMAT: Final = {DTYPES[name]: code for name, code in _FORMAT_NAMES.items() if name in DTYPES}
_FROM_FORMAT: Final = {code: dtype for dtype, code in _TO_FORMAT.items()}
_INDEX: Final = "model.safetensors.index.json"


def save_buckets(plan: BucketPlan, buckets: Iterable[Bucket], path: str | os.PathLike[str], *, verify: bool = True) -> None:
    """Write one round of buckets as one safetensors file, which the plain safetensors library loads.

    Each bucket is written as it comes, so memory holds one; the file appears under its name only when it is complete. Tied names
    are recorded in the metadata as ``{tied name: name}``, the convention of ``safetensors.torch.save_model``, whose ``load_model``
    ties them again.

    Raises ``SourceError`` before writing for a name or dtype that the format cannot hold (complex32, complex128, float4, sub-byte
    and bits dtypes), and the errors of ``Unpacker`` for the buckets.
    """
    header, starts = _header(plan)
    unpacker = Unpacker(plan, verify=verify)
    target = Path(path)
    handle, name = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.", suffix=".part")
    part = Path(name)
    try:
        with os.fdopen(handle, "wb") as file:
            os.fchmod(file.fileno(), 0o666 & ~_umask())
            file.write(header)
            for bucket in buckets:
                unpacker.feed(bucket)
                for slot in plan.buckets[bucket.index].slots:
                    _write_slot(file, len(header) + starts[slot.name] + slot.start, slot, bucket.buffer)
            unpacker.close()
        part.replace(target)
    finally:
        part.unlink(missing_ok=True)


def _umask() -> int:
    """mkstemp makes private files; an update is as readable as any other file of this process."""
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _write_slot(file: Any, position: int, slot: Slot, buffer: torch.Tensor) -> None:
    file.seek(position)
    file.write(buffer[slot.offset : slot.end].cpu().numpy().data)


def _header(plan: BucketPlan) -> tuple[bytes, dict[str, int]]:
    """The file's header, and where each tensor starts in its data: by descending itemsize, so that every tensor is aligned in a
    file without a gap, which is all that the format allows."""
    travelling = [spec for spec in plan.specs if spec.alias_of is None]
    for spec in plan.specs:
        if spec.name == "__metadata__" or not spec.name.isprintable() or (spec.alias_of and spec.name == "format"):
            raise SourceError(f"tensor {spec.name!r} has a name that safetensors cannot hold")
    entries: dict[str, Any] = {"__metadata__": {"format": "pt", **{s.name: s.alias_of for s in plan.specs if s.alias_of}}}
    starts: dict[str, int] = {}
    end = 0
    for spec in sorted(travelling, key=lambda spec: -spec.dtype.itemsize):
        code = _TO_FORMAT.get(spec.dtype)
        if code is None:
            raise SourceError(f"tensor {spec.name!r} ({spec}) has a dtype that safetensors cannot hold")
        starts[spec.name] = end
        entries[spec.name] = {"dtype": code, "shape": list(spec.shape), "data_offsets": [end, end + spec.nbytes]}
        end += spec.nbytes
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text, starts


class SafetensorsSource(Mapping[str, torch.Tensor]):
    """A safetensors file, or a folder of them, as a mapping that reads a tensor when it is asked for and keeps none.

    A folder with ``model.safetensors.index.json`` is read as it says; any other has its ``*.safetensors`` read by name. Raises
    ``SourceError`` if there is none, or one is damaged, and ``DuplicateNameError`` for a name in two files.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        try:
            from safetensors import safe_open
        except ImportError as error:
            raise SourceError("reading safetensors needs the safetensors package: pip install 'rollout-core[hf]'") from error
        self._safe_open = safe_open
        self._home: dict[str, Path] = {}
        self._specs: list[TensorSpec] = []
        for file, wanted in _files(Path(path)):
            for spec in self._read_header(file, wanted):
                if spec.name in self._home:
                    raise DuplicateNameError(f"name {spec.name!r} stands in {self._home[spec.name]} and in {file}")
                self._home[spec.name] = file
                self._specs.append(spec)
        self._names = {spec.name: spec.alias_of or spec.name for spec in self._specs}

    def __tensor_specs__(self) -> list[TensorSpec]:
        """The specs in file order, from the headers alone."""
        return list(self._specs)

    def __getitem__(self, name: str) -> torch.Tensor:
        stored = self._names[name]
        try:
            with self._safe_open(self._home[stored], framework="pt") as file:
                tensor: torch.Tensor = file.get_tensor(stored)
        except OSError as error:
            raise SourceError(f"tensor {name!r} cannot be read: {error}") from error
        return tensor

    def __contains__(self, name: object) -> bool:
        return name in self._names  # Mapping's own would read the tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def _read_header(self, path: Path, wanted: set[str] | None) -> Iterator[TensorSpec]:
        """The specs of one file, tied names after their tensors; only the wanted ones if an index says which."""
        try:
            with self._safe_open(path, framework="pt") as file:
                names = list(file.offset_keys())
                tied: dict[str, list[str]] = {}
                for name, root in (file.metadata() or {}).items():
                    if name not in names and name != "format":
                        tied.setdefault(root, []).append(name)
                if wanted is not None:
                    missing = sorted(wanted.difference(names))
                    if missing:
                        raise SourceError(f"the index says that {missing[0]!r} is in {path}, and it is not")
                    names = [name for name in names if name in wanted]
                for name in names:
                    part = file.get_slice(name)
                    code = part.get_dtype()
                    if code not in _FROM_FORMAT:
                        raise SourceError(f"tensor {name!r} in {path} has dtype {code}, which does not travel")
                    spec = TensorSpec(name, _FROM_FORMAT[code], tuple(part.get_shape()))
                    yield spec
                    yield from (TensorSpec(other, spec.dtype, spec.shape, name) for other in tied.get(name, ()))
        except SourceError:
            raise
        except Exception as error:  # safetensors has an error class of its own, and raises others too
            raise SourceError(f"{path} cannot be read as safetensors: {error}") from error


def _files(path: Path) -> list[tuple[Path, set[str] | None]]:
    """The files to read, each with the names to take from it (None: all)."""
    if path.is_file():
        return [(path, None)]
    index = path / _INDEX
    if index.is_file():
        try:
            weight_map = json.loads(index.read_text())["weight_map"]
            wanted: dict[str, set[str]] = {}
            for name, file in weight_map.items():
                if Path(file).name != file:
                    raise ValueError(f"{file!r} is not the name of a file beside it")
                wanted.setdefault(file, set()).add(name)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise SourceError(f"{index} is no safetensors index: {error!r}") from error
        return [(path / file, names) for file, names in wanted.items()]
    files = sorted(path.glob("*.safetensors"))
    if not files:
        raise SourceError(f"{path} is no safetensors file, and no folder with one in it")
    return [(file, None) for file in files]
