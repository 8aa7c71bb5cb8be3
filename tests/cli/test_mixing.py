"""What a run comes to: the GPT, the n-gram model or their mixture, decided by what is set aside."""

from __future__ import annotations

import json
import random
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from harness.command import MIXING, TEXT, TINY, Command, environment, text_file
from harness.warm import WarmPython

import charlm
from charlm import GPT, BlockDataset, CharTokenizer, MixtureLM, NGramLM, Trainer
from charlm.backends.registry import get_backend
from charlm.cli import mixing
from charlm.cli.baseline import Counted
from charlm.errors import CheckpointMismatchError
from charlm.training import read_history

LEARNS = (
    *("--max-steps", "120", "--eval-interval", "60", "--batch-size", "8"),
    *("--learning-rate", "0.01", "--n-embd", "32"),
)
"""With these the GPT comes to know something that counting does not."""


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str]) -> Command:
    return Command(capsys)


def sentences(count: int = 400, seed: int = 0) -> str:
    """Return a text of which both counting and learning know something."""
    draw = random.Random(seed)
    names = ["anna", "bert", "carla", "doro", "emil"]
    return "".join(
        f"{draw.choice(names)} has {draw.randint(0, 999)} {draw.choice(['red', 'green', 'blue'])} bottles\n"
        for _ in range(count)
    )


@pytest.fixture
def text(tmp_path: Path) -> Path:
    file = tmp_path / "text.txt"
    file.write_text(sentences(), encoding="utf-8")
    return file


def record_of(run: Path) -> dict[str, Any]:
    values: dict[str, Any] = json.loads((run / "train.json").read_bytes())
    return values


def mixed(command: Command, text: Path, run: Path, *words: str) -> MixtureLM:
    """Train, and return the run's result, which is a mixture."""
    assert command("train", text, "-o", run, *MIXING, *LEARNS, *words) == 0
    model = charlm.load(run, device="cpu").model
    assert isinstance(model, MixtureLM), command.err
    return model


def test_the_result_is_the_mixture_of_the_best_checkpoint_and_all_counts(
    command: Command, text: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    model = mixed(command, text, run)
    said = command.err
    (checkpoint,) = (run / "checkpoints").iterdir()
    gpt, ngram = charlm.load(checkpoint, device="cpu").model, charlm.load(run / "ngram", device="cpu").model
    for member, alone in zip(model.members, (gpt, ngram), strict=True):
        for name, tensor in alone.state_dict().items():
            assert torch.equal(member.state_dict()[name], tensor)
    assert isinstance(charlm.load(run, device="cpu", mixture=False).model, GPT)
    # What is said is what `eval` says of the same text.
    whole = text.read_text(encoding="utf-8")
    tokenizer, val = CharTokenizer.from_text(whole), whole[int(0.9 * len(whole)) :]
    losses = {
        name: charlm.CharLM(one, tokenizer).evaluate(val).loss_nats
        for name, one in (("mixture", model), ("gpt", MixtureLM([gpt])), ("ngram", ngram))
    }
    assert record_of(run)["result"]["loss_nats"] == pytest.approx(losses, abs=1e-6)
    assert losses["mixture"] < min(losses["gpt"], losses["ngram"])
    line = re.search(
        r"^result +the mixture of both: ([\d.]+) nats .* in windows of 1,0\d\d .*; (.*)$", said, re.M
    )
    assert line is not None
    assert float(line[1]) == pytest.approx(losses["mixture"], abs=1e-4)
    assert line[2] == f"gpt {losses['gpt']:.4f}, ngram {losses['ngram']:.4f}"
    for command_line, found in (
        (("eval", run, text), "mixture"),
        (("info", run), "result: mixture, val loss"),
    ):
        assert command(*command_line) == 0
        assert found in command.out
    assert command("eval", run, text, "--no-mixture", "--json") == 0
    assert json.loads(command.out)["kind"] == "gpt"
    kind, loss = read_history(run).result or ("", 0.0)
    assert kind == "mixture"
    assert loss == pytest.approx(losses["mixture"], abs=1e-6)


def test_it_generates_streams_and_is_scored_as_a_model_like_any_other(
    command: Command, text: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    lm = charlm.CharLM(mixed(command, text, run), CharTokenizer.from_text(sentences()))
    written = lm.generate("anna", 60, seed=1, temperature=0.8)
    assert "anna" + "".join(lm.stream("anna", 60, seed=1, temperature=0.8)) == written
    assert lm.generate(["bert", "anna"], 60, seed=1)[0] == lm.generate("bert", 60, seed=1)
    assert lm.model.why_not_native() is None or "compile" in str(lm.model.why_not_native())
    assert command("generate", run, "-p", "anna", "-n", "60", "--seed", "1", "--draft") == 0
    assert command.out == written + "\n" * (not written.endswith("\n"))
    assert command("generate", run, "-p", "anna", "-n", "60", "--seed", "1", "--no-mixture") == 0
    gpt = charlm.load(run, device="cpu", mixture=False)
    assert command.out.rstrip("\n") == gpt.generate("anna", 60, seed=1, temperature=0.8).rstrip("\n")


def test_what_is_set_aside_decides_and_the_validation_text_does_not(
    command: Command, text: Path, tmp_path: Path
) -> None:
    """The last tenth is replaced by another text of the same length and characters."""
    whole = text.read_text(encoding="utf-8")
    cut = int(0.9 * len(whole))
    shuffled = list(whole[cut:])
    random.Random(1).shuffle(shuffled)
    other = tmp_path / "other.txt"
    other.write_text(whole[:cut] + "".join(shuffled), encoding="utf-8")
    only_last = ("--eval-interval", "120")  # so that the same checkpoint is the best
    one = mixed(command, text, tmp_path / "one", *only_last)
    two = mixed(command, other, tmp_path / "two", *only_last)
    assert one.state_dict().keys() == two.state_dict().keys()
    assert all(torch.equal(tensor, two.state_dict()[name]) for name, tensor in one.state_dict().items())
    first, second = (record_of(tmp_path / name)["result"] for name in ("one", "two"))
    assert first["aside_loss_nats"] == second["aside_loss_nats"]
    assert first["loss_nats"] != second["loss_nats"]


def test_the_gpt_never_sees_what_is_set_aside(command: Command, text: Path, tmp_path: Path) -> None:
    run, again = tmp_path / "run", tmp_path / "again"
    mixed(command, text, run)
    whole = text.read_text(encoding="utf-8")
    tokenizer = CharTokenizer.from_text(whole)
    train, val = BlockDataset.from_text(whole, tokenizer, 16).split(0.9)
    with pytest.raises(CheckpointMismatchError):
        Trainer.resume(run, train, val_data=val, max_steps=121)
    count = record_of(run)["aside"]
    rest, aside = train.set_aside(count)
    assert count == len(aside.ids) > 100
    trainer = Trainer.resume(run, rest, val_data=val, device="cpu", max_steps=121)
    assert trainer.step == 120
    assert command("train", "-o", again, "--repeat", run) == 0
    results = [record_of(where)["result"] for where in (run, again)]
    assert results[0]["aside_loss_nats"] == results[1]["aside_loss_nats"]


def test_a_repeated_run_without_counts_has_no_result_to_decide(
    command: Command, text: Path, tmp_path: Path
) -> None:
    run, again = tmp_path / "run", tmp_path / "again"
    mixed(command, text, run)
    assert command("train", "-o", again, "--repeat", run, "--no-baseline") == 0
    assert "warning" not in command.err
    assert isinstance(charlm.load(again, device="cpu").model, GPT)


def test_without_it_the_gpt_learns_from_all_of_the_text(command: Command, text: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    for words in (("--no-mixture",), ("--no-baseline",)):
        assert command("train", text, "-o", run, *MIXING, *words, "--overwrite") == 0
        assert record_of(run)["aside"] == 0
        assert "to choose the result by" not in command.err
        assert "result" not in record_of(run)
        assert not (run / "mixture").exists()
        assert isinstance(charlm.load(run, device="cpu").model, GPT)
    assert command("train", "--resume", "-o", run, "--no-mixture") == 2
    assert "--no-mixture cannot be given with --resume" in command.err


@pytest.mark.parametrize("better", ["gpt", "ngram"])
def test_the_better_of_the_two_is_the_result_where_a_mixture_gains_nothing(
    better: str, command: Command, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    mixed(command, text, run)  # so that there is one to take away
    shutil.rmtree(run / "ngram")

    def spoilt(self: NGramLM, data: BlockDataset) -> NGramLM:
        return self  # uniform

    monkeypatch.setattr(mixing, "_GAIN", 99.0)
    if better == "gpt":
        monkeypatch.setattr(NGramLM, "fit", spoilt)
    assert command("train", text, "-o", run, *MIXING, "--overwrite") == 0
    assert record_of(run)["result"]["kind"] == better
    assert charlm.load(run, device="cpu").model.kind == better
    assert (run / "mixture").exists() == (better == "ngram")
    assert "result" in command.err
    assert command("info", run) == 0
    assert f"result: {better}" in command.out
    assert command("eval", run, text) == 0


def test_a_resumed_run_has_its_result_at_its_end_and_none_of_before(
    command: Command, text: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    mixed(command, text, run)
    first = record_of(run)["result"]
    assert command("train", "--resume", "-o", run, "--max-steps", "130") == 0
    second = record_of(run)["result"]
    assert second["checkpoint"] != first["checkpoint"]
    assert "result" in command.err
    assert isinstance(charlm.load(run, device="cpu").model, MixtureLM)
    before = (run / "mixture" / "model.safetensors").read_bytes()
    assert command("train", "--resume", "-o", run) == 0  # all is done
    assert "result  " not in command.err
    assert (run / "mixture" / "model.safetensors").read_bytes() == before


def test_a_run_that_was_killed_before_its_result_gets_it_when_it_is_resumed(
    command: Command, text: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    model = mixed(command, text, run)
    values = record_of(run)
    kept = values.pop("result")
    (run / "train.json").write_text(json.dumps(values), encoding="utf-8")
    shutil.rmtree(run / "mixture")
    assert isinstance(charlm.load(run, device="cpu").model, GPT)
    assert command("train", "--resume", "-o", run) == 0
    assert record_of(run)["result"] == kept
    again = charlm.load(run, device="cpu").model.state_dict()
    assert all(torch.equal(tensor, again[name]) for name, tensor in model.state_dict().items())


CTRL_C_AS_IT_CHOOSES = """
import os, signal, sys
from charlm.cli import mixing
from charlm.cli.__main__ import main

mixing.count_end = lambda *_: os.kill(os.getpid(), signal.SIGINT)
main(sys.argv[1:])
"""


def test_ctrl_c_before_the_result_is_chosen_says_how_to_have_it(
    command: Command, text: Path, tmp_path: Path, warm_python: WarmPython
) -> None:
    run = tmp_path / "my run"
    words = ("-c", CTRL_C_AS_IT_CHOOSES, "train", text, "-o", run, *MIXING, *LEARNS)
    process = warm_python.start(*map(str, words), env=environment(), stderr=subprocess.PIPE)
    said = process.communicate(timeout=300)[1].decode()
    assert process.returncode == 130, said
    assert said.endswith(
        f"stopped before the result was chosen; to choose it: charlm train --resume -o '{run}'\n"
    )
    assert "result" not in record_of(run)
    assert command("train", "--resume", "-o", run) == 0
    assert record_of(run)["result"]


def test_a_mixture_of_another_checkpoint_is_not_taken(
    command: Command, text: Path, tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    run, other = tmp_path / "run", tmp_path / "other"
    mixed(command, text, run)
    mixed(command, text, other, "--seed", "5")
    shutil.rmtree(run / "mixture")
    shutil.copytree(other / "mixture", run / "mixture")
    assert isinstance(charlm.load(run, device="cpu").model, GPT)
    assert not recwarn.list


def test_a_damaged_mixture_is_passed_over_with_a_warning(
    command: Command, text: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    mixed(command, text, run)
    (run / "mixture" / "model.safetensors").write_bytes(b"\0" * 100)
    with pytest.warns(RuntimeWarning, match="taking the model of the best checkpoint instead"):
        assert isinstance(charlm.load(run, device="cpu").model, GPT)
    assert command("info", run, "--verify") == 1


def test_a_short_text_has_nothing_to_spare(command: Command, tmp_path: Path) -> None:
    run, file = tmp_path / "run", tmp_path / "short.txt"
    file.write_text(TEXT[:160], encoding="utf-8")
    assert command("train", file, "-o", run, *MIXING, "--val-fraction", "0.2") == 0
    assert record_of(run)["aside"] == 0
    assert "too short to set a part of it aside, so the result will be the GPT" in command.err
    assert isinstance(charlm.load(run, device="cpu").model, GPT)


def test_a_run_without_validation_has_a_result_too(command: Command, text: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    mixed(command, text, run, "--val-fraction", "0")
    assert record_of(run)["result"]["loss_nats"] == {}
    assert re.search(r"^result +the mixture of both$", command.err, re.M)
    assert read_history(run).result is None


def test_what_goes_wrong_leaves_the_gpt(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"

    def fails(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(mixing, "save_model", fails)
    assert command("train", text_file(tmp_path), "-o", run, *MIXING) == 0
    assert "No space left on device; the result of the run is its GPT" in command.err
    assert isinstance(charlm.load(run, device="cpu").model, GPT)


def test_a_run_within_minutes_ends_in_time_with_its_result(
    command: Command, text: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    flags = [word for word in TINY if word not in {"--no-mixture", "--max-steps", "20"}]
    assert command("train", text, "-o", run, *flags, "--minutes", "0.1") == 0
    assert record_of(run)["result"]["kind"] in {"mixture", "ngram", "gpt"}
    assert record_of(run)["aside"] > 0


def test_what_deciding_will_take_is_kept_free_of_the_minutes(
    command: Command, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Reading takes what a trial says: what is set aside twice, the validation text once, and a new count."""
    ids = torch.arange(1_000) % 5
    part = BlockDataset(ids, 8)
    texts = mixing.Texts(part, part, part, BlockDataset(ids[:301], 8), CharTokenizer("abcde"))
    counted = Counted(NGramLM(5).fit(part), 1_000, 3.0)
    gpt = GPT.from_config("cpu-10s", vocab_size=5, block_size=8, n_layer=1, n_embd=16)
    monkeypatch.setattr(mixing, "evaluation_seconds", lambda *_, **__: 9.99)  # a hundredth for each of 999

    def left(seconds: float, eval_chars: int | None) -> tuple[int | None, float]:
        backend = get_backend("cpu")
        return mixing.time_to_conclude(texts, gpt, counted, eval_chars, seconds=seconds, backend=backend)

    chars, reserved = left(1_000.0, None)
    assert chars is None
    assert reserved == pytest.approx(3 + 2 * 9.99 + 3.01, abs=1)
    chars, reserved = left(40.0, 100)
    assert chars == 100  # a twentieth of the time, for reading them twice
    assert reserved == pytest.approx(3 + 2 * 1 + 1, abs=1)
    monkeypatch.setattr("charlm.cli.fit.time_to_conclude", lambda *_, **__: (None, 60.0))
    flags = [word for word in TINY if word not in {"--no-mixture", "--max-steps", "20"}]
    flags += ["--minutes", "1", "--schedule", "cosine"]
    assert command("train", text, "-o", tmp_path / "run", *flags) == 1
    assert "--minutes 1 is over before the training can begin" in command.err
