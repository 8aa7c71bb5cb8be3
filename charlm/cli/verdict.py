"""Comments on a training with a poor result, before and after it, with advice.

A model is worth something if it predicts a text better than an n-gram model does.
"""

from __future__ import annotations

from torch import nn

from charlm.models.config import PRESETS, GPTConfig
from charlm.models.gpt import GPT
from charlm.training.records import TrainResult
from charlm.training.trainer import Trainer

__all__ = ["FEW_STEPS", "UNLIKE", "few_steps", "judged"]

FEW_STEPS = 100
"""With fewer steps, no preset comes near an n-gram model on any measured text (docs/experiments.md)."""

_FAR_BEHIND = 0.05  # nats behind the n-gram model
_OVERFITTED = 0.8  # a best evaluation before this share of the steps means that the rest memorised the text

UNLIKE = (
    "warning: the beginning of this text tells hardly more of its end than the end's single characters do, "
    "as in a sorted list. The end is kept for validation, so its loss will mislead: shuffle the lines first "
    "(shuf FILE > shuffled.txt), or join texts in another order"
)


def few_steps(steps: int, minutes: float, model: nn.Module) -> str:
    """Return a comment on the few steps of a model that fit into a time."""
    return (
        f"only about {steps:,} step{'s' * (steps != 1)} fit into {minutes:g} min, too few to learn much "
        f"from. Give it more minutes, {_smaller(model)}or a machine that does nothing else"
    )


def _smaller(model: nn.Module) -> str:
    """Return the advice to take a smaller model, or an empty string if there is no smaller preset."""
    if isinstance(model, GPT):
        smallest = GPTConfig.from_dict({**PRESETS["cpu-10s"], "vocab_size": model.vocab_size})
        if model.num_parameters() <= smallest.num_parameters():
            return ""
    return "a smaller model (--preset cpu-10s), "


def judged(
    trainer: Trainer, result: TrainResult, baseline: object, *, anew: bool = True, enough: bool = False
) -> str | None:
    """Return a comment on a poor result, or None.

    Args:
        trainer: after its run.
        result: of the run.
        baseline: the values of the n-gram model in train.json.
        anew: whether the model was new; else few steps may be enough.
        enough: whether more steps would not be useful for the text.
    """
    best, config = result.best, trainer.config
    if best is None or result.best_step is None:
        return None
    loss = baseline.get("loss_nats") if isinstance(baseline, dict) else None
    behind = best.loss_nats - loss if isinstance(loss, float) else 0.0
    more = "--minutes" if config.minutes is not None else "--max-steps"
    if (
        anew
        and not enough
        and result.steps < FEW_STEPS
        and (behind > _FAR_BEHIND or not isinstance(loss, float))
    ):
        smaller = _smaller(trainer.model).removesuffix(", ")
        return (
            f"{result.steps:,} step{'s are' if result.steps != 1 else ' is'} too few to learn much from: the "
            f"GPT is worth little. Give it more {more}{smaller and f', or {smaller}'}"
        )
    if behind <= _FAR_BEHIND:
        return None
    data = trainer.train_data
    epochs = result.chars_seen / data.n_ids
    rose = result.best_step < _OVERFITTED * result.steps
    if epochs > 1 and (rose or enough or (result.reason == "max_steps" and epochs > 4)):
        return (
            f"the GPT stays {behind:.2f} nats behind counting: the text is too short for it "
            f"({data.n_ids:,} {data.unit}s, seen {epochs:.0f} times). A longer text helps"
        )
    if rose:
        return (
            f"the GPT is {behind:.2f} nats behind counting, and its loss has risen since step "
            f"{result.best_step:,}: try a lower --learning-rate"
        )
    return (
        f"the GPT is {behind:.2f} nats behind counting, since it has made only {result.steps:,} steps: "
        f"give it more {more}"
    )
