"""Updates of any size with any faults at any time, as programs: lists of numbers, each of which picks what happens next."""

import pytest
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st

from support.exploration import told
from support.invariants import INVARIANTS, a_failure_is_told, a_failure_leaves_the_ways_usable, check, success_without_faults
from support.network import FAULTS, HARMLESS, Broken, Network, Size, Step

#: Where time passes while messages are under way, live ends may fall silent, and a cause need not be the fault that was made.
ANY_TIME = tuple(i for i in INVARIANTS if i not in (a_failure_is_told, a_failure_leaves_the_ways_usable, success_without_faults))
PATIENT = tuple(i for i in INVARIANTS if i not in (a_failure_is_told, a_failure_leaves_the_ways_usable))
#: More steps than any update of these sizes takes, with all the beats until its deadline.
MANY = 20_000

sizes = st.builds(
    Size,
    receivers=st.integers(0, 4),
    slots=st.integers(1, 5),
    buckets=st.integers(0, 8),
    rendezvous=st.booleans(),
    staged=st.booleans(),
    closes=st.booleans(),
    timeouts=st.lists(st.sampled_from([10.0, 20.0, 64.0]), min_size=1, max_size=5).map(tuple),
    deadline=st.sampled_from([5.0, 100.0, 300.0]),
)
numbers = st.integers(0, 2**20 - 1)
programs = st.lists(numbers, max_size=20) | st.lists(numbers, min_size=30, max_size=200)


class Run:
    """A program at work. Its faults are of ``kinds``; ``hasty``: whether time passes while something else could happen."""

    def __init__(self, size, kinds, *, hasty, invariants):
        self.network = Network(size)
        self.world = self.network.start(faults=4)
        self.kinds, self.hasty, self.invariants = kinds, hasty, invariants
        self.log = []
        check(self.world, invariants)

    def take(self, number):
        """Do what a number stands for."""
        choice, number = number % 8, number // 8
        if choice == 0 and self.hasty:
            self.log.append(f"{number % 64 / 8} s pass")
            self.world = self.network.passed(self.world, number % 64 / 8)
            return check(self.world, self.invariants)
        faults = [step for step in self.network.faults(self.world) if step.kind in self.kinds] if choice == 1 else []
        steps = faults or self.network.steps(self.world)
        if steps:
            self.step(steps[number % len(steps)])
        return None

    def step(self, step):
        self.log.append(told(self.world, step))
        self.world = self.network.after(self.world, step)
        check(self.world, self.invariants)

    def finish(self):
        """Let what is left happen in some order, until all ends are over."""
        for turn in range(MANY):
            if self.world.is_over:
                return
            steps = self.network.steps(self.world)
            if not steps:
                raise Broken("t2_no_deadlock", f"all come to an end; nothing can happen in {self.world}")
            self.step(steps[turn * 7 % len(steps)])
        raise Broken("t2_no_livelock", f"an update takes less than {MANY} steps; it took more")


def play(size, kinds, updates, *, hasty, invariants):
    """The programs of some updates, one after the other on the same ways. Gives the world at the end of each."""
    run = Run(size, kinds, hasty=hasty, invariants=invariants)
    try:
        for program in updates:
            for number in program:
                run.take(number)
            run.finish()
            yield run.world
            following = run.network.again(run.world, faults=4)
            if following is None:
                return
            run.log.append("again")
            run.world = following
        # Whatever is left of the last: an update without faults or haste succeeds.
        run.world, run.hasty, run.invariants = run.network.again(run.world) or run.world, False, INVARIANTS
        if not run.world.is_over:
            run.finish()
            event("succeeded after all")
    except Broken as broken:
        broken.add_note("\n".join(run.log))
        raise


def check_any_faults(size, kinds, updates):
    for world in play(size, kinds, updates, hasty=True, invariants=ANY_TIME):
        causes = {end.done.cause.kind for end in world.ends if end.done is not None and end.done.cause is not None}
        event(f"faults: {len(world.went_wrong)}, failed: {bool(causes)}")


def check_harmless_faults(size, updates):
    """Messages that come twice or late, and actions that take long, in any number: everything succeeds."""
    succeeded = 0
    for world in play(size, HARMLESS, updates, hasty=False, invariants=PATIENT):
        for end in world.ends:
            assert end.done.cause is None, f"every end survives {world.went_wrong}; one says {end.done.cause}"
            assert end.done.reusable, f"every end can be used again after {world.went_wrong}; one cannot"
        succeeded += 1
    assert succeeded == len(updates)


any_faults = given(sizes, st.sets(st.sampled_from(sorted(FAULTS)), min_size=1), st.lists(programs, min_size=1, max_size=3))
# A deadline that a slow action cannot meet is no false alarm.
patient = given(
    st.builds(lambda size: Size(**{**_fields(size), "deadline": 1e4}), sizes), st.lists(programs, min_size=1, max_size=3)
)


def _fields(size):
    return {name: getattr(size, name) for name in Size.__dataclass_fields__}


@settings(max_examples=800, suppress_health_check=[HealthCheck.too_slow])
@any_faults
def test_any_faults_at_any_time(size, kinds, updates):
    check_any_faults(size, kinds, updates)


@settings(max_examples=100, suppress_health_check=[HealthCheck.too_slow])
@patient
def test_what_a_live_update_survives(size, updates):
    check_harmless_faults(size, updates)


@pytest.mark.slow
@settings(max_examples=3000, suppress_health_check=[HealthCheck.too_slow])
@any_faults
def test_any_faults_at_any_time_at_length(size, kinds, updates):
    check_any_faults(size, kinds, updates)


@pytest.mark.slow
@settings(max_examples=1000, suppress_health_check=[HealthCheck.too_slow])
@patient
def test_what_a_live_update_survives_at_length(size, updates):
    check_harmless_faults(size, updates)


def test_a_step_is_told_in_words():
    """For the log of a program, and the trace of an exploration."""
    network = Network(Size())
    world = network.start()
    assert told(world, Step("deliver")).startswith("  0.00 deliver to receiver 0: 1/0 Hello(")
