"""What the checks of packers share: how one is declared, the round trip, and the ends of reproduction scripts."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any, Final, TypeAlias

import torch
from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy

from rollout_core.testing import strategies
from rollout_core.testing.cases import PackerCase, TensorCase
from rollout_core.testing.oracles import Picture, bytes_of, difference, picture
from rollout_core.testing.packers import PackerUnderTest, Pairs, bucket_tensors
from rollout_core.testing.registry import Check, Skipped, Violation, register

RunPacker: TypeAlias = Callable[[PackerUnderTest, PackerCase], Any]

ROUND_TRIP: Final = """
result = list(packer.unpack(list(packer.pack(named, capacity))))
assert [name for name, _ in result] == [name for name, _ in named], [name for name, _ in result]
for (name, sent), (_, got) in zip(named, result):
    assert got.dtype == sent.dtype, (name, got.dtype, sent.dtype)
    assert got.shape == sent.shape, (name, got.shape, sent.shape)
    assert raw(got) == raw(sent), (name, got, sent)
"""

#: For scripts: bytes of a bucket.
NBYTES: Final = """
def nbytes(bucket):
    if hasattr(packer, "bucket_nbytes"):
        return packer.bucket_nbytes(bucket)
    pairs = bucket.items() if isinstance(bucket, dict) else [("", bucket)] if isinstance(bucket, torch.Tensor) else bucket
    return sum(t.numel() * t.element_size() for _, t in pairs)
"""


def must_raise(statement: str, errors: str = "Exception") -> str:
    """The end of a script whose last statement has to raise one of these errors."""
    return f"""
try:
    {statement}
except {errors} as error:
    print("refused:", error)
else:
    raise AssertionError("this was not refused")
"""


def packer_check(
    id: str,
    title: str,
    *,
    cases: SearchStrategy[PackerCase] | Callable[[frozenset[str]], SearchStrategy[PackerCase]],
    needs: Collection[str] = (),
    script: str = ROUND_TRIP,
    twins: bool = False,
    cost: int = 1,
) -> Callable[[RunPacker], RunPacker]:
    """Declare a check of packers; ``cases`` may depend on the packer's capabilities."""

    def declare(run: RunPacker) -> RunPacker:
        register(
            Check(
                id=id,
                title=title,
                run=run,
                cases=cases if callable(cases) else lambda capabilities: cases,
                case_type=PackerCase,
                needs=frozenset(needs),
                script=script,
                twins=twins,
                cost=cost,
            )
        )
        return run

    return declare


def round_trip(packer: PackerUnderTest, case: PackerCase) -> Pairs:
    """Pack and unpack, compare with what went in, and return what came out; ``Violation`` if it differs."""
    named = case.make(packer.device)
    model = picture(named)
    result = packer.unpack(packer.pack(named, case.capacity))
    require_same(model, result)
    return result


def require_same(model: list[Picture], result: Pairs) -> None:
    """``Violation`` unless these are the named tensors of the model."""
    require_none(difference(model, picture(result)))


def require_none(problem: str | None) -> None:
    """``Violation`` if there is a problem."""
    if problem is not None:
        raise Violation(problem)


def require_refusal(packer: PackerUnderTest, call: Callable[[], Any], what: str) -> Exception:
    """The error with which a call is refused; ``Violation`` saying ``what`` was accepted if it is not."""
    error = packer.refusal(call)
    if error is None:
        raise Violation(f"{what}: no error was raised")
    return error


def buckets_of(packer: PackerUnderTest, case: PackerCase, *, least: int = 1) -> list[Any]:
    """The buckets of a case that the packer can pack. A case that it cannot pack, or of fewer buckets, says nothing to a check of
    what happens to buckets later: None then, as an empty list."""
    try:
        buckets = packer.pack(case.make(packer.device), case.capacity)
    except Violation:
        return []
    return buckets if len(buckets) >= least else []


def content_of(packer: PackerUnderTest, bucket: Any) -> Any:
    """What can be seen of a bucket's content, at this moment. ``Skipped`` if nothing can."""
    if "buffer" in packer.capabilities:
        return bytes_of(packer.buffer(bucket))
    tensors = [bucket] if isinstance(bucket, torch.Tensor) else bucket_tensors(bucket)
    if tensors is None:
        raise Skipped("its buckets have no buffer(bucket) and are no tensors or lists of pairs")
    return [bytes_of(tensor) for tensor in tensors]


def overwrite(tensors: Collection[torch.Tensor]) -> None:
    """Change every byte of the storages of these tensors, in place."""
    seen = set()
    for tensor in tensors:
        storage = tensor.untyped_storage()
        if storage.nbytes() and storage.data_ptr() not in seen:
            seen.add(storage.data_ptr())
            whole = torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(storage)
            whole.bitwise_xor_(0xFF)


#: Shapes with elements, one element first.
SHAPES: Final = strategies.shapes(min_dims=1, min_side=1)
_COMMON: Final = st.sampled_from([torch.float32, torch.bfloat16])


def plain(**options: Any) -> SearchStrategy[tuple[TensorCase, ...]]:
    """Contiguous tensors with elements, of one common dtype, so that no padding is needed: only ``options`` make it odd."""
    return strategies.tensor_cases(**{"min_size": 1, "dtypes": _COMMON, "shapes": SHAPES, "same_dtype": True, **options})


def plain_cases(
    *, min_size: int = 1, max_size: int = 6, shapes: SearchStrategy[tuple[int, ...]] = SHAPES, **options: Any
) -> SearchStrategy[PackerCase]:
    """Cases of plain tensors; ``options`` as for ``packer_cases``."""
    return strategies.packer_cases(tensors=plain(min_size=min_size, max_size=max_size, shapes=shapes), **options)


def rounded(packer: PackerUnderTest, nbytes: int) -> int:
    """Bytes up to the next place at which this packer aligns."""
    return nbytes + -nbytes % packer.align


#: As vLLM, SGLang and trainers meet them side by side: mixed widths, in any order.
MIXED_DTYPES: Final = st.sampled_from(
    [torch.bfloat16, torch.float32, torch.uint8, torch.int64, torch.float8_e4m3fn, torch.complex128]
)
FLOATS: Final = st.sampled_from(
    [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.float8_e4m3fn, torch.float8_e5m2]
)
