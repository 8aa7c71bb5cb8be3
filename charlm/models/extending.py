"""Extends a model to a larger vocabulary or another window; the old parameters are kept, bit for bit.

Every old row of every parameter is copied. The row of a new id is the mean of the old rows, so it begins as
an average token (Hewitt, "Initializing new word embeddings for pretrained language models", 2021). The shapes
of the two models show where the rows are. This module knows no tokenizer.
"""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import Tensor

from charlm.config import Config
from charlm.errors import ConfigError, InputError, quoted
from charlm.locks import GENERATORS
from charlm.models.base import LanguageModel
from charlm.models.config import GPTConfig, ModelConfig
from charlm.models.contents import Contents, unique_tensors
from charlm.models.mixture import MixtureLM
from charlm.models.ngram import NGramLM
from charlm.modes import without_draws

__all__ = ["extended"]

ModelT = TypeVar("ModelT", bound=LanguageModel)

_POSITIONS = "transformer.wpe.weight"


def extended(model: ModelT, vocab_size: int, **changes: object) -> ModelT:
    """Return a copy of a model with a larger vocabulary.

    Args:
        model: a model of learnt parameters; it does not change.
        vocab_size: V of the copy, at least that of the model.
        changes: settings of a `GPT` that change no other parameter: block_size, dropout and
            attention_dropout. With learned positions, a window can only get shorter.

    Returns:
        A model of the same class, type and device. Its logits for old ids are those of the model.

    Raises:
        InputError: the model counts n-grams, or the rows of a parameter do not belong to ids.
        ConfigError: a change is wrong, or would need other parameters.

    Example:
        >>> from charlm import GPT
        >>> model = GPT.from_config("cpu-10s", vocab_size=3)
        >>> larger = extended(model, 5, block_size=128)
        >>> torch.equal(larger.lm_head.weight[:3], model.lm_head.weight), larger.block_size
        (True, 128)
    """
    if isinstance(model, NGramLM | MixtureLM):
        raise InputError(
            f"{_a(model)} counts characters and cannot be extended: count the new text instead, with "
            "NGramLM(vocab_size).fit(data), or extend the GPT (of a run: load(run, mixture=False))"
        )
    if vocab_size < model.vocab_size:
        raise InputError(f"vocab_size must be at least the model's {model.vocab_size}, got {vocab_size}")
    config = _changed(model.config, vocab_size, changes)
    with GENERATORS.lock, torch.random.fork_rng(devices=[]), torch.device("cpu"), without_draws():
        larger = type(model).from_config(config)
    old = Contents.of(model)
    like = next(iter(old.tensors.values()))
    larger.to(device=like.device, dtype=like.dtype if like.is_floating_point() else None)
    shapes = {name: tensor.shape for name, tensor in unique_tensors(larger).items()}
    if shapes.keys() != old.tensors.keys():
        raise InputError(f"{_a(model)} cannot be extended: a larger one has other parameters")
    tensors = {
        name: _grown(model, name, tensor, shapes[name], cut=name == _POSITIONS)
        for name, tensor in old.tensors.items()
    }
    Contents(tensors, old.passing, old.extra).put_into(larger)
    for part, before in zip(larger.modules(), model.modules(), strict=True):
        part.training = before.training
    return larger


def _changed(config: ModelConfig, vocab_size: int, changes: dict[str, object]) -> Config:
    """Return the settings of the copy."""
    if wrong := sorted(changes.keys() - {"block_size", "dropout", "attention_dropout"}):
        raise ConfigError(
            f"a model that is extended keeps its shape, so {', '.join(wrong)} cannot change; block_size, "
            "dropout and attention_dropout can"
        )
    new = config.replace(vocab_size=vocab_size, **changes)
    longest = config.block_size if isinstance(config, GPTConfig) and config.position == "learned" else None
    if longest is not None and isinstance(new, GPTConfig) and new.block_size > longest:
        raise ConfigError(
            f"block_size must be at most {longest}, got {new.block_size}: the model has learnt so "
            "many positions and knows no others; one with rotary positions could see further"
        )
    return new


def _grown(model: LanguageModel, name: str, old: Tensor, shape: torch.Size, *, cut: bool) -> Tensor:
    """Return a tensor of another shape: with rows of the mean appended, or cut."""
    if cut:
        return old[: shape[0]]
    V = model.vocab_size
    for axis, (before, after) in enumerate(zip(old.shape, shape, strict=True)):
        if before == after:
            continue
        if before != V or not old.is_floating_point():
            raise InputError(
                f"{_a(model)} cannot be extended: its {quoted(name, 80)} of shape {tuple(old.shape)} has "
                "rows that are not characters"
            )
        mean = old.double().mean(dim=axis, keepdim=True).to(old.dtype)
        old = torch.cat([old, mean.repeat_interleave(after - before, dim=axis)], dim=axis)
    return old


def _a(model: LanguageModel) -> str:
    return f"a model of the kind {quoted(model.kind, 40)}"
