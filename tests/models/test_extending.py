"""A larger vocabulary and another window: what a model has learnt stays, and nothing is lost in silence."""

from __future__ import annotations

import pytest
import torch
from harness.tiny_models import PRESET_NAMES, random_ids, tiny_config, tiny_gpt
from torch import Tensor, nn

from charlm import GPT, BigramLM, BlockDataset, LanguageModel, MixtureLM, NGramLM
from charlm.errors import ConfigError, InputError
from charlm.models.config import PresetName
from charlm.models.contents import unique_tensors
from charlm.models.extending import extended

V, MORE = 13, 20


def said(model: LanguageModel, idx: Tensor) -> Tensor:
    with torch.no_grad():
        return model.eval()(idx)[0]


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("preset", PRESET_NAMES)
def test_old_rows_stay_bit_equal_and_new_ones_are_their_mean(preset: PresetName, tied: bool) -> None:
    model = tiny_gpt(tiny_config(preset, tie_weights=tied))
    before = {name: tensor.clone() for name, tensor in unique_tensors(model).items()}
    larger = extended(model, MORE)
    after = unique_tensors(larger)
    assert after.keys() == before.keys()
    for name, old in before.items():
        assert torch.equal(unique_tensors(model)[name], old), "the model itself stays as it is"
        new = after[name]
        assert torch.equal(new[: len(old)], old), name
        if len(new) > len(old):
            assert len(new) == MORE
            torch.testing.assert_close(new[V:], old.mean(dim=0, keepdim=True).expand_as(new[V:]))
    assert (larger.lm_head.weight is larger.transformer.wte.weight) == tied
    assert not {t.data_ptr() for t in after.values()} & {t.data_ptr() for t in unique_tensors(model).values()}


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
@pytest.mark.parametrize("preset", PRESET_NAMES)
def test_old_logits_and_greedy_text_stay(preset: PresetName, dtype: torch.dtype, tolerance: float) -> None:
    model = tiny_gpt(tiny_config(preset), dtype=dtype)
    larger = extended(model, MORE)
    idx = random_ids(model.config, 4, 16)
    before, after = said(model, idx), said(larger, idx)
    assert after.dtype == dtype
    torch.testing.assert_close(after[..., :V], before, atol=tolerance, rtol=0)
    assert torch.equal(after.argmax(dim=-1), before.argmax(dim=-1))
    ids = [m.generate(idx[:1, :3], 40, temperature=0) for m in (model, larger)]
    assert torch.equal(*ids)


def test_a_bigram_table_grows_in_both_directions() -> None:
    model = BigramLM(3)
    table = model.token_embedding_table.weight.detach()
    grown = extended(model, 5).token_embedding_table.weight.detach()
    assert torch.equal(grown[:3, :3], table)
    torch.testing.assert_close(grown[3, :3], table.mean(dim=0))
    torch.testing.assert_close(grown[:3, 4], table.mean(dim=1))
    torch.testing.assert_close(grown[4, 4], table.mean())


def test_a_window_gets_shorter_and_with_rotary_positions_longer() -> None:
    for preset in PRESET_NAMES:
        model = tiny_gpt(tiny_config(preset))
        shorter = extended(model, V, block_size=8)
        idx = random_ids(model.config, 2, 8)
        assert shorter.block_size == 8
        torch.testing.assert_close(said(shorter, idx), said(model, idx))
        if model.config.position == "learned":
            with pytest.raises(ConfigError, match="block_size must be at most 16, got 32"):
                extended(model, V, block_size=32)
            continue
        longer = extended(model, V, block_size=32)
        torch.testing.assert_close(said(longer, idx), said(model, idx))
        assert said(longer, random_ids(model.config, 1, 32)).shape == (1, 32, V)


def test_flags_devices_and_generators_stay_as_they_were() -> None:
    model = tiny_gpt(tiny_config("gpt2", dropout=0.3)).train()
    model.transformer.drop.eval()
    state = torch.get_rng_state()
    larger = extended(model, MORE, dropout=0.1, attention_dropout=0.0)
    assert torch.equal(torch.get_rng_state(), state)
    assert [p.training for p in larger.modules()] == [p.training for p in model.modules()]
    assert (larger.config.dropout, larger.config.attention_dropout) == (0.1, 0.0)
    assert extended(model.to(torch.bfloat16), MORE).lm_head.weight.dtype == torch.bfloat16


def test_what_counts_is_refused_by_name() -> None:
    data = BlockDataset(torch.arange(60) % V, 4)
    ngram = NGramLM(V, order=3).fit(data)
    with pytest.raises(InputError, match=r"kind 'ngram' counts characters .* count the new text instead"):
        extended(ngram, MORE)
    with pytest.raises(InputError, match=r"kind 'mixture' counts"):
        extended(MixtureLM([tiny_gpt(tiny_config()), ngram]), MORE)


class _Pairs(BigramLM):
    """Has a table with a row for each pair of characters."""

    kind = "pairs of test_extending"

    def __init__(self, vocab_size: int) -> None:
        super().__init__(vocab_size)
        self.pairs = nn.Embedding(vocab_size**2, 2)


class _Counts(BigramLM):
    """Has a count for each character."""

    kind = "counts of test_extending"

    def __init__(self, vocab_size: int) -> None:
        super().__init__(vocab_size)
        self.register_buffer("seen", torch.zeros(vocab_size, dtype=torch.int64))


@pytest.mark.parametrize(("cls", "name"), [(_Pairs, "pairs.weight"), (_Counts, "seen")])
def test_a_table_of_other_rows_than_characters_is_refused_by_name(cls: type[BigramLM], name: str) -> None:
    with pytest.raises(InputError, match=rf"its '{name}' of shape .* has rows that are not characters"):
        extended(cls(V), MORE)


class _Biased(BigramLM):
    """A model of a user's own, with a number for each character."""

    kind = "biased of test_extending"

    def __init__(self, vocab_size: int) -> None:
        super().__init__(vocab_size)
        self.bias = nn.Parameter(torch.arange(float(vocab_size)))


def test_a_model_of_ones_own_is_extended_by_its_shapes() -> None:
    larger = extended(_Biased(3), 5)
    assert isinstance(larger, _Biased)
    assert larger.bias.tolist() == [0.0, 1.0, 2.0, 1.0, 1.0]


def test_other_changes_are_refused() -> None:
    model = tiny_gpt(tiny_config())
    with pytest.raises(ConfigError, match="so n_layer cannot change; block_size, dropout"):
        extended(model, MORE, n_layer=3)
    with pytest.raises(InputError, match="at least the model's 13, got 12"):
        extended(model, 12)
    assert isinstance(extended(model, V), GPT)
