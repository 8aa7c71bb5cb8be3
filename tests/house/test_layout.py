"""Where the tests of a module are: in a file of its name in its wing, or where the table says."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
MODULES = sorted(
    path.relative_to(ROOT / "charlm").as_posix()
    for path in (ROOT / "charlm").rglob("*.py")
    if not path.stem.startswith("__")
)
# What is small, or has no sense without its neighbour, is tested with that.
ELSEWHERE = {
    "backends/cpu.py": "backends/test_base.py",
    "backends/cuda.py": "backends/test_gpus.py",
    "backends/mps.py": "backends/test_gpus.py",
    "backends/traits.py": "backends/test_base.py",
    "cli/colours.py": "cli/test_eval.py",
    "cli/decompress.py": "cli/test_compress.py",
    "cli/encoded.py": "cli/test_train.py",
    "cli/fields.py": "cli/test_parser.py",
    "cli/fit.py": "cli/test_train.py",
    "cli/guess.py": "cli/test_inspect.py",
    "cli/preparing.py": "cli/test_prepare.py",
    "cli/progress.py": "cli/test_processes.py",
    "cli/reading.py": "cli/test_train.py",
    "cli/report.py": "cli/test_train.py",
    "cli/rundir.py": "cli/test_train.py",
    "cli/signals.py": "cli/test_processes.py",
    "cli/together.py": "reliability/test_worlds.py",
    "cli/stored.py": "cli/test_prepare.py",
    "compression/blocks.py": "compression/test_codec.py",
    "compression/counted.py": "compression/test_codec.py",
    "data/prepared.py": "data/test_prepare.py",
    "data/rows.py": "data/test_prepare.py",
    "data/sources.py": "data/test_prepare.py",
    "generation/cache.py": "generation/test_decode.py",
    "generation/engine.py": "generation/test_state.py",
    "generation/stream.py": "generation/test_decode.py",
    "interchange/folders.py": "interchange/test_transformers.py",
    "interchange/pickled.py": "interchange/test_nanogpt.py",
    "lm.py": "lm/test_lm.py",
    "models/base.py": "models/test_own_models.py",
    "models/layers.py": "models/test_gpt.py",
    "models/ngram_counts.py": "models/test_ngram.py",
    "models/ngram_discounts.py": "models/test_ngram.py",
    "models/ngram_window.py": "models/test_ngram.py",
    "models/ops.py": "models/test_gpt.py",
    "models/registry.py": "models/test_own_models.py",
    "modes.py": "generation/test_side_effects.py",
    "native/engine.py": "native/test_gpt.py",
    "native/ngram.py": "models/test_ngram.py",
    "plotting/labels.py": "plotting/test_tables.py",
    "runs/choosing.py": "training/test_resume.py",
    "runs/log.py": "files/test_log.py",
    "runs/retention.py": "runs/test_checkpoint.py",
    "runs/writer.py": "training/test_faults.py",
    "terminal.py": "cli/test_processes.py",
    "text/checks.py": "text/test_tokenizer.py",
    "text/pieces.py": "text/test_corpus.py",
    "training/callbacks.py": "training/test_trainer.py",
    "training/checks.py": "training/test_trainer.py",
    "training/evaluations.py": "training/test_endings.py",
    "training/records.py": "training/test_trainer.py",
    "training/reporting.py": "training/test_trainer.py",
    "training/saving.py": "training/test_resume.py",
    "training/step.py": "training/test_trainer.py",
    "training/timing.py": "training/test_minutes.py",
}


def test_the_tests_of_a_module_are_where_one_looks_for_them() -> None:
    for module in MODULES:
        wing, _, name = module.rpartition("/")
        own = ROOT / "tests" / (wing or "house") / f"test_{name}"
        if module in ELSEWHERE:
            assert not own.exists(), f"{module} has a file of its own, so the table is to leave it out"
            assert (ROOT / "tests" / ELSEWHERE[module]).is_file(), module
        else:
            assert own.is_file(), module


def test_the_table_names_modules_alone() -> None:
    assert set(ELSEWHERE) <= set(MODULES)


def test_no_two_tests_of_a_file_have_one_name() -> None:
    """The second would take the place of the first, in silence."""
    for path in (ROOT / "tests").rglob("test_*.py"):
        lines = path.read_text(encoding="utf-8").splitlines()
        names = Counter(line.split("(")[0] for line in lines if line.startswith("def test_"))
        assert not [name for name, count in names.items() if count > 1], path
