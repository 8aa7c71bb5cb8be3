"""Whatever a file says, reading it ends in the library's own errors, at once and in little memory.

Cases that a stranger might choose, listed and drawn, lie in a saved model and in the checkpoint of a run
under a manifest that vouches for them, and go through every public door. Doors are opened in one child
process. Its address space may grow by 64 MiB beyond the data (256 MiB for tokenizers; RLIMIT_AS is set for
each call), so taking more ends in a MemoryError, which is a violation like every other foreign error. Time
is the processor's, since other programs run on the machine too, and the least of three tries.
"""

from __future__ import annotations

import contextlib
import gc
import io
import multiprocessing
import random
import resource
import shutil
import time
import warnings
from argparse import Namespace
from collections.abc import Callable, Iterator
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
import pytest
import torch
from harness.campaign import Campaign
from harness.hostile_files import LETTER, Case, cases, fast_folder, reseal
from harness.tiny_training import TOKENIZER, quick_config, tiny_split

import charlm
from charlm import GPT, CharTokenizer, GPTConfig, Trainer
from charlm.cli import info
from charlm.cli.output import Console
from charlm.cli.signals import Signals
from charlm.errors import CharLMError
from charlm.files import safetensors, strict_json

SECONDS = 0.25
MEMORY = 64 << 20
TOKENIZER_MEMORY = 256 << 20
FOREIGN = 200  # characters of a file in a message
UNLIMITED = resource.RLIM_INFINITY
MODEL_FILES = {"config.json", "tokenizer.json", "model.safetensors"}

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not Path("/proc/self/statm").exists(), reason="the size of the address space is read from /proc"
    ),
]


def make_run(folder: Path) -> dict[str, bytes]:
    """Train a run and save its model beside it; return the contents of the files that cases replace."""
    train, val = tiny_split()
    model = GPT(GPTConfig(vocab_size=TOKENIZER.vocab_size, block_size=8, n_layer=1, n_head=2, n_embd=8))
    config = quick_config(max_steps=4)
    trainer = Trainer(
        model, train, config, val_data=val, device="cpu", out_dir=folder / "run", tokenizer=TOKENIZER
    )
    checkpoint = trainer.fit().checkpoint
    assert checkpoint is not None
    charlm.CharLM(model, TOKENIZER).save(folder / "model")
    real = {file.name: file.read_bytes() for file in checkpoint.iterdir()}
    return {**real, "run.json": (folder / "run" / "run.json").read_bytes()}


def doors(folder: Path, case: Case) -> Iterator[tuple[str, Callable[[], object]]]:
    """Yield the name and the call of every public function that comes to read the case's files."""
    run, model = folder / "run", folder / "model"
    checkpoint = next((run / "checkpoints").iterdir())
    for name, data in case.files.items():
        if name.endswith(".safetensors"):
            yield "safetensors.loads", partial(safetensors.loads, bytearray(data), path="file")
        else:
            limit = 8 << 20 if name == "tokenizer.json" else strict_json.MAX_BYTES
            yield "strict_json.loads", partial(strict_json.loads, data, path="file", max_bytes=limit)
    if "tokenizer.json" in case.files:
        yield "CharTokenizer.load", lambda: CharTokenizer.load(model / "tokenizer.json")
    if case.files.keys() & MODEL_FILES:
        yield "load(model)", lambda: charlm.load(model, device="cpu")
        yield "GPT.load", lambda: GPT.load(model)
        yield "info MODEL", lambda: shown(model, verify=False)
    yield "load(checkpoint)", lambda: charlm.load(checkpoint, device="cpu")
    yield "load(run)", lambda: charlm.load(run, device="cpu")
    yield "Trainer.resume", lambda: resumed(run)
    yield "info RUN", lambda: shown(run, verify=False)
    yield "info --verify RUN", lambda: shown(run, verify=True)
    yield "info CHECKPOINT", lambda: shown(checkpoint, verify=False)


def resumed(run: Path) -> None:
    """Resume the run and use the global generators, which a checkpoint sets."""
    before = torch.get_rng_state(), np.random.get_state(), random.getstate()  # noqa: NPY002 - they are set
    train, val = tiny_split()
    try:
        Trainer.resume(run, train, val_data=val, device="cpu")
        torch.rand(1000), np.random.rand(1000), [random.gauss(0, 1) for _ in range(10)]  # noqa: NPY002
    finally:
        torch.set_rng_state(before[0])
        np.random.set_state(before[1])  # noqa: NPY002
        random.setstate(before[2])


def shown(path: Path, *, verify: bool) -> None:
    """Call what `charlm info` calls, and check that what it wrote can be printed."""
    written, complaints = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(written), contextlib.redirect_stderr(complaints):
        info.run(Namespace(run=str(path), verify=verify, json=False), Console(), Signals(), 0.0)
    for line in [*written.getvalue().split("\n"), *complaints.getvalue().split("\n")]:
        if not line.isprintable():
            raise AssertionError(f"charlm info writes {line!r}")


def address_space() -> int:
    return int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0]) * resource.getpagesize()


def measured(call: Callable[[], object], memory: int) -> tuple[str, str, float]:
    """Call with room for so many more bytes; return how it ended, the message, and the seconds it took."""
    began = time.process_time()
    resource.setrlimit(resource.RLIMIT_AS, (address_space() + memory, UNLIMITED))
    try:
        call()
        ended, message = "accepted", ""
    except (CharLMError, OSError, TypeError) as error:
        ended, message = type(error).__name__, str(error)
    except BaseException as error:  # noqa: BLE001 - what must not be is reported, and the next case goes on
        ended, message = f"violation: {type(error).__name__}", str(error)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (UNLIMITED, UNLIMITED))
    return ended, message, time.process_time() - began


def problem_with(ended: str, message: str, seconds: float, folder: Path) -> str | None:
    """Return what is wrong with the end of a call, or None."""
    if ended.startswith("violation"):
        return f"{ended}: {message[:300]!r}"
    own = message.replace(str(folder), "")
    if "must fit into memory" in own:
        return f"took more memory: {own[:300]!r}"
    if not own.isprintable():
        return f"a message that is not printable: {own[:300]!r}"
    if own.count(LETTER) > FOREIGN or len(own) > 3_000:
        return f"a message of {len(own)} characters, {own.count(LETTER)} of them the file's: {own[:300]!r}"
    if seconds > SECONDS:
        return f"took {seconds:.3f} s"
    return None


def child(pipe: Connection, folder: Path, seed: int, count: int) -> None:
    """Take all cases through all doors, and send what each door did, then the name of the next case."""
    warnings.simplefilter("ignore")
    real = make_run(folder)
    checkpoint = next((folder / "run" / "checkpoints").iterdir())
    places = {name: [checkpoint / name] for name in real}
    for name in MODEL_FILES:
        places[name].append(folder / "model" / name)
    gc.freeze()  # so that a collection looks at what came since, and takes no time
    places["run.json"] = [folder / "run" / "run.json"]
    for case in cases(count, seed, real):
        pipe.send(case.name)
        gc.collect()
        for name, data in case.files.items():
            for place in places[name]:
                place.write_bytes(data)
        if "manifest.json" not in case.files:
            reseal(checkpoint, **case.manifest)
        data_size = sum(map(len, case.files.values()))
        memory = data_size + (TOKENIZER_MEMORY if "tokenizer.json" in case.files else MEMORY)
        for door, call in doors(folder, case):
            for _ in range(3):
                ended, message, seconds = measured(call, memory)
                if seconds <= SECONDS or ended.startswith("violation"):
                    break
            pipe.send((door, ended, problem_with(ended, message, seconds, folder), seconds))
        for name in [*case.files, "manifest.json"]:
            for place in places[name]:
                place.write_bytes(real[name])
    pipe.send(None)


def test_hostile_files_end_in_our_errors_at_once_and_in_little_memory(
    campaign: Campaign, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MALLOC_MMAP_THRESHOLD_", "131072")  # what is freed goes back, so that growth is seen
    monkeypatch.setenv("MALLOC_TRIM_THRESHOLD_", "131072")
    folder = fast_folder()
    here, there = multiprocessing.get_context("spawn").Pipe()
    process = multiprocessing.get_context("spawn").Process(
        target=child, args=(there, folder, campaign.seed, campaign.trials(short=50)), daemon=True
    )
    process.start()
    there.close()
    problems, case, slowest = [], "the first", 0.0
    try:
        while True:
            said = here.recv()
            if said is None:
                break
            if isinstance(said, str):
                case = said
                campaign.counted("cases")
                continue
            door, ended, problem, seconds = said
            slowest = max(slowest, seconds)
            campaign.counted("calls")
            campaign.counted("calls that accepted" if ended == "accepted" else "refusals")
            if problem is not None:
                problems.append(f"{case}, {door}: {problem}")
    except EOFError:
        process.join()
        problems.append(f"{case}: the process died with {process.exitcode}")
    finally:
        process.kill()
        process.join()
        shutil.rmtree(folder)
    campaign.counted("ms of the slowest call", round(1000 * slowest))
    assert not problems, f"seed {campaign.seed}: {len(problems)} violations:\n" + "\n".join(problems[:200])
