"""fp16 on the CPU as a GPU has it: what a gradient scaler must and must not do."""

from __future__ import annotations

import math

import pytest
import torch
from harness.tiny_training import TOKENIZER, quick_config, same_tensors, tensors_of, tiny_split
from torch import Tensor, nn
from typing_extensions import override

from charlm import GPT, DeviceBackend, Trainer
from charlm.backends.base import Precision
from charlm.errors import NonFiniteError


class HalfBackend(DeviceBackend):
    """The CPU with fp16: autocast and a gradient scaler."""

    @override
    def supported_precisions(self) -> tuple[Precision, ...]:
        return ("fp16", "fp32")


def trainer_with(**changes: object) -> Trainer:
    train, _ = tiny_split()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = GPT.from_config(
            "cpu-1min", vocab_size=TOKENIZER.vocab_size, block_size=8, n_layer=1, n_head=1, n_embd=8
        )
        for parameter in model.parameters():
            nn.init.normal_(parameter, std=0.1)
    config = quick_config(**{"precision": "fp16", "optimizer": "muon", "max_steps": 6, **changes})
    return Trainer(model, train, config, device=HalfBackend("cpu"))


def poison(trainer: Trainer, name: str, value: float) -> list[bool]:
    """Put a value into one parameter's gradient, as long as the returned list is not empty."""
    left = [True]

    def spoil(gradient: Tensor) -> Tensor:
        return torch.full_like(gradient, value) if left else gradient

    trainer.model.get_parameter(name).register_hook(spoil)
    return left


@pytest.mark.parametrize("value", [math.inf, math.nan])
@pytest.mark.parametrize("grad_clip", [1.0, None])
@pytest.mark.parametrize("name", ["lm_head.weight", "transformer.h.0.attn.c_attn.weight"])
def test_one_overflow_keeps_every_optimizer_from_moving(
    name: str, grad_clip: float | None, value: float
) -> None:
    """Both kinds of optimizer skip together, whichever of them met the overflow."""
    trainer = trainer_with(grad_clip=grad_clip)
    left = poison(trainer, name, value)
    assert trainer.scaler is not None
    steps = trainer.steps()
    before = tensors_of(trainer)
    assert not math.isfinite(next(steps).grad_norm)
    assert same_tensors({k: v for k, v in tensors_of(trainer).items() if k in before}, before)
    scale = trainer.scaler.get_scale()
    left.clear()
    for record in steps:
        assert math.isfinite(record.grad_norm)
    assert trainer.scaler.get_scale() == scale
    assert all(bool(torch.isfinite(p).all()) for p in trainer.model.parameters())
    assert not same_tensors({k: v for k, v in tensors_of(trainer).items() if k in before}, before)


def test_a_gradient_that_stays_bad_ends_the_run_with_its_name() -> None:
    trainer = trainer_with(max_steps=100)
    poison(trainer, "lm_head.weight", math.nan)
    with pytest.raises(NonFiniteError) as error:
        trainer.fit()
    assert error.value.parameter == "lm_head.weight"
    assert 10 < trainer.step < 40  # as long as the scaler had something to lower


def test_the_trainer_goes_on_after_a_loss_that_was_not_finite() -> None:
    trainer = trainer_with()
    weight = trainer.model.get_parameter("lm_head.weight")
    held = weight.detach().clone()
    with torch.no_grad():
        weight.fill_(math.nan)
    with pytest.raises(NonFiniteError):
        trainer.fit()
    with torch.no_grad():
        weight.copy_(held)
    assert trainer.fit().steps == 6


def test_a_loss_that_is_not_finite_is_skipped_where_that_is_wanted() -> None:
    """It is no overflow, with which the scaler deals by itself: the skipped step is told of."""
    trainer = trainer_with(nonfinite="skip", log_interval=6)
    steps = trainer.steps()
    next(steps), next(steps)
    before = tensors_of(trainer)
    hook = trainer.model.register_forward_hook(lambda module, args, output: (output[0], output[1] * math.nan))
    assert next(steps).skipped
    hook.remove()
    assert same_tensors(tensors_of(trainer), before)
    with pytest.warns(RuntimeWarning, match="step 3 was skipped: its loss is nan"):
        assert not any(record.skipped for record in steps)
    assert trainer.step == 6
    assert not same_tensors(tensors_of(trainer), before)


def test_an_optimizer_without_gradients_is_passed_over() -> None:
    class WithUnused(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = nn.Embedding(TOKENIZER.vocab_size, TOKENIZER.vocab_size)
            self.unused = nn.Linear(4, 4, bias=False)

        @override
        def forward(self, idx: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
            logits = self.embedding(idx)
            return logits, nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())

    train, _ = tiny_split()
    config = quick_config(precision="fp16", optimizer="muon", max_steps=3)
    assert Trainer(WithUnused(), train, config, device=HalfBackend("cpu")).fit().steps == 3
