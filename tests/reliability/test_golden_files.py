"""Files that were written when format version 1 was frozen are read by every later charlm, and written alike.

`tests/golden` is never changed (harness/golden.py made it, once). Weights come back to the last bit; losses
and logits are compared with a tolerance, since other machines round elsewhere.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from harness.golden import GOLDEN, digests, end_of, expected, ids_of

from charlm import load
from charlm.files import safetensors
from charlm.training import list_checkpoints, verify_checkpoint

pytestmark = pytest.mark.slow

NAMES = sorted(path.name for path in (GOLDEN / "v1").iterdir())
RUNS = [name for name in NAMES if name.startswith("run-")]
MODELS = [name for name in NAMES if not name.startswith("run-")]


def model_directory(name: str) -> Path:
    """Return where a kept model's three files lie."""
    folder = GOLDEN / "v1" / name
    return folder if name in MODELS else list_checkpoints(folder)[-1].path


def test_all_kept_directories_are_known() -> None:
    assert sorted(expected()) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_kept_files_are_as_they_were(name: str) -> None:
    assert digests(GOLDEN / "v1" / name) == expected()[name]["files"]


@pytest.mark.parametrize("name", NAMES)
def test_a_kept_model_loads_and_predicts_as_it_did(name: str) -> None:
    wanted = expected()[name]
    lm = load(GOLDEN / "v1" / name, device="cpu")
    assert lm.model.num_parameters() == wanted["parameters"]
    assert lm.tokenizer.vocab_size == wanted["vocab_size"]
    with torch.no_grad():
        logits = lm.model(ids_of(lm))[0][0, -1]  # (V,)
    tolerance = 0.05 if logits.dtype == torch.bfloat16 else 1e-5
    torch.testing.assert_close(
        logits[:8].float(), torch.tensor(wanted["last_logits"]), atol=tolerance, rtol=0
    )


@pytest.mark.parametrize("name", RUNS)
def test_a_kept_run_verifies_and_goes_on_to_the_same_loss(name: str, tmp_path: Path) -> None:
    verify_checkpoint(model_directory(name))
    copy = shutil.copytree(GOLDEN / "v1" / name, tmp_path / "run")
    assert end_of(copy) == pytest.approx(expected()[name]["loss_at_the_end"], abs=1e-3)
    assert digests(copy) == expected()[name]["files"]  # `end_of` works on a copy


@pytest.mark.parametrize("name", NAMES)
def test_what_is_written_today_is_what_was_written_then(name: str, tmp_path: Path) -> None:
    """Fields may be added to config.json, with a default that means what was; nothing else may change."""
    then = model_directory(name)
    load(GOLDEN / "v1" / name, device="cpu").save(tmp_path / "again")
    assert (tmp_path / "again" / "tokenizer.json").read_bytes() == (then / "tokenizer.json").read_bytes()
    old, new = (json.loads((folder / "config.json").read_text()) for folder in (then, tmp_path / "again"))
    assert {**new, "config": new["config"] | old["config"]} == {
        **old,
        "config": new["config"] | old["config"],
    }
    assert new["config"].items() >= old["config"].items()
    data, wanted = ((folder / "model.safetensors").read_bytes() for folder in (tmp_path / "again", then))
    if name in MODELS:
        assert data == wanted
    headers = [safetensors.parse_header(content, path="weights") for content in (data, wanted)]
    parts = [
        {
            key: (info.dtype, info.shape, content[info.start : info.end])
            for key, info in header.tensors.items()
        }
        for header, content in zip(headers, (data, wanted), strict=True)
    ]
    assert parts[0] == parts[1]
