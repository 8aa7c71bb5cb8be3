"""`TensorBoard` and `WandB`: loggers for two common programs.

Each needs its own package, an extra, which is imported when a run begins.
"""

from __future__ import annotations

import html
import importlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from typing_extensions import override

from charlm.errors import CharLMError
from charlm.plain import as_path
from charlm.runs.directory import SERVICE_FOLDERS, RunDirectory
from charlm.training.loggers import Logger

__all__ = ["TensorBoard", "WandB"]

_TENSORBOARD, _WANDB = SERVICE_FOLDERS
_FLUSH_SECONDS = 10


class TensorBoard(Logger):
    """Writes the log of a run into event files, for `tensorboard --logdir runs`.

    Args:
        directory: of the files; None: "tensorboard" in the run's directory.

    Example:
        >>> import torch
        >>> from charlm import BigramLM, BlockDataset, Trainer
        >>> data = BlockDataset(torch.arange(99) % 3, block_size=8)
        >>> trainer = Trainer(BigramLM(3), data, callbacks=[TensorBoard("logs/bigram")], device="cpu")
    """

    def __init__(self, directory: str | Path | None = None) -> None:
        self._given = None if directory is None else as_path(directory)

    @override
    def open(self, directory: Path | None, settings: Mapping[str, Mapping[str, object]], step: int) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter  # noqa: PLC0415 - an extra
        except ImportError as error:
            raise CharLMError("it needs tensorboard: pip install tensorboard") from error
        folder = self._given or (None if directory is None else directory / _TENSORBOARD)
        if folder is None:
            raise CharLMError("it needs a place: TensorBoard('logs/one'), or a Trainer with out_dir")
        purge_step = step + 1 if step else 0  # removes later records, also those of an earlier run
        self._writer: Any = SummaryWriter(str(folder), purge_step=purge_step, flush_secs=_FLUSH_SECONDS)
        if step == 0:
            self._writer.add_text("settings", _as_code(json.dumps(settings, indent=2)), 0)

    @override
    def write(self, step: int, values: Mapping[str, float | str]) -> None:
        for tag, value in values.items():
            if isinstance(value, str):
                self._writer.add_text(tag, _as_code(value), step)
            else:
                self._writer.add_scalar(tag, value, step)

    @override
    def close(self) -> None:
        self._writer.close()

    @override
    def __getstate__(self) -> dict[str, object]:
        """Leave out the open files."""
        return {name: value for name, value in super().__getstate__().items() if name != "_writer"}


class WandB(Logger):
    """Sends the log of a run to Weights & Biases.

    A resumed run continues there as the same run. Its id is that of the run's directory, or the `id` given
    here, which checkpoints store.

    Args:
        options: of `wandb.init`. They override the defaults of project (WANDB_PROJECT, else "charlm"), name
            and dir (the run's directory) and config (its settings).

    Example:
        >>> import torch
        >>> from charlm import BigramLM, BlockDataset, Trainer
        >>> data = BlockDataset(torch.arange(99) % 3, block_size=8)
        >>> trainer = Trainer(BigramLM(3), data, callbacks=[WandB(project="bigrams")], device="cpu")
    """

    def __init__(self, **options: Any) -> None:
        self._options = options
        self._id: str | None = options.get("id")

    @override
    def open(self, directory: Path | None, settings: Mapping[str, Mapping[str, object]], step: int) -> None:
        try:
            wandb: Any = importlib.import_module("wandb")
        except ImportError as error:
            raise CharLMError("it needs wandb: pip install wandb") from error
        options: dict[str, Any] = {
            "project": os.environ.get("WANDB_PROJECT") or "charlm",
            "config": settings,
            "resume": "allow",
            "reinit": "create_new",  # a sweep has several runs in one process
            "settings": {"console": "off"},  # else it would capture the program's output
        }
        if directory is not None:
            options |= {"name": directory.resolve().name, "dir": str(directory)}
            options["id"] = RunDirectory.open(directory).run_id
        options |= self._options
        if self._id is not None:
            options["id"] = self._id
        mode = options.get("mode") or os.environ.get("WANDB_MODE", "online")
        if mode == "online" and not wandb.login(prompt=False):
            raise CharLMError("it knows no account here: wandb login, or WANDB_MODE=offline")
        self._html = wandb.Html
        self._run: Any = wandb.init(**options)
        self._next = int(self._run.step)  # steps before it were sent by an earlier process

    @override
    def write(self, step: int, values: Mapping[str, float | str]) -> None:
        if step >= self._next:
            shown = {
                tag: self._html(f"<pre>{html.escape(value)}</pre>") if isinstance(value, str) else value
                for tag, value in values.items()
            }
            self._run.log(shown, step=step)

    @override
    def close(self) -> None:
        self._run.finish()

    @override
    def state(self) -> Mapping[str, object]:
        """Return the given id, if there is one."""
        return {} if self._id is None else {"id": self._id}

    @override
    def load_state(self, state: Mapping[str, object]) -> None:
        """Continue under the given id."""
        self._id = self._id or str(state["id"]) if "id" in state else self._id

    @override
    def __getstate__(self) -> dict[str, object]:
        """Leave out the connection."""
        return {
            name: value for name, value in super().__getstate__().items() if name not in {"_run", "_html"}
        }


def _as_code(text: str) -> str:
    """Return a text as a Markdown code block, which shows it unchanged."""
    return "".join(f"    {line}" for line in text.splitlines(keepends=True))
