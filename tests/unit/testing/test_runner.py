"""check_packer: what is run, skipped, expected, reported and survived."""

from __future__ import annotations

import json
import os
import time

import pytest
import torch
from hypothesis import settings

from rollout_core.testing import Report, SubjectError, check_packer, replay
from rollout_core.testing.report import ReportError


class Plain:
    """Packs by cloning; the least that a packer can be."""

    def pack(self, named, capacity):
        return [[(name, tensor.clone())] for name, tensor in named]

    def unpack(self, buckets):
        return [pair for bucket in buckets for pair in bucket]


class Halved(Plain):
    """Loses half of a tensor of two elements or more."""

    def unpack(self, buckets):
        return [(name, tensor.view(-1)[: max(1, tensor.numel() // 2)]) for name, tensor in super().unpack(buckets)]


ORDER, SCALARS, ALIGNMENT = "packer/B1-order", "packer/B1-scalars", "packer/B3-alignment"


def test_an_instance_a_class_a_factory_and_a_name_are_packers():
    for packer in (Plain(), Plain, lambda: Plain(), "reference"):
        assert check_packer(packer, only=[ORDER]).ok


def test_every_check_is_run_and_no_failure_hides_another():
    report = check_packer(Halved, only=["B1", "B5"], max_examples=30)
    assert {ORDER, "packer/B1-dtypes", "packer/B1-strided", "packer/B1-offset"} <= {result.id for result in report.failed}
    assert len(report.results) == len({result.id for result in report.results}) == 15
    assert not report.ok


def test_the_counterexample_is_the_smallest_and_in_words():
    result = check_packer(Halved, only=[ORDER])[ORDER]
    assert result.text == "'a' has another shape (model: [2], actual: [1])"
    assert result.words == "capacity 8 bytes; 'a' f32[2]"
    assert json.loads(bytes(result.case)) == {"tensors": [{"name": "a", "shape": [2]}], "capacity": 8}


def test_the_same_seed_tries_the_same_cases_and_another_seed_others():
    class Counting(Plain):
        seen: list

        def pack(self, named, capacity):
            self.seen.append([(tuple(t.shape), capacity) for _, t in named])
            return super().pack(named, capacity)

    runs = []
    for seed in (0, 0, 1):
        Counting.seen = []
        check_packer(Counting, only=[ORDER], seed=seed, isolate=False)
        runs.append(Counting.seen)
    assert runs[0] == runs[1] != runs[2]


def test_a_skip_says_what_is_missing():
    report = check_packer(Plain, only=["B14", "B4-padding"])
    assert {result.status for result in report.results} == {"skip"}
    assert (
        report["packer/B14-cut"].reason
        == "needs 'manifest': methods manifest(named_tensors, capacity) -> bytes and read_manifest(data)"
    )
    assert report.ok
    assert list(report.skipped()) == [report["packer/B4-padding"].reason, report["packer/B14-cut"].reason]


def test_buckets_that_cannot_be_measured_are_skipped_not_passed():
    class Opaque(Plain):
        def pack(self, named, capacity):
            return [object()]

    result = check_packer(Opaque, only=["B2-capacity"])["packer/B2-capacity"]
    assert (result.status, result.reason) == ("skip", "its buckets are an object and it has no method bucket_nbytes(bucket)")


def test_an_expected_failure_is_no_failure():
    report = check_packer(Halved, only=[ORDER], expected_failures={ORDER: "known since spring"})
    result = report[ORDER]
    assert (result.status, result.reason) == ("xfail", "known since spring")
    assert result.words
    assert report.ok
    assert "1 failed as expected" in report.summary()


def test_an_expected_failure_may_be_named_without_its_subject():
    assert check_packer(Halved, only=[ORDER], expected_failures={"B1-order": "known since spring"})[ORDER].status == "xfail"


def test_an_expected_failure_that_passes_is_stale():
    report = check_packer(Plain, only=[ORDER], expected_failures={ORDER: "known since spring"})
    assert (report[ORDER].status, report[ORDER].text) == ("stale", "it passed")
    assert not report.ok


def test_an_expected_failure_that_is_skipped_is_stale():
    report = check_packer(Plain, only=["B14-cut"], expected_failures={"packer/B14-cut": "no manifest"})
    assert report["packer/B14-cut"].status == "stale"
    assert "it was skipped: needs 'manifest'" in report["packer/B14-cut"].text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"only": ["B1-ordre"]}, "there is no check 'B1-ordre'; did you mean 'packer/B1-order'?"),
        ({"only": "B99"}, "there is no check 'B99'; `rollout-core check --list` shows all"),
        ({"level": "1999.1"}, "level is '1999.1'; it is one of 2026.1"),
        ({"expected_failures": {"packer/B1-odrer": "x"}}, "there is no check 'packer/B1-odrer'; did you mean 'packer/B1-order'?"),
    ],
)
def test_a_wrong_argument_says_what_is_right(options, message):
    with pytest.raises(ValueError) as raised:
        check_packer(Plain, **options)
    assert str(raised.value) == message


def test_a_report_is_json_and_back_and_can_be_replayed():
    report = check_packer(Halved, only=["B1-order", "B1-scalars"])
    read = Report.from_json(report.to_json())
    assert read.to_json() == report.to_json()
    assert json.loads(report.to_json())["ok"] is False
    again = replay(Halved, read)
    assert [result.id for result in again.failed] == [ORDER, SCALARS]
    assert again[ORDER].words == report[ORDER].words
    assert replay(Plain, read).ok
    with pytest.raises(ReportError, match="this is no report of `rollout-core check --json`"):
        Report.from_json(b"{}")


def test_a_hang_is_a_failure_and_not_the_end():
    class Hangs(Plain):
        def unpack(self, buckets):
            while any(not tensor.dim() for bucket in buckets for _, tensor in bucket):
                time.sleep(0.01)
            return super().unpack(buckets)

    report = check_packer(Hangs, only=["B1-order", "B1-scalars", "B1-strided"], timeout=1.0, max_examples=20)
    assert report[SCALARS].text == "unpack did not end within 1 s"
    assert report[SCALARS].words == "capacity 4 bytes; 'a' f32[]"
    assert report[ORDER].status == report["packer/B1-strided"].status == "pass"


@pytest.mark.parametrize(
    ("end", "how"),
    [
        (lambda: os._exit(7), "pack ended its process with exit code 7"),
        (lambda: os.kill(os.getpid(), 11), "pack ended its process with signal SIGSEGV"),
        (
            lambda: (print("out of luck", flush=True), os.abort()),
            "pack ended its process with signal SIGABRT; it printed last: out of luck",
        ),
    ],
)
def test_a_death_is_a_failure_and_not_the_end(end, how):
    class Dies(Plain):
        def pack(self, named, capacity):
            if any(not tensor.dim() for _, tensor in named):
                end()
            return super().pack(named, capacity)

    report = check_packer(Dies, only=["B1-order", "B1-scalars"], max_examples=20)
    assert report[SCALARS].text == how
    assert report[SCALARS].words == "capacity 4 bytes; 'a' f32[]"
    assert report[ORDER].status == "pass"


def test_a_packer_that_raises_is_reported_with_its_words_and_place():
    class Raises(Plain):
        def pack(self, named, capacity):
            raise KeyError("no such group")

    text = check_packer(Raises, only=[ORDER])[ORDER].text
    assert text.startswith("pack raised KeyError: 'no such group' (in test_a_packer_that_raises")
    assert "test_runner.py:" in text


def test_system_exit_in_a_packer_is_not_the_end():
    class Exits(Plain):
        def pack(self, named, capacity):
            raise SystemExit(4)

    assert check_packer(Exits, only=[ORDER])[ORDER].text.startswith("pack raised SystemExit: 4 (in ")


def test_a_packer_that_answers_differently_the_second_time_is_told():
    class Moody(Plain):
        calls = 0

        def unpack(self, buckets):
            Moody.calls += 1
            result = super().unpack(buckets)
            return result[:-1] if Moody.calls == 1 else result

    text = check_packer(Moody, only=[ORDER])[ORDER].text
    assert text.endswith("(a second run of the same case passed: it does not depend on the case alone)")


def test_without_isolation_it_runs_here():
    pids = set()

    class Noting(Plain):
        def pack(self, named, capacity):
            pids.add(os.getpid())
            return super().pack(named, capacity)

    assert check_packer(Noting, only=[ORDER], isolate=False, max_examples=5).ok
    assert pids == {os.getpid()}
    pids.clear()
    assert check_packer(Noting, only=[ORDER], max_examples=5).ok
    assert not pids


def test_a_process_that_used_cuda_is_told_what_to_do(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    with pytest.raises(RuntimeError, match="pass isolate=False, or use `rollout-core check`"):
        check_packer(Plain, only=[ORDER])
    assert check_packer(Plain, only=[ORDER], isolate=False, max_examples=3).ok


def grouping(named, capacity):
    return [named]


class NeedsArgument(Plain):
    def __init__(self, size):
        pass


class Lacks:
    def pack(self, named, capacity):
        return []


class Misspelt(Plain):
    capabilities = frozenset({"integrety"})


class Letters(Plain):
    capabilities = "end"


class Lying(Plain):
    capabilities = frozenset({"slots"})


@pytest.mark.parametrize("isolate", [True, False])
@pytest.mark.parametrize(
    ("packer", "message"),
    [
        (3, "an int has no method pack; a packer under test has pack(named_tensors, capacity) and unpack(buckets)."),
        (Lacks, "a Lacks has no method unpack; a packer under test has"),
        (len, "len cannot be called without arguments (missing a required argument: 'obj'); pass an instance or a factory"),
        (
            grouping,
            "grouping cannot be called without arguments (missing a required argument: 'named'); pass an instance or a factory; ",
        ),
        (NeedsArgument, "NeedsArgument cannot be called without arguments (missing a required argument: 'size'); pass an instance"),
        (Misspelt, "capabilities has 'integrety'; it may have bucket_nbytes, slots,"),
        (Letters, "capabilities is 'end'; it is a set of names, for example {'end', 'integrity'}"),
        (Lying, "capabilities has 'slots', and the packer has no method slots"),
        ("nosuch", "'nosuch' is neither package.module:attribute nor a shipped adapter (rollout_core, rollout_core-stream"),
        ("no.such.module:x", "no.such.module:x: there is no module 'no' (searched the working directory and sys.path)"),
        ("json:nosuch", "json:nosuch: json has no 'nosuch'"),
    ],
)
def test_what_is_no_packer_is_refused_in_words(packer, message, isolate):
    with pytest.raises(SubjectError) as raised:
        check_packer(packer, isolate=isolate)
    assert str(raised.value).startswith(message)


def test_a_packer_that_dies_while_it_is_made_is_refused_in_words():
    def make():
        os._exit(9)

    with pytest.raises(SubjectError, match="loading it ended its process with exit code 9"):
        check_packer(make)


@pytest.mark.parametrize(
    ("result", "message"),
    [
        ({"a": 1}, "unpack gave a dict, which has lost a name that came twice; it gives (name, tensor) pairs"),
        ([1], "unpack gave an int, not a pair of str and torch.Tensor"),
        ([("a", 1)], "unpack gave a tuple, not a pair of str and torch.Tensor"),
        (None, "unpack raised TypeError: 'NoneType' object is not iterable"),
    ],
)
def test_what_is_no_list_of_pairs_is_a_violation(result, message):
    class Strange(Plain):
        def unpack(self, buckets):
            return result

    assert check_packer(Strange, only=[ORDER])[ORDER].text.startswith(message)


def test_the_users_hypothesis_profile_is_left_alone():
    before = settings.default
    check_packer(Halved, only=[ORDER], max_examples=5)
    assert settings.default is before
    assert settings.get_current_profile_name() in ("unit", "nightly", "mutation")


def test_one_hang_says_nothing_of_how_long_the_next_check_may_take():
    class Slow(Plain):
        def pack(self, named, capacity):
            if any(not tensor.numel() for _, tensor in named):
                time.sleep(60)
            if len(named) > 1000:
                time.sleep(1.2)
            return super().pack(named, capacity)

    report = check_packer(Slow, only=["B1-zero-size", "B1-many"], timeout=4.0, max_examples=10)
    assert report["packer/B1-zero-size"].text.startswith("pack did not end within ")
    assert report["packer/B1-many"].status == "pass"


def test_a_constructor_that_fails_later_is_a_failure_of_that_case():
    class Once(Plain):
        made = 0

        def __init__(self):
            Once.made += 1
            if Once.made > 3:
                raise OSError("no more of them")

    text = check_packer(Once, only=[ORDER])[ORDER].text
    assert text.startswith("making the packer anew raised OSError: no more of them (in ")


def test_a_lazy_packer_is_named_when_a_step_of_it_raises():
    class Lazy(Plain):
        capabilities = frozenset({"iterators"})

        def pack(self, named, capacity):
            yield from [[pair] for pair in named][:1]
            raise KeyError("lost")

    assert check_packer(Lazy, only=["B8-complete"])["packer/B8-complete"].text.startswith("pack raised KeyError: 'lost' (in ")


def test_processes_that_a_packer_starts_end_with_the_run():
    import subprocess

    class Starts(Plain):
        def pack(self, named, capacity):
            subprocess.Popen(["sleep", "98.7"])
            return super().pack(named, capacity)

    assert check_packer(Starts, only=[ORDER], max_examples=3).ok
    assert b"98.7" not in subprocess.run(["ps", "-eo", "args"], capture_output=True, check=True).stdout


def test_what_cannot_be_imported_is_left_for_the_reader_to_fill_in():
    script = check_packer(Halved(), only=[ORDER])[ORDER].script
    assert "packer = ...  # put yours here: " in script
    assert script.count("Halved (an instance)") == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_examples": 0}, "max_examples is 0 and timeout 5.0; a check needs at least 1 case and some seconds for it"),
        ({"timeout": 0}, "max_examples is 100 and timeout 0; a check needs at least 1 case and some seconds for it"),
        ({"expected_failures": {ORDER: " "}}, "expected_failures gives no reason for packer/B1-order"),
        ({"expected_failures": [ORDER]}, "expected_failures is a list; it is a mapping from check id to reason"),
    ],
)
def test_a_number_or_reason_out_of_range_is_refused(options, message):
    with pytest.raises(ValueError) as raised:
        check_packer(Plain, only=[ORDER], **options)
    assert str(raised.value) == message


def test_progress_is_told():
    told = []
    check_packer(Plain, only=["B1-order", "B1-scalars"], max_examples=2, progress=lambda *step: told.append(step))
    assert [(check.id, result and result.status, total) for check, result, total in told] == [
        (ORDER, None, 2), (ORDER, "pass", 2), (SCALARS, None, 2), (SCALARS, "pass", 2)
    ]  # fmt: skip


def test_nothing_is_left_behind():
    before = os.listdir("/proc/self/fd")
    for _ in range(3):
        check_packer(Plain, only=[ORDER], max_examples=3)
    assert len(os.listdir("/proc/self/fd")) <= len(before)
    with pytest.raises(ChildProcessError):
        os.waitpid(-1, os.WNOHANG)


def test_a_packer_that_is_not_made_in_time_is_refused_in_words(monkeypatch):
    monkeypatch.setattr("rollout_core.testing.isolation._START_TIMEOUT", 0.5)
    with pytest.raises(SubjectError, match=r"loading it took more than 0\.5 s"):
        check_packer(lambda: time.sleep(60))


@pytest.fixture
def forks_that_hang(monkeypatch, tmp_path):
    """As many forks as the given number hang before they come to the subject; a file counts them all."""
    count = tmp_path / "count"

    def hang(number):
        def watch(parent):
            with count.open("a") as file:
                file.write("x")
            if len(count.read_text()) <= number:
                time.sleep(60)

        monkeypatch.setattr("rollout_core.testing.isolation._FORK_TIMEOUT", 0.5)
        monkeypatch.setattr("rollout_core.testing.isolation._START_TIMEOUT", 2.0)
        monkeypatch.setattr("rollout_core.testing.isolation.end_with_parent", watch)
        return count

    return hang


def test_a_fork_that_hangs_before_it_comes_to_the_subject_is_made_once_more(forks_that_hang):
    count = forks_that_hang(1)
    assert check_packer(Plain, only=[ORDER], max_examples=2).ok
    assert len(count.read_text()) == 2


def test_forks_that_all_hang_are_an_error(forks_that_hang):
    count = forks_that_hang(9)
    with pytest.raises(SubjectError, match=r"loading it took more than 2 s"):
        check_packer(Plain, only=[ORDER], max_examples=2)
    assert len(count.read_text()) == 2


def test_a_subject_that_is_slow_to_make_is_made_once(forks_that_hang):
    count = forks_that_hang(0)

    def slow():
        time.sleep(1)
        return Plain()

    assert check_packer(slow, only=[ORDER], max_examples=1, timeout=10).ok
    assert len(count.read_text()) == 1
