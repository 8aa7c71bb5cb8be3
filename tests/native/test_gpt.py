"""The fast path of generation, held against the readable one, and against itself in other arrangements.

Within the tolerance of float32 it says what `TorchEngine` says. Beyond that, to the last bit: a row's numbers
are the same whatever stands beside it, however its text arrives, and however many threads take part.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from typing import Any, cast

import pytest
import torch
from harness.drawn_models import block_sizes, gpts, needs_kernel, overflows, ragged, random_rows
from harness.states import keys_and_values_in_bfloat16, torch_state
from harness.tiny_models import VARIANTS, tiny_config, tiny_gpt
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles.plain_state import plain_logits
from torch import Tensor

from charlm.errors import InputError, NonFiniteError
from charlm.generation import Overflow, PredictionState, SamplingOptions, next_ids, stream_ids
from charlm.generation.decode import some_turns
from charlm.models.gpt import GPT
from charlm.native import gpt
from charlm.native.gpt import NativeGPT
from charlm.native.storage import STORAGES, Storage, round_weights

pytestmark = needs_kernel

VOCAB_SIZES = (1, 2, 13, 16, 17, 64, 65, 130)
HALF = torch.bfloat16
KINDS = ("float32", "of type bfloat16", "bfloat16", "int8")


def drawn(kind: str, windows: st.SearchStrategy[int]) -> st.SearchStrategy[GPT]:
    """Draw a model whose weights are of a kind: of a type, or in float32 on a grid."""
    if kind == "of type bfloat16":
        return gpts(HALF, windows, VOCAB_SIZES)
    return gpts(torch.float32, windows, VOCAB_SIZES, cast("Storage", kind))


def rounding(logits: Tensor) -> float:
    """Return what rounding keys and values to 8 bits may come to."""
    size = max([1.0, *logits.abs().flatten().tolist()])
    return 0.05 * float(size)


def assert_near(ours: Tensor, theirs: Tensor, kind: str) -> None:
    """Hold logits against PyTorch's.

    Where keys and values are rounded, here and there one falls to the other side, and so do those above it.
    """
    rtol, atol = (1e-5, 1e-4) if kind == "float32" else (0, rounding(theirs))
    torch.testing.assert_close(ours, theirs, rtol=rtol, atol=atol)


def fast(model: GPT, rows: Sequence[Tensor], overflow: Overflow = "slide") -> PredictionState:
    state = model.new_state(len(rows), overflow=overflow)
    assert type(state.engine) is NativeGPT
    state.observe(rows)
    return state


def plain(model: GPT, rows: Sequence[Tensor], overflow: Overflow = "slide") -> PredictionState:
    state = torch_state(model, len(rows), overflow=overflow)
    state.observe(rows)
    return state


@contextlib.contextmanager
def threads(number: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@pytest.fixture
def worth_a_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the smallest model use as many threads as torch may."""
    monkeypatch.setattr("charlm.native.gpt._WORTH_A_THREAD", 1)


def tensors(rows: Sequence[Sequence[int]]) -> list[Tensor]:
    return [torch.tensor(row, dtype=torch.int64) for row in rows]


@pytest.mark.parametrize("dtype", [torch.float32, HALF], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("name", VARIANTS)
def test_every_switch_gives_what_the_readable_path_gives(name: str, dtype: torch.dtype) -> None:
    model = tiny_gpt(VARIANTS[name], dtype=dtype)
    rows = random_rows([1, 5, 16, 40])
    got = fast(model, rows).predict()
    assert got.dtype == torch.float32
    # Weights in bfloat16 are widened, so the result is that of the same weights in float32.
    with nullcontext() if dtype == torch.float32 else keys_and_values_in_bfloat16():
        theirs = plain(model.float(), rows).predict()
    assert_near(got, theirs, "float32" if dtype == torch.float32 else "bfloat16")


@settings(deadline=None)
@given(
    kind=st.sampled_from(KINDS),
    overflow=overflows,
    steps=st.lists(st.integers(0, 5), min_size=1, max_size=6),
    data=st.data(),
)
def test_any_model_predicts_scores_and_chooses_as_on_the_readable_path(
    kind: str, overflow: Overflow, steps: list[int], data: st.DataObject
) -> None:
    """Ids are given, so that one rounding does not lead the two apart; then each chooses for itself."""
    model = data.draw(drawn(kind, block_sizes))
    V = model.vocab_size
    rows = data.draw(ragged(30, V))
    states: list[PredictionState] = [fast(model, tensors(rows), overflow)]
    wide = GPT(model.config)
    wide.load_state_dict(model.state_dict())
    states.append(plain(wide, tensors(rows), overflow))
    with nullcontext() if kind == "float32" else keys_and_values_in_bfloat16():
        same_predictions(states, kind, steps, V)


def same_predictions(states: list[PredictionState], kind: str, steps: list[int], V: int) -> None:
    for step, count in enumerate(steps):
        ours, theirs = (state.predict() for state in states)
        assert_near(ours, theirs, kind)
        best = theirs.topk(min(V, 2), dim=-1).values
        clear = best[:, 0] - best[:, -1] > (2e-4 if kind == "float32" else 2 * rounding(theirs))
        greedy = SamplingOptions(temperature=0)
        chosen = [next_ids(state.fork(), greedy) for state in states]
        assert torch.equal(chosen[0][clear], chosen[1][clear])
        new = random_rows([count] * states[0].rows, V, seed=step)
        if step % 2:
            for state in states:
                state.observe(new)
        else:
            for mine, other in zip(*(state.score(new) for state in states), strict=True):
                assert_near(mine, other, kind)


@settings(deadline=None)
@given(
    kind=st.sampled_from(KINDS),
    overflow=overflows,
    window=st.sampled_from([1, 2, 3, 7, 16, 20, 63, 64, 65, 127, 128, 129, 140]),
    lengths=st.lists(st.integers(1, 150), min_size=1, max_size=20),
    at_once=st.integers(1, 3),
    data=st.data(),
)
@pytest.mark.usefixtures("worth_a_thread")
def test_a_row_is_the_same_to_the_last_bit_in_any_batch_in_any_pieces_with_any_threads(
    kind: str, overflow: Overflow, window: int, lengths: list[int], at_once: int, data: st.DataObject
) -> None:
    model = data.draw(drawn(kind, st.just(window)))
    rows = random_rows(lengths, model.vocab_size, seed=len(lengths))
    together = fast(model, rows, overflow)
    with threads(at_once):
        predicted = together.predict()
    row = data.draw(st.integers(0, len(rows) - 1))
    alone = fast(model, rows[row : row + 1], overflow)
    assert torch.equal(alone.predict()[0], predicted[row])
    # The text in pieces: what is predicted on the way must not matter, nor what other rows do meanwhile.
    neighbours = data.draw(st.integers(0, 5))
    pieces = fast(model, [ids[:1] for ids in (rows[row], *rows[:neighbours])], overflow)
    ids = rows[row][1:]
    with threads(data.draw(st.integers(1, 3))):
        while len(ids):
            count = data.draw(st.integers(1, max(len(ids) // 2, 1)))
            if data.draw(st.booleans()):
                pieces.predict()
            pieces.observe([ids[:count], *(other[1 : 1 + count] for other in rows[:neighbours])])
            ids = ids[count:]
        assert torch.equal(pieces.predict()[0], predicted[row])
    # Chosen one by one, they are what they are when they are given.
    options = SamplingOptions(seed=1)
    with threads(at_once):
        chosen = [next_ids(together, options, range(len(rows))) for _ in range(3)]
        after = together.predict()
    whole = torch.cat([rows[row], torch.stack(chosen)[:, row]])
    assert torch.equal(together.text(row), whole)
    assert torch.equal(fast(model, [whole], overflow).predict()[0], after[row])
    scores = alone.score(torch.stack(chosen)[:, row][None])[0]
    singly = fast(model, rows[row : row + 1], overflow)
    for score, ids_ in zip(scores, chosen, strict=True):
        wanted = singly.predict()[0].double().log_softmax(dim=-1)[ids_[row]]
        assert score == wanted
        singly.observe(ids_[row : row + 1][None])


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("rows", range(1, 21))
@pytest.mark.usefixtures("worth_a_thread")
def test_every_number_of_rows_is_computed_as_one_row_is(rows: int, storage: Storage) -> None:
    """Rows are taken by six, four, three, two and one: each must give the same bits."""
    model = tiny_gpt(tiny_config("cpu-1min", block_size=30, n_embd=40, n_head=2, vocab_size=70))
    round_weights(model, storage)
    texts = random_rows([7] * rows, 70)
    with threads(1 + rows % 3):
        state = fast(model, texts)
        options = SamplingOptions(seed=3)
        chosen = torch.stack([next_ids(state, options, range(rows)) for _ in range(5)])
        predicted = state.predict()
    for row in range(rows):
        alone = fast(model, texts[row : row + 1])
        assert [int(next_ids(alone, options, [row])) for _ in range(5)] == chosen[:, row].tolist()
        assert torch.equal(alone.predict()[0], predicted[row])


@pytest.mark.parametrize("overflow", ["slide", "restart"])
@pytest.mark.parametrize("window", [1_024, 1_500, 2_600])
@pytest.mark.usefixtures("worth_a_thread")
def test_more_ids_than_one_pass_reads_are_read_in_several(window: int, overflow: Overflow) -> None:
    model = tiny_gpt(tiny_config("cpu-1min", n_embd=10, n_head=1, n_layer=2, block_size=window))
    rows = random_rows([2_500, 30, 1_025, 1_024, 2])
    with threads(2):
        together = fast(model, rows, overflow).predict()
    for row, wanted in zip(rows, together, strict=True):
        state = fast(model, [row[:-1]], overflow)
        state.predict()
        state.observe(row[-1:][None])
        assert torch.equal(state.predict()[0], wanted)
        torch.testing.assert_close(plain_logits(model, row.tolist(), overflow), wanted, rtol=0, atol=1e-4)
    forked = fast(model, rows, overflow).fork([4, 2, 0]).predict()
    assert torch.equal(forked, together[[4, 2, 0]])


def test_the_cache_grows_with_the_text_up_to_a_long_window() -> None:
    """From 64 positions to 128 and on, in the middle of a text, for all rows at once."""
    model = tiny_gpt(tiny_config("cpu-10s", block_size=300))
    rows = random_rows([1, 60, 100])
    state = fast(model, rows)
    options = SamplingOptions(seed=5)
    chosen = torch.stack([next_ids(state, options, range(3)) for _ in range(330)])
    for row in range(3):
        whole = torch.cat([rows[row], chosen[:, row]])
        assert torch.equal(state.text(row), whole)
        for count in (1, 4, 64, 65, 200, 240, 300):
            given_ = whole[: len(rows[row]) + count]
            again = next_ids(fast(model, [given_[:-1]]), options, [row])
            assert again == given_[-1]


@pytest.mark.parametrize("overflow", ["slide", "restart"])
def test_generation_is_the_same_to_the_last_bit_for_any_batch_size_and_streamed(overflow: Overflow) -> None:
    for dtype in (torch.float32, HALF):
        model = tiny_gpt(tiny_config("cpu-1min", block_size=12), dtype=dtype)
        idx = torch.stack(random_rows([5] * 9))
        options: dict[str, Any] = {"seed": 7, "overflow": overflow, "temperature": 0.9, "top_p": 0.95}
        together = model.generate(idx, 40, **options)
        for B in range(1, 9):
            assert torch.equal(model.generate(idx[:B], 40, **options), together[:B])
        assert torch.equal(torch.stack(list(model.stream(idx, 40, **options)), dim=1), together[:, 5:])


@pytest.mark.parametrize("overflow", ["slide", "restart"])
@pytest.mark.parametrize("most", [1, 2, 100])
def test_many_ids_of_one_call_are_those_of_many_calls(
    overflow: Overflow, most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`generate` asks for all at once, and gets as many as are worth a call; a stream asks for each."""
    model = tiny_gpt(tiny_config("cpu-1min", block_size=12))
    monkeypatch.setattr("charlm.native.gpt._ONE_CALL", 3 * (most - 1) * model.num_parameters())
    idx = torch.stack(random_rows([5] * 3))
    for options in ({"seed": 7}, {"temperature": 0}):
        calls = SamplingOptions(**options, overflow=overflow)  # type: ignore[arg-type]
        single = torch.stack(list(stream_ids(fast(model, list(idx), overflow), 40, calls)), dim=1)
        for count in (0, 1, 7, 8, 9, 40):
            got = model.generate(idx, count, overflow=overflow, **options)  # type: ignore[arg-type]
            assert torch.equal(got, torch.cat([idx, single[:, :count]], dim=1))


def test_what_was_chosen_before_a_row_fails_stays() -> None:
    """The weights of one id are not finite: where it comes, in the middle of a call, nothing can be drawn."""
    model = tiny_gpt(tiny_config())
    options = SamplingOptions(seed=3, overflow="restart")
    text = [int(ids) for ids in stream_ids(fast(model, random_rows([5]), "restart"), 60, options)]
    bad = next(i for i in text if text.index(i) > 5)
    with torch.no_grad():
        model.transformer.wte.weight[bad] = torch.nan
    state = fast(model, random_rows([5]), "restart")
    got: list[int] = []

    def until_it_fails() -> None:
        while True:
            got.extend(some_turns(state, options, [0], 60).tolist())

    with pytest.raises(NonFiniteError, match="row 0"):
        until_it_fails()
    assert got == text[: 1 + text.index(bad)]
    assert state.text(0)[5:].tolist() == got


def test_a_caller_s_filters_see_the_same_ids_and_may_come_and_go() -> None:
    model = tiny_gpt(tiny_config())
    seen: list[list[list[int]]] = []

    def note(logits: Tensor, ids: Tensor) -> Tensor:
        seen.append(ids.tolist())
        return logits

    with_filter, without = SamplingOptions(seed=1, filters=[note]), SamplingOptions(seed=1)
    rows = random_rows([3, 9, 3])
    expected = fast(model, rows)
    wanted = [next_ids(expected, without, range(3)) for _ in range(30)]
    state = fast(model, rows)
    got = [next_ids(state, with_filter if step % 3 == 1 else without, range(3)) for step in range(30)]
    assert torch.equal(torch.stack(got), torch.stack(wanted))
    assert [len(ids) for ids in seen[:2]] == [2, 1]  # texts of one length together
    assert seen[0][1][:3] == rows[2].tolist()
    assert seen[1][0][:9] == rows[1].tolist()


@pytest.mark.parametrize("new", [0, 5])
def test_predictions_and_observations_may_come_between_turns(new: int) -> None:
    model = tiny_gpt(tiny_config())
    state = fast(model, random_rows([3, 5]))
    for _ in range(3):
        next_ids(state, SamplingOptions(seed=1))
    state.predict()
    next_ids(state, SamplingOptions(seed=1))
    state.observe(torch.full((2,), new))
    fresh = fast(model, [state.text(row) for row in range(2)])
    assert torch.equal(state.predict(), fresh.predict())
    for _ in range(5):
        assert torch.equal(next_ids(state, SamplingOptions(seed=1)), next_ids(fresh, SamplingOptions(seed=1)))


class Interrupted(BaseException):
    """Ctrl-C, at a place where a test wants it."""


@pytest.mark.parametrize("place", ["before", "within", "after"])
def test_an_interrupt_in_the_middle_of_a_turn_loses_nothing(
    place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a signal comes between two instructions: the engine has chosen, and the state does not know yet."""
    model = tiny_gpt(tiny_config(block_size=12))
    options = SamplingOptions(seed=4, overflow="restart")
    undisturbed = fast(model, random_rows([3, 5]), "restart")
    wanted = [next_ids(undisturbed, options) for _ in range(60)]
    state = fast(model, random_rows([3, 5]), "restart")
    took, clock = state.took, [0]

    def interrupting(ids: Any) -> None:
        clock[0] += 1
        if clock[0] % 3:
            took(ids)
            return
        if place == "after":
            took(ids)
        elif place == "within":
            state.texts[range(2), state.lengths] = ids
        raise Interrupted

    monkeypatch.setattr(state, "took", interrupting)
    while min(state.lengths) < 3 + 60:
        with contextlib.suppress(Interrupted):
            next_ids(state, options)
    for row, before in enumerate((3, 5)):
        assert state.text(row)[before : before + 60].tolist() == [int(ids[row]) for ids in wanted]


@pytest.mark.parametrize(("owner", "name"), [(gpt._Caches, "empty"), (gpt, "PassStruct")])
def test_an_interrupt_while_a_turn_is_prepared_is_made_up_for(
    owner: Any, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As of a full memory, or a signal: caches grow at 64 positions, and at 128."""
    model = tiny_gpt(tiny_config("cpu-10s", block_size=140))
    options = SamplingOptions(seed=5)
    undisturbed = fast(model, random_rows([3, 5]))
    wanted = torch.stack([next_ids(undisturbed, options) for _ in range(130)])
    state, clock = fast(model, random_rows([3, 5])), [0]
    original = getattr(owner, name)

    def failing(*args: Any, **kwargs: Any) -> Any:
        clock[0] += 1
        if clock[0] % 2:
            raise Interrupted
        return original(*args, **kwargs)

    monkeypatch.setattr(owner, name, failing)
    got: list[Tensor] = []
    while len(got) < 130:
        with contextlib.suppress(Interrupted):
            got.append(next_ids(state, options))
    assert clock[0] >= 4
    assert torch.equal(torch.stack(got), wanted)


def test_an_interrupt_while_changed_weights_are_packed_is_made_up_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = tiny_gpt(tiny_config())
    state = fast(model, random_rows([3, 5]))
    state.predict()
    with torch.no_grad():
        model.lm_head.weight.mul_(2)
    state.observe(torch.tensor([1, 2]))
    with monkeypatch.context() as patch:
        patch.setattr("charlm.native.weights.PackedWeights", interrupt)
        with pytest.raises(Interrupted):
            state.predict()
    twin = plain(model, [state.text(row) for row in range(2)])
    torch.testing.assert_close(state.predict(), twin.predict(), rtol=1e-5, atol=1e-4)


def interrupt(*_args: Any, **_kwargs: Any) -> Any:
    raise Interrupted


def test_an_interrupt_of_a_pass_leaves_no_keys_of_another_context(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_gpt(tiny_config(block_size=8))
    (row,) = random_rows([9])
    state = fast(model, [row[:8]])
    state.predict()
    state.observe(row[None, 8:])
    logits = state.engine.logits

    def interrupted(*args: Any) -> Any:
        logits(*args)
        raise Interrupted

    with monkeypatch.context() as patch:
        patch.setattr(state.engine, "logits", interrupted)
        with pytest.raises(Interrupted):
            state.predict()
    state.retract(1)
    assert torch.equal(state.predict(), fast(model, [row[:8]]).predict())


def test_only_logits_that_the_kernel_can_read_are_chosen_from() -> None:
    engine = fast(tiny_gpt(tiny_config()), random_rows([3])).engine
    for logits in (
        torch.zeros(1, 13).half(),
        torch.zeros(1, 12),
        torch.zeros(13),
        torch.zeros(1, 13).double(),
    ):
        with pytest.raises(InputError, match=r"logits must be float32 of shape \(n, 13\) on the CPU"):
            engine.choose(logits, SamplingOptions(seed=1), None)
