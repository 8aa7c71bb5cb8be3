"""GPT against a plain second implementation, its initial state, and what its config foretells."""

from __future__ import annotations

import math
from typing import get_args

import pytest
import torch
from harness.own_model import HiddenCache
from harness.tiny_models import VARIANTS, random_ids, tiny_config, tiny_gpt
from oracles.plain_gpt import plain_logits, plain_loss, plain_weights
from torch import Tensor

from charlm.errors import InputError
from charlm.generation.cache import KVCache, LayerCache
from charlm.models.config import PRESETS, GPTConfig, PresetName
from charlm.models.gpt import GPT
from charlm.models.ops import fused_attention, plain_attention, rotary_tables, rotate

PRESET_NAMES: tuple[PresetName, ...] = get_args(PresetName)


@pytest.mark.parametrize("config", VARIANTS.values(), ids=VARIANTS.keys())
def test_logits_and_every_gradient_agree_with_the_plain_implementation(config: GPTConfig) -> None:
    model = tiny_gpt(config)
    T = 7
    idx, targets = random_ids(config, 2, T, 1), random_ids(config, 2, T, 2)
    targets[0, 3] = -1
    logits, loss = model(idx, targets)
    loss.backward()
    state: dict[str, Tensor] = {
        name: parameter.detach().clone().requires_grad_() for name, parameter in model.named_parameters()
    }
    if config.tie_weights:
        state["lm_head.weight"] = state["transformer.wte.weight"]
    expected = plain_logits(config, state, idx)
    expected_loss = plain_loss(expected, targets)
    expected_loss.backward()
    torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(loss, expected_loss, rtol=1e-5, atol=1e-5)
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None
        assert parameter.grad.abs().sum() > 0, name
        torch.testing.assert_close(parameter.grad, state[name].grad, rtol=1e-5, atol=1e-5, msg=name)


@pytest.mark.parametrize("preset", PRESET_NAMES)
def test_a_whole_block_agrees_with_the_plain_implementation(preset: PresetName) -> None:
    config = tiny_config(preset)
    model = tiny_gpt(config)
    idx = random_ids(config, 1, config.block_size)
    with torch.no_grad():
        expected = plain_logits(config, model.state_dict(), idx)
        torch.testing.assert_close(model(idx)[0], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("config", VARIANTS.values(), ids=VARIANTS.keys())
def test_attention_shows_the_weights_of_the_plain_implementation(config: GPTConfig) -> None:
    model = tiny_gpt(config)
    idx = random_ids(config, 2, 5)
    shown = model.attention(idx)
    assert not shown.requires_grad
    torch.testing.assert_close(shown, plain_weights(config, model.state_dict(), idx), rtol=1e-5, atol=1e-6)
    L, B, H, T = config.n_layer, 2, config.n_head, 5
    torch.testing.assert_close(shown.sum(dim=-1), torch.ones(L, B, H, T))


def test_attention_is_shown_without_dropout_and_leaves_the_model_as_it_was() -> None:
    model = tiny_gpt(tiny_config("lecture", dropout=0.5)).train()
    model.transformer.drop.eval()
    flags = [part.training for part in model.modules()]
    idx = random_ids(model.config, 1, 16)
    state = torch.get_rng_state()
    first = model.attention(idx)
    assert torch.equal(first, model.attention(idx))
    assert torch.equal(torch.get_rng_state(), state)
    assert [part.training for part in model.modules()] == flags


def test_attention_of_half_precision_weights_is_shown_in_float32() -> None:
    model = tiny_gpt(tiny_config("cpu-1min"))
    idx = random_ids(model.config, 1, 16)
    exact = model.attention(idx)
    shown = model.to(torch.bfloat16).attention(idx)
    assert shown.dtype == torch.float32
    torch.testing.assert_close(shown, exact, rtol=0, atol=0.05)


def test_attention_refuses_what_the_model_could_not_read() -> None:
    model = tiny_gpt(tiny_config())
    with pytest.raises(InputError, match="at most block_size = 16 ids a row, got 17"):
        model.attention(random_ids(model.config, 1, 17))
    with pytest.raises(InputError, match="from 0 to 12"):
        model.attention(torch.tensor([[13]]))
    with pytest.raises(InputError, match="int64"):
        model.attention(torch.zeros(1, 3))


@pytest.mark.parametrize("config", VARIANTS.values(), ids=VARIANTS.keys())
def test_changing_a_character_changes_no_logit_before_it(config: GPTConfig) -> None:
    model = tiny_gpt(config)
    idx = random_ids(config, 1, config.block_size)
    with torch.no_grad():
        before = model(idx)[0]
        for t in range(config.block_size):
            changed = idx.clone()
            changed[0, t] = (changed[0, t] + 1) % config.vocab_size
            after = model(changed)[0]
            assert torch.equal(after[:, :t], before[:, :t])
            assert not torch.equal(after[:, t], before[:, t])


@pytest.mark.parametrize(("T", "S"), [(1, 1), (1, 9), (9, 9), (3, 9), (8, 9), (130, 130), (130, 200)])
def test_fused_and_plain_attention_agree_with_their_gradients(T: int, S: int) -> None:
    generator = torch.Generator().manual_seed(T * S)
    q, k, v = (
        torch.randn(2, 3, n, 8, generator=generator, dtype=torch.float64, requires_grad=True)
        for n in (T, S, S)
    )
    up = torch.randn(2, 3, T, 8, generator=generator, dtype=torch.float64)
    plain, fused = plain_attention(q, k, v), fused_attention(q, k, v)
    torch.testing.assert_close(plain, fused, rtol=1e-10, atol=1e-10)
    for a, b in zip(
        torch.autograd.grad(plain, (q, k, v), up), torch.autograd.grad(fused, (q, k, v), up), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("T", [128, 129])
def test_the_model_is_the_same_on_both_sides_of_the_change_to_fused_attention(T: int) -> None:
    config = tiny_config(block_size=256, n_layer=1)
    model = tiny_gpt(config, dtype=torch.float64)
    idx = random_ids(config, 1, T)
    with torch.no_grad():
        whole = model(idx)[0]
        cache = model.new_cache()
        parts = [model(idx[:, :5], cache=cache)[0], model(idx[:, 5:], cache=cache)[0]]
    torch.testing.assert_close(whole, torch.cat(parts, dim=1), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("attention", [plain_attention, fused_attention])
def test_attention_drops_the_given_share_of_weights_and_rescales_the_rest(attention: object) -> None:
    assert callable(attention)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        q, v = torch.zeros(1, 1, 64, 8), torch.ones(1, 1, 64, 8)
        dropped = torch.cat([attention(q, q, v, 0.25) for _ in range(50)])
    # The last rows average 64 weights of 1/64 each, kept with chance 3/4 and divided by it.
    mean, spread = dropped[:, 0, -1, 0].mean().item(), dropped[:, 0, -1, 0].std().item()
    assert abs(mean - 1) < 0.05
    assert 0.03 < spread < 0.15


def test_dropout_acts_in_training_and_is_off_in_evaluation() -> None:
    model = tiny_gpt(tiny_config(dropout=0.5))
    idx = random_ids(model.config, 1, 16)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        assert not torch.equal(model(idx)[0], model(idx)[0])
        model.eval()
        assert torch.equal(model(idx)[0], model(idx)[0])


def test_rotary_scores_depend_on_the_distance_alone() -> None:
    cos, sin = rotary_tables(0, 40, 8, torch.device("cpu"))
    generator = torch.Generator().manual_seed(0)
    q, k = torch.randn(2, 1, 1, 1, 8, generator=generator, dtype=torch.float64)

    def score(t: int, s: int) -> float:
        turned_q, turned_k = (rotate(x, cos[i : i + 1], sin[i : i + 1]) for x, i in ((q, t), (k, s)))
        return float((turned_q * turned_k).sum())

    assert score(9, 4) == pytest.approx(score(34, 29), abs=1e-12)
    assert score(9, 4) != pytest.approx(score(9, 5), abs=1e-3)


def test_rotary_tables_hold_for_long_windows() -> None:
    cos, sin = rotary_tables(99_990, 10, 4, torch.device("cpu"))
    assert cos[9, 0].item() == pytest.approx(math.cos(99_999), abs=1e-9)
    assert sin[9, 1].item() == pytest.approx(math.sin(99_999 / 100), abs=1e-9)


def test_a_model_holds_no_float64_so_that_every_device_can_take_it() -> None:
    model = GPT(tiny_config(position="rotary"))
    assert {tensor.dtype for tensor in (*model.parameters(), *model.buffers())} == {torch.float32}


@pytest.mark.parametrize("preset", PRESET_NAMES)
def test_the_loss_at_the_start_is_that_of_a_uniform_guess(preset: PresetName) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = GPT.from_config(preset, vocab_size=65, n_layer=2, block_size=32, dropout=0.0)
        idx, targets = torch.randint(65, (2, 16, 32))
    with torch.no_grad():
        _, loss = model(idx, targets)
    assert abs(float(loss) - math.log(65)) < (0.25 if model.config.tie_weights else 0.1)


@pytest.mark.parametrize("preset", PRESET_NAMES)
def test_the_same_global_seed_gives_the_same_weights(preset: PresetName) -> None:
    states = []
    with torch.random.fork_rng(devices=[]):
        for _ in range(2):
            torch.manual_seed(7)
            states.append(GPT(tiny_config(preset)).state_dict())
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_gpt2_initialisation_makes_residual_projections_smaller_with_depth() -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = GPT(tiny_config("gpt2", n_embd=64, n_layer=8))
    block = model.get_submodule("transformer.h.3")
    assert block.get_parameter("attn.c_attn.weight").std().item() == pytest.approx(0.02, rel=0.1)
    for name in ("attn.c_proj.weight", "mlp.c_proj.weight"):
        assert block.get_parameter(name).std().item() == pytest.approx(0.02 / 4, rel=0.1)
    assert not block.get_parameter("mlp.c_proj.bias").any()


def test_zero_initialisation_makes_every_block_the_identity() -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = GPT(tiny_config(init="zero"))
    block = model.transformer.h[0]
    x = torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(0))
    assert torch.equal(block(x), x)


def test_a_tied_model_of_the_zero_initialisation_begins_not_far_from_uniform() -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = GPT(tiny_config("cpu-1min", vocab_size=500, n_embd=128, tie_weights=True)).eval()
        idx = torch.randint(500, (4, 16))
    _, loss = model(idx, idx.roll(-1, 1))
    assert loss is not None
    assert loss.item() < math.log(500) + 1.5  # the embedding of a character predicts that character


def test_constructors_print_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    for preset in PRESET_NAMES:
        GPT(tiny_config(preset))
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err == ""


def test_repr_shows_every_setting_and_the_size() -> None:
    config = tiny_config()
    text = repr(GPT(config))
    assert text.startswith("GPT(vocab_size=13, block_size=16, n_layer=2, ")
    assert text.endswith(f"# {config.num_parameters():,} parameters")
    assert all(f"{name}={value!r}" in text for name, value in config.to_dict().items())
    assert "\n" not in text


def test_gpt2_parameter_names_are_the_published_ones() -> None:
    names = ["transformer.wte.weight", "transformer.wpe.weight"]
    for layer in range(2):
        names += [
            f"transformer.h.{layer}.{part}.{kind}"
            for part in ("ln_1", "attn.c_attn", "attn.c_proj", "ln_2", "mlp.c_fc", "mlp.c_proj")
            for kind in ("weight", "bias")
        ]
    names += ["transformer.ln_f.weight", "transformer.ln_f.bias", "lm_head.weight"]
    assert list(GPT(tiny_config("gpt2")).state_dict()) == names


def test_rotary_tables_are_not_saved() -> None:
    names = GPT(tiny_config(position="rotary")).state_dict()
    assert not [name for name in names if "cos" in name or "sin" in name or "wpe" in name]


def test_tied_weights_are_one_tensor_and_stay_so() -> None:
    model = GPT(tiny_config(tie_weights=True)).double()
    assert model.lm_head.weight is model.transformer.wte.weight
    model.load_state_dict({name: torch.ones_like(value) for name, value in model.state_dict().items()})
    assert model.lm_head.weight is model.transformer.wte.weight


def test_from_config_takes_a_config_a_mapping_and_a_preset_with_overrides() -> None:
    config = tiny_config()
    assert GPT.from_config(config).config == config
    assert GPT.from_config(config.to_dict()).config == config
    assert GPT.from_config(config, n_layer=1).config == config.replace(n_layer=1)
    small = GPT.from_config("lecture", vocab_size=13, n_layer=1, n_head=2, n_embd=8, block_size=4)
    assert (small.vocab_size, small.block_size, small.config.dropout) == (
        13,
        4,
        PRESETS["lecture"]["dropout"],
    )


@pytest.mark.parametrize("preset", PRESET_NAMES)
def test_reading_in_pieces_with_a_cache_gives_the_logits_of_one_reading(preset: PresetName) -> None:
    config = tiny_config(preset)
    model = tiny_gpt(config, dtype=torch.float64)
    idx = random_ids(config, 3, 16)
    with torch.no_grad():
        whole = model(idx)[0]
        for sizes in ([1] * 16, [16], [5, 1, 7, 3], [15, 1]):
            cache = model.new_cache()
            pieces = [model(piece, cache=cache)[0] for piece in idx.split(sizes, dim=1)]
            torch.testing.assert_close(torch.cat(pieces, dim=1), whole, rtol=1e-10, atol=1e-10)
            assert cache.length == 16


@pytest.mark.parametrize("preset", PRESET_NAMES)
def test_a_fork_of_a_cache_and_one_that_was_cut_go_on_from_what_they_have_read(preset: PresetName) -> None:
    config = tiny_config(preset)
    model = tiny_gpt(config, dtype=torch.float64)
    ids, other = random_ids(config, 2, 9), random_ids(config, 2, 9, seed=1)
    with torch.no_grad():
        cache = model.new_cache()
        model(ids[:, :7], cache=cache)
        twin = cache.fork([1, 0, 1])
        cache.truncate(4)
        after_cut = model(other[:, 4:], cache=cache)[0]
        after_fork = model(ids[[1, 0, 1], 7:], cache=twin)[0]
        joined = model(torch.cat((ids[:, :4], other[:, 4:]), dim=1))[0]
        whole = model(ids)[0]
    torch.testing.assert_close(after_cut, joined[:, 4:], rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(after_fork, whole[[1, 0, 1], 7:], rtol=1e-10, atol=1e-10)


def test_a_cache_starts_empty_and_belongs_to_one_generation() -> None:
    model = tiny_gpt(tiny_config())
    first, second = model.new_cache(), model.new_cache()
    with torch.no_grad():
        model(random_ids(model.config, 2, 5), cache=first)
    assert (first.length, second.length) == (5, 0)
    assert isinstance(first, KVCache)
    assert all(isinstance(layer, LayerCache) and layer.length == 5 for layer in first.layers)


def test_a_cache_has_no_subclasses_and_another_kind_is_refused() -> None:
    with pytest.raises(TypeError, match="any class with truncate and fork"):

        class Mine(KVCache):  # type: ignore[misc]  # that it is final is the point
            pass

    model = tiny_gpt(tiny_config())
    with pytest.raises(InputError, match=r"cache must be from new_cache\(\), got a HiddenCache"):
        model(torch.tensor([[1]]), cache=HiddenCache())


def test_a_pass_that_was_interrupted_leaves_nothing_in_the_cache() -> None:
    model = tiny_gpt(tiny_config())
    idx = torch.tensor([[1, 2, 3]])
    with torch.no_grad():
        wanted = model(idx)[0]
        cache = model.new_cache()
        handle = model.transformer.h[1].register_forward_pre_hook(lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            model(idx, cache=cache)
        handle.remove()
        assert torch.equal(model(idx, cache=cache)[0], model(idx, cache=model.new_cache())[0])
        torch.testing.assert_close(model(idx)[0], wanted)
