"""Pages as notebooks: they run, what they show can be read in a browser, and a stopped training goes on."""

from __future__ import annotations

import importlib.util
import subprocess
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import nbformat as _nbformat
import pytest
from harness.browser import find_browser, take_picture
from harness.documents import Page, plain_environment
from nbclient import NotebookClient

ROOT = Path(__file__).parents[2]
GUIDE = "guides/notebooks.md"


def docs_notebooks() -> ModuleType:
    spec = importlib.util.spec_from_file_location("notebooks", ROOT / "docs" / "notebooks.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


NOTEBOOKS: Any = docs_notebooks()
nbformat: Any = _nbformat  # it has no types


@pytest.fixture
def kernel_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Let a kernel find the package, and nothing of the user's."""
    for name, value in plain_environment().items():
        monkeypatch.setenv(name, value)
    for name in ("IPYTHONDIR", "JUPYTER_CONFIG_DIR", "JUPYTER_RUNTIME_DIR"):
        monkeypatch.setenv(name, str(tmp_path / name))


@pytest.mark.parametrize("page", NOTEBOOKS.PAGES)
def test_a_notebook_has_the_code_of_its_page_and_what_that_prints(page: str) -> None:
    notebook = nbformat.from_dict(NOTEBOOKS.notebook_of(page))
    nbformat.validate(notebook)
    blocks = Page(ROOT / "docs" / page).runnable()
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert len(cells) == len(blocks)
    for cell, block in zip(cells, blocks, strict=True):
        if block.language == "python":
            assert cell.source + "\n" == block.code
            printed = [output.text for output in cell.outputs]
            assert printed == ([] if block.output is None else [block.output.code])
    words = "".join(cell.source for cell in notebook.cells if cell.cell_type == "markdown")
    assert "<!--" not in words
    assert ".md)" not in words
    assert words.startswith("# ")


def executed(page: str, folder: Path) -> Any:
    notebook = nbformat.from_dict(NOTEBOOKS.notebook_of(page))
    client = NotebookClient(notebook, timeout=3_000, resources={"metadata": {"path": str(folder)}})
    return client.execute()


@pytest.mark.slow
@pytest.mark.usefixtures("kernel_environment")
def test_the_guide_runs_as_a_notebook_and_shows_its_results(tmp_path: Path) -> None:
    shown: dict[str, set[str]] = {}
    htmls: list[str] = []
    for cell in executed(GUIDE, tmp_path).cells:
        for output in cell.get("outputs", []):
            data = output.get("data", {})
            shown.setdefault(output.output_type, set()).update(data)
            assert output.get("name") != "stderr", output.text
            if output.output_type == "execute_result":
                assert "text/plain" in data
                htmls += [data["text/html"]] if "text/html" in data else []
    assert shown["execute_result"] == {"text/plain", "text/html", "image/png"}
    assert len(htmls) == 3  # a training, an evaluation, a text
    if find_browser() is None:
        pytest.skip("no browser to look at them")
    page = "<!doctype html><meta charset=utf-8><body>" + "".join(f"<div>{one}</div>" for one in htmls)
    picture = take_picture(page, tmp_path)
    assert picture.startswith(b"\x89PNG")


@pytest.mark.slow
@pytest.mark.usefixtures("kernel_environment")
def test_every_notebook_runs_from_top_to_bottom(tmp_path: Path, request: pytest.FixtureRequest) -> None:
    """All for `--whole-docs`, which takes an hour; the code of each is run uncut or cut elsewhere, too."""
    whole = request.config.getoption("--whole-docs")
    for page in NOTEBOOKS.PAGES if whole else ["lecture/01-text.md"]:
        executed(page, tmp_path)


@pytest.mark.slow
@pytest.mark.usefixtures("kernel_environment")
def test_a_training_that_a_cell_was_interrupted_in_goes_on_in_the_next(tmp_path: Path) -> None:
    cells = [
        "from pathlib import Path\n"
        "from charlm import GPT, BlockDataset, CharTokenizer, Trainer, TrainerConfig\n"
        "from charlm.testing import tiny_corpus\n"
        "from charlm.training import Callback, ProgressBar\n"
        "class Tells(Callback):\n"
        "    def on_step_end(self, trainer, record):\n"
        "        if trainer.step == 5: Path('begun').touch()\n"
        "text = tiny_corpus(6_000)\n"
        "tokenizer = CharTokenizer.from_text(text)\n"
        "train = BlockDataset.from_text(text, tokenizer, 16)\n"
        "model = GPT.from_config('cpu-10s', vocab_size=tokenizer.vocab_size, block_size=16, n_embd=16)\n"
        "config = TrainerConfig(max_steps=100_000, batch_size=2, eval_interval=50_000)\n"
        "trainer = Trainer(model, train, config, tokenizer=tokenizer, out_dir='run',\n"
        "    callbacks=[ProgressBar(), Tells()], device='cpu')\n",
        "trainer.fit()",
        "stopped = trainer.step\n"
        "for record in trainer.steps():\n"
        "    if record.step == stopped + 20: trainer.finish()\n"
        "(5 <= stopped < 100_000, trainer.step - stopped, trainer.result().reason)",
    ]
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in cells])
    client = NotebookClient(notebook, allow_errors=True, resources={"metadata": {"path": str(tmp_path)}})
    with client.setup_kernel():
        client.execute_cell(notebook.cells[0], 0)
        pid = client.km.provisioner.pid  # type: ignore[union-attr]  # a kernel on this machine
        watcher = subprocess.Popen(
            ["sh", "-c", f"while [ ! -e begun ]; do sleep 0.05; done; sleep 0.2; kill -INT {pid}"],
            cwd=tmp_path,
        )
        began = time.monotonic()
        client.execute_cell(notebook.cells[1], 1)
        watcher.wait()
        assert time.monotonic() - began < 60
        client.execute_cell(notebook.cells[2], 2)
    (error,) = [o for o in notebook.cells[1].outputs if o.output_type == "error"]
    assert error.ename == "KeyboardInterrupt"
    (result,) = [o for o in notebook.cells[2].outputs if o.output_type == "execute_result"]
    assert result.data["text/plain"] == "(True, 20, 'callback')"
