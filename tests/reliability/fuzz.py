"""Coverage-guided fuzzing of all that reads bytes: weights, tokenizer, config, and manifest with state.json.

    python tests/reliability/fuzz.py weights --seconds 600

Atheris (libFuzzer for Python) changes real files so that new branches of charlm are reached. Promised for any
bytes: nothing but the library's errors, under 1 s and 256 MB beyond what the process took at the start; and a
tokenizer or config that is accepted can be saved and read back equal. At the end stand the figures, and the
bytes that broke a promise.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import re
import resource
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).resolve().parents[1]), str(Path(__file__).resolve().parents[2])]

TARGETS = ("weights", "tokenizer", "config", "manifest")
MEGABYTES = 256
_WORDS = r"""
"dtype" "shape" "data_offsets" "__metadata__" "F32" "BOOL" "BF16" "I64" [0,0] "format" "version" "kind"
"vocab" "unknown" "character" "byte" "charlm.tokenizer" "charlm.model" "config" "vocab_size" "block_size"
"n_layer" "n_head" "n_embd" "gpt" "bigram" "ngram" "order" "n_ngrams" "bias" "position" "rotary"
"mlp_width" null "dropout" "activation" "swiglu" "norm" "files" "size" "sha256" "step" "save_id" "run_id"
"val_loss" "rng" "numpy" "python" "best" "nonfinite" true NaN -0 \ud800 \u0061 \\ 1e999
9223372036854775807 9223372036854775808 18446744073709551615
"""


def seeds() -> dict[str, list[bytes]]:
    """Return real files for each target."""
    from harness.hostile_files import json_of
    from harness.tiny_training import TOKENIZER, quick_config, tiny_split

    from charlm import GPT, BigramLM, ByteTokenizer, CharTokenizer, GPTConfig, Trainer
    from charlm.files import safetensors, strict_json

    V = TOKENIZER.vocab_size
    model = GPT(GPTConfig(vocab_size=V, block_size=8, n_layer=1, n_head=1, n_embd=2))
    train, val = tiny_split()
    found: dict[str, list[bytes]] = {target: [] for target in TARGETS}
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(model, train, quick_config(max_steps=2), val_data=val, device="cpu", out_dir=folder)
        checkpoint = trainer.fit().checkpoint
        if checkpoint is None:
            raise SystemExit("no checkpoint was written")
        found["manifest"] = [(checkpoint / name).read_bytes() for name in ("manifest.json", "state.json")]
        found["config"] = [(checkpoint / "config.json").read_bytes()]
        values = json_of(checkpoint / "config.json")
    for kind, config in (
        ("bigram", {"vocab_size": 3}),
        ("ngram", {"vocab_size": 3, "order": 2, "n_ngrams": 4}),
    ):
        found["config"].append(strict_json.dumps({**values, "kind": kind, "config": config}))
    found["tokenizer"] = [
        strict_json.dumps(each.to_dict())
        for each in (TOKENIZER, CharTokenizer("aé\u2028\U0001f600?", unknown="?"), ByteTokenizer())
    ]
    files = [
        b"".join(safetensors.dumps(BigramLM(2).state_dict(), {"step": "1"})),
        b"".join(safetensors.dumps({})),
    ]
    files.append(b"".join(safetensors.dumps(model.state_dict())))
    found["weights"] = [b"0" + data for data in files] + [b"1" + data[8:] for data in files]
    return found


def target_function(target: str, folder: Path) -> Callable[[bytes], None]:
    """Return what is called with each input."""
    import hashlib

    import numpy as np
    import torch

    from charlm.errors import CharLMError, FileFormatError
    from charlm.files import safetensors, strict_json
    from charlm.models.saving import model_settings
    from charlm.runs import checkpoint
    from charlm.text.tokenizer import tokenizer_from_dict
    from charlm.training.saving import restored_generators
    from charlm.training.state import RunState

    def weights(data: bytes) -> None:
        if data[:1] == b"1":  # the length of the header is put right
            end = data.rfind(b"}") + 1
            data = b"0" + max(end - 1, 0).to_bytes(8, "little") + data[1:]
        with contextlib.suppress(FileFormatError):
            tensors, _ = safetensors.loads(bytearray(data[1:]), path="m")
            again, _ = safetensors.loads(bytearray(b"".join(safetensors.dumps(tensors))), path="m")
            if again.keys() != tensors.keys():
                raise AssertionError("the names have changed")

    def tokenizer(data: bytes) -> None:
        with contextlib.suppress(FileFormatError):
            made = tokenizer_from_dict(strict_json.loads(data, path="t", max_bytes=8 << 20), path="t")
            saved = strict_json.dumps(made.to_dict())
            if tokenizer_from_dict(strict_json.loads(saved, path="t", max_bytes=8 << 20), path="t") != made:
                raise AssertionError("another tokenizer came back")
            text = made.decode(range(min(made.vocab_size, 128)))
            if not isinstance(text, str):
                raise AssertionError("no text")

    def config(data: bytes) -> None:
        with contextlib.suppress(FileFormatError):
            cls, settings = model_settings({"config.json": bytearray(data)}, Path("m"))
            values = {"format": "charlm.model", "version": 1, "kind": cls.kind, "config": settings.to_dict()}
            again = model_settings({"config.json": bytearray(strict_json.dumps(values))}, Path("m"))
            if again != (cls, settings) or settings.num_parameters() < 1:
                raise AssertionError("other settings came back")

    place = folder / "step-000000000002-00000000"
    place.mkdir(exist_ok=True)
    states = {"rng.torch": torch.get_rng_state(), "rng.python": torch.zeros(625, dtype=torch.int64)}
    states["rng.numpy"] = torch.arange(624)

    def manifest(data: bytes) -> None:
        file = place / "manifest.json"
        with contextlib.suppress(CharLMError, OSError):
            file.write_bytes(data)
            checkpoint._read_manifest(place, None)
        with contextlib.suppress(CharLMError, OSError):
            values = strict_json.loads(data, path="s")
            values.pop("sha256", None)
            digest = hashlib.sha256(strict_json.dumps(values)).hexdigest()
            # Fuzzing cannot find a hash; the name follows, too.
            step, save_id = values.get("step"), values.get("save_id")
            fits = type(step) is int and 0 <= step < 10**12 and re.fullmatch("[0-9a-f]{8}", str(save_id))
            sealed = folder / (f"step-{step:012}-{save_id}" if fits else place.name)
            sealed.mkdir(exist_ok=True)
            (sealed / "manifest.json").write_bytes(strict_json.dumps({**values, "sha256": digest}))
            with contextlib.suppress(CharLMError, OSError):
                checkpoint._read_manifest(sealed, None)
            if sealed != place:
                shutil.rmtree(sealed)
            counters = {"step": 1, "chars_seen": 1, "seconds": 1.0, "evaluations_since_best": 0}
            RunState.from_dict({**counters, **values}, path="s")
            with restored_generators(strict_json.take(values, "rng", dict, path="s"), states, "s"):
                pass
            np.random.rand(2), torch.rand(2)  # noqa: NPY002 - the generators that were set

    return {"weights": weights, "tokenizer": tokenizer, "config": config, "manifest": manifest}[target]


def fuzz(target: str, folder: Path, seconds: int) -> None:
    """Fuzz in this process until the time is over or a promise is broken; does not return."""
    atheris: Any = importlib.import_module("atheris")
    with atheris.instrument_imports(include=["charlm"]):
        call = target_function(target, folder)
        corpus = folder / "corpus"
        corpus.mkdir()
        for number, data in enumerate(seeds()[target]):
            (corpus / f"seed{number}").write_bytes(data)
    escaped = [word.replace("\\", "\\\\").replace('"', '\\"') for word in _WORDS.split()]
    (folder / "words").write_text("".join(f'"{word}"\n' for word in escaped), encoding="ascii")
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024 + MEGABYTES
    options = (
        *(f"-max_total_time={seconds}", "-timeout=1", f"-rss_limit_mb={memory}", "-max_len=16384"),
        *("-print_final_stats=1", f"-artifact_prefix={folder}/broken-", f"-dict={folder}/words"),
    )
    atheris.Setup([sys.argv[0], *options, str(corpus)], call)
    atheris.Fuzz()


def main() -> int:
    """Fuzz in a process of its own, and write the figures."""
    parser = argparse.ArgumentParser(description="Fuzz what reads a file, guided by coverage.")
    parser.add_argument("target", choices=TARGETS)
    parser.add_argument("--seconds", type=int, default=60)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.folder is not None:
        fuzz(args.target, args.folder, args.seconds)
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else None) as name:
        folder = Path(name)
        command = [sys.executable, __file__, args.target, "--seconds", str(args.seconds), "--folder", name]
        ended = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
        log = ended.stdout + ended.stderr
        figures = re.findall(r"cov: (\d+) ft: (\d+) corp: (\d+)", log)
        runs = re.findall(r"(?:number_of_executed_units:\s*|Done )(\d+)", log)
        broken = sorted(folder.glob("broken-*"))
        if not figures or not runs or (ended.returncode and not broken):
            print(log[-4_000:])
            return 2
        edges, features, size = figures[-1]
        print(
            f"{args.target}: {int(runs[-1]):,} executions, {edges} edges, {features} features, "
            f"a corpus of {size}, {len(broken)} broken promises"
        )
        for file in broken:
            print(f"{file.name}: {file.read_bytes()[:2_000]!r}\n{log[-3_000:]}")
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
