"""Run the kit on the peers' own code and write the page about it: ``python -m rollout_core.testing.peers --output docs/peers.md``.

Exits with 1 if a bug that a peer is known to have (``Peer.issues``) was not found.
"""

from __future__ import annotations

import argparse
import platform
from pathlib import Path

from rollout_core.testing.peers import PEERS, Peer
from rollout_core.testing.report import Report, versions
from rollout_core.testing.runner import check_packer

_HEAD = """\
# The kit on other people's packers

Written by `nox -s peers`: the checks of `rollout_core.testing`, level {level}, on the unmodified code of these packages, each
through a thin adapter in `src/rollout_core/testing/peers/` that calls it as its users do.
{versions}; up to {examples} cases a check, seed {seed}.

What is listed is what a clause of the kit asks for and the code does not do. Not all of it is a bug: a packer whose callers never
pass a strided tensor need not take one, and some clauses (B10: tied weights travel once) ask for more than any of them promises. A
check that needs something the peer neither has nor claims (a digest, an end marker) is skipped, not failed.

| peer | version | passed | failed | skipped | failed clauses |
|---|---|---|---|---|---|
"""


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m rollout_core.testing.peers", description=__doc__)
    parser.add_argument("--output", type=Path, help="the page to write; none: print it")
    parser.add_argument("--max-examples", type=int, default=100)
    parser.add_argument("names", nargs="*", help=f"peers: {', '.join(PEERS)}; none: all")
    arguments = parser.parse_args()
    reports: dict[str, Report] = {}
    for name in arguments.names or PEERS:
        reports[name] = check_packer(name, max_examples=arguments.max_examples)
        print(f"{name}: {reports[name].summary()}", flush=True)
    page = page_of(reports)
    if arguments.output:
        arguments.output.write_text(page)
    else:
        print(page)
    missed = [
        f"{name}: {id} ({issue})"
        for name, report in reports.items()
        for id, issue in PEERS[name].issues.items()
        if report[id].status != "fail"
    ]
    for line in missed:
        print(f"known and not found: {line}")
    return 1 if missed else 0


def page_of(reports: dict[str, Report]) -> str:
    """The page, in Markdown."""
    first = next(iter(reports.values()))
    found = ", ".join(f"{name} {version}" for name, version in versions().items() if name != "rollout_core")
    text = _HEAD.format(level=first.level, versions=f"{found}, {platform.machine()}", examples=first.max_examples, seed=first.seed)
    for name, report in reports.items():
        peer = PEERS[name]
        counts = [sum(result.status == status for result in report.results) for status in ("pass", "fail", "skip")]
        clauses = ", ".join(dict.fromkeys(result.clause for result in report.failed)) or "none"
        text += f"| [{name}](#{name}) | {peer.distribution} {peer.version} | {' | '.join(map(str, counts))} | {clauses} |\n"
    return text + "".join(_section(PEERS[name], report) for name, report in reports.items())


def _section(peer: Peer, report: Report) -> str:
    lines = [f"\n## {peer.name}\n", f"{peer.distribution} {peer.version}, {peer.source}.\n"]
    if report.failed:
        lines += ["| check | what happens | smallest case | upstream |", "|---|---|---|---|"]
        for result in report.failed:
            issue = peer.issues.get(result.id, "")
            link = f"[{issue.rsplit('/', 1)[-1]}]({issue})" if issue else ""
            lines.append(f"| {result.id} | {_cell(result.text)} | {_cell(result.words)} | {link} |")
    return "\n".join(lines) + "\n"


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


if __name__ == "__main__":
    raise SystemExit(main())
