"""Parts that are replaced, hooks, transforms: what the fast path cannot do, the model is asked itself."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import pytest
import torch
from harness.changed_models import assert_says_what_it_computes, kind_of_state
from harness.drawn_models import needs_kernel, random_rows
from harness.tiny_models import prompt, tiny_config, tiny_gpt
from oracles.plain_state import plain_logits
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune
from typing_extensions import override

from charlm.models.gpt import GPT
from charlm.models.layers import CausalSelfAttention, FeedForward, RMSNorm

pytestmark = needs_kernel

ROWS = random_rows([3, 9, 30])


@pytest.fixture
def model() -> GPT:
    model = tiny_gpt(tiny_config(bias=True, tie_weights=False))
    model.generate(prompt(2, 3), 3, seed=0)  # the fast path has its copy of the weights
    assert kind_of_state(model) == "fast"
    return model


class Scaled(nn.Linear):
    """An adapter: a linear layer with a factor."""

    @override
    def forward(self, input: Tensor) -> Tensor:
        return 0.5 * super().forward(input)


class Fourfold(nn.Parameter):
    """A weight that says more than its numbers, as a quantised one does."""

    @classmethod
    @override
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        with torch._C.DisableTorchFunctionSubclass():
            plain_args = [
                4 * a.detach() if type(a) is cls and func is nn.functional.linear else a for a in args
            ]
            return func(*plain_args, **(kwargs or {}))


def forward_hook(model: GPT) -> None:
    model.transformer.h[0].register_forward_hook(lambda _m, _args, out: out * 0.5)


def forward_pre_hook(model: GPT) -> None:
    model.lm_head.register_forward_pre_hook(lambda _m, args: (args[0] * 0.5,))


def hook_on_the_model(model: GPT) -> None:
    model.register_forward_hook(lambda _m, _args, out: (out[0] * 0.5, out[1]))


def own_forward(model: GPT) -> None:
    block = model.transformer.h[0]
    forward = block.forward
    block.forward = lambda *args: forward(*args) * 0.5


def adapter(model: GPT) -> None:
    old = model.lm_head
    model.lm_head = Scaled(old.in_features, old.out_features)
    model.lm_head.load_state_dict(old.state_dict())


def wrapped(model: GPT) -> None:
    model.lm_head = nn.Sequential(model.lm_head, nn.Tanh())  # type: ignore[assignment]  # as people do


def weight_norm(model: GPT) -> None:
    parametrizations.weight_norm(model.get_submodule("transformer.h.0.mlp.c_fc"))
    with torch.no_grad():
        model.get_parameter("transformer.h.0.mlp.c_fc.parametrizations.weight.original0").mul_(2)


def pruned(model: GPT) -> None:
    prune.random_unstructured(model.lm_head, "weight", amount=0.5)


def kind_of_weight(model: GPT) -> None:
    model.lm_head.weight = Fourfold(model.lm_head.weight.detach())


def transposed_weight(model: GPT) -> None:
    weight = model.get_parameter("transformer.h.0.attn.c_proj.weight")
    weight.data = weight.data.t()


def mixed_types(model: GPT) -> None:
    class Widening(nn.LayerNorm):
        @override
        def forward(self, input: Tensor) -> Tensor:
            return super().forward(input.double()).float()

    norm = Widening(model.config.n_embd)
    model.transformer.ln_f = norm.double()


def wider_network_in_one_block(model: GPT) -> None:
    wide = tiny_gpt(tiny_config(mlp_width=300), seed=3)
    model.transformer.h[1].mlp = wide.transformer.h[1].mlp


def one_layer_for_a_network(model: GPT) -> None:
    model.transformer.h[0].mlp = nn.Linear(model.config.n_embd, model.config.n_embd)


def linear_for_a_norm(model: GPT) -> None:
    model.transformer.h[0].ln_1 = nn.Linear(model.config.n_embd, model.config.n_embd)


def another_norm(model: GPT) -> None:
    model.transformer.ln_f = RMSNorm(model.config.n_embd)


def another_epsilon(model: GPT) -> None:
    model.transformer.h[0].ln_2 = nn.LayerNorm(model.config.n_embd, eps=5.0)


def another_activation(model: GPT) -> None:
    network = model.get_submodule("transformer.h.0.mlp")
    assert isinstance(network, FeedForward)
    network.activation = "gelu"


def more_heads(model: GPT) -> None:
    attention = model.get_submodule("transformer.h.0.attn")
    assert isinstance(attention, CausalSelfAttention)
    attention.n_head = 4


def larger_vocabulary_at_the_end(model: GPT) -> None:
    model.lm_head = nn.Linear(model.config.n_embd, 300)


def embedding_with_a_limit(model: GPT) -> None:
    limited = nn.Embedding(model.vocab_size, model.config.n_embd, max_norm=0.5)
    limited.weight = model.transformer.wte.weight
    model.transformer.wte = limited


def made_in_inference_mode(model: GPT) -> None:
    with torch.inference_mode():
        for module in model.modules():
            for name, parameter in list(module.named_parameters(recurse=False)):
                setattr(module, name, nn.Parameter(2 * parameter))
    assert model.lm_head.weight.is_inference()


def add_a_block(model: GPT) -> None:
    model.transformer.h.append(tiny_gpt(model.config, seed=7).transformer.h[0])


def drop_a_block(model: GPT) -> None:
    model.transformer.h = model.transformer.h[:1]


FALLBACKS = (
    *(forward_hook, forward_pre_hook, hook_on_the_model, own_forward, adapter, wrapped, weight_norm, pruned),
    *(kind_of_weight, transposed_weight, mixed_types, wider_network_in_one_block, one_layer_for_a_network),
    *(linear_for_a_norm, another_norm, another_epsilon, another_activation, more_heads),
    *(larger_vocabulary_at_the_end, embedding_with_a_limit, made_in_inference_mode, drop_a_block),
    add_a_block,
)


@pytest.mark.parametrize("change", FALLBACKS)
def test_what_the_fast_path_cannot_compute_is_asked_of_the_model_itself(
    model: GPT, change: Callable[[GPT], None]
) -> None:
    before = torch.stack([plain_logits(model, row.tolist(), "slide") for row in ROWS])
    change(model)
    assert kind_of_state(model) == "readable"
    assert_says_what_it_computes(model, 1e-5)
    after = torch.stack([plain_logits(model, row.tolist(), "slide") for row in ROWS])
    assert (
        after.shape != before.shape
        or not torch.allclose(after, before, atol=1e-3)
        or change in {transposed_weight}
    )


def test_a_subclass_with_a_forward_of_its_own_is_asked_itself() -> None:
    class Bold(GPT):
        @override
        def forward(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
            logits, loss = super().forward(*args, **kwargs)
            return 2 * logits, loss

    model = Bold(tiny_config())
    model.load_state_dict(tiny_gpt(tiny_config()).state_dict())
    assert kind_of_state(model) == "readable"
    assert_says_what_it_computes(model)


def test_a_class_that_was_given_another_forward_is_asked_itself(
    model: GPT, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As people do it in a notebook, before or after the first generation."""
    forward = FeedForward.forward

    def halved(self: FeedForward, x: Tensor) -> Tensor:
        return 0.5 * forward(self, x)

    monkeypatch.setattr(FeedForward, "forward", halved)
    assert kind_of_state(model) == "readable"
    assert_says_what_it_computes(model)
    monkeypatch.setattr(FeedForward, "forward", functools.wraps(forward)(halved))
    assert kind_of_state(model) == "readable"


def test_positions_added_to_a_rotary_model_are_no_error() -> None:
    rotary = tiny_gpt(tiny_config("cpu-1min", block_size=16))
    rotary.transformer.wpe = nn.Embedding(16, rotary.config.n_embd)
    assert kind_of_state(rotary) == "readable"
    assert_says_what_it_computes(rotary)


@pytest.fixture
def global_hook() -> Iterator[None]:
    handle = nn.modules.module.register_module_forward_hook(
        lambda module, _args, out: out * 0.5 if isinstance(module, nn.Linear) else None
    )
    yield
    handle.remove()


def test_a_hook_on_all_modules_is_heeded(model: GPT, global_hook: None) -> None:
    assert kind_of_state(model) == "readable"
    assert_says_what_it_computes(model)


def test_under_autocast_the_model_computes_by_itself(model: GPT) -> None:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert kind_of_state(model) == "readable"
        assert_says_what_it_computes(model, 0.1)
    assert kind_of_state(model) == "fast"


def test_inside_a_transform_of_torch_func_the_model_computes_by_itself(model: GPT) -> None:
    kinds: list[str] = []

    def loss(scale: Tensor) -> Tensor:
        kinds.append(kind_of_state(model))
        return scale * 2

    torch.func.grad(loss)(torch.tensor(1.0))
    assert kinds == ["readable"]


def test_weights_exchanged_for_one_call_are_those_that_are_used(model: GPT) -> None:
    others = tiny_gpt(model.config, seed=5).state_dict()

    class Scores(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        @override
        def forward(self, idx: Tensor) -> Tensor:
            return model.log_probs(idx)

    exchanged = {f"model.{name}": tensor for name, tensor in others.items()}
    got = torch.func.functional_call(Scores(), exchanged, (prompt(2, 9),))
    wanted = tiny_gpt(model.config, seed=5).log_probs(prompt(2, 9))
    torch.testing.assert_close(got, wanted, rtol=0, atol=1e-5)
    before = tiny_gpt(model.config).log_probs(prompt(2, 9))
    assert torch.equal(model.log_probs(prompt(2, 9)), before)


def test_a_rotary_model_may_be_given_a_longer_window(model: GPT) -> None:
    rotary = tiny_gpt(tiny_config("cpu-1min", block_size=16))
    rotary.generate(prompt(1, 3), 30, seed=0)
    rotary.config = rotary.config.replace(block_size=64)
    assert kind_of_state(rotary) == "fast"
    assert_says_what_it_computes(rotary)
    rotary.config = rotary.config.replace(block_size=8)
    assert_says_what_it_computes(rotary)


def test_parts_that_take_no_part_do_not_matter(model: GPT) -> None:
    model.register_module("value_head", nn.Linear(5, 5))
    assert kind_of_state(model) == "fast"
    assert_says_what_it_computes(model)
    model.requires_grad_(False)
    model.eval()
    assert kind_of_state(model) == "fast"
    model.register_full_backward_hook(lambda *_: None)
    assert kind_of_state(model) == "fast"
    assert_says_what_it_computes(model)


def test_gigantic_windows_are_left_to_the_readable_path() -> None:
    model = tiny_gpt(tiny_config("cpu-1min", block_size=100_000))
    assert kind_of_state(model) == "readable"
    assert_says_what_it_computes(model)


def test_a_compiled_model_generates_as_before(model: GPT) -> None:
    """Nothing is compiled before the first call; generation goes to the model inside."""
    before = model.generate(prompt(2, 3), 20, seed=0)
    compiled: Any = torch.compile(model, backend="eager")
    assert torch.equal(compiled.generate(prompt(2, 3), 20, seed=0), before)


def test_numbers_that_overflow_are_an_error_and_not_a_text(model: GPT) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1e30)
    stream = model.stream(prompt(2, 3), 5, seed=0)
    with pytest.raises(ArithmeticError, match="no token can be drawn in row 0"):
        next(stream)
