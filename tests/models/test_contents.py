"""What a model carries beside its parameters: through best weights, resumes, saved models."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from harness.tiny_training import TOKENIZER, global_generators, quick_config, same_tensors, tiny_split
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from typing_extensions import override

from charlm import BigramLM, Trainer
from charlm.errors import FileFormatError, InputError
from charlm.models.contents import Contents, passing_buffers, saved_tensors

V = TOKENIZER.vocab_size


class Counting(nn.Module):
    """A table whose logits depend on buffers and on extra state, all of which training changes."""

    kept: Tensor
    passing: Tensor
    nothing: Tensor | None

    def __init__(self, kind: str = "json", dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.kind = kind
        self.table = nn.Embedding(V, V)
        nn.init.zeros_(self.table.weight)
        self.register_buffer("kept", torch.zeros(V))
        self.register_buffer("passing", torch.zeros(V, dtype=dtype), persistent=False)
        self.register_buffer("nothing", None, persistent=False)
        self.calls = 0

    @override
    def forward(self, idx: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        if self.training:
            counts = torch.bincount(targets.flatten(), minlength=V)
            with torch.no_grad():
                self.kept += counts
                self.passing += counts
                self.calls += 1
        shift = self.passing.real * (0.01 if self.calls < 6 else 1.0)  # so the best is not the last
        logits = self.table(idx) + shift.float()  # (B, T, V)
        return logits, nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())

    @override
    def get_extra_state(self) -> object:
        if self.kind == "json":
            return {"calls": self.calls, "of": ["a", None]}
        return torch.tensor([self.calls] * (1 + self.calls % 3)) if self.kind == "tensor" else object()

    @override
    def set_extra_state(self, state: object) -> None:
        if isinstance(state, Tensor):
            self.calls = int(state[0])
        else:
            assert isinstance(state, dict)
            assert state["of"] == ["a", None]
            self.calls = state["calls"]


class Own(BigramLM):
    """A language model with extra state and a buffer that no file holds."""

    kind = "contents-own"

    def __init__(self, vocab_size: object) -> None:
        super().__init__(vocab_size)  # type: ignore[arg-type]
        self.register_buffer("passing", torch.zeros(2), persistent=False)
        self.note: object = None

    @override
    def get_extra_state(self) -> object:
        return self.note

    @override
    def set_extra_state(self, state: object) -> None:
        self.note = state


def all_of(model: nn.Module) -> dict[str, Tensor]:
    found = {**saved_tensors(model), **{f"passing {k}": v for k, v in passing_buffers(model).items()}}
    return {name: tensor.detach().clone() for name, tensor in found.items()}


def trainer_of(model: nn.Module, out: Path | None = None, **changes: object) -> Trainer:
    train, val = tiny_split()
    config = quick_config(**{"eval_interval": 2, "save_interval": 2, "learning_rate": 0.3, **changes})
    return Trainer(model, train, config, val_data=val, device="cpu", out_dir=out)


@pytest.mark.parametrize("kind", ["json", "tensor"])
def test_the_model_left_behind_has_the_loss_that_is_reported(kind: str) -> None:
    trainer = trainer_of(Counting(kind))
    result = trainer.fit()
    assert result.best is not None
    assert result.best_step is not None
    assert result.best_step < 12
    assert trainer.evaluate().loss_nats == result.best.loss_nats


@pytest.mark.parametrize("kind", ["json", "tensor"])
@pytest.mark.parametrize("stop", [1, 4, 7, 11])
def test_a_resume_has_all_that_the_model_carried(kind: str, stop: int, tmp_path: Path) -> None:
    whole = trainer_of(Counting(kind), tmp_path / "whole")
    whole.fit()
    for record in (parts := trainer_of(Counting(kind), tmp_path / "parts")).steps():
        if record.step == stop:
            parts.save()
            break
    train, val = tiny_split()
    again = Trainer.resume(tmp_path / "parts", train, model=Counting(kind), val_data=val, device="cpu")
    assert same_tensors(all_of(again.model), all_of(parts.model))
    again.fit()
    assert same_tensors(all_of(again.model), all_of(whole.model))
    assert again.evaluate() == whole.evaluate()


def test_extra_state_that_cannot_be_written_is_refused_where_it_would_be(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"Counting.get_extra_state\(\) must give a tensor or a value"):
        trainer_of(Counting("object"), tmp_path)


def test_extra_state_of_any_kind_goes_with_the_best_weights() -> None:
    class Odd(Counting):
        @override
        def get_extra_state(self) -> object:
            return {1: {self.calls}}

        @override
        def set_extra_state(self, state: object) -> None:
            assert isinstance(state, dict)
            (self.calls,) = state[1]

    trainer = trainer_of(Odd())
    result = trainer.fit()
    assert result.best is not None
    assert trainer.evaluate().loss_nats == result.best.loss_nats


def test_a_buffer_that_cannot_be_written_is_refused_before_the_first_step(tmp_path: Path) -> None:
    trainer = trainer_of(Counting(dtype=torch.uint16), tmp_path)
    with pytest.raises(InputError, match=r"tensor 'buffer.passing' must be dense and one of"):
        next(trainer.steps())
    assert trainer.step == 0


def test_a_complex_buffer_comes_back(tmp_path: Path) -> None:
    trainer_of(Counting(dtype=torch.complex64), tmp_path).fit()
    train, val = tiny_split()
    model = Counting(dtype=torch.complex64)
    Trainer.resume(tmp_path, train, model=model, val_data=val, device="cpu")
    assert model.passing.dtype == torch.complex64
    assert model.passing.real.sum() == 12 * 4 * 8


def test_a_name_that_ends_like_extra_state_is_a_name(tmp_path: Path) -> None:
    class Named(Counting):
        def __init__(self) -> None:
            super().__init__()
            self.my_extra_state = nn.Parameter(torch.arange(3.0))

    model = Named()
    trainer_of(model, tmp_path, restore_best=False).fit()
    with torch.no_grad():
        (other := Named()).my_extra_state.zero_()
    train, val = tiny_split()
    Trainer.resume(tmp_path, train, model=other, val_data=val, device="cpu")
    assert torch.equal(other.my_extra_state, model.my_extra_state)


def test_a_buffer_that_is_made_in_training_or_is_no_memory_of_its_own_comes_back(tmp_path: Path) -> None:
    class Lazy(Counting):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("wide", torch.zeros(1, 1).expand(3, 3), persistent=False)

        @override
        def forward(self, idx: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
            if self.training:
                self.nothing = torch.ones(2) * self.calls
            return super().forward(idx, targets)

    trainer_of(Lazy(), tmp_path, restore_best=False).fit()
    train, val = tiny_split()
    model = Lazy()
    Trainer.resume(tmp_path, train, model=model, val_data=val, device="cpu")
    assert model.nothing is not None
    assert model.nothing.tolist() == [11, 11]


def test_a_resume_whose_extra_state_is_refused_changes_nothing(tmp_path: Path) -> None:
    class Refuses(Counting):
        is_ready = False

        @override
        def set_extra_state(self, state: object) -> None:
            if self.is_ready and state != {"calls": 0, "of": ["a", None]}:
                raise KeyError("not this one")
            super().set_extra_state(state)

    class Two(Counting):
        def __init__(self) -> None:
            super().__init__()
            self.last = Refuses()  # when the first part has its state already

    trained = Two()
    trained.last.calls = 1
    trainer_of(trained, tmp_path, restore_best=False).fit()
    model = Two()
    model.last.is_ready = True
    before, generators = all_of(model), global_generators()
    train, val = tiny_split()
    with pytest.raises(KeyError):
        Trainer.resume(tmp_path, train, model=model, val_data=val, device="cpu")
    assert same_tensors(all_of(model), before)
    assert global_generators() == generators


def test_a_buffer_may_grow_while_the_model_trains(tmp_path: Path) -> None:
    class Growing(Counting):
        @override
        def forward(self, idx: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
            if self.training:
                self.nothing = torch.ones(1 if self.nothing is None else len(self.nothing) + 1)
            return super().forward(idx, targets)

    trainer = trainer_of(Growing(), tmp_path)
    trainer.fit()
    assert len(trainer.model.nothing) == trainer.result().best_step  # type: ignore[arg-type]
    train, val = tiny_split()
    model = Growing()
    model.nothing = torch.ones(3)
    Trainer.resume(tmp_path, train, model=model, val_data=val, device="cpu")
    assert len(model.nothing) == 12


json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.floats(-1e9, 1e9) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=8,
)


@given(json_values)
def test_extra_state_of_a_saved_model_comes_back(
    tmp_path_factory: pytest.TempPathFactory, note: object
) -> None:
    path = tmp_path_factory.mktemp("own")
    model = Own(3)
    model.note = note
    model.save(path)
    assert Own.load(path).note == note


@pytest.mark.parametrize("shape", [(), (0,), (2, 3)])
def test_a_tensor_of_extra_state_comes_back_whatever_its_shape(
    shape: tuple[int, ...], tmp_path: Path
) -> None:
    model = Own(3)
    model.note = torch.rand(shape)
    model.save(tmp_path)
    found = Own.load(tmp_path).note
    assert isinstance(found, Tensor)
    assert torch.equal(found, model.note)


def test_a_saved_model_without_its_extra_state_is_refused(tmp_path: Path) -> None:
    class Plain(BigramLM):
        kind = "contents-plain"

    Plain(3).save(tmp_path)
    text = (tmp_path / "config.json").read_text(encoding="utf-8").replace("contents-plain", "contents-own")
    (tmp_path / "config.json").write_text(text, encoding="utf-8")
    with pytest.raises(FileFormatError, match="must hold the tensor '_extra_state', which is missing"):
        Own.load(tmp_path)


def test_what_is_put_back_is_a_copy() -> None:
    model = Counting("tensor")
    kept = Contents.of(model)
    before = all_of(model)
    trainer_of(model, restore_best=False).fit()
    assert not same_tensors(all_of(model), before)
    kept.put_into(model)
    assert same_tensors(all_of(model), before)
    trainer_of(model, restore_best=False).fit()
    kept.put_into(model)
    assert same_tensors(all_of(model), before)


def test_buffers_that_a_file_lacks_stay_as_they_are() -> None:
    model = Counting()
    model.passing += 3
    Contents.saved(saved_tensors(model), {}).put_into(model)
    assert torch.equal(passing_buffers(model)["passing"], torch.full((V,), 3.0))
    assert "_extra_state.json" in saved_tensors(model)
