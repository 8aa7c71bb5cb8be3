"""Full and broken disks: a save fails cleanly, what was saved before is intact, and the next one works.

Every call of a save with pruning fails, once or from then on, with each of three errors; files are cut off by
a limit on their size; a real small file system is filled; and a run whose saves fail now and then ends with
the same weights, bit for bit, as one on a disk that never fails.
"""

from __future__ import annotations

import errno
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from harness.campaign import Campaign
from harness.failing_calls import Calls, failing
from harness.prepared_saves import PreparedSave, fast_directory
from harness.tiny_training import TOKENIZER, Numbers, quick_config, same_tensors, tensors_of, tiny_split

from charlm import BigramLM, Trainer
from charlm.errors import CheckpointWriteError
from charlm.runs.checkpoint import list_checkpoints, read_checkpoint
from charlm.runs.choosing import newest_whole_checkpoint
from charlm.runs.directory import RunDirectory
from charlm.runs.log import read_metrics
from charlm.runs.retention import prune_checkpoints, remove_leftovers

pytestmark = pytest.mark.slow

TESTS = Path(__file__).parents[1]
CODES = {"ENOSPC": errno.ENOSPC, "EIO": errno.EIO, "EDQUOT": errno.EDQUOT}
REMOVING = {"stat", "lstat", "listdir", "unlink", "rmdir"}  # what removing a temporary directory needs


@pytest.fixture
def memory() -> Iterator[Path]:
    with fast_directory() as path:
        yield path


class FailingRun:
    """A run whose saves fail; `standing` is the last save that is known to be durable."""

    def __init__(self, path: Path) -> None:
        self.run = RunDirectory.create(path)
        self.step = self.calls_of_a_save = 0
        self.standing = self.next()
        self.standing.write(self.run)

    def next(self) -> PreparedSave:
        self.step += 1
        return PreparedSave("full", self.step, size=3_000)

    def save(self, save: PreparedSave, calls: Calls | None = None) -> tuple[int | None, bool]:
        """Save and prune; return the error's number if there was one, and whether the save returned."""
        returned = False
        try:
            save.write(self.run)
            returned = True
            self.calls_of_a_save = len(calls.names) if calls else 0
            prune_checkpoints(self.run, self.run.checkpoints / save.name, keep_last=1, keep_best=0)
        except OSError as error:
            if not returned and type(error) is not CheckpointWriteError:
                raise
            return error.errno, returned
        return None, returned

    def check(self, save: PreparedSave, returned: bool, where: str) -> None:
        """Check that the new save stands, or else the one before it: the new one may stand beside it."""
        found = {
            info.step: read_checkpoint(info.path, self.run.run_id) for info in list_checkpoints(self.run.path)
        }
        newest = newest_whole_checkpoint(self.run).info.step
        if returned:
            assert newest == save.step, f"{where}: the new save is not the newest"
        else:
            assert self.standing.step in found, f"{where}: the last save is gone"
            assert self.standing.is_what(found[self.standing.step], self.run), where
        if save.step in found:
            assert save.is_what(found[save.step], self.run), f"{where}: not what was saved"

    def go_on(self, where: str) -> None:
        """Save once more, on a disk that works again."""
        remove_leftovers(self.run)
        self.standing = self.next()
        assert self.save(self.standing) == (None, True), where
        assert [path.name for path in self.run.checkpoints.iterdir()] == [self.standing.name], where
        self.check(self.standing, True, where)

    def leftovers(self) -> list[str]:
        return [path.name for path in self.run.checkpoints.iterdir() if path.name.startswith(".tmp-")]


def no_fsync_is_repeated(calls: Calls) -> bool:
    """Return whether each fsync's descriptor is closed next."""
    for at, name in enumerate(calls.names):
        if name == "fsync":
            descriptor = calls.first_arguments[at]
            later = zip(calls.names[at + 1 :], calls.first_arguments[at + 1 :], strict=True)
            if next((after for after, argument in later if argument == descriptor), "") != "close":
                return False
    return True


def test_a_resume_that_fails_says_in_which_run_and_another_one_goes_on(
    memory: Path, campaign: Campaign
) -> None:
    def trainer_of(run: Path) -> Trainer:
        return Trainer.resume(run, tiny_split()[0], device="cpu")

    first = Trainer(
        BigramLM(TOKENIZER.vocab_size), tiny_split()[0], quick_config(), device="cpu", out_dir=memory / "run"
    )
    for record in first.steps():  # some lines past the checkpoint, for the resume to cut off
        if record.step == 5:
            first.save()
        if record.step == 8:
            break
    for how in ("once", "always"):
        for at in range(10_000):
            run = shutil.copytree(memory / "run", memory / f"{how} {at}")
            trainer = trainer_of(run)
            code = [*CODES][at % 3]
            where = f"call {at}, {code} {how}"
            with warnings.catch_warnings(), failing(at, how=how, code=CODES[code]) as calls:
                warnings.filterwarnings("ignore", "cannot (clean up|write)")
                steps, refused = trainer.steps(), None
                try:
                    next(steps)
                except OSError as error:
                    refused = error
                else:
                    steps.close()
            if calls.failed is None:
                break
            campaign.counted("failed calls")
            if refused is not None:
                assert type(refused) is CheckpointWriteError, f"{where}: {refused!r}"
                assert str(run) in str(refused), where
                assert refused.errno == CODES[code], where
                campaign.counted("failed beginnings")
            assert trainer_of(run).fit().steps == 12, where  # the lock is free
            records = [(record["kind"], record["step"]) for record in read_metrics(run / "metrics.jsonl")]
            assert len(set(records)) == len(records), f"{where}: {records}"
            shutil.rmtree(run)
    campaign.counted("violations", 0)


@pytest.mark.parametrize(("code", "how"), [*zip(CODES, ("once", "always", "once"), strict=True)])
def test_whichever_call_of_a_save_fails_the_last_one_is_intact_and_the_next_one_works(
    memory: Path, campaign: Campaign, code: str, how: str
) -> None:
    failing_run = FailingRun(memory / "run")
    for at in range(10_000):
        where = f"call {at}, {code} {how}"
        save = failing_run.next()
        with failing(at, how=how, code=CODES[code]) as calls:
            number, returned = failing_run.save(save, calls)
        if not returned:
            assert number == CODES[code], where
        else:
            again = {errno.EBADF} if calls.failed == "close" else set()  # shutil.rmtree closes once more
            assert number in {None, CODES[code], *again}, where
            # No failure of the save is passed over; but the first call asks whether the name is free.
            assert at == 0 or at >= failing_run.calls_of_a_save, where
        assert no_fsync_is_repeated(calls), where
        failing_run.check(save, returned, where)
        if how == "once" or calls.failed not in REMOVING:
            assert not failing_run.leftovers(), where
        failing_run.go_on(where)
        if calls.failed is None:
            break
        campaign.counted("failed calls")
        campaign.counted("failed saves", int(not returned))
        campaign.counted("failed deletions", int(returned and number is not None))
    assert at > 50
    assert campaign.figures["failed saves"] > 25
    assert campaign.figures["failed deletions"] > 10
    campaign.counted("violations", 0)


def test_files_cut_off_at_any_size_are_a_failed_save(memory: Path, campaign: Campaign) -> None:
    failing_run = FailingRun(memory / "run")
    largest = max(len(data) for data in failing_run.standing.files(failing_run.run).values())
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    trials = campaign.trials(short=50)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        for trial in range(trials):
            size = (largest + 100) * trial // trials
            save = failing_run.next()
            try:
                resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
                number, returned = failing_run.save(save)
            finally:
                resource.setrlimit(resource.RLIMIT_FSIZE, limits)
            where = f"files of at most {size} bytes"
            assert number == (None if returned else errno.EFBIG), where
            assert returned == (size >= largest), where
            assert not failing_run.leftovers(), where
            failing_run.check(save, returned, where)
            if returned:
                failing_run.standing = save
            campaign.counted("limits")
    finally:
        signal.signal(signal.SIGXFSZ, before)
    failing_run.go_on("at the end")
    campaign.counted("violations", 0)


def fill_small_disk(place: Path, trials: int, seed: int) -> dict[str, int]:
    """Mount a file system of 256 KiB, and save on it with more or less room left."""
    command = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(place)]
    subprocess.run(command, check=True)
    failing_run = FailingRun(place / "run")
    draw = random.Random(seed)
    figures = {"saves on a small disk": 0, "did not fit": 0}
    ballast = place / "ballast"
    for trial in range(trials):
        where = f"seed {seed}, trial {trial}"
        free = shutil.disk_usage(place).free
        ballast.write_bytes(bytes(max(free - draw.randrange(40_000), 0)))
        save = failing_run.next()
        number, returned = failing_run.save(save)
        assert number == (None if returned else errno.ENOSPC), where
        assert not failing_run.leftovers(), where
        failing_run.check(save, returned, where)
        figures["saves on a small disk"] += 1
        figures["did not fit"] += not returned
        if returned:
            failing_run.standing = save
        ballast.unlink()
        if draw.random() < 0.3:
            failing_run.go_on(where)
    return figures


def test_a_small_disk_that_is_filled_keeps_the_last_save(tmp_path: Path, campaign: Campaign) -> None:
    unshare = shutil.which("unshare")
    ways = [[unshare, *flags] for flags in (["-m"], ["-rm"])] if unshare else []
    probe = ["sh", "-c", f"mount -t tmpfs -o size=256k tmpfs '{tmp_path}'"]
    may = [subprocess.run([*way, *probe], check=False, capture_output=True).returncode == 0 for way in ways]
    way = next((way for way, works in zip(ways, may, strict=True) if works), None)
    if way is None:
        pytest.skip("this process may not mount a file system of its own")
    code = (
        "import json, sys; from pathlib import Path; from test_full_disks import fill_small_disk; "
        "print(json.dumps(fill_small_disk(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))))"
    )
    paths = [str(TESTS.parent), str(TESTS), str(TESTS / "reliability")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    arguments = [str(tmp_path), str(campaign.trials(short=100)), str(campaign.seed)]
    command = [*way, sys.executable, "-c", code, *arguments]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr[-2_000:]
    figures: dict[str, int] = json.loads(ended.stdout)
    for what, number in figures.items():
        campaign.counted(what, number)
    assert 0 < figures["did not fit"] < figures["saves on a small disk"]
    campaign.counted("violations", 0)


def test_a_run_whose_saves_fail_now_and_then_ends_with_the_same_weights(
    memory: Path, campaign: Campaign
) -> None:
    train, val = tiny_split()
    config = quick_config(save_interval=1, keep_last=1)

    def trainer_in(place: Path, numbers: Numbers) -> Trainer:
        torch.manual_seed(0)
        model = BigramLM(TOKENIZER.vocab_size)
        return Trainer(model, train, config, val_data=val, device="cpu", out_dir=place, callbacks=[numbers])

    numbers = Numbers()
    whole = trainer_in(memory / "whole", numbers)
    whole.fit()
    for trial in range(campaign.trials(short=4)):
        draw = random.Random(f"{campaign.seed}/{trial}")
        own_numbers = Numbers()
        trainer = trainer_in(memory / "flaky", own_numbers)
        steps = trainer.steps()
        next(steps)
        for step in range(2, 12):
            at = draw.randrange(80) if step % 3 else -1  # two failures in a row are borne
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                with failing(at, how=draw.choice(["once", "always"]), code=draw.choice([*CODES.values()])):
                    next(steps)
            campaign.counted("steps with a failing call", int(at >= 0))
            campaign.counted("failed saves", sum("cannot save" in str(w.message) for w in caught))
            assert newest_whole_checkpoint(RunDirectory.open(memory / "flaky")).info.step > 0
        list(steps)
        assert own_numbers.steps == numbers.steps, f"seed {campaign.seed}, trial {trial}"
        assert same_tensors(tensors_of(trainer), tensors_of(whole)), f"seed {campaign.seed}, trial {trial}"
        resumed = Trainer.resume(memory / "flaky", train, val_data=val, device="cpu", callbacks=[Numbers()])
        assert same_tensors(tensors_of(resumed), tensors_of(whole)), f"seed {campaign.seed}, trial {trial}"
        shutil.rmtree(memory / "flaky")
    assert campaign.figures["failed saves"] > 0
    campaign.counted("weights that differ", 0)
