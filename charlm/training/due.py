"""The actions that are due after a step, as a pure function of the step and the settings."""

from __future__ import annotations

from dataclasses import dataclass

from charlm.training.config import TrainerConfig

__all__ = ["Due", "due_after"]


@dataclass(frozen=True, kw_only=True)
class Due:
    """The actions of a trainer after a step, in the order of the fields."""

    log: bool
    """Write the step into metrics.jsonl."""
    sample: bool
    """Generate a sample of text."""
    evaluate: bool
    """Score the validation text, if there is one."""
    save: bool
    """Write a checkpoint. (A new best evaluation is saved, too.)"""


def due_after(step: int, config: TrainerConfig, *, scheduled: bool, ending: bool) -> Due:
    """Return the actions that are due.

    Args:
        step: number of steps done, at least 1.
        config: its intervals are used.
        scheduled: whether an evaluation is due by the interval or the clock (`Timekeeper.is_evaluation_due`).
        ending: whether the run ends with this step, which is then always logged, evaluated and saved.

    Example:
        >>> config = TrainerConfig(log_interval=10, save_interval=25)
        >>> due_after(20, config, scheduled=False, ending=False)
        Due(log=True, sample=False, evaluate=False, save=False)
    """
    return Due(
        log=ending or step % config.log_interval == 0,
        sample=config.sample_interval is not None and step % config.sample_interval == 0,
        evaluate=ending or scheduled,
        save=ending or (scheduled if config.save_interval is None else step % config.save_interval == 0),
    )
