"""Options of `generate` and `stream` that are wrong, and models that cannot predict."""

from __future__ import annotations

import copy
import dataclasses
import functools
import math
import pickle
from collections.abc import Callable
from typing import Any, cast, get_args

import pytest
import torch
from harness.tiny_models import MODELS, prompt, tiny_config, tiny_gpt

from charlm import BigramLM, CharLM, CharTokenizer
from charlm.errors import InputError, NonFiniteError
from charlm.generation import Overflow, Sampling, SamplingOptions

W = 16
NAN = math.nan
OVERFLOWS: tuple[Overflow, ...] = get_args(Overflow)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize(
    "options", [{"seed": 0}, {"temperature": 0}, {"seed": 0, "top_k": 3, "top_p": 0.5, "min_p": 0.1}]
)
def test_weights_that_are_not_finite_are_an_error_that_says_so(value: float, options: dict[str, Any]) -> None:
    model = tiny_gpt(tiny_config())
    with torch.no_grad():
        assert model.lm_head.bias is not None
        model.lm_head.bias[4] = value
    with pytest.raises(
        NonFiniteError, match=r"no token can be drawn in row 0: its largest logit is (nan|inf)"
    ):
        model.generate(prompt(2, 3), 5, **options)


def test_nan_in_the_stream_stops_it_at_that_step() -> None:
    model = tiny_gpt(tiny_config())
    stream = model.stream(prompt(2, 3), 5, seed=0)
    next(stream)
    with torch.no_grad():
        model.lm_head.weight.fill_(float("nan"))
    with pytest.raises(NonFiniteError):
        next(stream)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_models_generate(dtype: torch.dtype) -> None:
    model = tiny_gpt(tiny_config("cpu-1min"), dtype=dtype)
    choices: list[dict[str, Any]] = [{"temperature": 1e-3}, {"top_p": 0.9, "min_p": 0.01}]
    for options in choices:
        ids = model.generate(prompt(2, 3), 2 * W, seed=0, overflow="restart", **options)
        assert ids.shape == (2, 3 + 2 * W)


BAD_OPTIONS: list[tuple[str, object, str]] = [
    *(("temperature", bad, "0, or from 1e-6 to 1e6") for bad in (-1.0, NAN, math.inf, True, "1", 1e-9, 1e9)),
    *(("top_k", bad, "an int, 1 or more, or None") for bad in (0, -1, 2.0, True, "5", [1], -(10**400))),
    *(("top_p", bad, "above 0 and at most 1, or None") for bad in (0, 0.0, -0.1, 1.1, NAN, "0.9", True)),
    *(("min_p", bad, "from 0 to 1, or None") for bad in (-0.1, 1.1, NAN, "0.1", False)),
    *(("seed", bad, "an int of at most 64 bits, or None") for bad in (1.0, "1", True, 10**30)),
    *(("use_cache", bad, "True or False") for bad in (1, None, "yes")),
    *(("overflow", bad, "'slide' or 'restart'") for bad in ("crop", None, 1, ["slide"])),
    *(("filters", bad, "a sequence of functions") for bad in (5, [5], None, "ab")),
]  # fmt: skip


@pytest.mark.parametrize(("name", "value", "wanted"), BAD_OPTIONS, ids=lambda x: repr(x)[:30])
def test_a_bad_option_is_an_input_error_before_the_first_step(name: str, value: Any, wanted: str) -> None:
    model = MODELS["bigram"](torch.float32)
    options: dict[str, Any] = {"seed": 0, name: value}
    with pytest.raises(InputError, match=f"^{name} must be {wanted}, got "):
        model.stream(prompt(1, 3), 5, **options)
    with pytest.raises(InputError, match=f"^{name} must be {wanted}, got "):
        model.generate(prompt(1, 3), 0, **options)


def test_all_bad_options_are_listed() -> None:
    with pytest.raises(InputError, match=r"temperature must be .*; top_k must be .*; overflow must be "):
        SamplingOptions(temperature=-1, top_k=0, overflow="x")  # type: ignore[arg-type]  # the point


@pytest.mark.parametrize(
    ("option", "hint"),
    [("topk", "did you mean 'top_k'?"), ("zzz", "the options are temperature, top_k, ")],
)
def test_an_unknown_option_is_a_type_error_that_names_the_likely_right_one(option: str, hint: str) -> None:
    """Wherever options are taken; and it hides no bad value."""
    options: dict[str, Any] = {option: 1.0, "temperature": -1}
    ways: dict[str, Callable[[], object]] = {
        name: functools.partial(method, prompt(1, 3), 5)
        for kind in MODELS
        for name, method in {
            f"{kind} generates": MODELS[kind](torch.float32).generate,
            f"{kind} streams": MODELS[kind](torch.float32).stream,
        }.items()
    }
    lm = CharLM(BigramLM(3), CharTokenizer("abc"))
    ways |= {"texts": functools.partial(lm.generate, "a"), "pieces": functools.partial(lm.stream, "a")}
    ways |= {
        "options": SamplingOptions,
        "keywords": lambda **given: SamplingOptions.from_keywords(cast("Sampling", given)),
    }
    for name, way in ways.items():
        with pytest.raises(TypeError) as caught:
            way(**options)
        assert str(caught.value).startswith(f"unknown option '{option}'; {hint}"), name
        assert "; temperature must be 0, or from" in str(caught.value), name


def test_an_unknown_option_may_be_meant_as_another_argument() -> None:
    lm = CharLM(BigramLM(3), CharTokenizer("abc"))
    for given, meant in (("max_tokens", "max_new_tokens"), ("keepstop", "keep_stop")):
        options: dict[str, Any] = {given: 1}
        with pytest.raises(TypeError, match=f"did you mean '{meant}'"):
            lm.generate("a", **options)


def test_options_are_copied_and_pickled() -> None:
    options = SamplingOptions(top_k=3, seed=5)
    assert (
        copy.copy(options) == pickle.loads(pickle.dumps(options)) == dataclasses.replace(options) == options
    )


@pytest.mark.parametrize("seed", [0, -1, 2**63, 2**64 - 1, -(2**64) + 1])
def test_any_seed_of_64_bits_can_be_used(seed: int) -> None:
    assert MODELS["bigram"](torch.float32).generate(prompt(1, 3), 5, seed=seed).shape == (1, 8)


def test_filters_of_the_caller_s_need_the_text() -> None:
    options = SamplingOptions(filters=[lambda logits, _: logits])
    with pytest.raises(InputError, match="ids must be given: filters are shown the texts so far"):
        options.filter(torch.zeros(1, 3))
    assert options.filter(torch.zeros(1, 3), torch.tensor([[1]])).tolist() == [[0, 0, 0]]
    assert SamplingOptions().filter(torch.zeros(1, 3)).tolist() == [[0, 0, 0]]
