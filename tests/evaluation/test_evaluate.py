"""Exact losses: against plain loops, for any batch size, and without a trace."""

from __future__ import annotations

import math
import sys
from typing import Any, ClassVar

import pytest
import torch
from harness.tiny_models import random_ids, tiny_config, tiny_gpt
from harness.tiny_training import PlainModule, global_generators
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles.plain_evaluation import plain_evaluation
from torch import Tensor, nn
from typing_extensions import override

from charlm import BigramLM, BlockDataset, LanguageModel
from charlm.backends.base import DeviceBackend
from charlm.data.batches import DeviceBatches
from charlm.errors import InputError
from charlm.evaluation import EvalResult, evaluate
from charlm.testing import RecordingBackend


def some_model(kind: str, dtype: torch.dtype = torch.float32) -> LanguageModel:
    if kind == "bigram":
        torch.manual_seed(1)
        return BigramLM(13).to(dtype)
    return tiny_gpt(tiny_config("lecture"), dtype=dtype).eval()


def some_data(length: int, block_size: int, seed: int = 0) -> BlockDataset:
    return BlockDataset(random_ids(tiny_config("lecture"), 1, length, seed)[0], block_size)


@settings(deadline=None, max_examples=25)
@given(st.sampled_from(["bigram", "gpt"]), st.integers(2, 70), st.integers(1, 16), st.integers(1, 80))
def test_the_figures_are_those_of_plain_loops_for_any_batch_size(
    kind: str, length: int, block_size: int, batch_size: int
) -> None:
    data = some_data(length, min(block_size, length - 1), seed=length)
    model = some_model(kind)
    loss, accuracy, count = plain_evaluation(model, data.ids.tolist(), data.block_size)
    for size in (None, 1, batch_size):
        result = evaluate(model, data, batch_size=size)
        assert result.loss_nats == pytest.approx(loss, rel=1e-5)
        assert result.accuracy == pytest.approx(accuracy)
        assert result.n_chars == count == length - 1


class Watcher(nn.Module):
    """Remembers which targets it was shown."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[int] = []
        self.was_training: list[bool] = []
        self.dropout = nn.Dropout(0.5)

    @override
    def forward(self, idx: Tensor, targets: Tensor) -> tuple[Tensor, None]:
        self.was_training += [self.training, self.dropout.training, torch.is_grad_enabled()]
        self.seen += targets.flatten().tolist()
        return self.dropout(torch.ones(*idx.shape, 600)), None


@pytest.mark.parametrize("batch_size", [1, 3, 100, None])
def test_every_target_is_scored_exactly_once(batch_size: int | None) -> None:
    model = Watcher()
    result = evaluate(model, BlockDataset(torch.arange(533), 7), batch_size=batch_size)
    assert sorted(model.seen) == list(range(1, 533))
    assert result.n_chars == 532
    assert result.loss_nats == pytest.approx(math.log(600))


def test_evaluation_draws_nothing_and_keeps_every_training_flag() -> None:
    model = Watcher().train()
    model.dropout.eval()
    before = global_generators()
    evaluate(model, BlockDataset(torch.arange(50), 7))
    assert global_generators() == before
    assert model.training
    assert not model.dropout.training
    assert not any(model.was_training)
    assert torch.is_grad_enabled()


def test_training_flags_come_back_after_an_error() -> None:
    model = some_model("gpt").train()
    with pytest.raises(ValueError, match="idx must be from 0 to 12"):
        evaluate(model, BlockDataset(torch.arange(50), 7))
    assert all(module.training for module in model.modules())


def test_an_impossible_character_makes_the_loss_infinite() -> None:
    data = BlockDataset(torch.tensor([0, 1] * 20), 8)
    result = evaluate(BigramLM(3).fit(data, smoothing=0), BlockDataset(torch.tensor([0, 1, 0, 2]), 2))
    assert (result.loss_nats, result.perplexity, result.bits_per_char) == (math.inf,) * 3
    assert result.accuracy == pytest.approx(2 / 3)


def test_a_certain_character_costs_nothing() -> None:
    data = BlockDataset(torch.tensor([0, 1] * 20), 8)
    result = evaluate(BigramLM(2).fit(data, smoothing=0), data)
    assert (result.loss_nats, result.accuracy, result.perplexity) == (0.0, 1.0, 1.0)


def test_nan_logits_stay_nan() -> None:
    model = BigramLM(13)
    with torch.no_grad():
        model.token_embedding_table.weight[3] = torch.nan
    result = evaluate(model, some_data(60, 8))
    assert math.isnan(result.loss_nats)
    assert math.isnan(result.perplexity)
    assert math.isnan(result.bits_per_char)


@pytest.mark.parametrize("kind", ["bigram", "gpt"])
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-6), (torch.bfloat16, 0.05), (torch.float16, 5e-3)]
)
def test_half_and_double_precision_models_are_scored(kind: str, dtype: torch.dtype, tolerance: float) -> None:
    data = some_data(100, 8)
    exact = evaluate(some_model(kind), data).loss_nats
    assert evaluate(some_model(kind, dtype), data).loss_nats == pytest.approx(exact, rel=tolerance)


def test_float64_models_are_scored_in_float64() -> None:
    data = some_data(200, 8)
    model = some_model("gpt", torch.float64)
    loss, _, _ = plain_evaluation(model, data.ids.tolist(), 8)
    assert evaluate(model, data).loss_nats == pytest.approx(loss, rel=1e-13)


def test_a_module_with_flat_logits_is_scored_too() -> None:
    class Flat(PlainModule):
        @override
        def forward(self, idx: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
            logits, loss = super().forward(idx, targets)
            return logits.flatten(0, 1), loss

    torch.manual_seed(0)
    model, data = Flat(13), some_data(100, 8)
    loss, accuracy, _ = plain_evaluation(model, data.ids.tolist(), 8)
    result = evaluate(model, data, backend=DeviceBackend("cpu"))
    assert result.loss_nats == pytest.approx(loss, rel=1e-5)
    assert result.accuracy == pytest.approx(accuracy)


def test_the_units_follow_from_the_nats() -> None:
    result = EvalResult(loss_nats=2 * math.log(2), accuracy=0.5, n_chars=300, n_bytes=600)
    assert result.bits_per_char == pytest.approx(2)
    assert result.bits_per_byte == pytest.approx(1)
    assert result.perplexity == pytest.approx(4)
    assert EvalResult(loss_nats=1.0, accuracy=0.5, n_chars=3).bits_per_byte is None
    assert EvalResult(loss_nats=1e4, accuracy=0.0, n_chars=3).perplexity == math.inf


def test_the_closed_form_has_its_known_losses(shakespeare: str) -> None:
    from charlm import CharTokenizer

    data = BlockDataset.from_text(shakespeare, CharTokenizer.from_text(shakespeare), 256)
    train, val = data.split()
    model = BigramLM(65).fit(train)
    assert evaluate(model, train).loss_nats == pytest.approx(2.4533, abs=5e-5)
    assert evaluate(model, val).loss_nats == pytest.approx(2.4820, abs=5e-5)


def test_a_large_vocabulary_is_scored_in_smaller_batches() -> None:
    class Wide(nn.Module):
        sizes: ClassVar[list[int]] = []

        @override
        def forward(self, idx: Tensor, targets: Tensor | None = None) -> tuple[Tensor, None]:
            self.sizes.append(idx.numel())
            return torch.zeros(*idx.shape, 1).expand(*idx.shape, 70_000), None

    result = evaluate(Wide(), BlockDataset(torch.full((1000,), 69_999), 100))
    assert result.loss_nats == pytest.approx(math.log(70_000))
    assert Wide.sizes == [200, 200, 200, 200, 100, 99]


def test_on_a_device_the_text_is_moved_once_and_not_each_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    class Elsewhere(RecordingBackend):
        name = "elsewhere"

    chosen: list[DeviceBackend] = []

    def on_the_device(data: BlockDataset, backend: DeviceBackend) -> DeviceBatches:
        chosen.append(backend)
        return DeviceBatches(data, backend)

    data, model, backend = some_data(60, 7), some_model("gpt"), Elsewhere()
    expected = evaluate(model, data)
    monkeypatch.setattr(sys.modules["charlm.evaluation.evaluate"], "batches_on", on_the_device)
    assert evaluate(model, data, backend=backend) == expected
    assert chosen == [backend]
    assert backend.calls == []


@settings(deadline=None, max_examples=30)
@given(st.integers(30, 200), st.integers(1, 12), st.integers(1, 250), st.integers(1, 9))
def test_a_part_of_a_text_is_whole_windows_spread_over_it_for_any_batch_size(
    length: int, block_size: int, max_chars: int, batch_size: int
) -> None:
    data, model = some_data(length, block_size), some_model("bigram")
    result = evaluate(model, data, max_chars=max_chars, batch_size=batch_size)
    assert result.n_chars + result.n_left_out == length - 1
    windows = (length - 1) // block_size
    if max_chars >= length - 1:
        assert result == evaluate(model, data, batch_size=batch_size)
        return
    most = max(1, max_chars // block_size)
    assert result.n_chars == block_size * min(most, windows) or most >= windows
    if most < windows:
        nats = 0.0
        for i in range(most):
            start = i * windows // most * block_size
            ids = data.ids[start : start + block_size + 1].tolist()
            nats += plain_evaluation(model, ids, block_size)[0] * block_size
        assert result.loss_nats == pytest.approx(nats / result.n_chars, rel=1e-5)


@pytest.mark.parametrize("max_chars", [0, -1, 2.0, True, "all"])
def test_a_part_must_be_a_positive_number(max_chars: Any) -> None:
    with pytest.raises(InputError, match="max_chars must be an int, 1 or more"):
        evaluate(some_model("bigram"), some_data(50, 8), max_chars=max_chars)


def test_a_part_is_the_same_on_a_device() -> None:
    data, model = some_data(500, 8), some_model("bigram")
    batches = DeviceBatches(data, DeviceBackend("cpu"))
    on_device = [x.tolist() for x, _ in batches.blocks(3, most=10)]
    assert on_device == [x.tolist() for x, _ in data.blocks(3, most=10)]
    assert sum(map(len, on_device)) == 10
    assert evaluate(model, data, max_chars=80).n_chars == 80


@pytest.mark.parametrize(("nats", "perplexity"), [(0.0, 1.0), (100.0, math.exp(100)), (708.0, math.exp(708))])
def test_a_perplexity_is_a_number_up_to_the_largest_float(nats: float, perplexity: float) -> None:
    assert EvalResult(loss_nats=nats, accuracy=0.5, n_chars=1).perplexity == perplexity
    assert EvalResult(loss_nats=710.0, accuracy=0.5, n_chars=1).perplexity == math.inf
