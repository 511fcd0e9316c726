"""Results of a run of checks, as data and as text."""

from __future__ import annotations

import platform
from typing import Literal, TypeAlias

import msgspec

from rollout_core.errors import RolloutCoreError

#: ``xfail``: failed, as was expected. ``stale``: expected to fail, and it did not.
Status: TypeAlias = Literal["pass", "fail", "skip", "xfail", "stale"]


class ReportError(RolloutCoreError, ValueError):
    """A file that is no report of a run of checks."""


class Result(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What came of one check.

    ``text``: what is wrong, or why it was skipped or expected to fail. ``case``: the smallest counterexample, as data; ``words``:
    the same in words; ``script``: a program that shows the failure. ``examples``: how many cases were run. ``seconds``: wall time.
    """

    id: str
    title: str
    status: Status
    text: str = ""
    reason: str = ""
    words: str = ""
    case: msgspec.Raw = msgspec.Raw(b"null")
    script: str = ""
    examples: int = 0
    seconds: float = 0.0

    @property
    def clause(self) -> str:
        return self.id.partition("/")[2].partition("-")[0]


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """All results of one subject. ``print(report)`` is the text for people, ``to_json()`` the same for machines.

    ``target``: what was checked. ``ok``: nothing failed, and nothing that was expected to fail passed.
    """

    target: str
    level: str
    seed: int
    max_examples: int
    seconds: float
    versions: dict[str, str]
    results: list[Result]

    @property
    def failed(self) -> list[Result]:
        """The results that make the run fail: violated clauses and stale expectations."""
        return [result for result in self.results if result.status in ("fail", "stale")]

    @property
    def ok(self) -> bool:
        return not self.failed

    def __getitem__(self, id: str) -> Result:
        """The result of one check."""
        for result in self.results:
            if result.id == id:
                return result
        raise KeyError(id)

    def to_json(self) -> str:
        """The report as JSON; ``from_json`` reads it."""
        return msgspec.json.format(msgspec.json.encode({"ok": self.ok, **msgspec.structs.asdict(self)}), indent=2).decode()

    @classmethod
    def from_json(cls, data: str | bytes) -> Report:
        """A report that ``to_json`` wrote. ``ReportError`` for anything else."""
        try:
            return msgspec.json.decode(data, type=cls)
        except msgspec.MsgspecError as error:
            raise ReportError(f"this is no report of `rollout-core check --json`: {error}") from error

    def summary(self) -> str:
        """The run in one line: ``3 of 40 checks failed: packer/B1-strided, ...; 30 passed, 7 skipped, in 4.1 s``."""
        counts = {status: sum(r.status == status for r in self.results) for status in ("pass", "skip", "xfail")}
        failed = [result.id for result in self.failed]
        words = f"{counts['pass']} passed, {counts['skip']} skipped"
        if counts["xfail"]:
            words += f", {counts['xfail']} failed as expected"
        words += f", in {self.seconds:.1f} s"
        if failed:
            return f"{len(failed)} of {len(self.results)} checks failed: {', '.join(failed)}; {words}"
        return f"no check failed: {words}"

    def skipped(self) -> dict[str, list[str]]:
        """Reason -> ids of the checks that were skipped for it."""
        reasons: dict[str, list[str]] = {}
        for result in self.results:
            if result.status == "skip":
                reasons.setdefault(result.reason, []).append(result.id)
        return reasons

    def heading(self) -> str:
        return f"{self.target}: level {self.level}, seed {self.seed}, up to {self.max_examples} cases a check"

    def rest(self) -> str:
        """The report without heading and failures: expected failures, what passed, what was skipped and why, and the summary."""
        lines = []
        for status in ("xfail", "pass"):
            for result in self.results:
                if result.status == status:
                    lines += result_lines(result)
        for reason, ids in self.skipped().items():
            lines += [f"skip  {', '.join(ids)}", f"      {reason}"]
        return "\n".join([*lines, "", self.summary()])

    def __str__(self) -> str:
        failures = [line for result in self.failed for line in result_lines(result)]
        return "\n".join([self.heading(), "", *failures, self.rest()])


def result_lines(result: Result) -> list[str]:
    """A result as lines of text: one if it passed, the counterexample too if it failed."""
    lines = [f"{result.status:<5} {result.id}  {result.title}"]
    if result.status == "skip":
        lines = [f"skip  {result.id}  {result.reason}"]
    if result.status == "stale":
        lines.append(f"      expected to fail ({result.reason}), and {result.text}: take it off the list")
    if result.status == "xfail":
        lines.append(f"      as expected: {result.reason}")
    if result.status in ("fail", "xfail"):
        lines.append(f"      {result.text}")
        if result.words:
            lines.append(f"      case: {result.words}")
    return lines


def versions() -> dict[str, str]:
    """What a run depends on."""
    import hypothesis
    import torch

    import rollout_core

    return {
        "rollout_core": rollout_core.__version__,
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "hypothesis": hypothesis.__version__,
    }
