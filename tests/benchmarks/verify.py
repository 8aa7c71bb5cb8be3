"""The loss of a row of "time to a loss", by its protocol: a saved charlm model, or anybody's probabilities.

What is given is a directory that `charlm.load` opens (of a run: its best checkpoint), or a Python file, which
is run, with a function

    def probabilities(windows):
        '''windows: (B, T) int64, numpy -> (B, T, V): of the character after windows[:, t], given
        windows[:, : t + 1] alone. Id i is the i-th of the text's characters in the order of sorted().'''

Before anything is scored: no probability changes by more than 1e-6 when later characters do, nor by more
than 1e-4 (rounding) when a window stands alone. While it is scored: none is negative, and those of a place
sum to 1 within 1e-6. Afterwards: the same windows have the same probabilities as at first. A text that is
not Tiny Shakespeare is scored, too, but makes no row.

    cd tests
    python -m benchmarks.verify ../runs/five --target 1.4697
    python -m benchmarks.verify theirs.py --block-size 256
"""

from __future__ import annotations

import hashlib
import runpy
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from benchmarks.common import Json, machine, new_parser, report
from numpy.typing import NDArray

from charlm import BlockDataset, CharLM, CharTokenizer, load, load_corpus
from charlm.models.config import unlimited_window
from charlm.text.tokenizer import Tokenizer

__all__ = ["Probabilities", "main", "verify"]

Probabilities = Callable[[NDArray[np.int64]], NDArray[np.floating]]
"""(B, T) ids -> (B, T, V)."""

_SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"
_TOLERANCE = 1e-6
_ROUNDING = 1e-4
_CHARS_PER_BATCH = 16_384
_LOOKED_AT = 8
"""Windows, spread over the text, and places in each, that are looked at before and after."""


def main(argv: Sequence[str] | None = None) -> None:
    """Check the model, score it and report."""
    parser = new_parser(__doc__)
    parser.add_argument("model", type=Path, help="a directory with a saved model or a run, or a Python file")
    parser.add_argument(
        "--block-size", type=int, help="T (default: the model's own, or 1,024 if it has none)"
    )
    parser.add_argument("--target", type=float, help="a loss in nats: say whether it is reached")
    args = parser.parse_args(argv)
    text = load_corpus(args.data)
    counts = hashlib.sha256(text.encode()).hexdigest() == _SHA256
    measured_on = machine()
    if args.model.suffix == ".py":
        if args.block_size is None:
            parser.error("a Python file needs --block-size, its model's own")
        probabilities: Probabilities = runpy.run_path(str(args.model))["probabilities"]
        tokenizer: Tokenizer = CharTokenizer.from_text(text)
        block_size = args.block_size
        of: Json = {"file": args.model.name}
    else:
        lm = load(args.model)
        probabilities, tokenizer = _of(lm), lm.tokenizer
        block_size = args.block_size or lm.model.block_size or unlimited_window(65)
        of = {"kind": lm.model.kind, "parameters": lm.model.num_parameters(), **lm.model.config.to_dict()}
    _, val = BlockDataset.from_text(text, tokenizer, block_size).split(0.9)
    results = {**verify(probabilities, val), "is_tiny_shakespeare": counts}
    lines = [
        f"{results['loss_nats']:.4f} nats per character over {results['n_chars']:,} characters",
        f"windows of {block_size} that do not overlap, no state between them; causal, sums to 1",
    ]
    if args.target is not None:
        results["reaches_target"] = counts and results["loss_nats"] <= args.target
        lines.append(f"target {args.target:g}: {'reached' if results['reaches_target'] else 'NOT reached'}")
    if not counts:
        lines.append("the text is not Tiny Shakespeare: this is no row of the table")
    report("verify", args, measured_on=measured_on, settings=of, results=results, text="\n".join(lines))


def verify(probabilities: Probabilities, val: BlockDataset) -> Json:
    """Return the loss over all of a text but its first character, in windows that do not overlap.

    Args:
        probabilities: says (B, T, V) of (B, T) ids.
        val: the text, and T.

    Raises:
        SystemExit: they are not the probabilities of a causal model that stays as it is; says why.
    """
    looked_at = next(val.blocks(_LOOKED_AT, most=_LOOKED_AT))[0].numpy()
    before = _checked(probabilities, looked_at)
    _check_causality(probabilities, looked_at, before)
    nats, count = 0.0, 0
    for x, y in val.blocks(max(1, _CHARS_PER_BATCH // val.block_size)):
        found = _checked(probabilities, x.numpy())
        with np.errstate(divide="ignore"):
            nats -= float(np.log(np.take_along_axis(found, y.numpy()[..., None], axis=-1)).sum())
        count += y.numel()
    _same(_checked(probabilities, looked_at), before, "depend on what was asked before")
    return {"loss_nats": nats / count, "n_chars": count, "block_size": val.block_size}


def _of(lm: CharLM) -> Probabilities:
    """Return the probabilities of a charlm model, in float64 from its logits."""

    def probabilities(windows: NDArray[np.int64]) -> NDArray[np.floating]:
        with torch.no_grad():
            logits, _ = lm.model(torch.from_numpy(windows).to(lm.model.device))  # (B, T, V)
        found: NDArray[np.floating] = logits.double().cpu().softmax(dim=-1).numpy()
        return found

    return probabilities


def _checked(probabilities: Probabilities, windows: NDArray[np.int64]) -> NDArray[np.float64]:
    """Return (B, T, V), if each row is a distribution."""
    found = np.asarray(probabilities(windows.copy()), dtype=np.float64)
    if found.ndim != 3 or found.shape[:2] != windows.shape:
        raise SystemExit(f"error: probabilities must have shape {(*windows.shape, 'V')}, got {found.shape}")
    if not (found >= 0).all():
        raise SystemExit("error: a probability is negative or not a number")
    off = float(np.abs(found.sum(axis=-1) - 1).max())
    if not off <= _TOLERANCE:
        raise SystemExit(f"error: probabilities of one character must sum to 1, but a sum is {off:.2g} away")
    return found


def _check_causality(
    probabilities: Probabilities, windows: NDArray[np.int64], before: NDArray[np.float64]
) -> None:
    """Raise unless later characters, and other windows, change nothing."""
    T, V = windows.shape[1], before.shape[-1]
    draw = np.random.default_rng(1337)
    for cut in sorted({max(1, T * i // _LOOKED_AT) for i in range(1, _LOOKED_AT)} | {max(1, T - 1)}):
        altered = windows.copy()
        altered[:, cut:] = (altered[:, cut:] + draw.integers(1, max(2, V), altered[:, cut:].shape)) % V
        after = _checked(probabilities, altered)
        _same(after[:, :cut], before[:, :cut], f"of the first {cut} characters change with later ones")
    _same(_checked(probabilities, windows[:1]), before[:1], "depend on other windows", _ROUNDING)


def _same(a: NDArray[np.float64], b: NDArray[np.float64], what: str, tolerance: float = _TOLERANCE) -> None:
    apart = float(np.abs(a - b).max())
    if not apart <= tolerance:
        raise SystemExit(f"error: probabilities {what}, by {apart:.2g}")


if __name__ == "__main__":
    main()
