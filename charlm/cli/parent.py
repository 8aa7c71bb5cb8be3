"""`charlm train --from`: a training that begins with an existing model, and the loss on its old text.

The parent is read, checked and recorded here. `charlm.models.extending` adds new characters to its copy.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, cast

from typing_extensions import override

from charlm.backends.base import DeviceBackend
from charlm.cli.encoded import Encoded, encode_corpus
from charlm.cli.fields import flag_of
from charlm.cli.output import Console, UsageError
from charlm.cli.reading import begins_with
from charlm.cli.rundir import Origin, read_record
from charlm.cli.settings import DEFAULT_PRESET, Settings
from charlm.data.blocks import BlockDataset
from charlm.data.prepared import PreparedCorpus
from charlm.data.rows import StoredRow
from charlm.errors import CharLMError, CheckpointError, CheckpointMismatchError, quoted
from charlm.models.base import LanguageModel
from charlm.models.config import PRESETS, GPTConfig, PresetName
from charlm.models.extending import extended
from charlm.models.gpt import GPT
from charlm.models.saving import CONFIG_FILE, WEIGHTS_FILE, build_model, build_tokenizer
from charlm.runs.checkpoint import is_checkpoint_name
from charlm.runs.choosing import model_files_at
from charlm.runs.log import eval_values
from charlm.terminal import escaped
from charlm.text.tokenizer import ByteTokenizer, CharTokenizer, Tokenizer
from charlm.training.callbacks import Callback
from charlm.training.recipes import RECIPES
from charlm.training.timing import evaluation_seconds

if TYPE_CHECKING:
    from charlm.training.records import EvalRecord
    from charlm.training.trainer import Trainer

__all__ = ["OldText", "Parent", "old_text", "read_parent"]

_SLOWER = 10  # a trained model gets a tenth of the recipe's learning rate
_CHANGEABLE = {"block_size", "dropout", "attention_dropout"}  # these change no other parameter


@dataclass(frozen=True)
class Parent:
    """The model that a training begins with."""

    model: GPT
    tokenizer: CharTokenizer | ByteTokenizer
    preset: PresetName
    """The preset of its recipe, or the default one if it is unknown."""
    values: Mapping[str, object]
    """The values for the run's record: path, checkpoint and sha256 of the weights."""

    def copy(self, config: GPTConfig) -> GPT:
        """Return a copy of the model with vocabulary, window and dropout of other settings."""
        changes = {name: getattr(config, name) for name in _CHANGEABLE}
        return extended(self.model.float(), config.vocab_size, **changes)  # the saved type may be another

    def settings(self, given: Settings) -> Settings:
        """Return the settings of a training: those of the model, and a tenth of the recipe's learning rate.

        Raises:
            UsageError: a given setting would change the model's shape.
        """
        own = {name: value for name, value in self.model.config.to_dict().items() if name != "vocab_size"}
        asked = {**given.below, **given.flags}
        other = [name for name in asked if name in own.keys() - _CHANGEABLE and asked[name] != own[name]]
        if other:
            raise UsageError(
                f"--from keeps the model's shape, so {', '.join(map(flag_of, other))} cannot be given; "
                f"{', '.join(map(flag_of, sorted(_CHANGEABLE)))} can"
            )
        rate = RECIPES[given.preset].learning_rate / _SLOWER
        return given.over(given.preset, {**own, "learning_rate": rate})


def read_parent(path: str, sha256: object = None) -> Parent:
    """Read the GPT of a run, a checkpoint or a saved model.

    Args:
        path: of one of these.
        sha256: the sha256 of its weights if they were used before; None: any.

    Raises:
        CheckpointMismatchError: the weights have changed since.
        CharLMError: there is no such model.
    """
    files, where = model_files_at(Path(path), mixture=False)
    if CONFIG_FILE not in files:
        raise CheckpointError(f"{quoted(path)} holds no LanguageModel, and --from needs a GPT")
    model, tokenizer = build_model(files, where, LanguageModel), build_tokenizer(files, where)
    if not isinstance(model, GPT):
        raise CheckpointError(
            f"--from needs a GPT, which can be trained further, and {quoted(path)} holds a "
            f"{type(model).__name__}"
        )
    present = hashlib.sha256(files[WEIGHTS_FILE]).hexdigest()
    if sha256 is not None and sha256 != present:
        raise CheckpointMismatchError(
            f"the training began with the model in {quoted(path)}, whose weights are others now: their "
            f"sha256 was {quoted(str(sha256), 80)}, is {present}"
        )
    origin = _origin(Path(path))
    preset = None if origin is None else origin.values.get("preset")
    return Parent(
        model,
        tokenizer,
        cast("PresetName", preset) if preset in PRESETS else DEFAULT_PRESET,
        {
            "path": str(Path(path).absolute()),
            "checkpoint": where.name if is_checkpoint_name(where.name) else None,
            "sha256": present,
        },
    )


def _origin(path: Path) -> Origin | None:
    """Return the record of the run of a model; None: there is no such run of `charlm train`."""
    try:
        return read_record(path.parent.parent if is_checkpoint_name(path.name) else path)
    except (CharLMError, OSError):
        return None


def old_text(
    parent: Mapping[str, object], tokenizer: Tokenizer, block_size: int, console: Console
) -> BlockDataset | None:
    """Return the validation text of a parent's run; None with a note if it is not available.

    Args:
        parent: its values in the record.
        tokenizer: of the training, which has the parent's characters with the same ids.
        block_size: of the windows of its evaluation.
        console: for the note.
    """
    path = str(parent.get("path"))
    origin, why = _origin(Path(path)), "it was saved without its text"
    try:
        if origin is not None and not origin.sources:
            why = "its run was begun in Python, which does not record where its text lies"
        elif origin is not None and origin.lost_sources():
            why = f"{quoted(origin.lost_sources()[0])} is not there now"
        elif origin is not None and not _has_weights(path, parent.get("sha256")):
            why = "the model there is another one now"
        elif origin is not None:
            on_disk = origin.is_prepared or None
            encoded = encode_corpus(origin.sources, origin.reading(), console=console, prepared=on_disk)
            val = _validation(encoded, origin, tokenizer, block_size)
            if val is not None:
                return val
            why = "its text has changed, or nothing of it was kept for validation"
    except (CharLMError, OSError) as error:
        why = str(error)
    console.say(f"note    the loss on the old text of {quoted(path)} cannot be measured: {why}")
    return None


def _has_weights(path: str, sha256: object) -> bool:
    """Return whether the model at a path still has the weights with which a training began."""
    files, _ = model_files_at(Path(path), mixture=False)
    return sha256 == hashlib.sha256(files[WEIGHTS_FILE]).hexdigest()


def _validation(
    encoded: Encoded, origin: Origin, tokenizer: Tokenizer, block_size: int
) -> BlockDataset | None:
    share = origin.train_share(encoded.n_ids)
    if share >= 1 or not begins_with(tokenizer, encoded.tokenizer):
        return None
    ids = StoredRow(encoded.ids) if isinstance(encoded.ids, PreparedCorpus) else encoded.ids
    whole = BlockDataset(ids, block_size, tokenizer=tokenizer, documents=encoded.documents)
    train, val = whole.split(share)
    return val if train.n_ids == origin.values.get("train_ids", train.n_ids) else None


class OldText(Callback):
    """Scores the parent's validation text after each evaluation, and logs the loss as "old".

    It scores at most as many characters as of the new text.

    Args:
        data: the text.
        path: of the parent.
        console: shows the loss before the first step.
    """

    loss_nats: float | None

    def __init__(self, data: BlockDataset, path: str, console: Console) -> None:
        self._data, self._path, self._console = data, path, console
        self.loss_nats = None

    @override
    def on_train_start(self, trainer: Trainer) -> None:
        """Score it before the first step, which is the loss of the parent."""
        if trainer.step == 0:
            self._score(trainer)
            self._console.say(
                f"old     val loss {self.loss_nats:.4f} nats before the first step, on the text of "
                f"{escaped(self._path)}; it is shown beside the new one"
            )

    @override
    def on_evaluate(self, trainer: Trainer, evaluation: EvalRecord) -> None:
        """Score it again."""
        self._score(trainer)

    def seconds(
        self, model: GPT, eval_chars: int | None, new: BlockDataset | None, backend: DeviceBackend
    ) -> float:
        """Return the time of one evaluation."""
        most = _most(eval_chars, new)
        return evaluation_seconds(backend.prepare(model), self._data, backend=backend, max_chars=most)

    def _score(self, trainer: Trainer) -> None:
        timetable = trainer.timetable
        chars = trainer.config.eval_chars if timetable is None else timetable.eval_chars
        result = trainer.evaluate(self._data, max_chars=_most(chars, trainer.val_data))
        self.loss_nats = result.loss_nats
        trainer.log("old", eval_values(result))


def _most(eval_chars: int | None, new: BlockDataset | None) -> int | None:
    """Return the most characters to score: as many as of the new text."""
    return eval_chars if eval_chars is not None or new is None else new.n_ids
