"""Where settings come from, which of them wins, and what is said about wrong ones."""

from __future__ import annotations

import gzip
import json
import os
from pathlib import Path

import pytest
from harness.command import Command, text_file
from hypothesis import given
from hypothesis import strategies as st

from charlm.cli.output import UsageError
from charlm.cli.settings import FIELDS, gather, preset_values, variable_of
from charlm.errors import ConfigError
from charlm.models.config import PRESETS, PresetName
from charlm.training.recipes import RECIPES


def test_without_anything_else_the_preset_and_its_recipe_hold() -> None:
    for preset in PRESETS:
        settings = gather(preset, file=None, environment={}, flags={})
        assert settings.model == PRESETS[preset]
        assert settings.training == RECIPES[preset]
        assert not settings.given


def test_flags_beat_variables_beat_the_file_beats_the_preset(tmp_path: Path) -> None:
    file = tmp_path / "my.toml"
    file.write_text(
        "n_layer = 2\n[model]\nn_head = 2\nn_embd = 20\n[training]\nseed = 2\nbetas = [0.5, 0.6]\n"
    )
    settings = gather(
        "lecture",
        file=str(file),
        environment={"CHARLM_N_HEAD": "4", "CHARLM_N_EMBD": "40", "CHARLM_BIAS": "No", "HOME": "/"},
        flags={"n_embd": "80", "grad_clip": "none", "qk_norm": True},
    )
    model = settings.model
    assert (model["n_layer"], model["n_head"], model["n_embd"]) == (2, 4, 80)
    assert (model["bias"], model["qk_norm"], model["block_size"]) == (False, True, 256)
    assert (settings.training.seed, settings.training.betas) == (2, (0.5, 0.6))
    assert settings.training.grad_clip is None
    assert settings.given == {"n_layer", "n_head", "n_embd", "seed", "betas", "bias", "grad_clip", "qk_norm"}


@given(st.sampled_from(sorted(FIELDS)), st.sampled_from(sorted(PRESETS)))
def test_every_value_of_a_preset_can_be_written_as_a_variable(name: str, preset: PresetName) -> None:
    value = preset_values(preset)[name]
    text = ",".join(map(str, value)) if isinstance(value, tuple | list) else str(value).lower()
    settings = gather(preset, file=None, environment={variable_of(name): text}, flags={})
    kept = settings.model.get(name, getattr(settings.training, name, None))
    assert kept == (tuple(value) if isinstance(value, list) else value)
    assert settings.given == {name}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"n_layers = 2", "unknown field 'n_layers'; did you mean 'n_layer'?"),
        (b"lr = 2", "unknown field 'lr'; did you mean 'learning_rate'?"),
        (b"zzzzzz = 2", "unknown field 'zzzzzz'; `charlm train --help` lists the fields"),
        (b"[trainer]\nseed = 2", "unknown field 'trainer'"),
        (b"[model]\nseed = 2", "unknown field 'seed' in [model]; it belongs into [training]"),
        (b"vocab_size = 65", "vocab_size cannot be set; it is that of the text"),
        (b"seed = 1\n[training]\nseed = 2", "'seed' stands there twice"),
        (b"n_layer = 0", "n_layer must be an int at least 1"),
        (b"n_layer = 2.0", "n_layer must be an int at least 1"),
        (b"bias = 1", "bias must be True or False, got 1"),
        (b"betas = 0.9", "betas must be (a finite number"),
        (b"learning_rate = 1979-05-27", "learning_rate must be a finite number"),
        (b"n_layer = ", "must be a TOML file in UTF-8"),
        (b"\xff", "must be a TOML file in UTF-8"),
        (b"seed = " + b"9" * 5_000, "must be a TOML file in UTF-8: "),
        (b"seed = " + b"[" * 50_000, "must be a TOML file in UTF-8: "),
        (b"seed = 0x" + b"f" * 5_000, "seed must be an int"),
        (b"n_layer" + b".a" * 5_000 + b" = 1", "n_layer must be an int"),
        (gzip.compress(b"seed = 1", mtime=0), "must be a TOML file in UTF-8, got gzip; unpack it"),
        ("learning_rate = 1\n".encode("utf-16-le"), "UTF-8, got text in UTF-16LE; convert it with iconv"),
    ],
)
def test_a_wrong_file_is_named_with_what_is_wrong(tmp_path: Path, content: bytes, message: str) -> None:
    file = tmp_path / "my.toml"
    file.write_bytes(content)
    with pytest.raises(ConfigError) as caught:
        gather("lecture", file=str(file), environment={}, flags={})
    assert message in str(caught.value)
    assert "my.toml" in str(caught.value)
    with pytest.raises(UsageError) as usage:  # and is told beside the rest
        gather("lecture", file=str(file), environment={}, flags={"batch_size": "0"})
    assert str(caught.value) in str(usage.value)
    assert "--batch-size must be" in str(usage.value)


def test_a_file_may_begin_with_a_byte_order_mark(tmp_path: Path) -> None:
    file = tmp_path / "my.toml"
    file.write_bytes(b"\xef\xbb\xbfn_layer = 2\r\n")
    assert gather("lecture", file=str(file), environment={}, flags={}).model["n_layer"] == 2


def test_none_in_a_file_stands_for_none(tmp_path: Path) -> None:
    file = tmp_path / "my.toml"
    file.write_text('patience = 3\nsave_interval = "none"\n')
    assert gather("gpt2", file=str(file), environment={}, flags={}).training.save_interval is None


def test_whatever_is_wrong_anywhere_is_named_at_once(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the file, among the variables and the options; and what does not go together, between any two."""
    file = tmp_path / "my.toml"
    file.write_text(
        "n_layers = 2\nn_layer = 0\nbatch_size = 1\n[model]\nseed = 2\nn_embd = 10\n"
        "[training]\nbatch_size = 1\ngrad_clip = 0\n"
    )
    environment = {"CHARLM_DROPOUT": "2", "CHARLM_N_HEAD": "3"}
    found = [
        *("unknown field 'n_layers'", "n_layer must", "grad_clip must", "belongs into [training]", "twice"),
        *("CHARLM_DROPOUT must", "n_embd must be a multiple of n_head"),
    ]
    with pytest.raises(ConfigError) as caught:
        gather("gpt2", file=str(file), environment=environment, flags={})
    assert [text for text in found if text not in str(caught.value)] == []
    with pytest.raises(UsageError) as refused:
        gather("gpt2", file=str(file), environment=environment, flags={"momentum": "x"})
    assert [text for text in [*found, "--momentum must"] if text not in str(refused.value)] == []
    with pytest.raises(UsageError) as refused:  # a wrong n_head conflicts with nothing, the preset's neither
        gather("gpt2", file=str(file), environment={}, flags={"n_head": "0", "seed": "x"})
    assert "multiple" not in str(refused.value)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    command = Command(capsys)
    assert command("train", "-o", tmp_path / "run", "--config", file, "--val-fraction", "2") == 2
    for text in [*found, "FILE is needed", "--val-fraction must be"]:
        assert text in command.err
    missing = ("--config", tmp_path / "missing.toml", "--fooo", "--barr")
    assert command("train", "-o", tmp_path / "run", *missing) == 2
    assert "'--fooo'" in command.err
    assert "'--barr'" in command.err
    options = ("-n", "-1", "--num-samples", "0", "-t", "-1", "--stop", "")
    assert command("generate", tmp_path, *options) == 2
    assert command.err.count("must be") == 4
    assert command("inspect", file, "--minutes", "0", "--val-fraction", "2") == 2
    assert command.err.count("must be") == 2


def test_a_wrong_variable_is_named() -> None:
    with pytest.raises(ConfigError, match="CHARLM_BIAS must be True or False, got 'perhaps'"):
        gather("gpt2", file=None, environment={"CHARLM_BIAS": "perhaps"}, flags={})


def test_fields_that_do_not_go_together_are_blamed_on_flags_only_if_these_make_them_so() -> None:
    odd = {"CHARLM_N_EMBD": "9", "CHARLM_N_HEAD": "2"}
    with pytest.raises(ConfigError, match="multiple of n_head"):
        gather("gpt2", file=None, environment=odd, flags={})
    with pytest.raises(ConfigError, match="multiple of n_head"):
        gather("gpt2", file=None, environment=odd, flags={"seed": "3"})
    with pytest.raises(UsageError, match="multiple of n_head"):
        gather("gpt2", file=None, environment={}, flags={"n_head": "7"})
    assert gather("gpt2", file=None, environment=odd, flags={"n_embd": "10"}).model["n_embd"] == 10


def test_mistakes_in_files_and_variables_exit_with_1(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command, text = Command(capsys), text_file(tmp_path)
    assert command("train", text, "-o", tmp_path / "run", "--config", tmp_path / "missing.toml") == 1
    assert "missing.toml' cannot be read: No such file" in command.err
    monkeypatch.setenv("CHARLM_N_LAYER", "0")
    assert command("train", text, "-o", tmp_path / "run") == 1
    assert command.err.startswith("charlm: error: CHARLM_N_LAYER must be an int at least 1")
    assert not (tmp_path / "run").exists()


def test_the_effective_settings_are_written_into_the_run(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command, text = Command(capsys), text_file(tmp_path)
    (tmp_path / "my.toml").write_text("learning_rate = 0.002\nweight_decay = 0.3\n")
    monkeypatch.setenv("CHARLM_WEIGHT_DECAY", "0.4")
    monkeypatch.setenv("CHARLM_LERNING_RATE", "0.4")
    assert (
        command.train(text, "-o", tmp_path / "run", "--config", tmp_path / "my.toml", "--betas", "0.8", "0.9")
        == 0
    )
    assert "warning: CHARLM_LERNING_RATE is ignored; did you mean CHARLM_LEARNING_RATE?" in command.err
    record = json.loads((tmp_path / "run" / "train.json").read_bytes())
    training = record["training"]
    assert (training["learning_rate"], training["weight_decay"], training["betas"]) == (
        0.002,
        0.4,
        [0.8, 0.9],
    )
    assert record["model"]["n_embd"] == 16
    assert record["sources"] == [str(text)]
    assert (record["val_fraction"], record["tokenizer"], record["preset"]) == (0.1, "char", "cpu-10s")
    assert record["versions"].keys() == {"charlm", "python", "torch", "numpy"}


@pytest.mark.skipif(not Path("/dev/fd").is_dir(), reason="the system shows no open files as files")
def test_a_file_that_is_a_pipe_is_read_once(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """Without --preset, text and time choose one after the settings were read."""
    reader, writer = os.pipe()
    os.write(writer, b"learning_rate = 0.002\nmax_steps = 2\n")
    os.close(writer)
    run, config = tmp_path / "run", f"/dev/fd/{reader}"
    words = ("-o", run, "--config", config, "--device", "cpu", "--no-baseline")
    assert Command(capsys)("train", text_file(tmp_path), *words) == 0
    os.close(reader)
    training = json.loads((run / "train.json").read_bytes())["training"]
    assert (training["learning_rate"], training["max_steps"]) == (0.002, 2)


def test_a_preset_that_is_still_to_be_chosen_is_the_first_that_goes_together_with_the_rest() -> None:
    assert gather(None, file=None, environment={}, flags={}).preset == "cpu-1min"
    settings = gather(None, file=None, environment={}, flags={"n_head": "3"})
    assert (settings.preset, settings.model["n_embd"]) == ("cpu-10s", 96)
    with pytest.raises(UsageError, match="multiple of n_head"):
        gather(None, file=None, environment={}, flags={"n_head": "7", "n_embd": "64"})
    with pytest.raises(ConfigError, match="multiple of n_head"):
        gather(None, file=None, environment={"CHARLM_N_HEAD": "7", "CHARLM_N_EMBD": "64"}, flags={})


def test_none_is_no_value_of_a_field_that_must_have_one() -> None:
    with pytest.raises(UsageError, match="--n-layer must be an int at least 1 and at most 256, got 'none'"):
        gather("lecture", file=None, environment={}, flags={"n_layer": "none"})
