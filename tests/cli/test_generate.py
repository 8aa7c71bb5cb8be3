"""`charlm generate`, `charlm eval` and `charlm info`, in this process, on one tiny run."""

from __future__ import annotations

import io
import json
import shutil
import sys
from pathlib import Path

import pytest
from harness.command import TEXT, TINY, Command, text_file
from harness.hostile_files import json_of, reseal

import charlm
from charlm.cli.__main__ import main
from charlm.cli.parser import text_argument
from charlm.files import strict_json
from charlm.native.storage import Storage
from charlm.runs.checkpoint import list_checkpoints, verify_checkpoint


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cli")
    text = str(text_file(folder))
    assert main(["train", text, "-o", str(folder / "run"), *TINY, "-q", "--keep-last", "2"]) == 0
    return folder / "run"


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str]) -> Command:
    return Command(capsys)


def test_one_sample_is_the_prompt_and_what_the_library_adds(command: Command, run: Path) -> None:
    assert command("generate", run, "-p", "green", "-n", "40", "--seed", "5") == 0
    wanted = charlm.load(run).generate("green", 40, temperature=0.8, seed=5)
    assert command.out == wanted + "\n" * (not wanted.endswith("\n"))
    assert not command.err
    assert command("generate", run, "-p", "green\n", "-n", "0") == 0
    assert command.out == "green\n"


def test_several_samples_are_separated_and_the_first_is_the_one_alone(command: Command, run: Path) -> None:
    assert command("generate", run, "-n", "30", "--seed", "5") == 0
    alone = command.out
    assert command("generate", run, "-n", "30", "--seed", "5", "--num-samples", "3") == 0
    samples = command.out.split("-" * 40 + "\n")
    assert len(samples) == 3
    assert samples[0] == alone
    assert command.out.endswith("\n")


def test_json_holds_all_that_is_needed_to_repeat_it(command: Command, run: Path) -> None:
    flags = ("-p", "on the", "-n", "20", "--top-k", "3", "--top-p", "0.9", "--min-p", "0.01", "-t", "0.5")
    assert command("generate", run, *flags, "--json", "--num-samples", "2") == 0
    first = json.loads(command.out)
    assert first["prompt"] == "on the"
    assert len(first["samples"]) == 2
    assert first["settings"] == {
        "run": str(run),
        "max_new_tokens": 20,
        "stop": [],
        "keep_stop": False,
        "weights": None,
        "temperature": 0.5,
        "top_k": 3,
        "top_p": 0.9,
        "min_p": 0.01,
        "overflow": "restart",
        "repetition_penalty": 1.0,
        "draft": False,
        "banned": "",
        "allowed": None,
    }
    assert command("generate", run, *flags, "--json", "--seed", str(first["seed"])) == 0
    assert json.loads(command.out)["samples"] == first["samples"][:1]


@pytest.mark.parametrize("weights", ["float32", "bfloat16", "int8"])
def test_generate_and_eval_take_rounded_weights(
    command: Command, run: Path, tmp_path: Path, weights: Storage
) -> None:
    lm = charlm.load(run, weights=weights)
    assert command("generate", run, "-p", "green", "-n", "40", "--seed", "5", "--weights", weights) == 0
    assert command.out.rstrip("\n") == lm.generate("green", 40, temperature=0.8, seed=5).rstrip("\n")
    file = tmp_path / "text.txt"
    file.write_text(TEXT[:200], encoding="utf-8", newline="")
    assert command("eval", run, file, "--json", "--weights", weights) == 0
    assert json.loads(command.out)["loss_nats"] == lm.evaluate(TEXT[:200]).loss_nats


def test_the_drawn_seed_is_shown_on_request(command: Command, run: Path) -> None:
    assert command("generate", run, "-n", "30", "-v") == 0
    out, seed = command.out, command.err.removeprefix("seed ").strip()
    assert command("generate", run, "-n", "30", "--seed", seed) == 0
    assert command.out == out
    assert command("generate", run, "-n", "30", "-q", "-v") == 0
    assert not command.err
    assert command.out != out


def test_a_stop_string_ends_the_text(command: Command, run: Path) -> None:
    assert command("generate", run, "-n", "2000", "-t", "0", "--stop", "zz", "--stop=e", "--seed", "1") == 0
    assert "e" not in command.out
    before = command.out
    assert command("generate", run, "-n", "2000", "-t", "0", "--stop", "e", "--keep-stop", "--seed", "1") == 0
    assert command.out == before.removesuffix("\n") + "e\n"


def test_prompts_come_from_files_and_standard_input(
    command: Command, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "prompt.txt").write_text("hanging on\n")
    assert command("generate", run, "--prompt-file", tmp_path / "prompt.txt", "-n", "0") == 0
    assert command.out == "hanging on\n"
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"the wall"), encoding="utf-8"))
    assert command("generate", run, "-", "-n", "0") == 0
    assert command.out == "the wall\n"


def test_an_unknown_character_is_named_and_nothing_is_written(command: Command, run: Path) -> None:
    assert command("generate", run, "-p", "green %") == 1
    assert command.err.startswith(
        "charlm: error: 1 character is not in the vocabulary: '%' (U+0025) at position 6"
    )
    assert not command.out


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["-t", "-1"], "temperature must be 0, or from 1e-6 to 1e6, got -1.0"),
        (["--top-k", "0"], "top_k must be an int, 1 or more"),
        (["-n", "-1"], "--max-new-tokens must be 0 or more, got -1"),
        (["--num-samples", "0"], "--num-samples must be 1 or more, got 0"),
        (["--stop", ""], "stop must be a sequence of non-empty strings"),
        (["-p", "a", "-"], "-p, --prompt-file and - exclude each other"),
        (["hello"], "unexpected argument 'hello'; a prompt is given with -p"),
    ],
)
def test_wrong_options_are_a_wrong_command_line(
    command: Command, run: Path, flags: list[str], message: str
) -> None:
    assert command("generate", run, *flags) == 2
    assert message in command.err


def test_what_is_no_model_is_refused(command: Command, tmp_path: Path) -> None:
    for name, *more in (("generate",), ("eval", "python-docs"), ("info",)):
        assert command(name, tmp_path, *more) == 1
        assert command.err.startswith("charlm: error: ")
        assert command.err.count("\n") == 1


def test_words_are_utf8_whatever_the_locale_says(monkeypatch: pytest.MonkeyPatch) -> None:
    assert text_argument("é") == "é"
    monkeypatch.setattr(sys, "getfilesystemencoding", lambda: "ascii")
    assert text_argument("é".encode().decode("utf-8", "surrogateescape")) == "é"


def test_eval_agrees_with_the_library(command: Command, run: Path, tmp_path: Path) -> None:
    text = text_file(tmp_path, TEXT[:500])
    wanted = charlm.load(run).evaluate(TEXT[:500])
    assert command("eval", run, text, "--json") == 0
    found = json.loads(command.out)
    assert found["loss_nats"] == wanted.loss_nats
    assert (found["n_chars"], found["unit"]) == (499, "character")
    assert command("eval", run, text) == 0
    assert f"{wanted.bits_per_char:.4f}" in command.out
    assert f"perplexity  {wanted.perplexity:.4f}  " in command.out
    assert "per character" in command.out
    assert not command.err


def test_an_impossible_text_has_no_finite_figures(command: Command, tmp_path: Path) -> None:
    tokenizer = charlm.CharTokenizer("ab")
    model = charlm.BigramLM(2).fit(charlm.BlockDataset.from_text("abababab", tokenizer, 1), smoothing=0)
    charlm.CharLM(model, tokenizer).save(tmp_path / "model")
    text = text_file(tmp_path, "aa")
    assert command("eval", tmp_path / "model", text, "--json") == 0
    assert json.loads(command.out)["loss_nats"] is None
    assert command("info", tmp_path / "model", "--verify") == 0
    assert "model: bigram, 4 parameters\n" in command.out


def test_info_on_a_run(command: Command, run: Path) -> None:
    assert command("info", run) == 0
    assert f"run: {run}\n" in command.out
    assert "FLOPs per character" in command.out
    assert "\ntokenizer: character, vocabulary " in command.out
    assert "\ntraining: 20 of 20 steps, 640 characters, 0:0" in command.out
    assert "\ncheckpoints: 2\n" in command.out
    assert command.out.splitlines()[-1].endswith("best, newest")
    assert command("info", run, "--json", "--verify") == 0
    found = json.loads(command.out)
    assert found["kind"] == "run"
    assert [entry["step"] for entry in found["checkpoints"]] == [10, 20]
    assert found["training"]["settings"]["batch_size"] == 2
    assert found["model"]["settings"]["n_embd"] == 16


def test_info_on_a_checkpoint_and_on_a_saved_model(command: Command, run: Path, tmp_path: Path) -> None:
    checkpoint = list_checkpoints(run)[0].path
    assert command("info", checkpoint, "--verify") == 0
    assert command.out.startswith("checkpoint: ")
    assert "training: 10 of 20 steps" in command.out
    charlm.CharLM(charlm.BigramLM(256), charlm.ByteTokenizer()).save(tmp_path / "model")
    assert command("info", tmp_path / "model", "--verify") == 0
    assert command.out.startswith("model: ")
    assert "tokenizer: byte, vocabulary 256\n" in command.out
    weights = tmp_path / "model" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-4])
    assert command("info", tmp_path / "model", "--verify") == 1
    assert "model.safetensors" in command.err


def test_verify_finds_one_changed_bit(command: Command, run: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(run, tmp_path / "copy"))
    (copy / "checkpoints" / "notes").mkdir()
    first, second = list_checkpoints(copy)
    weights = bytearray((first.path / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (first.path / "model.safetensors").write_bytes(weights)
    assert command("info", copy) == 0
    assert command("info", copy, "--verify") == 1
    assert "has changed since it was saved" in command.err
    assert "damaged" in command.out.splitlines()[-2]
    assert command("info", first.path, "--verify") == 1
    manifest = second.path / "manifest.json"
    manifest.write_bytes(manifest.read_bytes()[:-10])
    assert command("info", copy) == 0
    assert "val loss unknown" in command.out.splitlines()[-1]
    (first.path / "manifest.json").unlink()
    assert command("info", copy, "--verify") == 1
    assert command.err.count("charlm: error: ") == 2


def test_info_does_not_call_a_newer_charlm_s_checkpoint_damaged(
    command: Command, run: Path, tmp_path: Path
) -> None:
    copy = Path(shutil.copytree(run, tmp_path / "copy"))
    *_, newest = list_checkpoints(copy)
    reseal(newest.path, version=2)
    assert command("info", copy) == 0
    assert command.out.splitlines()[-1].endswith("not readable by this charlm")
    assert command("info", copy, "--verify") == 1
    assert "has version 2 of charlm.checkpoint; this charlm reads up to 1. Update charlm." in command.err
    assert command("info", copy, "--json") == 0
    *_, entry = json.loads(command.out)["checkpoints"]
    assert not entry["damaged"]
    assert "Update charlm" in entry["problem"]


def test_info_on_a_checkpoint_that_lacks_a_file_is_an_error(
    command: Command, run: Path, tmp_path: Path
) -> None:
    copy = Path(shutil.copytree(run, tmp_path / "copy"))
    (list_checkpoints(copy)[-1].path / "state.json").unlink()
    assert command("info", copy) == 1
    assert "No such file or directory" in command.err
    assert "state.json" in command.err


def test_a_checkpoint_that_a_run_deletes_meanwhile_is_no_damage(
    command: Command, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for at in (0, -1):
        copy = Path(shutil.copytree(run, tmp_path / str(at)))
        deleted = list_checkpoints(copy)[at]

        def verify(path: Path, gone: Path = deleted.path) -> object:
            if path == gone:
                shutil.rmtree(gone)
            return verify_checkpoint(path)

        monkeypatch.setattr("charlm.cli.info.verify_checkpoint", verify)
        assert command("info", copy, "--verify") == 0
        assert "\ncheckpoints: 1\n" in command.out
        assert "damaged" not in command.out
        monkeypatch.undo()


def test_info_escapes_what_a_vocabulary_holds(command: Command, tmp_path: Path) -> None:
    charlm.CharLM(charlm.BigramLM(2), charlm.CharTokenizer("\x1ba")).save(tmp_path / "model")
    assert command("info", tmp_path / "model") == 0
    assert "\x1b" not in command.out


def test_info_escapes_the_names_of_settings_and_refuses_a_number_of_steps_that_is_none(
    command: Command, run: Path, tmp_path: Path
) -> None:
    newest = list_checkpoints(run)[-1].path
    checkpoint = shutil.copytree(newest, tmp_path / newest.name)
    state = json_of(checkpoint / "state.json")
    config = state["config"]
    assert isinstance(config, dict)
    for changes, code in (({"\x1b[2J": 1}, 0), ({"max_steps": "many"}, 1)):
        changed = {**state, "config": {**config, **changes}}
        (checkpoint / "state.json").write_bytes(strict_json.dumps(changed))
        reseal(checkpoint)
        assert command("info", checkpoint) == code
        assert "\x1b" not in command.out
    assert "must hold an integer in 'max_steps', got 'many'" in command.err
    (checkpoint / "state.json").write_bytes(
        strict_json.dumps({**state, "config": {k: v for k, v in config.items() if k != "max_steps"}})
    )
    reseal(checkpoint)
    assert command("info", checkpoint) == 0
    assert "of 2,000 steps" in command.out  # what it was for who did not say it


def test_characters_can_be_banned_and_allowed_and_repetition_made_dear(command: Command, run: Path) -> None:
    assert (
        command("generate", run, "-p", "on ", "-n", "100", "--seed", "1", "--allow", "abc\n", "--ban=b") == 0
    )
    assert set(command.out[3:]) <= set("ac\n")
    assert command("generate", run, "-n", "50", "--seed", "1", "--repetition-penalty", "3") == 0
    wanted = charlm.load(run).generate("", 50, temperature=0.8, seed=1, repetition_penalty=3.0)
    assert command.out == wanted + "\n" * (not wanted.endswith("\n"))
    assert command("generate", run, "--allow", "Ω") == 1
    assert "at least one character of the vocabulary must be left to be written" in command.err
    assert command("generate", run, "--repetition-penalty", "0") == 2
    assert "repetition_penalty must be from 0.01 to 100, got 0.0" in command.err


def test_the_lines_of_a_file_are_ranked(command: Command, run: Path, tmp_path: Path) -> None:
    lines = tmp_path / "lines.txt"
    lines.write_text("bottles\n\nbottled\n9999999\n", encoding="utf-8")
    assert command("generate", run, "-p", "green ", "--rank", lines) == 1  # "d" is no character of the text
    assert command("generate", run, "-p", "green ", "--rank", lines, "--on-unknown", "skip", "--json") == 0
    assert {one["text"] for one in json.loads(command.out)["ranked"]} == {"bottles", "bottle", "9999999"}
    assert "note: not known to the model, and left out: 'd' U+0064; 1 in all" in command.err
    lines.write_text("bottles\n\nbbbbbbb\n", encoding="utf-8")
    assert command("generate", run, "-p", "green ", "--rank", lines) == 0
    ranked = charlm.load(run).rank(["bottles", "bbbbbbb"], prompt="green ")
    assert command.out == "".join(f"{nats:.4f}\t{text}\n" for text, nats in ranked)
    assert command("generate", run, "-p", "green ", "--rank", lines, "--json") == 0
    found = json.loads(command.out)
    assert found["ranked"] == [{"text": text, "log_prob_nats": nats} for text, nats in ranked]
    lines.write_text("\n", encoding="utf-8")
    assert command("generate", run, "--rank", lines) == 2
    assert "--rank needs a file with a continuation on each line" in command.err


def test_what_stands_in_the_training_text_is_told(command: Command, run: Path, tmp_path: Path) -> None:
    written = charlm.load(run).generate("on", 100, temperature=0.8, seed=1)
    source = tmp_path / "source.txt"
    source.write_text("…" + written[12:72] + "…", encoding="utf-8")
    flags = ("-p", "on", "-n", "100", "--seed", "1", "--verbatim", source)
    assert command("generate", run, *flags) == 0
    assert command.out.startswith("on")
    assert (
        f"verbatim 60 of 100 characters stand in '{source}' in runs of 50 or more; the longest, of 60: "
        in command.err
    )
    assert command("generate", run, *flags, "--json", "--num-samples", "2") == 0
    first, second = json.loads(command.out)["verbatim"]
    assert first == {"n_chars": 100, "n_shared": 60, "longest": written[12:72], "passages": [[10, 70]]}
    assert second["n_shared"] == 0
    assert command("generate", run, "--verbatim", "nowhere.txt") == 1
