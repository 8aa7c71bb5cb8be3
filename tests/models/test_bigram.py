"""BigramLM: the lecture's numbers, and counts against a dict."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles.plain_bigram import bigram_log_probs, mean_loss, unseen_pairs

from charlm.data.blocks import BlockDataset
from charlm.errors import ConfigError, DataError, InputError
from charlm.models.bigram import BigramLM
from charlm.text.tokenizer import CharTokenizer


@pytest.fixture(scope="module")
def splits(shakespeare: str) -> tuple[BlockDataset, BlockDataset]:
    tokenizer = CharTokenizer.from_text(shakespeare)
    assert (len(shakespeare), tokenizer.vocab_size) == (1_115_394, 65)
    return BlockDataset.from_text(shakespeare, tokenizer, block_size=8).split(0.9)


def table_of(model: BigramLM) -> list[list[float]]:
    return [[float(x) for x in row] for row in model.token_embedding_table.weight.detach().double()]


def test_the_first_training_characters_are_those_of_the_lecture(
    splits: tuple[BlockDataset, BlockDataset],
) -> None:
    x, y = splits[0][0]
    assert [*x.tolist(), int(y[-1])] == [18, 47, 56, 57, 58, 1, 15, 47, 58]


def test_the_first_batch_and_its_loss_are_those_of_the_lecture(
    splits: tuple[BlockDataset, BlockDataset],
) -> None:
    x, y = splits[0].sample_batch(4, generator=torch.Generator().manual_seed(1337))
    assert x.tolist() == [
        [24, 43, 58, 5, 57, 1, 46, 43],
        [44, 53, 56, 1, 58, 46, 39, 58],
        [52, 58, 1, 58, 46, 39, 58, 1],
        [25, 17, 27, 10, 0, 21, 1, 54],
    ]
    assert torch.equal(y[:, :-1], x[:, 1:])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1337)
        model = BigramLM(65)
    logits, loss = model(x, y)
    assert logits.shape == (4, 8, 65)
    assert loss.item() == pytest.approx(4.8786, abs=5e-5)


@pytest.mark.parametrize(
    ("smoothing", "train_nats", "val_nats"), [(0.0, 2.4519, math.inf), (0.5, 2.4533, 2.4820)]
)
def test_the_closed_form_reaches_the_published_losses(
    splits: tuple[BlockDataset, BlockDataset], smoothing: float, train_nats: float, val_nats: float
) -> None:
    train, val = (part.ids.tolist() for part in splits)
    table = table_of(BigramLM(65).fit(splits[0], smoothing=smoothing))
    assert mean_loss(table, train) == pytest.approx(train_nats, abs=5e-5)
    assert mean_loss(table, val) == pytest.approx(val_nats, abs=5e-5)
    assert unseen_pairs(train, val) == 187


def test_the_model_itself_measures_the_same_loss(splits: tuple[BlockDataset, BlockDataset]) -> None:
    model = BigramLM(65).fit(splits[0]).double()
    nats = count = 0.0
    with torch.no_grad():
        for x, y in splits[1].blocks(4096):
            nats += float(model(x, y)[1]) * y.numel()
            count += y.numel()
    assert nats / count == pytest.approx(2.4820, abs=5e-5)


@settings(max_examples=50, deadline=None)
@given(
    ids=st.lists(st.integers(0, 6), min_size=2, max_size=40),
    smoothing=st.sampled_from([0, 0.0, 1e-3, 0.5, 1, 1e9]),
)
def test_fit_equals_counting_in_a_dict(ids: list[int], smoothing: float) -> None:
    data = BlockDataset(np.array(ids), block_size=1)
    table = table_of(BigramLM(7).double().fit(data, smoothing=smoothing))
    np.testing.assert_allclose(table, bigram_log_probs(ids, 7, smoothing), rtol=1e-12)


def test_fit_returns_the_model_and_draws_nothing_at_random() -> None:
    model = BigramLM(4)
    before = torch.get_rng_state()
    assert model.fit(BlockDataset(torch.tensor([0, 1, 2, 3]), block_size=3)) is model
    assert torch.equal(torch.get_rng_state(), before)


def test_fit_leaves_the_parameter_trainable() -> None:
    model = BigramLM(4).fit(BlockDataset(torch.tensor([0, 1, 2, 3]), block_size=3))
    _, loss = model(torch.tensor([[0, 1]]), torch.tensor([[1, 2]]))
    loss.backward()
    assert model.token_embedding_table.weight.grad is not None


def test_no_other_distribution_explains_the_training_pairs_better() -> None:
    ids = torch.randint(5, (200,), generator=torch.Generator().manual_seed(0))
    data = BlockDataset(ids, block_size=199)
    best = mean_loss(table_of(BigramLM(5).fit(data, smoothing=0)), ids.tolist())
    for smoothing in (0.1, 0.5, 2.0):
        assert mean_loss(table_of(BigramLM(5).fit(data, smoothing=smoothing)), ids.tolist()) > best


@pytest.mark.parametrize(
    "smoothing", [-0.1, math.nan, math.inf, -math.inf, True, "0.5", None, 10**400, [0.5], 1j]
)
def test_fit_refuses_a_bad_smoothing(smoothing: float) -> None:
    data = BlockDataset(torch.tensor([0, 1, 2, 3]), block_size=3)
    with pytest.raises(InputError, match="smoothing must be a finite number, 0 or more, got"):
        BigramLM(4).fit(data, smoothing=smoothing)


def test_fit_refuses_ids_outside_the_table() -> None:
    with pytest.raises(DataError, match="the data holds the id 4, but vocab_size is 4"):
        BigramLM(4).fit(BlockDataset(torch.tensor([0, 4]), block_size=1))


def test_weights_are_drawn_from_the_global_generator_as_torch_draws_an_embedding() -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        model = BigramLM(9)
        torch.manual_seed(3)
        assert torch.equal(model.token_embedding_table.weight, torch.nn.Embedding(9, 9).weight)
    assert list(model.state_dict()) == ["token_embedding_table.weight"]
    assert model.num_parameters() == model.config.num_parameters() == 81
    assert model.block_size is None
    assert repr(model) == "BigramLM(vocab_size=9)  # 81 parameters"


def test_from_config_takes_a_config_or_a_mapping() -> None:
    model = BigramLM.from_config({"vocab_size": 5})
    assert BigramLM.from_config(model.config).vocab_size == 5
    with pytest.raises(ConfigError, match="unknown field 'vocab'; did you mean 'vocab_size'"):
        BigramLM.from_config({"vocab": 5})


def test_any_length_of_ids_can_be_read_with_or_without_a_cache() -> None:
    model = BigramLM(9)
    idx = torch.randint(9, (2, 300), generator=torch.Generator().manual_seed(0))
    cache = model.new_cache()
    parts = [model(piece, cache=cache)[0] for piece in idx.split(70, dim=1)]
    assert torch.equal(torch.cat(parts, dim=1), model(idx)[0])
    assert cache.length == 300
