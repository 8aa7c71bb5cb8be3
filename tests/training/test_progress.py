"""What a training shows while it runs, to users of Python; the command's is in cli/test_processes.py."""

from __future__ import annotations

import copy
import re
from typing import Any, ClassVar

import pytest
import torch
from harness.tiny_training import TOKENIZER, quick_config, tensors_of, tiny_split
from typing_extensions import override

from charlm import BigramLM, Trainer
from charlm.evaluation import EvalResult
from charlm.training import Callback, ProgressBar, TrainerConfig, progress
from charlm.training.progress import clock, scored_part, speed
from charlm.training.records import StepRecord

LINE = re.compile(
    r"step +\d+  train loss \d\.\d{4}  val loss \d\.\d{4} nats = \d\.\d{4} bits/char.*  "
    r"[\d.]+k? chars/s  0:00"
)


def trainer_with(*callbacks: Callback, validates: bool = True, **changes: object) -> Trainer:
    train, val = tiny_split()
    torch.manual_seed(0)
    config: TrainerConfig = quick_config(**changes)
    return Trainer(
        BigramLM(TOKENIZER.vocab_size),
        train,
        config,
        val_data=val if validates else None,
        tokenizer=TOKENIZER,
        callbacks=callbacks,
        device="cpu",
    )


def test_where_no_bar_can_move_there_is_a_line_for_each_evaluation_on_standard_error(
    capsys: pytest.CaptureFixture[str],
) -> None:
    trainer_with(ProgressBar(), sample_interval=12, sample_chars=10).fit()
    out, err = capsys.readouterr()
    assert not out
    lines = err.splitlines()
    steps = [line for line in lines if line.startswith("step")]
    assert len(steps) == 3
    assert all(LINE.fullmatch(line) for line in steps)
    assert "sample at step 12:" in lines


def test_without_a_validation_text_there_are_lines_at_its_intervals(
    capsys: pytest.CaptureFixture[str],
) -> None:
    trainer_with(ProgressBar(), validates=False, max_steps=10).fit()
    lines = capsys.readouterr().err.splitlines()
    assert [line.split()[:2] for line in lines] == [["step", "4"], ["step", "8"], ["step", "10"]]


def test_it_changes_no_bit(capsys: pytest.CaptureFixture[str]) -> None:
    plain, shown = trainer_with(), trainer_with(ProgressBar())
    plain.fit()
    shown.fit()
    one, other = tensors_of(plain), tensors_of(shown)
    assert all(torch.equal(one[name], other[name]) for name in one)


class FakeBar:
    """What is asked of tqdm."""

    made: ClassVar[list[FakeBar]] = []

    def __init__(self, **options: Any) -> None:
        self.options, self.n, self.closed = options, options["initial"], False
        self.total = options["total"]
        self.lines: list[str] = []
        self.facts: list[str] = []
        self.format_dict = {"ncols": "100%"}  # as a notebook's bar has it
        FakeBar.made.append(self)

    def write(self, text: str, file: object) -> None:
        assert file is self.options["file"]
        self.lines.append(text)

    def set_postfix_str(self, facts: str, refresh: bool) -> None:
        self.facts.append(facts)

    def update(self, n: int) -> None:
        self.n += n

    def close(self) -> None:
        assert not self.closed
        self.closed = True


@pytest.fixture
def notebook(monkeypatch: pytest.MonkeyPatch) -> type[FakeBar]:
    monkeypatch.setattr(progress, "in_notebook", lambda: True)
    monkeypatch.setattr(progress, "bar_class", lambda: FakeBar)
    monkeypatch.setattr(FakeBar, "made", [])
    return FakeBar


def test_a_notebook_has_a_bar_and_the_lines_above_it(notebook: type[FakeBar]) -> None:
    trainer = trainer_with(ProgressBar())
    trainer.fit()
    (bar,) = notebook.made
    assert (bar.n, bar.total, bar.closed, len(bar.lines)) == (12, 12, True, 3)
    assert re.fullmatch(r"loss \d\.\d{4}, val \d\.\d{4}, .* chars/s", bar.facts[-1])


def test_an_interrupt_takes_the_bar_away_and_going_on_brings_another(notebook: type[FakeBar]) -> None:
    class InterruptAt5(Callback):
        @override
        def on_step_end(self, trainer: Trainer, record: StepRecord) -> None:
            if record.step == 5:
                raise KeyboardInterrupt

    trainer = trainer_with(ProgressBar(), InterruptAt5())
    with pytest.raises(KeyboardInterrupt):
        trainer.fit()
    assert [bar.closed for bar in notebook.made] == [True]
    assert trainer.fit().steps == 12
    assert [(bar.options["initial"], bar.n, bar.closed) for bar in notebook.made] == [
        (0, 5, True),
        (5, 12, True),
    ]
    assert "train loss" in notebook.made[1].lines[0]


def test_a_trainer_with_a_bar_can_be_copied(notebook: type[FakeBar]) -> None:
    trainer = trainer_with(ProgressBar())
    for _ in trainer.steps():
        twin = copy.deepcopy(trainer)
        break
    assert twin.fit().steps == 12


def test_words_for_times_speeds_and_parts() -> None:
    assert [clock(s) for s in (0, 61.6, 3_725)] == ["0:00", "1:02", "1:02:05"]
    assert [speed(s, "byte") for s in (1.0, 999.6, 81_300, 2e9)] == [
        "1 bytes/s",
        "1k bytes/s",
        "81.3k bytes/s",
        "2G bytes/s",
    ]
    result = EvalResult(loss_nats=1.0, accuracy=0.5, n_chars=10, n_left_out=5)
    assert scored_part(result, "byte") == " on 10 of 15 bytes"
