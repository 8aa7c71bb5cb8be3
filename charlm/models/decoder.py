"""A `GPT` as numbers, for the fast path of generation: which weights there are, and whether they say it all.

`charlm.generation.fast` computes a GPT by itself from `DecoderWeights`. That holds only for a model whose
parts are the ones of `layers.py`, untouched: `is_plain` says so.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn

from charlm.generation.packing import DecoderWeights, LayerWeights
from charlm.models.layers import Block, CausalSelfAttention, Dropout, FeedForward, RMSNorm
from charlm.models.ops import rotary_tables

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

    A part of another class, kind or size (an adapter, a quantised layer, a pruned network), a hook, or a
    `forward` of its own means no.
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
        and _is_as_configured(model)
    )


def _is_as_configured(model: GPT) -> bool:
    config, transformer = model.config, model.transformer
    C, F, V = config.n_embd, config.hidden_size, config.vocab_size
    blocks = list(transformer.h)
    if not all(
        isinstance(block, Block)
        and (type(block.attn), type(block.mlp), type(block.drop))
        == (CausalSelfAttention, FeedForward, Dropout)
        and (block.attn.n_head, block.attn.qk_norm) == (config.n_head, config.qk_norm)
        and block.mlp.activation == config.activation
        for block in blocks
    ):
        return False
    parts = cast("list[Block]", blocks)
    norms = [transformer.ln_f, *(norm for block in parts for norm in (block.ln_1, block.ln_2))]
    into = 2 * F if config.activation == "swiglu" else F
    linears = [
        (model.lm_head, V, C),
        *((block.attn.c_attn, 3 * C, C) for block in parts),
        *((block.attn.c_proj, C, C) for block in parts),
        *((block.mlp.c_fc, into, C) for block in parts),
        *((block.mlp.c_proj, C, F) for block in parts),
    ]
    embeddings = [(transformer.wte, V)]
    if transformer.wpe is not None:
        embeddings.append((transformer.wpe, config.block_size))
    kind = nn.LayerNorm if config.norm == "layernorm" else RMSNorm
    return (
        type(transformer.drop) is Dropout
        and (transformer.wpe is None) == (config.position == "rotary")
        and transformer.head_size == config.head_size
        and all(
            type(part) is nn.Embedding and part.weight.shape == (number, C) and part.max_norm is None
            for part, number in embeddings
        )
        and all(
            type(norm) is kind
            and norm.normalized_shape == (C,)
            and norm.eps == cast("nn.LayerNorm | RMSNorm", transformer.ln_f).eps
            and all(p.shape == (C,) for p in norm.parameters())
            for norm in norms
        )
        and all(
            type(part) is nn.Linear
            and part.weight.shape == (n_out, n_in)
            and (part.bias is None or part.bias.shape == (n_out,))
            for part, n_out, n_in in linears
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
