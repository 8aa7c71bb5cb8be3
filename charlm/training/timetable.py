"""The decisions of the clock in a run with minutes: cool-down, end, evaluations; recorded and repeatable.

The flat part of the schedule does not depend on the end. So the end is fixed as late as possible, when the
cool-down must begin, and corrected a few times while the learning rate falls. A `Timetable` records these
decisions as numbers of steps; with it, a repetition gives the same bits on a machine of any speed. A decay
from any point of a flat learning rate is described in arXiv:2405.18392. No torch here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from charlm.errors import FileFormatError, InputError, quoted, shown
from charlm.files.strict_json import take
from charlm.plain import as_int
from charlm.training.config import TrainerConfig

__all__ = [
    "EVALUATION_SHARE",
    "LONGEST_EVALUATION",
    "Timekeeper",
    "Timetable",
    "evaluation_interval_seconds",
    "planned_end",
]

EVALUATION_SHARE = 0.1
"""Largest share of a run's time for its evaluations, with the checkpoints after them."""

LONGEST_EVALUATION = 0.4 * EVALUATION_SHARE
"""Largest share of a run's time for one evaluation; of a longer text, only a part is scored."""

_FIFTH, _MOST_SECONDS = 0.2, 120.0  # between evaluations: a share of the time, and the most seconds
_MEMORY, _STEPS = 0.03, 4  # the speed is averaged over this share of the time, and at least so many steps
_EARLY = 1.25  # times the config's cool-down: before the end is fixed, too early costs less than too late
_SMALL = 0.02  # a change of the end by less than this share of all steps is not corrected
_FAR = 0.3  # a change by more than this share of the remaining steps is corrected at once
_LAST = 0.02  # the steps up to a fixed end may exceed the time by this share of it


@dataclass(frozen=True, kw_only=True)
class Timetable:
    """The decisions of the clock in a run, as numbers of steps.

    Raises:
        InputError: the numbers are not possible.

    Example:
        >>> timetable = Timetable(ends=((400, 1_000), (700, 900)), evaluations=(300, 600, 900))
        >>> timetable.end
        900
    """

    ends: tuple[tuple[int, int], ...] = ()
    """Pairs of the step after which an end was fixed, and the end: first at the beginning of the cool-down,
    then at each correction. Empty: no end is fixed yet."""
    evaluations: tuple[int, ...] = ()
    """The steps after which the validation text was scored."""
    unscheduled: tuple[int, ...] = ()
    """Those evaluations that came with a stop; `patience` does not count them."""
    eval_chars: int | None = None
    """The most characters of the validation text that each evaluation scored, see `evaluate`; None: all."""

    def __post_init__(self) -> None:
        for name in ("evaluations", "unscheduled"):
            steps = _row(getattr(self, name))
            if steps is None or list(steps) != sorted(set(steps)) or min(steps, default=1) < 1:
                given = shown(getattr(self, name))
                raise InputError(f"{name} must be steps from 1 on that increase, got {given}")
            object.__setattr__(self, name, steps)
        pairs = [_row(pair) for pair in self.ends] if isinstance(self.ends, tuple) else [None]
        ends = tuple(
            (pair[0], pair[1]) for pair in pairs if pair and len(pair) == 2 and 0 <= pair[0] <= pair[1]
        )
        if len(ends) < len(pairs):
            raise InputError(f"ends must be pairs of a step and an end from there on, got {shown(self.ends)}")
        at = [step for step, _ in ends]
        if at != sorted(set(at)):
            raise InputError(f"ends must be fixed at steps that increase, got {shown(at)}")
        object.__setattr__(self, "ends", ends)
        most = as_int(self.eval_chars)
        if self.eval_chars is not None and (most is None or most < 1):
            raise InputError(f"eval_chars must be at least 1 or None, got {shown(self.eval_chars)}")
        object.__setattr__(self, "eval_chars", most)

    @property
    def end(self) -> int | None:
        """The last step; None: it is not fixed yet."""
        return self.ends[-1][1] if self.ends else None

    def to_dict(self) -> dict[str, object]:
        """Return the fields as values of JSON."""
        return {
            "ends": [list(pair) for pair in self.ends],
            "evaluations": list(self.evaluations),
            "unscheduled": list(self.unscheduled),
            "eval_chars": self.eval_chars,
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, object], *, path: str) -> Timetable:
        """Make a timetable from the values of `to_dict`.

        Raises:
            FileFormatError: the file `path` holds something else.
        """
        ends, evaluations, unscheduled = (
            take(values, name, list, path=path) for name in ("ends", "evaluations", "unscheduled")
        )
        eval_chars = None if values.get("eval_chars") is None else take(values, "eval_chars", int, path=path)
        pairs = tuple(tuple(pair) if isinstance(pair, list) else pair for pair in ends)
        try:
            return cls(
                ends=pairs,
                evaluations=tuple(evaluations),
                unscheduled=tuple(unscheduled),
                eval_chars=eval_chars,
            )
        except InputError as error:
            raise FileFormatError(f"{quoted(path)} holds no timetable: {error}") from error


def _row(value: object) -> tuple[int, ...] | None:
    """Return a tuple of Python's integers, or None if the value is something else."""
    parts = [as_int(part) for part in value] if isinstance(value, tuple) else [None]
    row = tuple(part for part in parts if part is not None)
    return row if len(row) == len(parts) else None


def evaluation_interval_seconds(seconds: float) -> float:
    """Return the time between evaluations in a run with minutes and without an interval in steps."""
    return min(_FIFTH * seconds, _MOST_SECONDS)


def planned_end(config: TrainerConfig) -> bool:
    """Return whether the schedule ends at `max_steps`, so that the clock does not move it."""
    return config.minutes is None or config.schedule in {"cosine", "linear"}


class Timekeeper:
    """Decides for one run which steps are evaluated and which is the last one.

    The caller gives the time; no clock is read here. Without `minutes`, the config decides everything; in a
    repetition, the given timetable does.

    Args:
        config: the settings of the run.
        repeat: the timetable of a run that is repeated.

    Attributes:
        timetable: the decisions so far; in a repetition, all of them.
        repeats: whether this is a repetition.
    """

    timetable: Timetable
    repeats: bool

    def __init__(self, config: TrainerConfig, repeat: Timetable | None = None) -> None:
        self._config = config
        self._seconds = None if config.minutes is None or repeat is not None else 60.0 * config.minutes
        self.repeats = repeat is not None
        self.timetable = Timetable(eval_chars=config.eval_chars) if repeat is None else repeat
        self._now = 0.0  # seconds of the run so far
        self._timed_from = 0.0  # begin of the current step
        self._timed = 0  # number of timed steps in this process
        self._weight = self._weighted = 0.0  # weighted number of steps and of seconds; older steps weigh less
        self._evaluation_seconds = 0.0  # of the last evaluation, with its checkpoint
        self._step_seconds_then = 0.0  # of a step at that time; 0: unknown
        self._evaluating_seconds = 0.0  # of all evaluations so far
        self._evaluated_at = 0.0
        self._correct_at = 0  # the step after which the end is checked again

    @property
    def learning_rate_ends(self) -> tuple[tuple[int, int], ...] | None:
        """Argument `ends` of `learning_rate_at`."""
        return None if planned_end(self._config) else self.timetable.ends

    @property
    def end(self) -> int:
        """The last step of the run as fixed so far."""
        end = self.timetable.end
        return self._config.max_steps if end is None else min(end, self._config.max_steps)

    def to_dict(self) -> dict[str, object]:
        """Return the values for a checkpoint."""
        return {**self.timetable.to_dict(), "repeats": self.repeats}

    def choose_eval_chars(self, chars: int | None) -> None:
        """Record how many characters each evaluation scores; None: all."""
        self.timetable = replace(self.timetable, eval_chars=chars)

    def start(self, step: int, now: float, evaluation_seconds: float) -> None:
        """Begin to measure, also after a resume.

        Args:
            step: number of steps done.
            now: seconds of the run so far.
            evaluation_seconds: time of an evaluation; 0: there are none.
        """
        self._now = self._evaluated_at = now
        self._timed_from, self._timed, self._weight, self._weighted = now, 0, 0.0, 0.0
        self._evaluation_seconds, self._step_seconds_then = evaluation_seconds, 0.0
        self._evaluating_seconds = evaluation_seconds * len(self.timetable.evaluations)
        if self.timetable.end is not None:
            self._correct_at = step + max(1, (self.timetable.end - step) // 2)

    def expected_steps(self, step: int) -> int | None:
        """Return the expected number of steps of the run after `step` steps; None: unknown."""
        if self._seconds is None:
            return self.end
        if self._timed < 2:
            return self.timetable.end
        left = self._seconds - self._now - self._reserved_seconds(self._seconds)
        return min(step + max(0, round(left / self._step_seconds)), self._config.max_steps)

    def after_step(self, step: int, now: float) -> bool:
        """Take the time after a step, fix or correct the end if that is due, and return if it is reached.

        Args:
            step: number of steps done.
            now: seconds of the run so far.
        """
        elapsed = now - self._timed_from
        self._now = self._timed_from = now
        if self._seconds is not None:
            if elapsed > 0:
                self._time_step(elapsed, self._seconds)
            self._decide(step, self._seconds)
        return step >= self.end

    def is_evaluation_due(self, step: int) -> bool:
        """Return whether an evaluation is due after a step."""
        interval = self._config.eval_interval
        if self.repeats:
            return step in self.timetable.evaluations
        if self._seconds is None:
            return interval is not None and step % interval == 0
        each = self._next_evaluation_seconds
        spent, share = self._evaluating_seconds + each, EVALUATION_SHARE
        if spent > share * self._now or spent + each > share * self._seconds:  # leaves room for the last one
            return False
        if interval is not None:
            return step % interval == 0
        every = evaluation_interval_seconds(self._seconds)
        return self._now < self._seconds and self._now // every > self._evaluated_at // every

    def is_counted(self, step: int) -> bool:
        """Return whether `patience` counts the evaluation after a step."""
        return step not in self.timetable.unscheduled

    def record_evaluation(self, step: int, *, scheduled: bool) -> None:
        """Record that the validation text is scored after a step."""
        old = self.timetable
        if self._seconds is not None and step > 0 and step not in old.evaluations:
            unscheduled = old.unscheduled if scheduled else (*old.unscheduled, step)
            self.timetable = replace(old, evaluations=(*old.evaluations, step), unscheduled=unscheduled)

    def after_pause(self, now: float, *, evaluated: bool) -> None:
        """Take the time after the actions between two steps.

        Args:
            now: seconds of the run so far.
            evaluated: whether the validation text was scored; all other actions count as part of the step.
        """
        if evaluated:
            self._evaluation_seconds, self._step_seconds_then = now - self._now, self._step_seconds
            self._evaluating_seconds += self._evaluation_seconds
            self._evaluated_at = self._timed_from = now
        self._now = now

    @property
    def _step_seconds(self) -> float:
        """Present time of a step; 0: none was timed."""
        return self._weighted / self._weight if self._weight else 0.0

    @property
    def _next_evaluation_seconds(self) -> float:
        """Expected time of the next evaluation: that of the last one, scaled by the time of steps since.

        It is at most twice the time of the last one, since the speed may have changed during that one.
        """
        if self._timed < 2 or not self._step_seconds_then:
            return self._evaluation_seconds
        return self._evaluation_seconds * min(self._step_seconds / self._step_seconds_then, 2.0)

    def _time_step(self, elapsed: float, seconds: float) -> None:
        # The first step of a process is the slowest, so the second one replaces it.
        kept = max(1.0 - 1 / _STEPS, 1.0 - elapsed / (_MEMORY * seconds)) if self._timed > 1 else 0.0
        self._weight, self._weighted = kept * self._weight + 1, kept * self._weighted + elapsed
        self._timed += 1
        if self._timed <= 2 or not self._step_seconds_then:
            self._step_seconds_then = self._step_seconds

    def _reserved_seconds(self, seconds: float) -> float:
        """Return the time of all evaluations to come, the last one included."""
        each = self._next_evaluation_seconds
        if self._config.eval_interval is None:
            every = evaluation_interval_seconds(seconds)
            scheduled = (seconds - each) // every - self._now // every
        else:
            scheduled = (seconds - self._now) // (self._step_seconds * self._config.eval_interval)
        share = EVALUATION_SHARE * seconds - self._evaluating_seconds
        return max(each, min(share, (1 + max(scheduled, 0)) * each))

    def _decide(self, step: int, seconds: float) -> None:
        config = self._config
        late = seconds * (1 + (_LAST if self.timetable.ends else 0))
        half_a_step = self._step_seconds / 2 if self._timed > 1 else 0.0
        if self._now + self._next_evaluation_seconds + half_a_step >= late:
            if step < self.end:
                self._fix(step, step)  # time is up
            return
        if planned_end(config) or config.schedule == "constant" or self._timed < 2:
            return
        expected = min(max(step + 1, self.expected_steps(step) or 0), config.max_steps)
        if not self.timetable.ends:
            if step >= self._start_of_cooldown(expected):
                self._fix(step, expected)
        elif step < self.end:
            off = abs(expected - self.end)
            due = step >= self._correct_at or off > _FAR * (self.end - step)
            if due and off > _SMALL * self.end:
                self._fix(step, expected)
            elif step >= self._correct_at:
                self._correct_at = step + max(1, (self.end - step) // 2)

    def _start_of_cooldown(self, end: int) -> int:
        config = self._config
        if end < config.max_steps:
            return end - round(min(_EARLY * config.cooldown, 1.0) * end)
        # The end is max_steps: the run is the same as without a clock.
        return max(end - round(config.cooldown * end), min(config.warmup_steps, end // 2))

    def _fix(self, step: int, end: int) -> None:
        ends = tuple(pair for pair in self.timetable.ends if pair[0] < step)
        self.timetable = replace(self.timetable, ends=(*ends, (step, end)))
        self._correct_at = step + max(1, (end - step) // 2)
