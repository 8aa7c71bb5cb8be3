"""What a loss of power leaves: after a save has returned the new one, before that the old or the new.

Real work is recorded: runs that begin, log, save and prune, models and tokenizers that are replaced, now and
then killed and begun again. It is cut off after every operation; what was not synced is there, missing, torn
or garbage (see harness/power_loss.py). Each such disk is laid out as files and read by charlm itself.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import random
import shutil
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from unittest import mock

import pytest
from harness.campaign import Campaign
from harness.failing_calls import Killed, failing
from harness.power_loss import Disk, Operation, Recording, Tree, recorded
from harness.prepared_saves import PreparedSave, fast_directory, to_be_kept

from charlm import BigramLM, CharTokenizer
from charlm.errors import CheckpointError, FileFormatError, RunExistsError
from charlm.files import strict_json
from charlm.files.log import Appender
from charlm.models.saving import load_model, read_model_files, save_model
from charlm.runs.checkpoint import read_checkpoint, scan_checkpoints
from charlm.runs.choosing import newest_whole_checkpoint
from charlm.runs.directory import RunDirectory
from charlm.runs.log import MetricsLog, read_metrics
from charlm.runs.retention import prune_checkpoints, remove_leftovers

pytestmark = pytest.mark.slow

RECORDINGS = 12  # at least
MOST_OF_ONE = 250  # crashes of one recording


@pytest.fixture
def memory() -> Iterator[Path]:
    with fast_directory() as path:
        yield path


@contextlib.contextmanager
def killed_at_random(draw: random.Random) -> Iterator[None]:
    """Raise Killed at one of the next calls, in a third of the cases; the first ones are the likeliest."""
    at = int(80 * draw.random() ** 2) if draw.random() < 1 / 3 else -1
    with failing(at, how="kill"):
        yield


def crashes(recording: Recording, draw: random.Random) -> Iterator[tuple[str, object, Tree]]:
    """Yield what may be on the disk after each operation, with what was promised then."""
    disk, promise = Disk(), None
    for number, operation in enumerate(recording.operations):
        disk.apply(operation)
        promise = operation.note if operation.kind == "note" else promise
        for fates in [*disk.systematic_fates(), *(disk.random_fates(draw) for _ in range(6))]:
            where = f"after operation {number} ({operation.kind} {operation.name}), unsynced: " + ", ".join(
                f"{other.kind} {other.name} {fate}" for other, fate in zip(disk.pending, fates, strict=True)
            )
            yield where, promise, disk.after_crash(fates, draw)


def lose_power(
    campaign: Campaign,
    memory: Path,
    trials: int,
    work: Callable[[Path, random.Random, Recording], None],
    check: Callable[[Path, str, object, random.Random], None],
) -> None:
    """Record work until as many distinct crashes of it were checked."""
    seen: set[bytes] = set()
    number = 0
    while len(seen) < trials:
        draw = random.Random(f"{campaign.seed}/{number}")
        root = memory / "recorded"
        root.mkdir()
        with recorded(root) as recording, contextlib.suppress(Killed):
            work(root, draw, recording)
        shutil.rmtree(root)
        found = list(crashes(recording, draw))
        most = min(len(found), 1 + trials // RECORDINGS, MOST_OF_ONE)
        for moment, promise, tree in draw.sample(found, most):
            digest = hashlib.sha256(repr((sorted(tree.items()), promise)).encode()).digest()
            if len(seen) == trials or digest in seen:
                continue
            seen.add(digest)
            disk = memory / "disk"
            disk.mkdir()
            for name, data in tree.items():  # a directory comes before what is in it
                if data is None:
                    (disk / name).mkdir()
                else:
                    (disk / name).write_bytes(data)
            where = f"seed {campaign.seed}, recording {number}, {moment}"
            try:
                check(disk, where, promise, draw)
            except (OSError, RuntimeWarning) as error:
                error.add_note(where)
                raise
            shutil.rmtree(disk)
        number += 1
    campaign.counted("distinct crashes", len(seen))
    campaign.counted("recordings", number)
    campaign.counted("violations", 0)


@dataclass(frozen=True)
class Promise:
    """What must be found after a crash."""

    run_id: str | None = None
    """The run that was begun."""
    saves: tuple[PreparedSave, ...] = ()
    """All that were ever written; what is found is one of them."""
    newest: tuple[PreparedSave, ...] = ()
    """One of them is the newest: the last that returned, or one that was under way since."""
    none: bool = True
    """No save has returned so far."""
    kept: frozenset[str] = frozenset()
    """Names that pruning keeps."""
    lines: tuple[bytes, ...] = ()
    """All lines ever written to the log."""
    flushed: tuple[bytes, ...] = ()
    """Those that a flush has made durable, or a resume."""


class RecordedRun:
    """A run at work, and what it promises at each moment."""

    def __init__(self, root: Path, draw: random.Random, recording: Recording) -> None:
        self.draw, self.recording = draw, recording
        self.keep_last, self.keep_best = draw.choice([(1, 0), (2, 0), (1, 1)])
        self.path = root / "runs" / "one"
        self.promise = Promise()
        self.candidates: dict[int, PreparedSave] = {}
        self.step = 0

    def now(self, **changes: object) -> None:
        self.promise = replace(self.promise, **changes)  # type: ignore[arg-type]  # by their names
        self.recording.note(self.promise)

    def begin(self) -> RunDirectory | None:
        for _ in range(3):
            try:
                with killed_at_random(self.draw):
                    run = RunDirectory.create(self.path)
                    self.now(run_id=run.run_id)
                return run
            except Killed:
                continue
            except RunExistsError:
                return None
        return None

    def work(self) -> None:
        run = self.begin()
        restarts = 0
        while run is not None and len(self.promise.saves) < 5 and restarts < 5:
            try:
                with killed_at_random(self.draw):
                    remove_leftovers(run)
                    log = MetricsLog(run.metrics, step=self.step)
                with contextlib.closing(log), killed_at_random(self.draw):
                    while len(self.promise.saves) < 5:
                        self.save(run, log)
            except Killed:
                restarts += 1
                found = {info.step: info.path.name for info in scan_checkpoints(run)[0]}
                self.candidates = {s.step: s for s in self.promise.saves if found.get(s.step) == s.name}
                self.step = max(self.candidates, default=0)
                stays = tuple(line for line in self.promise.flushed if step_of(line) <= self.step)
                self.now(flushed=stays)

    def save(self, run: RunDirectory, log: MetricsLog) -> None:
        draw = self.draw
        step = self.step + (draw.random() < 0.8)
        for _ in range(draw.randrange(1, 4)):
            values = {"value": draw.random(), "text": "x" * draw.randrange(50)}
            line = strict_json.dumps_line({"kind": "step", "step": step, **values})
            self.now(lines=(*self.promise.lines, line))
            log.write("step", step, values)
        self.now()
        written = run.metrics.read_bytes().splitlines(keepends=True)
        log.flush()
        self.now(flushed=tuple(written))
        loss = draw.choice([None, draw.uniform(1, 4)])
        save = PreparedSave(str(draw.random()), step, loss, size=draw.randrange(150, 900))
        self.now(saves=(*self.promise.saves, save), newest=(*self.promise.newest, save))
        save.write(run)
        same = [other for other in self.promise.newest if other.step == step]
        self.candidates[step] = save
        kept = to_be_kept(self.candidates.values(), keep_last=self.keep_last, keep_best=self.keep_best)
        self.now(kept=frozenset(kept), newest=tuple(same), none=False)
        prune_checkpoints(
            run, run.checkpoints / save.name, keep_last=self.keep_last, keep_best=self.keep_best
        )
        self.candidates = {s: one for s, one in self.candidates.items() if one.name in kept}
        self.now(newest=(save,))
        self.step = step


def step_of(line: bytes) -> int:
    return int(strict_json.take(strict_json.loads(line, path="log"), "step", int, path="log"))


def check_run(disk: Path, where: str, promise: object, draw: random.Random) -> None:
    if promise is None:
        promise = Promise()
    assert isinstance(promise, Promise)
    try:
        run = RunDirectory.open(disk / "runs" / "one")
    except CheckpointError:
        assert promise.run_id is None, f"{where}: the run is gone"
        return
    saves = {save.name: save for save in promise.saves}
    whole, damaged = scan_checkpoints(run)
    assert not damaged, f"{where}: {damaged}"
    for info in whole:
        assert info.path.name in saves, f"{where}: nobody has saved {info.path.name}"
        checkpoint = read_checkpoint(info.path, run.run_id)
        assert saves[info.path.name].is_what(checkpoint, run), f"{where}: not what was saved"
    names = {info.path.name for info in whole}
    assert promise.kept <= names, f"{where}: {promise.kept - names} are gone"
    if names:
        newest = newest_whole_checkpoint(run).info
        allowed = {save.name for save in promise.newest}
        assert newest.path.name in allowed, f"{where}: {newest.path.name} is the newest, not {allowed}"
    assert names or promise.none, f"{where}: no checkpoint is left"
    step = max((info.step for info in whole), default=0)
    check_log(run, where, promise, step)
    if draw.random() < 0.1:  # the next trainer gets on with it
        remove_leftovers(run)
        save = PreparedSave("next", step + 1)
        save.write(run)
        prune_checkpoints(run, run.checkpoints / save.name, keep_last=1, keep_best=0)
        assert [path.name for path in run.checkpoints.iterdir()] == [save.name], where


def check_log(run: RunDirectory, where: str, promise: Promise, step: int) -> None:
    """Check the log as a reader finds it, and after a resume has cut it back to a step."""
    flushed = list(promise.flushed)
    if not run.metrics.exists():
        assert not flushed, f"{where}: the log is gone"
        return
    with contextlib.suppress(FileFormatError):  # what was not flushed may be garbage until a resume
        records = [strict_json.dumps_line(record) for record in read_metrics(run.metrics)]
        assert records[: len(flushed)] == flushed, f"{where}: the log has lost flushed lines"
        assert set(records) <= set(promise.lines), f"{where}: the log has lines that nobody wrote"
    MetricsLog(run.metrics, step=step).close()
    lines = run.metrics.read_bytes().splitlines(keepends=True)
    durable = [line for line in flushed if step_of(line) <= step]
    assert lines[: len(durable)] == durable, f"{where}: a resume has lost lines"
    assert set(lines) <= set(promise.lines), f"{where}: the log has lines that nobody wrote"


def test_a_run_that_loses_power_has_every_save_that_returned(memory: Path, campaign: Campaign) -> None:
    def work(root: Path, draw: random.Random, recording: Recording) -> None:
        RecordedRun(root, draw, recording).work()

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        lose_power(campaign, memory, campaign.trials(short=150), work, check_run)


@pytest.mark.parametrize("what", ["model", "tokenizer"])
def test_a_replaced_model_or_tokenizer_that_loses_power_is_the_old_or_the_new(
    memory: Path, campaign: Campaign, what: str
) -> None:
    tokenizers = [CharTokenizer("abcdef"[: 2 + i]) for i in range(4)]
    models = [BigramLM(tokenizer.vocab_size) for tokenizer in tokenizers]
    for number, pair in enumerate(zip(models, tokenizers, strict=True)):
        save_model(pair[0], memory / "expected" / str(number), pair[1])
    contents = [read_model_files(memory / "expected" / str(number)) for number in range(len(models))]

    def write(root: Path, number: int) -> None:
        if what == "model":
            save_model(models[number], root / "below" / "m", tokenizers[number])
        else:
            tokenizers[number].save(root / "t")

    def work(root: Path, draw: random.Random, recording: Recording) -> None:
        allowed = {-1}
        for number in range(len(models)):
            allowed.add(number)
            recording.note(frozenset(allowed))
            with contextlib.suppress(Killed), killed_at_random(draw):
                write(root, number)
                allowed = {number}
                recording.note(frozenset(allowed))

    def check(disk: Path, where: str, promise: object, draw: random.Random) -> None:
        try:
            if what == "model":
                load_model(disk / "below" / "m", BigramLM)
                found = contents.index(read_model_files(disk / "below" / "m"))
            else:
                found = tokenizers.index(CharTokenizer.load(disk / "t"))
        except (CheckpointError, FileNotFoundError):
            found = -1
        assert isinstance(promise, frozenset)
        assert found in promise, f"{where}: found {found} of {sorted(promise)}"
        (disk / "below").mkdir(exist_ok=True)
        write(disk, 0)  # the next one gets through
        if what == "model":
            load_model(disk / "below" / "m", BigramLM)

    short = 100
    lose_power(campaign, memory, campaign.trials(short=short), work, check)


@contextlib.contextmanager
def unreliable(draw: random.Random, recording: Recording) -> Iterator[None]:
    """Let writes fail, whole or in part, and every fsync in three lose what it was to make durable."""
    real_write, real_fsync = os.write, os.fsync

    def write(descriptor: int, data: memoryview) -> int:
        if draw.random() < 0.1:
            real_write(descriptor, data[: draw.randrange(len(data) + 1)])
            raise OSError(errno.EIO, "failed on purpose")
        return real_write(descriptor, data)

    def fsync(descriptor: int) -> None:
        if draw.random() < 0.3:
            recording.lose(descriptor)
            raise OSError(errno.EIO, "failed on purpose")
        real_fsync(descriptor)

    with mock.patch.object(os, "write", write), mock.patch.object(os, "fsync", fsync):
        yield


def test_a_log_whose_fsync_fails_keeps_every_line_that_a_later_flush_made_durable(
    memory: Path, campaign: Campaign
) -> None:
    def work(root: Path, draw: random.Random, recording: Recording) -> None:
        number = 0
        written: list[bytes] = []
        for _ in range(3):  # one after the other, as trainings go on
            with contextlib.closing(Appender(root / "log")) as log, unreliable(draw, recording):
                if written:
                    recording.note(b"".join(written))
                for _ in range(draw.randrange(2, 7)):
                    for _ in range(draw.randrange(3)):
                        number += 1
                        line = b"%d %s\n" % (number, b"x" * draw.randrange(30))
                        with contextlib.suppress(OSError):
                            log.append(line)
                            written.append(line)
                            campaign.counted("lines")
                    try:
                        log.flush()
                        recording.note(b"".join(written))
                    except OSError:
                        campaign.counted("failed flushes")

    def check(disk: Path, where: str, promise: object, draw: random.Random) -> None:
        if promise is not None:
            assert isinstance(promise, bytes)
            assert (disk / "log").read_bytes().startswith(promise), f"{where}: a line is lost"

    lose_power(campaign, memory, campaign.trials(short=150), work, check)


def test_what_the_simulated_disk_may_lose_is_what_was_not_synced(campaign: Campaign) -> None:
    disk = Disk()
    draw = random.Random(campaign.seed)
    for operation in (Operation("create", 0, "f", made=1), Operation("write", 1, data=b"old")):
        disk.apply(operation)
    trees = {str(disk.after_crash(disk.random_fates(draw), draw)) for _ in range(1_000)}
    assert {"{}", "{'f': b''}", "{'f': b'o'}", "{'f': b'old'}", "{'f': b'\\x00\\x00\\x00'}"} < trees
    disk.apply(Operation("sync", 1))
    trees = {str(disk.after_crash(disk.random_fates(draw), draw)) for _ in range(100)}
    assert trees == {"{}", "{'f': b'old'}"}
    disk.apply(Operation("sync", 0))
    disk.apply(Operation("rename", 0, "f", "g"))
    disk.apply(Operation("mkdir", 0, "d", made=2))
    trees = {str(disk.after_crash(disk.random_fates(draw), draw)) for _ in range(100)}
    kept = ["{'f': b'old'}", "{'g': b'old'}", "{'d': None, 'f': b'old'}", "{'d': None, 'g': b'old'}"]
    assert trees == set(kept)
    campaign.counted("simulated disks", 3)
