"""What generation leaves as it found it: generators, flags, gradient mode, the caller's tensors."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, get_args

import pytest
import torch
from harness.tiny_models import MODELS, prompt, tiny_config, tiny_gpt
from torch import Tensor, nn
from typing_extensions import override

from charlm.generation import Overflow
from charlm.models.gpt import GPT
from charlm.modes import evaluation_mode

W = 16
NAN = math.nan
OVERFLOWS: tuple[Overflow, ...] = get_args(Overflow)


def test_without_a_seed_torch_manual_seed_decides_by_one_draw() -> None:
    model = MODELS["lecture"](torch.float32)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(8)
        first = model.generate(prompt(2, 3), 20)
        after = torch.get_rng_state()
        torch.manual_seed(8)
        torch.randint(2**62, ())
        assert torch.equal(torch.get_rng_state(), after)
        torch.manual_seed(8)
        streamed = torch.stack(list(model.stream(prompt(2, 3), 20)), dim=1)
        assert torch.equal(torch.get_rng_state(), after)
        assert torch.equal(streamed, first[:, 3:])
        assert not torch.equal(model.generate(prompt(2, 3), 20), first)


@pytest.mark.parametrize("options", [{"seed": 3}, {"temperature": 0}, {"seed": 3, "temperature": 0}])
def test_with_a_seed_or_greedily_the_global_generator_is_left_alone(options: dict[str, Any]) -> None:
    model = tiny_gpt(tiny_config(dropout=0.5))
    before = torch.get_rng_state()
    model.generate(prompt(2, 3), 2 * W, **options)
    for _ in model.stream(prompt(2, 3), W, **options):
        assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(torch.get_rng_state(), before)


def test_dropout_is_off_while_generating() -> None:
    quiet, noisy = tiny_gpt(tiny_config()), tiny_gpt(tiny_config(dropout=0.5))
    assert noisy.training
    assert torch.equal(noisy.generate(prompt(2, 3), 30, seed=1), quiet.generate(prompt(2, 3), 30, seed=1))


def flags(model: nn.Module) -> list[bool]:
    return [module.training for module in model.modules()]


@pytest.fixture
def mixed() -> GPT:
    """A model in training of which one block is frozen in evaluation mode."""
    model = tiny_gpt(tiny_config(dropout=0.3)).train()
    model.transformer.h[0].eval()
    assert len(set(flags(model))) == 2
    return model


def failing(logits: Tensor, ids: Tensor) -> Tensor:
    if ids.size(1) > 5:
        raise RuntimeError("a mistake in the caller's filter")
    return logits


def test_every_training_flag_comes_back(mixed: GPT) -> None:
    before = flags(mixed)
    mixed.generate(prompt(1, 3), 5, seed=0)
    assert flags(mixed) == before
    stream = mixed.stream(prompt(1, 3), 5, seed=0)
    for _ in stream:
        assert flags(mixed) == before
    with pytest.raises(RuntimeError, match="a mistake in the caller's filter"):
        mixed.generate(prompt(1, 3), 9, seed=0, filters=[failing])
    assert flags(mixed) == before
    closed = mixed.stream(prompt(1, 3), 5, seed=0)
    next(closed)
    assert isinstance(closed, Iterator)
    closed.close()  # type: ignore[attr-defined]  # a generator behind the Iterator
    assert flags(mixed) == before


def test_a_flag_that_the_caller_changes_between_steps_stays_changed(mixed: GPT) -> None:
    stream = mixed.stream(prompt(1, 3), 5, seed=0)
    next(stream)
    mixed.eval()
    next(stream)
    assert not any(flags(mixed))


@pytest.mark.parametrize("enabled", [True, False])
def test_the_gradient_mode_is_unchanged_between_steps(mixed: GPT, enabled: bool) -> None:
    with torch.set_grad_enabled(enabled):
        stream = mixed.stream(prompt(1, 3), 5, seed=0)
        for ids in stream:
            assert torch.is_grad_enabled() is enabled
            assert not ids.requires_grad
        with pytest.raises(RuntimeError, match="mistake"):
            mixed.generate(prompt(1, 3), 9, seed=0, filters=[failing])
        assert torch.is_grad_enabled() is enabled


def test_nothing_is_recorded_for_a_backward_pass_while_generating(mixed: GPT) -> None:
    recorded: list[bool] = []

    def note(logits: Tensor, _ids: Tensor) -> Tensor:
        recorded.append(logits.requires_grad or torch.is_grad_enabled())
        return logits

    mixed.generate(prompt(1, 3), 20, seed=0, filters=[note])
    assert recorded == [False] * 20


def test_a_training_step_between_two_characters_is_possible(mixed: GPT) -> None:
    for ids in mixed.stream(prompt(2, 3), 4, seed=0):
        mixed(ids[:, None], ids[:, None])[1].backward()
    assert mixed.lm_head.weight.grad is not None


def test_two_streams_at_once_do_not_disturb_each_other() -> None:
    model = MODELS["lecture"](torch.float64)
    a, b = model.stream(prompt(1, 3), 30, seed=1), model.stream(prompt(1, 9), 30, seed=2)
    pairs = list(zip(a, b, strict=True))
    assert [int(x) for x, _ in pairs] == model.generate(prompt(1, 3), 30, seed=1)[0, 3:].tolist()
    assert [int(y) for _, y in pairs] == model.generate(prompt(1, 9), 30, seed=2)[0, 9:].tolist()


def test_the_prompt_is_not_changed() -> None:
    model = MODELS["lecture"](torch.float32)
    idx = prompt(2, 5)
    before = idx.clone()
    model.generate(idx, 20, seed=0)
    for ids in model.stream(idx, 20, seed=0):
        ids.fill_(0)  # nor does what the caller does with a step's ids matter
    assert torch.equal(idx, before)


def test_changing_a_streamed_step_does_not_change_the_next_ones() -> None:
    model = MODELS["lecture"](torch.float64)
    expected = model.generate(prompt(2, 5), 10, seed=0)[:, 5:]
    got = []
    for ids in model.stream(prompt(2, 5), 10, seed=0):
        got.append(ids.clone())
        ids.fill_(0)
    assert torch.equal(torch.stack(got, dim=1), expected)


def test_threads_that_share_a_model_in_training_mode_get_the_right_texts() -> None:
    """Dropout is off as long as one of them generates; the last one out restores the flags."""
    model = tiny_gpt(tiny_config(dropout=0.5)).train()
    expected = [model.generate(prompt(1, 3), 24, seed=seed) for seed in range(8)]
    with ThreadPoolExecutor(4) as pool:
        texts = list(pool.map(lambda seed: model.generate(prompt(1, 3), 24, seed=seed), range(8)))
    for text, alone in zip(texts, expected, strict=True):
        assert torch.equal(text, alone)
    assert all(module.training for module in model.modules())


class Interrupted(BaseException):
    """Ctrl-C, at a place where a test wants it."""


@pytest.mark.parametrize("at", range(2))
def test_an_interrupt_at_any_module_leaves_dropout_as_it_was(mixed: GPT, at: int) -> None:
    """While the flags are taken away, and while they are given back."""
    count = [0]

    class Fragile(nn.Dropout):
        """A part that is interrupted when its flag is set for the first time."""

        @override
        def __setattr__(self, name: str, value: Any) -> None:
            if name == "training" and "ready" in self.__dict__:
                count[0] += 1
                if count[0] == at + 1:
                    raise Interrupted
            super().__setattr__(name, value)

    fragile = Fragile(0.1)
    fragile.__dict__["ready"] = True
    mixed.transformer.h[0].drop = fragile
    before = [module.training for module in mixed.modules()]
    with contextlib.suppress(Interrupted), evaluation_mode(mixed):
        pass
    with evaluation_mode(mixed):
        assert not any(module.training for module in mixed.modules())
    assert count[0] > at + 1
    assert [module.training for module in mixed.modules()] == before
