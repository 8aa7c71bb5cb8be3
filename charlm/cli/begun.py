"""The record of a run that was begun in Python, so that the command can resume it.

Such a run has no train.json, and the place of its text is unknown. Its checkpoints hold the rest.
"""

from __future__ import annotations

from pathlib import Path

from charlm.files import strict_json
from charlm.files.reading import read_file
from charlm.models.saving import CONFIG_FILE, TOKENIZER_FILE
from charlm.runs.checkpoint import STATE_FILE, scan_checkpoints
from charlm.runs.directory import RunDirectory
from charlm.text.tokenizer import MAX_FILE_BYTES, tokenizer_from_dict, unit_of

__all__ = ["values_from_python"]


def values_from_python(run: RunDirectory) -> dict[str, object] | None:
    """Return the content of train.json, without sources, for a run that a `Trainer` began.

    None: its newest checkpoint has no language model or no tokenizer, or is too old.

    Raises:
        FileFormatError: a file's content is refused.
    """
    whole = scan_checkpoints(run)[0]
    if not whole or not {CONFIG_FILE, TOKENIZER_FILE} <= whole[-1].files.keys():
        return None
    folder = whole[-1].path
    state, model = (_json(folder / name) for name in (STATE_FILE, CONFIG_FILE))
    counts = state.get("n_ids")
    if not isinstance(counts, dict):
        return None
    where = str(folder / STATE_FILE)
    train_ids = strict_json.take(counts, "train", int, path=where)
    val_ids = 0 if counts.get("val") is None else strict_json.take(counts, "val", int, path=where)
    tokenizer = tokenizer_from_dict(
        _json(folder / TOKENIZER_FILE, MAX_FILE_BYTES), path=str(folder / TOKENIZER_FILE)
    )
    block_sizes = strict_json.take(state, "block_size", dict, path=where)
    return {
        "sources": [],
        "val_fraction": val_ids / (train_ids + val_ids),
        "train_ids": train_ids,
        "tokenizer": "byte" if unit_of(tokenizer) == "byte" else "char",
        "device": "auto",
        "model": {
            **strict_json.take(model, "config", dict, path=str(folder / CONFIG_FILE)),
            "block_size": strict_json.take(block_sizes, "train", int, path=where),
        },
        "training": strict_json.take(state, "config", dict, path=where),
    }


def _json(path: Path, max_bytes: int = strict_json.MAX_BYTES) -> dict[str, object]:
    return strict_json.loads(read_file(path, max_bytes=max_bytes), path=str(path), max_bytes=max_bytes)
