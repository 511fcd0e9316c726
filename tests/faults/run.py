"""Every step times every fault, with real processes; writes the table of what survived.

python tests/faults/run.py --table docs/faults.md

Runs in namespaces of its own if the system grants them (root, or unprivileged user namespaces): then no process, socket or file of
anybody else can be taken for one of ours, /dev/shm is small and can be filled, and everything ends with this process.
"""

from __future__ import annotations

import argparse
import fcntl
import os
import platform
import shutil
import socket
import struct
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
from faults import leaks
from faults.cases import FAULTS, Case, cases, cases_giving_up, end_name, steps_of
from faults.harness import MARGIN, Lane, Pool, Verdict, play_all

TIMEOUT = 1.0
_ISOLATED = "ROLLOUT_CORE_ISOLATED"
_SIOCSIFFLAGS, _UP = 0x8914, 0x1 | 0x40  # netdevice(7): IFF_UP, IFF_RUNNING
#: Over a collective by time: what differs there is who waits in a broadcast for whom.
_COLLECTIVE = frozenset({"raise", "interrupt", "kill", "stop", "shut", "delay", "corrupt"})


def isolate() -> None:
    """Start this again where nobody else is. Returns if that is done already; exits with what it exited with."""
    if _ISOLATED in os.environ:
        os.environ.pop(_ISOLATED)
        _loopback_up()
        return
    user = [] if os.getuid() == 0 else ["--user", "--map-root-user"]
    prefix = ["unshare", *user, "--mount", "--pid", "--net", "--fork", "--kill-child", "--mount-proc"]
    if shutil.which("unshare") is None or subprocess.run([*prefix, "true"], stderr=subprocess.DEVNULL).returncode:
        print("unshare gives no namespaces here, and /dev/shm cannot be filled; --no-isolation leaves that out", file=sys.stderr)
        raise SystemExit(2)
    inside = 'mount -t tmpfs -o size=8m tmpfs /dev/shm && exec "$@"'
    command = [*prefix, "sh", "-c", inside, "sh", sys.executable, *sys.argv]
    raise SystemExit(subprocess.run(command, env={**os.environ, _ISOLATED: "1"}).returncode)


def _loopback_up() -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as one:
        fcntl.ioctl(one, _SIOCSIFFLAGS, struct.pack("16sH14x", b"lo", _UP))


def all_cases(isolated: bool, every: int) -> dict[str, list[Case]]:
    """By table. ``every``: one case in so many, to try it out."""
    faults = frozenset(FAULTS) - (frozenset() if isolated else {"fill"})
    several = faults - {"no memory", "no shared memory"}
    tables = {
        "Shared memory, one receiver, staged": cases("memory", ("staged",), faults),
        "Shared memory, one receiver, direct": cases("listen", ("direct",), several),
        "Shared memory, two receivers, one staged and one direct": cases("memory", ("staged", "direct"), several),
        "Shared memory, faults while an update is given up": cases_giving_up("memory", "staged", faults),
        "torch.distributed (gloo), one receiver, staged": cases("collective", ("staged",), _COLLECTIVE),
        "torch.distributed (gloo), two receivers: the second receiver": (
            case for case in cases("collective", ("staged", "direct"), frozenset({"raise", "kill", "stop"})) if case.who == 2
        ),
    }
    return {title: list(found)[::every] for title, found in tables.items()}


def check_steps(timeout: float) -> list[str]:
    """That the steps of the cases are those that happen."""
    pool = Pool(0)
    lane, found = Lane(pool, timeout), []
    try:
        for carrier, targets in (("memory", ("staged",)), ("listen", ("staged", "direct")), ("collective", ("direct",))):
            verdict = lane.play(None, carrier=carrier, targets=targets)
            found += verdict.problems
            for place, end in enumerate(verdict.ends):
                expected = {"begin", *steps_of(place, len(targets)), "returned"}
                if end.result is None or set(end.result["steps"]) != expected:
                    happened = set(end.result["steps"]) if end.result else set()
                    found.append(f"{carrier}, {end_name(place)}: the steps differ by {sorted(happened ^ expected)}")
    finally:
        lane.close()
        pool.close()
    return found


def shm() -> set[str]:
    return set(os.listdir("/dev/shm"))


def others() -> list[str]:
    """Processes in this namespace beside this one, and sockets that have a name."""
    processes = [pid for pid in os.listdir("/proc") if pid.isdigit() and int(pid) != os.getpid()]
    sockets = [line.split()[-1] for line in Path("/proc/net/unix").read_text().splitlines()[1:] if len(line.split()) > 7]
    return [f"process {pid}" for pid in processes] + [f"socket {name}" for name in sockets]


def table_of(verdicts: list[Verdict]) -> list[str]:
    """Steps by faults: the longest time to notice in seconds, or how many cases failed."""
    faults = [fault for fault in FAULTS if any(verdict.case.fault == fault for verdict in verdicts)]
    cells: dict[tuple[str, str], list[Verdict]] = defaultdict(list)
    for verdict in verdicts:
        case = verdict.case
        after = f"{end_name(case.before[0])} raises at {case.before[1]}; " if case.before else ""
        cells[f"{after}{end_name(case.who)}: {case.step}", case.fault].append(verdict)
    rows = dict.fromkeys(row for row, _ in cells)
    lines = [f"| step | {' | '.join(faults)} |", "|---" * (len(faults) + 1) + "|"]
    return lines + [f"| {row} | {' | '.join(_cell(cells.get((row, fault), [])) for fault in faults)} |" for row in rows]


def _cell(verdicts: list[Verdict]) -> str:
    if not verdicts:
        return ""
    failed = sum(bool(verdict.problems) for verdict in verdicts)
    return f"**{failed} failed**" if failed else f"{max(noticed_by_others(verdict) for verdict in verdicts):.2f}"


def noticed_by_others(verdict: Verdict) -> float:
    """Seconds from the fault to the end of the last end that was not at fault itself."""
    return max((max(0.0, took) for place, took in verdict.noticed.items() if place != verdict.case.who), default=0.0)


def summary_of(verdicts: list[Verdict]) -> list[str]:
    lines = ["| fault | what | cases | survived | longest time to notice, s |", "|---|---|---|---|---|"]
    for fault, what in FAULTS.items():
        mine = [verdict for verdict in verdicts if verdict.case.fault == fault]
        if mine:
            survived = sum(not verdict.problems for verdict in mine)
            longest = max(noticed_by_others(verdict) for verdict in mine)
            lines.append(f"| {fault} | {what} | {len(mine)} | {survived} | {longest:.3f} |")
    return lines


def page(tables: dict[str, list[Verdict]], leaked: Iterable[str], *, isolated: bool, seconds: float, started: int) -> str:
    from importlib.metadata import version

    everything = [verdict for verdicts in tables.values() for verdict in verdicts]
    failed = [verdict for verdict in everything if verdict.problems]
    fill = "" if isolated else "\n`fill` was left out: this system granted no namespace with a /dev/shm of its own.\n"
    facts = (
        f"Python {platform.python_version()}, torch {version('torch')}. {len(everything)} cases, {len(failed)} failed; "
        f"timeout of every end\n{TIMEOUT:g} s; {seconds:.0f} s in all, {started} processes started for it."
    )
    head = f"""# Faults

Written by `python tests/faults/run.py --table docs/faults.md`: a sender and one or two receivers as processes, and at every
protocol step of every end every fault. {facts}
{fill}
After each case it is checked that

- every end that lives has ended, at most its timeout and {MARGIN:g} s for a busy machine after the fault (its waking, if it slept);
- every error names the cause, and success is reported by nobody for whom it is none: not by the sender unless every receiver has
  committed, and by a receiver only with the new version and the new weights, byte for byte;
- an end that failed has its old version, and its old weights byte for byte, or `unusable` says why not (`DirectWeights`);
- a sender that failed after some receiver committed says that one has, or may have;
- nothing is left: descriptors, threads and mappings of each process are those from before the carrier was made, as the process sees
  them (after `gc.collect()`) and as /proc does from outside; no named socket; nothing in /dev/shm; no process;
- where nobody was lost, the same carrier then does another update. The exceptions: a KeyboardInterrupt while an update is being
  given up comes out at once, and a sender that told a receiver to commit and has not heard by its deadline cannot know; both close.

A KeyboardInterrupt that comes after the commit is raised all the same, with a note that the update is committed. `fill` changes
nothing: a carrier's memory is a memfd, which does not count towards /dev/shm; those updates succeed. With `no memory` an update
fails cleanly or succeeds, as the step needs memory or not. `stop` ends as `kill` does for the process; what differs is that nobody
is told, and the others find out by its silence, after three quarters of their timeout.

"""
    parts = [head, "\n".join(summary_of(everything)), "\n\n## Leaks\n\n", "\n".join(leaked), "\n"]
    for title, verdicts in tables.items():
        parts += [f"\n## {title}\n\n", "Longest time to notice by the ends that were not at fault, in seconds.\n\n"]
        parts += ["\n".join(table_of(verdicts)), "\n"]
    if failed:
        parts.append("\n## Failed\n\n")
        parts += [f"- {verdict.case}: {'; '.join(verdict.problems)}\n" for verdict in failed]
    return "".join(parts)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table", type=Path, help="write the page there")
    parser.add_argument("--lanes", type=int, default=2, help="cases at a time")
    parser.add_argument("--every", type=int, default=1, help="only one case in so many")
    parser.add_argument("--no-isolation", action="store_true", help="run among everybody else, and leave out filling /dev/shm")
    options = parser.parse_args()
    if not options.no_isolation:
        isolate()
    isolated = not options.no_isolation
    began, before = time.monotonic(), shm()
    problems = check_steps(5.0)
    tables: dict[str, list[Verdict]] = {}
    done, started = 0, [0]

    def tell(verdict: Verdict) -> None:
        nonlocal done
        done += 1
        if verdict.problems:
            print(f"{verdict.case}\n  " + "\n  ".join(verdict.problems), flush=True)
        if done % 100 == 0:
            print(f"{done} cases, {time.monotonic() - began:.0f} s", flush=True)

    for title, todo in all_cases(isolated, options.every).items():
        tables[title] = play_all(todo, timeout=TIMEOUT, lanes=options.lanes, tell=tell, started=started)
        order = {case: place for place, case in enumerate(todo)}
        tables[title].sort(key=lambda verdict: order[verdict.case])
        spent = [verdict.seconds for verdict in tables[title]]
        print(f"{title}: {len(todo)} cases, {sum(spent) / max(1, len(spent)):.2f} s each", flush=True)
    found, leaked = leaks.measure(*(leaks.FULL if options.every == 1 else leaks.SHORT))
    problems += found
    problems += [f"/dev/shm has {name}" for name in sorted(shm() - before)]
    if isolated:
        problems += [f"{name} is left" for name in others()]
    failed = sum(bool(verdict.problems) for verdicts in tables.values() for verdict in verdicts)
    print("\n".join([*leaked, *problems]))
    print(f"{sum(map(len, tables.values()))} cases, {failed} failed")
    if options.table is not None:
        seconds = time.monotonic() - began
        options.table.write_text(page(tables, leaked, isolated=isolated, seconds=seconds, started=started[0]))
    return 1 if failed or problems else 0


if __name__ == "__main__":
    raise SystemExit(main())
