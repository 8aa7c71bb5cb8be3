"""One GPT three times: charlm's, nanoGPT's and transformers', with equal weights, each with its own generate.

The architecture is nanoGPT's: learned positions, LayerNorm, exact GELU, one matrix for embedding and output,
no biases. transformers' GPT-2 always has biases; here they are zeros, and its parameters are counted with
them. The weights are random, and copied from charlm's model: it is checked that all give the same logits.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import struct
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from benchmarks import nanogpt
from benchmarks.common import Json, announce
from torch import Tensor

from charlm import GPT, GPTConfig
from charlm.models.config import PRESETS

__all__ = ["QUICK_SIZE", "SIZES", "VOCABULARY", "Peer", "Size", "build", "config_of", "llama2c", "others_of"]

VOCABULARY = "\n !$&',-.3:;?ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"
"""Tiny Shakespeare's."""


@dataclass(frozen=True)
class Size:
    """Of a GPT."""

    n_layer: int
    n_head: int
    n_embd: int
    block_size: int = 256


SIZES = {"0.8M": Size(4, 4, 128), "10.7M": Size(6, 6, 384)}
QUICK_SIZE = Size(1, 2, 16, 16)


@dataclass(frozen=True)
class Peer:
    """A model of somebody else's code."""

    parameters: int
    generate: Callable[[Tensor, int], Tensor]
    """(B, T) int64 and a count n -> (B, T + n): temperature 1, nothing filtered."""
    last_logits: Callable[[Tensor], Tensor]
    """(B, T) int64 -> (B, V)."""


def config_of(size: Size) -> GPTConfig:
    """Return nanoGPT's architecture in a size, as charlm calls it."""
    sizes = {"n_layer": size.n_layer, "n_head": size.n_head, "n_embd": size.n_embd}
    choices = {"bias": False, "qkv_bias": False, "activation": "gelu"}
    rest = {"vocab_size": len(VOCABULARY), "block_size": size.block_size}
    return GPTConfig.from_dict({**PRESETS["gpt2"], **sizes, **choices, **rest})


def build(size: Size) -> GPT:
    """Return charlm's model with random weights, the same ones in every process."""
    torch.manual_seed(1337)
    return GPT(config_of(size)).eval()


@torch.no_grad()
def others_of(model: GPT, checkout: Path | None, *, with_transformers: bool) -> tuple[dict[str, Peer], Json]:
    """Return the peers that are at hand, by name, and how their logits differ from ours.

    Raises:
        SystemExit: a peer is not the same model.
    """
    peers: dict[str, Peer] = {}
    if checkout is not None:
        peers["nanogpt"] = _nanogpt(model, checkout)
    if with_transformers:
        peers |= _transformers(model)
    idx = torch.randint(model.vocab_size, (2, model.block_size))  # (B, T)
    ours = model(idx)[0][:, -1]  # (B, V)
    differences = {name: float((peer.last_logits(idx) - ours).abs().max()) for name, peer in peers.items()}
    for name, difference in differences.items():
        if not difference < 1e-5:
            raise SystemExit(
                f"error: with equal weights, {name}'s logits differ from ours by {difference:.3g}"
            )
    parameters = {"charlm": model.num_parameters(), **{name: peer.parameters for name, peer in peers.items()}}
    return peers, {"parameters": parameters, "largest_difference_of_logits": differences}


def _nanogpt(model: GPT, checkout: Path) -> Peer:
    with contextlib.redirect_stdout(sys.stderr):
        theirs = nanogpt.build_model(nanogpt.load_model_code(checkout), model.config).eval()
    theirs.load_state_dict(model.state_dict())  # the names are the same
    return Peer(_count(theirs), theirs.generate, lambda idx: theirs(idx)[0][:, -1])


def _transformers(model: GPT) -> dict[str, Peer]:
    """Return transformers' GPT-2 by its name, or nothing where the package is not installed."""
    try:
        # Imported by name: its types say Any, and would cost every run of mypy more than all of charlm's.
        library: Any = importlib.import_module("transformers")
    except ImportError:
        announce("transformers is not installed, and left out")
        return {}
    library.logging.set_verbosity_error()
    config = model.config
    theirs = library.GPT2LMHeadModel(
        library.GPT2Config(
            vocab_size=config.vocab_size,
            n_positions=config.block_size,
            n_layer=config.n_layer,
            n_head=config.n_head,
            n_embd=config.n_embd,
            activation_function="gelu",
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            bos_token_id=None,
            eos_token_id=None,
        )
    ).eval()
    weights = {
        # Its linear layers in the blocks are those of the first GPT, which keep (in, out).
        name: value.t() if name.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight")) else value
        for name, value in model.state_dict().items()
    }
    theirs.load_state_dict(
        {name: torch.zeros_like(value) for name, value in theirs.state_dict().items()} | weights
    )

    def generate(idx: Tensor, count: int) -> Tensor:
        new: Tensor = theirs.generate(
            idx,
            do_sample=True,
            temperature=1.0,
            top_k=0,
            use_cache=True,
            max_new_tokens=count,
            min_new_tokens=count,
        )
        return new

    return {"transformers": Peer(_count(theirs), generate, lambda idx: theirs(idx).logits[:, -1])}


# What calls llama2.c's functions: a window of characters for each line that it is given.
_LLAMA2C = """
#define TESTING
#include "run.c"
int main(int argc, char **argv) {
    Transformer t;
    Sampler s;
    build_transformer(&t, argv[1]);
    build_sampler(&s, t.config.vocab_size, 1.0f, 1.0f, 1337);
    while (getchar() != EOF) {
        int token = 0;
        for (int pos = 0; pos < t.config.seq_len - 1; pos++) token = sample(&s, forward(&t, token, pos));
        puts("made");
        fflush(stdout);
    }
}
"""


@contextlib.contextmanager
def llama2c(checkout: Path, size: Size, threads: int) -> Iterator[Callable[[], None]]:
    """Give a turn of llama2.c: a window of characters, of a model with as many weights, drawn at random.

    Of its three matrices in the feed-forward network each has two thirds of the rows that ours have.
    """
    L, H, C, T, V = size.n_layer, size.n_head, size.n_embd, size.block_size, len(VOCABULARY)
    F = -(-8 * C // 24) * 8  # 2/3 of 4 C, a multiple of 8
    count = V * C + L * (2 * C + 4 * C * C + 3 * C * F) + C + T * C // H
    weights = 0.02 * np.random.default_rng(1).standard_normal(count, np.float32)
    with tempfile.TemporaryDirectory() as folder:
        model, program = Path(folder, "model.bin"), Path(folder, "generate")
        model.write_bytes(struct.pack("7i", C, F, L, H, H, V, T) + weights.tobytes())
        command = ["gcc", "-Ofast", "-fopenmp", "-march=native", "-I", str(checkout), "-x", "c", "-", "-lm"]
        subprocess.run([*command, "-o", str(program)], input=_LLAMA2C, text=True, check=True)
        with subprocess.Popen(
            [program, model],
            env={**os.environ, "OMP_NUM_THREADS": str(threads)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        ) as process:
            asks, answers = process.stdin, process.stdout
            assert asks is not None
            assert answers is not None

            def turn() -> None:
                asks.write(b"\n")
                asks.flush()
                if answers.readline() != b"made\n":
                    raise SystemExit("error: llama2.c ended")

            yield turn
            asks.close()


def _count(model: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())
