"""`Logger`: base of callbacks that send the log of a run to another program, while the run does not wait.

A logger gets the records of metrics.jsonl, with the tags that such programs use. They go through a queue to a
thread of its own. If a logger raises, hangs or is not installed, the run warns once and continues without it.
A resumed run sends all records of metrics.jsonl again, so that both hold the same, also after a kill. No
random number is drawn.
"""

from __future__ import annotations

import contextlib
import queue
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, cast

from typing_extensions import override

from charlm.errors import warn
from charlm.models.base import LanguageModel
from charlm.runs.log import read_metrics
from charlm.training.callbacks import Callback

if TYPE_CHECKING:
    from charlm.training.trainer import Trainer

__all__ = ["Logger"]

_MOST_WAITING = 10_000  # records
_LAST_WAIT = 30.0  # seconds, at the end, for the records that are still to be written

_TAGS: Mapping[str, Mapping[str, str]] = {
    "step": {
        "loss": "train/loss",
        "learning_rate": "learning_rate",
        "grad_norm": "grad_norm",
        "chars_per_second": "chars_per_second",
    },
    "eval": {"loss_nats": "val/loss", "bits_per_char": "val/bits_per_char"},
    "old": {"loss_nats": "old/loss", "bits_per_char": "old/bits_per_char"},
    "sample": {"text": "sample"},
}


class Logger(Callback):
    """Sends the log of a run to another program. Override `open`, `write` and `close`.

    These are called one after the other in a thread of their own. The run waits for them only at its end, for
    half a minute at most. The first exception ends the logger with a warning: it is closed, and the run
    continues. Of several processes, only the first one logs.

    Example:
        >>> class Printer(Logger):
        ...     def write(self, step, values):
        ...         if "val/loss" in values:
        ...             print(step, sorted(values))
        >>> import torch
        >>> from charlm import BigramLM, BlockDataset, Trainer, TrainerConfig
        >>> data, config = BlockDataset(torch.arange(99) % 3, block_size=8), TrainerConfig(max_steps=10)
        >>> trainer = Trainer(BigramLM(3), data, config, val_data=data, callbacks=[Printer()], device="cpu")
        >>> _ = trainer.fit()
        10 ['val/bits_per_char', 'val/loss']
    """

    _worker: _Worker | None = None
    _early: Sequence[Mapping[str, object]] = ()  # records of earlier callbacks at the beginning of a run

    def open(self, directory: Path | None, settings: Mapping[str, Mapping[str, object]], step: int) -> None:
        """Begin or continue: a training begins its steps in this process.

        Args:
            directory: the run's, or None.
            settings: fields of the model and of the training, in the tables "model" and "training".
            step: `write` gets the records after this step; delete older records of later steps, which are
                repeated. A run with a directory sends all its records, and then this is 0.
        """

    def write(self, step: int, values: Mapping[str, float | str]) -> None:
        """Take the values that were logged after a step.

        Args:
            step: number of steps done.
            values: by tag. Numbers: `train/loss` and `val/loss` in nats, `val/bits_per_char`,
                `learning_rate`, `grad_norm`, `chars_per_second`; with `charlm train --from` also `old/loss`
                and `old/bits_per_char`. A text: `sample`.
        """

    def close(self) -> None:
        """Finish writing: the steps of this process are over, or an exception has ended the logger."""

    @override
    def on_train_start(self, trainer: Trainer) -> None:
        """Begin, in a thread."""
        directory, step = trainer.out_dir, trainer.step
        log = None if directory is None or step == 0 else directory / "metrics.jsonl"
        self._worker = _Worker(self, directory, _settings_of(trainer), step, log)
        for record in self._early:
            self._worker.tell(record)
        self._early = ()

    @override
    def on_log(self, trainer: Trainer, record: Mapping[str, object]) -> None:
        """Put the record into the queue."""
        if self._worker is None:
            self._early = [*self._early, record]
        else:
            self._worker.tell(record)

    @override
    def on_close(self, trainer: Trainer) -> None:
        """Wait a while for the records that are still to be written."""
        worker, self._worker = self._worker, None
        if worker is not None:
            worker.end()

    def __getstate__(self) -> dict[str, object]:
        """Leave out the thread."""
        return {**self.__dict__, "_worker": None}


class _Worker:
    """The thread of a logger, with its queue.

    Args:
        logger: its methods are called in the thread.
        directory: for `Logger.open`.
        settings: for `Logger.open`.
        step: number of steps done.
        log: the log whose records come first; None: there are none.
    """

    def __init__(
        self,
        logger: Logger,
        directory: Path | None,
        settings: Mapping[str, Mapping[str, object]],
        step: int,
        log: Path | None,
    ) -> None:
        self._logger, self._step, self._log = logger, step, log
        self._waiting: queue.Queue[Mapping[str, object] | None] = queue.Queue(_MOST_WAITING)
        self._problem: str | None = None
        self._is_given_up = False
        self._busy_since = time.monotonic()
        self._thread = threading.Thread(
            target=self._run, args=(directory, settings), name=f"charlm-{type(logger).__name__}", daemon=True
        )
        self._thread.start()

    def tell(self, record: Mapping[str, object]) -> None:
        """Put a record into the queue; warn if the logger has failed or the queue is full."""
        if self._is_given_up or self._has_failed():
            return
        try:
            self._waiting.put_nowait(record)
        except queue.Full:
            self._give_up("does not answer")

    def end(self) -> None:
        """Let the logger finish, and wait for it unless it hangs."""
        with contextlib.suppress(queue.Full):  # a full queue means that it hangs
            self._waiting.put_nowait(None)
        until = min(time.monotonic(), self._busy_since) + _LAST_WAIT
        self._thread.join(max(until - time.monotonic(), 0.0))
        if not self._is_given_up and not self._has_failed() and self._thread.is_alive():
            self._give_up(f"has not finished in {_LAST_WAIT:g} seconds")

    def _has_failed(self) -> bool:
        if self._problem is not None:
            self._give_up(self._problem)
        return self._problem is not None

    def _give_up(self, why: str) -> None:
        if not self._is_given_up:
            self._is_given_up = True
            warn(f"{type(self._logger).__name__} {why}; the run goes on without it")

    def _run(self, directory: Path | None, settings: Mapping[str, Mapping[str, object]]) -> None:
        try:
            self._logger.open(directory, settings, self._step if self._log is None else 0)
            try:
                self._write_all()
            except Exception:
                with contextlib.suppress(Exception):  # the first exception is reported
                    self._logger.close()
                raise
            self._logger.close()
        except Exception as error:  # noqa: BLE001 - the run continues after any exception
            message = str(error).strip() or type(error).__name__
            self._problem = f"has stopped: {message.splitlines()[0]}"

    def _write_all(self) -> None:
        for record in self._records():
            if self._is_given_up:  # it hung for too long
                return
            self._busy_since = time.monotonic()
            if values := _tagged(record):
                self._logger.write(cast("int", record["step"]), values)

    def _records(self) -> Iterator[Mapping[str, object]]:
        """Yield the records of the log, and then those of the queue that are not in the log."""
        logged_before = set()
        for logged in () if self._log is None else read_metrics(self._log):
            if cast("int", logged["step"]) >= self._step:
                logged_before.add((logged["kind"], logged["step"]))
            yield logged
        while (record := self._next()) is not None:
            if (record["kind"], record["step"]) not in logged_before:
                yield record

    def _next(self) -> Mapping[str, object] | None:
        self._busy_since = float("inf")
        return self._waiting.get()


def _tagged(record: Mapping[str, object]) -> dict[str, float | str]:
    """Return the values of a record by tag; NaN and infinities come from its field `nonfinite`."""
    nonfinite = cast("Mapping[str, str]", record.get("nonfinite", {}))
    values = {
        tag: float(nonfinite[name]) if name in nonfinite else record[name]
        for name, tag in _TAGS.get(str(record["kind"]), {}).items()
        if name in record
    }
    return cast("dict[str, float | str]", values)


def _settings_of(trainer: Trainer) -> dict[str, dict[str, object]]:
    model: dict[str, object] = {}
    if isinstance(trainer.model, LanguageModel):
        model = {"kind": trainer.model.kind, **trainer.model.config.to_dict()}
    return {"model": model, "training": trainer.config.to_dict()}
