"""Saved models: what is written, that it comes back bit for bit, and what is refused."""

from __future__ import annotations

import itertools
import json
import os
import pickle
import resource
import stat
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import get_args

import pytest
import safetensors.torch
import torch
from harness.tiny_models import random_ids, tiny_config, tiny_gpt
from harness.tiny_training import global_generators
from torch import Tensor

from charlm import BigramLM, CharLM, CharTokenizer, LanguageModel
from charlm.errors import CharLMError, CheckpointError, CheckpointWriteError, FileFormatError, RunExistsError
from charlm.files import safetensors as own_safetensors
from charlm.models import registry
from charlm.models.config import GPTConfig, PresetName
from charlm.models.contents import unique_tensors
from charlm.models.gpt import GPT

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
TOKENIZER = CharTokenizer("abcdefghijklm")


def bigram(dtype: torch.dtype = torch.float32) -> BigramLM:
    return BigramLM(13).to(dtype)


def models() -> list[LanguageModel]:
    presets = [
        tiny_gpt(tiny_config(preset, tie_weights=tied))
        for preset in get_args(PresetName)
        for tied in (False, True)
    ]
    switches = tiny_gpt(tiny_config("gpt2", activation="swiglu", position="rotary", norm="rmsnorm"))
    return [bigram(), *presets, switches]


def same_bits(one: Tensor, other: Tensor) -> bool:
    return one.dtype == other.dtype and torch.equal(one, other)


@pytest.mark.parametrize("model", models(), ids=lambda model: repr(model)[:60])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_model_comes_back_bit_for_bit(tmp_path: Path, model: LanguageModel, dtype: torch.dtype) -> None:
    model = type(model).from_config(model.config).to(dtype)
    model.save(tmp_path / "model")
    before = global_generators()
    for cls in (LanguageModel, type(model)):
        again = cls.load(tmp_path / "model")
        assert type(again) is type(model)
        assert again.config == model.config
        state = again.state_dict()
        assert state.keys() == model.state_dict().keys()
        assert all(same_bits(state[name], tensor) for name, tensor in model.state_dict().items())
        idx = random_ids(tiny_config(), 2, 9)
        assert torch.equal(again.eval()(idx)[0], model.eval()(idx)[0])
    assert global_generators() == before


def test_the_official_library_reads_the_weights(tmp_path: Path) -> None:
    model = tiny_gpt(tiny_config("gpt2"))
    model.save(tmp_path / "model")
    theirs = safetensors.torch.load_file(tmp_path / "model" / "model.safetensors")
    ours = unique_tensors(model)
    assert theirs.keys() == ours.keys()
    assert all(same_bits(theirs[name], tensor.detach()) for name, tensor in ours.items())


def test_a_tied_matrix_is_stored_once_and_tied_again(tmp_path: Path) -> None:
    model = tiny_gpt(tiny_config("gpt2"))
    model.save(tmp_path / "model")
    stored = safetensors.torch.load_file(tmp_path / "model" / "model.safetensors")
    assert "transformer.wte.weight" in stored
    assert "lm_head.weight" not in stored
    again = GPT.load(tmp_path / "model")
    assert again.lm_head.weight is again.transformer.wte.weight
    assert again.num_parameters() == model.num_parameters()


@pytest.mark.parametrize("how", ["gpt2", "three names"])
def test_a_tied_tensor_is_read_under_any_of_its_names_and_under_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    monkeypatch.setattr(registry, "_classes", dict(registry._classes))

    class Threefold(BigramLM):
        kind = "threefold"

        def __init__(self, vocab_size: int) -> None:
            super().__init__(vocab_size)
            self.second = self.third = next(self.parameters())

    tied = tiny_gpt(tiny_config("gpt2")) if how == "gpt2" else Threefold(13)
    path = tmp_path / "model" / "model.safetensors"
    tied.save(tmp_path / "model")
    state = {name: tensor.clone() for name, tensor in tied.state_dict().items()}

    def read_again() -> bool:
        again = type(tied).load(tmp_path / "model").state_dict()
        return all(same_bits(again[name], tensor) for name, tensor in state.items())

    safetensors.torch.save_model(tied, str(path))  # which keeps the name that comes first in the alphabet
    assert read_again()
    own = unique_tensors(tied)
    names = [next(iter(own)), *(name for name in state if name not in own)]
    for count in range(1, len(names) + 1):
        for kept in itertools.combinations(names, count):
            stored = {name: tensor for name, tensor in state.items() if name not in names or name in kept}
            safetensors.torch.save_file(stored, path)
            assert read_again()
            if count > 1:
                changed = state[kept[-1]].clone()
                changed[-1, -1] += 1
                safetensors.torch.save_file({**stored, kept[-1]: changed}, path)
                tells = "must hold one value for '.*' and '.*', which the model ties, got two"
                with pytest.raises(FileFormatError, match=tells) as caught:
                    read_again()
                assert repr(kept[-1]) in str(caught.value)


def test_a_directory_holds_the_promised_files(tmp_path: Path) -> None:
    bigram().save(tmp_path / "deep" / "model")
    assert {path.name for path in (tmp_path / "deep" / "model").iterdir()} == {
        "config.json",
        "model.safetensors",
    }
    CharLM(bigram(), TOKENIZER).save(tmp_path / "lm")
    assert {path.name for path in (tmp_path / "lm").iterdir()} == {
        "config.json",
        "model.safetensors",
        "tokenizer.json",
    }
    values = json.loads((tmp_path / "lm" / "config.json").read_text(encoding="utf-8"))
    assert values == {
        "format": "charlm.model",
        "version": 1,
        "kind": "bigram",
        "config": {"vocab_size": 13},
    }


def test_saving_again_replaces_the_model_and_leaves_no_tokenizer_of_before(tmp_path: Path) -> None:
    CharLM(bigram(), TOKENIZER).save(tmp_path / "model")
    model = tiny_gpt(tiny_config("lecture"))
    model.save(tmp_path / "model")
    assert isinstance(LanguageModel.load(tmp_path / "model"), GPT)
    assert not (tmp_path / "model" / "tokenizer.json").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_foreign_files_are_never_replaced(tmp_path: Path) -> None:
    bigram().save(tmp_path / "model")
    (tmp_path / "model" / "notes.txt").write_text("mine", encoding="utf-8")
    (tmp_path / "file").write_text("mine", encoding="utf-8")
    for name in ("model", "file"):
        with pytest.raises(RunExistsError, match="cannot save the model in"):
            bigram().save(tmp_path / name)
    assert (tmp_path / "model" / "notes.txt").read_text(encoding="utf-8") == "mine"
    assert (tmp_path / "file").read_text(encoding="utf-8") == "mine"


def test_a_failed_save_leaves_the_old_model_and_says_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = bigram()
    model.save(tmp_path / "model")

    def fail(*args: object) -> None:
        raise OSError(28, os.strerror(28))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fail)
        with pytest.raises(CheckpointWriteError, match="No space left") as caught:
            bigram().save(tmp_path / "model")
    assert caught.value.errno == 28
    again = BigramLM.load(tmp_path / "model")
    assert same_bits(again.token_embedding_table.weight, model.token_embedding_table.weight)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


@pytest.mark.slow
def test_a_fresh_process_can_load_every_kind(tmp_path: Path) -> None:
    """Nothing but `charlm` is imported: `load` must know the kinds by itself."""
    CharLM(bigram(), TOKENIZER).save(tmp_path / "bigram")
    CharLM(tiny_gpt(tiny_config("lecture")), TOKENIZER).save(tmp_path / "gpt")
    code = (
        "import charlm, sys; print([type(charlm.load(p, device='cpu').model).__name__ for p in sys.argv[1:]])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, tmp_path / "bigram", tmp_path / "gpt"],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
    )
    assert (done.stdout, done.stderr) == ("['BigramLM', 'GPT']\n", "")


def test_a_model_of_another_class_is_refused(tmp_path: Path) -> None:
    bigram().save(tmp_path / "model")
    with pytest.raises(
        CheckpointError, match=r"holds a BigramLM, not a GPT; use BigramLM\.load or charlm\.load"
    ):
        GPT.load(tmp_path / "model")


def test_a_kind_of_the_callers_own_is_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_classes", dict(registry._classes))

    class Mine(BigramLM):
        kind = "mine"

    Mine(13).save(tmp_path / "model")
    assert type(LanguageModel.load(tmp_path / "model")) is Mine


@pytest.mark.parametrize("missing", ["config.json", "model.safetensors", "everything", "directory"])
def test_a_missing_part_is_named(tmp_path: Path, missing: str) -> None:
    bigram().save(tmp_path / "model")
    for path in (tmp_path / "model").iterdir():
        if missing in {path.name, "everything", "directory"}:
            path.unlink()
    if missing == "directory":
        (tmp_path / "model").rmdir()
    what = f"has no {missing if '.' in missing else 'config.json'}"
    what = "does not exist" if missing == "directory" else what
    with pytest.raises(CheckpointError, match=f"no model in .*: it {what}"):
        LanguageModel.load(tmp_path / "model")
    with pytest.raises(CheckpointError, match=r"no model in .*: it is no directory"):
        LanguageModel.load(Path(__file__))


def saved_gpt(directory: Path) -> tuple[dict[str, object], dict[str, Tensor]]:
    """Save a small GPT and return what its two files hold."""
    model = tiny_gpt(tiny_config("lecture"))
    model.save(directory)
    values = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    return values, {name: tensor.detach().clone() for name, tensor in unique_tensors(model).items()}


def write_config(directory: Path, values: object) -> None:
    (directory / "config.json").write_text(json.dumps(values), encoding="utf-8")


def write_tensors(directory: Path, tensors: dict[str, Tensor]) -> None:
    (directory / "model.safetensors").write_bytes(b"".join(own_safetensors.dumps(tensors)))


def refused_quickly(directory: Path, error: type[CharLMError], message: str, *, seconds: float = 2) -> None:
    """Expect the error within this much work of the processor and without much memory."""
    began, before = time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    generators = global_generators()
    with pytest.raises(error, match=message) as caught:
        LanguageModel.load(directory)
    assert time.process_time() - began < seconds
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 256 * 1024  # KiB
    assert global_generators() == generators
    assert str(caught.value).isprintable()


HOSTILE_FIELDS: list[tuple[dict[str, object], str]] = [
    ({"n_embd": 10**9}, "n_embd must be an int at least 1 and at most 65536, got 1000000000"),
    ({"n_layer": 10**5}, "n_layer must be an int"),
    ({"n_layer": 10**30}, "integers of at most 19 digits"),
    ({"n_embd": 65_536, "n_layer": 256, "n_head": 1}, "must hold the .* parameters of config.json"),
    ({"vocab_size": 1_114_112}, "must hold the .* parameters of config.json"),
    ({"block_size": 1_048_576}, "must hold the .* parameters of config.json"),
    ({"mlp_width": 1_048_576}, "must hold the .* parameters of config.json"),
    ({"n_layer": 1}, "which the model does not have"),
    (
        {"tie_weights": True},
        "one value for 'lm_head.weight' and 'transformer.wte.weight', which the model ties",
    ),
    ({"bias": False}, "which the model does not have"),
    ({"n_head": 3}, "n_embd must be a multiple of n_head"),
    ({"depth": 3}, "unknown field 'depth'"),
    ({"dropout": True}, "dropout must be"),
    ({"vocab_size": "13"}, "vocab_size must be"),
    ({"position": "\x1b[31m"}, "position must be one of"),
]


@pytest.mark.parametrize(("fields", "message"), HOSTILE_FIELDS, ids=str)
def test_hostile_settings_are_refused_before_anything_of_their_size_is_built(
    tmp_path: Path, fields: dict[str, object], message: str
) -> None:
    values, _ = saved_gpt(tmp_path / "model")
    config = values["config"]
    assert isinstance(config, dict)
    write_config(tmp_path / "model", {**values, "config": {**config, **fields}})
    refused_quickly(tmp_path / "model", FileFormatError, message)


def test_many_small_layers_are_refused_quickly(tmp_path: Path) -> None:
    """Hundreds of layers of width 1 have few parameters, so their number alone does not give them away."""
    values, _ = saved_gpt(tmp_path / "model")
    config = values["config"]
    assert isinstance(config, dict)
    write_config(
        tmp_path / "model", {**values, "config": {**config, "n_layer": 256, "n_head": 1, "n_embd": 1}}
    )
    write_tensors(tmp_path / "model", {"padding": torch.zeros(10**6)})
    message = "must hold the tensor 'lm_head.bias', which is missing"
    refused_quickly(tmp_path / "model", FileFormatError, message, seconds=10)


def test_numbers_of_one_byte_are_no_parameters(tmp_path: Path) -> None:
    """As many bytes as the model has parameters would make it take four times the memory of its file."""
    values, _ = saved_gpt(tmp_path / "model")
    config = values["config"]
    assert isinstance(config, dict)
    large = {**config, "n_embd": 1024, "n_head": 1, "n_layer": 1}
    write_config(tmp_path / "model", {**values, "config": large})
    count = GPTConfig.from_dict(large).num_parameters()
    write_tensors(tmp_path / "model", {"w": torch.zeros(count, dtype=torch.uint8)})
    refused_quickly(tmp_path / "model", FileFormatError, f"must hold the {count} parameters .*, got 0")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kind": "rnn"}, "holds a model of the kind 'rnn'; known are bigram, gpt"),
        ({"kind": 3}, "must hold a string in 'kind'"),
        ({"version": 2}, "has version 2 of charlm.model; this charlm reads up to 1. Update charlm."),
        ({"version": 0}, "must hold a version of at least 1 in 'version', got 0."),
        ({"version": True}, "must hold an integer in 'version', got true."),
        ({"format": "other"}, "must hold 'charlm.model' in 'format', got 'other'."),
        ({"config": []}, "must hold an object in 'config'"),
        ({"config": {}}, "vocab_size is missing"),
    ],
    ids=str,
)
def test_a_config_of_another_kind_or_version_is_refused(
    tmp_path: Path, change: dict[str, object], message: str
) -> None:
    values, _ = saved_gpt(tmp_path / "model")
    write_config(tmp_path / "model", {**values, **change})
    refused_quickly(tmp_path / "model", FileFormatError, message)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff", b'{"a": 1, "a": 2}', b"[" * 10**5])
def test_a_config_that_is_no_json_object_is_refused(tmp_path: Path, content: bytes) -> None:
    saved_gpt(tmp_path / "model")
    (tmp_path / "model" / "config.json").write_bytes(content)
    refused_quickly(tmp_path / "model", FileFormatError, r"config\.json' must")


def _missing(tensors: dict[str, Tensor]) -> None:
    tensors["padding"] = tensors.pop("lm_head.bias")


def _extra(tensors: dict[str, Tensor]) -> None:
    tensors["more"] = torch.zeros(3)


def _shape(tensors: dict[str, Tensor]) -> None:
    tensors["lm_head.weight"] = tensors["lm_head.weight"].T.contiguous()


def _flat(tensors: dict[str, Tensor]) -> None:
    tensors["lm_head.weight"] = tensors["lm_head.weight"].flatten()


def _too_few(tensors: dict[str, Tensor]) -> None:
    tensors["lm_head.weight"] = torch.zeros(1)


def _one_dtype(tensors: dict[str, Tensor]) -> None:
    tensors["lm_head.weight"] = tensors["lm_head.weight"].double()


def _integers(tensors: dict[str, Tensor]) -> None:
    tensors.update({name: tensor.to(torch.int32) for name, tensor in tensors.items()})


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_missing, "must hold the tensor 'lm_head.bias', which is missing"),
        (_extra, "holds the tensor 'more', which the model does not have"),
        (_shape, r"must hold 'lm_head.weight' with shape \(13, 32\), got \(32, 13\)"),
        (_flat, r"must hold 'lm_head.weight' with shape \(13, 32\), got \(416,\)"),
        (_too_few, "must hold the .* parameters of config.json, got"),
        (_one_dtype, r"tensors of one type, got torch\.float32, torch\.float64"),
        (_integers, r"must hold floating-point tensors of one type, got torch\.int32"),
    ],
)
def test_tensors_that_are_not_the_models_are_refused(
    tmp_path: Path, damage: Callable[[dict[str, Tensor]], None], message: str
) -> None:
    _, tensors = saved_gpt(tmp_path / "model")
    damage(tensors)
    write_tensors(tmp_path / "model", tensors)
    refused_quickly(tmp_path / "model", FileFormatError, message)


class Bomb:
    """Runs a command when it is unpickled."""

    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.system, (f"touch {self.target}",)

    target = ""


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
@pytest.mark.parametrize("kind", ["pickle", "fifo", "directory", "symlink", "device", "sparse", "garbage"])
def test_other_things_in_place_of_a_file_are_refused(tmp_path: Path, name: str, kind: str) -> None:
    saved_gpt(tmp_path / "model")
    file = tmp_path / "model" / name
    content = file.read_bytes()
    file.unlink()
    message = "must be a regular file"
    if kind == "pickle":
        bomb = Bomb()
        bomb.target = str(tmp_path / "exploded")
        file.write_bytes(pickle.dumps(bomb))
        message = "must"
    elif kind == "fifo":
        os.mkfifo(file)
    elif kind == "directory":
        file.mkdir()
    elif kind == "symlink":
        (tmp_path / "elsewhere").write_bytes(content)
        file.symlink_to(tmp_path / "elsewhere")
    elif kind == "device":
        try:
            os.mknod(file, stat.S_IFCHR | 0o666, os.makedev(1, 5))  # /dev/zero
        except PermissionError:
            pytest.skip("only root makes devices")
    elif kind == "sparse":
        with file.open("wb") as opened:
            opened.truncate(2**40)
        message = "must have at most"
    else:
        file.write_bytes(b"\x00\x01garbage")
        message = "must"
    refused_quickly(tmp_path / "model", FileFormatError, message)
    assert not (tmp_path / "exploded").exists()


def test_the_tokenizer_is_refused_like_the_rest(tmp_path: Path) -> None:
    from charlm import load

    CharLM(bigram(), TOKENIZER).save(tmp_path / "model")
    (tmp_path / "model" / "tokenizer.json").write_bytes(b"{}")
    with pytest.raises(FileFormatError, match=r"tokenizer\.json' must hold"):
        load(tmp_path / "model", device="cpu")


def test_a_module_without_floating_point_tensors_is_float32(tmp_path: Path) -> None:
    from charlm.models.saving import check_tensors

    tensors = {"count": torch.zeros((), dtype=torch.int64)}
    header = own_safetensors.parse_header(b"".join(own_safetensors.dumps(tensors)), path="x")
    assert check_tensors(header, tensors, "x") is torch.float32


def test_a_long_window_takes_no_memory_before_it_is_used(tmp_path: Path) -> None:
    """Rotary positions are made when they are read: a small file with a huge window loads as a small one."""
    config = GPTConfig.from_dict(
        {**tiny_config(position="rotary").to_dict(), "block_size": 1_048_576, "n_embd": 1024, "n_head": 1}
    )
    GPT(config).save(tmp_path / "model")
    began, before = time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    model = GPT.load(tmp_path / "model")
    assert model.block_size == 1_048_576
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 400 * 1024  # KiB; tables: 4 GiB
    assert time.process_time() - began < 5
