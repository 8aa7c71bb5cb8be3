"""ONNX files: run by onnxruntime, compared with the model."""

from __future__ import annotations

import importlib
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from harness.tiny_models import random_ids, tiny_config, tiny_gpt

from charlm import CharLM, CharTokenizer
from charlm.errors import CharLMError, InputError, RunExistsError
from charlm.interchange import to_onnx
from charlm.models.config import GPTConfig

ROOT = Path(__file__).parents[2]
TOKENIZER = CharTokenizer("\n .abcdé€😀XYZ")
KINDS = {
    "lecture": tiny_config("lecture", block_size=128, n_layer=1),  # seconds for each layer
    "cpu-1min with a convolution": tiny_config("cpu-1min", block_size=128, conv_width=5),
}


class Session:
    """A model in onnxruntime, fed as others feed it: by the names of its inputs and outputs."""

    def __init__(self, folder: Path, config: GPTConfig) -> None:
        runtime = pytest.importorskip("onnxruntime")
        self.session = runtime.InferenceSession(folder / "model.onnx")
        self.config = config
        self.inputs = [given.name for given in self.session.get_inputs()]
        self.outputs = [given.name for given in self.session.get_outputs()]

    def start(self, B: int) -> dict[str, Any]:
        """Return the past of texts that have not begun."""
        empty = np.zeros((B, self.config.n_head, 0, self.config.head_size), np.float32)
        past = {name: empty for name in self.inputs if name.startswith("past_key_values.")}
        return past | ({"past_ids": np.zeros((B, 0), np.int64)} if "past_ids" in self.inputs else {})

    def read(self, ids: Any, past: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        """Return logits (B, T, V) after ids (B, T), and what to give with the next ones."""
        done = past["past_key_values.0.key"].shape[2]
        positions = np.arange(done, done + ids.shape[1])[None].repeat(len(ids), 0)
        given = {"input_ids": ids, "position_ids": positions, **past}
        logits, *presents = self.session.run(None, given)
        names = [name.replace("present.", "past_key_values.") for name in self.outputs[1:]]
        names = ["past_ids" if name == "present_ids" else name for name in names]
        return logits, dict(zip(names, presents, strict=True))


def written_by_the_guide(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> str:
    """Run the loop that the guide shows, on the folder "there", and return what it prints."""
    page = (ROOT / "docs" / "guides" / "interchange.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"^```py\n(.*?)^```$", page, re.M | re.S)
    monkeypatch.chdir(folder)
    exec(block.replace("graph/", "there/").replace('"The "', '"abc "'), {})
    return capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize("name", KINDS)
def test_onnxruntime_says_and_writes_what_the_model_does(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = KINDS[name]
    model = tiny_gpt(config).eval()
    try:
        to_onnx(CharLM(model, TOKENIZER), tmp_path / "there")
    except CharLMError as error:
        pytest.skip(str(error))
    session = Session(tmp_path / "there", config)
    names = [f"{i}.{kind}" for i in range(config.n_layer) for kind in ("key", "value")]
    assert session.inputs[:2] == ["input_ids", "position_ids"]
    assert set(session.inputs[2:]) - {"past_ids"} == {f"past_key_values.{name}" for name in names}
    assert session.outputs[0] == "logits"
    assert set(session.outputs[1:]) - {"present_ids"} == {f"present.{name}" for name in names}
    for B, T in ((1, 1), (2, 7), (3, 28)):
        ids = random_ids(config, B, T, seed=T)
        state = model.new_state(B)
        state.observe(ids)
        logits, past = session.read(ids.numpy(), session.start(B))
        with torch.no_grad():
            assert np.abs(logits - model(ids)[0].numpy()).max() < 1e-4
        for _ in range(50):
            expected = state.predict().numpy()
            assert np.abs(logits[:, -1] - expected).max() < 1e-4
            following = torch.from_numpy(expected).argmax(dim=-1, keepdim=True)
            state.observe(following)
            logits, past = session.read(following.numpy(), past)
    # Several at once behind several, as a prompt that is read in pieces.
    ids = random_ids(config, 2, 30)
    _, past = session.read(ids[:, :11].numpy(), session.start(2))
    logits, _ = session.read(ids[:, 11:].numpy(), past)
    with torch.no_grad():
        assert np.abs(logits - model(ids)[0][:, 11:].numpy()).max() < 1e-4
    vocabulary = json.loads((tmp_path / "there" / "tokenizer.json").read_bytes())["model"]["vocab"]
    assert vocabulary == {character: i for i, character in enumerate(TOKENIZER.vocab)}
    assert written_by_the_guide(tmp_path, monkeypatch, capsys) == CharLM(model, TOKENIZER).generate(
        "abc ", 60, temperature=0.0
    ).removeprefix("abc ")
    with pytest.raises(RunExistsError, match="is not empty"):
        to_onnx(CharLM(model, TOKENIZER), tmp_path / "there")


def test_other_types_are_refused(tmp_path: Path) -> None:
    lm = CharLM(tiny_gpt(tiny_config("gpt2"), dtype=torch.float64), TOKENIZER)
    with pytest.raises(InputError, match=r"must be in float32 and of less than 2 GB, got torch\.float64"):
        to_onnx(lm, tmp_path / "there")


def test_a_missing_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise ImportError(name)

    monkeypatch.setattr(importlib, "import_module", missing)
    with pytest.raises(CharLMError, match="needs onnx and onnxscript: pip install onnx onnxscript"):
        to_onnx(CharLM(tiny_gpt(tiny_config("gpt2")), TOKENIZER), tmp_path / "there")
    assert not (tmp_path / "there").exists()
