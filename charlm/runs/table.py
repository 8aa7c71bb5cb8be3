"""Several runs as one table: columns of one length, for numpy and pandas."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from charlm.runs.history import RunHistory

__all__ = ["history_table"]

_COLUMNS: Mapping[str, tuple[str, str]] = {
    "train_loss": ("steps", "loss_nats"),
    "val_loss": ("eval_steps", "eval_loss_nats"),
    "learning_rate": ("steps", "learning_rate"),
    "chars_per_second": ("steps", "chars_per_second"),
}


def history_table(histories: Sequence[RunHistory]) -> dict[str, NDArray[Any]]:
    """Return several runs as one table with a row for each logged or evaluated step of a run.

    Use it with pandas, `pandas.DataFrame(table)`, or with numpy, `table["val_loss"][table["run"] == "one"]`.

    Args:
        histories: of the runs, for example from `read_histories`.

    Returns:
        Columns of one length: `run` (its name), `step`, `train_loss` and `val_loss` in nats, `learning_rate`
        and `chars_per_second`, with NaN for missing values; and a column for each setting in which the runs
        differ, such as `training.seed`.

    Example:
        >>> import dataclasses
        >>> none = np.array([])
        >>> one = RunHistory(
        ...     name="one", steps=np.array([10, 20]), loss_nats=np.array([3.0, 2.0]),
        ...     learning_rate=np.array([0.1, 0.1]), chars_per_second=np.array([9.0, 9.0]),
        ...     eval_steps=np.array([20]), eval_loss_nats=np.array([2.5]), skipped_steps=none,
        ...     settings={"training.seed": 1},
        ... )
        >>> two = dataclasses.replace(one, name="two", settings={"training.seed": 2})
        >>> table = history_table([one, two])
        >>> table["run"].tolist(), table["training.seed"].tolist(), table["val_loss"].tolist()
        (['one', 'one', 'two', 'two'], [1, 1, 2, 2], [nan, 2.5, nan, 2.5])
    """
    columns: dict[str, list[Any]] = {name: [] for name in ("run", "step", *_COLUMNS)}
    names = dict.fromkeys(name for history in histories for name in history.settings)
    differing = [
        name
        for name in names
        if any(h.settings.get(name) != histories[0].settings.get(name) for h in histories)
    ]
    columns |= {name: [] for name in differing}
    for history in histories:
        steps = np.union1d(history.steps, history.eval_steps).astype(np.int64)
        columns["run"] += [history.name] * len(steps)
        columns["step"] += steps.tolist()
        for column, (at, values) in _COLUMNS.items():
            cells = np.full(len(steps), np.nan)
            cells[np.searchsorted(steps, getattr(history, at))] = getattr(history, values)
            columns[column] += cells.tolist()
        for name in differing:
            columns[name] += [history.settings.get(name)] * len(steps)
    return {name: _column(values) for name, values in columns.items()}


def _column(values: Sequence[Any]) -> NDArray[Any]:
    """Return values as an array of their common type, or else of objects."""
    plain = all(isinstance(value, bool | int | float | str) for value in values)
    mixed = len({type(value) for value in values}) > 1
    if plain and not mixed:
        return np.array(values)
    column = np.empty(len(values), object)
    column[:] = values
    return column
