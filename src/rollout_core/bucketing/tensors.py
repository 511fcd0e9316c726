"""One tensor at a time: is it plain bytes, which bytes, and is it the same view as another."""

from __future__ import annotations

from typing import Any, Final

import torch

from rollout_core.bucketing.digest import default_algorithm, payload_digest
from rollout_core.bucketing.dtypes import BIT_EXACT_COPY, ITEMSIZES, label
from rollout_core.errors import SourceError

#: Integers of each width: a copy through them moves bits and interprets nothing.
_INTEGERS: Final = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
#: Tensor types that are known to be plain strided memory once their layout says so.
PLAIN_TYPES: Final = frozenset({torch.Tensor, torch.nn.Parameter})


def is_sharded(tensor: Any) -> bool:
    """Whether ``tensor`` is a DTensor (or acts like one): its bytes exist only after ``full_tensor()``."""
    return type(tensor) not in PLAIN_TYPES and hasattr(type(tensor), "full_tensor")


def check_describable(name: str, tensor: Any) -> None:
    """Raise ``SourceError`` unless ``tensor`` is a dense torch.Tensor of a dtype that travels. Meta tensors pass."""
    if not isinstance(tensor, torch.Tensor):
        raise SourceError(f"tensor {name!r} is a {type(tensor).__name__}, not a torch.Tensor; drop it from the source")
    if tensor.is_quantized:
        raise SourceError(
            f"tensor {name!r} is quantized ({tensor.dtype}): its bytes do not hold its scale; "
            "send int_repr(), q_scale() and q_zero_point() as tensors of their own"
        )
    if tensor.layout is not torch.strided or tensor.is_nested:
        kind = "nested" if tensor.is_nested else str(tensor.layout).removeprefix("torch.")
        raise SourceError(
            f"tensor {name!r} has layout {kind}, not strided, so it is no single run of bytes; "
            "send to_dense(), or its values and indices as tensors of their own"
        )
    if tensor.dtype not in ITEMSIZES:
        raise SourceError(f"tensor {name!r} has dtype {tensor.dtype}, which does not travel")
    if torch.nn.parameter.is_lazy(tensor):
        raise SourceError(f"tensor {name!r} is not initialized yet; run the module once, so that it knows its shapes")
    if type(tensor) in PLAIN_TYPES or is_sharded(tensor):
        return
    # FakeTensor, functorch wrappers and tensors made of other tensors have no bytes of their own to view.
    made_of_tensors: bool = hasattr(type(tensor), "__tensor_flatten__")
    if made_of_tensors or type(tensor).__name__ == "FakeTensor":
        raise SourceError(
            f"tensor {name!r} is a {type(tensor).__name__}, which holds no bytes of its own; "
            "send the plain tensors that it is made of"
        )


def materialize(name: str, tensor: torch.Tensor) -> torch.Tensor:
    """The plain, detached tensor behind one that is describable: gathered if sharded. ``SourceError`` if it has no data."""
    if is_sharded(tensor):
        tensor = tensor.full_tensor()  # type: ignore[attr-defined]
    if tensor.is_meta:
        raise SourceError(f"tensor {name!r} is on the meta device and has no data to pack; load the weights (or to_empty) first")
    plain = tensor.detach().as_subclass(torch.Tensor)
    check_memory(name, plain)
    return plain


def was_freed(tensor: torch.Tensor) -> bool:
    """Whether its storage was resized to nothing, which leaves it its size."""
    return tensor.numel() > 0 and not tensor.untyped_storage().nbytes()


def check_memory(name: str, tensor: torch.Tensor) -> None:
    """Raise ``SourceError`` for a tensor that was freed."""
    if was_freed(tensor):
        raise SourceError(f"tensor {name!r} has no memory: its storage was freed, as FSDP does with what it has gathered")


def resolved(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor without conjugate or negative bit, by flipping signs: torch's own resolving goes through float registers for
    16-bit components, which turns signalling NaNs into quiet ones."""
    conj, neg = tensor.is_conj(), tensor.is_neg()
    if not conj and not neg:
        return tensor
    if not tensor.dtype.is_floating_point and not tensor.dtype.is_complex:
        return tensor.resolve_neg()  # integers have no sign bit to flip, and none to lose
    tensor = tensor.conj() if conj else tensor
    copied = own_copy(torch._neg_view(tensor) if neg else tensor)
    width = tensor.dtype.itemsize // (2 if tensor.dtype.is_complex else 1)
    components = copied.view(-1).view(_INTEGERS[width])
    sign = torch.iinfo(_INTEGERS[width]).min
    if neg:
        components ^= sign
    if conj:
        components[1::2] ^= sign
    return copied


def as_bytes(tensor: torch.Tensor) -> torch.Tensor:
    """The bytes of a plain tensor in row-major order: 1-d uint8, a view where memory allows it, else a fresh copy.

    Conjugate and negative views are resolved first, so the bytes are those of the values that a reader of the tensor sees.
    """
    tensor = resolved(tensor)
    itemsize = tensor.dtype.itemsize
    if not tensor.is_contiguous():
        # torch has no 16-byte integer; complex128 is copied as its two float64 halves, which also moves bits unchanged.
        integers = tensor.view(_INTEGERS[itemsize]) if itemsize in _INTEGERS else torch.view_as_real(tensor)
        tensor = integers.contiguous()
    # as_strided and not view: one element with an odd stride counts as contiguous, yet cannot be re-typed.
    flat = tensor.as_strided((tensor.numel(),), (1,), tensor.storage_offset())
    return flat.view(torch.uint8)


def bytes_digest(tensor: torch.Tensor) -> bytes:
    """16 bytes that are equal for plain tensors of equal bytes on the same kind of device."""
    return payload_digest(as_bytes(tensor), b"", default_algorithm(tensor.device))


def same_bits_copy(target: torch.Tensor, source: torch.Tensor) -> None:
    """Copy ``source`` into ``target`` (same dtype and shape, contiguous, any device) without changing a bit."""
    if source.dtype in BIT_EXACT_COPY:
        target.copy_(source)
    else:
        integers = _INTEGERS[source.dtype.itemsize]
        target.view(integers).copy_(source.view(integers))


def own_copy(tensor: torch.Tensor) -> torch.Tensor:
    """A contiguous copy with a storage of exactly its own bytes."""
    if tensor.is_conj() or tensor.is_neg():
        return resolved(tensor)
    flat = torch.empty(tensor.numel() * tensor.dtype.itemsize, dtype=torch.uint8, device=tensor.device)
    copied = flat.view(tensor.dtype).view(tensor.shape)
    same_bits_copy(copied, tensor)
    return copied


def view_key(tensor: torch.Tensor) -> tuple[Any, ...] | None:
    """Equal for two live tensors exactly when they are the same storage and view; None where the question has no answer.

    A key outlives its tensor, and memory is used again: compare only keys of tensors that are alive at the same time.
    """
    if tensor.is_meta or is_sharded(tensor):
        return (id(tensor),)
    if tensor.numel() == 0:
        return None
    bits = (tensor.is_conj(), tensor.is_neg())
    return (tensor.device, tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride(), *bits)


def describe(dtype: torch.dtype, shape: tuple[int, ...]) -> str:
    """``bf16[3, 4]``, as messages write a tensor."""
    return f"{label(dtype)}{list(shape)}"
