"""A GPT written from the formulas, one row, one head and one character at a time.

An oracle for `charlm.models`: it shares no code with it. It takes the settings and a state_dict and
computes logits with scalars and vectors in Python loops; gradients come through autograd.

    x_t  = E[id_t] (+ sum_k w_k E[id_(t - k)]) (+ P[t])
    x   += proj(concat_h softmax(q_t . k_s / sqrt D, s <= t) v_s),   q, k, v from norm(x)
    x   += c_proj(activation(c_fc(norm(x))))
    logits = W_out norm(x) + b
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from charlm.models.config import GPTConfig

__all__ = ["plain_logits", "plain_loss", "plain_weights"]


def plain_logits(config: GPTConfig, state: Mapping[str, Tensor], idx: Tensor) -> Tensor:
    """Return the logits (B, T, V) of ids (B, T), without dropout."""
    return torch.stack([_row(config, state, row)[0] for row in idx.tolist()])


def plain_weights(config: GPTConfig, state: Mapping[str, Tensor], idx: Tensor) -> Tensor:
    """Return the attention weights (L, B, H, T, T) of ids (B, T): 0 where a character may not look."""
    B, T = idx.shape
    weights = torch.zeros(config.n_layer, B, config.n_head, T, T)
    for b, row in enumerate(idx.tolist()):
        for layer, heads in enumerate(_row(config, state, row)[1]):
            for head, shares in enumerate(heads):
                for t, share in enumerate(shares):
                    weights[layer, b, head, t, : t + 1] = share
    return weights


def plain_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Return the mean of -log p(target) in nats, leaving out targets of -1."""
    losses = []
    for row, wanted in zip(logits, targets.tolist(), strict=True):
        for scores, target in zip(row, wanted, strict=True):
            if target != -1:
                largest = float(scores.detach().max())
                losses.append((scores - largest).exp().sum().log() + largest - scores[target])
    return torch.stack(losses).sum() / len(losses)


def _row(
    config: GPTConfig, state: Mapping[str, Tensor], ids: list[int]
) -> tuple[Tensor, list[list[list[Tensor]]]]:
    """Return logits (T, V), and for each layer, head and character t the t + 1 weights of what it sees."""
    stream, layers = [], []
    for t, i in enumerate(ids):
        x = state["transformer.wte.weight"][i]
        for k in range(1, min(config.conv_width - 1, t) + 1):
            x = x + state["transformer.conv.weight"][k - 1] * state["transformer.wte.weight"][ids[t - k]]
        if config.position == "learned":
            x = x + state["transformer.wpe.weight"][t]
        stream.append(x)
    for layer in range(config.n_layer):
        part = f"transformer.h.{layer}."
        normed = [_norm(config, state, part + "ln_1", x) for x in stream]
        gathered, weights = _attention(config, state, part + "attn.", normed)
        layers.append(weights)
        stream = [x + y for x, y in zip(stream, gathered, strict=True)]
        stream = [
            x + _feed_forward(config, state, part + "mlp.", _norm(config, state, part + "ln_2", x))
            for x in stream
        ]
    outputs = [_linear(state, "lm_head", _norm(config, state, "transformer.ln_f", x)) for x in stream]
    return torch.stack(outputs), layers


def _linear(state: Mapping[str, Tensor], name: str, x: Tensor) -> Tensor:
    y = state[name + ".weight"].mv(x)
    bias = state.get(name + ".bias")
    return y if bias is None else y + bias


def _norm(config: GPTConfig, state: Mapping[str, Tensor], name: str, x: Tensor) -> Tensor:
    if config.norm == "rmsnorm":
        return _unit_rms(x)  # it has no parameters
    centred = x - x.sum() / len(x)
    y = state[name + ".weight"] * centred / ((centred**2).sum() / len(x) + 1e-5).sqrt()
    bias = state.get(name + ".bias")
    return y if bias is None else y + bias


def _unit_rms(x: Tensor) -> Tensor:
    return x / ((x**2).sum() / len(x) + 1e-6).sqrt()


def _turned(x: Tensor, position: int) -> Tensor:
    """Turn the pairs (x[i], x[i + D/2]) as points of a plane, pair i by position / 10000**(2i/D)."""
    D = len(x)
    turned: list[Tensor] = [x.new_zeros(())] * D
    for i in range(D // 2):
        angle = position / 10_000.0 ** (2 * i / D)
        a, b = x[i], x[i + D // 2]
        turned[i] = a * math.cos(angle) - b * math.sin(angle)
        turned[i + D // 2] = a * math.sin(angle) + b * math.cos(angle)
    return torch.stack(turned)


def _attention(
    config: GPTConfig, state: Mapping[str, Tensor], part: str, xs: list[Tensor]
) -> tuple[list[Tensor], list[list[Tensor]]]:
    C, H = config.n_embd, config.n_head
    D = C // H
    joined = [_linear(state, part + "c_attn", x) for x in xs]  # T times (3 C,): all q, all k, all v
    heads: list[list[Tensor]] = [[] for _ in xs]
    shares: list[list[Tensor]] = [[] for _ in range(H)]
    for head in range(H):
        queries, keys, values = [], [], []
        for t, qkv in enumerate(joined):
            q, k, v = (qkv[kind * C + head * D : kind * C + (head + 1) * D] for kind in range(3))
            if config.qk_norm:
                q, k = _unit_rms(q), _unit_rms(k)
            if config.position == "rotary":
                q, k = _turned(q, t), _turned(k, t)
            queries.append(q)
            keys.append(k)
            values.append(v)
        for t, q in enumerate(queries):
            likeness = torch.stack([q.dot(keys[s]) / math.sqrt(D) for s in range(t + 1)]).exp()
            weights = likeness / likeness.sum()
            shares[head].append(weights)
            heads[t].append(sum((weights[s] * values[s] for s in range(t + 1)), torch.zeros_like(q)))
    return [_linear(state, part + "c_proj", torch.cat(parts)) for parts in heads], shares


def _feed_forward(config: GPTConfig, state: Mapping[str, Tensor], part: str, x: Tensor) -> Tensor:
    x = _linear(state, part + "c_fc", x)
    if config.activation == "swiglu":
        half = len(x) // 2
        x = x[:half] / (1 + (-x[:half]).exp()) * x[half:]
    elif config.activation == "gelu":
        x = x * (1 + torch.erf(x / math.sqrt(2))) / 2
    elif config.activation == "gelu_tanh":
        x = x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))) / 2
    else:
        x = torch.where(x > 0, x, torch.zeros_like(x)) ** (2 if config.activation == "relu2" else 1)
    return _linear(state, part + "c_proj", x)
