"""Several runs as one table."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from harness.tiny_training import TOKENIZER, quick_config, tiny_split

from charlm import BigramLM, Trainer
from charlm.training import history_table, read_histories


def test_a_table_has_a_row_for_each_logged_or_evaluated_step_and_what_differs(tmp_path: Path) -> None:
    train, val = tiny_split()
    for seed in (1, 2):
        config = quick_config(seed=seed, log_interval=3, grad_clip=None if seed == 1 else 1.0)
        Trainer(
            BigramLM(TOKENIZER.vocab_size), train, config, val_data=val, out_dir=tmp_path / f"s{seed}"
        ).fit()
    histories = read_histories(sorted(tmp_path.iterdir()))
    table = history_table(histories)
    assert [*table] == [
        *("run", "step", "train_loss", "val_loss", "learning_rate", "chars_per_second"),
        *("training.seed", "training.grad_clip"),
    ]
    assert {len(column) for column in table.values()} == {12}
    one = {name: column[table["run"] == "s1"] for name, column in table.items()}
    assert one["step"].tolist() == [3, 4, 6, 8, 9, 12]
    known = ~np.isnan(one["train_loss"])
    assert one["step"][known].tolist() == [3, 6, 9, 12]
    assert one["train_loss"][known].tolist() == histories[0].loss_nats.tolist()
    scored = ~np.isnan(one["val_loss"])
    assert one["step"][scored].tolist() == [4, 8, 12]
    assert one["val_loss"][scored].tolist() == histories[0].eval_loss_nats.tolist()
    assert table["training.seed"].tolist() == [1] * 6 + [2] * 6
    assert table["training.grad_clip"].tolist() == [None] * 6 + [1.0] * 6


def test_the_table_of_no_run_has_no_row() -> None:
    assert {len(column) for column in history_table([]).values()} == {0}
