"""The code of a Markdown page, as a test can run it: see `tests/house/test_documents.py` for the rules."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from harness.warm import WarmPython

__all__ = ["Block", "Page", "masked", "numbers", "plain_environment"]

ROOT = Path(__file__).parents[2]

_END = "<end of block {}>"
_NUMBER = re.compile(r"-?\d[\d,_]*(?:\.\d+)?(?:e[+-]?\d+)?")


@dataclass
class Block:
    """A fenced block."""

    language: str
    """What stands behind the fence."""
    code: str
    remarks: list[str]
    """The comments directly before it, such as "varies"."""
    output: Block | None = None
    """For Python, the text block that follows it directly."""


class Page:
    """A page and its blocks.

    Args:
        path: a Markdown file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        text = path.read_text(encoding="utf-8")
        self.blocks: list[Block] = list(_blocks(text))
        self.replacements: list[tuple[str, str]] = re.findall(
            r"^<!-- in tests: (.+?) => (.+?) -->$", text, re.M
        )
        self.given: list[str] = re.findall(r"^<!-- given: (.+?) -->$", text, re.M)

    def runnable(self) -> list[Block]:
        """Return the blocks that are run."""
        return [block for block in self.blocks if block.language in {"python", "console"}]

    def uses(self, word: str) -> bool:
        """Return whether code that is run has a word."""
        return any(word in block.code for block in self.runnable())

    def shortened(self, block: Block, corpus: Path) -> str:
        """Return a block's code as the tests run it: on a small corpus, with the page's replacements."""
        code = block.code.replace('"python-docs"', repr(str(corpus)))
        for old, new in self.replacements:
            code = code.replace(old, new)
        if block.language == "console":
            code = re.sub(r"--minutes [\d.]+", "--preset cpu-10s --max-steps 20", code)
            code = code.replace("python-docs", str(corpus))
        return code

    def run(self, python: WarmPython, folder: Path, codes: list[str]) -> list[str]:
        """Run the blocks in a folder, in one process, and return what each printed.

        Args:
            python: runs them, and each command `charlm`.
            folder: an empty directory of its own.
            codes: the code of each block of `runnable`.
        """
        program = ["import subprocess as __subprocess"]
        for number, (block, code) in enumerate(zip(self.runnable(), codes, strict=True)):
            if block.language == "python":
                program.append(code)
            else:
                program += _console(code, fails="fails" in block.remarks)
            program.append(f"print({_END.format(number)!r}, flush=True)")
        binaries = folder.parent / f"{folder.name}-bin"
        binaries.mkdir()
        command = binaries / "charlm"
        command.write_text(f'#!/bin/sh\nexec {shlex.join(python("-m", "charlm"))} "$@"\n', encoding="utf-8")
        command.chmod(0o755)
        done = subprocess.run(
            python("-W", "error", "-c", "\n".join(program)),
            check=False,
            cwd=folder,
            env={**plain_environment(), "PATH": f"{binaries}:{os.environ['PATH']}"},
            capture_output=True,
            encoding="utf-8",
        )
        assert done.returncode == 0, f"{self.path.name}: {done.stderr}\n{done.stdout[-2000:]}"
        printed, rest = [], done.stdout
        for number in range(len(codes)):
            before, _, rest = rest.partition(_END.format(number) + "\n")
            printed.append(before)
        return printed


def plain_environment() -> dict[str, str]:
    """Return the variables for a process that runs a document: it finds the package, and is not measured.

    What documents run counts for no test of the package, and measuring it would take a quarter more time.
    """
    kept = {name: value for name, value in os.environ.items() if not name.startswith("COVERAGE_")}
    return {**kept, "PYTHONPATH": str(ROOT), "PYTHONIOENCODING": "utf-8"}


def masked(text: str) -> str:
    """Return a text with a sign in place of each number, and blanks and rules folded."""
    return re.sub(r"--+", "-", re.sub(r"[ \t]+", " ", _NUMBER.sub("#", text)))


def numbers(text: str) -> list[float]:
    """Return the numbers of a text."""
    return [float(found.replace(",", "").replace("_", "")) for found in _NUMBER.findall(text)]


def _blocks(text: str) -> Iterator[Block]:
    before: Block | None = None
    remarks: list[str] = []
    lines = iter(text.splitlines())
    for line in lines:
        if match := re.fullmatch(r"<!-- (varies|fails) -->", line):
            remarks.append(match[1])
        elif match := re.fullmatch(r"(`{3,})(\S*).*", line):
            code = []
            for inner in lines:
                if inner == match[1]:
                    break
                code.append(inner + "\n")
            block = Block(match[2], "".join(code), remarks)
            if block.language == "text" and before is not None:
                before.output = block
            before = block if block.language == "python" else None
            remarks = []
            yield block
        elif line:
            before, remarks = None, []


def _console(code: str, *, fails: bool) -> list[str]:
    """Return Python that runs the commands of a block; what they print is dropped."""
    commands = [line[2:] for line in code.splitlines() if line.startswith(("$ ", "> "))]
    script = "\n".join(commands)
    call = (
        f"__subprocess.run(['bash', '-euo', 'pipefail', '-c', {script!r}], stdout=__subprocess.PIPE, stderr="
    )
    call += "__subprocess.PIPE, stdin=__subprocess.DEVNULL, text=True)"
    wrong = "==" if fails else "!="
    return [
        f"__done = {call}",
        f"if __done.returncode {wrong} 0: raise SystemExit({script!r} + __done.stderr)",
    ]
