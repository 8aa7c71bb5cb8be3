"""Checks of a `Trainer`'s arguments."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from charlm.data.blocks import BlockDataset
from charlm.errors import DataError, InputError, shown
from charlm.models.base import LanguageModel
from charlm.models.contents import saved_tensors
from charlm.models.saving import check_savable
from charlm.text.tokenizer import Tokenizer
from charlm.training.callbacks import Callback
from charlm.training.config import TrainerConfig
from charlm.training.saving import characters_fingerprint
from charlm.training.timetable import Timetable

__all__ = ["check_arguments", "check_characters"]


def check_arguments(
    model: nn.Module,
    config: TrainerConfig,
    *,
    train_data: BlockDataset,
    val_data: BlockDataset | None,
    tokenizer: Tokenizer | None,
    callbacks: Sequence[Callback],
    timetable: Timetable | None,
    saving: bool,
) -> None:
    """Raise DataError or InputError unless these can be trained together."""
    if not isinstance(model, nn.Module):
        raise InputError(f"model must be a torch module, got {shown(model)}")
    if tokenizer is not None and not isinstance(tokenizer, Tokenizer):
        raise InputError(f"tokenizer must be a tokenizer, got {shown(tokenizer)}")
    tensors = list(model.parameters())
    if any(parameter.is_meta for parameter in tensors):
        raise InputError("model must hold its weights, got parameters on the meta device")
    if not any(parameter.requires_grad for parameter in tensors):
        raise InputError("model must have a parameter that requires a gradient, got none")
    if any(parameter.dtype in {torch.float16, torch.bfloat16} for parameter in tensors):
        raise InputError("model must have float32 weights; precision= sets the type of matrix products")
    if saving:
        saved_tensors(model)
    if saving and isinstance(model, LanguageModel):
        check_savable(model)
    if not isinstance(callbacks, Sequence):
        raise InputError(f"callbacks must be a sequence of Callback objects, got {shown(callbacks)}")
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
    if timetable is not None and not isinstance(timetable, Timetable):
        raise InputError(f"timetable must be a Timetable, got {shown(timetable)}")
    if not isinstance(config, TrainerConfig):
        raise InputError(f"config must be a TrainerConfig, got {type(config).__name__}")
    if timetable is not None and timetable.ends and config.minutes is None:
        raise InputError("timetable is that of a run with minutes: the config must have them, too")
    if (
        tokenizer is not None
        and isinstance(model, LanguageModel)
        and tokenizer.vocab_size != model.vocab_size
    ):
        raise InputError(
            f"the tokenizer has {tokenizer.vocab_size} ids, but the model's vocab_size is {model.vocab_size}"
        )
    check_characters(tokenizer, train_data=train_data, val_data=val_data)
    if config.sample_interval is not None and (tokenizer is None or not isinstance(model, LanguageModel)):
        raise InputError(
            "sample_interval needs a LanguageModel and its tokenizer: Trainer(..., tokenizer=tokenizer)"
        )
    for callback in callbacks:
        if not isinstance(callback, Callback):
            raise InputError(f"callbacks must be Callback objects, got {shown(callback)}")


def check_characters(tokenizer: Tokenizer | None, **data: BlockDataset | None) -> None:
    """Raise DataError if texts are known to have different tokenizers.

    Args:
        tokenizer: of the run; None: that of the first text.
        data: texts, by the names of their arguments.
    """
    for name, part in data.items():
        own = None if part is None else part.tokenizer
        tokenizer = tokenizer or own
        if (
            own is None
            or own is tokenizer
            or characters_fingerprint(own) == characters_fingerprint(tokenizer)
        ):
            continue
        raise DataError(
            f"{name} was encoded with {shown(own)}, but the run's tokenizer is {shown(tokenizer)}: the ids "
            "stand for other characters. Encode all texts with one tokenizer"
        )
