"""A `GPT` as numbers, for the fast path of generation: which weights there are, and whether they say it all.

`charlm.generation.fast` computes a GPT by itself from `DecoderWeights`. That holds only for a model whose
parts are the ones of `layers.py`, untouched: `is_plain` says so.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn

from charlm.generation.fast import DecoderWeights, LayerWeights
from charlm.models.layers import Block, CausalSelfAttention, Dropout, FeedForward, RMSNorm, rotary_tables

if TYPE_CHECKING:
    from charlm.models.gpt import GPT

__all__ = ["decoder_weights", "is_plain"]

_LONGEST = 65_536  # positions whose angles are kept
_PARTS = {
    *(Block, CausalSelfAttention, FeedForward, Dropout, RMSNorm),
    *(nn.LayerNorm, nn.Linear, nn.Embedding, nn.ModuleList),
}


def is_plain(model: GPT) -> bool:
    """Return whether nothing but the parameters decides what the model computes.

    A part of another class (an adapter, a quantised layer), a hook, or a `forward` of its own means no.
    """
    ours = {model, model.transformer}  # whose classes the caller knows
    return (
        model.block_size <= _LONGEST
        and not torch.compiler.is_compiling()
        and not torch._C._are_functorch_transforms_active()
        and not nn.modules.module._global_forward_hooks
        and not nn.modules.module._global_forward_pre_hooks
        and all(
            (type(part) in _PARTS or part in ours)
            and not part._forward_hooks
            and not part._forward_pre_hooks
            and "forward" not in part.__dict__
            for part in model.modules()
        )
    )


def decoder_weights(model: GPT) -> DecoderWeights:
    """Return the parameters by their part in the computation; nothing is copied."""
    config, transformer = model.config, model.transformer
    layers = []
    for block in cast("list[Block]", list(transformer.h)):
        attn, mlp = block.attn, block.mlp
        layers.append(
            LayerWeights(
                norm_1=_norm(block.ln_1),
                qkv=(attn.c_attn.weight, attn.c_attn.bias),
                project=(attn.c_proj.weight, attn.c_proj.bias),
                norm_2=_norm(block.ln_2),
                up=(mlp.c_fc.weight, mlp.c_fc.bias),
                down=(mlp.c_proj.weight, mlp.c_proj.bias),
            )
        )
    rotary = None
    if config.position == "rotary":
        rotary = rotary_tables(0, config.block_size, config.head_size, torch.device("cpu"))
    return DecoderWeights(
        n_head=config.n_head,
        block_size=config.block_size,
        norm=config.norm,
        norm_eps=cast("nn.LayerNorm | RMSNorm", transformer.ln_f).eps or 0.0,
        qk_eps=1e-6 if config.qk_norm else None,
        activation=config.activation,
        token_embedding=transformer.wte.weight,
        position_embedding=None if transformer.wpe is None else transformer.wpe.weight,
        rotary=rotary,
        layers=layers,
        norm_out=_norm(transformer.ln_f),
        head=(model.lm_head.weight, model.lm_head.bias),
    )


def _norm(norm: nn.Module) -> tuple[Tensor | None, Tensor | None]:
    """Return gain and shift."""
    return getattr(norm, "weight", None), getattr(norm, "bias", None)
