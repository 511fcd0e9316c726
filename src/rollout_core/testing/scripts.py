"""Reproduction scripts: a packer's case as a program of its own, which needs torch and the packer and nothing of rollout_core."""

from __future__ import annotations

import inspect
import math
import textwrap
from dataclasses import dataclass
from typing import Any, Final

from rollout_core.testing.carrier_cases import CarrierCase
from rollout_core.testing.carrier_scripts import carrier_script
from rollout_core.testing.cases import PackerCase, TensorCase, fill_bytes
from rollout_core.testing.registry import Check
from rollout_core.testing.targets import full_name
from rollout_core.testing.tracker_cases import TrackerCase
from rollout_core.testing.tracker_scripts import tracker_script
from rollout_core.testing.worker_cases import WorkerCase
from rollout_core.testing.worker_scripts import worker_script

#: Longer than this a tensor's bytes are made by a formula and not written out.
_WRITTEN_OUT: Final = 64

_HEAD: Final = '''\
"""{id}: {title}

{text}
"""

import sys

import torch

sys.path.insert(0, "")  # run this where the packer can be imported
{imports}


def bits(dtype, shape, data):
    """A tensor of these bytes."""
    data = torch.tensor(list(data), dtype=torch.uint8)
    return data.view(dtype).view(shape)


def raw(tensor):
    """The bytes of a tensor's values, in row-major order."""
    tensor = tensor.resolve_conj().resolve_neg().detach().cpu()
    return tensor.contiguous().flatten().view(torch.uint8).tolist()


{packer}
named = [
{named}]
capacity = {capacity}

'''


@dataclass(frozen=True)
class Target:
    """What is under test: its name, how a script imports it, and how to call it in words."""

    name: str
    words: str
    importable: bool
    imports: str
    make: str


def target_of(target: Any) -> Target:
    """How to name a target and to get at it again."""
    if isinstance(target, str):
        return _named(full_name(target), target)
    cls = target if inspect.isclass(target) or inspect.isroutine(target) else type(target)
    module, name = cls.__module__, cls.__qualname__
    reachable = module != "__main__" and "<" not in name
    if target is cls and reachable:
        return _named(f"{module}:{name}", f"{module}:{name}")
    label = f"{module}:{name}" + ("" if target is cls else " (an instance)")
    return Target("", label, False, "", f"packer = ...  # put yours here: {label}")


def _named(name: str, words: str) -> Target:
    module, _, path = name.partition(":")
    first = path.partition(".")[0]
    same = "" if path == "packer" else f"packer = {path}\n"
    make = same + 'if not hasattr(packer, "pack") or isinstance(packer, type):\n    packer = packer()'
    return Target(name, words, True, f"from {module} import {first}", make)


def reproduction(check: Check, case: Any, target: Any, text: str, model: str = "") -> str:
    """The script for a case of a check; empty if the check has none. ``text``: what went wrong, for its docstring; ``model``: the
    folder of a worker's model."""
    if not check.script:
        return ""
    place = target_of(target)
    text = textwrap.fill(text.replace("\\", "\\\\").replace('"""', "'''"), 100)
    if isinstance(case, TrackerCase):
        make = place.name.partition(":")[2] or "MyTracker"
        return tracker_script(check, case, place.imports or f"# MyTracker = ...  # put yours here: {place.words}", make, text)
    if isinstance(case, CarrierCase):
        make = place.name.partition(":")[2] or "my_carrier"
        return carrier_script(check, case, place.imports or f"# my_carrier = ...  # put yours here: {place.words}", make, text)
    if isinstance(case, WorkerCase):
        make = place.name.partition(":")[2] or "make_worker"
        imports = place.imports or f"# make_worker = ...  # put yours here: {place.words}"
        return worker_script(check, case, imports, make, text, model)
    if not isinstance(case, PackerCase):
        return ""
    head = _HEAD.format(
        id=check.id,
        title=check.title,
        text=text,
        imports=place.imports,
        packer=place.make,
        named=_named_text(case),
        capacity=case.capacity,
    )
    fields = {
        "others": list(case.others),
        "at": list(case.at),
        "groups": [list(g) for g in case.groups],
        "data": case.data,
        "steps": [*case.steps],
    }
    tail = check.script
    for name, value in fields.items():
        tail = tail.replace(f"{{{name}}}", repr(value))
    return head + tail.strip("\n") + "\n"


def _named_text(case: PackerCase) -> str:
    lines = [f"    ({tensor.name!r}, {_tensor_text(tensor, place)}),\n" for place, tensor in enumerate(case.tensors)]
    text = "".join(lines)
    made_of = [(place, t) for place, t in enumerate(case.tensors) if t.of is not None]
    if made_of:
        text += "]\n" + "".join(f"named[{place}] = ({t.name!r}, {_related_text(t)})\n" for place, t in made_of) + "named += [\n"
    if case.tiny:
        text += f"    *((f'tiny {{i}}', torch.tensor([i % 120], dtype=torch.uint8)) for i in range({case.tiny})),\n"
    return text


def _related_text(case: TensorCase) -> str:
    other = f"named[{case.of}][1]"
    words = {
        "tied": "", "same view": f".view({other}.shape)", "head": f"[: (len({other}) + 1) // 2]", "tail": "[1:]",
        "transposed": ".t()", "as int32": ".view(torch.int32)", "conj of": ".conj()",
    }  # fmt: skip
    return other + words[case.relation]


def _tensor_text(case: TensorCase, place: int) -> str:
    if case.of is not None:
        return "None"  # set below, from the one that it is made of
    shape, rank = case.shape, len(case.shape)
    match case.layout:
        case "contiguous":
            return _base(case, shape, place)
        case "sliced":
            return f"{_base(case, (math.prod(shape) + 1,), place)}[1:].view({list(shape)})"
        case "strided":
            return f"{_base(case, (*shape[:-1], 2 * shape[-1]), place)}[..., ::2]" if shape else f"{_base(case, (2,), place)}[1]"
        case "transposed":
            return f"{_base(case, tuple(reversed(shape)), place)}.permute({list(reversed(range(rank)))})"
        case "expanded":
            return f"{_base(case, (1, *shape[1:]), place)}.expand({list(shape)})"
        case "expanded last":
            return f"{_base(case, (*shape[:-1], 1), place)}.expand({list(shape)})"
        case "parameter":
            return f"torch.nn.Parameter({_base(case, shape, place)})"
        case "one element, odd stride":
            return f"{_base(case, (10,), place)}[::5][:1]"
        case "detached slice":
            count = math.prod(shape)
            return f"{_base(case, (8 * count + 64,), place)}[1 : {1 + count}].view({list(shape)}).detach()"
        case "conj":
            return f"{_base(case, shape, place)}.conj()"
        case "neg":
            return f"torch._neg_view({_base(case, shape, place)})"


def _base(case: TensorCase, shape: tuple[int, ...], place: int) -> str:
    nbytes = math.prod(shape) * case.torch_dtype.itemsize
    seed = place + 1
    if nbytes <= _WRITTEN_OUT or case.fill != "pattern" or case.dtype == "bool":
        data = f"bytes.fromhex('{fill_bytes(case.fill, case.dtype, nbytes, seed).hex()}')"
    else:
        data = f"[({31 * seed} + 7 * i + i // 256) % 120 for i in range({nbytes})]"
    return f"bits(torch.{case.dtype}, {list(shape)}, {data})"
