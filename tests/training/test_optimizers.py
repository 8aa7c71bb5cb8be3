"""Muon against torch's and against a plain one, and which parameter goes to which optimizer."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
from harness.tiny_models import tiny_config, tiny_gpt
from harness.tiny_training import TOKENIZER, PlainModule, quick_config, tiny_split
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles.plain_muon import PlainMuon, newton_schulz
from torch import Tensor, nn
from typing_extensions import override

from charlm import BigramLM, Trainer, get_backend
from charlm.errors import InputError
from charlm.models.config import PresetName
from charlm.training import AdamW, Muon, TrainerConfig, build_optimizers
from charlm.training import step as step_module
from charlm.training.optimizers import OptimizerFactory, hidden_matrices, orthogonalize

V = TOKENIZER.vocab_size

SHAPES = [(8, 8), (24, 8), (8, 24), (1, 5), (7, 3)]
SETTINGS: Any = {"lr": 0.03, "momentum": 0.9, "weight_decay": 0.2}


def random_matrices(seed: int, shapes: list[tuple[int, ...]], dtype: torch.dtype) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]


def run(optimizer: torch.optim.Optimizer, weights: list[Tensor], steps: int = 20) -> None:
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = SETTINGS["lr"] * (1 + step % 3)
        gradients = random_matrices(100 + step, [tuple(w.shape) for w in weights], weights[0].dtype)
        for weight, gradient in zip(weights, gradients, strict=True):
            weight.grad = gradient
        optimizer.step()


def test_muon_in_float64_is_the_plain_formula() -> None:
    weights = random_matrices(0, [*SHAPES, (8, 8)], torch.float64)
    plain = [PlainMuon(w.numpy(), **SETTINGS) for w in weights]
    run(Muon(weights, dtype=torch.float64, **SETTINGS), weights)
    for step in range(20):
        gradients = random_matrices(100 + step, [tuple(w.shape) for w in weights], torch.float64)
        for one, gradient in zip(plain, gradients, strict=True):
            one.lr = SETTINGS["lr"] * (1 + step % 3)
            one.step(gradient.numpy())
    for weight, one in zip(weights, plain, strict=True):
        np.testing.assert_allclose(weight.numpy(), one.weight, rtol=1e-9, atol=1e-11)


def test_muon_is_torchs_own_with_its_iteration_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.optim.Muon iterates in bfloat16 always; here `Tensor.bfloat16` keeps its copy in float32."""
    monkeypatch.setattr(Tensor, "bfloat16", lambda self: self.detach().clone())
    ours, theirs = (random_matrices(1, [*SHAPES], torch.float32) for _ in range(2))
    run(Muon(ours, dtype=torch.float32, **SETTINGS), ours)
    run(torch.optim.Muon(theirs, adjust_lr_fn="match_rms_adamw", **SETTINGS), theirs)
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_muon_is_torchs_own_within_the_rounding_of_bfloat16() -> None:
    ours, theirs = (random_matrices(1, [*SHAPES], torch.float32) for _ in range(2))
    start = [w.clone() for w in ours]
    run(Muon(ours, **SETTINGS), ours)
    run(torch.optim.Muon(theirs, adjust_lr_fn="match_rms_adamw", **SETTINGS), theirs)
    for one, other, before in zip(ours, theirs, start, strict=True):
        assert (one - other).norm() < 0.05 * (one - before).norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_adamw_is_torchs_own_bit_for_bit(dtype: torch.dtype) -> None:
    shapes: list[tuple[int, ...]] = [(8, 3), (5,), (), (2, 3, 4)]
    ours, theirs = (random_matrices(4, shapes, dtype) for _ in range(2))
    chosen: Any = {"lr": 0.1, "betas": (0.8, 0.95), "weight_decay": 0.3}
    run(AdamW(ours, **chosen), ours)
    run(torch.optim.AdamW(theirs, fused=True, **chosen), theirs)
    for one, other in zip(ours, theirs, strict=True):
        assert torch.equal(one, other)


def test_adamw_leaves_what_has_no_gradient_and_keeps_torchs_names_for_its_state() -> None:
    moved, still = random_matrices(3, [(4, 4), (2,)], torch.float32)
    before = still.clone()
    groups: list[dict[str, Any]] = [{"params": [moved]}, {"params": [still], "weight_decay": 0.0}]
    optimizer = AdamW(groups, lr=0.1)
    moved.grad = torch.ones(4, 4)
    assert optimizer.step(lambda: 2.5) == 2.5
    assert torch.equal(still, before)
    assert still not in optimizer.state
    torchs = torch.optim.AdamW([moved], lr=0.1, fused=True)
    torchs.step()
    assert set(optimizer.state[moved]) == set(torchs.state[moved])


@pytest.mark.slow
def test_the_optimizers_do_without_the_compiler() -> None:
    """torch._dynamo takes 1.2 seconds to import, at the start of every training."""
    code = (
        "import sys, torch; from charlm.training import AdamW, Muon; w = torch.ones(2, 2); w.grad = 1 * w; "
        "[make([w]).step() for make in (AdamW, Muon)]; sys.exit('torch._dynamo' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_matrices_of_one_shape_move_as_they_would_alone() -> None:
    together, alone = (random_matrices(2, [(6, 4)] * 3, torch.float64) for _ in range(2))
    run(Muon(together, dtype=torch.float64, **SETTINGS), together)
    for step in range(20):
        gradients = random_matrices(100 + step, [(6, 4)] * 3, torch.float64)
        if step == 0:
            single = [Muon([w], dtype=torch.float64, **SETTINGS) for w in alone]
        for weight, gradient, optimizer in zip(alone, gradients, single, strict=True):
            weight.grad = gradient
            optimizer.param_groups[0]["lr"] = SETTINGS["lr"] * (1 + step % 3)
            optimizer.step()
    for one, other in zip(together, alone, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)


def test_a_matrix_without_a_gradient_stays_and_a_closure_gives_the_loss() -> None:
    moved, still = random_matrices(3, [(4, 4), (4, 4)], torch.float32)
    before = still.clone()
    optimizer = Muon([moved, still], lr=0.1)
    moved.grad = torch.ones(4, 4)

    def closure() -> float:
        assert torch.is_grad_enabled()
        return 2.5

    assert optimizer.step(closure) == 2.5
    assert torch.equal(still, before)
    assert still not in optimizer.state


@pytest.mark.parametrize("shape", [(3,), (), (2, 3, 4)])
def test_muon_refuses_what_is_no_matrix(shape: tuple[int, ...]) -> None:
    with pytest.raises(InputError, match="Muon moves matrices in 1 equal parts, got a parameter of shape"):
        Muon([torch.zeros(shape)])


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 12), st.integers(1, 12), st.integers(0, 2**32), st.floats(1e-3, 1e3))
def test_orthogonalize_agrees_with_the_plain_iteration(
    rows: int, columns: int, seed: int, scale: float
) -> None:
    matrices = scale * torch.stack(random_matrices(seed, [(rows, columns)] * 2, torch.float64))
    got = orthogonalize(matrices)
    assert got.shape == matrices.shape
    for one, matrix in zip(got, matrices, strict=True):
        np.testing.assert_allclose(one.numpy(), newton_schulz(matrix.numpy()), rtol=1e-6, atol=1e-8)


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 10), st.integers(1, 10), st.integers(0, 2**32), st.floats(0.05, 1))
def test_orthogonalize_brings_singular_values_near_one_and_keeps_the_vectors(
    rows: int, columns: int, seed: int, smallest: float
) -> None:
    """For matrices whose singular values differ at most twentyfold; tinier ones rise more slowly."""
    matrix = random_matrices(seed, [(rows, columns)], torch.float64)[0]
    u, _, v = torch.linalg.svd(matrix, full_matrices=False)
    matrix = u @ torch.diag(torch.linspace(1, smallest, len(v), dtype=torch.float64)) @ v
    got = orthogonalize(matrix[None])[0]
    values = torch.linalg.svdvals(got)
    assert 0.65 < float(values.min()) <= float(values.max()) < 1.25
    inner = u.mT @ got @ v.mT  # diagonal if the singular vectors are the same
    torch.testing.assert_close(inner, torch.diag(inner.diagonal()), rtol=0, atol=1e-6)


def test_orthogonalize_of_zero_is_zero() -> None:
    assert torch.equal(orthogonalize(torch.zeros(2, 3, 4)), torch.zeros(2, 3, 4))


def names_by_group(model: nn.Module, config: TrainerConfig) -> dict[tuple[str, float], set[str]]:
    names = {id(p): name for name, p in model.named_parameters()}
    found: dict[tuple[str, float], set[str]] = {}
    seen: list[int] = []
    for optimizer in build_optimizers(model, config, get_backend("cpu")):
        for group in optimizer.param_groups:
            key = (type(optimizer).__name__, group["weight_decay"])
            found.setdefault(key, set()).update(names[id(p)] for p in group["params"])
            seen += [id(p) for p in group["params"]]
    assert len(seen) == len(set(seen)), "a parameter is in two groups"
    return found


@pytest.mark.parametrize("preset", get_args(PresetName))
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("kind", ["muon", "adamw"])
def test_every_parameter_of_a_gpt_is_in_one_group_and_vectors_do_not_decay(
    preset: PresetName, tied: bool, kind: str
) -> None:
    model = tiny_gpt(tiny_config(preset, tie_weights=tied))
    config = TrainerConfig.from_dict({"optimizer": kind, "weight_decay": 0.3})
    groups = names_by_group(model, config)
    parameters = dict(model.named_parameters())
    assert set().union(*groups.values()) == set(parameters)
    for (owner, decay), names in groups.items():
        assert decay in {0.0, 0.3}
        for name in names:
            decays = parameters[name].dim() >= 2 and (kind == "adamw" or owner == "Muon")
            assert (decay > 0) == decays, name
    blocks = {name for name, p in parameters.items() if ".h." in name and p.dim() == 2}
    assert len(blocks) == 4 * model.config.n_layer
    muon = set().union(*(names for (owner, _), names in groups.items() if owner == "Muon"))
    assert muon == (blocks if kind == "muon" else set())


def test_a_bigram_model_is_left_to_adamw() -> None:
    groups = names_by_group(BigramLM(5), TrainerConfig(optimizer="muon", weight_decay=0.1))
    assert list(groups.values()) == [{"token_embedding_table.weight"}]
    assert [owner for owner, _ in groups] == ["AdamW"]


def test_output_layers_and_embeddings_are_no_hidden_matrices() -> None:
    class Other(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = nn.Embedding(5, 4)
            self.inner = nn.Linear(4, 4)
            self.tied = nn.Linear(4, 5, bias=False)
            self.tied.weight = self.embedding.weight
            self.head = nn.Linear(4, 5)
            self.deep = nn.ModuleDict({"lm_head": nn.Linear(4, 5)})

    assert hidden_matrices(Other()) == {"inner.weight": 1}
    assert hidden_matrices(nn.Linear(2, 3)) == {"weight": 1}


def test_queries_keys_and_values_are_three_matrices() -> None:
    parts = hidden_matrices(tiny_gpt(tiny_config("gpt2")))
    assert {name.split(".")[-2] for name, count in parts.items() if count == 3} == {"c_attn"}
    assert {count for name, count in parts.items() if "c_attn" not in name} == {1}
    assert hidden_matrices(nn.ModuleDict({"c_attn": nn.Linear(2, 4)})) == {"c_attn.weight": 1}


def test_a_stack_of_matrices_moves_as_its_parts_would() -> None:
    (stack,) = random_matrices(4, [(12, 5)], torch.float64)
    parts = [part.clone() for part in stack.split(4)]
    stack.grad = random_matrices(5, [(12, 5)], torch.float64)[0]
    for part, gradient in zip(parts, stack.grad.split(4), strict=True):
        part.grad = gradient.clone()
    Muon([{"params": [stack], "parts": 3}], dtype=torch.float64, **SETTINGS).step()
    Muon(parts, dtype=torch.float64, **SETTINGS).step()
    torch.testing.assert_close(stack, torch.cat(parts), rtol=1e-10, atol=1e-12)


def test_a_stack_must_divide_into_its_parts() -> None:
    with pytest.raises(InputError, match="Muon moves matrices in 3 equal parts"):
        Muon([{"params": [torch.zeros(4, 2)], "parts": 3}])


def test_frozen_parameters_are_left_out() -> None:
    model = tiny_gpt(tiny_config("lecture"))
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("h.0" in name)
    groups = names_by_group(model, TrainerConfig(optimizer="muon"))
    assert all("h.0" in name for names in groups.values() for name in names)


def test_the_settings_reach_the_optimizers() -> None:
    config = TrainerConfig(
        optimizer="muon", learning_rate=0.5, momentum=0.7, betas=(0.8, 0.9), weight_decay=0.3
    )
    muon, adamw = build_optimizers(tiny_gpt(tiny_config("lecture")), config, get_backend("cpu"))
    assert isinstance(muon, Muon)
    assert muon.param_groups[0]["momentum"] == 0.7
    assert adamw.param_groups[0]["betas"] == (0.8, 0.9)
    assert {group["lr"] for group in (*muon.param_groups, *adamw.param_groups)} == {0.5}


def model_of(*, sparse: bool = False) -> nn.Module:
    torch.manual_seed(0)
    model = PlainModule(V)
    model.embedding.sparse = sparse
    return model


def trainer_with(factory: OptimizerFactory, model: nn.Module | None = None, **changes: Any) -> Trainer:
    config = quick_config(
        max_steps=4, learning_rate=0.1, grad_clip=0.5, warmup_steps=0, **changes.pop("config", {})
    )
    return Trainer(model or model_of(), tiny_split()[0], config, device="cpu", optimizer=factory, **changes)


def sgd(named: Iterator[tuple[str, nn.Parameter]]) -> torch.optim.Optimizer:
    return torch.optim.SGD((p for _, p in named), momentum=0.9)


def parts(*rates: float, **more: float) -> OptimizerFactory:
    """Return a factory that gives each parameter a group with a learning rate of its own."""

    def factory(named: Iterator[tuple[str, nn.Parameter]]) -> torch.optim.Optimizer:
        groups = [{"params": [p], "lr": rate, **more} for (_, p), rate in zip(named, rates, strict=True)]
        return torch.optim.SGD(groups)

    return factory


@pytest.mark.parametrize(
    ("factory", "message"),
    [
        (lambda named: torch.optim.SGD(model_of().parameters()), "of its 3 parameters 3 are not the model's"),
        (
            lambda named: torch.optim.SGD([*(p for _, p in named), nn.Parameter(torch.ones(1))]),
            "4 parameters 1 are not",
        ),
        (lambda named: torch.optim.SGD([torch.ones(1)]), "of its 1 parameters 1 are not the model's"),
        (
            lambda named: torch.optim.LBFGS(p for _, p in named),
            "must step without a closure, and LBFGS needs one",
        ),
        (
            lambda named: torch.optim.SparseAdam([p for _, p in named]),
            "must take dense gradients, and SparseAdam",
        ),
        (lambda named: [*named], r"must make a torch.optim.Optimizer, got list"),
        (3, "must be a factory"),
    ],
)
def test_an_optimizer_that_could_not_train_the_model_is_refused_at_once(factory: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        trainer_with(factory)


def test_an_optimizer_of_frozen_parameters_alone_is_refused() -> None:
    model = model_of()
    model.get_parameter("output.bias").requires_grad_(False)
    with pytest.raises(InputError, match="must move a parameter that requires a gradient"):
        trainer_with(lambda named: torch.optim.SGD([p for name, p in named if name == "output.bias"]), model)


@given(st.lists(st.floats(0, 10), min_size=3, max_size=3))
def test_learning_rates_of_groups_are_shares_of_the_schedules(rates: list[float]) -> None:
    trainer = trainer_with(parts(*rates))
    wanted = [rate / max(rates) if len(set(rates)) > 1 else 1.0 for rate in rates]
    for record in trainer.steps():
        found = [group["lr"] for group in trainer.optimizers[0].param_groups]
        assert found == [share * record.learning_rate for share in wanted]


def test_a_share_that_is_named_counts_and_the_rates_beside_it_do_not() -> None:
    trainer = trainer_with(parts(0.1, 0.2, 0.3, lr_scale=0.5))
    for record in trainer.steps():
        assert [group["lr"] for group in trainer.optimizers[0].param_groups] == [
            0.5 * record.learning_rate
        ] * 3


def test_a_resume_keeps_the_shares_and_a_run_that_began_without_them_goes_on_without(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("now", "before"):
        if name == "before":  # shares were not known: every group had the schedule's learning rate
            monkeypatch.setattr(
                step_module, "made_by", lambda factory, model: (factory(model.named_parameters()), False)
            )
        trainer = trainer_with(parts(0.0, 0.1, 0.05), out_dir=tmp_path / name, config={"save_interval": 2})
        for record in trainer.steps():
            if record.step == 2:
                break
        monkeypatch.undo()
        again = Trainer.resume(
            tmp_path / name, tiny_split()[0], model=model_of(), optimizer=parts(0.0, 0.1, 0.05), device="cpu"
        )
        record = next(again.steps())
        shares = [group["lr"] / record.learning_rate for group in again.optimizers[0].param_groups]
        assert shares == pytest.approx([0, 1, 0.5] if name == "now" else [1, 1, 1])
        again.save()


@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize("factory", [None, sgd])
def test_an_embedding_with_sparse_gradients_learns_what_a_dense_one_does(
    accumulate: int, factory: OptimizerFactory | None
) -> None:
    models = [model_of(sparse=sparse) for sparse in (False, True)]
    for model in models:
        config = quick_config(max_steps=5, accumulate=accumulate, grad_clip=0.5)
        Trainer(model, tiny_split()[0], config, device="cpu", optimizer=factory).fit()
    for one, other in zip(*(model.parameters() for model in models), strict=True):
        torch.testing.assert_close(one, other)


def test_what_the_optimizer_keeps_and_cannot_be_written_is_known_after_one_step(tmp_path: Path) -> None:
    class Counting(torch.optim.SGD):
        @override
        def step(self, closure: Any = None) -> Any:
            for group in self.param_groups:
                for parameter in group["params"]:
                    self.state[parameter]["calls"] = 1
            return super().step(closure)

    trainer = trainer_with(lambda named: Counting(p for _, p in named), out_dir=tmp_path)
    with pytest.raises(InputError, match="Counting keeps a int as 'calls'"):
        trainer.fit()
    assert trainer.step == 1
