"""BlockDataset against plain slicing."""

from __future__ import annotations

import math
import pickle
import re
from collections.abc import Iterator
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.data import DataLoader, RandomSampler

from charlm.data.blocks import BlockDataset
from charlm.errors import CharLMError, DataError, InputError, UnknownCharacterError
from charlm.text.tokenizer import ByteTokenizer, CharTokenizer

TEXT = "It starts where the lecture starts, and ends as a library.\n" * 3


@st.composite
def rows(draw: st.DrawFn) -> tuple[list[int], int]:
    """Return ids and a block_size that fits them."""
    ids = draw(st.lists(st.integers(0, 300), min_size=2, max_size=40))
    return ids, draw(st.integers(1, len(ids) - 1))


@settings(max_examples=50, deadline=None)
@given(rows())
def test_every_item_is_a_slice_and_the_slice_one_to_the_right(case: tuple[list[int], int]) -> None:
    ids, T = case
    data = BlockDataset(np.array(ids), T)
    assert len(data) == len(ids) - T
    for start in range(-len(data), len(data)):
        x, y = data[start]
        s = start % len(data)
        assert (x.dtype, y.dtype) == (torch.int64, torch.int64)
        assert x.tolist() == ids[s : s + T]
        assert y.tolist() == ids[s + 1 : s + T + 1]
    for start in (len(data), -len(data) - 1):
        with pytest.raises(IndexError, match=f"start {start} is out of range for {len(data)} blocks"):
            data[start]


def test_a_dataset_can_be_iterated_over() -> None:
    items = list(BlockDataset(torch.arange(7), 3))  # type: ignore[call-overload]  # by __getitem__ alone
    assert [x.tolist() for x, _ in items] == [[0, 1, 2], [1, 2, 3], [2, 3, 4], [3, 4, 5]]


@settings(max_examples=50, deadline=None)
@given(rows(), st.integers(1, 9), st.integers(0, 2**32))
def test_sample_batch_draws_starts_as_the_lecture_does(
    case: tuple[list[int], int], B: int, seed: int
) -> None:
    ids, T = case
    generator = torch.Generator().manual_seed(seed)
    starts = torch.randint(len(ids) - T, (B,), generator=torch.Generator().manual_seed(seed)).tolist()
    x, y = BlockDataset(np.array(ids), T).sample_batch(B, generator=generator)
    assert (x.dtype, y.dtype) == (torch.int64, torch.int64)
    assert x.tolist() == [ids[s : s + T] for s in starts]
    assert y.tolist() == [ids[s + 1 : s + T + 1] for s in starts]


def test_without_a_generator_torchs_global_one_is_used() -> None:
    data = BlockDataset(torch.arange(100), 5)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        from_global = data.sample_batch(4)
    given_one = data.sample_batch(4, generator=torch.Generator().manual_seed(3))
    assert torch.equal(from_global[0], given_one[0])


def test_with_a_generator_the_global_one_is_left_alone() -> None:
    before = torch.get_rng_state()
    BlockDataset(torch.arange(100), 5).sample_batch(4, generator=torch.Generator())
    assert torch.equal(torch.get_rng_state(), before)


def test_gathered_blocks_are_the_items_in_the_order_asked_for() -> None:
    data = BlockDataset(torch.arange(300), 5)
    x, y = data.blocks_at(torch.tensor([294, 0, 7, 7]))
    assert x.tolist() == [data[s][0].tolist() for s in (294, 0, 7, 7)]
    assert y.tolist() == [data[s][1].tolist() for s in (294, 0, 7, 7)]
    assert (x.dtype, y.dtype) == (torch.int64, torch.int64)


def test_every_start_can_be_drawn() -> None:
    data = BlockDataset(torch.arange(8), 3)
    x, _ = data.sample_batch(500, generator=torch.Generator().manual_seed(0))
    assert sorted(set(x[:, 0].tolist())) == [0, 1, 2, 3, 4]


def all_batches(data: BlockDataset) -> Iterator[tuple[Tensor, Tensor]]:
    yield data[1]
    yield data.sample_batch(2)
    yield from data.blocks(2)


def test_who_changes_a_batch_changes_neither_its_targets_nor_the_text() -> None:
    data = BlockDataset(torch.arange(10), 4)
    for x, y in all_batches(data):
        before = y.clone()
        x.fill_(99)
        assert torch.equal(y, before)
    assert data.ids.tolist() == list(range(10))


@settings(max_examples=100, deadline=None)
@given(rows(), st.integers(1, 6))
def test_blocks_cover_every_target_exactly_once_and_in_order(case: tuple[list[int], int], B: int) -> None:
    ids, T = case
    inputs: list[int] = []
    targets: list[int] = []
    batches = list(BlockDataset(np.array(ids), T).blocks(B))
    for number, (x, y) in enumerate(batches):
        assert x.shape == y.shape
        assert (x.dtype, y.dtype) == (torch.int64, torch.int64)
        assert 1 <= x.size(0) <= B
        assert x.size(1) == T or (number == len(batches) - 1 and x.shape[0] == 1 and x.size(1) < T)
        inputs += x.flatten().tolist()
        targets += y.flatten().tolist()
    assert inputs == ids[:-1]
    assert targets == ids[1:]


@pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning")  # on machines with few cores
@pytest.mark.parametrize("workers", [0, 2, 4])
def test_a_data_loader_gives_the_same_batches_with_any_number_of_workers(workers: int) -> None:
    data = BlockDataset.from_text(TEXT, CharTokenizer.from_text(TEXT), 8)
    sampler = RandomSampler(data, generator=torch.Generator().manual_seed(5))
    loader = DataLoader(data, batch_size=32, sampler=sampler, num_workers=workers)
    order = list(RandomSampler(data, generator=torch.Generator().manual_seed(5)))
    ids = data.ids.tolist()
    seen = 0
    for x, y in loader:
        starts = order[seen : seen + 32]
        assert x.tolist() == [ids[s : s + 8] for s in starts]
        assert y.tolist() == [ids[s + 1 : s + 9] for s in starts]
        seen += len(starts)
    assert seen == len(data)


def test_a_pickled_dataset_is_the_same_and_no_larger_than_its_ids() -> None:
    data = BlockDataset(torch.arange(5000) % 200, 512)
    stored = pickle.dumps(data)
    assert len(stored) < 5000 + 1000
    again = pickle.loads(stored)
    assert (again.block_size, again.max_id) == (512, 199)
    assert torch.equal(again.ids, data.ids)
    assert torch.equal(again[7][1], data[7][1])
    first, _ = data.split(0.5)
    assert torch.equal(pickle.loads(pickle.dumps(first)).ids, first.ids)


@pytest.mark.parametrize(
    ("highest", "dtype"),
    [
        (2, torch.uint8),
        (255, torch.uint8),
        (256, torch.uint16),
        (65_535, torch.uint16),
        (65_536, torch.uint32),
        (2**32 - 1, torch.uint32),
    ],
)
@pytest.mark.parametrize("given_as", ["tensor", "array", "unsigned array"])
def test_ids_are_kept_in_the_smallest_type_that_holds_them(
    highest: int, dtype: torch.dtype, given_as: str
) -> None:
    array = np.array([0, highest, 1, 2], np.uint64 if given_as == "unsigned array" else np.int64)
    data = BlockDataset(torch.from_numpy(array) if given_as == "tensor" else array, 2)
    assert data.ids.dtype == dtype
    assert data.max_id == highest
    assert data[0][0].tolist() == [0, highest]
    assert data.sample_batch(3, generator=torch.Generator().manual_seed(0))[0].max() == highest
    assert [x.tolist() for x, _ in data.blocks(5)] == [[[0, highest]], [[1]]]


def test_arrays_of_any_layout_are_taken_without_a_warning() -> None:
    array = np.arange(20, dtype=np.uint8)
    locked = array.copy()
    locked.flags.writeable = False
    for ids in (
        array[::2],
        array[::-1],
        locked,
        array.astype(">i4"),
        np.frombuffer(bytes(range(20)), np.uint8),
    ):
        data = BlockDataset(ids, 3)
        assert data[0][0].tolist() == ids[:3].tolist()


def test_ids_from_text_are_the_tokenizers() -> None:
    tokenizer = CharTokenizer.from_text("hello")
    data = BlockDataset.from_text("hello", tokenizer, 2)
    assert data.ids.tolist() == tokenizer.encode("hello")
    assert BlockDataset.from_text("é", ByteTokenizer(), 1)[0][1].tolist() == [0xA9]
    with pytest.raises(UnknownCharacterError, match="w"):
        BlockDataset.from_text("world", tokenizer, 2)


@settings(max_examples=50, deadline=None)
@given(st.integers(4, 60), st.decimals("0.01", "0.99", places=4).map(float))
@example(100, 0.29)
def test_a_split_cuts_at_the_place_of_the_decimal(N: int, fraction: float) -> None:
    ids = list(range(N))
    cut = math.floor(Fraction(str(fraction)) * N)
    data = BlockDataset(torch.tensor(ids), 1)
    if min(cut, N - cut) < 2:
        with pytest.raises(DataError):
            data.split(fraction)
    else:
        first, second = data.split(fraction)
        assert first.ids.tolist() == ids[:cut]
        assert second.ids.tolist() == ids[cut:]
        assert first.max_id == cut - 1
        assert first.block_size == second.block_size == 1


def test_the_parts_of_a_split_share_the_ids_of_the_whole() -> None:
    data = BlockDataset(torch.arange(40), 2)
    first, second = data.split()
    assert first.ids.data_ptr() == data.ids.data_ptr()
    assert second.ids.data_ptr() == data.ids[36:].data_ptr()
    assert (len(first.ids), len(second.ids)) == (36, 4)


@pytest.mark.parametrize("block_size", [1, 2, 5, 8])
def test_every_length_gives_data_or_says_what_is_missing(block_size: int) -> None:
    for N in range(3 * block_size + 1):
        ids = torch.zeros(N, dtype=torch.long)
        if block_size >= N:
            number = f"{N} character{'s' * (N != 1)}"
            message = f"the text has {number}; block_size {block_size} needs at least {block_size + 1}"
            with pytest.raises(DataError, match=message):
                BlockDataset(ids, block_size)
            continue
        data = BlockDataset(ids, block_size)
        assert len(data) == N - block_size
        data[0], data.sample_batch(2), list(data.blocks(2))
        for fraction in (0.01, 0.5, 0.9, 0.99):
            cut = int(fraction * N)
            short = [
                (part, length)
                for part, length in (("first", cut), ("second", N - cut))
                if length <= block_size
            ]
            if not short:
                data.split(fraction)
                continue
            part, length = short[0]
            purpose = "training" if part == "first" else "validation"
            message = (
                f"the {part} part of the text (for {purpose}) has {length} "
                f"character{'s' * (length != 1)}; "
                f"block_size {block_size} needs at least {block_size + 1}: a block and the character "
                "after it. Use a longer text or a smaller block_size."
            )
            with pytest.raises(DataError, match=f"^{re.escape(message)}$"):
                data.split(fraction)


def test_a_text_that_is_too_short_for_a_block_is_refused_with_both_lengths() -> None:
    with pytest.raises(DataError, match="the text has 3 characters; block_size 8 needs at least 9"):
        BlockDataset(torch.zeros(3, dtype=torch.long), 8)


BAD_IDS: dict[str, tuple[object, type[CharLMError], str]] = {
    "list": ([1, 2, 3], InputError, "ids must be a tensor or an array, got list"),
    "text": ("abc", InputError, "ids must be a tensor or an array, got str"),
    "None": (None, InputError, "ids must be a tensor or an array, got NoneType"),
    "float": (torch.zeros(9), InputError, "got shape (9,) of torch.float32"),
    "bfloat16": (torch.zeros(9, dtype=torch.bfloat16), InputError, "got shape (9,) of torch.bfloat16"),
    "bool": (torch.zeros(9, dtype=torch.bool), InputError, "got shape (9,) of torch.bool"),
    "float array": (np.zeros(9), InputError, "got shape (9,) of float64"),
    "bool array": (np.zeros(9, bool), InputError, "got shape (9,) of bool"),
    "object array": (np.array(["a", 1], dtype=object), InputError, "got shape (2,) of object"),
    "matrix": (torch.zeros(3, 9, dtype=torch.long), InputError, "got shape (3, 9) of torch.int64"),
    "scalar": (torch.tensor(3), InputError, "got shape () of torch.int64"),
    "scalar array": (np.array(3), InputError, "got shape () of int64"),
    "meta": (torch.zeros(9, dtype=torch.long, device="meta"), InputError, "got a tensor on the meta device"),
    "negative": (torch.tensor([1, 2, -3, 4]), DataError, "ids must not be negative, got -3 at position 2"),
    "too large": (np.array([1, 2**32]), DataError, "ids must be below 2**32, got 4294967296"),
}


@pytest.mark.parametrize(("ids", "error", "message"), BAD_IDS.values(), ids=BAD_IDS.keys())
def test_what_is_no_row_of_ids_is_refused(ids: Any, error: type[CharLMError], message: str) -> None:
    with pytest.raises(error, match=re.escape(message)):
        BlockDataset(ids, 2)


@pytest.mark.parametrize("bad", [0, -1, True, 2.0, "8", None, np.float64(8), [8]])
def test_sizes_must_be_positive_ints(bad: Any) -> None:
    data = BlockDataset(torch.arange(9), 2)
    with pytest.raises(InputError, match="block_size must be an int, 1 or more, got "):
        BlockDataset(torch.arange(9), bad)
    with pytest.raises(InputError, match="batch_size must be an int, 1 or more, got "):
        data.sample_batch(bad)
    with pytest.raises(InputError, match="batch_size must be an int, 1 or more, got "):
        next(data.blocks(bad))


@pytest.mark.parametrize("bad", [0.0, 1.0, -0.5, 1, "0.9", float("nan"), float("inf")])
def test_a_fraction_must_lie_between_zero_and_one(bad: Any) -> None:
    with pytest.raises(InputError, match="fraction must be a number between 0 and 1, got "):
        BlockDataset(torch.arange(9), 2).split(bad)


def test_repr_says_how_long_the_text_is() -> None:
    assert repr(BlockDataset(torch.arange(9), 2)) == "BlockDataset(9 characters, block_size=2)"


def test_a_subclass_splits_into_its_own_kind() -> None:
    class Mine(BlockDataset):
        pass

    assert [type(part) for part in Mine(torch.arange(30), 2).split()] == [Mine, Mine]


def test_a_large_text_is_not_copied_by_its_windows() -> None:
    ids = np.zeros(1_000_000, np.uint8)
    data = BlockDataset(ids, 1000)
    assert data.ids.data_ptr() == ids.ctypes.data
    assert data.sample_batch(2)[0].shape == (2, 1000)


def test_batches_are_the_same_whatever_the_default_device_is() -> None:
    data = BlockDataset(torch.arange(16).repeat(8), 4)
    expected = data.sample_batch(5, generator=torch.Generator().manual_seed(3))
    with torch.device("meta"):
        drawn = data.sample_batch(5, generator=torch.Generator("cpu").manual_seed(3))
    for tensor, wanted in zip(drawn, expected, strict=True):
        assert torch.equal(tensor, wanted)


class Sub(BlockDataset):
    """Knows of no tokenizer."""

    def __init__(self, ids: Any, block_size: int) -> None:
        super().__init__(ids, block_size)


def test_a_subclass_need_not_know_of_tokenizers() -> None:
    tokenizer = CharTokenizer("abc")
    data = Sub.from_text("abcabcabc" * 3, tokenizer, 2)
    for part in (data, *data.split(0.5), pickle.loads(pickle.dumps(data))):
        assert type(part) is Sub
        assert part.tokenizer == tokenizer
    with pytest.raises(DataError, match="the text has 4 bytes"):
        Sub.from_text("aaaa", ByteTokenizer(), 4)
