"""Which models may compress, that their bits are everywhere the same, and how a model is known."""

from __future__ import annotations

import dataclasses
import hashlib
import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from harness.tiny_models import tiny_config, tiny_gpt

from charlm import BigramLM, CharLM, CharTokenizer, LanguageModel, MixtureLM, NGramLM
from charlm.compression import compress
from charlm.compression.portable import ARITHMETIC
from charlm.compression.predictor import begun, engine_maker, model_sha256
from charlm.errors import InputError
from charlm.models.config import GPTConfig, NGramConfig
from charlm.models.gpt import GPT
from charlm.native import library as native
from charlm.native.storage import round_weights

needs_kernel = pytest.mark.skipif(
    isinstance(native.portable_library(), str), reason="the machine has no compiler that will do"
)
V = 40
CONFIGS = [
    tiny_config("cpu-1min", vocab_size=V, block_size=70, n_embd=34, n_head=1),
    tiny_config(vocab_size=V, block_size=70, n_embd=48, activation="gelu", conv_width=3),
    tiny_config("gpt2", vocab_size=V, block_size=70, activation="gelu_tanh"),
    tiny_config("cpu-1min", vocab_size=V, block_size=70, activation="swiglu"),
]


def numbers(shape: torch.Size, seed: int) -> torch.Tensor:
    """Return numbers in which no library has a say: thirds of small integers."""
    n = np.arange(shape.numel(), dtype=np.int64)
    mixed = (n * 2_654_435_761 + seed * 97) % 1_000_003 % 401 - 200
    return torch.from_numpy((mixed / 600).astype(np.float32)).view(shape)


def gpt(config: GPTConfig) -> GPT:
    model = tiny_gpt(config).eval()
    with torch.no_grad():
        for seed, parameter in enumerate(model.parameters()):
            parameter.copy_(numbers(parameter.shape, seed))
    return model


def ngram() -> NGramLM:
    model = NGramLM(V)
    ids = (np.arange(3_000, dtype=np.uint64) ** 2 % 1_009 % V).astype(np.uint8)
    shares = torch.linspace(0.4, 0.9, model.window_shares.numel()).view(-1, 3)
    model._store(ids, model.discounts, shares.bfloat16().float())
    return model


def mixture(config: GPTConfig) -> MixtureLM:
    model = MixtureLM([gpt(config), ngram()])
    with torch.no_grad():
        model.gate.copy_(numbers(model.gate.shape, 1) * 9)
    return model.eval()


def bits_of_all() -> str:
    """Return a digest of what models of every shape and storage say, beyond their windows, too."""
    digest = hashlib.sha256()
    models: list[LanguageModel] = [ngram(), *map(mixture, CONFIGS[:2])]
    for config in CONFIGS:
        for storage in ("float32", "bfloat16", "int8"):
            models.append(gpt(config))
            round_weights(models[-1], storage)
    ids = torch.from_numpy(np.arange(3 * 90).reshape(3, 90) ** 2 % 37)
    for model in models:
        state = begun(engine_maker(model), [3], 3)
        state.observe([ids[0], ids[1, :60], ids[2, :5]])
        digest.update(state.predict().numpy().tobytes())
    return digest.hexdigest()[:16]


@needs_kernel
@pytest.mark.parametrize(
    "flags", ["", *(pytest.param(f, marks=pytest.mark.slow) for f in ("-mno-avx512f", "-mno-avx -O1"))]
)
def test_all_vectors_and_levels_give_the_bits_that_are_pinned_to_the_version_of_the_arithmetic(
    flags: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If this fails where nothing was changed, this machine is one that the portable build does not hold for.

    If it was, files of before would decode to something else: make `ARITHMETIC` one more.
    """
    if flags.startswith("-m") and "avx512f" not in native._processor():
        pytest.skip("the processor has no wider vectors to do without")
    if flags:
        monkeypatch.setattr(native, "_tried_portable", [])
        monkeypatch.setenv("CC", f"{shutil.which('gcc') or 'cc'} {flags}")
    assert not isinstance(native.portable_library(), str)
    assert (ARITHMETIC, bits_of_all()) == (1, "94fb0442a8a23b5a")


@needs_kernel
def test_any_number_of_threads_makes_the_same_file() -> None:
    characters = "".join(map(chr, range(40, 40 + V)))
    config = tiny_config("cpu-1min", vocab_size=V, block_size=64, n_embd=128, n_layer=3)
    lm = CharLM(gpt(config), CharTokenizer(characters))
    text = (characters * 6).encode()
    files, before = [], torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            files.append(compress(text, lm))
    finally:
        torch.set_num_threads(before)
    assert files[0] == files[1] == files[2]


@needs_kernel
def test_it_says_what_the_model_says() -> None:
    for model in (mixture(CONFIGS[0]), gpt(CONFIGS[1]), ngram()):
        state = begun(engine_maker(model), [3])
        ids = torch.arange(50) ** 2 % 37
        said = state.verify(ids).log_softmax(dim=-1)
        with torch.no_grad():
            wanted = model(torch.cat([torch.tensor([3]), ids])[None])[0][0].log_softmax(dim=-1)
        torch.testing.assert_close(said, wanted, rtol=1e-4, atol=1e-4)


@needs_kernel
def test_packed_weights_of_generation_stay_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both keep what they have packed of a model, with their own tables of angles: here they differ much."""
    none = torch.zeros(70, 17)
    monkeypatch.setattr("charlm.compression.predictor.rotary_tables", lambda *_: (none, none))
    model, ids = gpt(CONFIGS[0]), torch.arange(40)
    own = model.new_state(), model.new_state()
    for state in own:
        state.observe(torch.tensor([3]))
    before, portable = own[0].verify(ids), begun(engine_maker(model), [3]).verify(ids)
    assert torch.equal(own[1].verify(ids), before)
    assert not torch.allclose(portable, before, atol=1e-2)
    assert torch.equal(begun(engine_maker(model), [3]).verify(ids), portable)


def test_without_the_compiled_engine_a_gpt_is_refused_and_an_n_gram_model_is_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    lm = CharLM(ngram(), CharTokenizer("".join(map(chr, range(40, 40 + V)))))
    text = b"0123456789" * 9
    made = compress(text, lm)
    monkeypatch.setenv("CHARLM_NATIVE", "0")
    assert compress(text, lm) == made
    for model in (gpt(CONFIGS[0]), mixture(CONFIGS[0])):
        with pytest.raises(InputError, match=r"takes the compiled engine, and .* CHARLM_NATIVE is 0"):
            engine_maker(model)


@dataclass(frozen=True, kw_only=True)
class OwnConfig(NGramConfig):
    """Settings of a model of somebody's own."""


class Own(NGramLM):
    """A model of somebody's own."""

    kind = "own-to-compress"
    config_class = OwnConfig


def test_other_models_are_refused_by_name() -> None:
    with pytest.raises(InputError, match="a Own cannot compress: it takes a GPT, an n-gram model"):
        engine_maker(Own(V))
    with pytest.raises(InputError, match="tables are not as `fit` makes them"):
        engine_maker(ngram().double())
    with pytest.raises(InputError, match="a model must be on the CPU, and this one is on meta"):
        engine_maker(BigramLM(V).to("meta"))


@needs_kernel
def test_a_member_or_a_type_that_will_not_do_is_refused_by_name() -> None:
    with pytest.raises(InputError, match="a mixture with a BigramLM cannot compress"):
        engine_maker(MixtureLM([BigramLM(V), ngram()]))
    with pytest.raises(InputError, match=r"does not apply: its weights are torch\.float64"):
        engine_maker(gpt(CONFIGS[0]).double())


def test_a_model_is_known_by_all_that_counts_and_nothing_else(tmp_path: Path) -> None:
    tokenizer, model = CharTokenizer("abc"), BigramLM(3)
    known = model_sha256(model, tokenizer)
    assert model_sha256(model, CharTokenizer("acb")) != known
    CharLM(model, tokenizer).save(tmp_path / "model")
    assert model_sha256(BigramLM.load(tmp_path / "model"), tokenizer) == known
    with torch.no_grad():
        model.token_embedding_table.weight[2, 1] += 1e-6
    assert model_sha256(model, tokenizer) != known
    config = tiny_config(vocab_size=3)
    assert model_sha256(GPT(config), tokenizer) != model_sha256(GPT(config), tokenizer)
    same = tiny_gpt(config), tiny_gpt(dataclasses.replace(config, activation="gelu"))
    assert model_sha256(same[0], tokenizer) != model_sha256(same[1], tokenizer)


def test_settings_at_their_defaults_do_not_count_so_that_later_ones_change_nothing() -> None:
    from charlm.compression.predictor import _settings

    assert _settings(GPTConfig(vocab_size=9, n_layer=2)) == {"vocab_size": 9, "n_layer": 2}
    assert _settings(MixtureLM([NGramLM(9, order=3)]).config) == {
        "vocab_size": 9,
        "kinds": ["ngram"],
        "members": [{"vocab_size": 9, "order": 3, "window": 4_096}],
    }
