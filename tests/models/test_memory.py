"""A model that cannot fit is refused before anything of it is allocated."""

from __future__ import annotations

import re

import pytest
import torch
from torch._subclasses import FakeTensorMode

from charlm import GPT, BigramLM, CharLMError, GPTConfig
from charlm.backends.base import MemoryStats
from charlm.backends.cpu import CPUBackend
from charlm.errors import NotEnoughMemoryError
from charlm.models.config import BigramConfig
from charlm.models.memory import check_fits

V = 1_114_112  # a table of V x V would take 5 TB


def give(monkeypatch: pytest.MonkeyPatch, free: int | None) -> None:
    """Let the machine have that much memory; None: it does not tell."""
    stats = None if free is None else MemoryStats(allocated=0, peak=0, total=free)
    monkeypatch.setattr(CPUBackend, "memory", lambda self: stats)


def test_a_table_that_is_too_large_is_refused_with_the_sizes_and_the_field_to_reduce() -> None:
    before = CPUBackend().memory()
    with pytest.raises(NotEnoughMemoryError) as caught:
        BigramLM(V)
    after = CPUBackend().memory()
    assert isinstance(caught.value, MemoryError)
    assert isinstance(caught.value, CharLMError)
    assert re.fullmatch(
        r"the model's 1,241,245,548,544 parameters must fit into the memory that is available, \S+ [MGT]B, "
        r"but take 4\.96 TB\. Reduce vocab_size\.",
        str(caught.value),
    )
    assert caught.value.needed_bytes == 4 * V * V
    assert before is not None
    assert after is not None
    assert after.peak - before.peak < 2**30


def test_the_weights_may_take_all_that_is_available_and_no_byte_more(monkeypatch: pytest.MonkeyPatch) -> None:
    give(monkeypatch, 4 * 100)
    BigramLM(10)
    give(monkeypatch, 4 * 100 - 1)
    with pytest.raises(NotEnoughMemoryError, match="available, 399 B, but take 400 B"):
        BigramLM(10)
    give(monkeypatch, None)
    BigramLM(10)


def test_weights_of_the_default_type_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    give(monkeypatch, 8 * 100 - 1)
    before = torch.get_default_dtype()
    try:
        torch.set_default_dtype(torch.float64)
        with pytest.raises(NotEnoughMemoryError, match="take 800 B"):
            check_fits(BigramConfig(vocab_size=10))
    finally:
        torch.set_default_dtype(before)


def test_a_gpt_that_is_too_large_is_told_what_makes_it_so() -> None:
    config = GPTConfig(vocab_size=65, n_layer=256, n_embd=65_536, n_head=64)
    with pytest.raises(NotEnoughMemoryError, match=r"but take 52\.8 TB\. Reduce n_embd or n_layer\."):
        check_fits(config)


def test_on_the_meta_device_a_model_of_any_size_can_be_built() -> None:
    with torch.device("meta"):
        assert BigramLM(V).num_parameters() == V * V
    with FakeTensorMode():
        assert BigramLM(V).num_parameters() == V * V


def test_a_gpt_is_refused_before_its_first_layer_is_made() -> None:
    with pytest.raises(NotEnoughMemoryError, match=r"Reduce n_embd or n_layer"):
        GPT.from_config("lecture", vocab_size=65, n_layer=256, n_embd=65_536, n_head=64)
    with torch.device("meta"):
        GPT.from_config("lecture", vocab_size=65, n_layer=1, n_embd=65_536, n_head=64, block_size=2**20)
