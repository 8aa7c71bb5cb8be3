"""Export of a GPT and its tokenizer to a directory of transformers, and import; transformers is not needed.

`AutoModelForCausalLM.from_pretrained` and `AutoTokenizer.from_pretrained` read the directory, without code
of ours. `families` chooses the class. config.json also has our settings, under "charlm", for the import; they
are ignored if the weights contradict them.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from charlm.errors import CheckpointError, ConfigError, InputError, quoted
from charlm.files import safetensors, strict_json
from charlm.files.reading import read_file, refusal
from charlm.interchange.families import (
    MAY_BE_BIASED,
    Family,
    family_of,
    foreign_config,
    known_family,
    own_config,
)
from charlm.interchange.folders import built, check_free, exported, write_folder
from charlm.interchange.pickled import read_state
from charlm.interchange.vocabulary import MAX_BYTES, known_tokenizer, tokenizer_file, tokenizer_from
from charlm.lm import CharLM
from charlm.models.config import GPTConfig
from charlm.models.gpt import GPT
from charlm.plain import as_path
from charlm.text.tokenizer import Tokenizer

__all__ = ["from_transformers", "to_transformers"]

_CONFIG, _WEIGHTS, _PICKLED = "config.json", "model.safetensors", "pytorch_model.bin"
_TOKENIZER, _TOKENIZER_CONFIG = "tokenizer.json", "tokenizer_config.json"
_RECORD = "charlm"  # the field with our settings
_BUFFERS = (".attn.bias", ".attn.masked_bias", ".attention.bias", ".attention.masked_bias", ".inv_freq")
_CLOSE = 1e-5  # largest difference of logits after a bias was moved


def to_transformers(lm: CharLM, directory: str | Path, *, overwrite: bool = False) -> str:
    """Write a GPT and its tokenizer as a directory that transformers can read.

    Args:
        lm: a GPT and a `CharTokenizer` or `ByteTokenizer`.
        directory: missing or empty.
        overwrite: the directory may also hold an earlier export of this function, which is replaced.

    Returns:
        The name of the class of transformers.

    Raises:
        InputError: transformers has no class that computes the same; the message names the fields.
        RunExistsError: the directory holds something else.
        CheckpointWriteError: it could not be written. The earlier content is intact.

    Example:
        >>> import tempfile
        >>> from charlm import GPT, CharTokenizer
        >>> lm = CharLM(GPT.from_config("cpu-1min", vocab_size=3), CharTokenizer("abc"))
        >>> to_transformers(lm, tempfile.mkdtemp() + "/folder")
        'ApertusForCausalLM'
    """
    check_free(directory, known_by=_TOKENIZER_CONFIG, overwrite=overwrite)
    model = exported(lm)
    family = family_of(model.config)
    own = model.config
    config = own.replace(head_bias=False, bias=own.bias or own.head_bias)  # the last norm replaces it
    values = foreign_config(config, family)
    values |= {"torch_dtype": str(model.lm_head.weight.dtype).removeprefix("torch.")}
    values[_RECORD] = config.to_dict()
    write_folder(
        directory,
        {
            _CONFIG: strict_json.dumps(values),
            _TOKENIZER: tokenizer_file(lm.tokenizer),
            _TOKENIZER_CONFIG: strict_json.dumps(
                {
                    "tokenizer_class": "PreTrainedTokenizerFast",
                    "clean_up_tokenization_spaces": False,
                    "model_max_length": config.block_size,
                }
            ),
            _WEIGHTS: safetensors.dumps(_foreign_tensors(model, family), {"format": "pt"}),
        },
    )
    return family.architecture


def from_transformers(directory: str | Path, vocabulary: str | Path | Tokenizer | None = None) -> CharLM:
    """Read a model of transformers that is a GPT of characters or bytes, onto the CPU.

    The gains of RMSNorm are multiplied into the matrices that follow them.

    Args:
        directory: a directory of `save_pretrained` of model and tokenizer, or of `to_transformers`.
        vocabulary: the model's tokenizer, or nanoGPT's meta.pkl; None: the directory's tokenizer.json.

    Raises:
        CheckpointError: a file is missing.
        FileFormatError: no GPT computes the same as the model, or its vocabulary holds more than single
            characters or the 256 bytes; the message names the field, tensor or entry.
        InputError: the given vocabulary has another size.

    Example:
        >>> import tempfile
        >>> from charlm import GPT, CharTokenizer
        >>> folder = tempfile.mkdtemp() + "/folder"
        >>> lm = CharLM(GPT.from_config("cpu-1min", vocab_size=3), CharTokenizer("abc"))
        >>> _ = to_transformers(lm, folder)
        >>> from_transformers(folder).tokenizer
        <CharTokenizer of 3 characters: 'abc'>
    """
    folder = as_path(directory)
    path = str(folder / _CONFIG)
    values = strict_json.loads(_read(folder, _CONFIG, strict_json.MAX_BYTES), path=path)
    family = known_family(values, path)
    config = own_config(values, family, path)
    if vocabulary is None:
        data = _read(folder, _TOKENIZER, MAX_BYTES)
        tokenizer, order = tokenizer_from(data, str(folder / _TOKENIZER))
    else:
        tokenizer, order = known_tokenizer(vocabulary), None
    if (folder / _WEIGHTS).exists() or not (folder / _PICKLED).exists():
        weights = str(folder / _WEIGHTS)
        stored, _ = safetensors.loads(_read(folder, _WEIGHTS, 2**48), path=weights)
    else:
        weights = str(folder / _PICKLED)
        stored = read_state(folder / _PICKLED)
    try:
        own, fields = _own_tensors(stored, config, family, weights)
        if order is not None:
            for name in {"transformer.wte.weight", "lm_head.weight"} & own.keys():
                own[name] = own[name][order]
    except (RuntimeError, IndexError) as error:  # torch's own; `built` looks at shapes, but only at the end
        raise refusal(weights, f"must hold tensors of the shapes that {_CONFIG} says, got others.") from error
    (head,) = family.parts["lm_head"]
    if values.get("tie_word_embeddings") is True and f"{head}.weight" in stored and not fields["tie_weights"]:
        raise refusal(weights, "must hold one matrix as embedding and head, which are tied, got two.")
    config = _with_record(config.replace(**fields), values.get(_RECORD))
    return CharLM(built(_with_biases(own, config, family), config, weights), tokenizer)


def _read(folder: Path, name: str, max_bytes: int) -> bytearray:
    try:
        return read_file(folder / name, max_bytes=max_bytes)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise CheckpointError(
            f"no model of transformers in {quoted(str(folder))}: it has no {name}"
        ) from error


# Export


def _foreign_tensors(model: GPT, family: Family) -> dict[str, Tensor]:
    """Return the tensors for the class."""
    config = model.config
    own = {name: tensor.detach() for name, tensor in model.state_dict().items()}
    if config.head_bias:
        own["transformer.ln_f.bias"] = _shift_for(model)
        del own["lm_head.bias"]
    biased = {*family.biased}
    for parts in (family.may_be_biased or {}).values():
        if config.bias or (config.qkv_bias and "attn.c_attn" in parts):
            biased |= {*parts}
    tensors: dict[str, Tensor] = {}
    for module, part, theirs in family.places(config.n_layer):
        if part == "lm_head" and config.tie_weights:
            continue
        weight, bias = own.get(f"{module}.weight"), own.get(f"{module}.bias")
        if weight is None:  # a norm without a gain
            weight = own["lm_head.weight"].new_ones(config.n_embd)
        if bias is None and part in biased:
            bias = weight.new_zeros(len(weight))
        for kind, tensor in (("weight", weight), ("bias", bias)):
            if tensor is not None:
                pieces = _turned(tensor, part, family, config.n_head).chunk(len(theirs))
                tensors |= {f"{name}.{kind}": piece for name, piece in zip(theirs, pieces, strict=True)}
    gains = [f"{family.blocks}.{i}.{name}.weight" for i in range(config.n_layer) for name in family.qk_gains]
    return tensors | {name: own["lm_head.weight"].new_ones(config.head_size) for name in gains}


def _turned(tensor: Tensor, part: str, family: Family, n_head: int, *, back: bool = False) -> Tensor:
    """Return a tensor of ours in the layout of the class, or, with `back`, one of the class in ours."""
    if (
        family.transposed
        and tensor.dim() == 2
        and part not in {"lm_head", "transformer.wte", "transformer.wpe"}
    ):
        return tensor.T
    if family.interleaved and part == "attn.c_attn":
        sides = (n_head, 3) if back else (3, n_head)
        apart: Tensor = tensor.unflatten(0, (*sides, -1))
        return apart.transpose(0, 1).flatten(0, 2)
    return tensor


def _shift_for(model: GPT) -> Tensor:
    """Return the shift (C,) of the last norm that replaces the bias of the head: W shift = W old + bias.

    Raises:
        InputError: there is none, because V > C or the rows of W are linearly dependent.
    """
    norm, head = model.transformer.ln_f, model.lm_head
    W, bias = head.weight.detach().double(), head.bias.detach().double()  # (V, C), (V,)
    old = getattr(norm, "bias", None)
    more = torch.linalg.pinv(W) @ bias  # (C,)
    shift: Tensor = (more if old is None else more + old.detach().double()).to(head.weight.dtype)
    got = shift.double() if old is None else shift.double() - old.detach().double()
    if not torch.allclose(W @ got, bias, rtol=_CLOSE, atol=_CLOSE):
        V, C = W.shape
        raise InputError(
            "head_bias must be False: no class of transformers has such a bias, and the shift of the last "
            f"norm cannot replace it here (vocab_size {V}, n_embd {C})"
        )
    return shift


# Import


def _own_tensors(
    stored: Mapping[str, Tensor], config: GPTConfig, family: Family, path: str
) -> tuple[dict[str, Tensor], dict[str, bool]]:
    """Return the tensors of a GPT, with the biases of the class, and the settings that follow from them."""
    rest = dict(stored)
    own: dict[str, Tensor] = {}
    for module, part, theirs in family.places(config.n_layer):
        for kind in ("weight", "bias"):
            pieces = [rest.pop(f"{name}.{kind}") for name in theirs if f"{name}.{kind}" in rest]
            if len(pieces) == len(theirs) and all(piece.dim() for piece in pieces):
                own[f"{module}.{kind}"] = _turned(torch.cat(pieces), part, family, config.n_head, back=True)
            elif pieces or (kind == "weight" and part != "lm_head"):
                raise refusal(path, f"must hold {quoted(f'{theirs[0]}.{kind}', 80)} and all like it.")
    gains = [f"{family.blocks}.{i}.{name}.weight" for i in range(config.n_layer) for name in family.qk_gains]
    for name in gains:
        gain = rest.pop(name, None)
        if gain is not None and not torch.all(gain == 1):
            raise refusal(path, f"must hold ones in {quoted(name, 80)}: a GPT here has no such gains.")
    for name in rest:
        if not name.endswith(_BUFFERS):
            raise refusal(path, f"holds the tensor {quoted(name, 80)}, which a GPT here does not have.")
    tied = "lm_head.weight" not in own
    if tied or torch.equal(own["lm_head.weight"], own["transformer.wte.weight"]):
        own["lm_head.weight"] = own["transformer.wte.weight"]
        tied = True
    if family.norm == "rmsnorm":
        own = _without_gains(own, config.n_layer)
        tied = own["lm_head.weight"] is own["transformer.wte.weight"]
    if tied:
        del own["lm_head.weight"]
    some = {name for name, tensor in own.items() if name.endswith(".bias") and tensor.any()}
    of_qkv = {name for name in some if name.endswith("c_attn.bias")}
    return own, {"tie_weights": tied, "qkv_bias": bool(of_qkv), "bias": bool(some - of_qkv)}


def _without_gains(own: dict[str, Tensor], n_layer: int) -> dict[str, Tensor]:
    """Multiply the gains of RMSNorm into the matrices that follow."""
    pairs = {"transformer.ln_f": "lm_head"}
    for i in range(n_layer):
        h = f"transformer.h.{i}"
        pairs |= {f"{h}.ln_1": f"{h}.attn.c_attn", f"{h}.ln_2": f"{h}.mlp.c_fc"}
    for norm, matrix in pairs.items():
        gain, weight = own.pop(f"{norm}.weight"), own[f"{matrix}.weight"]
        if not torch.all(gain == 1):
            own[f"{matrix}.weight"] = (weight.double() * gain.double()).to(weight.dtype)
    return own


def _with_record(config: GPTConfig, record: Any) -> GPTConfig:
    """Return the settings, completed from the record for fields that the class lacks, if the record fits."""
    try:
        written = GPTConfig.from_dict(record)
    except ConfigError:  # written by another program
        return config
    own = config.replace(
        init=written.init,
        dropout=written.dropout,
        attention_dropout=written.attention_dropout,
        mlp_width=written.mlp_width,
        bias=config.bias or written.bias,
        qkv_bias=config.qkv_bias or written.qkv_bias,
    )
    same = own.replace(bias=written.bias, qkv_bias=written.qkv_bias) == written
    return own if same and own.effective_mlp_width == config.effective_mlp_width else config


def _with_biases(own: dict[str, Tensor], config: GPTConfig, family: Family) -> dict[str, Tensor]:
    """Return the tensors with exactly the biases of the settings."""
    own = dict(own)
    for module, part, _ in family.places(config.n_layer):
        weight, name = own.get(f"{module}.weight"), f"{module}.bias"  # RMSNorm has no weight any more
        has = config.qkv_bias if part == "attn.c_attn" else config.bias
        if not has or weight is None or part not in MAY_BE_BIASED:
            own.pop(name, None)
        elif name not in own:
            own[name] = weight.new_zeros(len(weight))
    return own
