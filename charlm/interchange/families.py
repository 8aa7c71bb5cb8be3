"""The classes of transformers that compute the same as a GPT, and their names for settings and parts.

One table serves both directions. transformers itself is not needed. A part that a class has and a GPT lacks
is set so that it does nothing: a bias of zeros, a gain of ones.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from charlm.errors import ConfigError, InputError, shown
from charlm.files.reading import refusal
from charlm.models.config import GPTConfig

__all__ = ["MAY_BE_BIASED", "Family", "family_of", "foreign_config", "known_family", "own_config"]

_ACTIVATIONS = {"relu": "relu", "gelu": "gelu", "gelu_tanh": "gelu_pytorch_tanh", "relu2": "relu2"}
_OTHER_NAMES = {"gelu_new": "gelu_tanh", "gelu_fast": "gelu_tanh", "gelu_python": "gelu"}
_BASE = 10_000.0  # of rotary positions
_ATTENTION, _MLP = ("attn.c_attn", "attn.c_proj"), ("mlp.c_fc", "mlp.c_proj")
MAY_BE_BIASED = ("ln_1", *_ATTENTION, "ln_2", *_MLP, "transformer.ln_f")
"""Parts that may have a bias in a GPT, without the head, whose bias becomes part of the last norm."""
_SETTINGS = {"effective_mlp_width": "mlp_width", "effective_attention_dropout": "attention_dropout"}
_NEEDED = ("rms_norm_eps", "use_parallel_residual")  # fields whose default there differs from ours


@dataclass(frozen=True)
class Family:
    """A class of transformers, and the settings of a GPT that it computes."""

    architecture: str
    model_type: str
    position: str
    norm: str
    qk_norm: bool
    gated: bool
    """Whether its feed-forward network is swiglu's; otherwise, any other activation is possible."""
    sizes: Mapping[str, str]
    """Our settings, by their names in the class."""
    fixed: Mapping[str, object]
    """Settings of the class that a GPT does not have, with the one value that computes the same."""
    blocks: str
    """The prefix of its blocks."""
    parts: Mapping[str, tuple[str, ...]]
    """Modules of the class, by our names; several where the class splits the rows of one of ours."""
    qk_gains: tuple[str, ...] = ()
    """Norms of queries and keys, which have gains in the class."""
    biased: tuple[str, ...] = ()
    """Parts that always have a bias in the class."""
    may_be_biased: Mapping[str, tuple[str, ...]] | None = None
    """Parts that have a bias if the setting of this name is true."""
    transposed: bool = False
    """Whether the matrices of its blocks are transposed."""
    interleaved: bool = False
    """Whether the rows of queries, keys and values alternate, head by head."""

    def places(self, n_layer: int) -> Iterator[tuple[str, str, list[str]]]:
        """Yield the name of each module of a GPT, of its part, and of its modules in the class."""
        for part, theirs in self.parts.items():
            if part.startswith(("transformer.", "lm_head")):
                yield part, part, list(theirs)
            else:
                for i in range(n_layer):
                    yield f"transformer.h.{i}.{part}", part, [f"{self.blocks}.{i}.{name}" for name in theirs]


_GPT2 = Family(
    "GPT2LMHeadModel",
    "gpt2",
    position="learned",
    norm="layernorm",
    qk_norm=False,
    gated=False,
    sizes={
        "vocab_size": "vocab_size",
        "n_positions": "block_size",
        "n_layer": "n_layer",
        "n_head": "n_head",
        "n_embd": "n_embd",
        "n_inner": "effective_mlp_width",
        "resid_pdrop": "dropout",
        "embd_pdrop": "dropout",
        "attn_pdrop": "effective_attention_dropout",
    },
    fixed={
        "layer_norm_epsilon": 1e-5,
        "scale_attn_weights": True,
        "scale_attn_by_inverse_layer_idx": False,
        "add_cross_attention": False,
    },
    blocks="transformer.h",
    parts={
        "transformer.wte": ("transformer.wte",),
        "transformer.wpe": ("transformer.wpe",),
        **{part: (part,) for part in ("ln_1", *_ATTENTION, "ln_2", *_MLP)},
        "transformer.ln_f": ("transformer.ln_f",),
        "lm_head": ("lm_head",),
    },
    biased=MAY_BE_BIASED,
    transposed=True,
)

_LLAMA = Family(
    "LlamaForCausalLM",
    "llama",
    position="rotary",
    norm="rmsnorm",
    qk_norm=False,
    gated=True,
    sizes={
        "vocab_size": "vocab_size",
        "max_position_embeddings": "block_size",
        "num_hidden_layers": "n_layer",
        "num_attention_heads": "n_head",
        "num_key_value_heads": "n_head",
        "hidden_size": "n_embd",
        "head_dim": "head_size",
        "intermediate_size": "effective_mlp_width",
        "attention_dropout": "effective_attention_dropout",
    },
    fixed={"rms_norm_eps": 1e-6},
    blocks="model.layers",
    parts={
        "transformer.wte": ("model.embed_tokens",),
        "ln_1": ("input_layernorm",),
        "attn.c_attn": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        "attn.c_proj": ("self_attn.o_proj",),
        "ln_2": ("post_attention_layernorm",),
        "mlp.c_fc": ("mlp.gate_proj", "mlp.up_proj"),
        "mlp.c_proj": ("mlp.down_proj",),
        "transformer.ln_f": ("model.norm",),
        "lm_head": ("lm_head",),
    },
    may_be_biased={"attention_bias": _ATTENTION, "mlp_bias": _MLP},
)

_ARCEE = replace(
    _LLAMA,
    architecture="ArceeForCausalLM",
    model_type="arcee",
    gated=False,
    parts={**_LLAMA.parts, "mlp.c_fc": ("mlp.up_proj",)},
)

_QWEN3 = replace(
    _LLAMA,
    architecture="Qwen3ForCausalLM",
    model_type="qwen3",
    qk_norm=True,
    fixed={**_LLAMA.fixed, "use_sliding_window": False},
    qk_gains=("self_attn.q_norm", "self_attn.k_norm"),
    may_be_biased={"attention_bias": _ATTENTION},
)

_APERTUS = replace(
    _QWEN3,
    architecture="ApertusForCausalLM",
    model_type="apertus",
    gated=False,
    fixed=_LLAMA.fixed,
    parts={**_ARCEE.parts, "ln_1": ("attention_layernorm",), "ln_2": ("feedforward_layernorm",)},
)

_NEOX = Family(
    "GPTNeoXForCausalLM",
    "gpt_neox",
    position="rotary",
    norm="layernorm",
    qk_norm=False,
    gated=False,
    sizes={
        "vocab_size": "vocab_size",
        "max_position_embeddings": "block_size",
        "num_hidden_layers": "n_layer",
        "num_attention_heads": "n_head",
        "hidden_size": "n_embd",
        "intermediate_size": "effective_mlp_width",
        "hidden_dropout": "dropout",
        "attention_dropout": "effective_attention_dropout",
    },
    fixed={"layer_norm_eps": 1e-5, "use_parallel_residual": False, "attention_bias": True},
    blocks="gpt_neox.layers",
    parts={
        "transformer.wte": ("gpt_neox.embed_in",),
        "ln_1": ("input_layernorm",),
        "attn.c_attn": ("attention.query_key_value",),
        "attn.c_proj": ("attention.dense",),
        "ln_2": ("post_attention_layernorm",),
        "mlp.c_fc": ("mlp.dense_h_to_4h",),
        "mlp.c_proj": ("mlp.dense_4h_to_h",),
        "transformer.ln_f": ("gpt_neox.final_layer_norm",),
        "lm_head": ("embed_out",),
    },
    biased=MAY_BE_BIASED,
    interleaved=True,
)

_FAMILIES = (_GPT2, _LLAMA, _ARCEE, _QWEN3, _APERTUS, _NEOX)


def family_of(config: GPTConfig) -> Family:
    """Return the class that computes the same as a GPT of these settings.

    Raises:
        InputError: there is none; the message names the fields that prevent it.
    """
    layernorm, gated = config.norm == "layernorm", config.activation == "swiglu"
    problems = []
    if config.conv_width > 1:
        problems += [
            f"conv_width must be 1, got {config.conv_width} (charlm train --conv-width 1; ONNX takes any)"
        ]
    if config.position == "learned" and not layernorm:
        problems += ["norm must be 'layernorm' where position is 'learned', got 'rmsnorm'"]
    if layernorm and config.qk_norm:
        problems += ["qk_norm must be False where norm is 'layernorm', got True"]
    if layernorm and gated:
        problems += ["activation must not be 'swiglu' where norm is 'layernorm'"]
    if not layernorm and config.qk_norm and config.bias:
        problems += ["bias must be False where norm is 'rmsnorm' and qk_norm is True, got True"]
    if not layernorm and config.head_bias:
        problems += ["head_bias must be False where norm is 'rmsnorm', got True"]
    if problems:
        raise InputError(f"no class of transformers computes the same as this GPT: {'; '.join(problems)}")
    kind = (config.position, config.norm, config.qk_norm, gated)
    return next(f for f in _FAMILIES if (f.position, f.norm, f.qk_norm, f.gated) == kind)


def foreign_config(config: GPTConfig, family: Family) -> dict[str, object]:
    """Return the settings with which the class computes the same as a GPT.

    The special ids are None, because the defaults of a class exceed a vocabulary of characters.
    """
    values: dict[str, object] = {"architectures": [family.architecture], "model_type": family.model_type}
    values |= {theirs: getattr(config, ours) for theirs, ours in family.sizes.items()}
    act = "silu" if family.gated else _ACTIVATIONS[config.activation]
    values |= {_activation_field(family): act, **family.fixed}
    for setting, parts in (family.may_be_biased or {}).items():
        values[setting] = config.bias or (config.qkv_bias and "attn.c_attn" in parts)
    values["tie_word_embeddings"] = config.tie_weights
    if family.position == "rotary":  # rope_parameters for version 5 of transformers, the others for 4
        share: dict[str, object] = {"partial_rotary_factor": 1.0} if family is _NEOX else {}
        values["rope_parameters"] = {"rope_type": "default", "rope_theta": _BASE, **share}
        values |= {"rope_theta": _BASE, "rope_scaling": None}
        if family is _NEOX:
            values |= {"rotary_emb_base": _BASE, "rotary_pct": 1.0}
    return {**values, "bos_token_id": None, "eos_token_id": None, "pad_token_id": None}


def known_family(values: Mapping[str, Any], path: str) -> Family:
    """Return the class of a config.json of transformers.

    Raises:
        FileFormatError: no GPT computes the same as that class.
    """
    kind = values.get("model_type")
    for family in _FAMILIES:
        if family.model_type == kind:
            return family
    types = ", ".join(family.model_type for family in _FAMILIES)
    raise refusal(path, f"must hold one of {types} in 'model_type', got {shown(kind)}.")


def own_config(values: Mapping[str, Any], family: Family, path: str) -> GPTConfig:
    """Return the settings of a GPT from a config.json of transformers, without biases.

    Raises:
        FileFormatError: no GPT computes the same, or a field is wrong.
    """
    field = _activation_field(family)
    activation = values.get(field)
    ours_of = {theirs: ours for ours, theirs in _ACTIVATIONS.items()} | _OTHER_NAMES
    ours_of = {"silu": "swiglu", "swish": "swiglu"} if family.gated else ours_of
    if not isinstance(activation, str) or activation not in ours_of:
        raise refusal(path, f"must hold one of {', '.join(ours_of)} in '{field}', got {shown(activation)}.")
    fields: dict[str, object] = {
        "position": family.position,
        "norm": family.norm,
        "qk_norm": family.qk_norm,
        "dropout": 0.0,
        "bias": False,
        "qkv_bias": False,
        "head_bias": False,
        "activation": ours_of[activation],
    }
    for theirs, ours in reversed([*family.sizes.items()]):  # the first of several for one setting counts
        fields[_SETTINGS.get(ours, ours)] = values.get(theirs)
    fields["dropout"] = fields["dropout"] or 0.0
    fields.pop("head_size", None)
    try:
        config = GPTConfig.from_dict(fields)
    except ConfigError as error:
        raise refusal(path, f"holds no settings of a GPT: {error}.") from error
    sizes = {theirs: getattr(config, ours) for theirs, ours in family.sizes.items() if "drop" not in ours}
    for name, expected in {**sizes, **family.fixed}.items():
        value = values.get(name)
        if value != expected and (value is not None or name in _NEEDED):
            raise refusal(path, f"must hold {shown(expected)} in '{name}' to be a GPT, got {shown(value)}.")
    if family.position == "rotary":
        _check_rotation(values, family, path)
    return config


def _activation_field(family: Family) -> str:
    return "activation_function" if family is _GPT2 else "hidden_act"


def _check_rotation(values: Mapping[str, Any], family: Family, path: str) -> None:
    """Refuse rotary positions that differ from ours, in the fields of transformers 4 or 5."""
    field = values.get("rope_parameters") or values.get("rope_scaling") or {}
    rope: Mapping[str, Any] = field if isinstance(field, dict) else {"rope_type": field}
    default = None if family is _APERTUS else _BASE
    theta = values.get("rope_theta", values.get("rotary_emb_base", default))
    given = {
        "rope_type": rope.get("rope_type", rope.get("type", "default")),
        "rope_theta": rope.get("rope_theta", theta),
        "partial_rotary_factor": rope.get(
            "partial_rotary_factor", values.get("rotary_pct", None if family is _NEOX else 1.0)
        ),
    }
    ours = {"rope_type": "default", "rope_theta": _BASE, "partial_rotary_factor": 1.0}
    for name, value in ours.items():
        if given[name] != value:
            raise refusal(
                path, f"must hold {shown(value)} in '{name}' to be a GPT, got {shown(given[name])}."
            )
