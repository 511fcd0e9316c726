"""Hypothesis strategies for named tensors, plans, streams and manifests; and for conversations, their templates and their media.

Every strategy draws recipes (dtype, shape, memory layout) and makes data from them late, so that examples shrink to few, small,
plainly named tensors. All arguments are strategies or bounds, keyword-only, with defaults that reach the edges: every dtype that
this torch has, no elements, no dimensions, views of every kind, NaN payloads, tensors that share memory, capacities that fit
exactly or fall one byte short. Bad arguments raise ``InvalidArgument`` when a value is drawn.
"""

from __future__ import annotations

import string
from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any, Final, TypeAlias

import torch
from hypothesis import strategies as st
from hypothesis.errors import InvalidArgument

from rollout_core.bucketing import BucketPlan, StreamBucket, TensorSpec, pack_stream, plan_buckets
from rollout_core.bucketing.dtypes import DTYPES, WIRE_NAMES
from rollout_core.bucketing.placement import Order, Oversize
from rollout_core.testing.cases import LAYOUTS, Fill, Layout, PackerCase, Relation, TensorCase, make_tensors, related_case
from rollout_core.testing.packers import name_of
from rollout_core.testing.tracker_strategies import conversations, pictures, sounds, templates, videos

__all__ = [
    "capacities",
    "conversations",
    "dtypes",
    "fills",
    "hostile_manifests",
    "layouts",
    "manifests",
    "named_tensors",
    "names",
    "packer_cases",
    "pictures",
    "plans",
    "relations",
    "shapes",
    "sounds",
    "streams",
    "templates",
    "tensor_cases",
    "tensor_specs",
    "videos",
]

#: Simplest first: an example shrinks towards the front.
_ORDER: Final = ("float32", "bfloat16", "uint8", "int64", "float16", "float8_e4m3fn", "bool", "complex64", "float64")
_DTYPE_NAMES: Final = (*_ORDER, *(name for name in DTYPES if name not in _ORDER))
#: In a name, what a str, a path, a format or an attribute may trip over.
_ODD_NAMES: Final = (
    *("a.b.weight", "a", "A", "a ", " a", "\u00e9", "e\u0301", "0", "None", "a/b", "a\x00b", "'", "\n", "\u540d", "__class__"),
)


def dtypes(*, exclude: Iterable[torch.dtype] = ()) -> st.SearchStrategy[torch.dtype]:
    """Every dtype that travels and that this torch has, the common ones first."""
    left_out = frozenset(exclude)
    for dtype in left_out:
        if dtype not in WIRE_NAMES:
            return _refuse(f"dtypes(exclude=...) has {dtype!r}, which is no dtype that travels; pass for example [torch.bool]")
    return st.sampled_from([DTYPES[name] for name in _DTYPE_NAMES if DTYPES[name] not in left_out])


def shapes(*, min_dims: int = 0, max_dims: int = 3, min_side: int = 0, max_side: int = 5) -> st.SearchStrategy[tuple[int, ...]]:
    """Shapes of ``min_dims`` to ``max_dims`` dimensions of ``min_side`` to ``max_side`` elements."""
    if not 0 <= min_dims <= max_dims:
        return _refuse(f"shapes(min_dims={min_dims}, max_dims={max_dims}): 0 <= min_dims <= max_dims must hold")
    if not 0 <= min_side <= max_side:
        return _refuse(f"shapes(min_side={min_side}, max_side={max_side}): 0 <= min_side <= max_side must hold")
    several = st.lists(st.integers(min_side, max_side), min_size=min_dims, max_size=max_dims).map(tuple)
    if min_dims <= 1 <= max_dims and min_side <= 1 <= max_side:
        return st.just((1,)) | several  # one element first: 0-d and empty tensors are odd, not simple
    return several


def names() -> st.SearchStrategy[str]:
    """Names of tensors: any non-empty text, with those that trip code up among them. No lone surrogates, which UTF-8 has not."""
    return st.sampled_from(_ODD_NAMES) | st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=8)


def layouts() -> st.SearchStrategy[Layout]:
    """How a tensor lies in memory: contiguous, or as one of several kinds of view."""
    return st.sampled_from(LAYOUTS)


def fills() -> st.SearchStrategy[Fill]:
    """What the elements are: ordinary numbers that all differ, NaN payloads and -0.0, or zeros."""
    return st.sampled_from(("pattern", "special", "zeros"))


def relations() -> st.SearchStrategy[Relation | None]:
    """How a tensor is made of an earlier one, if it is: tied, the same view, or a part of the same storage."""
    return st.sampled_from((None, None, "tied", "same view", "head", "tail", "transposed", "as int32", "conj of"))


@st.composite
def tensor_specs(
    draw: st.DrawFn,
    *,
    names: st.SearchStrategy[str] | None = None,
    dtypes: st.SearchStrategy[torch.dtype] | None = None,
    shapes: st.SearchStrategy[tuple[int, ...]] | None = None,
) -> TensorSpec:
    """One TensorSpec: name, dtype and shape, no data. Lists of them with unique names: ``st.lists(..., unique_by=lambda s:
    s.name)``."""
    return TensorSpec(
        draw(_strategy(names, "names", "st.just('weight')", _NAMES)),
        draw(_strategy(dtypes, "dtypes", "st.just(torch.float32)", _DTYPES)),
        draw(_strategy(shapes, "shapes", "st.just((2, 3))", _SHAPES)),
    )


def tensor_cases(
    *,
    min_size: int = 0,
    max_size: int = 6,
    names: st.SearchStrategy[str] | None = None,
    dtypes: st.SearchStrategy[torch.dtype] | None = None,
    shapes: st.SearchStrategy[tuple[int, ...]] | None = None,
    layouts: st.SearchStrategy[Layout] | None = None,
    fills: st.SearchStrategy[Fill] | None = None,
    relations: st.SearchStrategy[Relation | None] | None = None,
    same_dtype: bool = False,
) -> st.SearchStrategy[tuple[TensorCase, ...]]:
    """The recipes of ``min_size`` to ``max_size`` named tensors, of which ``make_tensors`` makes data.

    Without ``names`` they are called a, b, c, ... in order. A layout that a tensor cannot have (a transposed vector) falls back to
    contiguous, and ``conj`` asks for a complex dtype. ``same_dtype``: one dtype for all of them, so that nothing needs padding.
    """
    if not 0 <= min_size <= max_size:
        return _refuse(f"min_size={min_size}, max_size={max_size}: 0 <= min_size <= max_size must hold")
    try:
        element = st.tuples(
            _strategy(dtypes, "dtypes", "st.just(torch.float32)", _DTYPES),
            _strategy(shapes, "shapes", "st.just((2, 3))", _SHAPES),
            _twists(layouts, fills, relations),
        )
        named = st.tuples(st.just("") if names is None else _strategy(names, "names", "st.just('weight')", _NAMES), element)
    except InvalidArgument as error:
        return _refuse(str(error))
    unique = None if names is None else lambda pair: pair[0]
    # Made once and not in a composite: drawing is most of the time that a check takes.
    return st.lists(named, min_size=min_size, max_size=max_size, unique_by=unique).map(partial(_assembled, same_dtype=same_dtype))


def _assembled(drawn: Sequence[tuple[str, tuple[Any, ...]]], *, same_dtype: bool) -> tuple[TensorCase, ...]:
    cases: list[TensorCase] = []
    for place, (name, (dtype, shape, (layout, fill, relation, pick))) in enumerate(drawn):
        name = name or _letters(place)
        if same_dtype and cases:
            dtype = cases[0].torch_dtype
        of = len(cases) - 1 - pick % len(cases) if relation is not None and cases else None
        if of is not None and relation is not None and _can_relate(cases[of], relation):
            cases.append(related_case(cases[of], of, relation, name))
        else:
            cases.append(_fitting(name, dtype, shape, layout, fill))
    return tuple(cases)


def named_tensors(
    *,
    min_size: int = 0,
    max_size: int = 6,
    names: st.SearchStrategy[str] | None = None,
    dtypes: st.SearchStrategy[torch.dtype] | None = None,
    shapes: st.SearchStrategy[tuple[int, ...]] | None = None,
    layouts: st.SearchStrategy[Layout] | None = None,
    fills: st.SearchStrategy[Fill] | None = None,
    relations: st.SearchStrategy[Relation | None] | None = None,
    same_dtype: bool = False,
    device: str = "cpu",
) -> st.SearchStrategy[list[tuple[str, torch.Tensor]]]:
    """A list of (name, tensor) with unique names, as a packer takes it. By default of every dtype, memory layout, fill and
    relation; arguments as for ``tensor_cases``."""
    cases = tensor_cases(
        min_size=min_size,
        max_size=max_size,
        names=names,
        dtypes=dtypes,
        shapes=shapes,
        layouts=_LAYOUTS if layouts is None else layouts,
        fills=_FILLS if fills is None else fills,
        relations=_RELATIONS if relations is None else relations,
        same_dtype=same_dtype,
    )
    return cases.map(partial(make_tensors, device=device))


def capacities(specs: Sequence[TensorSpec], *, oversize: bool = False) -> st.SearchStrategy[int]:
    """Capacities in bytes at which packing these specs is most likely to go wrong: all in one bucket, the largest tensor alone,
    every exact fit, one byte more and one byte less. ``oversize``: smaller than the largest tensor too, down to one element of the
    widest dtype (which ``split`` can serve)."""
    strange = [name_of(spec) for spec in specs if not isinstance(spec, TensorSpec)]
    if strange:
        return _refuse(f"capacities() was given {strange[0]}; pass a list of TensorSpec, for example specs_of(model)")
    sizes, itemsizes = [spec.nbytes for spec in specs], [spec.dtype.itemsize for spec in specs]
    return _marks(oversize=oversize).map(lambda mark: _capacity(mark, sizes, itemsizes, oversize=oversize))


def packer_cases(
    *,
    tensors: st.SearchStrategy[tuple[TensorCase, ...]] | None = None,
    oversize: bool = False,
    tiny: st.SearchStrategy[int] | None = None,
    other_capacities: bool = False,
    places: int = 0,
) -> st.SearchStrategy[PackerCase]:
    """What a packer check is tried on: tensors and a capacity that suits them. ``oversize``: the capacity may be smaller than a
    tensor. ``tiny``: how many one-byte tensors follow. ``other_capacities``: further capacities too. ``places``: so many numbers in
    ``at``."""
    mark = _marks(oversize=oversize)
    try:
        return st.builds(
            partial(_packer_case, oversize),
            mark,
            st.lists(mark, min_size=1, max_size=3) if other_capacities else st.just([]),
            st.tuples(*[st.integers(0, 1 << 16)] * places),
            _strategy(tiny, "tiny", "st.just(1000)", st.just(0)),
            _strategy(tensors, "tensors", "tensor_cases()", _TENSOR_CASES),
        )
    except InvalidArgument as error:
        return _refuse(str(error))


def _packer_case(
    oversize: bool, mark: _Mark, others: list[_Mark], at: tuple[int, ...], tiny: int, tensors: tuple[TensorCase, ...]
) -> PackerCase:
    sizes = [case.nbytes for case in tensors]
    itemsizes = [case.torch_dtype.itemsize for case in tensors]
    first, *rest = (
        _capacity(each, [*sizes, tiny], itemsizes, oversize=oversize, largest=max(sizes, default=1)) for each in (mark, *others)
    )
    return PackerCase(tensors=tensors, capacity=first, tiny=tiny, others=tuple(rest), at=at)


@st.composite
def plans(draw: st.DrawFn, *, specs: st.SearchStrategy[Sequence[TensorSpec]] | None = None) -> BucketPlan:
    """A BucketPlan of any specs, capacity, oversize policy, order and alignment."""
    policies: tuple[Oversize, ...] = ("split", "own")
    orders: tuple[Order, ...] = ("given", "packed")
    oversize, order = draw(st.sampled_from(policies)), draw(st.sampled_from(orders))
    align, mark = draw(st.sampled_from((1, 2, 16, 256))), draw(_marks(oversize=True))
    several = st.lists(tensor_specs(), max_size=6, unique_by=lambda spec: spec.name)
    drawn = draw(_strategy(specs, "specs", "st.just(specs_of(model))", several))
    sizes, itemsizes = [spec.nbytes for spec in drawn], [spec.dtype.itemsize for spec in drawn]
    capacity = _capacity(mark, sizes, itemsizes, oversize=True)
    return plan_buckets(drawn, capacity, oversize=oversize, order=order, align=align)


@st.composite
def streams(draw: st.DrawFn) -> tuple[list[tuple[str, torch.Tensor]], list[StreamBucket]]:
    """Named tensors, and the buckets of a stream of them as ``pack_stream`` makes it."""
    mark = draw(_marks(oversize=True))
    pairs = draw(named_tensors())
    sizes, itemsizes = [t.numel() * t.dtype.itemsize for _, t in pairs], [t.dtype.itemsize for _, t in pairs]
    return pairs, list(pack_stream(pairs, _capacity(mark, sizes, itemsizes, oversize=True)))


def manifests() -> st.SearchStrategy[bytes]:
    """Valid manifests: the bytes of ``plans()``."""
    return plans().map(BucketPlan.to_bytes)


@st.composite
def hostile_manifests(draw: st.DrawFn, *, manifests: st.SearchStrategy[bytes] | None = None) -> bytes:
    """Bytes that are no valid manifest, or by chance still one: noise, or a valid one cut, extended, or with bytes changed."""
    good = bytearray(draw(_strategy(manifests, "manifests", "st.just(plan.to_bytes())", _MANIFESTS)))
    kind = draw(st.sampled_from(("cut", "extended", "changed", "noise")))
    place = draw(st.integers(0, max(len(good) - 1, 0)))
    if kind == "noise" or not good:
        return draw(st.binary(max_size=64))
    if kind == "cut":
        return bytes(good[:place])
    if kind == "extended":
        return bytes(good) + draw(st.binary(min_size=1, max_size=8))
    good[place] ^= draw(st.integers(1, 255))
    return bytes(good)


def _twists(
    layouts: st.SearchStrategy[Layout] | None,
    fills: st.SearchStrategy[Fill] | None,
    relations: st.SearchStrategy[Relation | None] | None,
) -> st.SearchStrategy[tuple[Layout, Fill, Relation | None, int]]:
    """What is odd about a tensor: nothing, its layout, its fill, both, or its relation to another. One choice decides, because
    Hypothesis deletes at most five choices at once, and a plain tensor has to be left out in one go."""
    contiguous, pattern, alone = st.just("contiguous"), st.just("pattern"), st.tuples(st.none(), st.just(0))
    layouts = None if layouts is None else _strategy(layouts, "layouts", "st.just('strided')", contiguous)
    fills = None if fills is None else _strategy(fills, "fills", "st.just('special')", pattern)
    odd: list[st.SearchStrategy[Any]] = []
    if layouts is not None:
        odd.append(st.tuples(layouts, pattern, alone))
    if fills is not None:
        odd.append(st.tuples(contiguous, fills, alone))
    if relations is not None:
        related = _strategy(relations, "relations", "st.just('tied')", st.none())
        odd.append(st.tuples(contiguous, pattern, st.tuples(related, st.integers(0, 5))))
    if layouts is not None and fills is not None:
        odd.append(st.tuples(layouts, fills, alone))
    return st.one_of(odd or [st.tuples(contiguous, pattern, alone)]).map(lambda drawn: (drawn[0], drawn[1], *drawn[2]))


#: A mark that a capacity is near, which tensors it is of, and the distance. It does not depend on the tensors, so that it is drawn
#: before them and keeps its meaning while shrinking leaves tensors out: Hypothesis leaves out elements of a list best if nothing is
#: drawn after it.
_Mark: TypeAlias = tuple[str, int, int]


def _marks(*, oversize: bool) -> st.SearchStrategy[_Mark]:
    # Where tensors may be larger than the capacity the least capacity is the simplest, otherwise one that all of them fit.
    kinds = ("least", "first", "one") if oversize else ("first", "one", "least")
    return st.tuples(st.sampled_from(kinds), st.integers(0, 6), st.sampled_from((0, -1, 1)))


def _capacity(mark: _Mark, sizes: Sequence[int], itemsizes: Sequence[int], *, oversize: bool, largest: int | None = None) -> int:
    biggest = max(sizes, default=1) if largest is None else largest
    least = max([1, *itemsizes]) if oversize else max([1, biggest])
    kind, place, distance = mark
    match kind:
        case "first":  # so many tensors from the front; 0: all
            near = sum(sizes[:place] if place else sizes)
        case "one":  # one tensor; 0: the largest
            near = sizes[place - 1] if 0 < place <= len(sizes) else biggest
        case _:  # or some sevenths of all beyond it
            return least + place * sum(sizes) // 7
    return max(least, near + distance)


def _letters(place: int) -> str:
    """a, b, ... z, then a1, b1, ..."""
    round_, letter = divmod(place, 26)
    return string.ascii_lowercase[letter] + (str(round_) if round_ else "")


def _can_relate(case: TensorCase, relation: Relation) -> bool:
    """Whether a view of this kind can be made: all of a tensor that has elements, or a real part of one with several rows."""
    if case.of is not None or 0 in case.shape:
        return False
    if relation in ("head", "tail"):
        return bool(case.shape) and case.shape[0] >= 2
    if relation == "transposed":
        return len(case.shape) == 2
    if relation == "as int32":
        return case.dtype == "float32" and case.layout in ("contiguous", "sliced")
    return relation != "conj of" or case.torch_dtype.is_complex


def _fitting(name: str, dtype: torch.dtype, shape: tuple[int, ...], layout: Layout, fill: Fill) -> TensorCase:
    """A recipe that can be made: the layout falls back to one that this tensor can have."""
    if layout == "conj" and not dtype.is_complex:
        dtype = torch.complex64
    if layout in ("neg", "parameter") and dtype not in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        dtype = torch.float32
    if layout == "one element, odd stride":
        shape = (1,)
    too_flat = layout == "transposed" and len(shape) < 2
    if too_flat or (layout.startswith("expanded") and not shape) or (0 in shape and layout not in ("contiguous", "sliced")):
        layout = "contiguous"
    return TensorCase(name, WIRE_NAMES[dtype], shape, layout, fill)


def _strategy(value: Any, argument: str, example: str, default: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    """The strategy passed for an argument; ``InvalidArgument`` that says what to pass if it is a value instead."""
    if value is None:
        return default
    if not isinstance(value, st.SearchStrategy):
        raise InvalidArgument(f"{argument}={value!r} is {name_of(value)}, not a strategy; pass one, for example {example}")
    return value


def _refuse(message: str) -> st.SearchStrategy[Any]:
    """A strategy that raises when it is drawn from, as Hypothesis's own do."""

    def fail() -> Any:
        raise InvalidArgument(message)

    return st.builds(fail)


#: Defaults of arguments, made once.
_NAMES: Final = names()
_DTYPES: Final = dtypes()
_SHAPES: Final = shapes()
_LAYOUTS: Final = layouts()
_FILLS: Final = fills()
_RELATIONS: Final = relations()
_TENSOR_CASES: Final = tensor_cases()
_MANIFESTS: Final = manifests()
