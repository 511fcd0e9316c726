"""Odd tensors: named examples, and strategies that reach them by construction."""

from __future__ import annotations

import itertools
import math

import numpy as np
import torch
from hypothesis import strategies as st

#: Every dtype that torch lets us make from bytes, found in torch itself and not in rollout_core.
QUANTIZED = {torch.qint8, torch.qint32, torch.quint8, torch.quint4x2, torch.quint2x4}
DTYPES = sorted({v for v in vars(torch).values() if isinstance(v, torch.dtype)} - QUANTIZED, key=str)


def from_bytes(data: bytes, dtype: torch.dtype, shape: tuple[int, ...]) -> torch.Tensor:
    if not data:
        return torch.empty(shape, dtype=dtype)
    return torch.frombuffer(bytearray(data), dtype=torch.uint8).view(dtype).view(shape)


def patterned(dtype: torch.dtype, *shape: int, seed: int = 1) -> torch.Tensor:
    """A tensor whose bytes all differ from their neighbours: a misplaced range cannot pass for the right one."""
    count = math.prod(shape) * dtype.itemsize
    return from_bytes(bytes((seed + 7 * i + i // 256) % 251 for i in range(count)), dtype, shape)


def placed_at(address: int, nbytes: int, skip: int = 0) -> torch.Tensor:
    """Bytes whose storage starts ``address`` bytes past a cache line, and which start ``skip`` bytes into it."""
    raw = np.empty(nbytes + skip + 128, dtype=np.uint8)
    start = -raw.ctypes.data % 64 + address
    return torch.from_numpy(raw[start : start + nbytes + skip])[skip:]


KINDS = (
    "contiguous", "zero size", "0-d", "strided", "transposed", "expanded", "sliced", "odd stride", "conj", "neg", "conj imag"
)  # fmt: skip


@st.composite
def tensors(draw: st.DrawFn) -> torch.Tensor:
    """One tensor of any dtype and memory layout, of random bytes: NaN payloads and -0.0 come by themselves."""
    dtype, kind = draw(st.sampled_from(DTYPES)), draw(st.sampled_from(KINDS))
    rows, columns = draw(st.integers(1, 5)), draw(st.integers(1, 5))
    if kind in ("conj", "conj imag"):
        dtype = draw(st.sampled_from([torch.complex64, torch.complex128, torch.complex32]))
    if kind == "neg":
        dtype = draw(st.sampled_from([torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.complex64]))
    data = draw(st.binary(min_size=rows * columns * 2 * dtype.itemsize, max_size=rows * columns * 2 * dtype.itemsize))
    base = from_bytes(data, dtype, (rows, 2 * columns))
    match kind:
        case "zero size":
            return base[:, :0]
        case "0-d":
            return base[0, 0]
        case "strided":
            return base[:, ::2]
        case "transposed":
            return base.t()
        case "expanded":
            return base[:1].expand(rows + 1, 2 * columns)
        case "sliced":
            return base.view(-1)[1:]
        case "odd stride":
            return base.view(-1)[:: 2 * columns][:1]
        case "conj":
            return base.conj()
        case "neg":
            return torch._neg_view(base)
        case "conj imag":
            return base.conj().imag
    return base


names = st.text(st.characters(), min_size=1, max_size=8)


@st.composite
def named(draw: st.DrawFn, max_size: int = 8, elements=None) -> list[tuple[str, torch.Tensor]]:
    """Named tensors with unique names; some are views of a storage that another one uses, some are tied."""
    elements = tensors() if elements is None else elements
    keys = draw(st.lists(names, unique=True, max_size=max_size))
    pairs: list[tuple[str, torch.Tensor]] = []
    for name in keys:
        earlier = [t for _, t in pairs if t.numel()]
        if earlier and draw(st.integers(0, 3)) == 0:
            tensor = draw(st.sampled_from(earlier))
            if draw(st.booleans()) and tensor.dim() == 1:
                tensor = tensor[: max(1, tensor.numel() // 2)]  # shares storage, and is no tie
        else:
            tensor = draw(elements)
        pairs.append((name, tensor))
    return pairs


@st.composite
def capacities(draw: st.DrawFn, pairs: list[tuple[str, torch.Tensor]]) -> int:
    """Capacities that fit every element: the smallest, exact fits and one off, and beyond everything."""
    widest = max((t.dtype.itemsize for _, t in pairs), default=1)
    sizes = [t.numel() * t.dtype.itemsize for _, t in pairs]
    marks = {widest, sum(sizes), *sizes, *(a + b for a, b in itertools.pairwise(sizes))}
    near = sorted({mark + d for mark in marks for d in (-1, 0, 1) if mark + d >= widest})
    return draw(st.sampled_from(near) | st.integers(widest, 400))


#: How a plan can be made; every combination must give the same result.
plan_options = st.fixed_dictionaries(
    {
        "oversize": st.sampled_from(["split", "own"]),
        "order": st.sampled_from(["given", "packed"]),
        "align": st.sampled_from([1, 2, 4, 64]),
    }
)


def odd_inputs() -> dict[str, torch.Tensor]:
    """The named examples: the ones on which peers break (A S T Z 0d of the research notes), and every kind that B1 lists."""
    f32 = torch.float32
    nan_payloads = from_bytes(bytes.fromhex("0100807f 0100c07f ffffffff 00000080".replace(" ", "")), f32, (4,))
    shared = patterned(torch.bfloat16, 12)
    examples = {
        "A: three bf16 before f32": patterned(torch.bfloat16, 3),
        "A: then one f32": patterned(f32, 1),
        "S: x[:, ::2]": patterned(f32, 4, 6)[:, ::2],
        "T: transposed": patterned(torch.float16, 4, 6).t(),
        "Z: zero size": patterned(f32, 0, 3),
        "Z: zero size in the middle": patterned(torch.int64, 2, 0, 3),
        "0d: 0-dim f32": patterned(f32, 1)[0],
        "0d: 0-dim bool": torch.tensor(True),
        "expanded": patterned(f32, 1, 3).expand(5, 3),
        "negative-offset slice": patterned(torch.int32, 9)[-4:],
        "flipped": patterned(torch.int16, 9).flip(0),
        "sliced from the middle": patterned(torch.uint8, 9)[3:8],
        "one element of odd stride": patterned(f32, 10)[::5][:1],
        "channels last": patterned(f32, 2, 3, 2, 2).to(memory_format=torch.channels_last),
        "conj": patterned(torch.complex64, 5).conj(),
        "neg: imag of conj": patterned(torch.complex128, 5).conj().imag,
        "neg": torch._neg_view(patterned(torch.float64, 5)),
        "conj of complex32": patterned(torch.complex32, 5).conj(),
        "shares storage: first half": shared[:6],
        "shares storage: overlapping": shared[3:9],
        "tied": shared[:6],
        "NaN payloads and -0.0": nan_payloads,
        "bool with a byte of 2": from_bytes(b"\x02\x00\x01\xff", torch.bool, (4,)),
        "requires grad": patterned(f32, 3).requires_grad_(),
        "parameter": torch.nn.Parameter(patterned(f32, 2, 2)),
        "deep": patterned(torch.uint8, *([1] * 12), 3),
    }
    for dtype in DTYPES:
        examples[f"{dtype}"] = patterned(dtype, 3, 5)
        examples[f"{dtype}, strided"] = patterned(dtype, 4, 6)[:, 1::2]
    return examples
