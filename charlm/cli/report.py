"""The lines that a training writes before its first step and after its last, each with a label."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from pathlib import Path

import torch

from charlm.backends.base import DeviceBackend
from charlm.cli.baseline import compared
from charlm.cli.encoded import Encoded
from charlm.cli.mixing import Texts
from charlm.cli.output import aligned, as_word
from charlm.cli.parent import Parent
from charlm.cli.plan import Plan
from charlm.cli.verdict import judged
from charlm.data.blocks import BlockDataset
from charlm.errors import CharLMError, quoted
from charlm.models.gpt import GPT
from charlm.runs.history import read_history
from charlm.terminal import escaped
from charlm.training.config import MOST_STEPS, TrainerConfig
from charlm.training.progress import BITS, clock, scored_part
from charlm.training.schedules import learning_rate_at
from charlm.training.timetable import planned_end
from charlm.training.trainer import Trainer

__all__ = [
    "device_line",
    "done_line",
    "model_line",
    "next_lines",
    "recipe_line",
    "result_lines",
    "shares_line",
    "steps_line",
    "stopped_lines",
    "text_line",
]

_REASONS = {"max_seconds": ", as max_seconds is over", "patience": ", as the validation loss no longer falls"}


def text_line(sources: Sequence[str], encoded: Encoded, texts: Texts) -> str:
    """Return the line about the text."""
    names = escaped(", ".join("standard input" if s == "-" else s for s in sources[:3]))
    more = f" and {len(sources) - 3} more" if len(sources) > 3 else ""
    train, aside, val = texts.train, texts.aside, texts.val
    kept = f"{val.n_ids:,} for validation" if val is not None else "none for validation"
    if aside is not None:
        kept = f"{aside.n_ids:,} to choose the result by, {kept}"
    count = 0 if encoded.documents is None else len(encoded.documents)
    documents = f" in {count:,} document{'s' * (count > 1)}" if count else ""
    return (
        f"text    {names}{more}: {encoded.n_chars:,} characters{documents}, vocabulary "
        f"{encoded.tokenizer.vocab_size:,}; {train.n_ids:,} {train.unit}s to train on, {kept}"
    )


def recipe_line(plan: Plan, parent: Parent | None) -> str:
    """Return the preset with its reasons, or the model that a training begins with."""
    if parent is not None:
        return (
            f"from    {escaped(str(parent.values['path']))}, with the recipe of {plan.preset} and a learning "
            f"rate of {plan.training.learning_rate:g}"
        )
    return f"recipe  {plan.preset}, {'; '.join(plan.reasons) or 'as given'}"


def model_line(model: GPT) -> str:
    """Return the model's sizes."""
    config = model.config
    return (
        f"model   {config.n_layer} layers of {config.n_head} heads, width {config.n_embd}, "
        f"block {config.block_size}; {model.num_parameters():,} parameters"
    )


def device_line(backend: DeviceBackend, training: TrainerConfig, processes: int = 1) -> str:
    """Return device, precision and number of processes."""
    count = torch.get_num_threads()
    threads = f" with {count} thread{'s' * (count > 1)}" if backend.name == "cpu" else ""
    where = (
        f"{backend.name}{threads}"
        if processes == 1
        else f"{processes} processes, each {backend.name}{threads}"
    )
    return f"device  {where}, {backend.precision(training.precision)}"


def steps_line(training: TrainerConfig, train: BlockDataset, most_steps: int | None, *, repeats: bool) -> str:
    """Return the number of steps and the size of each.

    Args:
        training: the settings of the run.
        train: the training text.
        most_steps: the most useful steps for the text; None: unknown.
        repeats: whether an earlier run has decided the number.
    """
    blocks = training.batch_size * training.accumulate
    each = f"; each {blocks:,} block{'s' * (blocks != 1)} of {train.block_size:,} {train.unit}"
    each += "s" * (train.block_size != 1)
    if repeats:
        return f"steps   those of the run that is repeated{each}"
    if training.minutes is None:
        enough = ", which is enough for so short a text" if training.max_steps == most_steps else ""
        return f"steps   {training.max_steps:,}{enough}{each}"
    limited = training.max_steps not in {most_steps, MOST_STEPS}
    limit = f", at most {training.max_steps:,}" if limited else ""
    return f"steps   as many as fit into {training.minutes:g} min{limit}{each}"


def shares_line(training: TrainerConfig) -> str:
    """Return the micro-batches of a step, and the options of the same training in one process."""
    B, V = training.batch_size, training.accumulate
    return (
        f"shares  each step is {V} micro-batches of {B} blocks, for 1, 2, 4, … up to {V} processes; "
        f"--batch-size {B} --accumulate {V} is the same training in one process"
    )


def moved_line(trainer: Trainer, run: Path) -> str:
    """Return the effect on the learning rate if a resume has moved the end."""
    config, step, before = trainer.config, trainer.step, ""
    with contextlib.suppress(CharLMError):  # nothing may be logged yet
        history = read_history(run)
        rates = history.learning_rate[history.steps <= step]
        before = f" goes from {rates[-1]:.2g}" if len(rates) else ""
    ends = None if trainer.timetable is None or planned_end(config) else trainer.timetable.ends
    now = learning_rate_at(min(step, config.max_steps - 1), config, ends)
    end = f"{config.max_steps:,} steps" if config.minutes is None else f"{config.minutes:g} min"
    falls = "" if config.schedule == "constant" else ", and falls by then"
    return (
        f"note    the run and its schedule now end at {end}: the learning rate{before} to {now:.2g}{falls}. "
        "(To begin with its model, and a small one: --from)"
    )


def done_line(trainer: Trainer, *, end: int | None) -> str:
    """Return the progress of a resumed run; `end` is its last step, if it is known."""
    if end is not None and trainer.step >= end:
        return (
            f"steps   all {end:,} are done; --max-steps N with a larger N goes on, with a learning rate that "
            "rises again, or --minutes M; charlm train FILE -o NEW --from RUN begins with the model instead"
        )
    config = trainer.config
    of = f" of {config.max_steps:,}" if trainer.timetable is None else ""
    used = "" if config.minutes is None else f", {clock(trainer.seconds)} of {config.minutes:g} min are used"
    return f"steps   {trainer.step:,}{of} are done{used}"


def stopped_lines(trainer: Trainer, step: int, out: str) -> str:
    """Return the message for a run that a signal has stopped after a step."""
    expected, timetable = trainer.expected_steps, trainer.timetable
    about = "about " if timetable is not None and timetable.end != expected else ""
    of = "" if expected is None else f" of {about}{expected:,}"
    return (
        f"stopped after step {step:,}{of}; all is saved in {quoted(out)}\n"
        f"To go on: charlm train --resume -o {as_word(out)}"
    )


def result_lines(trainer: Trainer, out: str, baseline: object, *, enough: bool, anew: bool) -> str:
    """Return the result of a training.

    Args:
        trainer: after its run.
        out: its directory.
        baseline: the values of the n-gram model in train.json.
        enough: whether more steps would not be useful for the text.
        anew: whether its model was new.
    """
    result = trainer.result()
    why = _REASONS.get(result.reason, "")
    if enough and result.reason == "max_steps":
        why = ", as many as so short a text is good for"
    rows = [("done", f"{result.steps:,} steps in {clock(result.seconds)}{why}")]
    best, final, unit = result.best, result.final, trainer.train_data.unit
    if best is not None and final is not None:
        loss = f"best {best.loss_nats:.4f} nats ({best.bits_per_char:.4f} {BITS[unit]}) at step "
        loss += f"{result.best_step:,}, final {final.loss_nats:.4f}{scored_part(best, unit)}"
        lines = [("loss", loss), ("n-gram", compared(baseline, best, unit))]
        lines.append(("note", judged(trainer, result, baseline, anew=anew, enough=enough)))
        rows += [(label, value) for label, value in lines if value is not None]
    return aligned([label.ljust(6), value] for label, value in rows).rstrip("\n")


def next_lines(out: str) -> str:
    """Return the run's directory and the next command."""
    return f"run     {escaped(out)}\nnext    charlm generate {as_word(out)}"
