"""Folders of transformers: written, read by transformers itself, and read back.

With another release, in a folder of its own:
`pip install --target OLD transformers==4.56.0 safetensors`, then
`PYTHONPATH=OLD pytest tests/interchange/test_transformers.py -n 0 -o filterwarnings=ignore`.
Classes that it does not have yet fail.
"""

from __future__ import annotations

import json
import os
import shutil
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from harness.tiny_models import VARIANTS, random_ids, tiny_config, tiny_gpt
from torch import Tensor

from charlm import GPT, BigramLM, ByteTokenizer, CharLM, CharTokenizer, MixtureLM, load
from charlm.errors import CheckpointError, CheckpointWriteError, FileFormatError, InputError, RunExistsError
from charlm.files import safetensors
from charlm.interchange import from_transformers, to_transformers
from charlm.interchange.families import family_of
from charlm.interchange.vocabulary import tokenizer_file
from charlm.models.config import GPTConfig

TOKENIZER = CharTokenizer("\n .abcdé€😀XYZ")
LENGTHS = (1, 7, 16)


def has_class(config: GPTConfig) -> bool:
    try:
        family_of(config)
    except InputError:
        return False
    return True


KINDS = {name: config for name, config in VARIANTS.items() if has_class(config)}
KINDS |= {
    "qwen3": tiny_config("cpu-1min", activation="swiglu"),
    "qwen3, queries with a bias": tiny_config("cpu-1min", activation="swiglu", qkv_bias=True),
    "apertus, tied": tiny_config("cpu-1min", tie_weights=True),
    "llama": tiny_config("cpu-1min", activation="swiglu", qk_norm=False, bias=True),
    "llama, narrow": tiny_config("cpu-1min", activation="swiglu", qk_norm=False, mlp_width=7),
    "arcee": tiny_config("cpu-1min", qk_norm=False),
    "arcee, biases": tiny_config("cpu-1min", qk_norm=False, qkv_bias=True, bias=True, activation="gelu"),
    "neox": tiny_config("gpt2", position="rotary", tie_weights=False, n_head=4),
    "neox without biases": tiny_config("gpt2", position="rotary", bias=False, qkv_bias=False),
}


def made(config: GPTConfig, folder: Path) -> CharLM:
    """Export a model with random parameters, and return it."""
    lm = CharLM(tiny_gpt(config).eval(), TOKENIZER)
    to_transformers(lm, folder)
    return lm


def logits_of(lm: CharLM, ids: Tensor) -> Tensor:
    with torch.no_grad():
        return lm.model(ids)[0]


def changed(folder: Path, change: Callable[[dict[str, Tensor]], Any], **fields: object) -> None:
    """Change the tensors and the settings of a folder."""
    path = folder / "model.safetensors"
    tensors, metadata = safetensors.loads(bytearray(path.read_bytes()), path="")
    change(tensors)
    path.write_bytes(b"".join(safetensors.dumps(tensors, metadata)))
    values = json.loads((folder / "config.json").read_bytes())
    (folder / "config.json").write_text(json.dumps({**values, **fields}), encoding="utf-8")


# What transformers makes of it


@pytest.fixture(scope="session")
def transformers() -> Any:
    os.environ["HF_HUB_OFFLINE"] = "1"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pytest.importorskip("transformers", exc_type=ImportError)


def theirs_of(transformers: Any, folder: Path) -> Any:
    model, told = transformers.AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    buffers = (
        "attention.bias",
        "attention.masked_bias",
        ".inv_freq",
        "embed_out.weight",
    )  # or tied: older ones miss them
    told["missing_keys"] = [name for name in told["missing_keys"] if not name.endswith(buffers)]
    assert not any(told.values()), told
    return model.eval()


@pytest.mark.slow
@pytest.mark.parametrize("name", KINDS)
def test_logits_and_greedy_text_are_those_of_the_gpt(transformers: Any, tmp_path: Path, name: str) -> None:
    lm = made(KINDS[name], tmp_path / "there")
    theirs = theirs_of(transformers, tmp_path / "there")
    assert type(theirs).__name__ == family_of(KINDS[name]).architecture
    for T in LENGTHS:
        ids = random_ids(KINDS[name], 2, T, seed=T)
        with torch.no_grad():
            difference = (theirs(ids).logits - logits_of(lm, ids)).abs().max()
        assert difference < 1e-4
    ids_of = (theirs.config, theirs.generation_config)
    assert not any(
        (given.bos_token_id, given.eos_token_id, given.pad_token_id) != (None,) * 3 for given in ids_of
    )
    start = torch.tensor([[3, 1]])
    written = theirs.generate(
        start, attention_mask=torch.ones_like(start), max_new_tokens=14, do_sample=False
    )
    top = logits_of(lm, written)[0, 1:-1].topk(2).values
    clear = (top[:, 0] - top[:, 1]) > 1e-3
    ours = logits_of(lm, written)[0, 1:-1].argmax(dim=-1)
    assert clear.sum() > 7
    assert torch.equal(ours[clear], written[0, 2:][clear])
    if clear.all():
        assert torch.equal(lm.model.generate(start, 14, temperature=0.0), written)


@pytest.mark.slow
def test_what_transformers_saves_comes_back_with_equal_tensors(transformers: Any, tmp_path: Path) -> None:
    for name, config in KINDS.items():
        lm = made(config, tmp_path / name)
        theirs_of(transformers, tmp_path / name).save_pretrained(tmp_path / f"{name} again")
        shutil.copy(tmp_path / name / "tokenizer.json", tmp_path / f"{name} again")
        back = from_transformers(tmp_path / f"{name} again")
        assert_equal(back, lm)


@pytest.mark.slow
def test_a_model_that_transformers_made_and_changed_is_read(transformers: Any, tmp_path: Path) -> None:
    """Gains of RMSNorm go into the matrices behind them; biases are found."""
    (tmp_path / "tokenizer").mkdir()
    sizes = {"vocab_size": 13, "hidden_size": 16, "intermediate_size": 24, "max_position_embeddings": 16}
    sizes |= {"num_hidden_layers": 2, "num_attention_heads": 2}
    rope = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 1.0}
    configs = [
        transformers.LlamaConfig(**sizes, tie_word_embeddings=True),
        transformers.GPT2Config(vocab_size=13, n_embd=16, n_layer=2, n_head=2, n_positions=16),
        transformers.GPTNeoXConfig(
            **sizes, use_parallel_residual=False, rope_parameters=rope, rotary_pct=1.0
        ),
    ]
    for config in configs:
        torch.manual_seed(0)
        theirs = transformers.AutoModelForCausalLM.from_config(config).eval()
        with torch.no_grad():
            for parameter in theirs.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
        theirs.save_pretrained(tmp_path / config.model_type)
        back = from_transformers(tmp_path / config.model_type, TOKENIZER)
        ids = torch.arange(13)[None]
        with torch.no_grad():
            assert (theirs(ids).logits - logits_of(back, ids)).abs().max() < 1e-4
        tied = isinstance(back.model, GPT) and back.model.config.tie_weights
        assert tied is (config.model_type == "gpt2")


@pytest.mark.slow
def test_the_tokenizer_is_ours_for_all_of_unicode(transformers: Any, tmp_path: Path) -> None:
    everything = "".join(chr(code) for code in range(0x110000) if not 0xD800 <= code < 0xE000)
    some = everything[:70_000] + everything[-300:]
    for name, tokenizer in (
        ("characters", CharTokenizer("".join(sorted(some, key=hash)))),
        ("bytes", ByteTokenizer()),
    ):
        gpt = GPT.from_config("cpu-1min", vocab_size=tokenizer.vocab_size, n_embd=4, n_head=1, n_layer=1)
        to_transformers(CharLM(gpt, tokenizer), tmp_path / name)
        theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / name)
        assert len(theirs) == tokenizer.vocab_size
        for text in (some, "", "  two  spaces .\r\n\n n't", "né ́e"):
            ids = tokenizer.encode(text)
            assert theirs(text).input_ids == ids
            assert theirs.decode(ids) == text
        if name == "characters":
            with pytest.raises(Exception, match="WordLevel error: Missing"):
                theirs(everything[100_000])
        else:
            broken = [0xC3, 0x28, 0xF0, 0x9F, 0x98]
            assert theirs.decode(broken) == tokenizer.decode(broken)


@pytest.mark.slow
def test_an_unknown_character_is_the_one_that_stands_for_it(transformers: Any, tmp_path: Path) -> None:
    tokenizer = CharTokenizer("ab?", unknown="?")
    to_transformers(CharLM(tiny_gpt(tiny_config("gpt2", vocab_size=3)), tokenizer), tmp_path / "there")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "there")
    assert theirs("aXb").input_ids == tokenizer.encode("aXb", on_unknown="replace")


# There and back, without transformers


def assert_equal(back: CharLM, lm: CharLM) -> None:
    """Compare all but the head's bias, which is in the last norm's shift by now."""
    assert back.tokenizer == lm.tokenizer
    assert isinstance(back.model, GPT)
    assert isinstance(lm.model, GPT)
    ours, theirs = lm.model.config, back.model.config
    if ours.head_bias:
        assert theirs == ours.replace(head_bias=False, bias=True)
        ids = random_ids(ours, 2, 16)
        assert (logits_of(back, ids) - logits_of(lm, ids)).abs().max() < 1e-4
        return
    assert theirs == ours
    for (name, one), other in zip(
        lm.model.state_dict().items(), back.model.state_dict().values(), strict=True
    ):
        assert torch.equal(one, other), name


@pytest.mark.parametrize("name", KINDS)
def test_a_model_comes_back_with_equal_tensors_and_settings(tmp_path: Path, name: str) -> None:
    config = KINDS[name].replace(dropout=0.1, attention_dropout=0.05, init="gpt2")
    lm = made(config, tmp_path / "there")
    assert_equal(from_transformers(tmp_path / "there"), lm)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_weights_keep_their_type(tmp_path: Path, dtype: torch.dtype) -> None:
    lm = CharLM(tiny_gpt(tiny_config("cpu-1min"), dtype=dtype), TOKENIZER)
    to_transformers(lm, tmp_path / "there")
    values = json.loads((tmp_path / "there" / "config.json").read_bytes())
    assert values["torch_dtype"] == str(dtype).removeprefix("torch.")
    assert_equal(from_transformers(tmp_path / "there"), lm)


def test_without_our_settings_the_weights_say_what_biases_there_are(tmp_path: Path) -> None:
    for config in (tiny_config("gpt2", bias=False), tiny_config("gpt2", qkv_bias=False)):
        folder = tmp_path / f"{config.bias}"
        lm = made(config, folder)
        changed(folder, len, charlm=None)
        back = from_transformers(folder)
        assert isinstance(back.model, GPT)
        assert (back.model.config.bias, back.model.config.qkv_bias) == (config.bias, config.qkv_bias)
        ids = random_ids(config, 1, 9)
        assert torch.equal(logits_of(back, ids), logits_of(lm, ids))


def test_our_settings_do_not_count_where_the_weights_were_changed(tmp_path: Path) -> None:
    lm = made(tiny_config("gpt2", bias=False, qkv_bias=False, dropout=0.3), tmp_path / "there")

    def train(tensors: dict[str, Tensor]) -> None:
        tensors["transformer.h.1.mlp.c_fc.bias"] += 1

    changed(tmp_path / "there", train)
    back = from_transformers(tmp_path / "there")
    assert isinstance(back.model, GPT)
    assert back.model.config.bias
    assert back.model.config.dropout == 0.3
    assert torch.equal(back.model.state_dict()["transformer.h.1.mlp.c_fc.bias"], torch.ones(128))
    changed(tmp_path / "there", len, charlm={**lm.model.config.to_dict(), "n_layer": 3})
    back = from_transformers(tmp_path / "there")
    assert isinstance(back.model, GPT)
    assert back.model.config.n_layer == 2


def test_gains_of_rmsnorm_go_into_the_matrices_behind_them(tmp_path: Path) -> None:
    lm = made(tiny_config("cpu-1min", qk_norm=False, tie_weights=True), tmp_path / "there")

    def train(tensors: dict[str, Tensor]) -> None:
        tensors["model.norm.weight"] *= 2
        tensors["model.layers.0.input_layernorm.weight"] *= 2

    changed(tmp_path / "there", train)
    back = from_transformers(tmp_path / "there")
    state, before = back.model.state_dict(), lm.model.state_dict()
    assert torch.equal(state["lm_head.weight"], 2 * before["lm_head.weight"])
    assert torch.equal(state["transformer.wte.weight"], before["transformer.wte.weight"])
    name = "transformer.h.0.attn.c_attn.weight"
    assert torch.equal(state[name], 2 * before[name])


def test_a_vocabulary_may_be_given_and_bytes_are_put_in_our_order(tmp_path: Path) -> None:
    lm = CharLM(tiny_gpt(tiny_config("gpt2", vocab_size=256)), ByteTokenizer())
    to_transformers(lm, tmp_path / "there")
    path = tmp_path / "there" / "tokenizer.json"
    values = json.loads(path.read_bytes())
    values["model"]["vocab"] = {name: 255 - i for name, i in values["model"]["vocab"].items()}
    path.write_text(json.dumps(values), encoding="utf-8")
    back = from_transformers(tmp_path / "there").model.state_dict()["transformer.wte.weight"]
    assert torch.equal(back, lm.model.state_dict()["transformer.wte.weight"].flip(0))
    path.unlink()
    assert_equal(from_transformers(tmp_path / "there", ByteTokenizer()), lm)
    with pytest.raises(InputError, match="one vocabulary, got 256 and 2 ids"):
        from_transformers(tmp_path / "there", CharTokenizer("ab"))
    with pytest.raises(CheckpointError, match=r"it has no tokenizer\.json"):
        from_transformers(tmp_path / "there")


def test_older_files_with_pickled_weights_are_read(tmp_path: Path) -> None:
    lm = made(tiny_config("gpt2"), tmp_path / "there")
    path = tmp_path / "there" / "model.safetensors"
    tensors, _ = safetensors.loads(bytearray(path.read_bytes()), path="")
    masks = {
        "transformer.h.0.attn.bias": torch.ones(1, 1, 16, 16),
        "transformer.h.0.attn.masked_bias": torch.zeros(1),
    }
    torch.save(
        {**tensors, **masks, "lm_head.weight": tensors["transformer.wte.weight"]},
        path.with_name("pytorch_model.bin"),
    )
    path.unlink()
    assert_equal(from_transformers(tmp_path / "there"), lm)


# What is refused


def without(name: str) -> Callable[[dict[str, Tensor]], Any]:
    return lambda tensors: tensors.pop(name)


def with_one(name: str, value: Tensor) -> Callable[[dict[str, Tensor]], Any]:
    return lambda tensors: tensors.update({name: value})


BAD: Mapping[str, tuple[Callable[[dict[str, Tensor]], Any], str]] = {
    "missing": (without("model.layers.1.mlp.up_proj.weight"), r"must hold 'model\.layers\.1\.mlp\.up_proj"),
    "a third missing": (
        without("model.layers.0.self_attn.k_proj.weight"),
        r"self_attn\.q_proj\.weight' and all",
    ),
    "unknown": (with_one("model.layers.0.router", torch.zeros(2)), r"the tensor 'model\.layers\.0\.router'"),
    "a gain of queries": (
        with_one("model.layers.0.self_attn.q_norm.weight", torch.full((16,), 2.0)),
        r"must hold ones in 'model\.layers\.0\.self_attn\.q_norm",
    ),
    "another shape": (
        with_one("model.embed_tokens.weight", torch.zeros(14, 32)),
        r"'transformer\.wte\.weight' with shape \(13, 32\), got \(14, 32\)",
    ),
    "shapes that do not fit": (
        with_one("model.layers.0.self_attn.q_proj.weight", torch.zeros(32, 5)),
        "must hold tensors of the shapes that config.json says",
    ),
    "a number": (with_one("model.embed_tokens.weight", torch.tensor(1.0)), r"must hold 'model\.embed_tokens"),
}


@pytest.mark.parametrize(("change", "reason"), BAD.values(), ids=BAD.keys())
def test_tensors_that_no_gpt_has_are_refused_by_name(
    tmp_path: Path, change: Callable[[dict[str, Tensor]], Any], reason: str
) -> None:
    made(tiny_config("cpu-1min"), tmp_path / "there")
    changed(tmp_path / "there", change)
    with pytest.raises(FileFormatError, match=reason):
        from_transformers(tmp_path / "there")


def test_two_matrices_where_one_is_tied_are_refused(tmp_path: Path) -> None:
    made(tiny_config("gpt2"), tmp_path / "there")
    changed(tmp_path / "there", with_one("lm_head.weight", torch.zeros(13, 32)))
    with pytest.raises(FileFormatError, match="one matrix as embedding and head"):
        from_transformers(tmp_path / "there")


def test_what_is_no_gpt_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="only a GPT can be exported, got a BigramLM"):
        to_transformers(CharLM(BigramLM(13), TOKENIZER), tmp_path / "there")
    mixture = MixtureLM([tiny_gpt(tiny_config("gpt2")), BigramLM(13)])
    with pytest.raises(InputError, match=r"got a MixtureLM\. Export the GPT of the mixture: load\("):
        to_transformers(CharLM(mixture, TOKENIZER), tmp_path / "there")
    with pytest.raises(InputError, match="lm must be a CharLM"):
        to_transformers(mixture, tmp_path / "there")  # type: ignore[arg-type]  # for those without a type checker
    assert not (tmp_path / "there").exists()


def test_a_head_bias_that_no_shift_stands_for_is_refused(tmp_path: Path) -> None:
    config = tiny_config("lecture", n_embd=8)  # narrower than the vocabulary
    with pytest.raises(InputError, match=r"head_bias must be False: .* \(vocab_size 13, n_embd 8\)"):
        to_transformers(CharLM(tiny_gpt(config), TOKENIZER), tmp_path / "there")
    zero = tiny_gpt(config)
    torch.nn.init.zeros_(zero.lm_head.bias)
    to_transformers(CharLM(zero, TOKENIZER), tmp_path / "there")


def test_a_folder_is_refused_unless_it_is_an_export_to_be_replaced(tmp_path: Path) -> None:
    lm = made(tiny_config("gpt2"), tmp_path / "there")
    (tmp_path / "empty").mkdir()
    to_transformers(lm, tmp_path / "empty")
    with pytest.raises(RunExistsError, match=r"is not empty\. Replace it \(--overwrite, overwrite=True\)"):
        to_transformers(lm, tmp_path / "there")
    other = CharLM(tiny_gpt(tiny_config("gpt2"), seed=1), TOKENIZER)
    to_transformers(other, tmp_path / "there", overwrite=True)
    assert_equal(from_transformers(tmp_path / "there"), other)
    lm.save(tmp_path / "own")
    with pytest.raises(RunExistsError, match="holds something else than such an export"):
        to_transformers(lm, tmp_path / "own", overwrite=True)
    assert_equal(load(tmp_path / "own", device="cpu"), lm)
    (tmp_path / "there" / "notes.txt").touch()
    with pytest.raises(RunExistsError, match=r"notes\.txt"):
        to_transformers(lm, tmp_path / "there", overwrite=True)
    (tmp_path / "file").touch()
    with pytest.raises(RunExistsError, match="not a directory"):
        to_transformers(lm, tmp_path / "file")


def test_a_write_that_fails_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lm = made(tiny_config("gpt2"), tmp_path / "there")

    def failing(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", failing)
        for folder in ("there", "new"):
            with pytest.raises(CheckpointWriteError, match="No space left"):
                to_transformers(
                    CharLM(tiny_gpt(tiny_config("gpt2"), seed=1), TOKENIZER),
                    tmp_path / folder,
                    overwrite=True,
                )
    assert [path.name for path in tmp_path.iterdir()] == ["there"]
    assert_equal(from_transformers(tmp_path / "there"), lm)


def test_load_says_what_such_a_folder_is_and_how_to_convert_it(tmp_path: Path) -> None:
    made(tiny_config("gpt2"), tmp_path / "there")
    with pytest.raises(
        FileFormatError, match=r"a model of transformers \('gpt2'\)\. Convert it: charlm import '.*there' -o"
    ):
        load(tmp_path / "there")


def test_the_files_are_those_that_older_releases_ask_for(tmp_path: Path) -> None:
    made(tiny_config("gpt2"), tmp_path / "there")
    assert (tmp_path / "there" / "tokenizer.json").read_bytes() == tokenizer_file(TOKENIZER)
    weights = (tmp_path / "there" / "model.safetensors").read_bytes()
    assert safetensors.parse_header(weights, path="").metadata == {"format": "pt"}
