"""MixtureLM: what its members say, weighed by what precedes; fitted, saved, and refused."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from harness.drawn_models import mixed, random_rows
from harness.tiny_models import tiny_config, tiny_gpt
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from charlm import BigramLM, BlockDataset, CharLM, CharTokenizer, LanguageModel, MixtureLM, NGramLM, load
from charlm.errors import ConfigError, FileFormatError, InputError
from charlm.evaluation import evaluate
from charlm.models.config import GPTConfig, MixtureConfig

V = 13
F64 = torch.float64


def members(dtype: torch.dtype = torch.float32, block_size: int = 8) -> list[LanguageModel]:
    """Return a GPT, and an n-gram model of a text that it does not know."""
    ngram = NGramLM(V, 4).to(dtype).fit(BlockDataset(random_rows([300])[0], 4))
    return [tiny_gpt(tiny_config("cpu-1min", block_size=block_size), dtype=dtype), ngram]


def by_hand(mixture: MixtureLM, idx: Tensor) -> Tensor:
    """Return the mixed probabilities (B, T, V) by their definition, one place after the other."""
    gate = np.exp(mixture.gate.detach().numpy())
    gate /= gate.sum(axis=1, keepdims=True)
    p = [member(idx)[0].softmax(-1).detach().numpy() for member in mixture.members]
    mixed = np.zeros_like(p[0])
    for place in np.ndindex(*p[0].shape[:2]):
        own = [one[place] for one in p]
        mean = np.prod(own, axis=0) ** (1 / len(own))
        voices = [*own, mean / mean.sum()]
        for number, weights in enumerate(gate):
            digits = [number // 3 ** (len(own) - 1 - k) % 3 for k in range(len(own))]
            near = np.prod([max(1 - 2 * abs(q.max() - d / 2), 0) for q, d in zip(own, digits, strict=True)])
            mixed[place] += near * sum(w * voice for w, voice in zip(weights, voices, strict=True))
    return torch.from_numpy(mixed)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 99), T=st.integers(1, 8))
def test_probabilities_are_the_weighted_sum_and_add_up_to_one(seed: int, T: int) -> None:
    mixture = mixed(members(F64), seed)
    idx = torch.stack(random_rows([T, T], seed=seed))
    p = mixture(idx)[0].exp()
    torch.testing.assert_close(p, by_hand(mixture, idx), rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(p.sum(-1), torch.ones(2, T, dtype=F64), rtol=0, atol=1e-12)
    wide = mixed(members(), seed)(idx)[0].double().exp()
    torch.testing.assert_close(wide.sum(-1), torch.ones(2, T, dtype=F64), rtol=0, atol=1e-6)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 99), place=st.integers(1, 7))
def test_a_prediction_sees_nothing_of_what_comes(seed: int, place: int) -> None:
    mixture = mixed(members(), seed)
    idx = torch.stack(random_rows([8], seed=seed))
    other = idx.clone()
    other[:, place:] = (idx[:, place:] + 1 + seed % (V - 1)) % V
    assert torch.equal(mixture(idx)[0][:, :place], mixture(other)[0][:, :place])


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (F64, 1e-9)])
def test_every_way_to_score_a_text_gives_the_same(dtype: torch.dtype, tolerance: float) -> None:
    mixture = mixed(members(dtype, block_size=64))
    (ids,) = random_rows([65])
    loss = evaluate(mixture, BlockDataset(ids, 64)).loss_nats
    assert loss == pytest.approx(-mixture.log_probs(ids[None]).mean().item(), abs=tolerance)
    p = by_hand(mixture, ids[None, :-1])
    assert loss == pytest.approx(-p[0, range(64), ids[1:]].log().mean().item(), abs=tolerance)
    state, one_by_one = mixture.new_state(), []
    for one, following in itertools.pairwise(ids):
        state.observe(one[None])
        one_by_one.append(state.predict().double().log_softmax(-1)[0, following].item())
    assert loss == pytest.approx(-np.mean(one_by_one), abs=tolerance)


@pytest.mark.parametrize("block_size", [1, 2, 3, 8])
@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_past_its_window_a_member_is_asked_as_generation_asks_it(block_size: int, dtype: torch.dtype) -> None:
    """Whether read at once, through a cache in pieces, or by the engine: with overflow "restart"."""
    gpt, ngram = members(dtype, block_size)
    mixture, alone = mixed([gpt, ngram]), MixtureLM([gpt])
    assert mixture.block_size is None
    idx = torch.stack(random_rows([30, 30]))
    tolerance = 1e-5 if dtype == torch.float32 else 1e-12
    with torch.no_grad():
        whole, said = mixture(idx)[0], alone(idx)[0]
        state = gpt.new_state(2, overflow="restart")
        state.observe(idx[:, :1])
        scores = torch.stack(state.score(idx[:, 1:]))  # (2, 29)
        at = idx[:, 1:, None]
        torch.testing.assert_close(
            said[:, :-1].gather(-1, at)[..., 0].double(), scores, rtol=0, atol=tolerance
        )
        cache = mixture.new_cache()
        pieces = [mixture(piece, cache=cache)[0] for piece in idx.split([1, 2, 9, 1, 1, 16], dim=1)]
        torch.testing.assert_close(torch.cat(pieces, dim=1), whole, rtol=0, atol=tolerance)
        own = mixture.new_state(2)
        own.observe(idx)
        torch.testing.assert_close(own.predict(), whole[:, -1], rtol=0, atol=tolerance)
        slow = mixture.new_state(2, use_cache=False)
        slow.observe(idx)
        torch.testing.assert_close(slow.predict(), whole[:, -1], rtol=0, atol=tolerance)


def test_losses_are_those_of_evaluate() -> None:
    gpt, ngram = members(F64, block_size=4)
    mixture = mixed([gpt, ngram])
    data = BlockDataset(random_rows([300])[0], 50)
    expected = [evaluate(one, data).loss_nats for one in (MixtureLM([gpt]), ngram, mixture)]
    assert mixture.losses(data) == pytest.approx(expected, abs=1e-9)
    for most in (150, 299, 10**6):  # a part; all but the first; more than there are
        part = evaluate(mixture, data, max_chars=most).loss_nats
        assert mixture.losses(data, max_chars=most)[-1] == pytest.approx(part, abs=1e-9)


def test_a_fit_finds_the_weights_of_which_the_text_was_made() -> None:
    generator = torch.Generator().manual_seed(5)
    first, second = BigramLM(V), BigramLM(V)
    with torch.no_grad():
        for model, sharpness in ((first, 4.0), (second, 1.0)):
            weight = model.token_embedding_table.weight
            weight.copy_(sharpness * torch.randn(V, V, generator=generator))
    true = MixtureLM([first, second])
    with torch.no_grad():
        true.gate.copy_(2 * torch.randn(true.gate.shape, generator=generator))
    p = (
        true(torch.arange(V)[:, None])[0][:, 0].double().softmax(dim=-1).detach().numpy()
    )  # (V, V): each sees one id

    def drawn(seed: int) -> BlockDataset:
        uniforms = np.random.default_rng(seed).random(20_000)
        ids = [0]
        for u in uniforms:
            ids.append(min(int(np.searchsorted(p[ids[-1]].cumsum(), u)), V - 1))
        return BlockDataset(np.array(ids), 50)

    data, after = drawn(3), drawn(4)
    fitted = MixtureLM([first, second]).fit(data)
    assert evaluate(fitted, data).loss_nats <= evaluate(true, data).loss_nats + 1e-3
    assert evaluate(fitted, after).loss_nats < evaluate(true, after).loss_nats + 2e-3
    assert evaluate(fitted, after).loss_nats < evaluate(MixtureLM([first, second]), after).loss_nats - 0.01


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 99), length=st.integers(9, 400), max_chars=st.none() | st.integers(1, 500))
def test_a_fitted_mixture_is_not_worse_than_a_member_and_a_fit_draws_nothing(
    seed: int, length: int, max_chars: int | None
) -> None:
    both = members()
    before = torch.get_rng_state()
    data = BlockDataset(random_rows([length], seed=seed)[0], 8)
    mixture = MixtureLM(both).fit(data, max_chars=max_chars)
    again = MixtureLM(both).fit(data, max_chars=max_chars)
    assert torch.equal(mixture.gate, again.gate)
    assert torch.isfinite(mixture.gate).all()
    assert torch.equal(torch.get_rng_state(), before)
    if max_chars is None and length > 200:
        losses = [evaluate(member, data).loss_nats for member in both]
        assert evaluate(mixture, data).loss_nats < min(losses) + 0.02


def test_three_members_and_one_are_mixtures_too() -> None:
    (ids,) = random_rows([600])
    data = BlockDataset(ids, 8)
    three = MixtureLM([*members(), BigramLM(V).fit(data)]).fit(data)
    assert three.gate.shape == (27, 4)
    alone = MixtureLM(members()[:1]).fit(data)
    assert evaluate(alone, data).loss_nats == pytest.approx(evaluate(members()[0], data).loss_nats, abs=1e-6)


def test_gradients_reach_the_gpt_and_the_gate() -> None:
    mixture = MixtureLM(members()).train()
    idx = torch.stack(random_rows([8, 8]))
    _, loss = mixture(idx, idx.roll(-1, 1))
    loss.backward()
    assert all(p.grad is not None for p in mixture.parameters())


def test_a_saved_mixture_is_the_same_model(tmp_path: Path) -> None:
    tokenizer = CharTokenizer("abcdefghijklm")
    mixture = mixed(members())
    CharLM(mixture, tokenizer).save(tmp_path / "model")
    found = load(tmp_path / "model", device="cpu")
    assert isinstance(found.model, MixtureLM)
    assert found.model.config == mixture.config
    assert found.model.config.num_parameters() == mixture.num_parameters()
    assert found.generate("abc", 50, seed=1) == CharLM(mixture, tokenizer).generate("abc", 50, seed=1)
    again = MixtureLM.from_config(json.loads(json.dumps(mixture.config.to_dict())))
    assert again.config == mixture.config


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kinds": ["gpt", "nothing"]}, "no model is of the kind 'nothing'"),
        ({"kinds": ["gpt", "ngram", "gpt"]}, "a kind for each of"),
        ({"kinds": [], "members": []}, "a kind for each of"),
        ({"members": [{}, {}]}, "vocab_size is missing"),
        ({"members": [1, 2]}, "members must be"),
        ({"members": 3}, "members must be"),
        ({"vocab_size": 14}, "all members must have the vocab_size"),
    ],
)
def test_settings_that_do_not_fit_are_refused(change: dict[str, object], message: str) -> None:
    values = {**MixtureLM(members()).config.to_dict(), **change}
    with pytest.raises(ConfigError, match=message):
        MixtureConfig.from_dict(values)


def test_a_file_in_which_a_members_tables_are_wrong_is_refused(tmp_path: Path) -> None:
    mixture = MixtureLM(members())
    ngram = mixture.members[1]
    assert isinstance(ngram, NGramLM)
    ngram.counts[3] = 0
    mixture.save(tmp_path / "model")
    with pytest.raises(FileFormatError, match="counts must be 1 or more"):
        LanguageModel.load(tmp_path / "model")


def test_members_that_make_no_mixture_are_refused() -> None:
    gpt, ngram = members()
    for wrong in ([], [gpt, torch.nn.Linear(2, 2)], [gpt, None]):
        with pytest.raises(InputError, match="members must be models"):
            MixtureLM(wrong)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="all members must have the vocab_size"):
        MixtureLM([gpt, BigramLM(V + 1)])
    with pytest.raises(InputError, match=r"one type, got torch\.float32 and torch\.float64"):
        MixtureLM([gpt, ngram.double()])
    assert isinstance(MixtureLM([gpt]).config.members[0], GPTConfig)


def test_a_cache_of_something_else_is_refused() -> None:
    gpt, ngram = members()
    with pytest.raises(InputError, match="cache must be from new_cache"):
        MixtureLM([gpt, ngram])(torch.zeros(1, 1, dtype=torch.int64), cache=gpt.new_cache())
