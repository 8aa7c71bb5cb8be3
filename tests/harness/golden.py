"""Files of format version 1, kept as they were written: what every later charlm must still read.

`python tests/harness/golden.py` made them, once. They are never made again: a change that this program
would show is a change of the format, which needs a new version (docs/reliability.md has the rule) and new
files beside these.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
import tempfile
import warnings
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from harness.tiny_training import TEXT, TOKENIZER, Noise, quick_config, tiny_split

from charlm import GPT, BigramLM, BlockDataset, ByteTokenizer, CharLM, Trainer, load
from charlm.models.ngram import NGramLM

__all__ = ["GOLDEN", "PROMPT", "digests", "end_of", "expected", "ids_of"]

GOLDEN = Path(__file__).resolve().parents[1] / "golden"
PROMPT = "ba de\nfi"


def ids_of(lm: CharLM) -> Tensor:
    """Return the prompt that logits are compared on, (1, T)."""
    return torch.tensor([lm.tokenizer.encode(PROMPT)])


def digests(folder: Path) -> dict[str, str]:
    """Return the sha256 of every file below a folder, by its path there."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != ".lock")
    return {p.relative_to(folder).as_posix(): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def expected() -> dict[str, dict[str, object]]:
    """Return what was true of each kept directory when it was made."""
    values: dict[str, dict[str, object]] = json.loads((GOLDEN / "expected.json").read_text(encoding="utf-8"))
    return values


def _gpt(**changes: object) -> GPT:
    settings = {"vocab_size": TOKENIZER.vocab_size, "block_size": 8, "n_layer": 1, "n_head": 2, "n_embd": 8}
    return GPT.from_config({**settings, **changes})


def _run(name: str, model: BigramLM | GPT, **changes: object) -> None:
    """Train six steps of ten, stop, and note how the four others went."""
    train, val = tiny_split()
    config = quick_config(**{"max_steps": 10, "eval_interval": 2, "patience": 9, "keep_last": 1, **changes})
    folder = GOLDEN / "v1" / name
    trainer = Trainer(
        model,
        train,
        config,
        val_data=val,
        tokenizer=TOKENIZER,
        out_dir=folder,
        device="cpu",
        callbacks=[Noise()],
    )
    for record in trainer.steps():
        if record.step == 6:
            break
    (folder / ".lock").unlink()


def _saved(name: str, model: BigramLM | GPT | NGramLM, tokenizer: ByteTokenizer | None = None) -> None:
    CharLM(model, tokenizer or TOKENIZER).save(GOLDEN / "v1" / name)


def make() -> None:
    """Write all directories, and expected.json beside them."""
    torch.manual_seed(7)
    _run("run-bigram", BigramLM(TOKENIZER.vocab_size))
    _run("run-gpt", _gpt(dropout=0.1), optimizer="muon", accumulate=2, betas=[0.8, 0.9])
    _saved("bigram", BigramLM(TOKENIZER.vocab_size))
    _saved(
        "gpt",
        _gpt(position="rotary", norm="rmsnorm", activation="relu2", qk_norm=True, bias=False).bfloat16(),
    )
    _saved("gpt-bytes", _gpt(vocab_size=256, n_embd=4, tie_weights=True, head_bias=False), ByteTokenizer())
    data = BlockDataset.from_text(TEXT[:300], TOKENIZER, 8)
    _saved("ngram", NGramLM(TOKENIZER.vocab_size, order=3).fit(data))
    values: dict[str, dict[str, object]] = {}
    for folder in sorted((GOLDEN / "v1").iterdir()):
        lm = load(folder, device="cpu")
        with torch.no_grad():
            logits = lm.model(ids_of(lm))[0][0, -1]  # (V,)
        values[folder.name] = {
            "files": digests(folder),
            "parameters": lm.model.num_parameters(),
            "vocab_size": lm.tokenizer.vocab_size,
            "last_logits": logits.tolist()[:8],
        }
        if folder.name.startswith("run-"):
            values[folder.name]["loss_at_the_end"] = end_of(folder)
    (GOLDEN / "expected.json").write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")


def end_of(folder: Path) -> float:
    """Return the last validation loss of a copy of a run that goes on to its end."""
    train, val = tiny_split()
    with tempfile.TemporaryDirectory() as elsewhere, warnings.catch_warnings():
        warnings.filterwarnings("ignore", "the run goes on, but not bit for bit")  # another torch, say
        copy = shutil.copytree(folder, Path(elsewhere, "run"))
        trainer = Trainer.resume(copy, train, val_data=val, callbacks=[Noise()], device="cpu")
        final = trainer.fit().final
    return -1.0 if final is None else final.loss_nats


if __name__ == "__main__":
    if GOLDEN.exists():
        sys.exit(f"{GOLDEN} exists: what is kept there is never made again")
    make()
