"""Where many tensors lie: found in one pass of compiled code, or not found at all, but never wrongly."""

from __future__ import annotations

import ctypes
import gc
import random
import subprocess
import sysconfig
import weakref

import pytest
import torch

from rollout_core.bucketing import Packer, plan_buckets, specs_of
from rollout_core.bucketing.dtypes import ITEMSIZES
from rollout_core.bucketing.finding import Finder, compiled_or_reason, why_not_compiled
from rollout_core.compiled import library
from support.in_place import CHANGES, square

CPU = torch.device("cpu")
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")


@pytest.fixture
def compiled_anew():
    compiled_or_reason.cache_clear()
    yield
    compiled_or_reason.cache_clear()


def finder(*tensors):
    return Finder.of([t.dtype for t in tensors], [tuple(t.shape) for t in tensors], CPU)


BITS = [torch.bits8, torch.bits16, torch.bits1x8, torch.bits2x4, torch.bits4x2]
NAMED = [dtype for dtype in ITEMSIZES if not dtype.is_complex and dtype not in BITS]


@pytest.mark.parametrize("dtype", NAMED, ids=str)
def test_every_dtype_is_found_and_told_from_the_others(dtype):
    tensors = [torch.zeros(3, dtype=torch.uint8), torch.empty((), dtype=dtype), torch.empty((2, 1, 3), dtype=dtype)]
    known = finder(*tensors)
    assert known.addresses(tensors).tolist() == [tensor.data_ptr() for tensor in tensors]
    for other in sorted(set(ITEMSIZES) - {dtype}, key=str):
        assert known.addresses([*tensors[:2], torch.empty((2, 1, 3), dtype=other)]) is None


def test_views_and_parameters_are_found():
    base = torch.arange(40.0)
    tensors = [
        *(base[3:9].view(2, 3), torch.nn.Parameter(base[10:20]), base[20:21].as_strided((1, 1), (7, 9)), base[0]),
        torch.zeros(5, requires_grad=True),
    ]
    found = finder(*tensors).addresses(tensors)
    assert found.tolist() == [tensor.data_ptr() for tensor in tensors]


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("place", [0, 5, 40])
def test_a_tensor_that_changed_in_place_is_not_found(change, place):
    tensors = [square() for _ in range(41)]
    known = finder(*tensors)
    assert known.addresses(tensors) is not None
    CHANGES[change](tensors[place])
    assert known.addresses(tensors) is None


@pytest.mark.parametrize("kind", ["sparse", "compressed", "quantized", "nested", "jagged", "lazy", "meta", "own", "number", "none"])
def test_what_is_no_plain_tensor_is_not_found(kind):
    class Own(torch.Tensor):
        pass

    parts = [torch.zeros(3), torch.zeros(3)]
    other = {
        "sparse": lambda: torch.zeros(4, 4).to_sparse(),
        "compressed": lambda: torch.zeros(4, 4).to_sparse_csr(),
        "quantized": lambda: torch.quantize_per_tensor(torch.zeros(4, 4), 0.1, 0, torch.qint8),
        "nested": lambda: torch.nested.nested_tensor(parts),
        "jagged": lambda: torch.nested.nested_tensor(parts, layout=torch.jagged),
        "lazy": torch.nn.UninitializedParameter,
        "meta": lambda: torch.zeros(4, 4, device="meta"),
        "own": lambda: torch.zeros(4, 4).as_subclass(Own),
        "number": lambda: 3,
        "none": lambda: None,
    }[kind]()
    assert finder(square(), square()).addresses([square(), other]) is None
    assert torch.zeros(1).add(1).item() == 1, "an error that was left behind would be raised by whatever comes next"


@pytest.mark.parametrize("skip", [0, 1, 5])
@pytest.mark.parametrize("low", [None, 1 << 62], ids=["high", "low"])
def test_a_tensor_without_memory_is_not_found(skip, low, monkeypatch):
    """Wherever the interpreter's heap is."""
    if low is not None:
        monkeypatch.setattr(library, "LOW", low)
    tensors = [torch.zeros(40, dtype=dtype)[skip:] for dtype in (torch.bool, torch.float32, torch.float64)]
    known = finder(*tensors)
    assert known.addresses(tensors).tolist() == [tensor.data_ptr() for tensor in tensors]
    for tensor in reversed(tensors):
        tensor.untyped_storage().resize_(0)
        assert known.addresses(tensors) is None
        tensor.untyped_storage().resize_(40 * tensor.itemsize)
        assert known.addresses(tensors) is not None


@pytest.mark.parametrize("answer", [ValueError, "not a number"])
def test_a_mode_that_hides_the_offset_is_no_answer(answer, monkeypatch):
    monkeypatch.setattr(library, "LOW", 1 << 62)

    class Hides(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            if function is torch.Tensor.storage_offset:
                if answer is ValueError:
                    raise ValueError
                return answer
            return function(*args, **(kwargs or {}))

    rows = [square(), square()]
    known = finder(*rows)
    with Hides():
        assert known.addresses(rows) is None
    assert known.addresses(rows) is not None


def test_as_many_as_were_planned_in_a_list():
    known = finder(square(), square())
    assert known.addresses([square()]) is None
    assert known.addresses([square()] * 3) is None
    assert known.addresses((square(), square())) is None
    assert known.addresses([one := square(), one]).tolist() == [one.data_ptr()] * 2


def test_a_list_that_is_changed_meanwhile():
    """By a mode of torch, which runs Python with every call."""
    rows = [square() for _ in range(50)]
    known = finder(*rows)

    class Shortens(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            rows.clear()
            gc.collect()
            return function(*args, **(kwargs or {}))

    with Shortens():
        assert known.addresses(rows) is None


def test_a_mode_that_raises_is_no_answer():
    class Raises(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            if function is torch.Tensor.is_neg:
                raise ValueError("not now")
            return function(*args, **(kwargs or {}))

    rows = [square(), square()]
    known = finder(*rows)
    with Raises():
        assert known.addresses(rows) is None


def test_an_interrupt_meanwhile_is_the_callers():
    class Interrupts(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            raise KeyboardInterrupt

    rows = [square(), square()]
    known = finder(*rows)
    with Interrupts(), pytest.raises(KeyboardInterrupt):
        known.addresses(rows)


def test_none_where_torch_transforms_what_is_made():
    made = []
    torch.func.grad(lambda x: made.append(finder(square())) or x.sum())(torch.zeros(3))
    assert made == [None]


@pytest.mark.parametrize("warn_only", [False, True])
def test_int4_is_no_int8_in_deterministic_mode(warn_only, compiled_anew):
    tensors = [torch.zeros(8, dtype=dtype) for dtype in (torch.int8, torch.uint8)]
    like = [tensors[0].view(torch.int4), tensors[1].view(torch.uint4)]
    torch.use_deterministic_algorithms(True, warn_only=warn_only)
    try:
        known = finder(*tensors)
        assert known.addresses(tensors) is not None
        assert known.addresses([like[0], tensors[1]]) is None
        assert known.addresses([tensors[0], like[1]]) is None
        assert finder(*like).addresses(like) is not None
    finally:
        torch.use_deterministic_algorithms(False)


def test_it_keeps_no_tensor():
    tensors = [square(), square()]
    known = finder(*tensors)
    known.addresses(tensors)
    refs = [weakref.ref(tensor) for tensor in tensors]
    del tensors
    gc.collect()
    assert [ref() for ref in refs] == [None, None]
    assert known.addresses([square(), square()]) is not None


@pytest.mark.parametrize("dtype", [torch.complex32, torch.complex64, torch.complex128, *BITS], ids=str)
def test_none_for_complex_tensors_and_bits(dtype):
    assert finder(square(), torch.empty(2, dtype=dtype)) is None


def test_none_for_empty_tensors():
    assert finder(square(), torch.zeros(2, 0)) is None


@pytest.mark.parametrize("missing", ["compiler", "compiler of the variable", "interface", "lock", "sight", "places", "copies"])
def test_without_what_it_needs_torch_is_asked(missing, monkeypatch, compiled_anew):
    match missing:
        case "compiler":
            monkeypatch.delenv("CC", raising=False)
            monkeypatch.setenv("PATH", "/nowhere")
        case "compiler of the variable":
            monkeypatch.setenv("CC", "no-such-compiler -O2")
        case "interface":
            api = library._ExchangeAPI(major=2)
            made = ctypes.pythonapi.PyCapsule_New
            made.restype, made.argtypes = ctypes.py_object, [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p]
            capsule = made(ctypes.addressof(api), b"dlpack_exchange_api", None)
            monkeypatch.setattr(torch.Tensor, "__dlpack_c_exchange_api__", capsule)
        case "lock":
            monkeypatch.setattr(sysconfig, "get_config_var", lambda name: 1 if name == "Py_GIL_DISABLED" else None)
        case "sight":
            monkeypatch.setattr(library.Library, "addresses", lambda self, rows, count, *rest: count)
        case "places":
            found = library.Library.addresses
            monkeypatch.setattr(library.Library, "addresses", lambda *all_: (found(*all_), all_[-1].__iadd__(1))[0])
        case "copies":
            monkeypatch.setattr(library.Library, "gather", lambda *rest: None)
    assert finder(square(), square()) is None
    assert why_not_compiled()


def test_where_torch_keeps_storages_is_found_or_not_guessed(monkeypatch):
    """It only makes finding quicker."""
    assert library.storage_place() > 0
    for hidden in (lambda self: 1 / 0, lambda self: 64):
        with monkeypatch.context() as patch:
            patch.setattr(torch.Tensor, "_cdata", property(hidden), raising=False)
            assert library.storage_place() == 0
    with monkeypatch.context() as patch:
        patch.setattr(torch.UntypedStorage, "_cdata", property(lambda self: 64), raising=False)
        assert library.storage_place() == 0


def test_thousands_are_found_wherever_they_lie():
    """What is fetched before it is asked for is no tensor's end, and no row's of another kind."""
    tensors = [torch.zeros(3) for _ in range(5000)]
    random.Random(3).shuffle(tensors)
    tensors[2500] = torch.nn.Parameter(tensors[2500])
    known = finder(*tensors)
    assert known.addresses(tensors).tolist() == [tensor.data_ptr() for tensor in tensors]
    for place, other in ((4999, None), (3000, 7), (2501, torch.zeros(3, 1)), (10, torch.zeros(3).to_sparse())):
        changed = [*tensors[:place], other, *tensors[place + 1 :]]
        assert known.addresses(changed) is None


def test_a_compiler_that_fails_is_quoted(monkeypatch, compiled_anew):
    monkeypatch.setenv("CC", "cc -no-such-option")
    assert "no-such-option" in why_not_compiled().partition("exit status")[2]


@pytest.mark.parametrize("compiler", ["no-such-compiler", "false"])
def test_b15_without_a_compiler_no_tensor_is_kept(compiler, monkeypatch, compiled_anew):
    monkeypatch.setenv("CC", compiler)
    pairs = [(f"w{i}", square()) for i in range(100)]
    packer = Packer(plan_buckets(specs_of(pairs), 1 << 20))
    for _ in range(3):
        list(packer.pack(pairs))
    refs = [weakref.ref(packer), *(weakref.ref(tensor) for _, tensor in pairs)]
    del packer, pairs
    gc.collect()
    assert why_not_compiled()
    assert [ref for ref in refs if ref() is not None] == []


def test_a_compiler_without_headers_of_python_or_a_c_library(monkeypatch, compiled_anew):
    own = subprocess.run(["cc", "-print-file-name=include"], check=True, capture_output=True, text=True).stdout.strip()
    monkeypatch.setenv("CC", f"cc -nostdinc -isystem {own}")
    assert finder(square(), square()) is not None
    assert why_not_compiled() is None


def test_the_compiler_that_the_environment_names(monkeypatch, compiled_anew):
    called = []
    run = subprocess.run
    monkeypatch.setenv("CC", "cc -Wall -Wextra -Werror")
    monkeypatch.setattr(subprocess, "run", lambda words, **options: called.append(words) or run(words, **options))
    assert finder(square(), square()) is not None
    assert called[0][:4] == ["cc", "-Wall", "-Wextra", "-Werror"]
