"""What has to hold in every world of ``support.network``, clause by clause.

Each invariant yields sentences that say what is expected and what is the case instead.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Final

from rollout_core.transfer.protocol.steps import Apply, Load, Pack, Pull, Push
from support.network import FOREVER, HARMLESS, SENDER, Broken, World, name_of, source_of


def _slot_read(action: Any) -> int | None:
    """The slot that an action of a receiver reads."""
    match action:
        case Load(filled):
            return filled.slot
        case Pull(_, slot):
            return slot
    return None


def t1_no_slot_is_written_while_it_is_read(world: World) -> Iterator[str]:
    sender = world.ends[SENDER]
    for writing in sender.tasks:
        if not isinstance(writing.action, Pack):
            continue
        slot = writing.action.slot
        for receiver, index, leased in world.leases:
            if leased == slot:
                yield f"slot {slot} is packed when nobody holds it; {name_of(receiver)} holds bucket {index} in it"
        for task in sender.tasks:
            if isinstance(task.action, Push) and task.action.slot == slot:
                yield f"slot {slot} is packed when it is at rest; bucket {task.action.index} is being pushed from it"
        for place, end in enumerate(world.ends[1:], 1):
            for task in end.tasks:
                if not world.size.rendezvous and _slot_read(task.action) == slot:
                    yield f"slot {slot} is packed when nobody reads it; {name_of(place)} does: {task.action}"
    if not world.size.rendezvous:
        return
    for place, end in enumerate(world.ends[1:], 1):
        into = {task.action.slot for task in end.tasks if isinstance(task.action, Pull)}
        for task in end.tasks:
            if isinstance(task.action, Load) and task.action.filled.slot in into:
                yield f"{name_of(place)} pulls into slots at rest; it pulls into {sorted(into)}, and does {task.action}"


def t4_a_reader_sees_what_was_announced(world: World) -> Iterator[str]:
    for place, end in enumerate(world.ends[1:], 1):
        for task in end.tasks:
            slot = _slot_read(task.action)
            if slot is None or (world.size.rendezvous and isinstance(task.action, Pull)):
                continue
            index = task.action.filled.index if isinstance(task.action, Load) else task.action.index
            if world.size.rendezvous:
                seen, shown = end.memory[slot], True
            else:
                seen, shown = world.cells[slot].content, world.cells[slot].shown
            if seen != (world.attempt, index) or not shown:
                wanted = (world.attempt, index)
                yield f"{name_of(place)} reads {wanted} in slot {slot}; there is {seen}, complete: {shown}"
            if isinstance(task.action, Load) and index not in end.pulled:
                yield f"{name_of(place)} loads a bucket that it has pulled; it pulled {sorted(end.pulled)}, and loads {index}"


def b7_nothing_moves_before_all_agree(world: World) -> Iterator[str]:
    missing = [name_of(place) for place, end in enumerate(world.ends[1:], 1) if not end.welcomed]
    if missing:
        for place, end in enumerate(world.ends):
            for task in end.tasks:
                if isinstance(task.action, Pack | Push | Pull | Load):
                    yield f"{name_of(place)} moves nothing before all have welcomed; {missing} have not, and it does {task.action}"


def t5_version_only_after_all_was_loaded_and_committed(world: World) -> Iterator[str]:
    for place, end in enumerate(world.ends[1:], 1):
        if end.ready and end.good != world.size.buckets:
            yield f"{name_of(place)} says that it is ready after {world.size.buckets} good buckets; it had {end.good}"
        applying = any(isinstance(task.action, Apply) for task in end.tasks)
        if not (end.has_version or applying):
            continue
        if end.good != world.size.buckets or end.bad:
            yield f"{name_of(place)} has the version after {world.size.buckets} good buckets; it had {end.good}, and {end.bad} bad"
        if not world.committed:
            yield f"{name_of(place)} has the version after the sender said to commit; it has not said so"
        for other, peer in enumerate(world.ends[1:], 1):
            if not peer.ready:
                yield f"{name_of(place)} has the version when all are ready; {name_of(other)} had {peer.good} good buckets"


def t5_success_is_true(world: World) -> Iterator[str]:
    sender = world.ends[SENDER]
    for place, end in enumerate(world.ends[1:], 1):
        new = end.has_version and end.content == "new"
        if end.done is not None and (end.done.cause is None) != new:
            yield f"{name_of(place)} says how it ended, the weights {end.content}; it says {end.done.cause}"
        if sender.done is not None and sender.done.cause is None and not new:
            yield f"after the sender's success {name_of(place)} has the new weights; they are {end.content}"


def t5_a_failed_update_leaves_old_weights(world: World) -> Iterator[str]:
    for place, end in enumerate(world.ends[1:], 1):
        if end.done is not None and end.done.cause is not None:
            began = any(isinstance(task.action, Apply) for task in end.tasks)
            if not end.unusable and (end.content != "old" or began):
                yield f"after its failure {name_of(place)} has old weights or says that they are unusable; they are {end.content}"
            if end.has_version:
                yield f"after its failure {name_of(place)} has the old version; it has the new one"


def t2_ends_in_time(world: World) -> Iterator[str]:
    """Bounds in time of the model: it only runs on in between if nothing is left to do. A stall is out of anybody's hands."""
    if not world.now or any(kind == "stall" for kind, _, _ in world.went_wrong):
        return
    for place, end in enumerate(world.ends):
        if not end.is_running or any(isinstance(task.action, Apply) for task in end.tasks):
            continue
        timeout = world.size.timeout(place)
        if place == SENDER:
            limit = world.size.deadline + timeout / 4
        else:
            limit = world.size.deadline + (0 if end.began == FOREVER else end.began + timeout / 4)
        if world.now > limit:
            yield f"{name_of(place)} ends by its deadline, {limit} s; {_at(world, place)}"
        ways = world.ways[1::2] if place == SENDER else world.ways[2 * place - 2 : 2 * place - 1] if end.began < FOREVER else ()
        for way in ways:
            # Before it has the Welcome the sender does not know how often it has to say something.
            borne = timeout if place == SENDER or end.welcomed else max(timeout, world.size.timeout(SENDER))
            heard = max(way.heard, end.welcomed_at) if end.welcomed else way.heard
            if not way.final and world.now > heard + borne:
                yield f"{name_of(place)} ends within {borne} s of the last sign of life, at {heard} s; {_at(world, place)}"
        if end.trouble is not None and not world.committed and world.now > end.trouble + timeout:
            yield f"{name_of(place)} ends within {timeout} s of trouble, at {end.trouble} s; {_at(world, place)}"


def _at(world: World, place: int) -> str:
    return f"it is {world.ends[place].node.state.phase} at {world.now} s"


def t2_beats_are_bounded(world: World) -> Iterator[str]:
    beat = min(world.size.timeout(place) for place in range(len(world.ends))) / 5
    for number, way in enumerate(world.ways):
        if way.beats > world.now / beat + 1:
            yield f"{name_of(source_of(number))} says that it is there every {beat} s; by {world.now} s it did {way.beats} times"


def reusable_means_quiet(world: World) -> Iterator[str]:
    for place, end in enumerate(world.ends):
        if end.done is not None and end.done.reusable:
            moving = [task.action for task in end.tasks if isinstance(task.action, Pack | Push | Pull | Load | Apply)]
            if moving:
                yield f"{name_of(place)} can be used again when nothing is under way; there is {moving}"
            running = [name_of(other) for other, peer in enumerate(world.ends[1:], 1) if peer.is_running]
            if place == SENDER and running:
                yield f"the sender can be used again when nobody is in this update any more; {running} are"
            if end.cut:
                yield f"{name_of(place)} can be used again when no way is lost; it was told that one is"


def a_failure_is_told(world: World) -> Iterator[str]:
    """A cause names what went wrong, where that is one thing."""
    if len(world.went_wrong) != 1:
        return
    kind, place, detail = world.went_wrong[0]
    words = {
        "fail": [f"{detail} failed"],
        "interrupt": ["interrupted", "silent"] if detail == "waiting" else ["interrupted"],
        "lose": ["never came", "silent", "no update began", "closed its end"],
        "stop": ["silent", "no update began"],
        "die": ["closed its end"],
        "stall": ["silent", "deadline", "no update began", "closed its end"],
    }.get(kind, [])
    many = world.size.receivers > 1
    who = {"die": "the sender" if place == SENDER else f"receiver {place - 1}" if many else "the receiver"}
    who["stop"] = who["die"]
    for other, end in enumerate(world.ends):
        if end.done is None or end.done.cause is None or end.life != "alive":
            continue
        text = f"{end.done.cause.kind}: {end.done.cause.message}"
        if kind in HARMLESS:
            yield f"{name_of(other)} survives what went wrong, {world.went_wrong[0]}; it says {text!r}"
        elif not any(word in text for word in words) or who.get(kind, "") not in text:
            yield f"{name_of(other)} names what went wrong, {world.went_wrong[0]}; it says {text!r}"


def a_failure_leaves_the_ways_usable(world: World) -> Iterator[str]:
    """Where one thing failed, nobody was lost, and no move was left half done."""
    if len(world.went_wrong) != 1:
        return
    kind, place, detail = world.went_wrong[0]
    if (kind == "fail" and detail not in ("Push", "Pull")) or (kind == "interrupt" and not detail):
        for other, end in enumerate(world.ends):
            if end.done is not None and not end.done.reusable:
                yield f"after {kind} {detail} at {name_of(place)}, {name_of(other)} can be used again; it says {end.done}"


def success_without_faults(world: World) -> Iterator[str]:
    if not world.went_wrong:
        for place, end in enumerate(world.ends):
            if end.done is not None and (end.done.cause is not None or not end.done.reusable):
                yield f"without a fault {name_of(place)} succeeds; it says {end.done}"


def t2_no_time_is_lost(world: World) -> Iterator[str]:
    """Where time passes only when nothing else can happen."""
    if world.now and not world.went_wrong:
        yield f"without a fault an update is over before anything has to be waited for; {world.now} s passed"


INVARIANTS: Final[tuple[Callable[[World], Iterator[str]], ...]] = (
    t1_no_slot_is_written_while_it_is_read,
    t4_a_reader_sees_what_was_announced,
    b7_nothing_moves_before_all_agree,
    t5_version_only_after_all_was_loaded_and_committed,
    t5_success_is_true,
    t5_a_failed_update_leaves_old_weights,
    t2_ends_in_time,
    t2_beats_are_bounded,
    reusable_means_quiet,
    a_failure_is_told,
    a_failure_leaves_the_ways_usable,
    success_without_faults,
)


def check(world: World, invariants: tuple[Callable[[World], Iterator[str]], ...] = INVARIANTS) -> None:
    """``Broken`` for the first invariant that does not hold in a world."""
    for invariant in invariants:
        for message in invariant(world):
            raise Broken(invariant.__name__, message)
