"""The result of a run: its GPT, its n-gram model, or the mixture of both.

The one with the lowest loss on pieces of the training text is chosen. The GPT has not seen these pieces, and
an n-gram model is counted without them for this purpose. The validation text is not used for the choice. A
result other than the GPT is saved in RUN/mixture, with the name of its checkpoint. `load` uses it as long as
that checkpoint is the best.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from charlm.backends.base import DeviceBackend
from charlm.cli.baseline import BASELINE_FOLDER, Counted, count_end
from charlm.cli.output import Console
from charlm.cli.rundir import read_record, write_record
from charlm.data.blocks import BlockDataset
from charlm.errors import CharLMError
from charlm.files.atomic import remove_directory
from charlm.models.base import LanguageModel
from charlm.models.config import unlimited_window
from charlm.models.gpt import GPT
from charlm.models.mixture import MixtureLM
from charlm.models.ngram import NGramLM
from charlm.models.saving import build_model, save_model
from charlm.runs.choosing import MIXTURE_FOLDER, best_whole_checkpoint, made_of
from charlm.runs.directory import RunDirectory
from charlm.text.tokenizer import Tokenizer
from charlm.training.progress import BITS
from charlm.training.timing import evaluation_seconds

__all__ = ["Texts", "conclude", "is_concluded", "time_to_conclude"]

_GAIN = 0.0002  # nats by which a mixture must be better than the better member, since its weights are fitted
_SHARE = 0.05  # share of a run's minutes for reading the pieces that are set aside
_SAVING = 0.5  # seconds to read a checkpoint and to write a result
_FITTING = 4e-6  # seconds per character to find the weights
_NAMES = {"gpt": "the GPT", "ngram": "the n-gram model", "mixture": "the mixture of both"}


@dataclass(frozen=True)
class Texts:
    """The texts of a run: for training, for the choice of the result, and for validation."""

    whole: BlockDataset
    """The whole training text."""
    train: BlockDataset
    """The training text without the pieces that are set aside."""
    aside: BlockDataset | None
    """These pieces; None: there are none, and the GPT is the result."""
    val: BlockDataset | None
    """The validation text."""
    tokenizer: Tokenizer
    """The tokenizer of all."""


def time_to_conclude(
    texts: Texts,
    gpt: GPT,
    counted: Counted,
    eval_chars: int | None,
    *,
    seconds: float,
    backend: DeviceBackend,
) -> tuple[int | None, float]:
    """Return how much text `conclude` can use for the choice, and the time that it will take.

    Args:
        texts: of the run.
        gpt: the model before its training.
        counted: the n-gram model, with the seconds that counting took.
        eval_chars: characters of the validation text that are scored; None: all.
        seconds: time of the whole run.
        backend: the device.

    Returns:
        Characters (None: all of the pieces), and seconds.
    """
    if texts.aside is None:
        return None, 0.0
    deciding = _in_windows(texts.aside, gpt.vocab_size)
    mixture = backend.prepare(MixtureLM([gpt, counted.model]))
    N = deciding.n_targets
    each = evaluation_seconds(mixture, deciding, backend=backend) / N
    counted.model.to("cpu")
    fitting = min(N, max(int(_SHARE * seconds / each / 2), 1))  # once to fit, once to decide
    scored = 0 if texts.val is None else min(texts.val.n_ids, eval_chars or texts.val.n_ids)
    left = _SAVING + counted.seconds + (2 * fitting + scored) * each + fitting * _FITTING
    return None if fitting == N else fitting, left


def is_concluded(out: str, texts: Texts, values: Mapping[str, object]) -> bool:
    """Return whether there is no choice, or train.json has the result for the best checkpoint."""
    if texts.aside is None:
        return True
    result: Any = values.get("result")
    best = best_whole_checkpoint(RunDirectory.open(Path(out)))
    return isinstance(result, dict) and result.get("checkpoint") == best.info.path.name


def conclude(out: str, texts: Texts, *, backend: DeviceBackend, console: Console) -> str | None:
    """Choose the result of a trained run and save it.

    Args:
        out: the run's directory, with a checkpoint and an n-gram model.
        texts: of the run.
        backend: the device.
        console: for errors, which leave the run and its GPT intact.

    Returns:
        A line for the user, or None if there is no choice.
    """
    run = RunDirectory.open(Path(out))
    if texts.aside is None or not (run.path / BASELINE_FOLDER).exists():
        return None
    try:
        run.lock()
        return _concluded(run, texts, texts.aside, backend)
    except (CharLMError, OSError) as error:
        console.complain(f"warning: {error}; the result of the run is its GPT")
        return None
    finally:
        run.unlock()


def _concluded(run: RunDirectory, texts: Texts, aside: BlockDataset, backend: DeviceBackend) -> str:
    best = best_whole_checkpoint(run)
    gpt = build_model(best.files, best.info.path, LanguageModel)
    ngram = NGramLM.load(run.path / BASELINE_FOLDER)
    values = read_record(run.path).values
    record: Any = values
    part = count_end(texts.train, ngram.vocab_size, min(record["baseline"]["counted"], texts.train.n_ids))
    mixture = MixtureLM([gpt, part])
    backend.prepare(mixture)
    deciding, most = _in_windows(aside, ngram.vocab_size), record.get("aside_chars")
    mixture.fit(deciding, max_chars=most)
    decisive = dict(zip(_NAMES, mixture.losses(deciding, max_chars=most), strict=True))
    kept = min(("gpt", "ngram"), key=lambda name: decisive[name])
    if decisive["mixture"] < decisive[kept] - _GAIN:
        kept = "mixture"
    whole = MixtureLM([gpt, ngram.to(gpt.device)])
    with torch.no_grad():
        whole.gate.copy_(mixture.gate)
    del mixture, part  # the tables are large
    models: dict[str, LanguageModel] = {"ngram": ngram, "mixture": whole}
    folder = run.path / MIXTURE_FOLDER
    if kept in models:
        save_model(models[kept], folder, texts.tokenizer, metadata=made_of(best.info))
    elif folder.is_dir():
        remove_directory(folder, folder)
    losses: dict[str, float] = {}
    line = ""
    if texts.val is not None:
        val = _in_windows(texts.val, ngram.vocab_size)
        N, most = val.n_targets, record["training"]["eval_chars"]
        losses = dict(zip(_NAMES, whole.losses(val, max_chars=most), strict=True))
        loss, window = losses[kept], f"in windows of {val.block_size:,} {val.unit}s"
        line = f": {loss:.4f} nats ({loss / math.log(2):.4f} {BITS[val.unit]}) {window}"
        if most is not None and most < N:
            line += f" on {max(most // val.block_size, 1) * val.block_size:,} of {N:,}"
        line += "; " + ", ".join(f"{name} {other:.4f}" for name, other in losses.items() if name != kept)
    result = {"kind": kept, "checkpoint": best.info.path.name}
    write_record(run.path, {**values, "result": {**result, "aside_loss_nats": decisive, "loss_nats": losses}})
    return f"{_NAMES[kept]}{line}"


def _in_windows(data: BlockDataset, vocab_size: int) -> BlockDataset:
    """Return a text in blocks of the window of a model without a block size."""
    window = min(unlimited_window(vocab_size), data.n_ids - 1)
    return data.in_blocks_of(window)
