"""`Trainer`: the loop, to read from top to bottom.

`fit` is a for-loop over `steps`, `steps` is a loop over `_train_step` and `_after_step`. What is random
has an address (see `charlm.randomness`), so nothing here depends on what ran before: a resumed run, a run
with other intervals and a run with noisy callbacks train alike, bit for bit. The trainer prints nothing.
"""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Self

import torch
from torch import nn
from torch.amp.grad_scaler import GradScaler
from torch.optim import Optimizer

from charlm.backends.base import DeviceBackend
from charlm.backends.registry import get_backend
from charlm.data.blocks import BlockDataset
from charlm.errors import (
    CheckpointWriteError,
    DataError,
    InputError,
    NonFiniteError,
    TrainingInterrupted,
    shown,
)
from charlm.evaluation.evaluate import EvalResult, evaluate
from charlm.models.base import LanguageModel
from charlm.models.saving import unique_tensors
from charlm.randomness import derive_seed
from charlm.text.streaming import start_ids
from charlm.text.tokenizer import Tokenizer
from charlm.training import state
from charlm.training.callbacks import Callback
from charlm.training.checkpoint import new_save_id, part_metadata, prune_checkpoints, save_checkpoint
from charlm.training.config import TrainerConfig
from charlm.training.metrics import MetricsLog, eval_values
from charlm.training.optimizers import OptimizerFactory, build_optimizers
from charlm.training.records import Evaluation, SampleRecord, StepRecord, StopReason, TrainResult
from charlm.training.run import RunDirectory
from charlm.training.schedules import learning_rate_at

__all__ = ["Trainer"]

_MOST_FAILED_SAVES = 3


class Trainer:
    """Trains a model on blocks of text.

    Args:
        model: anything whose `forward(idx, targets)` gives (logits, mean loss in nats). Moved to the
            device in place.
        train_data: the blocks to draw batches from.
        config: the settings; None: the defaults.
        val_data: a text for evaluation; None: no evaluations, no best weights.
        tokenizer: is saved beside the model, and turns samples into text.
        out_dir: directory for checkpoints and the log, missing or empty; None: nothing is written.
        device: a name for `get_backend`, or a backend.
        callbacks: run in this order.
        optimizer: makes the optimizer from named parameters; None: the one that the config names.

    Attributes:
        step: how many steps are done.
        best: the evaluation with the lowest loss so far, or None.
        last: the last evaluation, or None.
        history: the evaluations of this process, in order.
        chars_seen: characters predicted in training.
        seconds: time spent in the run so far.

    Raises:
        DataError: the data has ids that the model lacks, or longer blocks than it sees.
        InputError: an argument is of the wrong kind, or the tokenizer does not fit the model.
        RunExistsError: `out_dir` is not empty.
        BackendError: the device is absent or cannot do what the config asks.

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
    optimizers: list[Optimizer]
    scaler: GradScaler | None
    step: int
    chars_seen: int
    seconds: float

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
    ) -> None:
        self.config = TrainerConfig() if config is None else config
        _check_arguments(model, train_data, val_data, tokenizer, self.config)
        for callback in callbacks:
            if not isinstance(callback, Callback):
                raise InputError(f"callbacks must be Callback objects, got {shown(callback)}")
        self.out_dir = None if out_dir is None else Path(out_dir)
        if self.out_dir is not None:
            RunDirectory.refuse_if_taken(self.out_dir)
        self.backend = get_backend(device)
        self.precision = self.backend.precision(self.config.precision)
        self.model = self.backend.prepare(model, compile=self.config.compile)
        self.train_data, self.val_data, self.tokenizer = train_data, val_data, tokenizer
        self.callbacks = tuple(callbacks)
        self.scaler = self.backend.scaler(self.precision)
        self.optimizers = (
            build_optimizers(model, self.config, self.backend)
            if optimizer is None
            else [_made_by(optimizer, model)]
        )
        moved = {id(p) for made in self.optimizers for group in made.param_groups for p in group["params"]}
        self._parameters = [p for p in model.parameters() if id(p) in moved]
        self._generator = torch.Generator()  # re-seeded for each batch

        self.step = 0
        self.best: Evaluation | None = None
        self.last: Evaluation | None = None
        self.history: list[Evaluation] = []
        self.chars_seen = 0
        self.seconds = 0.0
        self.checkpoint: Path | None = None
        self._evaluations_since_best = 0
        self._best_weights: dict[str, torch.Tensor] = {}
        self._run: RunDirectory | None = None
        self._log: MetricsLog | None = None
        self._saved_step: int | None = None  # of the last checkpoint
        self._failed_saves = 0
        self._holds_best = False  # the model has the best weights, `_best_weights` those of the last step
        self._reason: StopReason | None = None
        self._interrupted = False
        self._began_at = 0.0  # when this process began its steps
        self._counted_at = 0.0  # up to when `seconds` counts
        self._logged_at = (0, 0.0)  # step and seconds of the last logged step

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
    ) -> Self:
        """Return a trainer that goes on where the newest whole checkpoint of a run ends.

        On the same build, device and number of threads every later step is bit for bit what it would
        have been without the stop. Settings come from the checkpoint.

        Args:
            out_dir: the run's directory.
            train_data: the same data; another text is refused.
            model: needed only if the run trained something other than a `LanguageModel`; its weights
                are replaced.
            val_data: the same validation text, or None if the run had none.
            optimizer: the same factory as before, if there was one.
            callbacks: the same kinds in the same order, so that each gets its own state back.
                Where none of the run's callbacks had a state, any will do.
            device: may differ from before; results are then close, not equal.
            max_steps: a new end for the run. It moves the schedule of the learning rate.

        Raises:
            CheckpointError: there is no run, or no whole checkpoint in it.
            CheckpointMismatchError: the data, the tokenizer or the model differ.
        """
        return state.resume(
            cls,
            Path(out_dir),
            train_data,
            model=model,
            val_data=val_data,
            optimizer=optimizer,
            callbacks=callbacks,
            device=device,
            max_steps=max_steps,
        )

    def fit(self) -> TrainResult:
        """Train to the end.

        Returns:
            What the run came to. With `restore_best` the model now holds the weights of the best
            evaluation.

        Raises:
            TrainingInterrupted: `request_stop` was called; all is saved.
            NonFiniteError: the loss or a gradient is not finite; the weights are those before that step.
            CheckpointWriteError: saving failed three times in a row.
            RunLockedError: another process trains in the same directory.
        """
        for _ in self.steps():
            pass
        return self.result()

    def steps(self) -> Iterator[StepRecord]:
        """Train, yielding after each step, when its evaluation, sample and checkpoint are done.

        Leaving the loop early is allowed: what is saved stays, and nothing stays locked.
        """
        was_training = [module for module in self.model.modules() if module.training]
        try:
            self._begin()
            while self._reason is None:
                record = self._train_step()
                self._after_step(record)
                yield record
                self._counted_at = time.perf_counter()  # the caller's own time is not the run's
            self._finish()
        finally:
            self.model.eval()
            for module in was_training:
                module.training = True
            self._end()

    def evaluate(self, data: BlockDataset | None = None) -> EvalResult:
        """Score a whole text exactly; None: the validation text. Changes nothing in the run.

        Raises:
            DataError: there is no validation text.
        """
        data = data or self.val_data
        if data is None:
            raise DataError("there is nothing to evaluate: pass data, or give the trainer val_data")
        return evaluate(self.model, data, backend=self.backend)

    def save(self) -> Path:
        """Write a checkpoint now; when this returns, it survives a loss of power.

        After a run that put the best weights back there is nothing new to save: its last checkpoint is
        returned.

        Raises:
            CheckpointWriteError: it could not be written; older checkpoints are intact.
            InputError: the trainer has no `out_dir`.
        """
        if self.out_dir is None:
            raise InputError("out_dir must be given to save: Trainer(..., out_dir='runs/one')")
        if self._holds_best and self.checkpoint is not None:
            return self.checkpoint  # the last step is saved, and the model holds other weights now
        run = self._run or self._open_run()
        self._to_log(MetricsLog.flush)
        at_this_step = self.last if self.last is not None and self.last.step == self.step else None
        save_id = new_save_id()
        self.checkpoint = save_checkpoint(
            run,
            self.step,
            state.files(self, part_metadata(run, self.step, save_id)),
            state.values(self),
            val_loss=state.finite_loss(at_this_step),
            save_id=save_id,
        )
        self._saved_step = self.step
        try:
            prune_checkpoints(
                run, self.checkpoint, keep_last=self.config.keep_last, keep_best=self.config.keep_best
            )
        except OSError as error:
            warnings.warn(
                f"cannot delete an old checkpoint: {error}. The new one is safe.",
                RuntimeWarning,
                stacklevel=2,
            )
        for callback in self.callbacks:
            callback.on_save(self, self.checkpoint)
        return self.checkpoint

    def stop(self) -> None:
        """Let the run end by itself after the current step: evaluated, saved, without an error."""
        self._reason = self._reason or "callback"

    def request_stop(self) -> None:
        """Ask from outside, for example from a signal handler, to save and raise TrainingInterrupted.

        The step under way is finished first. Sets a flag and returns.
        """
        self._interrupted = True

    def result(self) -> TrainResult:
        """Return what the run has come to so far."""
        return TrainResult(
            steps=self.step,
            seconds=self.seconds,
            chars_seen=self.chars_seen,
            final=None if self.last is None else self.last.result,
            best=None if self.best is None else self.best.result,
            best_step=None if self.best is None else self.best.step,
            history=tuple(self.history),
            reason=self._reason or "callback",
            checkpoint=self.checkpoint,
        )

    def _begin(self) -> None:
        if self.out_dir is not None:
            self._run = self._open_run()
            self._run.lock()
            self._log = MetricsLog(self._run.metrics, step=self.step)
        if self._holds_best:
            self._exchange_weights()
        self.model.train()
        self.model.zero_grad(set_to_none=True)  # whatever the caller or an interrupted step left
        self._reason = "max_steps" if self.step >= self.config.max_steps else None
        self._began_at = self._counted_at = time.perf_counter()
        self._logged_at = (self.step, self.seconds)
        for callback in self.callbacks:
            callback.on_train_start(self)
        if self.step > 0 and self.step % self.config.eval_interval == 0:
            self._catch_up()  # an interrupted run saves before the evaluation of its last step

    def _open_run(self) -> RunDirectory:
        if self._run is None and self.out_dir is not None:
            self._run = RunDirectory.create(self.out_dir)
        return self._run  # type: ignore[return-value]  # both callers have an out_dir

    def _train_step(self) -> StepRecord:
        """Forward, backward, update: one step of gradient descent."""
        config, step = self.config, self.step
        began = time.perf_counter()
        loss = torch.zeros((), device=self.backend.device)
        for micro in range(config.accumulate):
            self._generator.manual_seed(derive_seed(config.seed, "data", step, micro))
            batch = self.train_data.sample_batch(config.batch_size, generator=self._generator)
            x, y = self.backend.to_device(*batch)  # (B, T)
            with self.backend.seeded(derive_seed(config.seed, "dropout", step, micro)):
                with self.backend.autocast(self.precision):
                    _, part = self.model(x, y)
                part = part / config.accumulate  # micro-batches have equally many characters
                (part if self.scaler is None else self.scaler.scale(part)).backward()
            loss += part.detach()

        learning_rate = learning_rate_at(step, config)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = learning_rate * group.get("lr_scale", 1.0)
            if self.scaler is not None:
                self.scaler.unscale_(optimizer)
        gradients = [p.grad for p in self._parameters if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients)
        self._refuse_non_finite(loss, norm, learning_rate)
        if config.grad_clip is not None:
            torch.nn.utils.clip_grads_with_norm_(self._parameters, config.grad_clip, norm)
        for optimizer in self.optimizers:
            if self.scaler is None:
                optimizer.step()
            else:
                self.scaler.step(optimizer)
        self.model.zero_grad(set_to_none=True)
        if self.scaler is not None:
            self.scaler.update()

        self.step += 1
        chars = config.accumulate * config.batch_size * self.train_data.block_size
        self.chars_seen += chars
        return StepRecord(
            step=self.step,
            learning_rate=learning_rate,
            chars=chars,
            seconds=time.perf_counter() - began,
            _loss=loss,
            _grad_norm=norm,
        )

    def _refuse_non_finite(self, loss: torch.Tensor, norm: torch.Tensor, learning_rate: float) -> None:
        """Raise before the update if the loss or a gradient is not finite; weights and moments stay."""
        # fp16 gradients overflow now and then; the scaler skips such a step and lowers its scale.
        watched = loss if self.scaler is not None else loss + norm
        if bool(torch.isfinite(watched)):
            return
        bad = next(
            (
                name
                for name, p in self.model.named_parameters()
                if p.grad is not None and not bool(torch.isfinite(p.grad).all())
            ),
            None,
        )
        self.model.zero_grad(set_to_none=True)
        raise NonFiniteError(
            f"step {self.step}: the loss is {loss.item()} and the gradient's norm {norm.item()} at learning "
            f"rate {learning_rate:g}; batch seed {self.config.seed}, "
            + (f"first bad gradient: {bad}. " if bad else "all gradients are finite. ")
            + "The weights are those before this step. Lower the learning rate, or set grad_clip.",
            step=self.step,
            parameter=bad,
        )

    def _after_step(self, record: StepRecord) -> None:
        """Log, tell the callbacks, evaluate, sample and save: whatever is due after a step."""
        config, step = self.config, self.step
        self._count_seconds()
        for callback in self.callbacks:
            callback.on_step_end(self, record)
        if step >= config.max_steps:
            self._reason = "max_steps"
        elif config.max_seconds is not None and self._counted_at - self._began_at >= config.max_seconds:
            self._reason = self._reason or "max_seconds"
        ending = self._reason is not None
        if step % config.log_interval == 0 or ending:
            self._log_step(record)
        due = step % config.eval_interval == 0 and not self._interrupted
        evaluated = self.val_data is not None and (due or ending)
        if evaluated:
            self._evaluate()
        if config.sample_interval is not None and step % config.sample_interval == 0:
            self._sample()
        self._count_seconds()
        save_interval = config.save_interval or config.eval_interval
        is_best = evaluated and self.last is not None and self.last.is_best and config.keep_best > 0
        if self._interrupted or self._reason is not None or step % save_interval == 0 or is_best:
            self._save_if_possible()
        self._count_seconds()
        if self._interrupted and self._reason is None:
            where = f"; the state is saved in {self.checkpoint}" if self.checkpoint else ""
            raise TrainingInterrupted(
                f"training stopped after step {step}{where}",
                step=step,
                checkpoint=str(self.checkpoint) if self.checkpoint else None,
            )

    def _count_seconds(self) -> None:
        now = time.perf_counter()
        self.seconds += now - self._counted_at
        self._counted_at = now

    def _log_step(self, record: StepRecord) -> None:
        if self._log is None:
            return
        steps, seconds = self.step - self._logged_at[0], self.seconds - self._logged_at[1]
        self._logged_at = (self.step, self.seconds)
        self._write_log(
            "step",
            {
                "loss": record.loss,
                "learning_rate": record.learning_rate,
                "grad_norm": record.grad_norm,
                "chars_per_second": steps * record.chars / max(seconds, 1e-9),
                "seconds": self.seconds,
            },
        )

    def _write_log(self, kind: str, values: Mapping[str, object]) -> None:
        self._to_log(lambda log: log.write(kind, self.step, values))

    def _to_log(self, action: Callable[[MetricsLog], None]) -> None:
        """Write to the log or flush it; training does not end for it, a full disk stops the saves anyway."""
        if self._log is None:
            return
        try:
            action(self._log)
        except OSError as error:
            warnings.warn(f"cannot write metrics.jsonl: {error}", RuntimeWarning, stacklevel=2)

    def _evaluate(self) -> None:
        began = time.perf_counter()
        result = self.evaluate()
        lowest = math.inf if self.best is None else self.best.result.loss_nats
        is_best = result.loss_nats < lowest  # never if it is not finite
        self.last = Evaluation(self.step, result, is_best, time.perf_counter() - began)
        self.history.append(self.last)
        if is_best:
            self.best, self._evaluations_since_best = self.last, 0
            if self.config.restore_best:
                self._best_weights = {k: t.detach().clone() for k, t in unique_tensors(self.model).items()}
        else:
            self._evaluations_since_best += 1
            if self.config.patience is not None and self._evaluations_since_best >= self.config.patience:
                self._reason = self._reason or "patience"
        self._count_seconds()
        self._write_log("eval", {**eval_values(result), "seconds": self.seconds})
        for callback in self.callbacks:
            callback.on_evaluate(self, self.last)

    def _sample(self) -> None:
        if not isinstance(self.model, LanguageModel) or self.tokenizer is None:
            return
        prompt = torch.tensor([start_ids(self.tokenizer)], device=self.backend.device)  # (1, 1)
        ids = self.model.generate(
            prompt,
            self.config.sample_chars,
            seed=derive_seed(self.config.seed, "sample", self.step),
            overflow="restart",
        )
        sample = SampleRecord(self.step, self.tokenizer.decode(ids[0, prompt.size(1) :]))
        self._write_log("sample", {"text": sample.text})
        for callback in self.callbacks:
            callback.on_sample(self, sample)

    def _save_if_possible(self) -> None:
        """Save; a failure is a warning until it happens too often in a row, or nothing follows it."""
        if self.out_dir is None:
            return
        try:
            self.save()
            self._failed_saves = 0
        except CheckpointWriteError as error:
            self._failed_saves += 1
            if self._failed_saves >= _MOST_FAILED_SAVES or self._reason is not None or self._interrupted:
                raise
            warnings.warn(f"{error} Training goes on.", RuntimeWarning, stacklevel=2)

    def _catch_up(self) -> None:
        """Evaluate and save the last step where that was not done, as after a stop between two steps."""
        missing = self.val_data is not None and (self.last is None or self.last.step != self.step)
        if missing:
            self._evaluate()
        if missing or self._saved_step != self.step:
            self._save_if_possible()
        self._count_seconds()

    def _finish(self) -> None:
        """Put the best weights back, and tell the callbacks that the run has ended by itself."""
        self._catch_up()
        if self._best_weights and self.best is not None and self.best.step != self.step:
            self._exchange_weights()
        for callback in self.callbacks:
            callback.on_train_end(self, self.result())

    def _exchange_weights(self) -> None:
        """Swap the model's weights with those that were put aside."""
        with torch.no_grad():
            for name, tensor in unique_tensors(self.model).items():
                held = tensor.detach().clone()
                tensor.copy_(self._best_weights[name])
                self._best_weights[name] = held
        self._holds_best = not self._holds_best

    def _end(self) -> None:
        """Close the log and give the lock back."""
        self._interrupted = False
        log, self._log = self._log, None
        try:
            if log is not None:
                log.close()
        finally:
            if self._run is not None:
                self._run.unlock()


def _made_by(factory: OptimizerFactory, model: nn.Module) -> torch.optim.Optimizer:
    made = factory(model.named_parameters())
    if not isinstance(made, torch.optim.Optimizer):
        raise InputError(f"optimizer must make a torch.optim.Optimizer, got {type(made).__name__}")
    return made


def _check_arguments(
    model: nn.Module,
    train_data: BlockDataset,
    val_data: BlockDataset | None,
    tokenizer: Tokenizer | None,
    config: TrainerConfig,
) -> None:
    for name, data in (("train_data", train_data), ("val_data", val_data)):
        if data is None and name == "val_data":
            continue
        if not isinstance(data, BlockDataset):
            raise InputError(f"{name} must be a BlockDataset, got {type(data).__name__}")
        if isinstance(model, LanguageModel):
            if data.max_id >= model.vocab_size:
                raise DataError(
                    f"{name} holds the id {data.max_id}, but the model's vocab_size is {model.vocab_size}"
                )
            if model.block_size is not None and data.block_size > model.block_size:
                raise DataError(
                    f"{name} has blocks of {data.block_size}, but the model sees only {model.block_size}"
                )
    if not isinstance(config, TrainerConfig):
        raise InputError(f"config must be a TrainerConfig, got {type(config).__name__}")
    if (
        tokenizer is not None
        and isinstance(model, LanguageModel)
        and tokenizer.vocab_size != model.vocab_size
    ):
        raise InputError(
            f"the tokenizer has {tokenizer.vocab_size} ids, but the model's vocab_size is {model.vocab_size}"
        )
    if config.sample_interval is not None and (tokenizer is None or not isinstance(model, LanguageModel)):
        raise InputError(
            "sample_interval needs a LanguageModel and its tokenizer: Trainer(..., tokenizer=tokenizer)"
        )
