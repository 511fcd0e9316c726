"""``rollout-core check``: run the checks on a packer, a tracker, a carrier or a worker, print what was found, and write it down."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.text import Text

from rollout_core.errors import RolloutCoreError

if TYPE_CHECKING:
    from rollout_core.testing.registry import Check
    from rollout_core.testing.report import Report, Result


def check_command(
    target: Annotated[
        str,
        typer.Argument(help="package.module:packer, :Tracker, :carrier or :make_worker, or a shipped adapter's name (see --list)."),
    ] = "",
    only: Annotated[list[str] | None, typer.Option(help="Only these checks or clauses, for example B3 or B13-replay.")] = None,
    max_examples: Annotated[int, typer.Option(min=1, help="Cases tried by each check.")] = 100,
    seed: Annotated[int, typer.Option(help="The same seed tries the same cases.")] = 0,
    timeout: Annotated[
        float | None, typer.Option(min=0.1, help="Seconds that one case, or a worker's call, may take: 5, or 30.")
    ] = None,
    model: Annotated[Path | None, typer.Option(help="Try a worker on the model in this folder.")] = None,
    level: Annotated[str, typer.Option(help="The set of checks; a level never changes.")] = "2026.1",
    expect: Annotated[Path | None, typer.Option(help="A file of lines 'check id: reason' for checks that may fail.")] = None,
    json: Annotated[Path | None, typer.Option(help="Also write the report here, for machines and --replay.")] = None,
    scripts: Annotated[Path | None, typer.Option(help="Write a script that shows each failure into this folder.")] = None,
    replay: Annotated[Path | None, typer.Option(help="Run the counterexamples of this saved report again, nothing else.")] = None,
    worlds: Annotated[list[str] | None, typer.Option("--world", help="Try a tracker in these worlds only.")] = None,
    list_: Annotated[bool, typer.Option("--list", help="List the checks, capabilities and shipped adapters.")] = False,
) -> None:
    """Run the checks on a packer, a tracker, a carrier or a worker: every violated clause with its smallest counterexample.

    Exits with 0 if nothing failed, 1 if something did, 2 if it could not begin.
    """
    try:
        from rollout_core.testing import runner
        from rollout_core.testing.report import result_lines
        from rollout_core.testing.runner import kind_of
    except ImportError as error:
        _refuse(f"{error}; pip install 'rollout-core[cli,testing]'")
    if list_:
        _list()
        raise typer.Exit(0)
    if not target:
        _refuse("nothing to check: pass package.module:packer, or see --list")
    for option, path in (("--json", json), ("--scripts", scripts)):
        if path is not None and not path.parent.is_dir():
            _refuse(f"{option}: the folder {path.parent} does not exist")
    try:
        if replay is not None:
            report = runner.replay(target, _saved(replay), timeout=timeout, model=model)
            print(report)
        else:
            console = Console(soft_wrap=True)
            kind = kind_of(target)
            more: dict[str, Any] = {"worlds": worlds} if worlds else {}
            more |= {"timeout": timeout} if timeout is not None else {}
            more |= {"model": model} if model is not None else {}
            if model is not None and kind != "worker":
                _refuse(f"--model is for workers, and this is a {kind}")
            if worlds and kind != "tracker":
                _refuse(f"--world is for trackers, and this is a {kind}")
            with _progress(console) as bar:

                def show(check: Check, result: Result | None, total: int) -> None:
                    if not bar.tasks[task].total:
                        console.print(Text(f"{heading}\n"))
                    bar.update(task, description=check.id, total=total, advance=0 if result is None else 1)
                    if result is not None and result.status in ("fail", "stale"):  # shown when it is found, not at the end
                        console.print(Text("\n".join(result_lines(result))))

                task = bar.add_task(f"loading the {kind}", total=None)
                heading = f"{target}: level {level}, seed {seed}, up to {max_examples} cases a check"
                checks: dict[str, Callable[..., Report]] = {
                    "tracker": runner.check_tracker,
                    "carrier": runner.check_carrier,
                    "worker": runner.check_worker,
                }
                run: Callable[..., Report] = checks.get(kind, runner.check_packer)
                report = run(
                    target,
                    level=level,
                    only=only or (),
                    expected_failures=_expected(expect) if expect else None,
                    max_examples=max_examples,
                    seed=seed,
                    progress=show,
                    **more,
                )
            print(report.rest())
    except (RolloutCoreError, ValueError, OSError) as error:
        _refuse(str(error))
    if json is not None:
        json.write_text(report.to_json() + "\n")
    if scripts is not None:
        written = _write_scripts(report, scripts)
        print(f"{written} scripts in {scripts}")
    elif not report.ok and replay is None:
        print("scripts that show them: --scripts DIR; the same cases again later: --json FILE, then --replay FILE")
    raise typer.Exit(0 if report.ok else 1)


def _expected(path: Path) -> Mapping[str, str]:
    """The lines of a file of expected failures. ``ValueError`` for one without a reason."""
    expected = {}
    for number, line in enumerate(path.read_text().splitlines(), 1):
        words = line.strip()
        if not words or words.startswith("#"):
            continue
        id, colon, reason = words.partition(":")
        if not colon or not reason.strip():
            raise ValueError(f"{path}, line {number}: {words!r} is not 'check id: reason'")
        expected[id.strip()] = reason.strip()
    return expected


def _saved(path: Path) -> Report:
    from rollout_core.testing.report import Report

    return Report.from_json(path.read_bytes())


def _write_scripts(report: Report, folder: Path) -> int:
    folder.mkdir(exist_ok=True)
    with_script = [result for result in report.results if result.script]
    for result in with_script:
        (folder / f"{result.id.partition('/')[2].replace('-', '_')}.py").write_text(result.script)
    return len(with_script)


def _list() -> None:
    from rollout_core.testing.carriers import CARRIER_CAPABILITIES
    from rollout_core.testing.packers import CAPABILITIES
    from rollout_core.testing.peers import PEERS, TRACKER_PEERS, real_worlds
    from rollout_core.testing.registry import LEVELS, select_checks
    from rollout_core.testing.targets import OWN, OWN_CARRIERS, OWN_TRACKERS, OWN_WORKERS
    from rollout_core.testing.trackers import TRACKER_CAPABILITIES
    from rollout_core.testing.workers import WORKER_CAPABILITIES
    from rollout_core.testing.worlds import world_names

    print(f"checks (level {LEVELS[-1]})")
    for check in (check for kind in ("packer", "tracker", "carrier", "worker") for check in select_checks(kind)):
        needs = f"  [needs {', '.join(sorted(check.needs))}]" if check.needs else ""
        print(f"  {check.id:<28} {check.title}{needs}")
    for kind, known in (
        ("", CAPABILITIES),
        (" of trackers", TRACKER_CAPABILITIES),
        (" of carriers", CARRIER_CAPABILITIES),
        (" of workers", WORKER_CAPABILITIES),
    ):
        print(f"capabilities{kind}")
        for name, words in known.items():
            print(f"  {name:<28} {words}")
    print("worlds of trackers")
    print("\n".join(f"  {name}" for name in [*world_names(), *real_worlds.WORLDS]))
    print("shipped adapters")
    for name, target in {**OWN, **OWN_TRACKERS, **OWN_CARRIERS, **OWN_WORKERS}.items():
        print(f"  {name:<28} {target}")
    for peer in PEERS.values():
        print(f"  {peer.name:<28} {peer.distribution} {peer.version}, {peer.source}")
    for tracker in TRACKER_PEERS.values():
        print(f"  {tracker.name:<28} {tracker.distribution} {tracker.version}, {tracker.source}")


def _progress(console: Console) -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    return Progress(*columns, console=console, transient=True, disable=not console.is_terminal)


def _refuse(message: str) -> NoReturn:
    Console(stderr=True).print(Text(message), style="bold red", soft_wrap=True)
    raise typer.Exit(2)
