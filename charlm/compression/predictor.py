"""Engines for compression, whose results are the same on every machine, and the digest of a model."""

from __future__ import annotations

import copy
import ctypes
import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import fields
from functools import cached_property

import torch
from torch import Tensor
from typing_extensions import override

from charlm.backends.traits import is_host
from charlm.compression.plain_ngram import PlainNGram
from charlm.compression.portable import gate_weights, rotary_tables
from charlm.config import Config
from charlm.errors import InputError
from charlm.generation.engine import Engine, TorchEngine
from charlm.generation.state import PredictionState
from charlm.models.base import LanguageModel
from charlm.models.bigram import BigramLM
from charlm.models.gpt import GPT
from charlm.models.mixture import MixtureLM
from charlm.models.ngram import NGramLM
from charlm.native.engine import NativeEngine
from charlm.native.gpt import NativeGPT, why_not_gpt
from charlm.native.library import portable_library
from charlm.native.mixture import NativeMixture
from charlm.native.ngram import NativeNGram
from charlm.native.weights import Weights
from charlm.text.tokenizer import Tokenizer

__all__ = ["EngineMaker", "begun", "engine_maker", "model_sha256"]

EngineMaker = Callable[[int], Engine]
"""Makes an engine for a number of rows."""


def engine_maker(model: LanguageModel) -> EngineMaker:
    """Return a maker of engines with the same bits on every machine, for any number of rows and threads.

    Raises:
        InputError: the model has no such engine; the message has the reason.
    """
    if not is_host(model.device):
        raise InputError(f"to compress, a model must be on the CPU, and this one is on {model.device}")
    if type(model) is BigramLM:  # its logits are its table
        return lambda rows: TorchEngine(model, rows)
    if type(model) is NGramLM:
        if not _is_plain(model):
            raise InputError("the n-gram model's tables are not as `fit` makes them on a CPU; load it anew")
    elif type(model) not in {GPT, MixtureLM}:
        raise InputError(
            f"a {type(model).__name__} cannot compress: it takes a GPT, an n-gram model, a mixture of them, "
            "or a bigram model, of which every machine computes the same bits"
        )
    kernel = portable_library()
    if not isinstance(kernel, str):
        return _native_maker(kernel, model)
    if isinstance(model, NGramLM):
        return lambda rows: PlainNGram(model, rows)
    raise InputError(
        f"to compress with a {type(model).__name__} takes the compiled engine, and {kernel}. PyTorch's "
        "results differ from machine to machine; an n-gram model does without"
    )


def _native_maker(kernel: ctypes.CDLL, model: LanguageModel) -> EngineMaker:
    """Return a maker of compiled engines for a model or a member."""
    if type(model) is NGramLM and _is_plain(model):
        return lambda rows: NativeNGram(kernel, model, rows)
    if type(model) is GPT:
        if (reason := why_not_gpt(model)) is not None:
            raise InputError(
                f"to compress with a GPT takes the compiled engine, which does not apply: {reason}"
            )
        own = copy.deepcopy(model)  # packed weights are cached by model, and these have other angles
        tables = rotary_tables(model.block_size, model.config.head_size)
        weights = Weights(kernel, own, lambda: tables)
        return lambda rows: NativeGPT(weights, own.block_size, rows)
    if isinstance(model, MixtureLM):
        makers = [_native_maker(kernel, member) for member in model._members]
        return lambda rows: _PortableMixture(
            kernel, model, [one for make in makers if isinstance(one := make(rows), NativeEngine)], rows
        )
    raise InputError(
        f"a mixture with a {type(model).__name__} cannot compress, only one of GPTs and n-gram models"
    )


class _PortableMixture(NativeMixture):
    """A mixture whose gate is computed without PyTorch, and once, since no weight changes meanwhile."""

    @cached_property
    def _gate(self) -> Tensor:
        return gate_weights(self._model.gate.detach().float().numpy())

    @override
    def _weights(self) -> Tensor:
        return self._gate


def _is_plain(model: NGramLM) -> bool:
    floats = (model.discounts, model.window_shares)
    integers = (model.codes.dtype, model.counts.dtype) == (torch.int64, torch.int32)
    return integers and all(t.dtype == torch.float32 for t in floats)


def begun(make: EngineMaker, first: Sequence[int], rows: int = 1) -> PredictionState:
    """Return a state with the context of an empty prompt in all rows."""
    state = PredictionState(make(rows), overflow="restart")
    state.observe(torch.tensor([list(first)] * rows))
    return state


def model_sha256(model: LanguageModel, tokenizer: Tokenizer) -> str:
    """Return the digest of a model: of its kind, its settings except defaults, vocabulary and weights."""
    told = {"kind": model.kind, "config": _settings(model.config), "tokenizer": tokenizer.to_dict()}
    digest = hashlib.sha256(json.dumps(told, sort_keys=True).encode())
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        whole = tensor.detach().cpu().contiguous().flatten()
        digest.update(whole.view(torch.uint8).numpy().tobytes() if whole.numel() else b"")
    return digest.hexdigest()


def _settings(config: Config) -> dict[str, object]:
    """Return the fields that differ from their defaults, so that fields of a later version change nothing."""
    values = {field.name: (getattr(config, field.name), field.default) for field in fields(config)}
    return {name: _plain(value) for name, (value, default) in values.items() if value != default}


def _plain(value: object) -> object:
    if isinstance(value, Config):
        return _settings(value)
    return [_plain(one) for one in value] if isinstance(value, list | tuple) else value
