"""Every kind of text can be trained on: losses are finite, runs resume bit for bit, evaluations are right."""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from harness.texts import LONG, TEXTS
from harness.tiny_models import tiny_config, tiny_gpt
from harness.tiny_training import Numbers, quick_config, same_tensors, tensors_of
from oracles.plain_evaluation import plain_evaluation

from charlm import BigramLM, BlockDataset, ByteTokenizer, CharTokenizer, LanguageModel, Trainer
from charlm.errors import DataError
from charlm.text.tokenizer import unit_of
from charlm.training import Callback, TrainerConfig

BLOCK = 8
CONFIGS = {
    "as default": TrainerConfig(
        max_steps=6, batch_size=4, precision="fp32", eval_interval=3, save_interval=6, log_interval=1
    ),
    "adamw": quick_config(max_steps=6, eval_interval=3, save_interval=6, learning_rate=0.01),
}


def model_of(name: str, vocab_size: int) -> LanguageModel:
    if name == "gpt":
        sizes = {"n_embd": 16, "n_layer": 1, "block_size": BLOCK, "dropout": 0.1}
        return tiny_gpt(tiny_config("gpt2", vocab_size=vocab_size, **sizes))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return BigramLM(vocab_size)


@pytest.fixture(autouse=True)
def without_waiting_for_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave out what only a loss of power would show: it is half of the time here."""
    monkeypatch.setattr(os, "fsync", lambda _: None)


class Run:
    """What is trained on a text, and with what."""

    def __init__(self, kind: str, model: str, config: str) -> None:
        self.tokenizer = CharTokenizer.from_text(LONG[kind])
        self.train, self.val = BlockDataset.from_text(LONG[kind], self.tokenizer, BLOCK).split()
        self.model, self.config = model, CONFIGS[config]

    def trainer(self, callbacks: Sequence[Callback], out_dir: Path | None = None) -> Trainer:
        return Trainer(
            model_of(self.model, self.tokenizer.vocab_size),
            self.train,
            self.config,
            val_data=self.val,
            device="cpu",
            out_dir=out_dir,
            callbacks=callbacks,
            tokenizer=self.tokenizer,
        )


# A bigram model has nothing for Muon: its only matrix is the output.
WAYS = (("bigram", "as default"), ("gpt", "as default"), ("gpt", "adamw"))


@pytest.mark.parametrize(
    ("kind", "model", "config"),
    [(kind, *way) for kind, way in zip(LONG, itertools.cycle(WAYS), strict=False)],
)
def test_a_run_stays_finite_is_evaluated_rightly_and_resumes_bit_for_bit(
    kind: str, model: str, config: str, tmp_path: Path
) -> None:
    run = Run(kind, model, config)
    whole, first, second = Numbers(), Numbers(), Numbers()
    trainer = run.trainer([whole])
    result = trainer.fit()
    assert [step for step, *_ in whole.steps] == [1, 2, 3, 4, 5, 6]
    assert all(math.isfinite(number) for numbers in whole.steps for number in numbers)

    assert result.best is not None
    loss, accuracy, count = plain_evaluation(trainer.model.eval(), run.val.ids.tolist(), BLOCK)
    assert result.best.loss_nats == pytest.approx(loss, rel=1e-5, abs=1e-6)
    assert result.best.accuracy == pytest.approx(accuracy)
    assert result.best.n_chars == count

    stopped = run.trainer([first], tmp_path / "run")
    for record in stopped.steps():
        if record.step == 3:
            break
    again = Trainer.resume(tmp_path / "run", run.train, val_data=run.val, device="cpu", callbacks=[second])
    assert again.step == 3
    resumed = again.fit()
    assert (resumed.best, resumed.final) == (result.best, result.final)
    assert first.steps + second.steps == whole.steps
    assert same_tensors(tensors_of(again), tensors_of(trainer))


@pytest.mark.parametrize("kind", TEXTS)
def test_a_text_too_short_for_a_split_says_so_and_which_part_is(kind: str) -> None:
    text = TEXTS[kind][:20]
    for tokenizer, N in ((CharTokenizer.from_text(text), 20), (ByteTokenizer(), len(text.encode()))):
        cut = int(0.9 * N)
        with pytest.raises(DataError, match=f"^the text has {N} {unit_of(tokenizer)}s; block_size {N} needs"):
            BlockDataset.from_text(text, tokenizer, N)
        for block_size, part, length in ((cut, "training", cut), (N - cut, "validation", N - cut)):
            with pytest.raises(
                DataError, match=rf"\(for {part}\) has {length} (character|byte)s; block_size"
            ):
                BlockDataset.from_text(text, tokenizer, block_size).split()
        train, val = BlockDataset.from_text(text, tokenizer, N - cut - 1).split()
        assert tokenizer.decode([*train.ids, *val.ids]) == text
