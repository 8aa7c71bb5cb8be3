"""Checkpoints whose every byte follows from a key: what a save must leave is known without the save.

They have the files of a real checkpoint and cost a few milliseconds, so that thousands can be killed, failed
or cut off from power. No tensor is made: a process that saves them can be forked and killed at any moment.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import random
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from charlm.runs.checkpoint import Checkpoint, SaveIdentity, write_checkpoint
from charlm.runs.directory import RunDirectory

__all__ = ["PreparedSave", "fast_directory", "to_be_kept"]


@dataclass(frozen=True)
class PreparedSave:
    """One save: its files follow from the key, the step and the size."""

    key: str
    step: int
    val_loss: float | None = None
    size: int = 2_000

    @property
    def save_id(self) -> str:
        """The save's id, and with the step its directory's name."""
        return hashlib.sha256(f"{self.key}/{self.step}".encode()).hexdigest()[:8]

    @property
    def name(self) -> str:
        """The name of its directory."""
        return f"step-{self.step:012d}-{self.save_id}"

    def files(self, run: RunDirectory) -> dict[str, bytes]:
        """Return the files' contents: two safetensors files and a config."""
        draw = random.Random(f"{self.key}/{self.step}")
        sizes = {"model.safetensors": self.size, "train.safetensors": 2 * self.size}
        parts = {name: self._part(run, draw.randbytes(size)) for name, size in sizes.items()}
        return {"config.json": b"{}", **parts}

    def write(self, run: RunDirectory) -> None:
        """Save it."""
        files = {name: [data[:100], data[100:]] for name, data in self.files(run).items()}
        write_checkpoint(run, self._identity(run), files, {"key": self.key}, val_loss=self.val_loss)

    def is_what(self, checkpoint: Checkpoint, run: RunDirectory) -> bool:
        """Say whether a checkpoint that was read holds exactly this save."""
        files = {name: bytes(data) for name, data in checkpoint.files.items() if name != "state.json"}
        identity = {"run_id": run.run_id, "save_id": self.save_id, "step": self.step, "key": self.key}
        return (
            files == self.files(run)
            and dict(checkpoint.state) == identity
            and checkpoint.info.val_loss == self.val_loss
        )

    def _identity(self, run: RunDirectory) -> SaveIdentity:
        return SaveIdentity(run.run_id, self.step, self.save_id)

    def _part(self, run: RunDirectory, data: bytes) -> bytes:
        header = {
            "__metadata__": self._identity(run).metadata,
            "w": {"dtype": "U8", "shape": [len(data)], "data_offsets": [0, len(data)]},
        }
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        return len(text).to_bytes(8, "little") + text + data


@contextlib.contextmanager
def fast_directory() -> Iterator[Path]:
    """Yield a directory in memory, where there is such a file system, for thousands of small files."""
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else None) as path:
        yield Path(path)


def to_be_kept(saves: Iterable[PreparedSave], *, keep_last: int, keep_best: int) -> set[str]:
    """Return the names of the last and of the best of some saves of different steps."""
    in_order = sorted(saves, key=lambda save: save.step)
    scored = [(save.val_loss, save.step, save.name) for save in in_order if save.val_loss is not None]
    return {save.name for save in in_order[-keep_last:]} | {name for *_, name in sorted(scored)[:keep_best]}
