"""A run within a time: what the clock decides on machines of every mood, and what follows from the record."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from charlm.errors import FileFormatError, InputError
from charlm.training import Timetable, TrainerConfig, learning_rate_at
from charlm.training.timetable import EVALUATION_SHARE, Timekeeper

ALL = 999_999_999_999


def config(**changes: Any) -> TrainerConfig:
    values = {"max_steps": ALL, "minutes": 1.0, "warmup_steps": 5, "eval_interval": None, "cooldown": 0.6}
    return TrainerConfig.from_dict({**values, **changes})


class Machine:
    """Steps and evaluations that take what they take, told to a timekeeper as a trainer does."""

    def __init__(
        self,
        settings: TrainerConfig,
        step_seconds: Callable[[float], float],
        evaluation_seconds: float = 0.5,
        *,
        repeat: Timetable | None = None,
        began: float = 0.0,
        resumed: tuple[int, Timetable] | None = None,
    ) -> None:
        self.keeper = Timekeeper(settings, repeat)
        self.settings, self.now, self.step = settings, began, 0
        self.evaluated: list[int] = []
        self.evaluating = 0.0
        self.rates: list[float] = []
        if resumed is not None:
            self.step, self.keeper.timetable = resumed
        self._step_seconds, self._evaluation_seconds = step_seconds, evaluation_seconds
        self._unhurried = step_seconds(-1.0) if evaluation_seconds else 1.0
        self.keeper.start(self.step, self.now, evaluation_seconds)

    def run(self, most: int = 100_000) -> None:
        """Take steps until the last one, or so many."""
        for _ in range(most):
            self.rates.append(learning_rate_at(self.step, self.settings, self.keeper.learning_rate_ends))
            self.now += self._step_seconds(self.now)
            self.step += 1
            last = self.keeper.after_step(self.step, self.now)
            due = self.keeper.is_evaluation_due(self.step) or last
            if due and self._evaluation_seconds:
                self.keeper.record_evaluation(self.step, scheduled=True)
                self.evaluated.append(self.step)
                took = self._evaluation_seconds * self._step_seconds(self.now) / self._unhurried
                self.now += took
                self.evaluating += took
            self.keeper.after_pause(self.now, evaluated=due)
            if last:
                return


def test_a_steady_machine_makes_the_run_that_was_to_be() -> None:
    machine = Machine(config(), lambda _: 0.05)
    machine.run()
    assert abs(machine.now - 60) < 0.6
    (began, end), *corrections = machine.keeper.timetable.ends
    assert corrections == []
    assert end == machine.step
    assert abs(began / end - 0.25) < 0.01  # the cool-down takes a quarter more than 60 % of all steps
    assert machine.evaluated[-1] == machine.step
    assert 4 <= len(machine.evaluated) <= 5


def test_the_rate_rises_stays_and_falls_to_almost_nothing() -> None:
    machine = Machine(config(learning_rate=1.0), lambda _: 0.05)
    machine.run()
    began, end = machine.keeper.timetable.ends[0]
    assert machine.rates[:5] == [0.2, 0.4, 0.6, 0.8, 1.0]
    assert set(machine.rates[5:began]) == {1.0}
    falling = machine.rates[began:]
    assert falling == pytest.approx([1 - i / (end - began) for i in range(end - began)])


moods = st.lists(st.tuples(st.floats(0, 60), st.sampled_from([1.0, 1.5, 2.5, 4.0])), max_size=5)


def speed(mood: Sequence[tuple[float, float]], each: float) -> Callable[[float], float]:
    """Return how long a step takes that begins at a time: some factor from each time on."""
    return lambda now: each * next((f for at, f in sorted(mood, reverse=True) if now >= at), 1.0)


@settings(deadline=None)
@example(mood=[(12.0, 4.0)], each=0.5, evaluation=0.6)
@given(mood=moods, each=st.floats(0.01, 0.6), evaluation=st.sampled_from([0.0, 0.05, 0.6]))
def test_whatever_the_machine_does_the_time_is_kept(
    mood: list[tuple[float, float]], each: float, evaluation: float
) -> None:
    machine = Machine(config(), speed(mood, each), evaluation)
    machine.run()
    assert 0.9 * 60 <= machine.now <= 1.1 * 60
    assert machine.evaluating <= EVALUATION_SHARE * 60 + 2 * 4 * evaluation  # two may come as a surprise
    ends = machine.keeper.timetable.ends
    assert len(ends) <= 16
    assert machine.step == machine.keeper.timetable.end
    falling = machine.rates[ends[0][0] :]
    assert all(b <= a + 1e-12 for a, b in itertools.pairwise(falling))  # never up again
    assert min(machine.rates) >= 0


@settings(deadline=None)
@given(mood=moods, each=st.floats(0.02, 0.6))
def test_a_repetition_makes_the_same_steps_whatever_its_machine_does(
    mood: list[tuple[float, float]], each: float
) -> None:
    first = Machine(config(), speed(mood, each))
    first.run()
    again = Machine(config(), lambda _: 7.0, 0.01, repeat=first.keeper.timetable)
    again.run()
    assert again.rates == first.rates
    assert again.evaluated == first.evaluated
    assert again.keeper.timetable == first.keeper.timetable


@settings(deadline=None)
@given(mood=moods, at=st.floats(0.01, 0.99))
def test_a_stop_in_any_phase_leaves_the_time_and_the_past_as_they_are(
    mood: list[tuple[float, float]], at: float
) -> None:
    whole = Machine(config(), speed(mood, 0.05))
    whole.run()
    first = Machine(config(), speed(mood, 0.05))
    first.run(max(1, int(at * whole.step)))
    kept = Timetable.from_dict(first.keeper.timetable.to_dict(), path="state.json")
    rest = Machine(config(), speed(mood, 0.05), began=first.now, resumed=(first.step, kept))
    rest.run()
    assert 0.9 * 60 <= rest.now <= 1.1 * 60
    assert rest.keeper.timetable.ends[: len(kept.ends)] == kept.ends
    again = Machine(config(), lambda _: 1.0, repeat=rest.keeper.timetable)
    again.run()
    assert again.rates == first.rates + rest.rates


@pytest.mark.parametrize("schedule", ["cosine", "linear"])
def test_a_schedule_that_needs_its_end_beforehand_is_stopped_by_the_clock(schedule: str) -> None:
    settings = config(schedule=schedule, max_steps=2_000)
    machine = Machine(settings, lambda _: 0.05)
    machine.run()
    assert abs(machine.now - 60) < 1
    assert machine.rates == [learning_rate_at(step, settings) for step in range(machine.step)]
    assert machine.keeper.timetable.ends == ((machine.step, machine.step),)


def test_a_constant_rate_stays_to_the_end() -> None:
    machine = Machine(config(schedule="constant", learning_rate=0.5), lambda _: 0.05)
    machine.run()
    assert set(machine.rates[5:]) == {0.5}
    assert abs(machine.now - 60) < 1


def test_max_steps_ends_a_run_before_its_time() -> None:
    machine = Machine(config(max_steps=100), lambda _: 0.05)
    machine.run()
    assert machine.step == 100
    assert machine.keeper.timetable.ends == ((40, 100),)


@pytest.mark.parametrize("each", [13.0, 25.0, 39.0, 61.0, 500.0])
def test_steps_that_take_much_of_the_time_are_made_as_far_as_they_fit(each: float) -> None:
    machine = Machine(config(), lambda _: each, 0.0)
    machine.run()
    assert machine.step == max(1, round(60 / each))


def test_the_first_step_of_a_process_is_no_measure() -> None:
    taken = iter([8.0])
    machine = Machine(config(), lambda _: next(taken, 0.05), 0.0)
    machine.run(2)
    assert machine.keeper.expected_steps(2) == pytest.approx(2 + (60 - 8.05) / 0.05, abs=1)


@pytest.mark.parametrize("first", [1.1, 8.0, 20.0, 40.0])
def test_a_slow_first_step_decides_nothing(first: float) -> None:
    taken = iter([first])
    machine = Machine(config(learning_rate=1.0), lambda _: next(taken, 0.07), 0.0)
    machine.run(1)
    assert machine.keeper.expected_steps(1) is None
    assert machine.keeper.timetable == Timetable()
    machine.run()
    assert abs(machine.now - 60) < 0.7
    assert max(machine.rates) == 1.0  # after the whole of the warm-up
    began = machine.keeper.timetable.ends[0][0]
    taken = iter([4.0])
    resumed = Machine(
        config(), lambda _: next(taken, 0.07), 0.0, began=50.0, resumed=(began + 9, machine.keeper.timetable)
    )
    resumed.run(1)
    assert resumed.keeper.timetable == machine.keeper.timetable


def test_a_run_whose_end_is_known_is_the_one_without_a_clock() -> None:
    timed = config(max_steps=60, warmup_steps=50, learning_rate=1.0)
    machine = Machine(timed, lambda _: 0.07, 0.0)
    machine.run()
    plain = timed.replace(minutes=None)
    assert machine.rates == pytest.approx([learning_rate_at(step, plain) for step in range(60)])


@pytest.mark.parametrize("each", [0.3, 0.7, 1.3, 1.44, 2.0, 2.9])
def test_evaluations_take_a_tenth_at_most_the_last_one_included(each: float) -> None:
    machine = Machine(config(), lambda _: 0.05, each)
    machine.run()
    assert machine.evaluating <= max(EVALUATION_SHARE * 60, each) + 1e-9


def test_before_any_step_nothing_is_expected_and_then_about_what_comes() -> None:
    machine = Machine(config(), lambda _: 0.05)
    assert machine.keeper.expected_steps(0) is None
    machine.run(10)
    early = machine.keeper.expected_steps(10)
    machine.run()
    assert early == pytest.approx(machine.step, rel=0.02)


def test_evaluations_that_take_too_long_are_left_out() -> None:
    machine = Machine(config(eval_interval=10), lambda _: 0.05, 2.0)
    machine.run()
    assert machine.evaluating <= 8
    assert all(step % 10 == 0 for step in machine.evaluated[:-1])
    assert abs(machine.now - 60) < 1


def test_a_long_run_is_evaluated_every_two_minutes() -> None:
    machine = Machine(config(minutes=20.0), lambda _: 0.5, 1.0)
    machine.run()
    assert len(machine.evaluated) == 10


def test_without_minutes_the_config_decides() -> None:
    settings = config(minutes=None, max_steps=20, eval_interval=5)
    machine = Machine(settings, lambda _: 1e6)
    machine.run()
    assert machine.step == 20
    assert machine.evaluated == [5, 10, 15, 20]
    assert machine.keeper.timetable == Timetable()
    assert machine.rates == [learning_rate_at(step, settings) for step in range(20)]


def test_without_minutes_and_interval_only_the_last_step_is_evaluated() -> None:
    machine = Machine(config(minutes=None, max_steps=20), lambda _: 1.0)
    machine.run()
    assert machine.evaluated == [20]


def test_each_correction_falls_from_where_the_rate_stands() -> None:
    settings = config(learning_rate=1.0, warmup_steps=0, min_lr_ratio=0.1)
    ends = ((10, 20), (15, 25), (20, 22))
    rates = [learning_rate_at(step, settings, ends) for step in range(22)]
    assert rates[:11] == [1.0] * 11
    assert rates[15] == pytest.approx(0.55)  # half-way from 1 to 0.1
    assert rates[20] == pytest.approx(0.325)  # half-way from there
    assert rates[21] == pytest.approx(0.2125)
    assert learning_rate_at(22, settings, ends) == pytest.approx(0.1)
    assert learning_rate_at(500, settings, ends) == pytest.approx(0.1)


def test_the_rate_of_a_step_does_not_depend_on_later_decisions() -> None:
    settings = config(learning_rate=1.0)
    all_ends = ((10, 30), (20, 40), (30, 35))
    for step in range(35):
        known = tuple(pair for pair in all_ends if pair[0] <= step)
        assert learning_rate_at(step, settings, known) == learning_rate_at(step, settings, all_ends)


def test_a_cool_down_may_begin_before_the_warm_up_is_over() -> None:
    settings = config(learning_rate=1.0, warmup_steps=100)
    assert learning_rate_at(10, settings, ((10, 20),)) == pytest.approx(0.11)
    assert learning_rate_at(15, settings, ((10, 20),)) == pytest.approx(0.055)


def test_a_timetable_is_read_as_it_was_written() -> None:
    timetable = Timetable(ends=((4, 10), (7, 9)), evaluations=(3, 9), eval_chars=64)
    assert Timetable.from_dict(timetable.to_dict(), path="f") == timetable
    assert Timetable.from_dict(Timetable().to_dict(), path="f") == Timetable()


@pytest.mark.parametrize(
    "values",
    [
        {"ends": [[4, 3]]},
        {"ends": [[4, 9], [4, 8]]},
        {"ends": [[4]]},
        {"ends": [4, 9]},
        {"ends": [[4, 9.5]]},
        {"ends": [[True, 9]]},
        {"ends": [[-1, 9]]},
        {"ends": {}},
        {"ends": None},
        {"evaluations": [3, 3]},
        {"evaluations": [0]},
        {"evaluations": ["3"]},
        {"evaluations": [[3]]},
        {"eval_chars": 0},
        {"eval_chars": "all"},
    ],
)
def test_what_is_no_timetable_is_refused(values: dict[str, object]) -> None:
    with pytest.raises(FileFormatError):
        Timetable.from_dict({**Timetable().to_dict(), **values}, path="state.json")


def test_a_wrong_timetable_cannot_be_made() -> None:
    for ends in (((4, 3),), ((1,),), 5, ((1, "2"),), [(1, 2)]):
        with pytest.raises(InputError, match="ends must be pairs"):
            Timetable(ends=ends)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="ends must be fixed at steps that increase"):
        Timetable(ends=((4, 9), (4, 8)))
    with pytest.raises(InputError, match="unscheduled must be steps"):
        Timetable(unscheduled=None)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="evaluations must be steps"):
        Timetable(evaluations=(2, 1))
    with pytest.raises(InputError, match="eval_chars must be at least 1"):
        Timetable(eval_chars=0)
    with pytest.raises(InputError, match="eval_chars must be at least 1"):
        Timetable(eval_chars="x")  # type: ignore[arg-type]
    assert Timetable().end is None
    assert not math.isnan(Timetable(ends=((1, 2),)).end or math.nan)
