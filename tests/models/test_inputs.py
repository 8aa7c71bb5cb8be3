"""What models say to ids and targets of the wrong type, shape, range, length or device."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from harness.tiny_models import tiny_config
from torch import Tensor, nn

from charlm.errors import CharLMError, InputError
from charlm.generation import Cache
from charlm.models.base import LanguageModel, cross_entropy
from charlm.models.bigram import BigramLM
from charlm.models.config import ModelConfig
from charlm.models.gpt import GPT
from charlm.models.ngram import NGramLM
from charlm.models.registry import class_of, known_kinds

MODELS: dict[str, Callable[[], LanguageModel]] = {
    "gpt": lambda: GPT(tiny_config()),
    "rotary": lambda: GPT(tiny_config("cpu-1min")),
    "bigram": lambda: BigramLM(13),
}
GOOD = torch.zeros(2, 5, dtype=torch.long)


@pytest.fixture(params=MODELS)
def model(request: pytest.FixtureRequest) -> LanguageModel:
    return MODELS[request.param]()


BAD_IDX = {
    "a list": ([[1, 2]], "idx must be an int64 tensor, got list"),
    "None": (None, "idx must be an int64 tensor, got NoneType"),
    "text": ("hello", "idx must be an int64 tensor, got str"),
    "an array": (np.zeros((2, 5), np.int64), "idx must be an int64 tensor, got ndarray"),
    "int32": (GOOD.int(), "idx must be an int64 tensor, got torch.int32"),
    "uint8": (GOOD.byte(), "idx must be an int64 tensor, got torch.uint8"),
    "float": (GOOD.float(), "idx must be an int64 tensor, got torch.float32"),
    "bool": (GOOD.bool(), "idx must be an int64 tensor, got torch.bool"),
    "one row": (GOOD[0], "idx must have shape (B, T) with at least one row and one id, got (5,)"),
    "scalar": (GOOD[0, 0], "idx must have shape (B, T) with at least one row and one id, got ()"),
    "three dims": (GOOD[None], "idx must have shape (B, T) with at least one row and one id, got (1, 2, 5)"),
    "no rows": (GOOD[:0], "idx must have shape (B, T) with at least one row and one id, got (0, 5)"),
    "no ids": (GOOD[:, :0], "idx must have shape (B, T) with at least one row and one id, got (2, 0)"),
    "device": (GOOD.to("meta"), "idx must be on the model's device cpu, got meta"),
    "too large": (GOOD + 13, "idx must be from 0 to 12 (vocab_size 13), got 13 at row 0, column 0"),
    "negative": (GOOD - 1, "idx must be from 0 to 12 (vocab_size 13), got -1 at row 0, column 0"),
}


@pytest.mark.parametrize(("idx", "message"), BAD_IDX.values(), ids=BAD_IDX.keys())
def test_bad_ids_are_an_error_that_says_expected_and_got(
    model: LanguageModel, idx: Tensor, message: str
) -> None:
    for call in (
        lambda: model(idx),
        lambda: model(idx, GOOD),
        lambda: model.generate(idx, 3, seed=0),
        lambda: model.stream(idx, 3, seed=0),  # before its first step
    ):
        with pytest.raises(InputError, match=f"^{re.escape(message)}$") as caught:
            call()
        assert isinstance(caught.value, ValueError)


BAD_TARGETS = {
    "a list": ([[1, 2]], "targets must be an int64 tensor, got list"),
    "int32": (GOOD.int(), "targets must be an int64 tensor, got torch.int32"),
    "one row": (GOOD[0], "targets must have shape (B, T) with at least one row and one id, got (5,)"),
    "fewer rows": (GOOD[:1], "targets must have the shape of idx, (2, 5), got (1, 5)"),
    "longer": (torch.zeros(2, 6).long(), "targets must have the shape of idx, (2, 5), got (2, 6)"),
    "transposed": (torch.zeros(5, 2).long(), "targets must have the shape of idx, (2, 5), got (5, 2)"),
    "device": (GOOD.to("meta"), "targets must be on the model's device cpu, got meta"),
    "too large": (GOOD + 13, "targets must be from -1 to 12 (vocab_size 13), got 13 at row 0, column 0"),
    "below -1": (GOOD - 2, "targets must be from -1 to 12 (vocab_size 13), got -2 at row 0, column 0"),
}


@pytest.mark.parametrize(("targets", "message"), BAD_TARGETS.values(), ids=BAD_TARGETS.keys())
def test_bad_targets_are_an_error_that_says_expected_and_got(
    model: LanguageModel, targets: Tensor, message: str
) -> None:
    with pytest.raises(InputError, match=f"^{re.escape(message)}$"):
        model(GOOD, targets)


def test_the_message_names_the_place_of_an_id_out_of_range(model: LanguageModel) -> None:
    idx = GOOD.clone()
    idx[1, 3] = 99
    with pytest.raises(InputError, match="got 99 at row 1, column 3"):
        model(idx)
    with pytest.raises(InputError, match="got 99 at row 1, column 3"):
        model(GOOD, idx)


@pytest.mark.parametrize("preset", ["lecture", "cpu-10s"])
@pytest.mark.parametrize("T", [17, 40])
def test_ids_beyond_the_window_are_an_error_that_says_what_to_do(preset: Any, T: int) -> None:
    model = GPT(tiny_config(preset))
    message = (
        f"idx must have at most block_size = 16 ids a row, got {T}. "
        "Keep the last ones: idx[:, -model.block_size:]"
    )
    with pytest.raises(InputError, match=f"^{re.escape(message)}$"):
        model(torch.zeros(1, T, dtype=torch.long))


def test_ids_beyond_the_window_count_those_in_the_cache() -> None:
    model = GPT(tiny_config())
    with torch.no_grad():
        cache = model.new_cache()
        model(GOOD, cache=cache)
        with pytest.raises(InputError, match="got 12 and 5 in the cache"):
            model(torch.zeros(2, 12, dtype=torch.long), cache=cache)
        assert cache.length == 5
        model(torch.zeros(2, 11, dtype=torch.long), cache=cache)


@pytest.mark.parametrize("rows", [1, 3])
def test_a_cache_refuses_another_number_of_rows(rows: int) -> None:
    model = GPT(tiny_config())
    with torch.no_grad():
        cache = model.new_cache()
        model(GOOD, cache=cache)
        with pytest.raises(InputError, match=f"as many rows as the cache, 2, got {rows}"):
            model(torch.zeros(rows, 1, dtype=torch.long), cache=cache)


@pytest.mark.parametrize("count", [-1, True, 2.0, "3", None, pytest.param(-(10**5000), id="huge")])
def test_a_bad_number_of_new_ids_is_an_error(model: LanguageModel, count: int) -> None:
    with pytest.raises(InputError, match="max_new_tokens must be an int, 0 or more, got "):
        model.generate(GOOD, count)


def test_logits_always_have_the_shape_b_t_v(model: LanguageModel) -> None:
    assert model(GOOD)[0].shape == (2, 5, 13)
    assert model(GOOD)[1] is None
    logits, loss = model(GOOD, GOOD)
    assert logits.shape == (2, 5, 13)
    assert loss.shape == ()


def test_targets_of_minus_one_do_not_count(model: LanguageModel) -> None:
    model.eval()
    targets = torch.arange(10).view(2, 5)
    masked = targets.clone()
    masked[0] = -1
    assert model(GOOD, masked)[1].item() == pytest.approx(model(GOOD[1:], targets[1:])[1].item(), rel=1e-6)
    assert torch.isnan(model(GOOD, torch.full_like(GOOD, -1))[1])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_loss_of_half_precision_logits_is_computed_in_float32(dtype: torch.dtype) -> None:
    logits = torch.randn(2, 5, 13, generator=torch.Generator().manual_seed(0)).to(dtype)
    targets = torch.arange(10).view(2, 5)
    loss = cross_entropy(logits, targets)
    assert loss.dtype == torch.float32
    assert torch.equal(loss, cross_entropy(logits.float(), targets))


def test_hooks_of_torch_still_run(model: LanguageModel) -> None:
    seen: list[str] = []
    model.register_forward_pre_hook(lambda *_: seen.append("before"))
    model.register_forward_hook(lambda *_: seen.append("after"))
    model(GOOD)
    assert seen == ["before", "after"]


class Broken(BigramLM):
    """A model of a user's with a mistake of its own."""

    def forward(
        self, idx: Tensor, targets: Tensor | None = None, *, cache: Cache | None = None
    ) -> tuple[Tensor, Tensor | None]:
        raise IndexError("a mistake of the model's own")


def test_an_index_error_of_the_model_itself_is_not_hidden() -> None:
    with pytest.raises(IndexError, match="a mistake of the model's own") as caught:
        Broken(13)(GOOD, GOOD)
    assert not isinstance(caught.value, CharLMError)
    with pytest.raises(IndexError, match="a mistake of the model's own"):
        Broken(13)(GOOD)


class Uniform(LanguageModel):
    """The smallest model that a user can write: without a cache, a window or a `kind`."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.level = nn.Parameter(torch.zeros(()))

    @classmethod
    def from_config(cls, config: ModelConfig) -> Uniform:
        return cls(config)

    def forward(
        self, idx: Tensor, targets: Tensor | None = None, *, cache: Cache | None = None
    ) -> tuple[Tensor, Tensor | None]:
        self._check_idx(idx, targets)
        logits = self.level.expand(*idx.shape, self.vocab_size)
        return logits, None if targets is None else cross_entropy(logits, targets)


def test_a_model_of_ones_own_generates_without_a_cache() -> None:
    model = Uniform.from_config(ModelConfig(vocab_size=13))
    assert model.new_cache() is None
    assert model.block_size is None
    assert model.generate(GOOD, 20, seed=0).shape == (2, 25)
    assert Uniform not in map(class_of, known_kinds())
    with pytest.raises(NotImplementedError, match="ModelConfig must say how many parameters"):
        model.config.num_parameters()


def test_shipped_models_are_known_by_kind() -> None:
    assert class_of("gpt") is GPT
    assert class_of("bigram") is BigramLM
    assert class_of("ngram") is NGramLM
    assert known_kinds()[:4] == ["bigram", "gpt", "mixture", "ngram"]
