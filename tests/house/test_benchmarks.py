"""Every benchmark still runs, on a small text and a model of no use. What it measures is not looked at."""

from __future__ import annotations

import importlib.util
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from benchmarks import (
    batches,
    checkpoints,
    common,
    compression,
    constrained,
    cost,
    draft,
    draw,
    encode,
    generate,
    generate_context,
    gpu,
    loss_at_budget,
    ngram,
    sharing,
    step_time,
    time_to_loss,
    trainer_overhead,
    verify,
)
from benchmarks.gpu_parts import StaticDecoder
from harness.campaign import Campaign

from charlm import GPT, BlockDataset, CharLM, CharTokenizer, NGramLM
from charlm.evaluation import evaluate
from charlm.models.config import PresetName

pytestmark = pytest.mark.slow


@pytest.fixture
def quick(tmp_path: Path, small_corpus: Path) -> Callable[..., Any]:
    """Run a benchmark's `--quick` and return its JSON."""

    def run(main: Callable[[list[str]], None], *options: str, data: bool = True) -> Any:
        out = tmp_path / "out.json"
        text = ["--data", str(small_corpus)] if data else []
        main(["--quick", "--json", str(out), *text, *options])
        content = json.loads(out.read_text(encoding="utf-8"))
        assert content["quick"]
        assert content["machine"]["torch"]
        return content["results"]

    return run


@pytest.mark.parametrize(
    ("benchmark", "parts"),
    [
        (trainer_overhead, {"step_milliseconds", "overhead_percent", "error_percent"}),
        (checkpoints, {"saving", "loading", "pause"}),
        (encode, {"corpus", "any text"}),
        (batches, {"charlm", "charlm, on disk", "lecture", "nanogpt"}),
        (step_time, {"charlm fp32", "charlm bf16", "lecture"}),
        (ngram, {"1", "3"}),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_benchmark_still_runs(quick: Callable[..., Any], benchmark: Any, parts: set[str]) -> None:
    assert parts <= quick(benchmark.main).keys()


def test_a_row_is_verified_by_the_loss_of_its_model(
    quick: Callable[..., Any], tmp_path: Path, small_corpus: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (ours,) = quick(time_to_loss.main, "--keep", str(tmp_path / "kept"))["charlm"]["trials"]
    results = quick(verify.main, str(tmp_path / "kept" / "1337"), "--target", "9")
    assert results["loss_nats"] == pytest.approx(ours["final"]["loss_nats"], abs=1e-5)
    assert (results["n_chars"], results["block_size"]) == (ours["final"]["n_chars"], 16)
    assert not results["reaches_target"]  # another text makes no row
    assert "the text is not Tiny Shakespeare" in capsys.readouterr().out

    theirs = tmp_path / "theirs.py"
    V = len(set(small_corpus.read_text(encoding="utf-8")))
    theirs.write_text(
        f"import numpy as np\ndef probabilities(w): return np.full((*w.shape, {V}), 1 / {V})\n",
        encoding="utf-8",
    )
    results = quick(verify.main, str(theirs), "--block-size", "32")
    assert results["loss_nats"] == pytest.approx(math.log(V))
    assert results["n_chars"] == 599  # a tenth of the text but its first character
    with pytest.raises(SystemExit):
        quick(verify.main, str(theirs))


def test_tiny_shakespeare_makes_a_row(shakespeare: str, tmp_path: Path) -> None:
    tokenizer = CharTokenizer.from_text(shakespeare)
    data = BlockDataset.from_text(shakespeare, tokenizer, 256)
    train, val = data.split(0.9)
    CharLM(NGramLM(tokenizer.vocab_size, 3).fit(train), tokenizer).save(tmp_path / "counted")
    out = tmp_path / "out.json"
    verify.main([str(tmp_path / "counted"), "--block-size", "256", "--target", "2.04", "--json", str(out)])
    results = json.loads(out.read_text(encoding="utf-8"))["results"]
    assert results["reaches_target"]
    assert results["n_chars"] == 111_539
    expected = evaluate(NGramLM(tokenizer.vocab_size, 3).fit(train), val).loss_nats
    assert results["loss_nats"] == pytest.approx(expected, abs=1e-6)


def _honest(windows: Any) -> Any:
    """Return what a model might say that looks at the last two characters."""
    before = np.pad(windows, ((0, 0), (1, 0)))[:, :-1]
    scores = np.sin(np.arange(1, 6) * (1 + windows + 0.3 * before)[..., None])
    return np.exp(scores) / np.exp(scores).sum(axis=-1, keepdims=True)


def _peeking(windows: Any) -> Any:
    found = _honest(windows)
    found[:, :-1] = 0.5 * found[:, :-1] + 0.5 * np.eye(5)[windows[:, 1:]]
    return found


def _too_much(windows: Any) -> Any:
    return _honest(windows) * (1 + 3e-6)


def _negative(windows: Any) -> Any:
    found = _honest(windows)
    found[0, 0] = [-0.5, 1.5, 0, 0, 0]
    return found


def _of_its_batch(windows: Any) -> Any:
    share = 0.1 if len(windows) > 1 else 0.2
    return (1 - share) * _honest(windows) + share / 5


class _Learner:
    """Counts what it was asked to score."""

    def __init__(self) -> None:
        self.seen = np.ones(5)

    def __call__(self, windows: Any) -> Any:
        found = np.broadcast_to(self.seen / self.seen.sum(), (*windows.shape, 5)).copy()
        if len(windows) > 8:  # not yet, while it is looked at
            self.seen += np.bincount(windows.flatten(), minlength=5)
        return found


@pytest.mark.parametrize(
    ("model", "why"),
    [
        (_peeking, "characters change with later ones"),
        (_too_much, "must sum to 1, but a sum is 3e-06 away"),
        (_negative, "is negative or not a number"),
        (_of_its_batch, "depend on other windows"),
        (_Learner(), "depend on what was asked before"),
        (lambda windows: _honest(windows)[:, -1], "must have shape"),
    ],
)
def test_what_is_no_honest_model_is_not_scored(model: verify.Probabilities, why: str) -> None:
    val = BlockDataset(torch.arange(400) ** 2 % 5, block_size=16)
    targets = val.ids[1:].numpy().astype(int)
    full = [_honest(x.numpy()).reshape(-1, 5) for x, _ in val.blocks(7)]
    by_hand = -np.log(np.concatenate(full)[np.arange(399), targets]).mean()
    assert verify.verify(_honest, val)["loss_nats"] == pytest.approx(by_hand, abs=1e-9)
    with pytest.raises(SystemExit, match=why):
        verify.verify(model, val)


def test_loss_at_budget_stays_within_its_characters(quick: Callable[..., Any], tmp_path: Path) -> None:
    results = quick(loss_at_budget.main, "--random-batches", "--target", "9")
    (run,) = results["runs"]
    assert 900 < run["chars_seen"] <= 1_000
    assert [e["step"] for e in run["history"]] == sorted(e["step"] for e in run["history"])
    assert run["history"][-1]["loss_nats"] == run["final"]["loss_nats"]
    assert run["seconds_to_target"] == run["history"][0]["seconds"]
    assert abs(run["random_batches"]["loss_nats"] - run["final"]["loss_nats"]) < 0.2
    draw.main(["loss", str(tmp_path / "out.json"), "-o", str(tmp_path / "loss.png")])
    assert (tmp_path / "loss.png").stat().st_size > 1_000


def test_what_is_for_a_gpu_runs_on_a_cpu(
    quick: Callable[..., Any], capsys: pytest.CaptureFixture[str]
) -> None:
    results = quick(gpu.main, "--device", "cpu", "--only", "memory,generation,T5", "--seconds", "9000")
    parts = results["parts"]
    assert not [part for part in parts.values() if "error" in part]
    assert 1_900 < parts["T5"]["chars_seen"] <= 2_000
    assert parts["memory"]["peak_bytes"] >= parts["memory"]["allocated_bytes"] > 2**20
    for by_rows in parts["generation"]["chars_per_second"].values():
        for ways in by_rows.values():
            assert ways["generate"]["median"] > 0
            assert ways["static step"]["median"] > 0
            assert ways["CUDA graph"] == {"skipped": "cpu has no CUDA graphs"}
    assert results["seconds"] >= sum(part["part_seconds"] for part in parts.values())
    assert "T5" in capsys.readouterr().out


def test_a_compiled_step_is_timed_beside_an_eager_one(quick: Callable[..., Any], campaign: Campaign) -> None:
    if campaign.asked is None:
        pytest.skip("only in the longer form (--trials): to compile takes half a minute")
    part = quick(gpu.main, "--device", "cpu", "--only", "compile")["parts"]["compile"]
    assert part["compiled"]["first_step_seconds"] > part["eager"]["first_step_seconds"]
    assert part["compiled"]["step_milliseconds"]["median"] > 0


def test_a_part_for_a_gpu_that_fails_or_takes_too_long_stops_no_other(
    quick: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    monkeypatch.setenv("CHARLM_DATA_DIR", str(tmp_path))
    options = ["--device", "cuda", "--only", "backend", "--data", "tinyshakespeare"]
    results = quick(gpu.main, *options, "--seconds", "9000")
    assert results["text"]["data"] == "python-docs"
    assert "tinyshakespeare.txt' (CHARLM_DATA_DIR is set) cannot be read" in results["text"]["in_place_of"]
    assert set(results["parts"]) == {"backend"}
    for part in results["parts"].values():
        assert "'cuda' is not available on this machine" in part["error"]
    results = quick(gpu.main, *options, "--seconds", "0.1")
    assert all("was stopped" in part["error"] for part in results["parts"].values())
    with pytest.raises(SystemExit, match="is neither a file"):
        quick(gpu.main, "--data", str(tmp_path / "missing.txt"))


@pytest.mark.parametrize("preset", ["gpt2", "cpu-10s"])
@pytest.mark.parametrize("rows", [1, 3])
def test_a_static_step_says_what_the_model_says(preset: PresetName, rows: int) -> None:
    torch.manual_seed(1)
    sizes: dict[str, Any] = {"n_layer": 2, "n_head": 2, "n_embd": 16, "block_size": 12}
    model = GPT.from_config(preset, vocab_size=11, **sizes).eval()
    for parameter in model.parameters():  # zeros at first where cpu-10s has them
        torch.nn.init.normal_(parameter, std=0.3)
    decoder = StaticDecoder(model, rows)
    with torch.no_grad():
        for count in (1, 5, 12):
            decoder.write(count)
            assert decoder.check(count) < 1e-5
        assert decoder.ids.max() > 0
        decoder.logits += 1
        with pytest.raises(SystemExit, match="away from the model's"):
            decoder.check(12)


def test_cost_is_measured_and_drawn(quick: Callable[..., Any], tmp_path: Path) -> None:
    results = quick(cost.main, data=False)
    assert set(results) == {"model size", "block size", "batch size"}
    point = results["block size"][0]
    assert point["chars_per_second"] > 0
    assert point["peak_memory_bytes"] > point["imports_memory_bytes"] > 2**20
    draw.main(["cost", str(tmp_path / "out.json"), "-o", str(tmp_path / "cost.svg")])
    drawn = (tmp_path / "cost.svg").read_text(encoding="utf-8")
    assert drawn.startswith("<?xml")


def test_texts_held_to_a_pattern_are_timed(quick: Callable[..., Any]) -> None:
    results = quick(constrained.main, data=False)
    assert set(results["cost"]) == {"65", "4,000"}
    assert results["patterns"][r"\d{4}-\d\d-\d\d"]["outcome"] == "11 states"


def test_texts_are_compressed_with_and_without_a_model(quick: Callable[..., Any]) -> None:
    results = quick(compression.main)
    ours = results["charlm, n-grams of the known text"]
    assert ours["bytes_with_model"] > ours["bytes"] > 0
    assert results["gzip -9"]["bytes_with_model"] is None


def test_processes_that_share_the_cores_are_timed_alone_and_together(
    quick: Callable[..., Any], campaign: Campaign
) -> None:
    if campaign.asked is None:
        pytest.skip("only in the longer form (--trials): it takes half a minute")
    results = quick(sharing.main, "--only", "generate+busy,stream+train", data=False)
    assert {"generate", "stream", "train", "generate + busy", "stream + train"} == set(results)
    assert len(results["stream + train"]["times_a_fair_share"]["values"]) == 2


def test_generation_is_timed_in_all_its_parts(
    quick: Callable[..., Any], capsys: pytest.CaptureFixture[str]
) -> None:
    results = quick(generate.main, data=False)
    library = {"transformers"} if importlib.util.find_spec("transformers") else set()
    ours = {"charlm", "charlm bfloat16", "charlm int8"}
    assert set(results["G1"]["0.8M"]) == set(results["G2"]["10.7M"]) == ours | library
    assert set(results["G3"]["0.8M"]) == set(results["G3"]["10.7M"]) == ours | library
    assert set(results["G4"]["10.7M"]) == {"charlm restart", "charlm slide"}
    assert results["G4"]["0.8M"]["charlm restart"]["chars_per_second"]["median"] > 0
    assert results["first"]["0.8M"]["a prompt of 16"]["charlm"]["milliseconds"]["median"] > 0
    process = results["first"]["a new process"]
    assert process["charlm generate"]["milliseconds"]["least"] > 100
    assert results["options"]["0.8M"]["temperature 1"]["microseconds_more"]["most"] == 0
    assert "threads: " in capsys.readouterr().out
    with pytest.raises(SystemExit):
        generate.main(["--only", "G5"])


def test_the_gain_of_a_draft_is_measured(quick: Callable[..., Any], tmp_path: Path) -> None:
    text = "a rose is a rose is a rose, said the rose to the other rose.\n" * 20
    tokenizer = CharTokenizer.from_text(text)
    model = GPT.from_config(
        "cpu-10s", vocab_size=tokenizer.vocab_size, n_layer=1, n_head=2, n_embd=16, block_size=16
    )
    CharLM(model, tokenizer).save(tmp_path / "run")
    data = BlockDataset.from_text(text, tokenizer, 16)
    NGramLM(tokenizer.vocab_size, 4).fit(data).save(tmp_path / "run" / "ngram")
    results = quick(draft.main, str(tmp_path / "run"), "--layers", "1,2", data=False)
    assert len(results) == 2
    for temperatures in results.values():
        assert temperatures["0"]["times_faster"]["median"] > 0
        assert 0 <= temperatures["1"]["right_share"] <= 1
    with pytest.raises(SystemExit, match="at least the model's own, 1"):
        quick(draft.main, str(tmp_path / "run"), "--layers", "0", data=False)


def test_the_cost_of_context_is_measured_and_drawn(quick: Callable[..., Any], tmp_path: Path) -> None:
    results = quick(generate_context.main, data=False)
    assert [point["after"] for point in results["restart"]] == list(range(1, 8 * 16, 4))
    assert [point["after"] for point in results["slide"]] == [1, 5, 9, 13, *range(17, 8 * 16, 8)]
    assert all(point["microseconds_per_char"]["least"] > 0 for point in results["slide"])
    draw.main(["generate-context", str(tmp_path / "out.json"), "-o", str(tmp_path / "context.svg")])
    assert (tmp_path / "context.svg").read_text(encoding="utf-8").startswith("<?xml")


def test_a_log_of_nanogpt_and_a_run_are_drawn(tmp_path: Path) -> None:
    log = tmp_path / "nanogpt.log"
    log.write_text(
        "step 0: train loss 4.2, val loss 4.2\niter 0: loss 4.2, time 500.00ms, mfu -100.00%\n"
        "iter 1: loss 4.1, time 500.00ms, mfu 1.00%\nstep 2: train loss 3.0, val loss 3.1\n",
        encoding="utf-8",
    )
    run = tmp_path / "run" / "metrics.jsonl"
    run.parent.mkdir()
    run.write_text('{"kind": "eval", "step": 2, "seconds": 1.0, "loss_nats": 3.0}\n', encoding="utf-8")
    draw.main(["loss", str(log), str(run), "--log-time", "-o", str(tmp_path / "loss.svg")])
    assert (tmp_path / "loss.svg").exists()


def test_settings_are_changed_by_field_and_mistakes_are_answered() -> None:
    settings = common.settings_of(
        "gpt2", ["n_layer=2", "betas=(0.9, 0.99)", "schedule=linear", "grad_clip=None"]
    )
    assert settings.model["n_layer"] == 2
    assert settings.training["betas"] == (0.9, 0.99)
    assert settings.training["schedule"] == "linear"
    assert settings.training["grad_clip"] is None
    with pytest.raises(SystemExit, match="did you mean 'learning_rate'"):
        common.settings_of("gpt2", ["lr=1"])
