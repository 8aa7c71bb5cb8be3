"""Who touches the disk: the wing `files`, and a short list of others, each with its reason.

Every write of ours goes through `files/atomic.py` and `files/log.py`, every file of ours is read by
`files/reading.py`, and nothing is ever unpickled, but for tensors. The test reads the source.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import charlm

PACKAGE = Path(charlm.__file__).parent

METHODS = {
    *("read_bytes", "read_text", "write_bytes", "write_text", "unlink", "mkdir", "rmdir", "touch", "rename"),
    *("symlink_to", "hardlink_to", "tofile", "fromfile", "memmap", "from_file"),
}
FUNCTIONS = {
    *("open", "os.open", "os.fdopen", "os.rename", "os.replace", "os.unlink", "os.remove", "os.mkdir"),
    *("os.makedirs", "os.rmdir", "os.write", "os.link", "os.symlink", "io.open", "gzip.open", "mmap.mmap"),
    *("torch.load", "torch.save", "np.load", "np.save", "np.savez", "pickle.load", "pickle.loads"),
}
MODULES = {"shutil", "tempfile", "pickle", "marshal", "shelve", "dill", "joblib"}

ALLOWED = {
    "text/corpus.py": {"read_bytes": "a text of the user's own, of any kind and size"},
    "cli/settings.py": {"read_bytes": "a TOML file of the user's own"},
    "cli/compress.py": {"read_bytes": "a file of the user's own, of any kind and size"},
    "cli/eval.py": {"shutil": "asks for the terminal's width"},
    "cli/interactive.py": {"shutil": "asks for the terminal's width"},
    "cli/output.py": {"os.open": "the null device, in place of a closed pipe"},
    "cli/rundir.py": {"shutil": "--overwrite deletes a run", "unlink": "--overwrite deletes a run"},
    "cli/serve.py": {"read_text": "the page"},
    "cli/threads.py": {"read_text": "what Linux says of this process's threads"},
    "backends/cpu.py": {"shutil": "looks for a compiler"},
    "backends/host.py": {"read_text": "what Linux says of its memory and of its control group"},
    "interchange/pickled.py": {"torch.load": "others' checkpoints, with weights_only: nothing is executed"},
    "runs/directory.py": {"os.open": "the lock, which has no content"},
    "evaluation/page.py": {"read_text": "the page's own template"},
    "native/library.py": {
        "read_bytes": "the C sources, and the library to be checked",
        "read_text": "what Linux says of its processor",
        "tempfile": "the compiler writes, not we",
        "shutil": "looks for a compiler",
        "mkdir": "the cache folder",
        "unlink": "what the compiler left",
    },
}


def uses(tree: ast.Module) -> Iterator[str]:
    """Yield the name of each use that could touch the disk."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from MODULES & {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            yield from MODULES & {node.module}
        elif isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            if called in FUNCTIONS:
                yield called
            elif isinstance(node.func, ast.Attribute) and node.func.attr in METHODS:
                yield node.func.attr


def test_only_the_wing_files_reads_and_writes_files_of_ours() -> None:
    found: dict[str, set[str]] = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        name = path.relative_to(PACKAGE).as_posix()
        if not name.startswith("files/"):
            found[name] = set(uses(ast.parse(path.read_text(encoding="utf-8"))))
    assert {name: used for name, used in found.items() if used} == {k: set(v) for k, v in ALLOWED.items()}


def test_the_wing_files_opens_in_two_places_only() -> None:
    """One for writing, one for reading, beside directories that are synced or read, and the log's end."""
    opened = {
        path.name: ast.unparse(ast.parse(path.read_text(encoding="utf-8"))).count("os.open(")
        for path in (PACKAGE / "files").glob("*.py")
    }
    assert {name: n for name, n in opened.items() if n} == {"atomic.py": 2, "log.py": 1, "reading.py": 2}


def test_a_stray_write_would_be_found() -> None:
    source = "import pickle\nopen('x', 'w')\npath.write_text('x')\ntorch.save(x, 'y')\nos.replace(a, b)"
    assert set(uses(ast.parse(source))) == {"pickle", "open", "write_text", "torch.save", "os.replace"}
