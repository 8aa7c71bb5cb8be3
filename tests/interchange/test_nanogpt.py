"""Checkpoints of nanoGPT and minGPT: made as they make them, read without executing anything.

`CHARLM_NANOGPT` names a checkout of nanoGPT, whose own train.py then makes the checkpoint.
"""

from __future__ import annotations

import json
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from harness.tiny_models import random_ids, tiny_config, tiny_gpt

from charlm import GPT, CharTokenizer, load
from charlm.errors import CheckpointError, FileFormatError, InputError
from charlm.interchange import from_mingpt, from_nanogpt
from charlm.testing import tiny_corpus

TOKENIZER = CharTokenizer("\n .abcdé€😀XYZ")
NANO = tiny_config("gpt2", bias=False, qkv_bias=False, activation="gelu")
MINI = tiny_config("gpt2", tie_weights=False)


class Hostile:
    """What would leave a file behind if anybody executed it."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (os.mkdir, ("executed",))


def checkpoint(path: Path, gpt: GPT, prefix: str = "", **others: object) -> None:
    """Write what nanoGPT's train.py writes."""
    names = ("n_layer", "n_head", "n_embd", "block_size", "bias", "vocab_size", "dropout")
    state = {**gpt.state_dict(), "lm_head.weight": gpt.state_dict()["transformer.wte.weight"]}
    torch.save(
        {
            "model": {prefix + name: tensor for name, tensor in state.items()},
            "optimizer": {"state": {}, "param_groups": [{"lr": 1e-3, "betas": (0.9, 0.99)}]},
            "model_args": {name: getattr(gpt.config, name) for name in names},
            "iter_num": 250,
            "best_val_loss": torch.tensor(1.5),
            "config": {"dataset": "shakespeare_char", "compile": True},
            **others,
        },
        path,
    )


def meta(path: Path, tokenizer: CharTokenizer) -> Path:
    """Write what nanoGPT's prepare.py writes."""
    itos = dict(enumerate(tokenizer.vocab))
    stoi = {character: i for i, character in itos.items()}
    path.write_bytes(pickle.dumps({"vocab_size": len(itos), "itos": itos, "stoi": stoi}))
    return path


@pytest.mark.parametrize("prefix", ["", "_orig_mod.", "module.", "module._orig_mod."])
def test_a_checkpoint_of_nanogpt_is_read_with_its_vocabulary(tmp_path: Path, prefix: str) -> None:
    model = tiny_gpt(NANO)
    checkpoint(tmp_path / "ckpt.pt", model, prefix)
    lm = from_nanogpt(tmp_path / "ckpt.pt", meta(tmp_path / "meta.pkl", TOKENIZER))
    assert lm.tokenizer == TOKENIZER
    assert lm.model.config == NANO.replace(attention_dropout=None, mlp_width=None)
    for (name, one), other in zip(model.state_dict().items(), lm.model.state_dict().values(), strict=True):
        assert torch.equal(one, other), name
    assert not lm.model.training


def mingpt_state(model: GPT) -> dict[str, torch.Tensor]:
    """Return the state_dict that minGPT's GPT has, with its masks."""
    masks = {f"transformer.h.{i}.attn.bias": torch.ones(1, 1, 16, 16).tril() for i in range(2)}
    return {**model.state_dict(), **masks}


@pytest.mark.parametrize(
    ("said", "given"),
    [
        ({"n_head": 2}, None),
        (None, 2),
        ({"n_head": 3}, 2),
        ({"model_type": "gpt-nano", "n_head": None}, None),
    ],
)
def test_weights_of_mingpt_are_read_with_the_heads_beside_them(
    tmp_path: Path, said: dict[str, object] | None, given: int | None
) -> None:
    config = MINI.replace(n_embd=24, n_head=3) if said and "model_type" in said else MINI
    model = tiny_gpt(config).eval()
    torch.save(mingpt_state(model), tmp_path / "model.pt")
    if said is not None:
        (tmp_path / "config.json").write_text(json.dumps({"model": said}), encoding="utf-8")
    lm = from_mingpt(tmp_path / "model.pt", TOKENIZER, n_head=given)
    ids = random_ids(config, 2, 9)
    with torch.no_grad():
        assert torch.equal(lm.model(ids)[0], model(ids)[0])


def test_heads_that_nobody_knows_are_asked_for(tmp_path: Path) -> None:
    torch.save(mingpt_state(tiny_gpt(MINI)), tmp_path / "model.pt")
    with pytest.raises(InputError, match=r"n_head must be given: .*config\.json' have it"):
        from_mingpt(tmp_path / "model.pt", TOKENIZER)


def test_a_vocabulary_of_another_size_is_refused(tmp_path: Path) -> None:
    checkpoint(tmp_path / "ckpt.pt", tiny_gpt(NANO))
    with pytest.raises(InputError, match="must have the 13 characters of the model, got 2"):
        from_nanogpt(tmp_path / "ckpt.pt", CharTokenizer("ab"))
    with pytest.raises(CheckpointError, match="there is no vocabulary"):
        from_nanogpt(tmp_path / "ckpt.pt", tmp_path / "meta.pkl")


# What is refused, and not executed


def hostile_zip(path: Path) -> None:
    checkpoint(path, tiny_gpt(NANO), extra=Hostile())


def hostile_pickle(path: Path) -> None:
    path.write_bytes(pickle.dumps({"model": Hostile()}))


def older_format(path: Path) -> None:
    torch.save({"model": Hostile()}, path, _use_new_zipfile_serialization=False)


def repeated(path: Path) -> None:
    model = tiny_gpt(NANO)
    checkpoint(path, model)
    content = torch.load(path, weights_only=True)
    content["model"]["transformer.wte.weight"] = torch.zeros(1).expand(10**6, 10**6)
    torch.save(content, path)


def other_tensors(path: Path) -> None:
    torch.save({"encoder.weight": torch.zeros(2, 2)}, path)


def no_tensors(path: Path) -> None:
    checkpoint(path, tiny_gpt(NANO), model={"transformer.wte.weight": [1.0]})


def no_weights(path: Path) -> None:
    checkpoint(path, tiny_gpt(NANO), model=3)


def no_settings(path: Path) -> None:
    checkpoint(path, tiny_gpt(NANO), model_args={"n_layer": 2})


def wrong_settings(path: Path) -> None:
    checkpoint(path, tiny_gpt(NANO), model_args={**NANO.to_dict(), "n_layer": "2"})


def sparse(path: Path) -> None:
    checkpoint(path, tiny_gpt(NANO), model={"transformer.wte.weight": torch.eye(13).to_sparse()})


def too_few(path: Path) -> None:
    checkpoint(path, tiny_gpt(NANO), model_args={**NANO.to_dict(), "n_layer": 3})


def no_dict(path: Path) -> None:
    torch.save([1, 2], path)


def text(path: Path) -> None:
    path.write_text("no pickle at all", encoding="utf-8")


EXECUTES = r"tensors and plain values alone, got something else \('\w+\.mkdir'\); nothing was executed"
REFUSED = {
    hostile_zip: EXECUTES,
    hostile_pickle: "tensors and plain values alone, got something else",
    older_format: EXECUTES,
    repeated: "tensors that are larger than the file",
    other_tensors: "must hold a checkpoint of nanoGPT or the weights of a minGPT",
    no_tensors: "must hold a dense tensor for each name, got something else for 'transformer.wte.weight'",
    no_weights: "must hold weights by name",
    no_settings: "must hold nanoGPT's 'model' and 'model_args'",
    wrong_settings: "holds no settings of a GPT: .*n_layer must be an int",
    sparse: "must hold a dense tensor for each name",
    too_few: r"must hold the \d+ parameters of config.json, got \d+",
    no_dict: "must hold a dict, got a list",
    text: "must be a file of torch.save with tensors and plain values alone",
}


@pytest.mark.parametrize("write", REFUSED, ids=lambda write: write.__name__)
def test_what_is_no_checkpoint_is_refused_and_nothing_is_executed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, write: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "ckpt.pt")
    read = from_mingpt if write is other_tensors else from_nanogpt
    with pytest.raises(FileFormatError, match=REFUSED[write]) as caught:
        read(tmp_path / "ckpt.pt", TOKENIZER)
    assert "weights_only" not in str(caught.value)
    assert not (tmp_path / "executed").exists()


def test_a_hostile_meta_pkl_is_refused_and_not_executed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    checkpoint(tmp_path / "ckpt.pt", tiny_gpt(NANO))
    (tmp_path / "meta.pkl").write_bytes(pickle.dumps({"itos": Hostile()}))
    with pytest.raises(FileFormatError, match=r"meta\.pkl' must hold dicts, texts and integers alone"):
        from_nanogpt(tmp_path / "ckpt.pt", tmp_path / "meta.pkl")
    assert not (tmp_path / "executed").exists()


def test_a_wrong_tensor_is_told_of_the_file_that_was_given(tmp_path: Path) -> None:
    model = tiny_gpt(NANO)
    state = {**model.state_dict(), "transformer.wpe.weight": torch.zeros(16, 32, dtype=torch.int64)}
    checkpoint(tmp_path / "ckpt.pt", model, model=state)
    with pytest.raises(FileFormatError, match=r"ckpt\.pt' must hold floating-point tensors") as caught:
        from_nanogpt(tmp_path / "ckpt.pt", TOKENIZER)
    assert caught.value.path == str(tmp_path / "ckpt.pt")


def test_a_vocabulary_is_a_file_or_a_tokenizer(tmp_path: Path) -> None:
    checkpoint(tmp_path / "ckpt.pt", tiny_gpt(NANO))
    with pytest.raises(InputError, match=r"vocabulary must be a meta\.pkl or a tokenizer, got None"):
        from_nanogpt(tmp_path / "ckpt.pt", None)  # type: ignore[arg-type]


def test_a_missing_file_is_said_to_be_missing(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"there is no file '.*ckpt\.pt'"):
        from_nanogpt(tmp_path / "ckpt.pt", TOKENIZER)


def test_load_says_how_to_convert_a_checkpoint(tmp_path: Path) -> None:
    checkpoint(tmp_path / "ckpt.pt", tiny_gpt(NANO))
    for path in (tmp_path, tmp_path / "ckpt.pt"):
        with pytest.raises(CheckpointError, match="`charlm import` makes one of a checkpoint of nanoGPT"):
            load(path)


# Made by nanoGPT itself


@pytest.mark.slow
def test_a_checkpoint_that_nanogpt_made_says_what_it_says_there(tmp_path: Path) -> None:
    folder = os.environ.get("CHARLM_NANOGPT")
    if not folder:
        pytest.skip("CHARLM_NANOGPT is not set: this test trains with the nanoGPT in that folder")
    for name in ("train.py", "model.py", "configurator.py"):
        shutil.copy(Path(folder, name), tmp_path)
    data = tmp_path / "data" / "own"
    data.mkdir(parents=True)
    (data / "input.txt").write_text(tiny_corpus(6_000), encoding="utf-8")
    prepare = Path(folder, "data", "shakespeare_char", "prepare.py").read_text(encoding="utf-8")
    (data / "prepare.py").write_text(prepare.replace("import requests", ""), encoding="utf-8")
    sizes = "--n_layer=2 --n_head=2 --n_embd=32 --block_size=16 --batch_size=4 --bias=True --dropout=0.0"
    run = "--dataset=own --device=cpu --compile=False --dtype=float32 --gradient_accumulation_steps=1"
    run += " --max_iters=10 --eval_interval=10 --eval_iters=1 --always_save_checkpoint=True"
    script = (
        "import torch; from model import GPT, GPTConfig\n"
        "saved = torch.load('out/ckpt.pt'); model = GPT(GPTConfig(**saved['model_args']))\n"
        "model.load_state_dict(saved['model']); ids = torch.arange(16)[None]\n"
        "torch.save(model.eval()(ids, ids)[0].detach(), 'logits.pt')\n"
    )
    for words in ([data / "prepare.py"], ["train.py", *sizes.split(), *run.split()], ["-c", script]):
        subprocess.run([sys.executable, *words], check=True, cwd=tmp_path, capture_output=True)
    lm = from_nanogpt(tmp_path / "out" / "ckpt.pt", data / "meta.pkl")
    theirs = torch.load(tmp_path / "logits.pt", weights_only=True)
    with torch.no_grad():
        assert (lm.model(torch.arange(16)[None])[0] - theirs).abs().max() < 1e-5
    assert lm.tokenizer == CharTokenizer.from_text(tiny_corpus(6_000))
