"""`why_not_native`: every reason for which a model generates in PyTorch, in words."""

from __future__ import annotations

import shutil
from collections.abc import Callable

import pytest
import torch
from harness.drawn_models import needs_kernel
from harness.tiny_models import prompt, tiny_config, tiny_gpt
from torch import nn

from charlm import BigramLM, NGramLM
from charlm.models.gpt import GPT
from charlm.native import library as native


class Mine(GPT):
    """A subclass, which may have a `forward` of its own."""


def hooked(model: GPT) -> None:
    model.lm_head.register_forward_hook(lambda *_: None)


def replaced(model: GPT) -> None:
    model.transformer.h[1] = nn.Identity()


def on_another_device(model: GPT) -> None:
    model.to("meta")


def of_two_types(model: GPT) -> None:
    model.lm_head.double()


def transposed(model: GPT) -> None:
    model.lm_head.weight.data = model.lm_head.weight.data.t().contiguous().t()


CHANGES: list[tuple[Callable[[GPT], object], str]] = [
    (lambda model: model.double(), "its weights are torch.float64, and not all float32 or all bfloat16"),
    (of_two_types, "its weights are torch.float32, and not all float32 or all bfloat16"),
    (on_another_device, "the model lies on meta"),
    (lambda model: model.lm_head.to("meta"), "the model lies on meta"),  # a part of it
    (transposed, "a weight is no plain tensor, contiguous and made outside of inference mode"),
    (hooked, "a part of the model was changed: lm_head"),
    (replaced, "a part of the model was changed: transformer.h.1"),
    (
        lambda model: model.register_forward_hook(lambda *_: None),
        "a part of the model was changed: the model itself",
    ),
]


@needs_kernel
@pytest.mark.parametrize(("change", "reason"), CHANGES, ids=range(len(CHANGES)))
def test_what_keeps_a_model_from_the_compiled_engine_is_named(
    change: Callable[[GPT], object], reason: str
) -> None:
    model = tiny_gpt(tiny_config(tie_weights=False))
    assert model.why_not_native() is None
    change(model)
    assert model.why_not_native() == reason


@needs_kernel
def test_where_the_call_stands_may_be_a_reason() -> None:
    model = tiny_gpt(tiny_config())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert model.why_not_native() == "autocast is on"
    handle = nn.modules.module.register_module_forward_hook(lambda *_: None)
    try:
        assert model.why_not_native() == "there are hooks on all modules"
    finally:
        handle.remove()
    assert model.why_not_native() is None
    wide = tiny_gpt(tiny_config("cpu-1min", block_size=100_000))
    assert wide.why_not_native() == "its window is longer than 65,536"


@needs_kernel
def test_models_of_other_kinds_say_so() -> None:
    assert BigramLM(5).why_not_native() == "there is no compiled engine for a BigramLM"
    assert Mine(tiny_config()).why_not_native() == "there is no compiled engine for a Mine"
    ngram = NGramLM(5)
    assert ngram.why_not_native() is None
    assert ngram.double().why_not_native() == "its tables are not as `fit` makes them on a CPU"


@pytest.mark.parametrize("make", [lambda: tiny_gpt(tiny_config()), lambda: NGramLM(5)], ids=["gpt", "ngram"])
def test_without_the_library_its_own_reason_is_given(
    make: Callable[[], GPT | NGramLM], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(native, "_tried", [])
    monkeypatch.setenv("CHARLM_NATIVE", "0")
    assert make().why_not_native() == "the environment variable CHARLM_NATIVE is 0"
    monkeypatch.delenv("CHARLM_NATIVE")
    monkeypatch.delenv("CC", raising=False)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "which", lambda name: None)
        found = make().why_not_native()
    assert found == "no C compiler was found (cc, gcc or clang)"
    monkeypatch.setattr(native, "_tried", [])
    monkeypatch.setattr(native, "_compiler", lambda: ["/nonexistent/compiler"])
    assert str(make().why_not_native()).startswith("it could not be compiled: ")


def test_asking_draws_no_random_number_and_changes_no_weight() -> None:
    model = tiny_gpt(tiny_config(n_embd=48))  # of settings that were not asked about before
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    before = torch.get_rng_state()
    model.why_not_native()
    model.generate(prompt(1, 3), 5, seed=0)
    assert torch.equal(torch.get_rng_state(), before)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, weights[name])
