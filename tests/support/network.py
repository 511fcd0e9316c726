"""A model of an update: one sender, its receivers, what travels between them, slots, weights, and the faults of all of these.

A ``World`` is frozen and hashable. ``Network.steps`` gives what can happen next in it, ``Network.faults`` what can go wrong, and
``Network.after`` the world after that. An action that a machine asks for is not carried out at once: it is under way until a step
of its own ends it, so that a message can come, an end can die and time can pass in the middle of everything. The model shares no
code with the machines but their messages, events and actions; what it knows of an update it knows from those.

``support.invariants`` says what has to hold in every world, ``support.exploration`` looks at all of them.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Final, NamedTuple

from rollout_core.transfer.protocol import receiver as receiver_module
from rollout_core.transfer.protocol import sender as sender_module
from rollout_core.transfer.protocol.line import Patience
from rollout_core.transfer.protocol.messages import (
    PROTOCOL,
    Abort,
    Aborted,
    Beat,
    Cause,
    Commit,
    Committed,
    Envelope,
    Filled,
    Free,
    Hello,
    Ready,
    Welcome,
)
from rollout_core.transfer.protocol.steps import (
    Applied,
    Apply,
    Begin,
    Came,
    Done,
    Examine,
    Examined,
    Failed,
    Gone,
    Load,
    Loaded,
    Pack,
    Packed,
    Post,
    Prepare,
    Prepared,
    Pull,
    Pulled,
    Push,
    Pushed,
    SourceEnded,
    Tick,
)

SENDER: Final = 0  # the sender's number among the ends; receivers count from 1
FOREVER: Final = float("inf")
NBYTES: Final = 8
#: Faults that an update has to survive: a message twice, a message overtaken by later ones, an action that takes long.
HARMLESS: Final = frozenset({"repeat", "late", "slow"})
FAULTS: Final = HARMLESS | {"lose", "fail", "interrupt", "die", "crash", "stop", "stall"}


@dataclass(frozen=True, slots=True)
class Size:
    """What there is. ``timeouts`` of the sender and of each receiver in seconds; the last one counts for all that follow."""

    receivers: int = 1
    slots: int = 2
    buckets: int = 3
    rendezvous: bool = False
    staged: bool = False  # whether a load leaves the weights alone until they are applied
    closes: bool = True  # whether an end that cannot be used again closes its way to the others
    timeouts: tuple[float, ...] = (20.0,)
    deadline: float = 200.0

    def timeout(self, end: int) -> float:
        return self.timeouts[min(end, len(self.timeouts) - 1)]


class Step(NamedTuple):
    """Something that happens. ``at``: an end, or a way (see ``World.ways``). ``which``: of the tasks under way there."""

    kind: str
    at: int = 0
    which: int = 0


class Broken(AssertionError):
    """An invariant does not hold."""

    def __init__(self, invariant: str, message: str) -> None:
        super().__init__(f"{invariant}: {message}")
        self.invariant = invariant
        self.message = message


class Node:
    """A machine's state, one object for each, so that worlds compare and hash by its address."""

    __slots__ = ("moves", "state", "wake_at")

    def __init__(self, state: Any) -> None:
        self.state = state
        self.moves: dict[Any, tuple[Node, tuple[Any, ...]]] = {}
        self.wake_at: float = state.wake_at

    def __repr__(self) -> str:
        return f"<{self.state.phase}>"


@dataclass(frozen=True, slots=True)
class Task:
    """An action under way. ``moved``: in a rendezvous, whether all have met. ``not_before``: when it can end at the earliest."""

    action: Any
    moved: bool = False
    not_before: float = 0.0


@dataclass(frozen=True, slots=True)
class End:
    """An end, and what the model knows of it. From ``welcomed_at`` on: a receiver only."""

    node: Node
    tasks: tuple[Task, ...] = ()
    done: Done | None = None
    life: str = "alive"  # or "dead" or "stopped"
    cut: bool = False  # whether it was told that a way is lost
    trouble: float | None = None  # when it first heard of trouble
    welcomed_at: float = FOREVER
    began: float = FOREVER  # when the Hello came
    pulled: frozenset[int] = frozenset()
    memory: tuple[Any, ...] = ()  # its own slots, where bytes are moved by a rendezvous
    ready: bool = False  # whether it said so
    good: int = 0  # buckets that were verified and loaded
    bad: int = 0  # that were not
    content: str = "old"  # of the weights; or "mixed" or "new"
    has_version: bool = False  # whether its version is that of the update
    unusable: bool = False  # whether its weights are marked so

    @property
    def welcomed(self) -> bool:
        return self.welcomed_at < FOREVER

    @property
    def is_running(self) -> bool:
        return self.life == "alive" and self.done is None


@dataclass(frozen=True, slots=True)
class Way:
    """What is under way from one end to another: the first of ``queue`` comes next, any of ``strays`` at any time.

    ``next_in`` and ``early``: which numbers came. ``heard``: when they last became more without a hole. ``final``: whether the last
    that there is to say was said. ``beats``: how often it was said that an end is there.
    """

    queue: tuple[Envelope | Gone, ...] = ()
    strays: tuple[Envelope, ...] = ()
    next_in: int = 0
    early: frozenset[int] = frozenset()
    heard: float = 0.0
    final: bool = False
    beats: int = 0


@dataclass(frozen=True, slots=True)
class Cell:
    """A slot. ``content``: (attempt, bucket), None if it is empty or being written. ``shown``: whether it was pushed."""

    content: tuple[int, int] | None = None
    shown: bool = False


@dataclass(frozen=True, slots=True)
class World:
    """``ends``: the sender, then the receivers. ``ways``: to receiver 1, back from it, to receiver 2, and so on. ``leases``:
    (receiver, bucket, slot) from ``Filled`` to ``Free``."""

    size: Size
    ends: tuple[End, ...]
    ways: tuple[Way, ...]
    cells: tuple[Cell, ...]
    leases: frozenset[tuple[int, int, int]] = frozenset()
    now: float = 0.0
    attempt: int = 1
    committed: bool = False  # whether the sender said Commit
    went_wrong: tuple[tuple[str, int, str], ...] = ()  # (kind, place, detail) of every fault
    left: int = 0  # faults that may still happen

    @property
    def is_over(self) -> bool:
        return not any(end.is_running for end in self.ends)


class Machines:
    """The two classes under test. A step of a state is computed once."""

    def __init__(self, sender: Any = sender_module, receiver: Any = receiver_module) -> None:
        self._sender, self._receiver = sender.Sender, receiver.Receiver
        self._nodes: dict[Any, Node] = {}

    def node(self, state: Any) -> Node:
        found = self._nodes.get(state)
        if found is None:
            found = self._nodes[state] = Node(state)
        return found

    def step(self, node: Node, event: Any, now: float) -> tuple[Node, tuple[Any, ...]]:
        found = node.moves.get((event, now))
        if found is None:
            state, actions = node.state.step(event, now)
            found = node.moves[event, now] = (self.node(state), actions)
        return found

    def sender(self, size: Size, attempt: int, now: float) -> Node:
        timeout = size.timeout(SENDER)
        hello = Hello(PROTOCOL, attempt, b"plan", b"", size.slots, NBYTES, size.rendezvous, b"", timeout)
        patience = Patience(timeout, now + size.deadline)
        return self.node(self._sender.new(attempt, hello, patience, size.receivers, now))

    def receiver(self, size: Size, place: int, attempt: int, now: float) -> Node:
        return self.node(self._receiver.new(timeout=size.timeout(place), wait=size.deadline, deadline=size.deadline, now=now))


class Network:
    """The rules by which a world changes."""

    def __init__(self, size: Size, machines: Machines | None = None) -> None:
        self.size = size
        self.machines = machines or Machines()

    def start(self, faults: int = 0) -> World:
        size = self.size
        memory = (None,) * size.slots if size.rendezvous else ()
        ends = [End(self.machines.sender(size, 1, 0.0))]
        ends += [End(self.machines.receiver(size, place + 1, 1, 0.0), memory=memory) for place in range(size.receivers)]
        world = World(size, tuple(ends), (Way(),) * (2 * size.receivers), (Cell(),) * size.slots, left=faults)
        return self._begun(world)

    def again(self, world: World, *, faults: int = 0, now: float = 0.0) -> World | None:
        """The next update on the same ways, what is left on them included; None if an end cannot be used again."""
        if any(end.life != "alive" or end.done is None or not end.done.reusable for end in world.ends):
            return None
        size, attempt = self.size, world.attempt + 1
        ends = [End(self.machines.sender(size, attempt, now))]
        for place, end in enumerate(world.ends[1:], 1):
            ends.append(End(self.machines.receiver(size, place, attempt, now), memory=end.memory))
        # A Hello that comes again after its update is the one thing that the contract of a carrier has to rule out.
        late = [tuple(stray for stray in way.strays if not isinstance(stray.body, Hello)) for way in world.ways]
        ways = tuple(Way(way.queue, strays, heard=now) for way, strays in zip(world.ways, late, strict=True))
        return self._begun(World(size, tuple(ends), ways, world.cells, now=now, attempt=attempt, left=faults))

    def _begun(self, world: World) -> World:
        draft = _Draft(self, world)
        draft.tell(SENDER, Begin())
        return draft.world()

    def steps(self, world: World) -> list[Step]:
        """What can happen, apart from faults. Time passes only when nothing else can happen."""
        found = []
        for number, way in enumerate(world.ways):
            if world.ends[target_of(number)].is_running:
                found += [Step("deliver", number)] if way.queue else []
                found += [Step("stray", number, which) for which in range(len(way.strays))]
        for place, end in enumerate(world.ends):
            if end.life != "alive":
                continue
            for which, task in enumerate(end.tasks):
                if self._can_finish(world, task):
                    found.append(Step("finish", place, which))
            if end.done is None and end.node.wake_at <= world.now:
                found.append(Step("tick", place))
        if not found and self.next_time(world) < FOREVER:
            found.append(Step("clock"))
        return found

    def _can_finish(self, world: World, task: Task) -> bool:
        moves = isinstance(task.action, Push | Pull) and world.size.rendezvous
        return task.not_before <= world.now and (task.moved or not moves)

    def next_time(self, world: World) -> float:
        """When something happens by itself at the earliest."""
        times = [end.node.wake_at for end in world.ends if end.is_running]
        for end in world.ends:
            if end.life == "alive":
                times += [task.not_before for task in end.tasks if task.not_before > world.now]
        return min(times, default=FOREVER)

    def faults(self, world: World) -> list[Step]:
        """What can go wrong."""
        if not world.left:
            return []
        found = []
        for number, way in enumerate(world.ways):
            if way.queue and isinstance(way.queue[0], Envelope) and world.ends[target_of(number)].is_running:
                found += [Step("lose", number), Step("repeat", number), Step("late", number)]
        for place, end in enumerate(world.ends):
            if end.done is not None and end.done.reusable and end.life == "alive" and not world.is_over:
                found.append(Step("die", place))
            if not end.is_running:
                continue
            for which, task in enumerate(end.tasks):
                found.append(Step("fail", place, which))
                if not task.not_before:
                    found.append(Step("slow", place, which))
            found += [Step("interrupt", place), Step("die", place), Step("crash", place), Step("stop", place)]
        if not world.is_over:
            found += [Step("stall", 0), Step("stall", 1)]
        return found

    def after(self, world: World, step: Step) -> World:
        """The world after a step. ``Broken`` if an invariant of the step itself does not hold."""
        draft = _Draft(self, world)
        getattr(draft, step.kind)(step.at, step.which)
        return draft.world()

    def passed(self, world: World, seconds: float) -> World:
        """The world some time later, at most when an end wants to be woken."""
        return replace(world, now=max(world.now, min(world.now + seconds, self.next_time(world))))


def target_of(way: int) -> int:
    return way // 2 + 1 if way % 2 == 0 else SENDER


def source_of(way: int) -> int:
    return SENDER if way % 2 == 0 else way // 2 + 1


class _Draft:
    """A world in the making; one method for each kind of step."""

    def __init__(self, network: Network, world: World) -> None:
        self._network, self._old = network, world
        self._size = world.size
        self.now = world.now
        self.ends, self.ways, self.cells = list(world.ends), list(world.ways), list(world.cells)
        self.leases, self.committed = world.leases, world.committed
        self.went_wrong, self.left = world.went_wrong, world.left

    def world(self) -> World:
        if self._size.rendezvous:
            self._meet()
        old = self._old
        return World(
            old.size,
            tuple(self.ends),
            tuple(self.ways),
            tuple(self.cells),
            self.leases,
            self.now,
            old.attempt,
            self.committed,
            self.went_wrong,
            self.left,
        )

    # -- what happens by itself

    def deliver(self, way: int, _: int) -> None:
        message, *rest = self.ways[way].queue
        self.ways[way] = replace(self.ways[way], queue=tuple(rest))
        self._give(way, message)

    def stray(self, way: int, which: int) -> None:
        strays = self.ways[way].strays
        self.ways[way] = replace(self.ways[way], strays=(*strays[:which], *strays[which + 1 :]))
        self._give(way, strays[which])

    def _give(self, way: int, message: Envelope | Gone) -> None:
        place, peer = target_of(way), way // 2
        if isinstance(message, Gone):
            self._note_trouble(place)
            self.ends[place] = replace(self.ends[place], cut=True)
            self.ways[way] = replace(self.ways[way], final=True)
            self.tell(place, Gone(message.reason, peer if place == SENDER else 0))
            return
        if message.attempt == self._old.attempt:
            self._note_heard(way, message)
        self.tell(place, Came(message, peer if place == SENDER else 0))

    def _note_heard(self, number: int, message: Envelope) -> None:
        """Remember when the messages without a hole last became more, and whether trouble is among them."""
        way, place = self.ways[number], target_of(number)
        if message.number < way.next_in:
            return
        early, next_in = way.early | {message.number}, way.next_in
        while next_in in early:
            early, next_in = early - {next_in}, next_in + 1
        final = way.final or isinstance(message.body, Aborted | Committed)
        heard = self.now if next_in > way.next_in else way.heard
        self.ways[number] = replace(way, early=early, next_in=next_in, heard=heard, final=final)
        if isinstance(message.body, Hello):
            self.ends[place] = replace(self.ends[place], began=self.now)
        if isinstance(message.body, Abort) and next_in > message.number:
            self._note_trouble(place)

    def _note_trouble(self, place: int) -> None:
        if self.ends[place].trouble is None:
            self.ends[place] = replace(self.ends[place], trouble=self.now)

    def tick(self, place: int, _: int) -> None:
        self.tell(place, Tick())
        end = self.ends[place]
        if end.done is None and end.node.wake_at <= self.now:
            raise Broken(
                "t2_no_spinning",
                f"after a Tick at {self.now} s {name_of(place)} ({end.node.state.phase}) is to be woken later than that; "
                f"it asks for {end.node.wake_at} s",
            )

    def clock(self, _: int, __: int) -> None:
        self.now = self._network.next_time(self._old)

    def finish(self, place: int, which: int) -> None:
        action = self._pop(place, which).action
        end = self.ends[place]
        attempt = self._old.attempt
        match action:
            case Pack(index, slot):
                if index < self._size.buckets:
                    self.cells[slot] = Cell((attempt, index))
                    self.tell(place, Packed(Filled(index, slot, NBYTES, b"", "xxh3-128", None, b"")))
                else:
                    self.tell(place, SourceEnded())
            case Push(index, slot):
                if not self._size.rendezvous:
                    self.cells[slot] = replace(self.cells[slot], shown=True)
                self.tell(place, Pushed(index))
            case Pull(index):
                self.ends[place] = replace(end, pulled=end.pulled | {index})
                self.tell(place, Pulled(index))
            case Load(filled):
                self._changed(place, good=end.good + 1)
                self.tell(place, Loaded(filled.index))
            case Examine():
                self.tell(place, Examined(attempt - 1))
            case Prepare():
                self.tell(place, Prepared())
            case Apply():
                self._changed(place, content="new", has_version=True)
                self.tell(place, Applied())
            case _:
                raise AssertionError(action)

    # -- what goes wrong

    def lose(self, way: int, _: int) -> None:
        self._wrong("lose", way, type(self.ways[way].queue[0].body).__name__)  # type: ignore[union-attr]
        self.ways[way] = replace(self.ways[way], queue=self.ways[way].queue[1:])

    def repeat(self, way: int, _: int) -> None:
        """A message comes, and comes again at any time."""
        message, *rest = self.ways[way].queue
        self._wrong("repeat", way, type(message.body).__name__)  # type: ignore[union-attr]
        self.ways[way] = replace(self.ways[way], queue=tuple(rest), strays=(*self.ways[way].strays, message))  # type: ignore[arg-type]
        self._give(way, message)

    def late(self, way: int, _: int) -> None:
        """A message is overtaken by others."""
        message, *rest = self.ways[way].queue
        self._wrong("late", way, type(message.body).__name__)  # type: ignore[union-attr]
        self.ways[way] = replace(self.ways[way], queue=tuple(rest), strays=(*self.ways[way].strays, message))  # type: ignore[arg-type]

    def slow(self, place: int, which: int) -> None:
        """An action takes longer than anybody is patient."""
        tasks = self.ends[place].tasks
        self._wrong("slow", place, type(tasks[which].action).__name__)
        longest = max(self._size.timeouts)
        slow = replace(tasks[which], not_before=self.now + 1.5 * longest)
        self.ends[place] = replace(self.ends[place], tasks=(*tasks[:which], slow, *tasks[which + 1 :]))

    def fail(self, place: int, which: int) -> None:
        action = self._pop(place, which).action
        what = type(action).__name__
        self._wrong("fail", place, what)
        self._note_trouble(place)
        kind = {"Examine": "PlanMismatchError", "Load": "IntegrityError"}.get(what, "OSError")
        end = self.ends[place]
        if isinstance(action, Load):
            self._changed(place, bad=end.bad + 1)
        elif isinstance(action, Apply):
            self._changed(place, content="mixed")
        self.tell(place, Failed(Cause(kind, f"{what} failed")))
        if isinstance(action, Pack):
            self.tell(place, SourceEnded())
        elif isinstance(action, Load):
            self.tell(place, Loaded(action.filled.index))

    def interrupt(self, place: int, _: int) -> None:
        """The caller wants no more. What answers with ``Failed`` alone ends by it; the rest goes on."""
        end = self.ends[place]
        self._wrong("interrupt", place, "waiting" if place != SENDER and end.began == FOREVER else "")
        self._note_trouble(place)
        ended = [task.action for task in end.tasks if isinstance(task.action, Examine | Prepare | Apply)]
        if any(isinstance(action, Apply) for action in ended):
            self._changed(place, content="mixed")
        tasks = tuple(task for task in end.tasks if task.action not in ended)
        self.ends[place] = replace(self.ends[place], tasks=tasks)
        self.tell(place, Failed(Cause("KeyboardInterrupt", "interrupted")))

    def die(self, place: int, _: int) -> None:
        """An end is gone, and the others are told once they have got what it said."""
        self._wrong("die", place)
        self.ends[place] = replace(self.ends[place], life="dead", tasks=())
        self.leases = frozenset(lease for lease in self.leases if lease[0] != place)
        self._close(place)

    def crash(self, place: int, _: int) -> None:
        """An end is gone with what it said and nobody got yet."""
        for number, way in enumerate(self.ways):
            if source_of(number) == place:
                self.ways[number] = replace(way, queue=())
        self.die(place, 0)

    def stop(self, place: int, _: int) -> None:
        """An end does nothing any more, and nobody is told."""
        self._wrong("stop", place)
        self.ends[place] = replace(self.ends[place], life="stopped")

    def stall(self, which: int, _: int) -> None:
        """Nothing happens anywhere for as long as silence is borne, or to the deadline."""
        self._wrong("stall", which)
        longest = max(self._size.timeouts)
        self.now += self._size.deadline if which else longest

    def _wrong(self, kind: str, place: int, detail: str = "") -> None:
        self.went_wrong = (*self.went_wrong, (kind, place, detail))
        self.left -= 1

    # -- what a machine does about it

    def tell(self, place: int, event: Any) -> None:
        """An event for a machine, and what it does about it. One that is over hears nothing."""
        if self.ends[place].done is not None:
            return
        node, actions = self._network.machines.step(self.ends[place].node, event, self.now)
        self.ends[place] = replace(self.ends[place], node=node)
        for action in actions:
            match action:
                case Post(envelope, peer):
                    self._post(place, 2 * (peer if place == SENDER else place - 1) + (place != SENDER), envelope)
                case Done():
                    self._over(place, action)
                case _:
                    self._begin(place, action)

    def _begin(self, place: int, action: Any) -> None:
        end = self.ends[place]
        self.ends[place] = replace(end, tasks=(*end.tasks, Task(action)))
        match action:
            case Pack(_, slot):
                self.cells[slot] = Cell()
            case Load() if not self._size.staged:
                self._changed(place, content="mixed")

    def _post(self, place: int, number: int, envelope: Envelope) -> None:
        body, way, receiver = envelope.body, self.ways[number], number // 2 + 1
        match body:
            case Filled(index, slot):
                self.leases = self.leases | {(receiver, index, slot)}
            case Free(index):
                self.leases = frozenset(lease for lease in self.leases if lease[:2] != (receiver, index))
            case Welcome():
                self.ends[place] = replace(self.ends[place], welcomed_at=self.now)
            case Ready():
                self.ends[place] = replace(self.ends[place], ready=True)
            case Commit():
                self.committed = True
            case Beat():
                way = replace(way, beats=way.beats + 1)
        other = self.ends[target_of(number)]
        if other.life != "dead" and not self._is_closed(other):
            way = replace(way, queue=(*way.queue, envelope))
        self.ways[number] = way

    def _over(self, place: int, done: Done) -> None:
        end = self.ends[place]
        unusable = done.cause is not None and end.content != "old"
        self.ends[place] = replace(end, done=done, unusable=unusable)
        if done.reusable:
            self.leases = frozenset(lease for lease in self.leases if lease[0] != place)
        elif self._size.closes:
            self._close(place)

    def _is_closed(self, end: End) -> bool:
        return self._size.closes and end.done is not None and not end.done.reusable

    def _close(self, place: int) -> None:
        for number, way in enumerate(self.ways):
            if target_of(number) == place:
                self.ways[number] = replace(way, queue=(), strays=())
            elif source_of(number) == place and not any(isinstance(message, Gone) for message in way.queue):
                other = self.ends[target_of(number)]
                if other.life != "dead" and not self._is_closed(other):
                    self.ways[number] = replace(way, queue=(*way.queue, Gone(f"{name_of(place)} closed its end")))

    def _changed(self, place: int, **changes: Any) -> None:
        """The weights of a receiver, or what is known of them, changed."""
        self.ends[place] = replace(self.ends[place], **changes)

    def _pop(self, place: int, which: int) -> Task:
        tasks = self.ends[place].tasks
        self.ends[place] = replace(self.ends[place], tasks=(*tasks[:which], *tasks[which + 1 :]))
        return tasks[which]

    def _meet(self) -> None:
        """Move a bucket for which both the sender and every receiver have come, in the order in which they came. After a move that
        failed no other can be made."""
        while not any(kind == "fail" and detail in ("Push", "Pull") for kind, _, detail in self.went_wrong):
            firsts = [
                next((n for n, task in enumerate(end.tasks) if isinstance(task.action, Push | Pull) and not task.moved), None)
                for end in self.ends
            ]
            if any(first is None for first in firsts) or any(end.life != "alive" or self._is_closed(end) for end in self.ends):
                return
            actions = [end.tasks[first].action for end, first in zip(self.ends, firsts, strict=True)]  # type: ignore[index]
            if len({action.index for action in actions}) > 1:
                raise Broken("t4_the_same_bucket_is_moved", f"all ends move one bucket; they move {[a.index for a in actions]}")
            content = self.cells[actions[0].slot].content
            for place, first in enumerate(firsts):
                end, action = self.ends[place], actions[place]
                assert first is not None
                tasks = (*end.tasks[:first], replace(end.tasks[first], moved=True), *end.tasks[first + 1 :])
                memory = end.memory
                if place != SENDER:
                    memory = (*memory[: action.slot], content, *memory[action.slot + 1 :])
                self.ends[place] = replace(end, tasks=tasks, memory=memory)


def name_of(place: int) -> str:
    return "the sender" if place == SENDER else f"receiver {place - 1}"
