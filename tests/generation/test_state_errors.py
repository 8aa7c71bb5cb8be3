"""What prediction states say to ids, rows and options that are wrong, and that they are whole after it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from harness.states import ROWS, STATES, state_of
from harness.tiny_models import MODELS, prompt
from torch import Tensor

from charlm import CharLM, CharTokenizer
from charlm.errors import InputError, NonFiniteError, UnknownCharacterError
from charlm.generation import SamplingOptions, next_ids
from charlm.models.base import LanguageModel

GREEDY = SamplingOptions(temperature=0)


@pytest.fixture(params=STATES)
def model(request: pytest.FixtureRequest) -> LanguageModel:
    return STATES[request.param]()


BAD_IDS: dict[str, tuple[Any, str]] = {
    "nothing": (None, "ids must be int64 of shape"),
    "a number": (5, "ids must be int64 of shape"),
    "text": ("ab", "ids must be int64 of shape"),
    "an array": (np.zeros((2, 3), np.int64), "ids must be int64 of shape"),
    "lists": ([[1], [2]], "ids must be int64 of shape"),
    "an iterator": (iter([torch.tensor([1])] * 2), "ids must be int64 of shape"),
    "one dimension too many ids": (torch.tensor([1, 2, 3]), "ids must be int64 of shape"),
    "no dimension": (torch.tensor(1), "ids must be int64 of shape"),
    "three dimensions": (torch.zeros(2, 1, 1, dtype=torch.int64), "ids must be int64 of shape"),
    "rows of two dimensions": ([torch.zeros(1, 1, dtype=torch.int64)] * 2, "ids must be int64 of shape"),
    "int32": (torch.zeros(2, 3, dtype=torch.int32), "ids must be int64 of shape"),
    "float": ([torch.zeros(3), torch.zeros(3)], "ids must be int64 of shape"),
    "one row too few": (torch.zeros(1, 3, dtype=torch.int64), r"B = 2; got "),
    "one row too many": ([torch.tensor([1])] * 3, r"B = 2; got "),
    "no rows": (torch.zeros(0, 3, dtype=torch.int64), r"B = 2; got "),
    "another device": (torch.zeros(2, 3, dtype=torch.int64, device="meta"), "model's device cpu, got meta"),
    "too large": (torch.tensor([[1, 2], [3, 13]]), r"from 0 to 12 \(vocab_size 13\), got 13 in row 1"),
    "far too large": (torch.tensor([[2**62, 2], [3, 1]]), "got 4611686018427387904 in row 0"),
    "negative": ([torch.tensor([3]), torch.tensor([4, -1, 5])], "got -1 in row 1"),
    "most negative": ([torch.tensor([-(2**63)]), torch.tensor([4])], "got -9223372036854775808 in row 0"),
}  # fmt: skip


BAD_GUESSES: tuple[tuple[Any, str], ...] = (
    (torch.tensor([3, 13]), r"from 0 to 12 \(vocab_size 13\), got 13"),
    (torch.tensor([-1]), "got -1"),
    (torch.tensor([10**9]), "got 1000000000"),
    (torch.tensor([[1]]), "ids must be int64 of shape"),
    (torch.tensor([1.0]), "ids must be int64 of shape"),
    ([1], "ids must be int64 of shape"),
    (torch.tensor([1], device="meta"), "got meta"),
)


def test_bad_ids_are_refused_and_leave_the_state_as_it_was(model: LanguageModel) -> None:
    state = state_of(model, [[1, 2, 3], [4]])
    before = state.predict()
    for what, (ids, message) in BAD_IDS.items():
        for call in (state.observe, state.score):
            with pytest.raises(InputError, match=message):
                call(ids)
        assert state.lengths == [3, 1], what
        assert torch.equal(state.predict(), before), what


def test_bad_guesses_are_refused_and_leave_the_state_as_it_was(model: LanguageModel) -> None:
    state = state_of(model, [[1, 2, 3]])
    before = state.predict()
    for guesses, message in BAD_GUESSES:
        with pytest.raises(InputError, match=message):
            state.verify(guesses)
        assert state.lengths == [3], message
        assert torch.equal(state.predict(), before), message
    with pytest.raises(InputError, match="B = 2"):
        state.fork([0, 0]).verify(torch.tensor([1]))
    with pytest.raises(InputError, match="observe at least one id before"):
        model.new_state().verify(torch.tensor([1]))


def test_what_a_state_is_made_with_is_checked(model: LanguageModel) -> None:
    rows: Any
    for rows in (0, -1, True, 1.0, "2", None):
        with pytest.raises(InputError, match="rows must be an int, 1 or more, got "):
            model.new_state(rows)
    use_cache: Any
    for use_cache in (1, None, "yes"):
        with pytest.raises(InputError, match="use_cache must be True or False, got "):
            model.new_state(use_cache=use_cache)
    overflow: Any
    for overflow in ("crop", "", None, 1, ["slide"]):
        with pytest.raises(InputError, match="overflow must be 'slide' or 'restart', got "):
            model.new_state(overflow=overflow)
        with pytest.raises(InputError, match="overflow must be 'slide' or 'restart', got "):
            model.log_probs(prompt(1, 3), overflow=overflow)


def test_rows_that_are_not_there_cannot_be_forked(model: LanguageModel) -> None:
    state = state_of(model, [[1, 2, 3], [4]])
    rows: Any
    for rows in ([], [2], [0, 2], [-1], [0.0], ["a"], [None], [True, False]):
        with pytest.raises(InputError, match="rows must be one or more of 0 to 1, got "):
            state.fork(rows)


def test_before_the_first_observation_nothing_is_predicted(model: LanguageModel) -> None:
    state = model.new_state(2)
    for ids in ([], [torch.tensor([1]), torch.tensor([], dtype=torch.int64)]):
        if ids:
            state.observe(ids)
        for call in (
            state.predict,
            lambda: state.score(torch.zeros(2, 1, dtype=torch.int64)),
            lambda: next_ids(state, GREEDY, [0, 1]),
            lambda: next_ids(state, SamplingOptions(seed=0, filters=[lambda z, _: z]), [0, 1]),
        ):
            with pytest.raises(InputError, match="observe at least one id before the first prediction"):
                call()
    state.observe([torch.tensor([], dtype=torch.int64), torch.tensor([1])])
    assert state.predict().shape == (2, 13)


def test_what_is_wrong_is_said_before_anything_is_scored() -> None:
    lm = CharLM(MODELS["lecture"](torch.float32), CharTokenizer("\nabcdefghijkl"))
    bad: dict[str, Any] = {"": "text must be", "X": "X"}
    for text, message in bad.items():
        with pytest.raises((InputError, UnknownCharacterError), match=message):
            lm.log_probs(text)
    with pytest.raises(UnknownCharacterError, match="X"):
        lm.log_probs("a", prompt="X")
    with pytest.raises(InputError, match="prompt must be a str"):
        lm.log_probs("a", prompt=None)  # type: ignore[arg-type]  # the wrong type is the point
    with pytest.raises(InputError, match="text must be a str of at least one character, got 5"):
        lm.log_probs(5)  # type: ignore[arg-type]  # the wrong type is the point
    with pytest.raises(InputError, match="overflow must be"):
        lm.log_probs("a", overflow="crop")  # type: ignore[arg-type]  # the wrong value is the point
    for idx, message in (
        (torch.zeros(1, 0, dtype=torch.int64), "at least one row and one id"),
        (torch.tensor([[13]]), "got 13 at row 0, column 0"),
        (torch.zeros(1, 3, dtype=torch.int64, device="meta"), "on the model's device cpu, got meta"),
    ):
        with pytest.raises(InputError, match=message):
            lm.model.log_probs(idx)
    assert lm.model.log_probs(torch.tensor([[1], [2]])).shape == (2, 0)


@pytest.mark.parametrize("failure", ["addresses", "no character", "filter"])
def test_after_an_error_a_state_goes_on_as_if_it_had_not_been_asked(
    model: LanguageModel, failure: str
) -> None:
    def ban_all(logits: Tensor, _ids: Tensor) -> Tensor:
        return torch.full_like(logits, -torch.inf)

    def broken(_logits: Tensor, _ids: Tensor) -> Tensor:
        raise RuntimeError("a mistake of the caller's")

    options = SamplingOptions(seed=3)
    state = state_of(model, ROWS, overflow="restart")
    for _ in range(2):
        next_ids(state, options, range(3))
    twin = state.fork()
    if failure == "addresses":
        with pytest.raises(ValueError, match="zip"):
            next_ids(state, options, range(2))
    elif failure == "no character":
        with pytest.raises(NonFiniteError):
            next_ids(state, SamplingOptions(seed=3, filters=[ban_all]), range(3))
    else:
        with pytest.raises(RuntimeError, match="a mistake of the caller's"):
            next_ids(state, SamplingOptions(seed=3, filters=[broken]), range(3))
    assert state.lengths == twin.lengths
    for _ in range(9):
        assert torch.equal(next_ids(state, options, range(3)), next_ids(twin, options, range(3)))
    assert torch.equal(state.predict(), twin.predict())
