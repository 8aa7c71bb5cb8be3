"""Export of a GPT to ONNX, with its cache as inputs and outputs, and its vocabulary beside it.

The names are the usual ones: inputs input_ids, position_ids, past_key_values.0.key …; outputs logits,
present.0.key … . The computation of a GPT is repeated here without branches, since a graph has none; tests
compare it with the model. torch.onnx writes the file, with the packages onnx and onnxscript.
"""

from __future__ import annotations

import copy
import importlib
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from typing_extensions import override

from charlm.errors import CharLMError, InputError
from charlm.interchange.folders import check_free, exported, write_folder
from charlm.interchange.vocabulary import tokenizer_file
from charlm.lm import CharLM
from charlm.models.gpt import GPT
from charlm.models.layers import Block
from charlm.models.ops import heads, rotary_tables

__all__ = ["to_onnx"]

_MODEL, _TOKENIZER = "model.onnx", "tokenizer.json"
_MOST_BYTES = 2**31  # of one message of protobuf
_B, _T, _P = 2, 3, 5  # of the example: 0 and 1 would be taken for constants


def to_onnx(lm: CharLM, directory: str | Path, *, overwrite: bool = False) -> None:
    """Write model.onnx, and the tokenizer.json of the library tokenizers.

    The graph reads T tokens after P earlier ones. Its inputs are input_ids and position_ids, (B, T) int64,
    and for each layer i past_key_values.i.key and .value, (B, H, P, D). Its outputs are logits, (B, T, V),
    and present.i.key and .value, (B, H, P + T, D), which are the past of the next call. B, T and P are free,
    P may be 0, and P + T is at most block_size. A model with a convolution also has past_ids, (B, P) int64,
    and present_ids, (B, P + T).

    Args:
        lm: a GPT in float32 and a `CharTokenizer` or `ByteTokenizer`.
        directory: missing or empty.
        overwrite: the directory may also hold an earlier export of this function, which is replaced.

    Raises:
        InputError: the model is no GPT in float32, or larger than 2 GB, the limit of one ONNX file.
        RunExistsError: the directory holds something else.
        CheckpointWriteError: it could not be written. The earlier content is intact.
        CharLMError: onnx or onnxscript is not installed.

    Example:
        >>> from charlm import load
        >>> to_onnx(load("runs/first", mixture=False), "graph")  # doctest: +SKIP
    """
    check_free(directory, known_by=_MODEL, overwrite=overwrite)
    model = exported(lm)
    weight = model.lm_head.weight
    if weight.dtype != torch.float32 or 4 * model.num_parameters() >= _MOST_BYTES:
        raise InputError(
            f"model must be in float32 and of less than 2 GB, got {weight.dtype} and "
            f"{weight.itemsize * model.num_parameters() / 1e9:.1f} GB"
        )
    write_folder(directory, {_TOKENIZER: tokenizer_file(lm.tokenizer), _MODEL: _graph_of(model)})


class _Graph(nn.Module):
    """A GPT as a pure function: its cache is an argument and a result."""

    cos: Tensor
    sin: Tensor

    def __init__(self, gpt: GPT) -> None:
        super().__init__()
        self.gpt = gpt
        config = gpt.config
        tables = rotary_tables(0, config.block_size, config.head_size, torch.device("cpu"))
        for name, table in zip(("cos", "sin"), tables, strict=True):
            self.register_buffer(name, table.to(torch.float32))  # (block_size, D / 2)

    @override
    def forward(
        self,
        input_ids: Tensor,
        position_ids: Tensor,
        past: tuple[Tensor, ...],
        past_ids: Tensor | None = None,
    ) -> tuple[Tensor, ...]:
        """Return logits (B, T, V), alternating keys and values, (B, H, P + T, D) each, and ids if needed."""
        body, config = self.gpt.transformer, self.gpt.config
        presents: list[Tensor] = []
        kept: tuple[Tensor, ...] = ()
        if body.conv is None or past_ids is None:
            x = body.wte(input_ids)  # (B, T, C)
        else:
            ids = torch.cat([past_ids, input_ids], dim=1)  # (B, P + T)
            x = _convolved(body.wte(ids), body.conv.weight, past_ids.size(1))
            kept = (ids,)
        rotary = None
        if body.wpe is not None:
            x = x + body.wpe(position_ids)
        else:
            rotary = self.cos[position_ids][:, None], self.sin[position_ids][:, None]  # (B, 1, T, D / 2)
        for i, block in enumerate(cast("list[Block]", list(body.h))):
            qkv = block.attn.c_attn(block.ln_1(x))  # (B, T, 3 C)
            q, k, v = heads(qkv, config.n_head, rotary, qk_norm=config.qk_norm)
            k = torch.cat([past[2 * i], k], dim=2)  # (B, H, P + T, D)
            v = torch.cat([past[2 * i + 1], v], dim=2)
            presents += [k, v]
            x = x + block.attn.c_proj(_attended(q, k, v))
            x = x + block.mlp(block.ln_2(x))
        return self.gpt.lm_head(body.ln_f(x)), *presents, *kept


def _attended(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Return (B, T, C): causal attention of the last T of S tokens."""
    T, D, S = q.size(2), q.size(3), k.size(2)
    there = torch.arange(S)
    allowed = there <= there[S - T :, None]  # (T, S)
    scores = (q * D**-0.5) @ k.transpose(-2, -1)  # (B, H, T, S)
    weights: Tensor = scores.masked_fill(~allowed, -torch.inf).softmax(dim=-1)
    y = weights @ v  # (B, H, T, D)
    return y.transpose(1, 2).flatten(2)


def _convolved(x: Tensor, weight: Tensor, P: int) -> Tensor:
    """Return (B, T, C) of (B, P + T, C): `ops.causal_conv`."""
    K, T = weight.size(0), x.size(1) - P
    before = F.pad(x, (0, 0, K, 0))  # (B, K + P + T, C)
    y = x.narrow(1, P, T)
    for k in range(1, K + 1):
        y = y + weight[k - 1] * before.narrow(1, K + P - k, T)
    return y


@contextmanager
def _quietly() -> Iterator[None]:
    """Suppress messages of torch's exporter about its own parts and about packages that no GPT needs."""
    logger = logging.getLogger("torch.onnx._internal.exporter._registration")
    before = logger.disabled
    try:
        logger.disabled = True
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.disabled = before


def _graph_of(model: GPT) -> bytes:
    """Return the bytes of the ONNX file."""
    try:
        importlib.import_module("onnx")
        importlib.import_module("onnxscript")
    except ImportError as error:
        raise CharLMError(
            "charlm export --to onnx needs onnx and onnxscript: pip install onnx onnxscript"
        ) from error
    config = model.config
    layers = range(config.n_layer)
    convolved = config.conv_width > 1
    ids, positions = torch.zeros(_B, _T, dtype=torch.int64), torch.arange(_P, _P + _T).expand(_B, _T)
    past = [torch.zeros(_B, config.n_head, _P, config.head_size) for _ in layers for _ in ("key", "value")]
    B, T, P = (torch.export.Dim(name) for name in ("batch", "sequence", "past_sequence"))
    shapes: dict[str, Any] = {"input_ids": {0: B, 1: T}, "position_ids": {0: B, 1: T}}
    shapes["past"] = tuple({0: B, 2: P} for _ in past)
    given = [ids, positions, tuple(past)]
    names = [f"{i}.{kind}" for i in layers for kind in ("key", "value")]
    inputs = ["input_ids", "position_ids", *(f"past_key_values.{name}" for name in names)]
    outputs = [f"present.{name}" for name in names]
    if convolved:
        given.append(torch.zeros(_B, _P, dtype=torch.int64))
        shapes["past_ids"] = {0: B, 1: P}
        inputs, outputs = [*inputs, "past_ids"], [*outputs, "present_ids"]
    with _quietly():
        program: Any = torch.onnx.export(
            _Graph(copy.deepcopy(model).cpu()).eval(),
            tuple(given),
            dynamo=True,
            input_names=inputs,
            output_names=["logits", *outputs],
            dynamic_shapes=shapes,
            verbose=False,
        )
    data: bytes = program.model_proto.SerializeToString()
    return data
