"""Import of checkpoints of nanoGPT and minGPT. No code in them is executed.

nanoGPT: `ckpt.pt` has the weights and the arguments of the model, and `meta.pkl` beside the data has the
vocabulary (https://github.com/karpathy/nanoGPT, train.py and data/shakespeare_char/prepare.py). minGPT:
`model.pt` has only the weights (https://github.com/karpathy/minGPT, projects/chargpt/chargpt.py).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from charlm.errors import ConfigError, InputError, quoted
from charlm.files import strict_json
from charlm.files.reading import read_file, refusal
from charlm.interchange.folders import built
from charlm.interchange.pickled import read_pickled, state_of
from charlm.interchange.vocabulary import known_tokenizer
from charlm.lm import CharLM
from charlm.models.config import PRESETS, GPTConfig
from charlm.plain import as_path
from charlm.text.tokenizer import Tokenizer

__all__ = ["from_either", "from_mingpt", "from_nanogpt"]

_HEADS = {  # n_head by minGPT's model type
    "openai-gpt": 12,
    "gpt2": 12,
    "gpt2-medium": 16,
    "gpt2-large": 20,
    "gpt2-xl": 25,
    "gopher-44m": 16,
    "gpt-mini": 6,
    "gpt-micro": 4,
    "gpt-nano": 3,
}


def from_nanogpt(path: str | Path, vocabulary: str | Path | Tokenizer) -> CharLM:
    """Read a checkpoint of nanoGPT, onto the CPU.

    Args:
        path: the ckpt.pt of its train.py, also of a compiled or distributed model.
        vocabulary: the meta.pkl of the data, or the tokenizer of the text: `CharTokenizer.from_text(text)`
            gives the same ids as nanoGPT's prepare.py.

    Raises:
        CheckpointError: there is no such file.
        FileFormatError: it is no such checkpoint, or holds objects other than tensors and plain values.
        InputError: the vocabularies differ in size.

    Example:
        >>> import tempfile, torch
        >>> from charlm import GPT, CharTokenizer
        >>> gpt = GPT.from_config("gpt2", vocab_size=3, block_size=8, n_layer=1, n_head=2, n_embd=8)
        >>> path = tempfile.mkdtemp() + "/ckpt.pt"
        >>> torch.save({"model": gpt.state_dict(), "model_args": gpt.config.to_dict()}, path)
        >>> from_nanogpt(path, CharTokenizer("abc")).model.block_size
        8
    """
    file = as_path(path)
    return _nanogpt(read_pickled(file), vocabulary, file)


def from_mingpt(path: str | Path, vocabulary: str | Path | Tokenizer, *, n_head: int | None = None) -> CharLM:
    """Read weights of minGPT, onto the CPU.

    Args:
        path: a file of `torch.save(model.state_dict(), path)`.
        vocabulary: as for `from_nanogpt`; minGPT's CharDataset has the same ids.
        n_head: the number of heads, which the weights do not show; None: that of the config.json beside it.

    Raises:
        CheckpointError: there is no such file.
        FileFormatError: it holds other weights, or objects other than tensors.
        InputError: the vocabularies differ in size, or the number of heads is unknown.

    Example:
        >>> import tempfile, torch
        >>> from charlm import GPT, CharTokenizer
        >>> sizes = {"vocab_size": 3, "block_size": 8, "n_layer": 1, "n_head": 2, "n_embd": 8}
        >>> gpt = GPT.from_config("gpt2", **sizes, tie_weights=False)
        >>> path = tempfile.mkdtemp() + "/model.pt"
        >>> torch.save(gpt.state_dict(), path)
        >>> from_mingpt(path, CharTokenizer("abc"), n_head=2).model.block_size
        8
    """
    file = as_path(path)
    return _mingpt(read_pickled(file), vocabulary, file, n_head)


def from_either(path: Path, vocabulary: str | Path | Tokenizer, n_head: int | None) -> tuple[CharLM, str]:
    """Read a file of either library, and return its model and the library's name."""
    content = read_pickled(path)
    if "model_args" in content:
        return _nanogpt(content, vocabulary, path), "nanoGPT"
    return _mingpt(content, vocabulary, path, n_head), "minGPT"


def _nanogpt(checkpoint: dict[Any, Any], vocabulary: str | Path | Tokenizer, file: Path) -> CharLM:
    args = checkpoint.get("model_args")
    needed = ("block_size", "vocab_size", "n_layer", "n_head", "n_embd", "bias")
    if not isinstance(args, dict) or any(name not in args for name in needed):
        raise refusal(file, "must hold nanoGPT's 'model' and 'model_args', got something else.")
    fields = {name: args[name] for name in needed} | {"qkv_bias": args["bias"], "activation": "gelu"}
    fields["dropout"] = args.get("dropout", 0.0)
    return _made(state_of(checkpoint.get("model"), file), fields, vocabulary, file)


def _mingpt(
    content: dict[Any, Any], vocabulary: str | Path | Tokenizer, file: Path, n_head: int | None
) -> CharLM:
    state = state_of(content, file)
    wte, wpe = state.get("transformer.wte.weight"), state.get("transformer.wpe.weight")
    if wte is None or wpe is None or wte.dim() != 2 or wpe.dim() != 2:
        raise refusal(
            file, "must hold a checkpoint of nanoGPT or the weights of a minGPT, got other tensors."
        )
    fields: dict[str, object] = {
        "vocab_size": wte.size(0),
        "block_size": wpe.size(0),
        "n_embd": wte.size(1),
        "n_layer": sum(name.endswith(".ln_1.weight") for name in state),
        "n_head": _heads_beside(file) if n_head is None else n_head,
        "tie_weights": False,
    }
    return _made(state, fields, vocabulary, file)


def _heads_beside(file: Path) -> int:
    """Return the number of heads from minGPT's config.json: a field, or by the type of the model."""
    path = file.with_name("config.json")
    try:
        values: Any = strict_json.loads(read_file(path, max_bytes=strict_json.MAX_BYTES), path=str(path))
    except FileNotFoundError:
        values = {}
    model = values.get("model")
    fields: Mapping[str, Any] = model if isinstance(model, dict) else {}
    heads = fields.get("n_head") or _HEADS.get(str(fields.get("model_type")))
    if type(heads) is not int:
        raise InputError(f"n_head must be given: neither the weights nor {quoted(str(path))} have it")
    return heads


def _made(
    state: dict[str, Tensor], fields: dict[str, object], vocabulary: str | Path | Tokenizer, file: Path
) -> CharLM:
    """Return the model of weights with our names."""
    try:
        config = GPTConfig.from_dict({**PRESETS["gpt2"], **fields})
    except ConfigError as error:
        raise refusal(file, f"holds no settings of a GPT: {error}.") from error
    tokenizer = known_tokenizer(vocabulary)
    if config.vocab_size != tokenizer.vocab_size:
        raise InputError(
            f"the vocabulary must have the {config.vocab_size} characters of the model, got "
            f"{tokenizer.vocab_size}. Give the whole text of its training, or its meta.pkl"
        )
    weights = {name: tensor for name, tensor in state.items() if not name.endswith(".attn.bias")}  # masks
    return CharLM(built(weights, config, str(file)), tokenizer)
