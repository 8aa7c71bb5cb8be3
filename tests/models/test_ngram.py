"""NGramLM: the formula, the counts, what must hold for every text, and files that are refused."""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from harness.tiny_training import global_generators
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles.plain_ngram import PlainNGram
from torch import Tensor

from charlm import (
    BlockDataset,
    CharLM,
    CharTokenizer,
    LanguageModel,
    NGramLM,
    Trainer,
    TrainerConfig,
    load,
)
from charlm.errors import ConfigError, DataError, FileFormatError, InputError
from charlm.evaluation import evaluate
from charlm.files import safetensors
from charlm.models.bigram import BigramLM
from charlm.models.ngram_counts import count_ngrams
from charlm.models.ngram_discounts import Evidence, fit_discounts

DTYPES = {"32": torch.float32, "64": torch.float64, "b16": torch.bfloat16, "16": torch.float16}


@st.composite
def texts(draw: st.DrawFn, longest: int = 60) -> tuple[list[int], int]:
    """Return ids, often repetitive, and V, which may be more than occur."""
    V = draw(st.sampled_from([1, 2, 3, 7, 300]))
    ids = draw(st.lists(st.integers(0, min(V, 4) - 1), min_size=2, max_size=longest))
    repeats = draw(st.sampled_from([1, 1, 1, 6]))
    return ids * repeats, V


def fitted(ids: list[int], V: int, order: int, window: int = 4_096) -> NGramLM:
    return NGramLM(V, order, window).double().fit(BlockDataset(np.array(ids), 1))


def tree_of(codes: list[int], V: int) -> list[tuple[int, ...]]:
    """Return the n-gram of each node."""
    grams: list[tuple[int, ...]] = [()]
    for code in codes:
        grams.append((*grams[code // V], code % V))
    return grams[1:]


@settings(max_examples=50, deadline=None)
@given(text=texts(), order=st.sampled_from([1, 2, 3, 5, 9, 32]))
def test_counts_are_those_of_dictionaries(text: tuple[list[int], int], order: int) -> None:
    ids, V = text
    codes, counts = count_ngrams(np.array(ids, dtype=np.uint16), V, order)
    assert (np.diff(codes) > 0).all()
    found = dict(zip(tree_of(codes.tolist(), V), counts.tolist(), strict=True))
    assert found == PlainNGram(ids, V, order).counts


def test_a_huge_vocabulary_and_a_long_text_are_counted_in_several_rounds() -> None:
    generator = np.random.default_rng(0)
    ids = generator.integers(0, 3, 3_000) * 500_000
    codes, counts = count_ngrams(ids, 1_114_112, 8)
    found = dict(zip(tree_of(codes.tolist(), 1_114_112), counts.tolist(), strict=True))
    assert found == PlainNGram(ids.tolist(), 1_114_112, 8).counts


@settings(max_examples=50, deadline=None)
@given(
    text=texts(),
    order=st.sampled_from([1, 2, 3, 4, 8, 14]),
    window=st.sampled_from([0, 1, 2, 3, 9, 4_096]),
    data=st.data(),
)
def test_every_probability_is_that_of_the_formula(
    text: tuple[list[int], int], order: int, window: int, data: st.DataObject
) -> None:
    ids, V = text
    model = fitted(ids, V, order, window)
    plain = PlainNGram(ids, V, order)
    tables = model.discounts.tolist(), model.window_shares.tolist(), window
    asked = data.draw(st.lists(st.integers(0, min(V, 5) - 1), min_size=1, max_size=30))
    logits, _ = model(torch.tensor([asked, asked[::-1]]))
    for t in range(len(asked)):
        wanted = [plain.probability(asked[: t + 1], i, *tables) for i in range(min(V, 6))]
        np.testing.assert_allclose(logits[0, t, :6].exp().tolist(), wanted, rtol=1e-10)


@pytest.mark.parametrize("size", [257, 700])
def test_a_window_ends_where_it_is_said_to_and_looks_at_the_latest_places(size: int) -> None:
    model = fitted([0, 1, 1, 0, 1, 0, 0] * 40, 3, 3, size)
    model.window_shares = torch.rand(11, 3, generator=torch.Generator().manual_seed(1)).double()
    ids = ([0] * 280 + [1] + [0] * 100 + [2] + [0] * 270 + [1, 0]) * 2
    plain = PlainNGram([0, 1, 1, 0, 1, 0, 0] * 40, 3, 3)
    tables = model.discounts.tolist(), model.window_shares.tolist(), size
    logits, _ = model(torch.tensor([ids]))
    for t in range(0, len(ids), 13):
        wanted = [plain.probability(ids[: t + 1], i, *tables) for i in range(3)]
        np.testing.assert_allclose(logits[0, t].exp().tolist(), wanted, rtol=1e-10)
    quick = model.float().new_state()
    quick.observe(torch.tensor([ids[:1]]))
    scored = quick.score(torch.tensor([ids[1:]]))[0]
    wanted_too = logits[0, :-1].gather(1, torch.tensor(ids[1:])[:, None])[:, 0]
    torch.testing.assert_close(scored.double(), wanted_too, rtol=0, atol=1e-4)


@settings(max_examples=30, deadline=None)
@given(text=texts(), order=st.integers(1, 6), window=st.sampled_from([0, 5, 4_096]), data=st.data())
def test_nothing_that_comes_later_changes_a_prediction(
    text: tuple[list[int], int], order: int, window: int, data: st.DataObject
) -> None:
    ids, V = text
    model = fitted(ids, V, order, window)
    one, other = torch.randint(V, (2, 40), generator=torch.Generator().manual_seed(0))
    t = data.draw(st.integers(1, 39))
    other[:t] = one[:t]
    assert torch.equal(model(one[None])[0][0, :t], model(other[None])[0][0, :t])


def test_what_was_read_a_moment_ago_is_expected_again() -> None:
    text = "".join(f"{name} went to {name}.\n" for name in ("ann", "bob", "cid", "dan", "eve", "fay") * 40)
    read = "zoe went to the sea. "
    tokenizer = CharTokenizer.from_text(text + read + "xyz")
    data = BlockDataset.from_text(text, tokenizer, 50)
    with_window, without = (
        CharLM(NGramLM(tokenizer.vocab_size, 5, window).fit(data), tokenizer) for window in (4_096, 0)
    )
    again = (read * 2)[:-1]
    assert with_window.evaluate(again).loss_nats < without.evaluate(again).loss_nats - 0.5


def test_a_model_without_a_window_is_saved_as_ever(tmp_path: Path) -> None:
    fitted([0, 1, 1, 0, 1] * 9, 2, 3, 0).save(tmp_path / "model")
    assert set(NGramLM.load(tmp_path / "model").state_dict()) == {"codes", "counts", "discounts"}
    again = NGramLM.load(tmp_path / "model")
    assert again.config.window == 0
    assert again.fit(BlockDataset(np.array([0, 1] * 50), 1)).window_shares.shape == (0, 3)


@settings(max_examples=50, deadline=None)
@given(
    text=texts(), order=st.integers(1, 9), seed=st.integers(0, 99), dtype=st.sampled_from(["32", "64", "b16"])
)
def test_probabilities_are_positive_and_sum_to_one_after_any_context(
    text: tuple[list[int], int], order: int, seed: int, dtype: str
) -> None:
    ids, V = text
    model = fitted(ids, V, order).to(DTYPES[dtype])
    idx = torch.randint(V, (3, 10), generator=torch.Generator().manual_seed(seed))
    logits, _ = model(idx)
    assert logits.shape == (3, 10, V)
    assert logits.dtype == (torch.float64 if dtype == "64" else torch.float32)
    assert logits.isfinite().all()
    sums = logits.double().exp().sum(-1)
    torch.testing.assert_close(sums, torch.ones_like(sums), rtol=0, atol=1e-12 if dtype == "64" else 1e-5)


@settings(max_examples=30, deadline=None)
@given(text=texts(), order=st.integers(1, 6), cuts=st.lists(st.integers(1, 4), min_size=1, max_size=6))
def test_a_cache_changes_nothing_however_the_ids_are_cut(
    text: tuple[list[int], int], order: int, cuts: list[int]
) -> None:
    ids, V = text
    model = fitted(ids, V, order)
    idx = torch.randint(V, (2, sum(cuts)), generator=torch.Generator().manual_seed(0))
    cache = model.new_cache()
    parts = [model(piece, cache=cache)[0] for piece in idx.split(cuts, dim=1)]
    assert torch.equal(torch.cat(parts, dim=1), model(idx)[0])


@settings(max_examples=30, deadline=None)
@given(text=texts(), order=st.integers(1, 6))
def test_rows_of_a_batch_know_nothing_of_each_other(text: tuple[list[int], int], order: int) -> None:
    ids, V = text
    model = fitted(ids, V, order)
    idx = torch.randint(V, (4, 9), generator=torch.Generator().manual_seed(0))
    together, _ = model(idx)
    for row in range(4):
        assert torch.equal(model(idx[row : row + 1])[0][0], together[row])


def test_many_positions_at_once_give_what_they_give_one_by_one() -> None:
    model = fitted([0, 1, 2, 0, 1, 1, 2, 2, 0, 1] * 4, 3, 4)
    idx = torch.randint(3, (50, 100), generator=torch.Generator().manual_seed(0))  # more than one round
    whole, _ = model(idx)
    assert torch.equal(model(idx[-1:])[0][0], whole[-1])


@settings(max_examples=30, deadline=None)
@given(text=texts(), order=st.integers(1, 6), dtype=st.sampled_from(["32", "64", "b16", "16"]))
def test_a_saved_model_comes_back_bit_for_bit(text: tuple[list[int], int], order: int, dtype: str) -> None:
    ids, V = text
    model = fitted(ids, V, order).to(DTYPES[dtype])
    with tempfile.TemporaryDirectory() as folder:
        model.save(Path(folder) / "model")
        again = LanguageModel.load(Path(folder) / "model")
    assert type(again) is NGramLM
    assert again.config == model.config
    state = again.state_dict()
    assert state.keys() == {"codes", "counts", "discounts", "window_shares"}
    assert all(torch.equal(state[name], tensor) for name, tensor in model.state_dict().items())
    idx = torch.randint(V, (2, 8), generator=torch.Generator().manual_seed(0))
    assert torch.equal(again(idx)[0], model(idx)[0])


def test_fit_is_deterministic_draws_nothing_and_replaces_what_was_there() -> None:
    before = global_generators()
    one = fitted([0, 1, 1, 0, 1] * 9, 2, 3)
    other = fitted([1, 1, 1, 1, 0, 0] * 20, 2, 3)
    data = BlockDataset(np.array([0, 1, 1, 0, 1] * 9), 4)
    assert other.fit(data) is other
    assert other.config == one.config
    assert all(torch.equal(other.state_dict()[name], t) for name, t in one.state_dict().items())
    assert global_generators() == before


def test_autocast_does_not_spoil_the_sums() -> None:
    model = fitted([0, 1, 2, 0, 1, 1, 2, 2, 0, 1] * 4, 3, 4).float()
    idx = torch.tensor([[0, 1, 2, 0, 1]])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits, _ = model(idx)
    assert torch.equal(model(idx)[0], logits)


def test_fit_works_in_inference_mode_and_keeps_the_type() -> None:
    data = BlockDataset(np.array([0, 1, 1, 0, 1] * 9), 4)
    with torch.inference_mode():
        model = NGramLM(2, 3).half().fit(data)
    assert model.discounts.dtype == torch.float16
    assert model(torch.tensor([[0, 1]]))[0].dtype == torch.float32


def test_an_unfitted_model_is_uniform_and_can_be_saved(tmp_path: Path) -> None:
    model = NGramLM(5)
    logits, loss = model(torch.tensor([[0, 4]]), torch.tensor([[1, 2]]))
    assert torch.allclose(logits, torch.full((1, 2, 5), -math.log(5)))
    assert loss.item() == pytest.approx(math.log(5))
    model.save(tmp_path / "model")
    assert NGramLM.load(tmp_path / "model").order == 7
    room = NGramLM.from_config({"vocab_size": 5, "order": 3, "n_ngrams": 9})
    assert torch.allclose(room(torch.tensor([[0, 4]]))[0], logits)


def test_the_text_that_was_counted_is_predicted_better_with_every_order() -> None:
    text = "the cat sat on the mat and the rat sat on the cat " * 8
    data = BlockDataset.from_text(text, CharTokenizer.from_text(text), 50)
    losses = [evaluate(NGramLM(32, order).fit(data), data).loss_nats for order in range(1, 4)]
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < 0.5


def test_generation_is_the_same_with_and_without_a_cache_and_has_no_end() -> None:
    text = "a rose is a rose is a rose\n" * 3
    tokenizer = CharTokenizer.from_text(text)
    model = NGramLM(tokenizer.vocab_size, 4).fit(BlockDataset.from_text(text, tokenizer, 8))
    assert model.block_size is None
    prompt = torch.tensor([tokenizer.encode("a r"), tokenizer.encode("ose")])
    for seed in range(3):
        cached = model.generate(prompt, 60, seed=seed)
        assert torch.equal(cached, model.generate(prompt, 60, seed=seed, use_cache=False))
        assert torch.equal(cached, model.generate(prompt, 60, seed=seed, overflow="restart"))
    lm = CharLM(model, tokenizer)
    assert lm.generate("a ro", 22, temperature=0) == "a rose is a rose is a rose"
    assert "".join(lm.stream("a", 50, seed=1)) == lm.generate("a", 50, seed=1)[1:]


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10_000), order=st.integers(1, 4))
def test_no_discounts_near_the_fitted_ones_predict_the_held_out_text_better(seed: int, order: int) -> None:
    generator = np.random.default_rng(seed)
    ids = generator.choice(4, p=[0.6, 0.2, 0.15, 0.05], size=400).tolist()
    plain = PlainNGram(ids[:300], 4, order)
    held_out = range(300, 400)

    def evidence(length: int) -> Evidence:
        behind = [tuple(ids[t - length : t]) for t in held_out]
        counts = np.array([[plain.counts[*gram, j] for j in range(4)] for gram in behind])
        kinds = np.stack([(counts == 1).sum(1), (counts == 2).sum(1), (counts >= 3).sum(1)], axis=1)
        return Evidence(counts[np.arange(100), ids[300:]], counts.sum(1), kinds)

    def objective(discounts: np.ndarray[tuple[int, int], np.dtype[np.float64]]) -> float:
        table = discounts.tolist()
        nats = -sum(math.log(plain.probability(ids[:t], ids[t], table)) for t in held_out)
        return float(nats + 8 * ((discounts / [1, 2, 3] - 0.5) ** 2).sum())

    best = fit_discounts([evidence(length) for length in range(order)], 4)
    lowest = objective(best)
    for length in range(order):
        for kind in range(3):
            for change in (-0.02, 0.02):
                other = best.copy()
                other[length, kind] = np.clip(
                    other[length, kind] + change * (kind + 1), 0.01 * (kind + 1), 0.99 * (kind + 1)
                )
                assert objective(other) > lowest - 2e-4


def test_the_discounts_come_from_the_end_of_the_text() -> None:
    same = fitted([0, 1] * 200, 2, 2)
    other = fitted([0, 1] * 180 + [0, 0, 1, 1] * 10, 2, 2)
    assert not torch.equal(same.discounts, other.discounts)
    short = fitted([0, 1, 0], 2, 2)  # a tenth of it is nothing
    assert short.discounts.tolist() == [[0.5, 1.0, 1.5]] * 2


@pytest.mark.parametrize("order", [0, 33, True, 2.0, "3"])
def test_a_bad_order_is_refused(order: int) -> None:
    with pytest.raises(ConfigError, match="order must be an int at least 1 and at most 32"):
        NGramLM(5, order)


def test_ids_outside_the_vocabulary_are_refused() -> None:
    model = fitted([0, 1, 0, 1], 2, 2)
    with pytest.raises(DataError, match="the data holds the id 2, but vocab_size is 2"):
        model.fit(BlockDataset(np.array([0, 2]), 1))
    for wrong in (-1, 2):
        with pytest.raises(InputError, match=f"idx must be from 0 to 1 .*, got {wrong} at row 0, column 1"):
            model(torch.tensor([[0, wrong]]))
    with pytest.raises(InputError, match="targets must be from -1 to 1"):
        model(torch.tensor([[0]]), torch.tensor([[2]]))


def test_a_cache_of_another_model_or_batch_is_refused() -> None:
    model = fitted([0, 1, 0, 1], 2, 3)
    with pytest.raises(InputError, match=r"cache must be from new_cache\(\), got a KVCache"):
        model(torch.tensor([[0]]), cache=BigramLM(2).new_cache())
    cache = model.new_cache()
    model(torch.tensor([[0]]), cache=cache)
    with pytest.raises(InputError, match="idx must have as many rows as the cache, 1, got 2"):
        model(torch.tensor([[0], [1]]), cache=cache)


def test_targets_of_minus_one_do_not_count() -> None:
    model = fitted([0, 1, 1, 0, 1] * 5, 2, 3)
    logits, loss = model(torch.tensor([[0, 1]]), torch.tensor([[-1, 1]]))
    assert loss.item() == pytest.approx(-logits[0, 1, 1].item())


def test_nothing_can_be_trained_by_gradient() -> None:
    model = fitted([0, 1] * 20, 2, 2)
    data = BlockDataset(np.array([0, 1] * 20), 4)
    with pytest.raises(InputError, match="model must have a parameter that requires a gradient, got none"):
        Trainer(model, data, TrainerConfig(max_steps=1), device="cpu")


def test_its_size_is_said_by_config_and_model() -> None:
    model = fitted([0, 1, 1], 2, 2)  # 0, 1, 01, 11
    assert model.config.n_ngrams == 4
    assert model.num_parameters() == model.config.num_parameters() == 47
    assert repr(model) == "NGramLM(vocab_size=2, order=2, n_ngrams=4, window=4096)  # 47 parameters"
    assert model.device == torch.device("cpu")


def _unsorted(tensors: dict[str, Tensor]) -> None:
    tensors["codes"] = tensors["codes"].flip(0)


def _negative(tensors: dict[str, Tensor]) -> None:
    tensors["codes"][0] = -1


def _twice(tensors: dict[str, Tensor]) -> None:
    tensors["codes"][1] = tensors["codes"][0]


def _far(tensors: dict[str, Tensor]) -> None:
    tensors["codes"][-1] = 2**62


def _orphans(tensors: dict[str, Tensor]) -> None:
    tensors["codes"] += 10**6


def _no_count(tensors: dict[str, Tensor]) -> None:
    tensors["counts"][2] = 0


def _below(tensors: dict[str, Tensor]) -> None:
    tensors["counts"][2] = -(2**31)


def _nan(tensors: dict[str, Tensor]) -> None:
    tensors["discounts"][1, 1] = math.nan


def _infinite(tensors: dict[str, Tensor]) -> None:
    tensors["discounts"][0, 2] = math.inf


def _large(tensors: dict[str, Tensor]) -> None:
    tensors["discounts"][0, 0] = 1.0


def _no_share(tensors: dict[str, Tensor]) -> None:
    tensors["window_shares"][3, 1] = math.nan


def _more_than_all(tensors: dict[str, Tensor]) -> None:
    tensors["window_shares"][10, 2] = 1.5


def _float_codes(tensors: dict[str, Tensor]) -> None:
    tensors["codes"] = tensors["codes"].to(torch.float32)


def _longer(tensors: dict[str, Tensor]) -> None:
    tensors["counts"] = tensors["counts"].repeat(2)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_unsorted, "codes must increase"),
        (_negative, "codes must increase, from 0 or more"),
        (_twice, "codes must increase"),
        (_far, "codes must be those of n-grams of at most 3 ids with their beginnings"),
        (_orphans, "codes must be those of n-grams"),
        (_no_count, "counts must be 1 or more"),
        (_below, "counts must be 1 or more"),
        (_nan, "discounts must be above 0 and below"),
        (_infinite, "discounts must be above 0 and below"),
        (_large, "discounts must be above 0 and below"),
        (_no_share, "window_shares must be above 0 and at most 1"),
        (_more_than_all, "window_shares must be above 0 and at most 1"),
        (_float_codes, r"must hold 'codes' as torch\.int64, got torch\.float32"),
        (_longer, r"must hold 'counts' with shape"),
    ],
)
def test_damaged_tables_are_refused_when_they_are_loaded(
    tmp_path: Path, damage: Callable[[dict[str, Tensor]], None], message: str
) -> None:
    model = fitted([0, 1, 1, 0, 2, 1, 1, 0, 1] * 5, 3, 3).float()
    model.save(tmp_path / "model")
    tensors = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    damage(tensors)
    (tmp_path / "model" / "model.safetensors").write_bytes(b"".join(safetensors.dumps(tensors)))
    with pytest.raises(FileFormatError, match=message):
        LanguageModel.load(tmp_path / "model")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"n_ngrams": 2**32}, "parameters of config.json, got"),
        ({"n_ngrams": 3}, "must hold 'codes' with shape"),
        ({"order": 2}, "must hold 'discounts' with shape"),
        ({"window": 0}, "holds the tensor 'window_shares', which the model does not have"),
        ({"window": -1}, "window must be an int at least 0"),
        ({"vocab_size": 2}, "codes must be those of n-grams"),
        ({"n_ngrams": -1}, "n_ngrams must be an int at least 0"),
    ],
    ids=str,
)
def test_settings_that_do_not_fit_the_tables_are_refused(
    tmp_path: Path, changes: dict[str, int], message: str
) -> None:
    fitted([0, 1, 1, 0, 2, 1, 1, 0, 1] * 5, 3, 3).save(tmp_path / "model")
    file = tmp_path / "model" / "config.json"
    values = json.loads(file.read_text(encoding="utf-8"))
    values["config"].update(changes)
    file.write_text(json.dumps(values), encoding="utf-8")
    with pytest.raises(FileFormatError, match=message):
        LanguageModel.load(tmp_path / "model")


def test_load_gives_text_in_and_text_out(tmp_path: Path) -> None:
    text = "one two three " * 20
    tokenizer = CharTokenizer.from_text(text)
    model = NGramLM(tokenizer.vocab_size).fit(BlockDataset.from_text(text, tokenizer, 10))
    CharLM(model, tokenizer).save(tmp_path / "model")
    lm = load(tmp_path / "model", device="cpu")
    assert lm.generate("one t", 9, temperature=0) == "one two three "
    assert lm.evaluate(text, block_size=4).loss_nats > lm.evaluate(text).loss_nats


def test_tiny_shakespeare_is_predicted_as_well_as_published(shakespeare: str) -> None:
    tokenizer = CharTokenizer.from_text(shakespeare)
    train, val = BlockDataset.from_text(shakespeare, tokenizer, block_size=256).split(0.9)
    model = NGramLM(tokenizer.vocab_size).fit(train)
    assert evaluate(model, val).loss_nats == pytest.approx(1.4815, abs=5e-4)
    whole = BlockDataset(val.ids, len(val.ids) - 1)
    assert evaluate(model, whole).loss_nats == pytest.approx(1.3854, abs=5e-4)
