"""`RunState`: what is written comes back, and what is no such state is refused."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from charlm import EvalResult
from charlm.errors import CharLMError, FileFormatError
from charlm.files import strict_json
from charlm.training.records import EvalRecord
from charlm.training.state import RunState

losses = st.floats(0, 1e6) | st.sampled_from([math.inf, math.nan])
counts = st.integers(0, 10**18)
results = st.builds(
    EvalResult, loss_nats=losses, accuracy=st.floats(0, 1), n_chars=st.integers(1, 10**9), n_left_out=counts
)
records = st.builds(EvalRecord, step=counts, result=results, is_best=st.booleans(), seconds=st.floats(0, 1e9))
states = st.builds(
    RunState,
    step=counts,
    chars_seen=counts,
    seconds=st.floats(0, 1e9),
    evaluations_since_best=counts,
    best=st.none() | records,
    last=st.none() | records,
)


def through_a_file(state: RunState) -> RunState:
    data = strict_json.dumps({"step": state.step, **state.to_dict()})
    return RunState.from_dict(strict_json.loads(data, path="state.json"), path="state.json")


@given(states)
def test_what_is_written_comes_back(state: RunState) -> None:
    assert repr(through_a_file(state)) == repr(state)  # a NaN is not equal to itself


@given(states)
def test_a_checkpoint_is_ranked_by_a_finite_loss_at_its_own_step(state: RunState) -> None:
    last = state.last
    if last is not None and last.step == state.step and math.isfinite(last.result.loss_nats):
        assert state.val_loss == last.result.loss_nats
    else:
        assert state.val_loss is None


def test_a_loss_of_this_step_is_its_rank_and_of_another_step_is_not() -> None:
    result = EvalResult(loss_nats=1.5, accuracy=0.5, n_chars=10)
    last = EvalRecord(step=4, result=result, is_best=True, seconds=0.1)
    assert RunState(step=4, last=last).val_loss == 1.5
    assert RunState(step=5, last=last).val_loss is None


def test_the_unit_of_an_evaluation_survives() -> None:
    result = EvalResult(loss_nats=1.5, accuracy=0.5, n_chars=10, unit="byte")
    state = RunState(step=4, best=EvalRecord(step=4, result=result, is_best=True, seconds=0.1))
    assert RunState.from_dict(state.to_dict(), path="state.json") == state


@pytest.mark.parametrize("name", ["step", "chars_seen", "seconds", "evaluations_since_best"])
@pytest.mark.parametrize("bad", [None, "1", True, [], {}])
def test_a_value_of_another_kind_is_refused_by_name(name: str, bad: object) -> None:
    values = {"step": 1, **RunState(step=1).to_dict(), name: bad}
    with pytest.raises(FileFormatError, match=name):
        RunState.from_dict(values, path="state.json")


@pytest.mark.parametrize("seconds", [-1.0, 1e13])
def test_a_time_that_cannot_be_is_refused(seconds: float) -> None:
    values = {"step": 1, **RunState().to_dict(), "seconds": seconds}
    with pytest.raises(FileFormatError, match="must hold a time in 'seconds'"):
        RunState.from_dict(values, path="state.json")


@pytest.mark.parametrize("missing", ["step", "accuracy", "n_chars", "is_best", "seconds"])
def test_an_evaluation_with_a_part_missing_is_refused(missing: str) -> None:
    result = EvalResult(loss_nats=1.5, accuracy=0.5, n_chars=10)
    state = RunState(best=EvalRecord(step=4, result=result, is_best=True, seconds=0.1))
    best = state.to_dict()["best"]
    assert isinstance(best, dict)
    del best[missing]
    with pytest.raises(CharLMError, match=missing):
        RunState.from_dict({"step": 1, **state.to_dict(), "best": best}, path="state.json")
