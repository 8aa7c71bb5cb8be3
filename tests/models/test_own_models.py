"""Models of a user's own: what they must have to be trained, saved and read again."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Self

import pytest
import torch
from harness.tiny_training import TOKENIZER, quick_config, tiny_split
from torch import Tensor, nn
from typing_extensions import override

from charlm import GPT, CharLM, LanguageModel, Trainer, load
from charlm.errors import InputError
from charlm.generation import Cache
from charlm.models.base import cross_entropy
from charlm.models.config import GPTConfig, ModelConfig
from charlm.models.registry import class_of

V = TOKENIZER.vocab_size


@dataclass(frozen=True, kw_only=True)
class UnigramConfig(ModelConfig):
    """One logit for each id."""

    @override
    def num_parameters(self) -> int:
        return self.vocab_size


class Unigram(LanguageModel):
    """Every character by its frequency alone: the smallest model there is."""

    kind: ClassVar[str] = "test-unigram"
    config_class: ClassVar[type[ModelConfig]] = UnigramConfig

    def __init__(self, config: UnigramConfig) -> None:
        super().__init__()
        self.config = config
        self.logits = nn.Parameter(torch.zeros(config.vocab_size))

    @override
    @classmethod
    def from_config(cls, config: UnigramConfig | Mapping[str, object]) -> Self:
        return cls(config if isinstance(config, UnigramConfig) else UnigramConfig.from_dict(config))

    @override
    def forward(
        self, idx: Tensor, targets: Tensor | None = None, *, cache: Cache | None = None
    ) -> tuple[Tensor, Tensor | None]:
        self._check_idx(idx, targets)
        logits = self.logits.expand(*idx.shape, -1)  # (B, T, V)
        return logits, None if targets is None else cross_entropy(logits, targets)


def test_a_model_of_ones_own_trains_saves_loads_resumes_and_generates(tmp_path: Path) -> None:
    train, val = tiny_split()
    model = Unigram(UnigramConfig(vocab_size=V))
    trainer = Trainer(
        model,
        train,
        quick_config(),
        val_data=val,
        device="cpu",
        tokenizer=TOKENIZER,
        out_dir=tmp_path / "run",
    )
    trainer.fit()
    lm = load(tmp_path / "run", device="cpu")
    assert isinstance(lm.model, Unigram)
    assert torch.equal(lm.model.logits, model.logits)
    assert lm.generate("ba", 20, seed=1) == CharLM(model, TOKENIZER).generate("ba", 20, seed=1)
    again = Trainer.resume(tmp_path / "run", train, val_data=val, device="cpu", max_steps=14)
    assert again.fit().steps == 14


class Masked(Unigram):
    """Its buffer has 70 MB, of which its config says nothing."""

    kind: ClassVar[str] = "test-masked"

    def __init__(self, config: UnigramConfig) -> None:
        super().__init__(config)
        self.register_buffer("mask", torch.zeros(4200, 4200))


def test_a_small_model_with_a_large_buffer_is_saved_loaded_and_resumed(tmp_path: Path) -> None:
    train, _ = tiny_split()
    model = Masked(UnigramConfig(vocab_size=V))
    CharLM(model, TOKENIZER).save(tmp_path / "model")
    assert load(tmp_path / "model", device="cpu").model.num_parameters() == V
    config = quick_config(max_steps=2, save_interval=1, keep_last=1)
    Trainer(model, train, config, device="cpu", out_dir=tmp_path / "run").fit()
    assert Trainer.resume(tmp_path / "run", train, device="cpu", max_steps=3).fit().steps == 3


class WithoutKind(Unigram):
    """Inherits its kind, so nobody could know it again."""


class Uncounted(Unigram):
    """Its config does not count its parameters."""

    kind: ClassVar[str] = "test-uncounted"
    config_class: ClassVar[type[ModelConfig]] = ModelConfig


class Miscounted(Unigram):
    """Has more parameters than its config says."""

    kind: ClassVar[str] = "test-miscounted"

    def __init__(self, config: UnigramConfig) -> None:
        super().__init__(config)
        self.extra = nn.Parameter(torch.zeros(1))


def uncounted() -> Uncounted:
    model = Uncounted(UnigramConfig(vocab_size=V))
    model.config = ModelConfig(vocab_size=V)
    return model


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (WithoutKind(UnigramConfig(vocab_size=V)), "give it a kind of its own, say kind = 'withoutkind'"),
        (uncounted(), "must say how many parameters its model has"),
        (Miscounted(UnigramConfig(vocab_size=V)), f"says {V} parameters, the model has {V + 1}"),
    ],
    ids=["without kind", "uncounted", "miscounted"],
)
def test_what_could_not_be_read_again_is_refused_before_it_is_trained(
    tmp_path: Path, model: Unigram, message: str
) -> None:
    train, _ = tiny_split()
    with pytest.raises(InputError, match=message):
        Trainer(model, train, quick_config(), device="cpu", out_dir=tmp_path / "run")
    with pytest.raises(InputError, match=message):
        model.save(tmp_path / "model")
    assert not list(tmp_path.iterdir())
    Trainer(model, train, quick_config(max_steps=1), device="cpu").fit()  # without files all is well


def test_a_kind_belongs_to_one_class() -> None:
    with pytest.raises(InputError, match="kind 'gpt' belongs to GPT; give Impostor its own"):

        class Impostor(GPT):
            kind: ClassVar[str] = "gpt"

    assert class_of("gpt") is GPT


@pytest.mark.parametrize(
    ("output", "got"),
    [
        (torch.zeros(1), "Tensor"),
        ((torch.zeros(1), None), "tuple"),
        ((torch.zeros(1), torch.zeros(2)), "tuple"),
    ],
)
def test_a_forward_pass_without_a_loss_is_a_clear_error(output: Any, got: str) -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(1))

        @override
        def forward(self, idx: Tensor, targets: Tensor) -> Any:
            return output

    train, _ = tiny_split()
    with pytest.raises(InputError, match=rf"must return \(logits, loss\).*got {got}"):
        Trainer(Odd(), train, quick_config(), device="cpu").fit()


def frozen(model: GPT) -> GPT:
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    return model


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda model: model.to("meta"), "on the meta device"),
        (lambda model: model.half(), "float32 weights"),
        (frozen, "requires a gradient"),
    ],
    ids=["meta", "half", "frozen"],
)
def test_weights_that_cannot_be_trained_are_refused(change: Any, message: str) -> None:
    train, _ = tiny_split()
    model = GPT(GPTConfig(vocab_size=V, block_size=8, n_layer=1, n_head=1, n_embd=8))
    with pytest.raises(InputError, match=message):
        Trainer(change(model), train, quick_config(), device="cpu")


class Drawing(Unigram):
    """Fills its parameter in a way of its own, from a matrix that it draws and turns."""

    kind: ClassVar[str] = "test-drawing"

    def __init__(self, config: UnigramConfig) -> None:
        super().__init__(config)
        nn.init.normal_(self.logits)
        turned = nn.init.orthogonal_(torch.empty(4, 4))
        if not torch.allclose(turned @ turned.T, torch.eye(4), atol=1e-5):
            raise InputError("what is no parameter must be drawn as ever")


def test_loading_draws_no_parameter_and_leaves_the_rest_of_a_constructor_alone(tmp_path: Path) -> None:
    drawn = Drawing(UnigramConfig(vocab_size=V))
    assert drawn.logits.abs().sum() > 0
    CharLM(drawn, TOKENIZER).save(tmp_path / "model")
    before = torch.get_rng_state()
    again = load(tmp_path / "model", device="cpu").model
    assert torch.equal(again.get_parameter("logits"), drawn.logits)
    assert torch.equal(torch.get_rng_state(), before)
    assert Drawing(UnigramConfig(vocab_size=V)).logits.abs().sum() > 0  # a new one is drawn again
