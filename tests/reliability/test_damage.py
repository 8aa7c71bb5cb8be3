"""Damage to a checkpoint is found before it is used: every bit, every length, every exchange of files.

A checkpoint of 68 KiB lies in memory and is damaged in place, verified, and mended. The long form is
exhaustive: `--trials 600000` takes every bit and every length. What is found must be a
CheckpointCorruptError that names the file. For a sample the same damages are met through `charlm.load` and
`Trainer.resume`, where no live object may change and an older whole checkpoint takes over.
"""

from __future__ import annotations

import itertools
import os
import random
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from harness.campaign import Campaign
from harness.hostile_files import fast_folder, reseal
from harness.tiny_training import (
    TOKENIZER,
    Noise,
    global_generators,
    quick_config,
    same_tensors,
    tensors_of,
    tiny_split,
)

import charlm
from charlm import GPT, GPTConfig, Trainer
from charlm.errors import CheckpointCorruptError, CheckpointError
from charlm.training import list_checkpoints, verify_checkpoint

FILES = (
    "config.json",
    "manifest.json",
    "model.safetensors",
    "state.json",
    "tokenizer.json",
    "train.safetensors",
)
PARTS = ("model.safetensors", "state.json", "train.safetensors")  # those that say which save they belong to


def tiny(n_embd: int = 16, seed: int = 0) -> GPT:
    torch.manual_seed(seed)
    V = TOKENIZER.vocab_size
    return GPT(GPTConfig(vocab_size=V, block_size=8, n_layer=1, n_head=2, n_embd=n_embd))


def trained(folder: Path) -> Path:
    """Train a run that keeps the checkpoints of steps 4 and 8; only that of step 8 has a validation loss."""
    train, val = tiny_split()
    config = quick_config(max_steps=8, eval_interval=8, save_interval=4, keep_last=2)
    Trainer(tiny(), train, config, val_data=val, device="cpu", out_dir=folder, tokenizer=TOKENIZER).fit()
    return folder


@pytest.fixture(scope="module")
def run() -> Iterator[Path]:
    folder = fast_folder()
    yield trained(folder / "run")
    shutil.rmtree(folder)


@pytest.fixture
def checkpoint(run: Path) -> Iterator[Path]:
    """A copy of the newest checkpoint that may be damaged."""
    folder = fast_folder()
    newest = list_checkpoints(run)[-1].path
    yield shutil.copytree(newest, folder / newest.name)
    shutil.rmtree(folder)


def spread(total: int, campaign: Campaign, short: int) -> Iterator[int]:
    """Yield as many numbers below `total` as there are trials, evenly spread, or all of them."""
    count = min(campaign.trials(short), total)
    return ((i * total // count + campaign.seed) % total for i in range(count))


def found(checkpoint: Path, name: str, what: str) -> None:
    """Expect that a damage to the file is found and the file named."""
    message = None
    try:
        verify_checkpoint(checkpoint)
    except CheckpointCorruptError as error:
        message = str(error)
    assert message is not None, f"{what}: not found"
    assert name in message, f"{what}: the file is not named: {message}"


def flip(descriptor: int, bit: int) -> None:
    byte = os.pread(descriptor, 1, bit // 8)
    os.pwrite(descriptor, bytes([byte[0] ^ 1 << bit % 8]), bit // 8)


def test_every_flipped_bit_is_found(checkpoint: Path, campaign: Campaign) -> None:
    sizes = {name: (checkpoint / name).stat().st_size for name in FILES}
    assert 64 << 10 <= sum(sizes.values()) <= 72 << 10
    bits = [(name, start) for name in FILES for start in range(0, 8 * sizes[name], 8)]
    opened = {name: os.open(checkpoint / name, os.O_RDWR) for name in FILES}
    for number in spread(8 * len(bits), campaign, short=800):
        name, start = bits[number // 8]
        bit = start + number % 8
        flip(opened[name], bit)
        found(checkpoint, name, f"bit {bit} of {name} flipped")
        flip(opened[name], bit)
        campaign.counted("bits flipped")
    verify_checkpoint(checkpoint)
    for descriptor in opened.values():
        os.close(descriptor)
    campaign.counted("bytes in all", sum(sizes.values()))


def test_every_truncation_is_found(checkpoint: Path, campaign: Campaign) -> None:
    contents = {name: (checkpoint / name).read_bytes() for name in FILES}
    lengths = [(name, length) for name in FILES for length in range(len(contents[name]))]
    for number in spread(len(lengths), campaign, short=500):
        name, length = lengths[number]
        os.truncate(checkpoint / name, length)
        found(checkpoint, name, f"{name} cut to {length} bytes")
        (checkpoint / name).write_bytes(contents[name])
        campaign.counted("lengths")
    verify_checkpoint(checkpoint)


@pytest.mark.slow
def test_flipped_bits_of_a_large_checkpoint_are_found(tmp_path: Path, campaign: Campaign) -> None:
    train, _ = tiny_split()
    folder = fast_folder()
    trainer = Trainer(
        tiny(n_embd=256), train, quick_config(max_steps=1), device="cpu", out_dir=folder / "run"
    )
    checkpoint = trainer.fit().checkpoint
    assert checkpoint is not None
    names = [name for name in FILES if (checkpoint / name).exists()]
    sizes = [(checkpoint / name).stat().st_size for name in names]
    assert 9 * 10**6 < sum(sizes) < 12 * 10**6
    draw = random.Random(campaign.seed)
    for trial in range(min(campaign.trials(short=100), 10_000)):
        [name] = draw.choices(names, sizes)
        bit = draw.randrange(8 * (checkpoint / name).stat().st_size)
        descriptor = os.open(checkpoint / name, os.O_RDWR)
        flip(descriptor, bit)
        found(checkpoint, name, f"trial {trial}: bit {bit} of {name} flipped")
        flip(descriptor, bit)
        os.close(descriptor)
        campaign.counted("bits flipped")
    verify_checkpoint(checkpoint)
    campaign.counted("bytes in all", sum(sizes))
    shutil.rmtree(folder)


def test_missing_extra_emptied_doubled_and_exchanged_files_are_found(
    checkpoint: Path, campaign: Campaign
) -> None:
    contents = {name: (checkpoint / name).read_bytes() for name in FILES}

    def expect(name: str, what: str) -> None:
        found(checkpoint, name, what)
        for file in checkpoint.iterdir():
            file.unlink()
        for file_name, content in contents.items():
            (checkpoint / file_name).write_bytes(content)
        campaign.counted("damages")

    for name, content in contents.items():
        (checkpoint / name).unlink()
        expect(name, f"{name} is missing")
        (checkpoint / name).write_bytes(b"")
        expect(name, f"{name} is empty")
        (checkpoint / name).write_bytes(content * 2)
        expect(name, f"{name} twice over")
        (checkpoint / name).write_bytes(content + b"\0")
        expect(name, f"{name} one byte longer")
        (checkpoint / (name + ".old")).write_bytes(content)
        expect(name + ".old", "a file that the manifest does not list")
    for extra in ("pytorch_model.bin", ".hidden", "x" * 200, "\x1b[31m"):
        (checkpoint / extra).write_bytes(b"")
        expect(extra[:30] if extra.isprintable() else "x1b[31m", "a file that the manifest does not list")
    (checkpoint / "manifest.json").write_bytes(contents["manifest.json"].replace(b": ", b":"))
    expect("manifest.json", "a manifest that says the same in other bytes")
    for one, other in itertools.combinations(FILES, 2):
        (checkpoint / one).write_bytes(contents[other])
        (checkpoint / other).write_bytes(contents[one])
        expect("manifest.json" if "manifest.json" in {one, other} else ".", f"{one} and {other} exchanged")
    verify_checkpoint(checkpoint)


def test_parts_of_two_saves_are_found_even_under_a_new_manifest(
    run: Path, checkpoint: Path, tmp_path: Path, campaign: Campaign
) -> None:
    own = {name: (checkpoint / name).read_bytes() for name in FILES}
    earlier = list_checkpoints(run)[0].path
    other_run = list_checkpoints(trained(tmp_path / "other"))[-1].path
    for source in (earlier, other_run):
        for count in range(1, len(PARTS) + 1):
            for mixed in itertools.combinations(PARTS, count):
                for name in mixed:
                    shutil.copy(source / name, checkpoint / name)
                found(checkpoint, "", f"{mixed} of another save")
                reseal(checkpoint)
                with pytest.raises(CheckpointCorruptError, match=r"' belongs to another checkpoint") as error:
                    verify_checkpoint(checkpoint)
                assert any(name in str(error.value) for name in mixed)
                for name, content in own.items():
                    (checkpoint / name).write_bytes(content)
                campaign.counted("mixtures")
    verify_checkpoint(checkpoint)


@pytest.mark.slow
def test_damage_changes_no_live_object_and_an_older_checkpoint_takes_over(
    run: Path, tmp_path: Path, campaign: Campaign
) -> None:
    train, val = tiny_split()
    older, newest = (info.path for info in list_checkpoints(run))
    two = shutil.copytree(run, tmp_path / "two") / "checkpoints"
    only = shutil.copytree(run, tmp_path / "only") / "checkpoints"
    shutil.rmtree(only / older.name)
    whole = Trainer.resume(only.parent, train, val_data=val, device="cpu")
    expected = tensors_of(_resumed_quietly(two.parent, older.name))
    model, noise = tiny(seed=1), Noise()
    noise.drawn = [1.0]
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    draw = random.Random(campaign.seed)
    for trial in range(campaign.trials(short=12)):
        name = FILES[trial % len(FILES)]
        content = bytearray((newest / name).read_bytes())
        where, cut = draw.randrange(len(content)), draw.random() < 0.3
        if cut:
            del content[where:]
        else:
            content[where] ^= 1 << draw.randrange(8)
        what = f"seed {campaign.seed}, trial {trial}: byte {where} of {name} {'cut' if cut else 'changed'}"
        for folder in (two, only):
            (folder / newest.name / name).write_bytes(content)
        generators = global_generators()
        with pytest.raises(CheckpointCorruptError, match=name):
            charlm.load(only / newest.name, device="cpu")
        with pytest.raises(CheckpointError, match=name):
            charlm.load(only.parent, device="cpu")
        with pytest.raises(CheckpointError, match=name):
            Trainer.resume(only.parent, train, val_data=val, model=model, callbacks=[noise], device="cpu")
        with pytest.warns(RuntimeWarning, match=newest.name):
            charlm.load(two.parent, device="cpu")
        assert global_generators() == generators, what
        assert same_tensors(before, model.state_dict()), what
        assert noise.drawn == [1.0], what
        with pytest.warns(RuntimeWarning, match=rf"{newest.name}.*{name}.*going on from step 4"):
            fallen_back = Trainer.resume(two.parent, train, val_data=val, device="cpu")
        assert fallen_back.step == 4, what
        assert same_tensors(tensors_of(fallen_back), expected), what
        for folder in (two, only):
            shutil.copy(newest / name, folder / newest.name / name)
        campaign.counted("cuts" if cut else "changed bytes")
    assert same_tensors(tensors_of(whole), tensors_of(Trainer.resume(two.parent, train, val_data=val)))


def _resumed_quietly(run: Path, name: str) -> Trainer:
    """Resume a copy of the run in which only that checkpoint is left."""
    train, val = tiny_split()
    copy = shutil.copytree(run, run.with_name("alone"))
    for other in (copy / "checkpoints").iterdir():
        if other.name != name:
            shutil.rmtree(other)
    return Trainer.resume(copy, train, val_data=val, device="cpu")
