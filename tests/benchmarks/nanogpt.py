"""nanoGPT beside us: its recipe for a CPU, run from a checkout that the user has.

https://github.com/karpathy/nanoGPT, its README's "I only have a macbook". Nothing of it is kept here: the
checkout is copied into a temporary folder, and gets the corpus in its own format (its prepare.py wants the
network).
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import pickle
import re
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from types import ModuleType
from typing import Any

import numpy as np
import torch
from benchmarks.common import Json, child, commit_of
from torch import Tensor

from charlm import BlockDataset, CharTokenizer, GPTConfig
from charlm.evaluation import evaluate

__all__ = [
    "RECIPE",
    "build_model",
    "load_model_code",
    "prepared",
    "random_blocks",
    "train_and_evaluate",
    "version_of",
]

RECIPE: dict[str, str] = {
    "device": "cpu",
    "compile": "False",
    "eval_iters": "20",
    "log_interval": "1",
    "block_size": "64",
    "batch_size": "12",
    "n_layer": "4",
    "n_head": "4",
    "n_embd": "128",
    "max_iters": "2000",
    "lr_decay_iters": "2000",
    "dropout": "0.0",
}
"""The options of the README's CPU command, in its order."""

_QUICK = {
    "n_layer": "1",
    "n_head": "2",
    "n_embd": "16",
    "block_size": "16",
    "max_iters": "10",
    "eval_iters": "2",
}
_DATA = Path("data", "shakespeare_char")
_OUT = "out-shakespeare-char"


@contextmanager
def prepared(checkout: Path, text: str) -> Iterator[Path]:
    """Give a temporary copy of a checkout with the text as its shakespeare_char data."""
    if not (checkout / "train.py").is_file() or not (checkout / "model.py").is_file():
        raise SystemExit(f"error: {checkout} is no checkout of nanoGPT: it has no train.py and model.py")
    with TemporaryDirectory() as folder:
        copy = Path(folder, "nanoGPT")
        shutil.copytree(checkout, copy, ignore=shutil.ignore_patterns(".git", "data", "assets", "*.ipynb"))
        data = copy / _DATA
        data.mkdir(parents=True)
        tokenizer = CharTokenizer.from_text(text)
        ids = tokenizer.encode_array(text).astype("uint16")
        cut = int(len(ids) * 0.9)
        ids[:cut].tofile(data / "train.bin")
        ids[cut:].tofile(data / "val.bin")
        itos = dict(enumerate(tokenizer.vocab))
        meta = {"vocab_size": len(itos), "itos": itos, "stoi": {c: i for i, c in itos.items()}}
        (data / "meta.pkl").write_bytes(pickle.dumps(meta))
        yield copy


def train_and_evaluate(copy: Path, *, quick: bool) -> Json:
    """Train by the recipe in a process of its own, time it, and find the loss that it ends with.

    Two options are added, so that the weights that are measured are the last ones: a checkpoint is always
    saved, and the only evaluations are at the first and the last step. That spares nanoGPT the seven
    evaluations and checkpoints in between, to its advantage.
    """
    options = {**RECIPE, **(_QUICK if quick else {})}
    if quick:
        options["lr_decay_iters"] = options["max_iters"]
    options |= {"always_save_checkpoint": "True", "eval_interval": options["max_iters"]}
    shutil.rmtree(copy / _OUT, ignore_errors=True)
    command = ["train.py", "config/train_shakespeare_char.py", *(f"--{k}={v}" for k, v in options.items())]
    done = child(command, cwd=copy)
    estimates = re.findall(r"^step (\d+): train loss \S+, val loss (\S+)$", done.output, re.M)
    last_step, estimate = estimates[-1]
    milliseconds = [float(t) for t in re.findall(r"^iter \d+: .* time (\S+)ms", done.output, re.M)]
    return {
        "process_seconds": done.seconds,
        "step_milliseconds_median": sorted(milliseconds)[len(milliseconds) // 2],
        "command": ["python", *command],
        **_evaluated(copy),
        "random_batches": {
            "protocol": f"nanoGPT's own: mean of {options['eval_iters']} random batches of "
            f"{options['batch_size']} blocks, at step {last_step}",
            "loss_nats": float(estimate),
        },
    }


def random_blocks(path: Path, block_size: int, batch_size: int) -> tuple[Tensor, Tensor]:
    """Return a batch as nanoGPT makes it: the file mapped anew, a row copied and widened at a time."""
    data = np.memmap(path, dtype=np.uint16, mode="r")
    starts = torch.randint(len(data) - block_size, (batch_size,))
    x = torch.stack([torch.from_numpy(data[i : i + block_size].astype(np.int64)) for i in starts])
    y = torch.stack([torch.from_numpy(data[i + 1 : i + 1 + block_size].astype(np.int64)) for i in starts])
    return x, y  # (B, T) each


def load_model_code(checkout: Path) -> ModuleType:
    """Return a checkout's model.py as a module."""
    spec = importlib.util.spec_from_file_location("nanogpt_model", checkout / "model.py")
    if spec is None or spec.loader is None:
        raise SystemExit(f"error: {checkout / 'model.py'} cannot be imported")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where its dataclass looks for it
    spec.loader.exec_module(module)
    return module


def build_model(code: ModuleType, config: GPTConfig) -> Any:
    """Return the model of a checkout's code with the sizes of a config, without biases."""
    sizes = {k: getattr(config, k) for k in ("block_size", "vocab_size", "n_layer", "n_head", "n_embd")}
    with contextlib.redirect_stdout(sys.stderr):  # it prints when a model is built
        return code.GPT(code.GPTConfig(**sizes, dropout=config.dropout, bias=False))


def version_of(checkout: Path) -> str:
    """Return the commit of a checkout, or where git does not know it, a digest of its two main files."""
    commit = commit_of(checkout) if (checkout / ".git").exists() else None
    both = b"".join((checkout / name).read_bytes() for name in ("model.py", "train.py"))
    return commit or f"sha256 of model.py + train.py: {hashlib.sha256(both).hexdigest()[:16]}"


def _evaluated(copy: Path) -> Json:
    """Return the loss of the last checkpoint over the whole validation text, in windows of its block size."""
    checkpoint = torch.load(copy / _OUT / "ckpt.pt", map_location="cpu", weights_only=True)
    with contextlib.redirect_stdout(sys.stderr):  # it prints when a model is built
        code = load_model_code(copy)
        model = code.GPT(code.GPTConfig(**checkpoint["model_args"]))
    model.load_state_dict(checkpoint["model"])
    val = np.fromfile(copy / _DATA / "val.bin", dtype=np.uint16)
    result = evaluate(model, BlockDataset(val, checkpoint["model_args"]["block_size"]))
    return {
        "steps": checkpoint["iter_num"],
        "parameters": sum(p.numel() for p in model.parameters()),
        "loss_nats": result.loss_nats,
        "n_chars": result.n_chars,
    }
