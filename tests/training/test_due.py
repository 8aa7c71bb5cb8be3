"""What is due after a step, at exact points, and against the rules written out once more."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from charlm import TrainerConfig
from charlm.training.due import Due, due_after

CONFIG = TrainerConfig(log_interval=10, sample_interval=30, save_interval=25)


@pytest.mark.parametrize(
    ("step", "scheduled", "ending", "expected"),
    [
        (1, False, False, ""),
        (9, False, False, ""),
        (10, False, False, "log"),
        (25, False, False, "save"),
        (30, False, False, "log sample"),
        (50, False, False, "log save"),
        (150, False, False, "log sample save"),
        (7, True, False, "evaluate"),
        (25, True, False, "evaluate save"),
        (7, False, True, "log evaluate save"),
        (30, True, True, "log sample evaluate save"),
    ],
)
def test_at_exact_points(step: int, scheduled: bool, ending: bool, expected: str) -> None:
    due = due_after(step, CONFIG, scheduled=scheduled, ending=ending)
    wanted = expected.split()
    assert due == Due(
        log="log" in wanted,
        sample="sample" in wanted,
        evaluate="evaluate" in wanted,
        save="save" in wanted,
    )


def test_without_an_interval_a_checkpoint_comes_with_every_evaluation_and_no_samples_do() -> None:
    config = TrainerConfig(log_interval=10)
    assert not due_after(250, config, scheduled=False, ending=False).save
    assert due_after(250, config, scheduled=True, ending=False).save
    assert not any(due_after(step, config, scheduled=True, ending=True).sample for step in range(1, 500))


@given(
    st.integers(1, 400),
    st.integers(1, 40),
    st.none() | st.integers(1, 40),
    st.none() | st.integers(1, 40),
    st.booleans(),
    st.booleans(),
)
def test_an_interval_decides_for_its_own_part_alone(
    step: int, log: int, sample: int | None, save: int | None, scheduled: bool, ending: bool
) -> None:
    config = TrainerConfig(log_interval=log, sample_interval=sample, save_interval=save)
    due = due_after(step, config, scheduled=scheduled, ending=ending)
    multiples = {n: step in range(n, 401, n) for n in (log, sample, save) if n is not None}
    assert due.log == (multiples[log] or ending)
    assert due.sample == (sample is not None and multiples[sample])
    assert due.evaluate == (scheduled or ending)
    assert due.save == (ending or (scheduled if save is None else multiples[save]))
