"""The course of a run, as its directory tells it."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from harness.tiny_training import TOKENIZER, PlainModule, quick_config, tiny_split
from torch import Tensor
from typing_extensions import override

from charlm import BigramLM, BlockDataset, ByteTokenizer, Trainer
from charlm.errors import CheckpointError, FileFormatError
from charlm.runs.directory import RunDirectory
from charlm.training import RunHistory, read_history


def run_with(folder: Path, *records: Mapping[str, object], end: str = "") -> Path:
    """Make a run with these lines in its log, and something behind them."""
    run = RunDirectory.create(folder / "run")
    lines = "".join(json.dumps(record) + "\n" for record in records)
    run.metrics.write_text(lines + end, encoding="utf-8")
    return run.path


def step(number: int, loss: float | None, **more: object) -> dict[str, object]:
    return {
        "kind": "step",
        "step": number,
        "loss": loss,
        "learning_rate": 0.1,
        "chars_per_second": 9.0,
        **more,
    }


def evaluation(number: int, loss: float | None) -> dict[str, object]:
    return {"kind": "eval", "step": number, "loss_nats": loss}


def test_a_history_has_what_the_trainer_said(tmp_path: Path) -> None:
    train, val = tiny_split()
    trainer = Trainer(
        BigramLM(TOKENIZER.vocab_size),
        train,
        quick_config(log_interval=3),
        val_data=val,
        out_dir=tmp_path / "run",
    )
    records = [record for record in trainer.steps() if record.step % 3 == 0]
    history = read_history(tmp_path / "run")
    assert history.name == "run"
    assert history.unit == "character"
    assert history.steps.tolist() == [3, 6, 9, 12]
    assert history.loss_nats.tolist() == [record.loss for record in records]
    assert history.learning_rate.tolist() == [record.learning_rate for record in records]
    assert (history.chars_per_second > 0).all()
    assert history.eval_steps.tolist() == [4, 8, 12]
    assert history.eval_loss_nats.tolist() == [e.result.loss_nats for e in trainer.history]
    assert trainer.best is not None
    assert history.best is not None
    assert history.eval_steps[history.best] == trainer.best.step
    assert history.skipped_steps.size == 0
    assert history.baseline_loss_nats is None


def test_a_skipped_step_is_told_apart_and_has_no_loss(tmp_path: Path) -> None:
    class Sometimes(PlainModule):
        calls: Tensor

        @override
        def forward(self, idx: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
            logits, loss = super().forward(idx, targets)
            self.calls = self.calls + torch.ones(())
            return logits, loss * (math.nan if self.calls == 5 else 1.0)

    train, _ = tiny_split()
    config = quick_config(nonfinite="skip")
    model = Sometimes(TOKENIZER.vocab_size)
    trainer = Trainer(model, train, config, out_dir=tmp_path / "run", device="cpu")
    with pytest.warns(RuntimeWarning, match="was skipped"):
        trainer.fit()
    history = read_history(tmp_path / "run")
    assert history.skipped_steps.tolist() == [5]
    assert np.flatnonzero(np.isnan(history.loss_nats)).tolist() == [4]
    assert history.best is None


def test_what_was_not_finite_or_not_logged_is_nan_and_is_not_the_best(tmp_path: Path) -> None:
    run = run_with(
        tmp_path,
        step(10, 3.0),
        evaluation(10, None),
        evaluation(20, 2.0),
        {"kind": "sample", "step": 20, "text": "abc"},
        evaluation(30, 2.0),
        {"kind": "step", "step": 31, "loss": None, "grad_norm": None},
    )
    history = read_history(run)
    assert history.steps.tolist() == [10, 31]
    assert np.isnan(history.loss_nats).tolist() == [False, True]
    assert np.isnan(history.learning_rate).tolist() == [False, True]
    assert np.isnan(history.eval_loss_nats).tolist() == [True, False, False]
    assert history.best == 1  # the first of two that are equal, as the trainer has it


def test_a_run_in_training_is_read_up_to_its_torn_last_line(tmp_path: Path) -> None:
    run = run_with(tmp_path, step(10, 3.0), end='{"kind":"step","st')
    assert read_history(run).steps.tolist() == [10]


def test_a_run_that_logs_while_it_is_read_is_no_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = run_with(tmp_path, step(10, 3.0), step(20, 2.5))
    real = os.read

    def read(descriptor: int, count: int) -> bytes:
        with (run / "metrics.jsonl").open("a", encoding="utf-8") as log:
            log.write(json.dumps(step(30, 2.0)) + "\n")
        return real(descriptor, count)

    directory = RunDirectory.open(run)
    monkeypatch.setattr(RunDirectory, "open", lambda path: directory)  # run.json must not grow
    monkeypatch.setattr(os, "read", read)
    assert read_history(run).steps.tolist() == [10, 20]


@pytest.mark.parametrize("log", [None, "", '{"kind":"step"', '{"kind":"sample","step":3,"text":"a"}\n'])
def test_a_run_that_has_logged_nothing_says_so(tmp_path: Path, log: str | None) -> None:
    run = RunDirectory.create(tmp_path / "run")
    if log is not None:
        run.metrics.write_text(log, encoding="utf-8")
    with pytest.raises(CheckpointError, match=r"run' has logged nothing yet: metrics.jsonl holds no step"):
        read_history(run.path)


def test_a_directory_that_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no run in .*: it has no run\.json"):
        read_history(tmp_path)


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"kind": "step", "loss": 1.0}, "must hold an integer in 'step'"),
        (step(1, 1.0, learning_rate="fast"), "must hold a number in 'learning_rate', got"),
        ({"kind": "eval", "step": 1, "loss_nats": [1]}, "must hold a number in 'loss_nats'"),
    ],
)
def test_a_log_with_something_else_in_it_is_refused(
    tmp_path: Path, record: Mapping[str, object], message: str
) -> None:
    with pytest.raises(FileFormatError, match=message):
        read_history(run_with(tmp_path, record))


def test_unit_and_baseline_are_those_that_the_command_wrote(tmp_path: Path) -> None:
    run = run_with(tmp_path, step(10, 3.0))
    values = {"format": "charlm.train", "version": 1, "tokenizer": "byte", "baseline": {"loss_nats": 1.5}}
    (run / "train.json").write_text(json.dumps(values), encoding="utf-8")
    history = read_history(run)
    assert (history.unit, history.baseline_loss_nats) == ("byte", 1.5)
    for baseline in (None, {"loss_nats": None}):
        (run / "train.json").write_text(
            json.dumps({**values, "tokenizer": "char", "baseline": baseline}), encoding="utf-8"
        )
        history = read_history(run)
        assert (history.unit, history.baseline_loss_nats) == ("character", None)
    (run / "train.json").write_text("{}", encoding="utf-8")
    with pytest.raises(FileFormatError, match=r"train\.json"):
        read_history(run)


@pytest.mark.parametrize(
    ("left_out", "part"), [({}, None), ({"n_left_out": 0}, None), ({"n_left_out": 1}, (500, 501))]
)
def test_the_baseline_has_a_part_only_where_something_was_left_out(
    tmp_path: Path, left_out: Mapping[str, object], part: tuple[int, int] | None
) -> None:
    run = run_with(tmp_path, step(10, 3.0))
    values = {"format": "charlm.train", "version": 1, "tokenizer": "char"}
    baseline = {"loss_nats": 1.5, "scored": 500, **left_out}
    (run / "train.json").write_text(json.dumps({**values, "baseline": baseline}), encoding="utf-8")
    assert read_history(run).baseline_part == part


def test_a_run_of_bytes_by_the_trainer_can_say_so(tmp_path: Path) -> None:
    """Without the command's record the unit is not known; a history is a value that can be changed."""
    import dataclasses

    train = BlockDataset.from_text("été\n" * 50, ByteTokenizer(), 8)
    torch.manual_seed(0)
    trainer = Trainer(
        BigramLM(256),
        train,
        quick_config(),
        tokenizer=ByteTokenizer(),
        out_dir=tmp_path / "run",
        device="cpu",
    )
    trainer.fit()
    history = read_history(tmp_path / "run")
    assert history.unit == "character"
    changed = dataclasses.replace(history, unit="byte", name="bytes")
    assert isinstance(changed, RunHistory)
    assert (changed.unit, changed.name) == ("byte", "bytes")


@pytest.mark.parametrize("file", ["state.json", "config.json"])
@pytest.mark.parametrize("content", [{"config": [1]}, {"config": "x"}, {}])
def test_a_strange_checkpoint_leaves_the_settings_unknown(
    tmp_path: Path, file: str, content: Mapping[str, object]
) -> None:
    train, val = tiny_split()
    model = BigramLM(TOKENIZER.vocab_size)
    Trainer(model, train, quick_config(), val_data=val, tokenizer=TOKENIZER, out_dir=tmp_path / "run").fit()
    assert read_history(tmp_path / "run").settings["model.kind"] == "bigram"
    for folder in (tmp_path / "run" / "checkpoints").iterdir():
        (folder / file).write_text(json.dumps(content), encoding="utf-8")
    assert read_history(tmp_path / "run").settings == {}
