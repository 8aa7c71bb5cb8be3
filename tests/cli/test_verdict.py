"""Which results are said to be worth little, and why."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
from harness.tiny_training import TOKENIZER, quick_config, tiny_split

from charlm import GPT, BigramLM, EvalResult, Trainer
from charlm.cli.verdict import few_steps, judged
from charlm.training import TrainResult

NGRAM = {"loss_nats": 1.5}


def trainer(**changes: Any) -> Trainer:
    train, val = tiny_split()
    return Trainer(BigramLM(TOKENIZER.vocab_size), train, quick_config(**changes), val_data=val, device="cpu")


def result(loss: float, **changes: Any) -> TrainResult:
    best = EvalResult(loss_nats=loss, accuracy=0.5, n_chars=100)
    usual = TrainResult(
        steps=1_000,
        seconds=60.0,
        chars_seen=3_000,
        final=best,
        best=best,
        best_step=1_000,
        history=(),
        reason="minutes",
        checkpoint=None,
    )
    return dataclasses.replace(usual, **changes)


def test_a_model_near_the_ngram_model_or_before_it_needs_no_words() -> None:
    assert judged(trainer(), result(1.4), NGRAM) is None
    assert judged(trainer(), result(1.54), NGRAM) is None
    assert judged(trainer(), result(1.4, steps=10, best_step=10), NGRAM) is None


def test_too_few_steps_are_the_first_reason() -> None:
    found = judged(trainer(minutes=1.0), result(3.0, steps=7, best_step=7), NGRAM)
    assert found is not None
    assert found.startswith(
        "7 steps are too few to learn much from: the GPT is worth little. Give it more --minutes"
    )
    assert "1 step is too few" in (judged(trainer(), result(3.0, steps=1, best_step=1), NGRAM) or "")
    assert "--max-steps" in (judged(trainer(), result(3.0, steps=7, best_step=7), NGRAM) or "")


def test_a_short_text_is_the_reason_and_not_the_few_steps_that_it_is_good_for() -> None:
    few = result(3.0, steps=7, best_step=7)
    found = judged(trainer(), few, NGRAM, enough=True) or ""
    assert "too few" not in found
    assert "nats behind counting" in found
    three_epochs = result(3.0, chars_seen=3 * trainer().train_data.n_ids)
    read = judged(trainer(), three_epochs, NGRAM, enough=True) or ""
    assert "the text is too short for it" in read
    assert judged(trainer(), few, None, enough=True) is None


def test_few_steps_may_be_enough_for_a_model_that_has_learnt_before() -> None:
    few = result(3.0, steps=7, best_step=7)
    assert judged(trainer(), few, None, anew=False) is None
    assert "nats behind counting" in (judged(trainer(), few, NGRAM, anew=False) or "")


def test_without_a_baseline_only_few_steps_are_said() -> None:
    assert "too few" in (judged(trainer(minutes=1.0), result(3.0, steps=7, best_step=7), None) or "")
    assert judged(trainer(minutes=1.0), result(3.0), None) is None
    assert judged(trainer(), result(3.0), {"loss_nats": None}) is None


def test_a_text_learnt_by_heart_is_too_short() -> None:
    early = judged(trainer(minutes=1.0), result(1.9, best_step=300, chars_seen=9_000), NGRAM)
    seen_often = judged(trainer(minutes=1.0), result(1.9, reason="max_steps", chars_seen=36_000), NGRAM)
    for found in (early, seen_often):
        assert found is not None
        assert "0.40 nats behind counting: the text is too short for it" in found
    assert "seen 10 times" in (seen_often or "")


def test_a_loss_that_rose_in_the_first_epoch_is_no_matter_of_length() -> None:
    found = judged(trainer(minutes=1.0), result(1.9, best_step=300), NGRAM)
    assert found is not None
    assert "its loss has risen since step 300: try a lower --learning-rate" in found


def test_else_more_time_is_what_helps() -> None:
    assert judged(trainer(minutes=1.0), result(1.9), NGRAM) == (
        "the GPT is 0.40 nats behind counting, since it has made only 1,000 steps: give it more --minutes"
    )


@pytest.mark.parametrize(("steps", "words"), [(1, "about 1 step fit"), (40, "about 40 steps fit")])
def test_few_steps_are_said_before(steps: int, words: str) -> None:
    assert f"only {words} into 2 min" in few_steps(steps, 2.0, BigramLM(3))


def test_the_smallest_preset_is_not_advised_to_who_has_it() -> None:
    small, large = (
        GPT.from_config(name, vocab_size=TOKENIZER.vocab_size) for name in ("cpu-10s", "cpu-1min")
    )
    assert "--preset cpu-10s" in few_steps(9, 2.0, large)
    assert few_steps(9, 2.0, small).endswith("Give it more minutes, or a machine that does nothing else")
    ended = trainer(minutes=1.0)
    few = result(3.0, steps=7, best_step=7)
    assert (judged(ended, few, NGRAM) or "").endswith("--minutes, or a smaller model (--preset cpu-10s)")
    ended.model = small
    assert (judged(ended, few, NGRAM) or "").endswith("Give it more --minutes")


def test_a_run_without_an_evaluation_is_not_judged() -> None:
    assert judged(trainer(), result(9.9, best=None, best_step=None), NGRAM) is None
