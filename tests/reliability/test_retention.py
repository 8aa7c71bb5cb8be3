"""Whatever happens to a run's checkpoints, and in whichever order, what is to be kept is there.

Saves and prunings with any settings, some of them killed at any call, damage, files of others, cleaning up
and resuming are drawn at random and compared with a plain model of what must be in the directory then.
"""

from __future__ import annotations

import contextlib
import warnings
from collections import Counter
from pathlib import Path
from typing import ClassVar

import pytest
from harness.campaign import Campaign
from harness.failing_calls import Killed, failing
from harness.prepared_saves import PreparedSave, fast_directory
from hypothesis import HealthCheck, seed, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from typing_extensions import override

from charlm.errors import CheckpointCorruptError, CheckpointError
from charlm.runs.checkpoint import list_checkpoints, read_checkpoint
from charlm.runs.choosing import newest_whole_checkpoint
from charlm.runs.directory import RunDirectory
from charlm.runs.retention import prune_checkpoints, remove_leftovers

pytestmark = pytest.mark.slow

FOREIGN = [  # names of files, or of directories with a file in them
    *("notes.txt", "best/notes.txt", ".trash-mine/notes.txt", ".tmp-1-0123ABCD/notes.txt"),
    *(".trash-0123abcd", ".tmp-1-0123abcd", "step-1-00000000/notes.txt", "step-000000000001-0123abcd/notes"),
]
KEEP_LAST, KEEP_BEST = st.integers(1, 3), st.integers(0, 2)
LOSSES = st.sampled_from([None, 1.0, 2.0, 3.0])
KILLS = st.one_of(st.just(-1), st.integers(0, 90))  # -1: not killed


class CheckpointDirectory(RuleBasedStateMachine):
    """A run's checkpoints on disk, and `present`, `damaged` and `foreign`: what should be there."""

    counts: ClassVar[Counter[str]] = Counter()

    def __init__(self) -> None:
        super().__init__()
        self.closing = contextlib.ExitStack()
        self.run = RunDirectory.create(self.closing.enter_context(fast_directory()) / "run")
        self.present: dict[str, PreparedSave] = {}
        self.unlisted: set[str] = set()  # their manifest is damaged
        self.damaged: set[str] = set()  # these, and those with other damage
        self.shared: set[str] = set()  # somebody has put a file into them
        self.foreign: dict[Path, bytes] = {}
        self.newest: PreparedSave | None = None
        self.step = self.saves = 0

    @override
    def teardown(self) -> None:
        self.closing.close()

    def whole(self) -> set[str]:
        return self.present.keys() - self.damaged

    def names(self) -> set[str]:
        """Return the names of the checkpoints on disk, whole or damaged."""
        entries = {path.name for path in self.run.checkpoints.iterdir()}
        return {name for name in entries if name.startswith("step-")} - self.others()

    def others(self) -> set[str]:
        """Return the names of what others have put beside the checkpoints."""
        return {
            path.relative_to(self.run.checkpoints).parts[0] for path in self.foreign
        } - self.present.keys()

    def after_pruning(self, newest: PreparedSave, keep_last: int, keep_best: int) -> set[str]:
        """Return the names that pruning leaves."""
        everything = {**self.present, newest.name: newest}
        listed = {name: save for name, save in everything.items() if name not in self.unlisted}
        counting = [listed[name] for name in sorted(listed) if listed[name].step < newest.step] + [newest]
        scored = [(save.val_loss, save.name) for save in counting if save.val_loss is not None]
        kept = {save.name for save in counting[-keep_last:]} | {
            name for _, name in sorted(scored)[:keep_best]
        }
        gone = {name for name, save in listed.items() if save.step <= newest.step and name not in kept}
        return everything.keys() - (gone - self.shared)

    @rule(
        saves=st.lists(st.tuples(st.integers(0, 2), LOSSES), min_size=1, max_size=5),
        keep_last=KEEP_LAST,
        keep_best=KEEP_BEST,
        kill=KILLS,
    )
    def train(self, saves: list[tuple[int, float | None]], keep_last: int, keep_best: int, kill: int) -> None:
        """Save several times, the last time perhaps killed."""
        for steps, loss in saves[:-1]:
            self.save(steps, loss, keep_last, keep_best, -1)
        self.save(*saves[-1], keep_last, keep_best, kill)

    def save(self, steps: int, loss: float | None, keep_last: int, keep_best: int, kill: int) -> None:
        self.saves += 1
        save = PreparedSave(str(self.saves), self.step + steps, loss, size=200)
        before, had_whole = set(self.present), bool(self.whole())
        left = self.after_pruning(save, keep_last, keep_best)
        ended = False
        with contextlib.suppress(Killed), failing(kill, how="kill"):
            save.write(self.run)
            self.newest = save
            prune_checkpoints(
                self.run, self.run.checkpoints / save.name, keep_last=keep_last, keep_best=keep_best
            )
            ended = True
        self.present[save.name] = save
        self.compare(before, left, ended, save)
        assert self.whole() or not (ended or had_whole)
        self.step = save.step

    @precondition(lambda self: self.newest is not None and self.newest.name in self.whole())
    @rule(keep_last=KEEP_LAST, keep_best=KEEP_BEST, kill=KILLS)
    def prune(self, keep_last: int, keep_best: int, kill: int) -> None:
        assert self.newest is not None
        left = self.after_pruning(self.newest, keep_last, keep_best)
        ended = False
        with contextlib.suppress(Killed), failing(kill, how="kill"):
            path = self.run.checkpoints / self.newest.name
            prune_checkpoints(self.run, path, keep_last=keep_last, keep_best=keep_best)
            ended = True
        self.compare(set(self.present), left, ended, self.newest)
        assert self.whole()

    def compare(self, before: set[str], left: set[str], ended: bool, save: PreparedSave) -> None:
        """Check which checkpoints are there after a save or a pruning, and take over what a kill left."""
        names = self.names()
        if ended:
            assert names == left
            self.counts["prunings"] += 1
            self.counts["deleted"] += len(before | {save.name}) - len(left)
        else:
            self.counts["kills"] += 1
            assert left <= names <= before | {save.name} if save.name in names else names == before
        self.present = {name: self.present[name] for name in names}
        if not ended:
            self.resume()

    @precondition(lambda self: self.whole())
    @rule(data=st.data(), how=st.sampled_from(["flip", "cut", "remove", "add"]), newest=st.booleans())
    def damage(self, data: st.DataObject, how: str, newest: bool) -> None:
        """Damage any file of the newest checkpoint, or of any; or put a file into it."""
        name = max(self.whole()) if newest else data.draw(st.sampled_from(sorted(self.whole())))
        path = data.draw(st.sampled_from(sorted((self.run.checkpoints / name).iterdir())))
        if how == "add":
            self.put(path.parent / "notes.txt")
            self.shared.add(name)
        elif how == "remove":
            path.unlink()
        else:
            content = path.read_bytes()
            middle = len(content) // 2
            flipped = content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]
            path.write_bytes(flipped if how == "flip" else content[:middle])
        self.damaged.add(name)
        if path.name == "manifest.json" and how != "add":
            self.unlisted.add(name)
        self.counts["damaged"] += 1

    @rule(name=st.sampled_from(FOREIGN))
    def put_a_file_of_somebody(self, name: str) -> None:
        self.put(self.run.checkpoints / name)

    def put(self, path: Path) -> None:
        path.parent.mkdir(exist_ok=True)
        self.foreign[path] = f"mine {self.saves}".encode()
        path.write_bytes(self.foreign[path])

    @rule(kill=KILLS)
    def clean_up(self, kill: int) -> None:
        try:
            with failing(kill, how="kill"):
                remove_leftovers(self.run)
        except Killed:
            self.counts["kills"] += 1
            return
        assert {path.name for path in self.run.checkpoints.iterdir()} == self.present.keys() | self.others()

    @rule()
    def resume(self) -> None:
        self.newest = None
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it says which ones are damaged
            try:
                found = newest_whole_checkpoint(self.run).info
            except CheckpointError:
                assert not self.whole()
                return
        assert found.path.name == max(self.whole())
        self.step = found.step

    @invariant()
    def exactly_what_should_be_there_is_there(self) -> None:
        assert self.names() == set(self.present)
        for name, save in self.present.items():
            path = self.run.checkpoints / name
            if name in self.damaged:
                with pytest.raises(CheckpointCorruptError):
                    read_checkpoint(path)
            else:
                assert save.is_what(read_checkpoint(path), self.run)
        listed = {info.path.name for info in list_checkpoints(self.run.path)}
        assert listed == self.present.keys() - self.unlisted
        for path, content in self.foreign.items():
            assert path.read_bytes() == content
        self.counts["states"] += 1


def test_what_is_to_be_kept_is_there_whatever_happens(campaign: Campaign) -> None:
    CheckpointDirectory.counts.clear()
    machine = seed(campaign.seed)(CheckpointDirectory)
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=campaign.trials(short=15),
            stateful_step_count=30,
            deadline=None,
            database=None,
            suppress_health_check=list(HealthCheck),
            report_multiple_bugs=False,
        ),
    )
    for what in ("states", "prunings", "deleted", "kills", "damaged"):
        campaign.counted(what, CheckpointDirectory.counts[what])
        assert CheckpointDirectory.counts[what] > 0
    campaign.counted("violations", 0)
