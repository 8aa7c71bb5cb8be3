"""Epochs: what they visit, and that they are known without what came before."""

from __future__ import annotations

import torch
from harness.tiny_training import TOKENIZER, quick_config, tiny_split
from hypothesis import given, settings
from hypothesis import strategies as st

from charlm import BigramLM, BlockDataset, Trainer
from charlm.data.order import EpochOrder


@settings(deadline=None, max_examples=200)
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


@settings(deadline=None, max_examples=50)
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
