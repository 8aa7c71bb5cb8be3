"""A run that was begun in Python, and what the command does with it; and what it is logged to."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from harness.command import TEXT, Command, text_file
from harness.fake_wandb import FakeWandB
from harness.tiny_training import same_tensors
from training.test_loggers import in_log
from training.test_services import by_tag, in_events

from charlm import GPT, BlockDataset, ByteTokenizer, CharTokenizer, Trainer, TrainerConfig, load
from charlm.cli.rundir import read_record
from charlm.errors import CheckpointError
from charlm.training import read_histories, read_history

CONFIG = TrainerConfig(
    max_steps=12, batch_size=2, eval_interval=6, log_interval=3, warmup_steps=2, precision="fp32", seed=3
)


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Command:
    monkeypatch.chdir(tmp_path)
    return Command(capsys)


def trained_in_python(
    out_dir: Path,
    *,
    stops: bool = False,
    tokenizer: CharTokenizer | ByteTokenizer | None = None,
) -> None:
    tokenizer = tokenizer or CharTokenizer.from_text(TEXT)
    train, val = BlockDataset.from_text(TEXT, tokenizer, block_size=8).split(0.7)
    torch.manual_seed(0)
    model = GPT.from_config("cpu-10s", vocab_size=tokenizer.vocab_size, n_layer=1, n_embd=16, block_size=8)
    trainer = Trainer(
        model,
        train,
        CONFIG,
        val_data=val,
        tokenizer=tokenizer,
        out_dir=out_dir,
        device="cpu",
    )
    for _ in trainer.steps():
        if stops and trainer.step == 7:
            trainer.save()
            break


@pytest.mark.parametrize("tokenizer", [None, ByteTokenizer()])
def test_the_command_goes_on_with_a_run_begun_in_python(
    command: Command, tmp_path: Path, tokenizer: ByteTokenizer | None
) -> None:
    trained_in_python(tmp_path / "whole", tokenizer=tokenizer)
    trained_in_python(tmp_path / "stopped", stops=True, tokenizer=tokenizer)
    assert command("train", "--resume", "-o", "stopped") == 2
    assert "the run was begun in Python" in command.err
    assert "charlm train FILE --resume -o stopped" in command.err
    text = text_file(tmp_path)
    assert command("train", text, "--resume", "-o", "stopped", "--device", "cpu") == 0, command.err
    whole, stopped = (load(tmp_path / name, device="cpu").model for name in ("whole", "stopped"))
    assert same_tensors(whole.state_dict(), stopped.state_dict())
    origin = read_record(tmp_path / "stopped")
    assert origin.sources == [str(text)]
    assert command("train", "--resume", "-o", "stopped", "--max-steps", "14", "--device", "cpu") == 0
    assert read_history(tmp_path / "stopped").steps[-1] == 14


def test_another_text_or_cut_is_refused(command: Command, tmp_path: Path) -> None:
    trained_in_python(tmp_path / "run", stops=True)
    text = text_file(tmp_path, TEXT + "more")
    assert command("train", text, "--resume", "-o", "run", "--device", "cpu") == 1
    assert "is not the text that the run was trained with" in command.err


def test_a_child_is_told_that_nobody_knows_where_the_old_text_lies(command: Command, tmp_path: Path) -> None:
    trained_in_python(tmp_path / "run", stops=True)
    assert command("train", text_file(tmp_path), "-o", "new", "--from", "run", "--max-steps", "1") == 0
    assert "cannot be measured: its run was begun in Python, which does not record where" in command.err


def test_it_cannot_be_repeated_and_says_why(command: Command, tmp_path: Path) -> None:
    trained_in_python(tmp_path / "run")
    assert command("train", text_file(tmp_path), "--repeat", "run", "-o", "again") == 1
    assert "the run was begun in Python, and no command can begin it again" in command.err


def test_a_run_that_cannot_say_enough_goes_on_in_python(tmp_path: Path) -> None:
    train = BlockDataset(torch.arange(200) % 9, block_size=8)
    model = GPT.from_config("cpu-10s", vocab_size=9, n_layer=1, n_embd=16, block_size=8)
    Trainer(model, train, CONFIG, out_dir=tmp_path / "run", device="cpu").fit()  # without a tokenizer
    with pytest.raises(CheckpointError, match=r"did not begin it\. Go on with Trainer\.resume"):
        read_record(tmp_path / "run")


def test_a_run_begun_in_python_is_described_evaluated_and_drawn_like_any_other(
    command: Command, tmp_path: Path
) -> None:
    trained_in_python(tmp_path / "run")
    assert command("info", "run", "--json") == 0
    assert json.loads(command.out)["training"]["settings"]["seed"] == 3
    assert command("eval", "run", text_file(tmp_path), "--json") == 0
    assert json.loads(command.out)["kind"] == "gpt"
    assert command("plot", "run") == 0
    settings = read_history(tmp_path / "run").settings
    assert (settings["training.seed"], settings["model.n_layer"], settings["model.kind"]) == (3, 1, "gpt")


def test_several_runs_are_drawn_into_one_picture(command: Command, tmp_path: Path) -> None:
    for name in ("a/run", "b/run", "c"):
        trained_in_python(tmp_path / name)
    names = [history.name for history in read_histories(["a/run", "b/run", "c"])]
    assert names == ["a/run", "b/run", "c"]
    assert command("plot", "a/run", "-o", "three.svg", "b/run", "c") == 0
    assert command.out == "three.svg\n"
    assert "the trainings of 'a/run', 'b/run', 'c', drawn into 'three.svg'" in command.err
    assert command("plot", "a/run", "c") == 0
    assert command.out == "runs.png\n"
    assert command("plot", "a/run", "c", "--bigram") == 2
    assert "draw the model of one RUN" in command.err


def test_the_command_logs_to_tensorboard_and_a_resume_goes_on_with_it(
    command: Command, tmp_path: Path
) -> None:
    text = text_file(tmp_path)
    assert command.train(text, "-o", "run", "--log-to", "tensorboard", "--no-baseline") == 0
    assert command("train", "--resume", "-o", "run", "--max-steps", "25") == 0
    found = in_events(tmp_path / "run" / "tensorboard")
    found.pop("settings")
    assert found == by_tag(in_log(tmp_path / "run"))
    assert max(step for step, _ in found["train/loss"]) == 25
    assert command("train", "--resume", "-o", "run", "--max-steps", "30", "--log-to", "none") == 0
    assert max(step for step, _ in in_events(tmp_path / "run" / "tensorboard")["train/loss"]) == 25
    assert command.train(text, "-o", "run", "--overwrite", "--no-baseline") == 0
    assert not (tmp_path / "run" / "tensorboard").exists()


def test_both_are_told_and_either_may_come_and_go(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wandb = FakeWandB()
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    assert command.train(text_file(tmp_path), "-o", "run", "--log-to", "wandb", "--no-baseline") == 0
    assert (
        command("train", "--resume", "-o", "run", "--max-steps", "25", "--log-to", "wandb,tensorboard") == 0
    )
    (run,) = wandb.runs.values()
    assert max(run.history) == 25
    assert len(in_events(tmp_path / "run" / "tensorboard")["train/loss"]) == 5


def test_weights_are_the_same_bits_with_and_without_loggers(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = text_file(tmp_path)
    assert command.train(text, "-o", "plain", "--no-baseline") == 0
    assert command.train(text, "-o", "logged", "--no-baseline", "--log-to", "tensorboard") == 0
    monkeypatch.setitem(sys.modules, "wandb", None)
    assert command.train(text, "-o", "missing", "--no-baseline", "--log-to", "wandb") == 0
    assert (
        "charlm: warning: WandB has stopped: it needs wandb: pip install wandb; the run goes" in command.err
    )
    plain, *others = (load(name, device="cpu").model.state_dict() for name in ("plain", "logged", "missing"))
    assert all(same_tensors(plain, other) for other in others)


def test_an_unknown_logger_is_a_wrong_command_line(command: Command) -> None:
    assert command("train", "my.txt", "-o", "run", "--log-to", "tensorbord") == 2
    assert "argument --log-to: must be of tensorboard, wandb, got 'tensorbord'" in command.err


def test_epochs_are_a_length_of_a_training(command: Command, tmp_path: Path) -> None:
    text = text_file(tmp_path)
    flags = [f for f in ("--no-baseline", "--epochs", "0.5") if f]
    tiny = ("--n-layer", "1", "--n-embd", "16", "--block-size", "16", "--batch-size", "2", "--no-mixture")
    assert command("train", text, "-o", "run", *tiny, *flags, "--device", "cpu", "-q") == 0
    train_ids = int(len(TEXT) * 0.9)
    wanted = int(np.ceil(0.5 * (train_ids // 16 - 1) / 2))
    assert read_history(tmp_path / "run").steps[-1] == wanted
    assert command("train", text, "-o", "b", "--epochs", "2", "--max-steps", "5") == 2
    assert "--epochs is the length of the training, and so is max_steps" in command.err
    (tmp_path / "a.toml").write_text("minutes = 1.0\n", encoding="utf-8")
    assert command("train", text, "-o", "b", "--epochs", "2", "--config", "a.toml") == 2
    assert "and so is minutes" in command.err
    assert command("train", "--resume", "-o", "run", "--epochs", "2") == 2
    assert "--epochs cannot be given with --resume" in command.err
    for wrong in ("0", "-1", "nan", "inf"):
        assert command("train", text, "-o", "b", "--epochs", wrong) == 2
        assert "--epochs must be above 0, got" in command.err
    auto = ("train", text, "-o", "run", *tiny, "--no-baseline", "--resume", "auto", "--epochs")
    assert command(*auto, "0.5", "--device", "cpu") == 0
    assert command(*auto, "2") == 2
    assert "--epochs 2.0 (it has 0.5)" in command.err
