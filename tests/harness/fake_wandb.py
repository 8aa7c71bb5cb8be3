"""A module in place of `wandb`, with the calls that charlm makes and what the real client does with them.

As read in the source of wandb 0.31: `init(resume="allow")` goes on with a run of the same id, whose `step` is
then one past its last; `Run.log` drops, with a warning, what is for a step before the one it is at.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

__all__ = ["FakeWandB"]


class FakeRun:
    """A run: its history, by step."""

    def __init__(self, options: dict[str, Any]) -> None:
        self.options = [options]
        self.history: dict[int, dict[str, Any]] = {}
        self.dropped: list[int] = []
        self.finished = 0

    @property
    def step(self) -> int:
        """The next step, one past the last."""
        return max(self.history, default=-1) + 1

    def log(self, data: dict[str, Any], step: int) -> None:
        if step < max(self.history, default=0):
            self.dropped.append(step)
        else:
            self.history.setdefault(step, {}).update(data)

    def finish(self) -> None:
        self.finished += 1


class FakeWandB:
    """The module: put it into `sys.modules` as `wandb`."""

    def __init__(self) -> None:
        self.runs: dict[str, FakeRun] = {}
        self.has_account = True
        self.Html = lambda text: SimpleNamespace(html=text)

    def login(self, *, prompt: bool = True) -> bool:
        assert not prompt, "nobody is there to answer"
        return self.has_account

    def init(self, **options: Any) -> FakeRun:
        assert options["resume"] == "allow"
        name = options.get("id") or f"drawn-{len(self.runs)}"
        if name in self.runs:
            self.runs[name].options.append(options)
        return self.runs.setdefault(name, FakeRun(options))
