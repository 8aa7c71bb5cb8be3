"""Documents: no block over a border, shares by weight, whole evaluations, and the same on any way there."""

from __future__ import annotations

import pickle
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from harness.far_backend import FarBackend
from hypothesis import given, settings
from hypothesis import strategies as st

from charlm import BigramLM, BlockDataset, CharTokenizer
from charlm.data import order
from charlm.data.batches import DeviceBatches
from charlm.data.documents import FEW, Documents
from charlm.data.order import DocumentOrder, EpochOrder, order_of
from charlm.data.prepare import prepare_corpus
from charlm.errors import DataError, InputError
from charlm.evaluation import evaluate

T = 4
LETTERS = CharTokenizer("abcdefghijklmnopqrstuvwxyz")


def documents_of(
    lengths: Sequence[int], weights: Sequence[float] | None = None, block: int = T
) -> BlockDataset:
    """Return documents in which each id stands for the number of its document."""
    ids = np.repeat(np.arange(len(lengths)), lengths)
    return BlockDataset(ids, block, documents=Documents.of(lengths, weights))


def one_document(x: torch.Tensor, y: torch.Tensor) -> bool:
    """Return whether each row of a batch comes from one document."""
    return bool((x == x[:, :1]).all() and (y == x[:, :1]).all())


lengths_of = st.lists(st.integers(1, 40), min_size=1, max_size=30).filter(lambda ns: max(ns) > T)


@settings(max_examples=30, deadline=None)
@given(lengths_of, st.integers(0, 5), st.data())
def test_no_block_reaches_over_a_border(lengths: list[int], seed: int, data: st.DataObject) -> None:
    weights = data.draw(st.lists(st.floats(0.1, 9), min_size=len(lengths), max_size=len(lengths)))
    texts = documents_of(lengths, weights)
    assert one_document(*texts.sample_batch(50, generator=torch.Generator().manual_seed(seed)))
    blocks = order_of(texts, 8, seed)
    for batch in range(5):
        assert one_document(*texts.blocks_at(blocks.starts(batch)))
    assert all(one_document(x[None], y[None]) for x, y in (texts[i] for i in range(len(texts))))
    assert len(texts) == sum(max(n - T, 0) for n in lengths)


@settings(max_examples=30, deadline=None)
@given(lengths_of, st.integers(1, 12), st.integers(1, 20))
def test_an_evaluation_scores_every_id_but_the_first_of_each_document_once(
    lengths: list[int], batch_size: int, most: int
) -> None:
    offsets = np.cumsum([0, *lengths])
    ids = torch.arange(int(offsets[-1]))
    texts = BlockDataset(ids, T, documents=Documents.of(lengths))
    scored: Counter[int] = Counter()
    for x, y in texts.blocks(batch_size):
        assert x.shape[0] <= batch_size
        assert torch.equal(y, x + 1)
        scored.update(y.flatten().tolist())
    firsts = set(offsets[:-1].tolist())
    assert scored == {i: 1 for i in ids.tolist() if i not in firsts}
    assert texts.n_targets == len(scored)
    some = [y for _, y in texts.blocks(batch_size, most=most)]
    windows = sum(-(-(n - 1) // T) for n in lengths)
    assert sum(len(y) for y in some) == min(most, windows)
    assert max(Counter(torch.cat([y.flatten() for y in some]).tolist()).values()) == 1


def test_the_loss_of_documents_is_that_of_each_by_itself() -> None:
    model = BigramLM(26)
    texts = ["abcabcabcab", "b", "zzzzyx", "hello"]
    whole = evaluate(model, BlockDataset.from_texts(texts, LETTERS, T))
    alone = [
        evaluate(model, BlockDataset.from_text(text, LETTERS, min(T, len(text) - 1)))
        for text in texts
        if len(text) > 1
    ]
    assert whole.n_chars == sum(result.n_chars for result in alone) == 10 + 5 + 4
    nats = sum(result.loss_nats * result.n_chars for result in alone)
    assert whole.loss_nats == pytest.approx(nats / whole.n_chars, rel=1e-6)
    part = evaluate(model, BlockDataset.from_texts(texts, LETTERS, T), max_chars=9)
    assert part.n_chars + part.n_left_out == whole.n_chars


@pytest.mark.parametrize("weights", [[1, 1, 1], [1, 2, 1], [1, 0.5, 3.3], [7, 1, 0.01]])
@pytest.mark.parametrize("replacement", [False, True])
def test_shares_are_those_of_the_weights(weights: list[float], replacement: bool) -> None:
    lengths = [4_001, 2_001, 8_001]
    texts, draws = documents_of(lengths, weights), 100_000
    if replacement:
        starts = texts._draw_starts(draws, torch.Generator().manual_seed(1))
    else:
        blocks = DocumentOrder(texts, 1_000, seed=1)
        starts = torch.cat([blocks.starts(i) for i in range(draws // 1_000)])
    found = np.bincount(texts.blocks_at(starts)[0][:, 0].numpy(), minlength=3) / draws
    wanted = np.array(weights) * lengths / np.dot(weights, lengths)
    assert np.abs(found - wanted).max() < 0.01


def test_an_epoch_shows_each_block_as_often_as_its_weight() -> None:
    texts = documents_of([41, 21, 9], [1, 2, 1])  # of 10, 5 and 2 blocks
    blocks = DocumentOrder(texts, 1, seed=3)
    assert blocks.blocks == 10 + 2 * 5 + 2
    starts = [int(blocks.starts(i)) for i in range(2 * blocks.blocks)]
    for epoch in (starts[: blocks.blocks], starts[blocks.blocks :]):
        seen = Counter(epoch)
        assert [seen[s] for s in range(0, 40, T)] == [1] * 10
        assert [seen[s] for s in range(41, 61, T)] == [2] * 5
        assert [seen[s] for s in range(62, 70, T)] == [1] * 2
    assert starts[: blocks.blocks] != starts[blocks.blocks :]


def test_a_part_of_a_weight_shows_other_blocks_in_each_epoch() -> None:
    blocks = DocumentOrder(documents_of([4_001, 401], [0.25, 1]), 1, seed=3)
    assert blocks.blocks == 250 + 100
    epochs = [{int(blocks.starts(i)) for i in range(e * 350, (e + 1) * 350)} for e in range(30)]
    large = [{start for start in epoch if start < 4_001} for epoch in epochs]
    assert {len(starts) for starts in large} == {250}
    assert len(set().union(*large)) > 990, "each block comes, sooner or later"


def test_a_batch_follows_from_seed_and_number_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    texts = documents_of([50, 7, 33, 18], [1, 2.5, 1, 1])
    first = [DocumentOrder(texts, 6, seed=5).starts(i) for i in range(40)]
    again = DocumentOrder(texts, 6, seed=5)
    assert all(torch.equal(again.starts(i), first[i]) for i in reversed(range(40)))
    other = DocumentOrder(pickle.loads(pickle.dumps(texts)), 6, seed=5)
    assert torch.equal(other.starts(7), first[7])
    assert not torch.equal(DocumentOrder(texts, 6, seed=6).starts(7), first[7])
    monkeypatch.setattr(order, "_MOST_LISTED", 3)  # as for a text of very many blocks
    long = DocumentOrder(texts, 6, seed=5)
    starts = torch.cat([long.starts(i) for i in range(40)])
    assert one_document(*texts.blocks_at(starts))
    count = long.blocks
    assert Counter(texts.blocks_at(starts[:count])[0][:, 0].tolist()) == Counter(
        texts.blocks_at(torch.cat(first)[:count])[0][:, 0].tolist()
    )


def test_batches_on_a_device_are_those_of_the_cpu() -> None:
    texts = documents_of([50, 3, 33], [1, 1, 2])
    there = DeviceBatches(texts, FarBackend())
    for seed in range(3):
        ours = texts.sample_batch(9, generator=torch.Generator().manual_seed(seed))
        theirs = there.sample(9, torch.Generator().manual_seed(seed))
        assert all(torch.equal(a, b.cpu()) for a, b in zip(ours, theirs, strict=True))
    pairs = zip(texts.blocks(3), there.blocks(3), strict=True)
    assert all(torch.equal(a[1], b[1].cpu()) for a, b in pairs)


def test_a_few_documents_are_each_cut_and_of_many_whole_ones_are_taken() -> None:
    few = documents_of([100, 10, 200])
    train, val = few.split(0.9)
    assert np.bincount(train.ids.numpy()).tolist() == [90, 9, 180]
    assert np.bincount(val.ids.numpy()).tolist() == [10, 1, 20]
    lengths = [10 + (7 * i) % 50 for i in range(10 * FEW)]
    many = documents_of(lengths)
    train, val = many.split(0.9)
    parts = [set(part.ids.tolist()) for part in (train, val)]
    assert not parts[0] & parts[1], "no document is in both"
    assert len(parts[1]) == FEW
    assert val.n_ids / many.n_ids == pytest.approx(0.1, abs=0.01)
    for part in (train, val):
        assert part.documents is not None
        assert part.documents.lengths.sum() == part.n_ids
        assert all(one_document(x, y) for x, y in part.blocks(5))


def test_what_is_set_aside_keeps_the_borders_and_the_weights() -> None:
    texts = documents_of([100, 60, 200], [1, 2, 3])
    rest, aside = texts.set_aside(40)
    for part in (rest, aside, texts.in_blocks_of(2)):
        assert part.documents is not None
        ids = part.ids.numpy()
        borders = part.documents.ends
        assert borders[-1] == part.n_ids
        for start, end, weight in zip(part.documents.starts, borders, part.documents.weights, strict=True):
            assert set(ids[start:end] + 1) == {weight}
    assert rest.n_ids + aside.n_ids == 360


def test_a_prepared_corpus_gives_the_same_batches_by_document(tmp_path: Path) -> None:
    texts = {"a": "abcdefghij" * 9, "b": "", "c": "xyz" * 20, "d": "k"}
    for name, text in texts.items():
        (tmp_path / f"{name}.txt").write_text(text, encoding="utf-8")
    prepare_corpus(sorted(tmp_path.glob("*.txt")), tmp_path / "data", shard_bytes=40)
    stored = BlockDataset.open(tmp_path / "data", T, by_document=True)
    assert stored.tokenizer is not None
    memory = BlockDataset.from_texts(list(texts.values()), stored.tokenizer, T)
    assert len(stored) == len(memory)
    for ours, theirs in zip(stored.split(0.8), memory.split(0.8), strict=True):
        assert torch.equal(ours.ids, theirs.ids)
        starts = order_of(theirs, 5, 1).starts(3)
        assert torch.equal(order_of(ours, 5, 1).starts(3), starts)
        assert torch.equal(ours.blocks_at(starts)[0], theirs.blocks_at(starts)[0])
        assert all(torch.equal(a[0], b[0]) for a, b in zip(ours.blocks(4), theirs.blocks(4), strict=True))


def test_without_documents_nothing_is_different() -> None:
    text = BlockDataset(torch.arange(100), T)
    assert type(order_of(text, 3, 1)) is EpochOrder
    assert text.n_targets == 99
    assert len(text) == 96


@pytest.mark.parametrize(
    ("texts", "weights", "message"),
    [
        (["", ""], None, "a document that is not empty"),
        ([], None, "a document that is not empty"),
        (["a", "b"], None, "no document has two characters"),
        (["ab", "cd"], [1], "one for each document, got 1 for 2"),
        (["ab", "cd"], [1, 0], "numbers from 1e-6 to 1e6, got 0"),
        (["ab", "cd"], [1, float("inf")], "numbers from 1e-6 to 1e6"),
        (["ab", "cd"], [1, 1e19], "numbers from 1e-6 to 1e6"),
        (["ab", "cd"], 5, "numbers, one for each document, got 5"),
        (["ab", "cd"], np.array([[1.0], [2.0]]), "numbers from 1e-6 to 1e6"),
        ("abcd", None, "texts must be a list of str"),
        ((text for text in ["ab", "cd"]), None, "texts must be a list of str"),
    ],
)
def test_what_is_no_document_is_refused(texts: Any, weights: Any, message: str) -> None:
    with pytest.raises((DataError, InputError), match=message):
        BlockDataset.from_texts(texts, LETTERS, T, weights=weights)


def test_documents_that_are_all_too_short_can_be_scored_but_not_trained_on() -> None:
    texts = BlockDataset.from_texts(["abc", "de"], LETTERS, T)
    assert evaluate(BigramLM(26), texts).n_chars == 3
    with pytest.raises(
        DataError, match="too short for a block of 4 and the character after it: the longest has 3"
    ):
        order_of(texts, 2, 1)
    with pytest.raises(DataError, match="the longest document has 3 characters; block_size 4 needs"):
        texts.sample_batch(2)
    with pytest.raises(InputError, match="documents must end with the ids, 5, got 4"):
        BlockDataset(torch.arange(5), 2, documents=Documents.of([4]))
    with pytest.raises(DataError, match="of 25 documents there must be one in each part, got all in one"):
        BlockDataset.from_texts(["abcdefgh"] * 25, LETTERS, T).split(0.99)
    with pytest.raises(DataError, match="a part of them has none"):
        BlockDataset.from_texts(["abcdefgh"], LETTERS, T).split(0.01)
