"""B1 and B5: what comes out equals what went in, whatever the capacity."""

from __future__ import annotations

import torch
from hypothesis import strategies as st

from rollout_core.testing import strategies
from rollout_core.testing.cases import PackerCase
from rollout_core.testing.checks.base import FLOATS, packer_check, plain, plain_cases, round_trip
from rollout_core.testing.oracles import difference, picture
from rollout_core.testing.packers import PackerUnderTest
from rollout_core.testing.registry import Violation
from rollout_core.testing.strategies import packer_cases, shapes

#: A dtype of every width: code may look at strides for some of them only.
_WIDTHS = st.sampled_from([torch.float32, torch.bfloat16, torch.float8_e4m3fn, torch.int64, torch.complex128])
_VIEWS = ["contiguous", "strided", "transposed", "expanded", "expanded last", "one element, odd stride"]


packer_check("packer/B1-order", "plain tensors come out under their names, in their order", cases=plain_cases())(round_trip)

packer_check(
    "packer/B1-dtypes",
    "every dtype keeps its bytes and stays what it is",
    cases=packer_cases(tensors=plain(max_size=3, dtypes=strategies.dtypes())),
)(round_trip)

packer_check(
    "packer/B1-bits",
    "NaN payloads and negative zeros survive: bytes move, not values",
    cases=packer_cases(tensors=plain(max_size=3, dtypes=FLOATS, fills=st.just("special"))),
)(round_trip)

packer_check(
    "packer/B1-zero-size",
    "a tensor without elements keeps its place, name, dtype and shape",
    cases=packer_cases(tensors=plain(max_size=4, shapes=st.sampled_from([(1,), (0,), (2, 0), (0, 3), (2, 0, 3)]))),
)(round_trip)

packer_check(
    "packer/B1-scalars",
    "a tensor of no dimensions arrives as one",
    cases=packer_cases(tensors=plain(max_size=4, shapes=st.sampled_from([(1,), ()]))),
)(round_trip)

packer_check(
    "packer/B1-strided",
    "strided, transposed and expanded tensors arrive as the values that a reader of them sees",
    cases=packer_cases(
        tensors=plain(
            max_size=3, dtypes=_WIDTHS, shapes=shapes(min_dims=1, min_side=1, max_side=3), layouts=st.sampled_from(_VIEWS)
        )
    ),
)(round_trip)

packer_check(
    "packer/B1-offset",
    "a slice that begins later than its storage arrives as that slice",
    cases=packer_cases(tensors=plain(max_size=3, layouts=st.sampled_from(["contiguous", "sliced", "detached slice"]))),
)(round_trip)

packer_check(
    "packer/B1-conj",
    "conjugate views arrive conjugated, also beside the tensor that they are of",
    cases=packer_cases(
        tensors=plain(
            max_size=3, dtypes=st.just(torch.complex64), layouts=st.just("conj"), relations=st.sampled_from([None, "conj of"])
        )
    ),
)(round_trip)

packer_check(
    "packer/B1-neg",
    "negative views (the imaginary part of a conjugate) arrive negated",
    cases=packer_cases(tensors=plain(max_size=2, layouts=st.just("neg"))),
)(round_trip)

packer_check(
    "packer/B1-shared",
    "views that share a storage and are not the same view arrive each as itself",
    cases=packer_cases(
        tensors=plain(
            min_size=2,
            max_size=4,
            shapes=shapes(min_dims=1, max_dims=2, min_side=2),
            relations=st.sampled_from([None, "head", "tail", "transposed", "as int32"]),
        )
    ),
)(round_trip)

packer_check(
    "packer/B1-parameter",
    "a parameter, which requires grad, travels as its data",
    cases=packer_cases(tensors=plain(max_size=2, layouts=st.just("parameter"))),
)(round_trip)

packer_check(
    "packer/B1-large",
    "tensors of kilobytes and megabytes arrive whole",
    cases=packer_cases(tensors=plain(max_size=3, shapes=st.sampled_from([(1,), (5000,), (300, 301), (1 << 18,)]))),
    cost=10,
)(round_trip)

packer_check(
    "packer/B1-split",
    "a tensor that is split over buckets arrives whole, whatever its dtype, layout and content",
    cases=packer_cases(
        tensors=plain(
            max_size=2,
            dtypes=_WIDTHS,
            shapes=shapes(min_dims=1, min_side=1),
            layouts=st.sampled_from(["strided", "transposed", "expanded", "sliced"]),
            fills=strategies.fills(),
        ),
        oversize=True,
    ),
    needs=["oversize=split"],
)(round_trip)

packer_check(
    "packer/B1-many",
    "thousands of tiny tensors all arrive",
    cases=packer_cases(tensors=plain(min_size=0, max_size=2, dtypes=st.just(torch.uint8)), tiny=st.integers(1, 3000)).map(
        lambda case: PackerCase(tensors=case.tensors, tiny=case.tiny, capacity=max(case.capacity, case.tiny // 20, 1))
    ),
    cost=5,
)(round_trip)


_CAPACITIES_SCRIPT = """
def arrived(capacity):
    return [(name, t.dtype, t.shape, raw(t)) for name, t in packer.unpack(list(packer.pack(named, capacity)))]

for other in {others}:
    assert arrived(other) == arrived(capacity), (other, capacity)
"""


@packer_check(
    "packer/B5-capacity",
    "the result does not depend on the capacity",
    cases=lambda capabilities: plain_cases(other_capacities=True, oversize=bool({"oversize=split", "oversize=own"} & capabilities)),
    script=_CAPACITIES_SCRIPT,
)
def capacity(packer: PackerUnderTest, case: PackerCase) -> None:
    first = picture(packer.unpack(packer.pack(case.make(packer.device), case.capacity)))
    for other in case.others:
        again = picture(packer.unpack(packer.pack(case.make(packer.device), other)))
        problem = difference(first, again)
        if problem is not None:
            raise Violation(f"with capacity {other} the result is another than with {case.capacity}: {problem}")
