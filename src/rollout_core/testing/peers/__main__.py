"""Run the kit on the peers' own code and write the page about it: ``python -m rollout_core.testing.peers --output docs/peers.md``.

Exits with 1 if a bug that a peer is known to have (``Peer.issues``) was not found.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import platform
from pathlib import Path

from rollout_core.testing.peers import PEERS, TRACKER_PEERS, Peer, TrackerPeer
from rollout_core.testing.registry import Violation, get_check
from rollout_core.testing.report import Report, versions
from rollout_core.testing.runner import check_packer, check_tracker
from rollout_core.testing.tracker_cases import MediumCase, MessageCase, Step, TrackerCase
from rollout_core.testing.trackers import TrackerUnderTest

_HEAD = """\
# The kit on other people's code

Written by `nox -s peers`: the checks of `rollout_core.testing`, level {level}, on the unmodified code of these packages, each
through a thin adapter in `src/rollout_core/testing/peers/` that calls it as its users do.
{versions}; up to {examples} cases a check, seed {seed}.

What is listed is what a clause of the kit asks for and the code does not do. Not all of it is a bug: a packer whose callers never
pass a strided tensor need not take one, and some clauses (B10: tied weights travel once) ask for more than any of them promises. A
check that needs something the peer neither has nor claims (a digest, an end marker) is skipped, not failed.

| peer | version | passed | failed | skipped | failed clauses |
|---|---|---|---|---|---|
"""

_TRACKERS_HEAD = """
# Trackers

The checks of trackers on code that grows a conversation, in real worlds: Qwen's byte pairs, processors of transformers
{transformers} that take pictures, ChatML templates (`src/rollout_core/testing/peers/real_worlds.py`). A case for which a peer has
no call is not judged; each adapter's docstring says which those are and whose calls it makes. For every failure it is said whether
it is a bug of the peer or a promise that the peer does not make.

| peer | version | world | cases a check | passed | failed | skipped | failed clauses |
|---|---|---|---|---|---|---|---|
"""
_TOLD = Step("extend", (MessageCase("tool", (MediumCase(),)),))
#: Bugs that the search may miss, since most of its cases have steps for which the peer has no call: (peer, check) -> a case.
_KNOWN = {
    ("verl-request", "tracker/M8-recompute"): TrackerCase(
        world="real:qwen2-vl-open-4",
        steps=(Step("start", (MessageCase(),)), Step("sample", text="a"), _TOLD, Step("sample", text="a")),
    )
}
_REMARKS = {
    "verl-request": """
In `real:qwen2-vl`, whose processor is that of transformers 5, nothing can be added after the prompt: `add_tool_response_messages`
and `add_user_message` hand `Message` objects of pydantic to `apply_chat_template`, which takes them for dicts (AttributeError; so
it is with transformers 5.10.4, and verl 0.9.1 asks for 5.5.3 up to 5.11). Without that it would go on to put `mm_token_type_ids` of
two lengths together along the batch, and with 5.23 (not with 5.10.4) the constructor refuses every prompt with pictures, because it
processes them beside a text without placeholders. The worlds below behave in these three respects as transformers 4 did, so that
the rest can be seen. `real:qwen2-vl-open-4` has a template that ends neither turns nor pictures with a token. verl 0.9.1 has no
caller of the class left.
""",
    "renderers-bridge": """
Videos are refused by name. Positions, loss mask and logprobs are the trainer's, and not checked.
""",
}


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m rollout_core.testing.peers", description=__doc__)
    parser.add_argument("--output", type=Path, help="the page to write; none: print it")
    parser.add_argument("--max-examples", type=int, default=100)
    parser.add_argument("names", nargs="*", help=f"peers: {', '.join([*PEERS, *TRACKER_PEERS])}; none: all")
    arguments = parser.parse_args()
    reports: dict[str, Report] = {}
    trackers: dict[str, dict[str, Report]] = {}
    for name in arguments.names or [*PEERS, *TRACKER_PEERS]:
        if name in PEERS:
            reports[name] = check_packer(name, max_examples=arguments.max_examples)
            print(f"{name}: {reports[name].summary()}", flush=True)
        else:
            trackers[name] = check_tracker_peer(TRACKER_PEERS[name])
            for world, report in trackers[name].items():
                print(f"{name} in {world}: {report.summary()}", flush=True)
    page = (page_of(reports) if reports else "") + (trackers_page_of(trackers) if trackers else "")
    if arguments.output:
        arguments.output.write_text(page)
    else:
        print(page)
    found = {(name, result.id) for name, report in reports.items() for result in report.failed}
    found |= {(name, result.id) for name, made in trackers.items() for report in made.values() for result in report.failed}
    missed = [
        f"{name}: {id} ({issue})"
        for name in (*reports, *trackers)
        for id, issue in (PEERS[name] if name in PEERS else TRACKER_PEERS[name]).issues.items()
        if (name, id) not in found
    ]
    for line in missed:
        print(f"known and not found: {line}")
    return 1 if missed else 0


def check_tracker_peer(peer: TrackerPeer) -> dict[str, Report]:
    """The checks of trackers on a peer, by world. The first case loads transformers, which takes seconds."""
    found = {}
    for world in peer.worlds:
        found[world] = check_tracker(peer.load(), worlds=[world], max_examples=peer.max_examples, timeout=20.0)
    return found


def known_failure(peer: TrackerPeer, check: str, case: TrackerCase) -> str:
    """What a check says of a case; empty if the peer passes."""
    try:
        get_check(check).run(TrackerUnderTest(peer.load()), case)
    except Violation as violation:
        return str(violation)
    return ""


def trackers_page_of(reports: dict[str, dict[str, Report]]) -> str:
    """The part of the page about trackers, in Markdown."""
    text = _TRACKERS_HEAD.format(transformers=importlib.metadata.version("transformers"))
    for name, by_world in reports.items():
        peer = TRACKER_PEERS[name]
        for world, report in by_world.items():
            about = f"[{name}](#{name}) | {peer.distribution} {peer.version} | `{world}` | {peer.max_examples}"
            text += f"| {about} | {_counts(report)} |\n"
    return text + "".join(_tracker_section(TRACKER_PEERS[name], by_world) for name, by_world in reports.items())


def _counts(report: Report) -> str:
    counts = [str(sum(result.status == status for result in report.results)) for status in ("pass", "fail", "skip")]
    return " | ".join([*counts, ", ".join(dict.fromkeys(result.clause for result in report.failed)) or "none"])


def _tracker_section(peer: TrackerPeer, by_world: dict[str, Report]) -> str:
    lines = [f"\n## {peer.name}\n", f"{peer.distribution} {peer.version}, {peer.source}.\n{_REMARKS[peer.name]}"]
    for world, report in by_world.items():
        lines += [f"In `{world}`:\n", "| check | what happens | smallest case | what it is |", "|---|---|---|---|"]
        for result in report.failed:
            issue = peer.issues.get(result.id, "")
            link = f" ([{issue.rsplit('/', 1)[-1]}]({issue}))" if issue else ""
            judged = peer.judged[world].get(result.id, "not looked at yet")
            words = result.words.removeprefix(f"world {world}; ")
            lines.append(f"| {result.id} | {_cell(result.text)} | {_cell(words)} | {judged}{link} |")
        passes = {result.id for result in report.results if result.status == "pass"}
        for (name, check), case in _KNOWN.items():
            if name == peer.name and case.world == world and check in passes:
                passes.discard(check)
                text = known_failure(peer, check, case)
                words = str(case).removeprefix(f"world {world}; ")
                lines.append(f"| {check}, on a given case | {_cell(text)} | {_cell(words)} | {peer.judged[world][check]} |")
        passed = ", ".join(result.id.partition("/")[2] for result in report.results if result.id in passes)
        lines.append(f"\nPassed: {passed}.\n")
    return "\n".join(lines)


def page_of(reports: dict[str, Report]) -> str:
    """The page, in Markdown."""
    first = next(iter(reports.values()))
    found = ", ".join(f"{name} {version}" for name, version in versions().items() if name != "rollout_core")
    text = _HEAD.format(level=first.level, versions=f"{found}, {platform.machine()}", examples=first.max_examples, seed=first.seed)
    for name, report in reports.items():
        peer = PEERS[name]
        text += f"| [{name}](#{name}) | {peer.distribution} {peer.version} | {_counts(report)} |\n"
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
