"""The written-out derivatives against autograd's own, and where they step aside."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from harness.tiny_models import random_ids, tiny_config, tiny_gpt
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles.plain_gpt import plain_logits
from torch import Tensor, nn
from typing_extensions import override

from charlm.models import cpu_kernels, ops
from charlm.models.layers import FeedForward
from charlm.models.ops import LONGEST_PLAIN, plain_attention, rotary_tables, rotate


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()


def both(ours: Tensor, plain: Tensor, *inputs: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Return pairs that must agree: the values, and the gradients at the inputs for one random direction."""
    direction = torch.randn(ours.shape, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    direction = direction.to(ours.dtype)
    pairs = [(ours, plain)]
    gradients = [torch.autograd.grad(y, inputs, direction.to(y.dtype)) for y in (ours, plain)]
    return pairs + list(zip(*gradients, strict=True))


def attention_of_autograd(
    qkv: Tensor, H: int, rotary: tuple[Tensor, Tensor] | None, *, qk_norm: bool
) -> Tensor:
    B, T, _ = qkv.shape
    q, k, v = qkv.view(B, T, 3, H, -1).permute(2, 0, 3, 1, 4)
    if qk_norm:
        q, k = (x / (x.square().mean(dim=-1, keepdim=True) + 1e-6).sqrt() for x in (q, k))
    if rotary is not None:
        q, k = rotate(q, *rotary), rotate(k, *rotary)
    return plain_attention(q, k, v).transpose(1, 2).reshape(B, T, -1)


@settings(deadline=None, max_examples=30)
@given(
    B=st.integers(1, 3),
    T=st.integers(1, 9),
    H=st.integers(1, 3),
    half=st.integers(1, 4),
    rotary=st.booleans(),
    qk_norm=st.booleans(),
)
def test_attention_is_that_of_autograd_in_value_and_gradient(
    B: int, T: int, H: int, half: int, rotary: bool, qk_norm: bool
) -> None:
    qkv = draw(B, T, 6 * H * half, seed=T)
    tables = rotary_tables(3, T, 2 * half, torch.device("cpu")) if rotary else None
    ours = cpu_kernels.causal_attention(qkv, H, tables, qk_norm=qk_norm)
    plain = attention_of_autograd(qkv, H, tables, qk_norm=qk_norm)
    for one, other in both(ours, plain, qkv):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-11)


@settings(deadline=None, max_examples=30)
@given(rows=st.integers(1, 7), C=st.integers(1, 9), scale=st.sampled_from([1e-6, 1e-2, 1.0, 1e3]))
def test_the_norm_is_that_of_autograd_in_value_and_gradient(rows: int, C: int, scale: float) -> None:
    x = draw(rows, 2, C)
    ours = cpu_kernels.rms_norm(x * scale, 1e-6)
    plain = F.rms_norm(x * scale, (C,), eps=1e-6)
    for one, other in both(ours, plain, x):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-11)


@settings(deadline=None, max_examples=30)
@given(B=st.integers(1, 3), S=st.integers(1, 7), K=st.integers(1, 9), C=st.integers(1, 4), data=st.data())
def test_the_convolution_is_that_of_the_formula_in_value_and_gradient(
    B: int, S: int, K: int, C: int, data: st.DataObject
) -> None:
    x, weight = draw(B, S, C), draw(K, C, seed=1)
    T = data.draw(st.integers(1, S))
    for ours, last in ((cpu_kernels.causal_conv(x, weight), S), (ops.causal_conv(x, weight, T), T)):
        rows = [
            x[:, t] + sum(weight[k] * (x[:, t - k - 1] if t > k else 0 * x[:, t]) for k in range(K))
            for t in range(S - last, S)
        ]
        for one, other in both(ours, torch.stack(rows, dim=1), x, weight):
            torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-11)


@settings(deadline=None, max_examples=30)
@given(rows=st.integers(1, 7), C=st.integers(1, 6), hidden=st.integers(1, 9))
def test_the_feed_forward_network_is_that_of_autograd_in_value_and_gradient(
    rows: int, C: int, hidden: int
) -> None:
    x, up, down = draw(rows, 2, C), draw(hidden, C, seed=1), draw(C, hidden, seed=2)
    ours = cpu_kernels.relu_squared_mlp(x, up, down)
    plain = F.relu(x @ up.T).square() @ down.T
    for one, other in both(ours, plain, x, up, down):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-11)


@settings(deadline=None, max_examples=30)
@given(p=st.sampled_from([0.0, 1e-6, 0.1, 0.5, 0.9, 0.99999]), seed=st.integers(0, 5))
def test_dropout_sets_its_share_to_zero_and_keeps_the_mean(p: float, seed: int) -> None:
    x = torch.ones(100, 401, dtype=torch.float64).requires_grad_()
    torch.manual_seed(seed)
    y = cpu_kernels.dropout(x, p)
    share = float((y == 0).double().mean())
    assert abs(share - p) < 6 * math.sqrt(p * (1 - p) / x.numel()) + 2**-16  # one in 5e8 fails by chance
    assert float(y.detach().max()) * (1 - round(p * 2**16) / 2**16) == pytest.approx(1) or share == 1
    (gradient,) = torch.autograd.grad(y.sum(), x)
    assert torch.equal(gradient, y.detach())
    torch.manual_seed(seed)
    assert torch.equal(cpu_kernels.dropout(x, p), y)
    assert p in {0.0, 1e-6, 0.99999} or not torch.equal(cpu_kernels.dropout(x, p), y)


def test_dropout_drops_rows_and_columns_alike() -> None:
    torch.manual_seed(0)
    kept = cpu_kernels.dropout(torch.ones(400, 400, dtype=torch.bfloat16), 0.3) > 0
    assert kept[:, 1:].ne(kept[:, :-1]).double().mean() == pytest.approx(2 * 0.3 * 0.7, abs=0.01)
    assert (kept.double().mean(0) - 0.7).abs().max() < 0.14
    assert (kept.double().mean(1) - 0.7).abs().max() < 0.14


def test_under_autocast_results_are_bfloat16_and_gradients_of_weights_float32() -> None:
    x, up, down = (draw(*shape, dtype=torch.float32) for shape in [(40, 16), (32, 16), (16, 32)])
    qkv = draw(2, 20, 48, dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        normed, out = cpu_kernels.rms_norm(x, 1e-6), cpu_kernels.relu_squared_mlp(x, up, down)
        attended = cpu_kernels.causal_attention(qkv.bfloat16(), 2, None, qk_norm=True)
    assert {normed.dtype, out.dtype, attended.dtype} == {torch.bfloat16}
    plain = F.relu(x @ up.T).square() @ down.T
    for one, other in both(out, plain, x, up, down)[1:]:
        assert one.dtype == torch.float32
        assert (one - other).norm() < 0.02 * other.norm()
    exact = attention_of_autograd(qkv, 2, None, qk_norm=True)
    (one,), (other,) = (torch.autograd.grad(y.float().square().sum(), qkv) for y in (attended, exact))
    assert (one - other).norm() < 0.03 * other.norm()


def test_a_model_of_float64_stays_float64_under_autocast() -> None:
    config = tiny_config("cpu-1min")
    model = tiny_gpt(config).double()
    idx = random_ids(config, 2, 6)
    with torch.no_grad():
        expected = model(idx)[0]
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert torch.equal(model(idx)[0], expected)


def test_what_is_masked_out_gets_no_gradient_even_where_scores_are_huge() -> None:
    qkv = (1e3 * draw(1, 5, 12)).detach().requires_grad_()
    y = cpu_kernels.causal_attention(qkv, 1, None, qk_norm=False)
    (gradient,) = torch.autograd.grad(y[0, 1].sum(), qkv)
    assert torch.equal(gradient[0, 2:], torch.zeros(3, 12, dtype=torch.float64))
    assert torch.isfinite(gradient).all()


@pytest.mark.parametrize("T", [4, LONGEST_PLAIN + 1])
def test_long_contexts_and_dropout_take_the_plain_path(T: int, monkeypatch: pytest.MonkeyPatch) -> None:
    called: list[int] = []
    original = cpu_kernels.causal_attention

    def spy(qkv: Tensor, n_head: int, rotary: tuple[Tensor, Tensor] | None, *, qk_norm: bool) -> Tensor:
        called.append(n_head)
        return original(qkv, n_head, rotary, qk_norm=qk_norm)

    monkeypatch.setattr(cpu_kernels, "causal_attention", spy)
    config = tiny_config("cpu-1min").replace(block_size=T, n_layer=1, dropout=0.5, attention_dropout=None)
    model = tiny_gpt(config)
    idx = random_ids(config, 1, T)
    model.eval()(idx)
    assert bool(called) == (T <= LONGEST_PLAIN)
    called.clear()
    model.train()(idx)
    assert not called


def test_torch_func_sees_the_plain_code_and_gets_its_derivatives() -> None:
    config = tiny_config("cpu-1min")
    model = tiny_gpt(config)
    idx, targets = random_ids(config, 2, 6, 1), random_ids(config, 2, 6, 2)
    parameters: dict[str, Tensor] = dict(model.named_parameters())

    def loss_of(values: dict[str, Tensor]) -> Tensor:
        loss: Tensor = torch.func.functional_call(model, values, (idx, targets))[1]
        return loss

    gradients = torch.func.grad(loss_of)(parameters)
    model(idx, targets)[1].backward()
    for name, parameter in parameters.items():
        torch.testing.assert_close(gradients[name], parameter.grad, rtol=1e-4, atol=1e-6)


def test_a_second_derivative_is_refused_rather_than_wrong() -> None:
    x = draw(3, 4)
    (first,) = torch.autograd.grad(cpu_kernels.rms_norm(x, 1e-6).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.sum().backward()


@pytest.mark.slow
def test_the_longest_context_still_agrees_with_the_plain_implementation() -> None:
    config = tiny_config("cpu-1min").replace(block_size=LONGEST_PLAIN + 3, n_layer=1)
    model = tiny_gpt(config)
    idx = random_ids(config, 1, LONGEST_PLAIN + 3)
    with torch.no_grad():
        expected = plain_logits(config, model.state_dict(), idx)
        for T in (LONGEST_PLAIN, LONGEST_PLAIN + 3):
            torch.testing.assert_close(model(idx[:, :T])[0], expected[:, :T], rtol=1e-4, atol=1e-5)


def test_not_a_number_is_passed_on() -> None:
    x = torch.full((2, 3, 12), math.nan)
    assert cpu_kernels.rms_norm(x, 1e-6).isnan().all()
    assert cpu_kernels.causal_attention(x, 1, None, qk_norm=True).isnan().all()
    assert cpu_kernels.relu_squared_mlp(x, torch.ones(4, 12), torch.ones(12, 4)).isnan().all()


class Doubled(nn.Linear):
    """An adapter, as people put it in the place of a linear layer."""

    @override
    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input)


def adapter(mlp: FeedForward, name: str) -> None:
    old = mlp.get_submodule(name)
    assert isinstance(old, nn.Linear)
    new = Doubled(old.in_features, old.out_features, bias=False)
    new.load_state_dict(old.state_dict())
    setattr(mlp, name, new)


def hook(mlp: FeedForward, name: str) -> None:
    mlp.get_submodule(name).register_forward_hook(lambda _m, _args, out: 2 * out)


def bias(mlp: FeedForward, name: str) -> None:
    old = mlp.get_submodule(name)
    assert isinstance(old, nn.Linear)
    new = nn.Linear(old.in_features, old.out_features)
    new.load_state_dict({**old.state_dict(), "bias": torch.ones(old.out_features)})
    setattr(mlp, name, new)


@pytest.mark.parametrize("change", [adapter, hook, bias])
@pytest.mark.parametrize("name", ["c_fc", "c_proj"])
def test_a_layer_that_was_replaced_or_hooked_is_asked_itself(
    name: str, change: Callable[[FeedForward, str], None]
) -> None:
    model = tiny_gpt(tiny_config("cpu-1min"))
    mlp = model.get_submodule("transformer.h.0.mlp")
    assert isinstance(mlp, FeedForward)
    x = draw(2, 5, model.config.n_embd, dtype=torch.float32).detach()
    before = mlp(x)
    change(mlp, name)
    hidden = F.relu(mlp.c_fc(x)).square()
    assert torch.equal(mlp(x), mlp.c_proj(hidden))
    assert not torch.allclose(mlp(x), before, atol=1e-4)


def test_hooks_on_gradients_of_a_layer_and_on_all_modules_are_called() -> None:
    model = tiny_gpt(tiny_config("cpu-1min"))
    mlp = model.get_submodule("transformer.h.0.mlp")
    assert isinstance(mlp, FeedForward)
    called: list[str] = []
    mlp.c_fc.register_full_backward_hook(lambda *_: called.append("one"))
    model(random_ids(model.config, 1, 4), random_ids(model.config, 1, 4))[1].backward()
    handle = nn.modules.module.register_module_forward_hook(
        lambda module, *_: called.append("all") if module is mlp.c_proj else None
    )
    try:
        model(random_ids(model.config, 1, 4), random_ids(model.config, 1, 4))[1].backward()
    finally:
        handle.remove()
    assert called == ["one", "all", "one"]
