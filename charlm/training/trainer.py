"""`Trainer`: the training loop, to read from top to bottom.

`fit` is a for-loop over `steps`. A step computes and updates (step.py), and then does whatever is due
(due.py, `_after_step`): an evaluation, a sample, a checkpoint. saving.py gathers the `RunState` and all
tensors, and runs/ writes them. In a run with minutes, timetable.py decides which steps are evaluated and
which is the last. All random numbers have an address (see `charlm.randomness`), so a resumed run, a run with
other intervals and a run with callbacks train alike, bit for bit. Each of several processes runs this loop;
agreement.py shares what only one of them knows, and only the first one writes and calls callbacks. The
trainer prints nothing.
"""

from __future__ import annotations

import math
import time
import weakref
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Self

import torch
from torch import nn
from torch.amp.grad_scaler import GradScaler
from torch.optim import Optimizer

from charlm.backends.base import DeviceBackend, Precision
from charlm.backends.registry import get_backend
from charlm.backends.world import join
from charlm.data.blocks import BlockDataset
from charlm.errors import DataError, InputError, NonFiniteError, TrainingInterrupted, renamed, shown, warn
from charlm.evaluation.evaluate import EvalResult, evaluate
from charlm.models.base import LanguageModel
from charlm.models.contents import Contents
from charlm.plain import as_float, as_path
from charlm.randomness import derive_seed
from charlm.runs.checkpoint import SaveIdentity, encode_state
from charlm.runs.directory import RunDirectory
from charlm.runs.writer import RunWriter
from charlm.text.streaming import start_ids
from charlm.text.tokenizer import Tokenizer
from charlm.training.agreement import Asked, agree, check_buffers, meet
from charlm.training.callbacks import Callback
from charlm.training.checks import check_arguments, check_characters
from charlm.training.config import TrainerConfig
from charlm.training.due import due_after
from charlm.training.evaluations import Evaluations
from charlm.training.memory import check_memory
from charlm.training.optimizers import OptimizerFactory
from charlm.training.records import EvalRecord, SampleRecord, StepRecord, StopReason, TrainResult
from charlm.training.reduction import check_world
from charlm.training.reporting import Reporter
from charlm.training.resume import resume
from charlm.training.saving import fingerprint, gather
from charlm.training.schedules import learning_rate_at
from charlm.training.state import RunState
from charlm.training.step import Stepper
from charlm.training.timetable import Timekeeper, Timetable
from charlm.training.turns import Turns

__all__ = ["Trainer"]


class Trainer:
    """Trains a model on blocks of text; under torchrun or in a process group, together with other processes.

    Args:
        model: any module whose `forward(idx, targets)` returns (logits, mean loss in nats). It is moved to
            the device in place. All its buffers and its extra state are kept with the best weights and by a
            resume; a part that is in evaluation mode (`eval()`) stays so.
        train_data: the training text.
        config: the settings; None: the defaults.
        val_data: the validation text; None: no evaluations, no best weights.
        tokenizer: saved with the model, and used for samples.
        out_dir: directory for checkpoints and the log, missing or empty; None: nothing is written. A run
            there without a checkpoint is started again.
        device: a name for `get_backend`, or a backend.
        callbacks: they run in this order.
        optimizer: makes the optimizer from named parameters; None: the one that the config names. Each step
            sets its learning rate to that of the schedule.
        timetable: that of a run with `minutes`, see `read_timetable`; it replaces the clock, so that the run
            is repeated.

    Raises:
        DataError: the data has ids that the model lacks, or longer blocks than the model sees.
        InputError: an argument has a wrong type, or the tokenizer does not fit the model.
        RunExistsError: `out_dir` holds a run with checkpoints, or other files.
        BackendError: the device is absent, or does not support the config.
        NotEnoughMemoryError: the training needs more than the free memory; the message says what would fit.
        ConfigError: the micro-batches of a step cannot be divided among the processes.

    Example:
        >>> from charlm import BigramLM, BlockDataset, CharTokenizer, Trainer, TrainerConfig
        >>> text = "to be, or not to be: that is the question. " * 20
        >>> tokenizer = CharTokenizer.from_text(text)
        >>> train, val = BlockDataset.from_text(text, tokenizer, block_size=8).split()
        >>> config = TrainerConfig(max_steps=20, warmup_steps=0, learning_rate=0.1, precision="fp32")
        >>> result = Trainer(BigramLM(tokenizer.vocab_size), train, config, val_data=val, device="cpu").fit()
        >>> result.steps, result.reason
        (20, 'max_steps')
    """

    model: nn.Module
    config: TrainerConfig
    train_data: BlockDataset
    val_data: BlockDataset | None
    tokenizer: Tokenizer | None
    out_dir: Path | None
    backend: DeviceBackend
    callbacks: tuple[Callback, ...]
    precision: Precision
    optimizers: list[Optimizer]
    scaler: GradScaler | None
    checkpoint: Path | None

    def __init__(
        self,
        model: nn.Module,
        train_data: BlockDataset,
        config: TrainerConfig | None = None,
        *,
        val_data: BlockDataset | None = None,
        tokenizer: Tokenizer | None = None,
        out_dir: str | Path | None = None,
        device: str | DeviceBackend = "auto",
        callbacks: Sequence[Callback] = (),
        optimizer: OptimizerFactory | None = None,
        timetable: Timetable | None = None,
    ) -> None:
        self.config = TrainerConfig() if config is None else config
        check_arguments(
            model,
            self.config,
            train_data=train_data,
            val_data=val_data,
            tokenizer=tokenizer,
            callbacks=callbacks,
            timetable=timetable,
            saving=out_dir is not None,
        )
        self.backend = get_backend(device)
        self._world = join(self.backend)
        check_world(self.config, self._world.size)
        self.out_dir = None if out_dir is None else as_path(out_dir)
        if self.out_dir is not None and self._world.is_first:
            RunDirectory.refuse_if_taken(self.out_dir)
        self.precision = self.backend.precision(self.config.precision)
        check_memory(
            model,
            self.config,
            block_size=train_data.block_size,
            backend=self.backend,
            evaluates=val_data is not None,
            own_optimizer=optimizer is not None,
        )
        self.model = self.backend.prepare(model, compile=self.config.compile)
        self.train_data, self.val_data, self.tokenizer = train_data, val_data, tokenizer
        self.callbacks = tuple(callbacks)
        self._timekeeper = Timekeeper(self.config, timetable)
        self._stepper = Stepper(
            model,
            train_data,
            self.config,
            backend=self.backend,
            precision=self.precision,
            optimizer=optimizer,
            learning_rate=self._learning_rate,
            world=self._world,
        )
        self.optimizers, self.scaler = self._stepper.optimizers, self._stepper.scaler

        self._state = RunState()
        self.checkpoint = None
        self._evaluations = Evaluations(model, val_data, self.config, self.backend, self._world)
        self._writer = RunWriter(self.out_dir) if self.out_dir is not None and self._world.is_first else None
        self._reporter = Reporter(self)
        self._reason: StopReason | None = None
        self._wish: StopReason | None = None  # a reason that the other processes do not know yet
        self._interrupted = False
        self._save_requested = False
        self._turns = Turns()
        # The last result of `steps`; a strong reference would keep the loop of a `for` after its `break`.
        self._loop: weakref.ref[Generator[StepRecord, None, None]] | None = None
        self._is_telling_of_a_save = False
        self._is_fitting = False
        self._has_rehearsed = False
        self._buffers: dict[str, torch.Tensor] = {}
        self._has_unsaved_end = False  # a resume or the clock has moved the end
        self._began_at = 0.0  # when this process began its steps
        self._counted_at = 0.0  # `seconds` counts up to here

    @classmethod
    def resume(
        cls,
        out_dir: str | Path,
        train_data: BlockDataset,
        *,
        model: nn.Module | None = None,
        val_data: BlockDataset | None = None,
        optimizer: OptimizerFactory | None = None,
        callbacks: Sequence[Callback] = (),
        device: str | DeviceBackend = "auto",
        max_steps: int | None = None,
        minutes: float | None = None,
    ) -> Self:
        """Return a trainer that continues from the newest whole checkpoint of a run.

        The settings come from the checkpoint. On the same build, device and number of threads, every later
        step is bit for bit the same as without the stop, unless the end is moved. A run with `minutes`
        continues with its remaining time; the clock makes the decisions that it had not made yet.

        Args:
            out_dir: the run's directory.
            train_data: the same data; another text is refused.
            model: needed only if the run trained another module than a `LanguageModel`; its weights are
                replaced.
            val_data: the same validation text, or None if the run had none.
            optimizer: the same factory as before, if there was one.
            callbacks: of the same kinds in the same order, so that each gets its own state. If no callback of
                the run had a state, any will do.
            device: may differ from before; then results are close, not equal.
            max_steps: a new end in steps, which replaces `minutes`. The schedule of the learning rate moves
                with it; a rate that had fallen rises again.
            minutes: a new end in time, for the whole run. A learning rate that falls by the clock rises to
                its top, and falls again by the new end. It cannot be given with `max_steps`, or with a
                schedule that needs the end beforehand (cosine, linear).

        Raises:
            CheckpointError: there is no run, or no whole checkpoint in it.
            CheckpointMismatchError: the data, the tokenizer or the model differ.
            ConfigError: the new end lies before the steps done, or this run cannot have it.

        Example:
            >>> import tempfile
            >>> from charlm import BigramLM, CharTokenizer
            >>> folder, tokenizer = tempfile.mkdtemp() + "/run", CharTokenizer("benort ")
            >>> data = BlockDataset.from_text("to be or not to be " * 9, tokenizer, block_size=8)
            >>> config = TrainerConfig(max_steps=4, eval_interval=2)
            >>> first = Trainer(BigramLM(7), data, config, tokenizer=tokenizer, out_dir=folder, device="cpu")
            >>> for record in first.steps():
            ...     if record.step == 3:
            ...         break  # or a crash: the checkpoint of step 2 is there
            >>> again = Trainer.resume(folder, data, device="cpu")
            >>> again.step, again.fit().steps
            (2, 4)
        """
        return resume(
            cls,
            as_path(out_dir),
            train_data,
            model=model,
            val_data=val_data,
            optimizer=optimizer,
            callbacks=callbacks,
            device=device,
            max_steps=max_steps,
            minutes=minutes,
        )

    def fit(self) -> TrainResult:
        """Train to the end.

        Returns:
            The result. With `restore_best`, the model now holds the weights of the best evaluation.

        Raises:
            TrainingInterrupted: `interrupt` was called; the current step is done and saved.
            NonFiniteError: the loss or a gradient is not finite (with `nonfinite="skip"`: ten times in a
                row); the weights are those before that step.
            CheckpointWriteError: saving failed three times in a row, or at the end; `result()` returns the
                result.
            RunLockedError: another process or trainer trains there, or has continued the run since.
            PeerError: another process of the same training failed, or is gone.
        """
        loop = self.steps()
        self._is_fitting = True
        try:
            for _ in loop:
                pass
        finally:
            self._is_fitting = False
        return self.result()

    def steps(self) -> Generator[StepRecord, None, None]:
        """Train, and yield after each step with its evaluation, sample and checkpoint.

        The loop may be left early. The run is locked until the iterator is closed or deleted, or until the
        next call of `steps`, `fit` or `close`, which ends the loop.

        Yields:
            The record of the step. Reading its loss waits for the device.

        Raises:
            InputError: a callback or another thread calls in the middle of a step.
            CharLMError: as in `fit`.

        Example:
            >>> from charlm import BigramLM, CharTokenizer
            >>> data = BlockDataset.from_text("to be or not to be " * 9, CharTokenizer("benort "), 8)
            >>> trainer = Trainer(BigramLM(7), data, TrainerConfig(max_steps=4), device="cpu")
            >>> [record.step for record in trainer.steps()]
            [1, 2, 3, 4]
        """
        self.close()
        loop = self._steps()
        self._loop = weakref.ref(loop)
        return loop

    def close(self) -> None:
        """End a loop over `steps` that was left early, and release the lock of the run.

        The trainer can continue afterwards. This call is not needed if the iterator is deleted, as in
        `for record in trainer.steps()`; a variable or an error's traceback may keep it.

        Raises:
            InputError: the loop is that of `fit`, or in the middle of a step.
        """
        loop = None if self._loop is None else self._loop()
        if loop is None:
            return
        running = "the trainer is running already: let it come to its end, or call finish() or interrupt()"
        if self._is_fitting:
            raise InputError(running)
        try:
            loop.close()
        except ValueError as error:  # the generator is executing
            raise InputError(running) from error

    def _steps(self) -> Generator[StepRecord, None, None]:
        awake = [module for module in self.model.modules() if module.training]
        try:
            with self._world.telling():
                self._turns.step(self._begin)
                while self._reason is None:
                    yield self._turns.step(self._take_step)
                    self._counted_at = time.perf_counter()  # the caller's time does not count
                    if not self._is_fitting:
                        self._turns.step(self._agree)  # the caller may have called finish()
                self._turns.step(self._finish)
        finally:
            self._turns.step(lambda: self._end(awake))

    @property
    def step(self) -> int:
        """Number of steps done."""
        return self._state.step

    @property
    def chars_seen(self) -> int:
        """Number of tokens predicted in training."""
        return self._state.chars_seen

    @property
    def seconds(self) -> float:
        """Time of the run so far. A program may add its own time, which then counts towards `minutes`."""
        return self._state.seconds

    @seconds.setter
    def seconds(self, seconds: float) -> None:
        value = as_float(seconds)
        if value is None or not 0 <= value < math.inf:
            raise InputError(f"seconds must be a finite number, 0 or more, got {shown(seconds)}")
        self._state.seconds = value

    @property
    def best(self) -> EvalRecord | None:
        """The evaluation with the lowest loss so far, or None."""
        return self._state.best

    @property
    def last(self) -> EvalRecord | None:
        """The last evaluation, or None."""
        return self._state.last

    @property
    def history(self) -> list[EvalRecord]:
        """The evaluations of this process, in order."""
        return self._evaluations.history

    @property
    def expected_steps(self) -> int | None:
        """Number of steps of the whole run; with `minutes` an estimate, None before there is one."""
        return self._timekeeper.expected_steps(self.step)

    @property
    def timetable(self) -> Timetable | None:
        """The decisions of the clock so far, or those that are repeated; None: the clock decides nothing."""
        if self.config.minutes is None and not self._timekeeper.repeats:
            return None
        return self._timekeeper.timetable

    def evaluate(self, data: BlockDataset | None = None, *, max_chars: int | None = None) -> EvalResult:
        """Evaluate a text with the present weights. The run does not change.

        A call from another thread waits for the end of the step.

        Args:
            data: the text; None: the validation text.
            max_chars: score at most so many tokens, spread over the text, as in `evaluate`; None: all.

        Returns:
            Loss and accuracy.

        Raises:
            DataError: there is no validation text, or `data` has another tokenizer.
            InputError: the training thread calls in the middle of a step, for example from a signal handler.
        """
        data = self.val_data if data is None else data
        if data is None:
            raise DataError("there is nothing to evaluate: pass data, or give the trainer val_data")
        check_characters(self.tokenizer or self.train_data.tokenizer, data=data)
        score = partial(evaluate, self.model, data, backend=self.backend, max_chars=max_chars)
        return self._turns.visit("evaluate", score)

    def save(self) -> Path:
        """Write a checkpoint now; when this returns, the checkpoint survives a loss of power.

        A checkpoint belongs to the end of a step. A call from another thread waits for it. A signal handler
        cannot wait: there call `request_save`.

        After a run that restored the best weights, and in `on_save`, there is nothing new to save, and the
        last checkpoint is returned.

        Returns:
            The checkpoint's directory.

        Raises:
            CheckpointWriteError: it could not be written; older checkpoints are intact.
            NonFiniteError: an asynchronous device reports only now that the run must end.
            RunExistsError: another run has begun in `out_dir` since.
            RunLockedError: another process or trainer trains there.
            InputError: the trainer has no `out_dir`, or the training thread calls in the middle of a step.
        """
        writer = self._writer_for("save")

        def save() -> Path:
            if self.checkpoint and (self._evaluations.best_in_model or self._is_telling_of_a_save):
                return self.checkpoint  # the last step is saved already
            checkpoint = self._write(writer)
            self._tell_of_save(checkpoint)
            return checkpoint

        return self._turns.visit("save", save, ": call request_save() there, and the step's end saves")

    def request_save(self) -> None:
        """Ask for a checkpoint at the end of the current or next step.

        This sets a flag and returns, so a signal handler or another thread may call it. A failing save gives
        a warning, like the saves by the interval.

        Raises:
            InputError: the trainer has no `out_dir`.
        """
        if self._world.is_first:
            self._writer_for("request_save")
        self._save_requested = True

    def _writer_for(self, method: str) -> RunWriter:
        if self._writer is None and not self._world.is_first:
            raise InputError(f"{method} must be called in the process of rank 0, which alone writes")
        if self._writer is None:
            raise InputError(f"out_dir must be given to {method}: Trainer(..., out_dir='runs/one')")
        return self._writer

    def log(self, kind: str, values: Mapping[str, object]) -> None:
        """Write a callback's own record into metrics.jsonl, with the step and the seconds.

        Without `out_dir`, and in all processes but the first, nothing is written.

        Args:
            kind: its name; "step", "eval", "sample", "end" and "skip" are reserved.
            values: values of JSON; NaN and infinities become null, and are named.

        Raises:
            InputError: the kind is reserved.
        """
        self._reporter.log(kind, values)

    def finish(self) -> None:
        """End the run after the current step: it is evaluated and saved, and no error is raised.

        Call it from a callback, or between two steps of `steps`. A call before the run begins has no effect.
        """
        self._wish = self._wish or "callback"

    def interrupt(self) -> None:
        """Ask the run to save after the current step and to raise TrainingInterrupted.

        This sets a flag and returns, so a signal handler or another thread may call it.
        """
        self._interrupted = True

    def result(self) -> TrainResult:
        """Return the result of the run so far."""
        return TrainResult(
            steps=self.step,
            seconds=self.seconds,
            chars_seen=self.chars_seen,
            final=None if self.last is None else self.last.result,
            best=None if self.best is None else self.best.result,
            best_step=None if self.best is None else self.best.step,
            history=tuple(self.history),
            reason=self._reason or self._wish or "interrupted",
            checkpoint=self.checkpoint,
            unit=self.train_data.unit,
        )

    if not TYPE_CHECKING:

        def __getattr__(self, name: str) -> object:
            raise renamed("Trainer", name, {"stop": "finish", "request_stop": "interrupt"})

    def __getstate__(self) -> dict[str, object]:
        """Leave out the loop, which a copy does not have."""
        return {**self.__dict__, "_loop": None}

    def _restore(
        self,
        state: RunState,
        *,
        checkpoint: Path,
        writer: RunWriter,
        timetable: Timetable | None,
        best_weights: Contents | None,
        moved_end: bool,
    ) -> None:
        """Take on the state of a checkpoint; weights, moments and generators are restored already."""
        self._state, self._has_unsaved_end = state, moved_end
        self._writer = writer if self._world.is_first else None
        self.checkpoint, self.out_dir = checkpoint, checkpoint.parent.parent
        self._stepper.guard.begin(state.skipped_in_a_row)
        if timetable is not None:
            self._timekeeper.timetable = timetable
        if best_weights is not None:
            self._evaluations.best_weights = best_weights

    def _begin(self) -> None:
        self._buffers = meet(self._world, self)
        if self._writer is not None:
            self._writer.begin(self.step)
        self._evaluations.put_last_back()
        if self._stepper.is_moving:
            warn(
                f"step {self.step + 1} was cut short while the weights moved: it is taken again, and the "
                "steps from there on are not bit for bit what they would have been"
            )
            self._stepper.is_moving = False
        if not self.model.training:  # as returned by `load`; parts in evaluation mode inside stay so
            self.model.train()
        self.model.zero_grad(set_to_none=True)  # of the caller or an interrupted step
        self._reason = self._wish = None
        self._began_at = self._counted_at = time.perf_counter()
        self._start_timekeeper()
        if self._state.has_lost(self.config.patience):
            self._reason = self._reason or "patience"  # a run that has ended stays ended
        self._reporter.began()
        self._rehearse_save()
        if self._has_unsaved_end:  # else a kill before the next checkpoint would lose it
            self._save_if_possible()
            self._has_unsaved_end = False
        if self.step > 0 and self._timekeeper.is_evaluation_due(self.step):
            self._catch_up()  # an interrupted run has saved its last step without the evaluation
        self._agree()

    def _start_timekeeper(self) -> None:
        """Tell the timekeeper the time of an evaluation, and ask it whether the run has ended already."""
        keeper, evaluation = self._timekeeper, 0.0
        if self.timetable is not None and not keeper.repeats:
            if self.out_dir is not None:  # before timing: for a long text it takes seconds
                fingerprint(self.train_data)
            evaluation, chars = self._world.tell(
                lambda: (self._evaluations.plan(self._state, keeper), keeper.timetable.eval_chars)
            )
            keeper.choose_eval_chars(chars)
            self._agree()
        keeper.start(self.step, self.seconds, evaluation)
        before = self.timetable
        if self.step > 0:
            self._ask_timekeeper()
        self._has_unsaved_end = self._has_unsaved_end or self.timetable != before

    def _learning_rate(self, step: int) -> float:
        return learning_rate_at(step, self.config, self._timekeeper.learning_rate_ends)

    def _take_step(self) -> StepRecord:
        with self._before_a_bad_step():
            record = self._stepper.take(self.step)
        self._state.step, self._state.chars_seen = record.step, self.chars_seen + record.chars
        self._stepper.is_moving = False
        self._after_step(record)
        return record

    def _check_steps(self) -> None:
        """Raise if the run must end because of an earlier step, and report skipped steps.

        An asynchronous device reports this only when it is asked; no weight has changed since.
        """
        with self._before_a_bad_step():
            self._stepper.check()
        self._reporter.skipped(self._stepper.guard.skipped(self.step))

    @contextmanager
    def _before_a_bad_step(self) -> Iterator[None]:
        """If a step in the block ends the run, set the state to that before the step, and log it."""
        try:
            yield
        except NonFiniteError as error:
            done, stepper = (error.step or self.step + 1) - 1, self._stepper
            self._state.chars_seen -= (self.step - done) * stepper.chars_per_step
            self._state.step, self._reason, self._wish = done, None, None
            stepper.guard.begin()  # a continued run counts from 0
            self._reporter.skipped(stepper.guard.skipped(done))
            self._reporter.failed(error)
            raise

    def _after_step(self, record: StepRecord) -> None:
        """Do whatever is due after a step: log, call the callbacks, sample, evaluate and save."""
        config = self.config
        if config.minutes is not None and self.backend.asynchronous:
            self.backend.synchronize()  # else the clock would time the submission of steps
        self._agree()
        if not self._has_rehearsed:
            check_buffers(self._buffers, self.model)
            self._rehearse_save()  # once more, since the optimizer has a state now
            self._has_rehearsed = True
        self._ask_timekeeper()
        spent = self._counted_at - self._began_at
        if config.max_seconds is not None and spent >= config.max_seconds and self._world.is_first:
            self._wish = self._wish or "max_seconds"
        scheduled = self._timekeeper.is_evaluation_due(self.step)
        self._log_if_due(record)  # before a callback saves, so that a resume from there has the line
        self._reporter.stepped(record)
        self._log_if_due(record)  # again, since a callback may have ended the run
        asked = self._agree()
        ending = self._reason is not None
        due = due_after(self.step, config, scheduled=scheduled, ending=ending)
        if due.sample:
            self._sample()
        evaluated = self.val_data is not None and due.evaluate and (ending or not asked.interrupted)
        if evaluated:  # last, since a resume makes up for it first
            self._evaluate(scheduled=scheduled)
        if due.sample or evaluated:
            asked = self._agree()  # later requests belong to the next step
        is_best = evaluated and self.last is not None and self.last.is_best and config.keep_best > 0
        stopping = asked.interrupted or self._reason is not None
        if asked.save:
            self._save_requested = False
        if stopping:
            self._check_steps()
        if due.save or is_best or stopping or asked.save:
            self._save_if_possible(must_succeed=stopping)
            self._agree()  # no process ends before the checkpoint is written
        self._timekeeper.after_pause(self.seconds, evaluated=evaluated or scheduled)
        if asked.interrupted and self._reason is None:
            where = f"; the state is saved in {self.checkpoint}" if self.checkpoint else ""
            raise TrainingInterrupted(
                f"training stopped after step {self.step}{where}",
                step=self.step,
                checkpoint=str(self.checkpoint) if self.checkpoint else None,
            )

    def _log_if_due(self, record: StepRecord) -> None:
        if due_after(self.step, self.config, scheduled=False, ending=self._ends).log:
            self._check_steps()
            self._reporter.log_step(record)

    def _ask_timekeeper(self) -> None:
        """Ask the timekeeper after a step, log a new end, and set the reason if the end is reached."""
        before = self._timekeeper.timetable.ends
        is_last = self._timekeeper.after_step(self.step, self.seconds)
        if self._timekeeper.timetable.ends != before:
            self._reporter.log_planned_end(self._timekeeper.end)
        if is_last:
            self._reason = "max_steps" if self.step >= self.config.max_steps else "minutes"

    def _count_seconds(self) -> None:
        now = time.perf_counter()
        self._state.seconds += now - self._counted_at
        self._counted_at = now

    def _agree(self) -> Asked:
        """Share the time and the requests to this process with all processes, and adopt the common result."""
        self._count_seconds()
        own = Asked(self._interrupted, self._save_requested, self._reason or self._wish, self.seconds)
        asked = agree(self._world, own)
        self._reason, self._state.seconds = asked.reason, asked.seconds
        return asked

    @property
    def _ends(self) -> bool:
        return self._reason is not None or self._wish is not None

    def _evaluate(self, *, scheduled: bool) -> None:
        self._check_steps()
        began, keeper = time.perf_counter(), self._timekeeper
        keeper.record_evaluation(self.step, scheduled=scheduled)
        if self._world.size > 1:
            result = self._evaluations.score_together(keeper.timetable.eval_chars)
        else:
            with self._turns.between():
                result = self.evaluate(max_chars=keeper.timetable.eval_chars)
        seconds, counted = time.perf_counter() - began, scheduled and keeper.is_counted(self.step)
        record = self._evaluations.add(self._state, result, seconds=seconds, counted=counted)
        if counted and self._state.has_lost(self.config.patience):
            self._reason = self._reason or "patience"
        self._count_seconds()
        self._reporter.evaluated(record)

    def _sample(self) -> None:
        if not isinstance(self.model, LanguageModel) or self.tokenizer is None or not self._world.is_first:
            return
        prompt = torch.tensor([start_ids(self.tokenizer)], device=self.backend.device)  # (1, 1)
        ids = self.model.generate(
            prompt,
            self.config.sample_chars,
            seed=derive_seed(self.config.seed, "sample", self.step),
            overflow="restart",
        )
        self._reporter.sampled(SampleRecord(self.step, self.tokenizer.decode(ids[0, prompt.size(1) :])))

    def _save_if_possible(self, *, must_succeed: bool = False) -> None:
        if self._writer is not None:
            saved = None
            with self._writer.may_fail(must_succeed=must_succeed):
                saved = self._write(self._writer)
            if saved is not None:
                self._tell_of_save(saved)

    def _write(self, writer: RunWriter) -> Path:
        """Gather the run's state, write it as a checkpoint, and prune older ones."""
        if self._stepper.is_moving:
            raise InputError(
                f"step {self.step + 1} was cut short while the weights moved: they are those of no step. "
                "Resume from the last checkpoint (Trainer.resume), or train on: fit() takes the step again"
            )
        self._check_steps()
        self._state.skipped_in_a_row = self._stepper.guard.in_a_row()
        config = self.config
        with writer.saving(self.step) as identity:
            files, state = gather(self, identity)
            self.checkpoint = writer.write(identity, files, state, val_loss=self._state.val_loss)
            writer.prune(self.checkpoint, keep_last=config.keep_last, keep_best=config.keep_best)
        return self.checkpoint

    def _rehearse_save(self) -> None:
        """Check early that everything can be saved: types, and states of callbacks and the optimizer."""
        if self._writer is not None:
            identity = SaveIdentity("", self.step)
            encode_state(identity, gather(self, identity)[1])

    def _tell_of_save(self, checkpoint: Path) -> None:
        self._is_telling_of_a_save = True  # so that a callback's own save writes nothing new
        try:
            self._reporter.saved(checkpoint)
        finally:
            self._is_telling_of_a_save = False

    def _catch_up(self) -> None:
        """Evaluate and save the last step if that is missing, for example after a stop between two steps."""
        missing = self._evaluations.is_missing(self._state)
        if missing:
            self._evaluate(scheduled=self._timekeeper.is_evaluation_due(self.step))
        if missing or (self._writer is not None and self._writer.saved_step != self.step):
            self._save_if_possible(must_succeed=self._reason is not None or self._interrupted)
        self._agree()
        self._timekeeper.after_pause(self.seconds, evaluated=missing)

    def _finish(self) -> None:
        """Restore the best weights, and tell the callbacks that the run has ended by itself."""
        self._catch_up()
        self._evaluations.put_best_back(self._state)
        self._reporter.ended()
        self._agree()  # so that all processes end well, or none

    def _end(self, awake: Sequence[nn.Module]) -> None:
        """Release the lock, and restore the training flags of these modules."""
        self.model.eval()
        for module in awake:
            module.training = True
        self._interrupted = False
        try:
            self._reporter.closed()
        finally:
            if self._writer is not None:
                self._writer.end()
