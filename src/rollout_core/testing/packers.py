"""A packer under test: what the kit calls, and what it may ask for beyond that.

A packer is any object with

- ``pack(named_tensors, capacity) -> buckets``: a list of (name, tensor) and a number of bytes to a sequence of buckets of any form;
- ``unpack(buckets) -> [(name, tensor), ...]``.

With more methods more is checked: ``bucket_nbytes(bucket)``, ``slots(bucket)``, ``buffer(bucket)``, ... (``CAPABILITIES``). What no
method shows, such as that damage is detected, it claims in ``capabilities``, a set of these names. Its attribute ``device`` says
where the tensors are made ("cpu" unless given), ``align`` what all its offsets are a multiple of.
"""

from __future__ import annotations

import asyncio
import contextlib
import inspect
from collections.abc import AsyncIterable, Callable, Coroutine, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Final, TypeAlias

import torch

from rollout_core.testing.invariants import SlotRow
from rollout_core.testing.registry import Skipped, Violation

Pairs: TypeAlias = list[tuple[str, torch.Tensor]]
SpecRow: TypeAlias = tuple[str, torch.dtype, tuple[int, ...]]

#: What a packer may have beyond pack and unpack. A method is found by itself; a claim has to be declared in ``capabilities``.
CAPABILITIES: Final[dict[str, str]] = {
    "bucket_nbytes": "method bucket_nbytes(bucket): bytes of payload, no header (not needed for tensors and lists of pairs)",
    "slots": "method slots(bucket): [(name, offset, nbytes), ...]",
    "buffer": "method buffer(bucket): the bucket's own 1-d uint8 tensor",
    "receive": "method receive(specs, capacity, buckets): the receiving side, planning for itself; specs are (name, dtype, shape)",
    "manifest": "methods manifest(named_tensors, capacity) -> bytes and read_manifest(data)",
    "async": "method apack(async_iterator, capacity): an async iterator of buckets",
    "iterators": "claim: pack takes an iterator too, and gives buckets as they fill",
    "mappings": "claim: pack takes a mapping from name to tensor too",
    "modules": "claim: pack takes a torch.nn.Module too, and its buffers travel",
    "groups": "claim: pack(..., groups=[[name, ...], ...]) puts the names of a group into one bucket",
    "views": "claim: unpacked tensors are views of the bucket's buffer",
    "end": "claim: unpack refuses a stream that stops early, repeats a bucket, reorders them or goes on after its end",
    "integrity": "claim: unpack refuses a bucket whose payload has changed",
    "versions": "claim: each call of pack is a newer round, and unpack refuses buckets of two rounds together",
    "oversize=split": "claim: a tensor larger than the capacity is split over buckets",
    "oversize=own": "claim: a tensor larger than the capacity gets a bucket of its own",
    "oversize=error": "claim: a tensor larger than the capacity is refused",
}
_METHODS: Final[dict[str, tuple[str, ...]]] = {
    **{name: (name,) for name in ("bucket_nbytes", "slots", "buffer", "receive")},
    "manifest": ("manifest", "read_manifest"),
    "async": ("apack",),
}


class Raised(Violation):
    """A method of the subject raised where it should have answered."""

    def __init__(self, method: str, error: BaseException) -> None:
        super().__init__(f"{method} raised {error_words(error)}")
        self.error = error


class Phase:
    """Which method of a subject is running: what a supervisor says of a hang or a crash."""

    current = ""

    def set(self, method: str) -> None:
        self.current = method


@contextlib.contextmanager
def calling(phase: Phase, method: str) -> Iterator[None]:
    """Notes what is running, and turns an error of it into ``Raised``."""
    phase.set(method)
    try:
        yield
    except (Skipped, Violation):
        raise
    except (Exception, SystemExit) as error:
        raise Raised(method, error) from error
    finally:
        phase.set("")


def refusal(call: Callable[[], Any]) -> Exception | None:
    """The error with which a subject refuses a call; None if it does not. What is no ``Exception`` stays ``Raised``."""
    try:
        call()
    except Raised as raised:
        if isinstance(raised.error, Exception):
            return raised.error
        raise
    return None


class PackerUnderTest:
    """A packer as the checks call it: every call is noted in ``phase``, every exception becomes ``Raised``."""

    def __init__(self, packer: Any, phase: Phase | None = None) -> None:
        for method in ("pack", "unpack"):
            if not callable(getattr(packer, method, None)):
                raise TypeError(
                    f"{name_of(packer)} has no method {method}; a packer under test has pack(named_tensors, capacity) and "
                    "unpack(buckets). A function that only groups tensors: rollout_core.testing.grouping_packer(function)"
                )
        self.packer = packer
        self.phase = phase or Phase()
        self.device: str = str(getattr(packer, "device", "cpu"))
        self.capabilities = capabilities_of(packer)

    @property
    def align(self) -> int:
        """What offsets are a multiple of beyond their itemsize."""
        return int(getattr(self.packer, "align", 1))

    def pack(self, named: Any, capacity: int, **options: Any) -> list[Any]:
        """All buckets, or ``Raised``."""
        with calling(self.phase, "pack"):
            return list(self.packer.pack(named, capacity, **options))

    def pack_lazily(self, named: Any, capacity: int, **options: Any) -> _Watched:
        """Buckets as the packer gives them; closing this closes it."""
        with calling(self.phase, "pack"):
            return _Watched(self, iter(self.packer.pack(named, capacity, **options)))

    def apack(self, source: AsyncIterable[Any], capacity: int) -> list[Any]:
        """All buckets of an async source, or ``Raised``."""
        with calling(self.phase, "apack"):
            buckets: list[Any] = run_async(collect(self.packer.apack(source, capacity)))
            return buckets

    def unpack(self, buckets: Sequence[Any]) -> Pairs:
        """The named tensors, or ``Raised``; ``Violation`` if they are none."""
        with calling(self.phase, "unpack"):
            return _pairs("unpack", self.packer.unpack(buckets))

    def receive(self, specs: Sequence[SpecRow], capacity: int, buckets: Sequence[Any]) -> Pairs:
        with calling(self.phase, "receive"):
            return _pairs("receive", self.packer.receive(list(specs), capacity, buckets))

    def manifest(self, named: Pairs, capacity: int) -> bytes:
        with calling(self.phase, "manifest"):
            return bytes(self.packer.manifest(named, capacity))

    def read_manifest(self, data: bytes) -> Any:
        with calling(self.phase, "read_manifest"):
            return self.packer.read_manifest(data)

    def nbytes(self, bucket: Any) -> int:
        """Bytes of a bucket: as its method says, or those of the tensors that it is."""
        with calling(self.phase, "bucket_nbytes"):
            return bucket_nbytes(self.packer, bucket)

    def slots(self, bucket: Any) -> list[SlotRow]:
        with calling(self.phase, "slots"):
            return [(str(name), int(offset), int(nbytes)) for name, offset, nbytes in self.packer.slots(bucket)]

    def buffer(self, bucket: Any) -> torch.Tensor:
        with calling(self.phase, "buffer"):
            buffer = self.packer.buffer(bucket)
        if not isinstance(buffer, torch.Tensor) or buffer.dtype != torch.uint8 or buffer.dim() != 1:
            is_tensor = isinstance(buffer, torch.Tensor)
            words = f" of {str(buffer.dtype).removeprefix('torch.')}{list(buffer.shape)}" if is_tensor else ""
            raise Violation(f"buffer(bucket) gave {name_of(buffer)}{words}, not a 1-d uint8 tensor")
        return buffer

    def refusal(self, call: Callable[[], Any]) -> Exception | None:
        """The error with which the packer refuses a call; None if it does not."""
        return refusal(call)


class _Watched(Iterator[Any]):
    """A packer's own iterator, each step of it a call of ``pack``."""

    def __init__(self, subject: PackerUnderTest, buckets: Iterator[Any]) -> None:
        self._subject = subject
        self._buckets = buckets
        self.can_close = callable(getattr(buckets, "close", None))
        self.kind = type(buckets).__name__

    def __next__(self) -> Any:
        with calling(self._subject.phase, "pack"):
            try:
                return next(self._buckets)
            except StopIteration:
                pass
        raise StopIteration

    def close(self) -> None:
        if self.can_close:
            with calling(self._subject.phase, "closing what pack gave"):
                self._buckets.close()  # type: ignore[attr-defined]


async def collect(items: AsyncIterable[Any]) -> list[Any]:
    return [item async for item in items]


def run_async(coroutine: Coroutine[Any, Any, Any]) -> Any:
    """What a coroutine gives, run in a thread: an event loop may run in this one."""
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(asyncio.run, coroutine).result()


def resolve(target: Any) -> Any:
    """The packer that a target stands for: itself, or what a class or factory without arguments makes."""
    if inspect.isclass(target) or (callable(target) and not hasattr(target, "pack")):
        try:
            inspect.signature(target).bind()
        except TypeError as error:
            what = "pass an instance or a factory"
            if inspect.isfunction(target):
                what += "; a function that groups tensors becomes a packer by rollout_core.testing.grouping_packer(...)"
            raise TypeError(f"{name_of(target)} cannot be called without arguments ({error}); {what}") from error
        except ValueError:
            pass  # a callable of C has no signature
        target = target()
    return target


def capabilities_of(packer: Any) -> frozenset[str]:
    """The methods that a packer has and the claims that it makes; ``TypeError`` for a claim that is not known."""
    declared: Any = getattr(packer, "capabilities", frozenset())
    if isinstance(declared, str) or not isinstance(declared, Iterable):
        raise TypeError(f"capabilities is {declared!r}; it is a set of names, for example {{'end', 'integrity'}}")
    claims = frozenset(declared)
    unknown = sorted(claims - CAPABILITIES.keys())
    if unknown:
        raise TypeError(f"capabilities has {unknown[0]!r}; it may have {', '.join(CAPABILITIES)}")
    lacking = {name: [m for m in methods if not callable(getattr(packer, m, None))] for name, methods in _METHODS.items()}
    found = {name for name, missing in lacking.items() if not missing}
    for name in sorted(claims & _METHODS.keys() - found):
        raise TypeError(f"capabilities has {name!r}, and the packer has no method {lacking[name][0]}")
    return claims | found


def bucket_nbytes(packer: Any, bucket: Any) -> int:
    """Bytes of one bucket. ``Skipped`` if nothing says how to measure it."""
    if callable(getattr(packer, "bucket_nbytes", None)):
        return int(packer.bucket_nbytes(bucket))
    if isinstance(bucket, torch.Tensor):
        return bucket.numel() * bucket.dtype.itemsize
    tensors = bucket_tensors(bucket)
    if tensors is None:
        raise Skipped(f"its buckets are {name_of(bucket)} and it has no method bucket_nbytes(bucket)")
    return sum(t.numel() * t.dtype.itemsize for t in tensors)


def bucket_tensors(bucket: Any) -> list[torch.Tensor] | None:
    """The tensors of a bucket that is a list of (name, tensor) or a mapping; None for any other."""
    if isinstance(bucket, Mapping):
        values = list(bucket.values())
    elif isinstance(bucket, list | tuple) and all(isinstance(item, list | tuple) and len(item) == 2 for item in bucket):
        values = [item[1] for item in bucket]
    else:
        return None
    return values if all(isinstance(value, torch.Tensor) for value in values) else None


def _pairs(method: str, result: Any) -> Pairs:
    if isinstance(result, Mapping):
        raise Violation(
            f"{method} gave a {type(result).__name__}, which has lost a name that came twice; it gives (name, tensor) pairs"
        )
    pairs = []
    for item in result:
        if (
            not isinstance(item, tuple | list)
            or len(item) != 2
            or not isinstance(item[0], str)
            or not isinstance(item[1], torch.Tensor)
        ):
            raise Violation(f"{method} gave {name_of(item)}, not a pair of str and torch.Tensor")
        pairs.append((item[0], item[1]))
    return pairs


def name_of(thing: Any) -> str:
    """What to call an object in a message: a class or function by its name, anything else by its class."""
    if inspect.isclass(thing) or inspect.isroutine(thing):
        return str(thing.__qualname__)
    name = type(thing).__qualname__
    return f"{'an' if name[0] in 'aeiouAEIOU' else 'a'} {name}"


def error_words(error: BaseException) -> str:
    """An error in one line: its type, what it says, and the innermost line of the code that raised it."""
    lines = str(error).strip().splitlines()
    words = type(error).__name__ + (f": {lines[0][:300]}" if lines else "")
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    if trace is not None:
        code = trace.tb_frame.f_code
        words += f" (in {code.co_qualname}, {code.co_filename.rpartition('/')[2]}:{trace.tb_lineno})"
    return words
