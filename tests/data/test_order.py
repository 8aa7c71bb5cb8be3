"""Epochs: what they visit, and that they are known without what came before."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from harness.tiny_training import TOKENIZER, quick_config, tiny_split
from hypothesis import given, settings
from hypothesis import strategies as st

from charlm import BigramLM, BlockDataset, Trainer
from charlm.data.order import EpochOrder, permuted


@settings(deadline=None, max_examples=100)
@given(N=st.integers(2, 200), T=st.integers(1, 30), B=st.integers(1, 20), seed=st.integers(0, 3))
def test_an_epoch_visits_blocks_that_do_not_overlap_each_once(N: int, T: int, B: int, seed: int) -> None:
    T = min(T, N - 1)
    data = BlockDataset(torch.arange(N), T)
    order = EpochOrder(data, B, seed)
    starts = torch.cat([order.starts(i) for i in range(3 * order.blocks)])
    assert starts.min() >= 0
    assert starts.max() < len(data)
    for epoch in range(3):
        visited = sorted(starts[epoch * order.blocks : (epoch + 1) * order.blocks].tolist())
        assert [start - visited[0] for start in visited] == [i * T for i in range(order.blocks)]
        assert N - order.blocks * T < 2 * T + max(1, N - 2 * T) * (order.blocks == 1)


@settings(deadline=None, max_examples=30)
@given(batch=st.integers(0, 40), B=st.integers(1, 20))
def test_a_batch_is_the_same_whatever_was_asked_before(batch: int, B: int) -> None:
    data = BlockDataset(torch.arange(100), 8)
    walked = EpochOrder(data, B, 5)
    for earlier in range(batch):
        walked.starts(earlier)
    assert torch.equal(walked.starts(batch), EpochOrder(data, B, 5).starts(batch))


def test_epochs_and_seeds_differ_in_offset_and_order() -> None:
    data = BlockDataset(torch.arange(1000), 10)
    order = EpochOrder(data, 99, 1)
    assert order.blocks == 99
    epochs = [order.starts(i) for i in range(20)]
    assert len({int(starts[0]) % 10 for starts in epochs}) > 4
    assert len({tuple((starts // 10).tolist()) for starts in epochs}) == 20
    assert not torch.equal(epochs[0], EpochOrder(data, 99, 2).starts(0))


def test_a_run_in_epochs_sees_every_block_once() -> None:
    train, _ = tiny_split()
    blocks = EpochOrder(train, 1, 0).blocks
    seen: list[list[int]] = []

    class Spy(BigramLM):
        def forward(self, idx, targets=None, *, cache=None):  # type: ignore[no-untyped-def]
            seen.extend(idx.tolist())
            return super().forward(idx, targets, cache=cache)

    config = quick_config(max_steps=blocks, batch_size=1, accumulate=1, replacement=False)
    Trainer(Spy(TOKENIZER.vocab_size), train, config, device="cpu").fit()
    order = EpochOrder(train, 1, config.seed)
    expected = [train[int(order.starts(i))][0].tolist() for i in range(blocks)]
    assert seen == expected


@settings(deadline=None, max_examples=50)
@given(count=st.integers(1, 3_000), seed=st.integers(0, 2**62))
def test_a_computed_order_visits_each_number_once(count: int, seed: int) -> None:
    found = permuted(np.arange(count), count, seed)
    assert sorted(found.tolist()) == list(range(count))
    assert np.array_equal(permuted(np.arange(count)[::-1], count, seed)[::-1], found)


@settings(deadline=None, max_examples=30)
@given(count=st.integers(2**20, 2**40), seed=st.integers(0, 2**62), data=st.data())
def test_a_computed_order_of_many_stays_among_them_and_differs(
    count: int, seed: int, data: st.DataObject
) -> None:
    places = np.array(data.draw(st.lists(st.integers(0, count - 1), min_size=1, unique=True)))
    found = permuted(places, count, seed)
    assert len(set(found.tolist())) == len(places)
    assert 0 <= found.min() <= found.max() < count


def test_a_computed_order_is_spread_evenly() -> None:
    """In 64 equal parts of a million numbers, the first 64,000 visited lie as chance has it (chi-squared)."""
    found = permuted(np.arange(64_000), 1_000_003, 5)
    seen = np.bincount(found * 64 // 1_000_003, minlength=64)
    assert ((seen - 1_000) ** 2 / 1_000).sum() < 130  # 63 expected; beyond 130 with a chance of 1e-6
    again = np.bincount(permuted(np.arange(64_000), 1_000_003, 6) * 64 // 1_000_003, minlength=64)
    assert not np.array_equal(seen, again)


def test_the_number_of_blocks_alone_decides_how_the_order_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    data = BlockDataset(torch.arange(1000), 10)
    listed = [EpochOrder(data, 7, 1).starts(i).tolist() for i in range(20)]
    monkeypatch.setattr("charlm.data.order._MOST_LISTED", 98)  # there are 99
    computed = [EpochOrder(data, 7, 1).starts(i).tolist() for i in range(20)]
    assert computed != listed
    for starts in (listed, computed):
        visited = [start for batch in starts for start in batch][:99]
        assert sorted(start // 10 for start in visited) == list(range(99))
    monkeypatch.setattr("charlm.data.order._MOST_LISTED", 99)
    assert [EpochOrder(data, 7, 1).starts(i).tolist() for i in range(20)] == listed
