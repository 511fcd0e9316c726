"""``rollout-core check``: what it prints, writes and returns, word for word."""

from __future__ import annotations

import json
import re
import subprocess
import sys

import pytest
from typer.testing import CliRunner

from rollout_core.cli import app

PACKERS = """
class Plain:
    def pack(self, named, capacity):
        return [[(name, tensor.clone())] for name, tensor in named]

    def unpack(self, buckets):
        return [pair for bucket in buckets for pair in bucket]


class Unaligned(Plain):
    def pack(self, named, capacity):
        import torch

        flat = [tensor.contiguous().flatten().view(torch.uint8) for _, tensor in named]
        return [(torch.cat(flat), [(name, tensor.dtype, tensor.shape) for name, tensor in named])] if named else []

    def unpack(self, buckets):
        pairs = []
        for buffer, metadata in buckets:
            offset = 0
            for name, dtype, shape in metadata:
                nbytes = shape.numel() * dtype.itemsize
                pairs.append((name, buffer[offset : offset + nbytes].view(dtype).view(shape)))
                offset += nbytes
        return pairs

    def slots(self, bucket):
        offset = 0
        for name, dtype, shape in bucket[1]:
            nbytes = shape.numel() * dtype.itemsize
            yield name, offset, nbytes
            offset += nbytes

    def bucket_nbytes(self, bucket):
        return bucket[0].numel()


packer = Unaligned()
number = 3
"""


@pytest.fixture
def run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mytrainer.py").write_text(PACKERS)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    monkeypatch.delitem(sys.modules, "mytrainer", raising=False)

    def run(*arguments):
        result = CliRunner().invoke(app, ["check", *arguments])
        assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
        return result.exit_code, re.sub(r"in \d+\.\d s", "in N s", result.stdout), result.stderr.strip()

    return run


GOLDEN = """\
mytrainer:packer: level 2026.1, seed 0, up to 100 cases a check

stale packer/B1-order  plain tensors come out under their names, in their order
      expected to fail (was broken once), and it passed: take it off the list
fail  packer/B3-alignment  every slot begins at a multiple of its dtype's itemsize, after any sequence of dtypes and sizes
      bucket 0: slot 'a' bf16[1] at offset 0, then 'b' f32[1] at offset 2: not a multiple of 4; unpack raised RuntimeError: \
self.storage_offset() must be divisible by 4 to view Byte as Float (different element sizes), but got 2 (in Unaligned.unpack, \
mytrainer.py:23)
      case: capacity 6 bytes; 'a' bf16[1]; 'b' f32[1]
xfail packer/B2-capacity  no bucket is larger than the capacity when every tensor fits it, padding included
      as expected: one bucket for all
      bucket 0 has 8 bytes (capacity: 7)
      case: capacity 7 bytes; 'a' f32[1]; 'b' f32[1]
pass  packer/B12-empty  the empty model round-trips
skip  packer/B12-truncated, packer/B12-missing, packer/B12-repeated, packer/B12-reordered, packer/B12-after-end
      needs 'end': claim: unpack refuses a stream that stops early, repeats a bucket, reorders them or goes on after its end

2 of 9 checks failed: packer/B1-order, packer/B3-alignment; 1 passed, 5 skipped, 1 failed as expected, in N s
scripts that show them: --scripts DIR; the same cases again later: --json FILE, then --replay FILE
"""


def test_the_report_word_for_word(run, tmp_path):
    (tmp_path / "known.txt").write_text(
        "# what we know of\npacker/B2-capacity: one bucket for all\n\npacker/B1-order: was broken once\n"
    )
    only = [word for check in ("B1-order", "B2-capacity", "B3-alignment", "B12") for word in ("--only", check)]
    code, shown, errors = run("mytrainer:packer", *only, "--expect", "known.txt")
    assert code == 1
    assert shown == GOLDEN
    assert not errors


def test_it_passes_with_0_writes_json_and_says_nothing_more(run, tmp_path):
    code, shown, errors = run(
        "mytrainer:Plain", "--only", "B1-order", "--json", "report.json", "--max-examples", "7", "--seed", "3"
    )
    assert (code, errors) == (0, "")
    assert shown.endswith("no check failed: 1 passed, 0 skipped, in N s\n")
    report = json.loads((tmp_path / "report.json").read_text())
    assert (report["ok"], report["max_examples"], report["seed"], report["target"]) == (True, 7, 3, "mytrainer:Plain")
    assert report["results"][0]["id"] == "packer/B1-order"
    assert set(report["versions"]) == {"rollout_core", "python", "torch", "hypothesis"}


def test_scripts_and_replay(run, tmp_path):
    code, shown, _ = run("mytrainer:packer", "--only", "B3", "--json", "report.json", "--scripts", "scripts")
    assert code == 1
    assert shown.endswith("1 scripts in scripts\n")
    (script,) = (tmp_path / "scripts").iterdir()
    assert script.name == "B3_alignment.py"
    assert script.read_text() == SCRIPT
    done = subprocess.run([sys.executable, script], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 1
    assert "AssertionError: ('b', torch.float32, 2)" in done.stderr
    code, shown, _ = run("mytrainer:packer", "--replay", "report.json")
    assert code == 1
    assert "1 of 1 checks failed: packer/B3-alignment" in shown
    code, shown, _ = run("mytrainer:Plain", "--replay", "report.json")
    assert code == 0
    assert "no check failed: 1 passed, 0 skipped" in shown


SCRIPT = '''\
"""packer/B3-alignment: every slot begins at a multiple of its dtype's itemsize, after any sequence of dtypes and sizes

bucket 0: slot 'a' bf16[1] at offset 0, then 'b' f32[1] at offset 2: not a multiple of 4; unpack
raised RuntimeError: self.storage_offset() must be divisible by 4 to view Byte as Float (different
element sizes), but got 2 (in Unaligned.unpack, mytrainer.py:23)
"""

import sys

import torch

sys.path.insert(0, "")  # run this where the packer can be imported
from mytrainer import packer


def bits(dtype, shape, data):
    """A tensor of these bytes."""
    data = torch.tensor(list(data), dtype=torch.uint8)
    return data.view(dtype).view(shape)


def raw(tensor):
    """The bytes of a tensor's values, in row-major order."""
    tensor = tensor.resolve_conj().resolve_neg().detach().cpu()
    return tensor.contiguous().flatten().view(torch.uint8).tolist()


if not hasattr(packer, "pack") or isinstance(packer, type):
    packer = packer()
named = [
    ('a', bits(torch.bfloat16, [1], bytes.fromhex('1f26'))),
    ('b', bits(torch.float32, [1], bytes.fromhex('3e454c53'))),
]
capacity = 6

dtypes = {name: tensor.dtype for name, tensor in named}
if hasattr(packer, "slots"):
    for bucket in packer.pack(named, capacity):
        for name, offset, nbytes in packer.slots(bucket):
            step = max(dtypes[name].itemsize, getattr(packer, "align", 1))
            assert offset % step == 0, (name, dtypes[name], offset)

result = list(packer.unpack(list(packer.pack(named, capacity))))
assert [name for name, _ in result] == [name for name, _ in named], [name for name, _ in result]
for (name, sent), (_, got) in zip(named, result):
    assert got.dtype == sent.dtype, (name, got.dtype, sent.dtype)
    assert got.shape == sent.shape, (name, got.shape, sent.shape)
    assert raw(got) == raw(sent), (name, got, sent)
'''


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "nothing to check: pass package.module:packer, or see --list"),
        (
            ["mytrainer"],
            "'mytrainer' is neither package.module:attribute nor a shipped adapter (rollout_core, rollout_core-stream, ",
        ),
        (["mytrainer:nosuch"], "mytrainer:nosuch: mytrainer has no 'nosuch'"),
        (["nosuch:packer"], "nosuch:packer: there is no module 'nosuch' (searched the working directory and sys.path)"),
        (["broken:packer"], "broken:packer: importing broken failed: No module named 'nosuch'"),
        (
            ["mytrainer:number"],
            "an int has no method pack; a packer under test has pack(named_tensors, capacity) and unpack(buckets).",
        ),
        (["mytrainer:packer", "--only", "B33"], "there is no check 'B33'; `rollout-core check --list` shows all"),
        (["mytrainer:packer", "--level", "2020.1"], "level is '2020.1'; it is one of 2026.1"),
        (["mytrainer:packer", "--expect", "bad.txt"], "bad.txt, line 1: 'packer/B1-order' is not 'check id: reason'"),
        (["mytrainer:packer", "--expect", "none.txt"], "[Errno 2] No such file or directory: 'none.txt'"),
        (["mytrainer:packer", "--replay", "bad.txt"], "this is no report of `rollout-core check --json`: "),
        (["mytrainer:packer", "--json", "no/folder/x.json"], "--json: the folder no/folder does not exist"),
        (["mytrainer:packer", "--scripts", "no/folder/x"], "--scripts: the folder no/folder does not exist"),
        (["sglang"], "sglang is not installed: run `pip install --no-deps sglang==0.5.23`, then install what "),
    ],
)
def test_what_cannot_begin_ends_with_2_and_says_why(run, tmp_path, arguments, message):
    (tmp_path / "bad.txt").write_text("packer/B1-order\n")
    (tmp_path / "broken.py").write_text("import nosuch\n")
    code, shown, errors = run(*arguments)
    assert (code, shown) == (2, "")
    assert errors.startswith(message)


def test_list_shows_checks_capabilities_and_adapters(run):
    code, shown, _ = run("--list")
    assert code == 0
    lines = shown.splitlines()
    assert lines[0] == "checks (level 2026.1)"
    assert "  packer/B1-zero-size          a tensor without elements keeps its place, name, dtype and shape" in lines
    assert "  packer/B13-replay            a bucket of an older round is noticed  [needs versions]" in lines
    assert "  slots                        method slots(bucket): [(name, offset, nbytes), ...]" in lines
    assert "  rollout_core                 rollout_core.testing.own:PlannedPacker" in lines
    assert any(line.startswith("  sglang                       sglang 0.5.23, sglang/srt/weight_sync") for line in lines)
