"""`Evaluations`: the evaluations of a run, and the weights of the best one for its end."""

from __future__ import annotations

import math

from torch import nn

from charlm.backends.base import DeviceBackend
from charlm.backends.world import World
from charlm.data.blocks import BlockDataset
from charlm.errors import DataError
from charlm.evaluation.evaluate import EvalResult, evaluate_together
from charlm.models.contents import Contents
from charlm.training.config import TrainerConfig
from charlm.training.records import EvalRecord
from charlm.training.state import RunState
from charlm.training.timetable import LONGEST_EVALUATION, Timekeeper
from charlm.training.timing import chars_within, evaluation_seconds

__all__ = ["Evaluations"]


class Evaluations:
    """The evaluations of a run: their losses, `patience`, and the weights of the best.

    Args:
        model: on the backend's device.
        data: the validation text; None: there are no evaluations.
        config: of the run; eval_chars, patience, restore_best and minutes are used.
        backend: the device.
        world: the processes that share an evaluation.

    Attributes:
        history: the evaluations of this process, in order.
        best_weights: those of the best evaluation, on the model's device; None: none are stored.
        best_in_model: whether the model holds the best weights; those of the last step are then stored here.
    """

    history: list[EvalRecord]
    best_weights: Contents | None
    best_in_model: bool

    def __init__(
        self,
        model: nn.Module,
        data: BlockDataset | None,
        config: TrainerConfig,
        backend: DeviceBackend,
        world: World,
    ) -> None:
        self._model, self._data, self._config, self._backend = model, data, config, backend
        self._world = world
        self.best_weights = None
        self._last_weights: Contents | None = None  # while the model holds the best
        self.best_in_model = False
        self.history = []

    def plan(self, state: RunState, keeper: Timekeeper) -> float:
        """Return the time of an evaluation, from the last one or a trial; 0 without a validation text.

        A run with minutes that has not evaluated yet chooses here how much of the text it evaluates.
        """
        chars = keeper.timetable.eval_chars
        if self._data is None:
            return 0.0
        if state.last is not None:
            return state.last.seconds
        if state.step > 0 or chars is not None:
            alone = evaluation_seconds(self._model, self._data, backend=self._backend, max_chars=chars)
            return alone / self._world.size
        longest = LONGEST_EVALUATION * 60 * (self._config.minutes or 0.0) * self._world.size
        chars, seconds = chars_within(longest, self._model, self._data, backend=self._backend)
        keeper.choose_eval_chars(chars)
        return seconds / self._world.size

    def score_together(self, max_chars: int | None) -> EvalResult:
        """Score the validation text, in all processes together.

        Raises:
            DataError: there is no validation text.
        """
        if self._data is None:
            raise DataError("there is nothing to evaluate: give the trainer val_data")
        return evaluate_together(
            self._world, self._model, self._data, backend=self._backend, max_chars=max_chars
        )

    def is_missing(self, state: RunState) -> bool:
        """Return whether the last step was not evaluated, for example after a stop between two steps."""
        return self._data is not None and (state.last is None or state.last.step != state.step)

    def add(self, state: RunState, result: EvalResult, *, seconds: float, counted: bool) -> EvalRecord:
        """Record an evaluation in the state, and store the weights if it is the best.

        Args:
            state: of the run; its step was just done.
            result: of the evaluation.
            seconds: its time.
            counted: whether it was due by the interval or the clock. Evaluations at stops do not count for
                `patience`.
        """
        lowest = math.inf if state.best is None else state.best.result.loss_nats
        is_best = result.loss_nats < lowest  # False for NaN and infinity
        if is_best and self._config.restore_best:  # first, so that an interrupt leaves the previous best
            self.best_weights = Contents.of(self._model)
        state.last = EvalRecord(state.step, result, is_best, seconds)
        self.history.append(state.last)
        if is_best:
            state.best, state.evaluations_since_best = state.last, 0
        elif counted:
            state.evaluations_since_best += 1
        return state.last

    def put_best_back(self, state: RunState) -> None:
        """Put the best weights into the model, unless they are those of the last step.

        After an interrupt at any place, `put_last_back` restores the last ones.
        """
        if self.best_weights is not None and state.best is not None and state.best.step != state.step:
            self._last_weights = Contents.of(self._model)
            self.best_in_model = True
            self.best_weights.put_into(self._model)

    def put_last_back(self) -> None:
        """Put the weights of the last step into the model, if it holds the best."""
        if self.best_in_model and self._last_weights is not None:
            self._last_weights.put_into(self._model)
            self.best_in_model, self._last_weights = False, None
