"""Twenty-four ways to break charlm at run time, each with the test that notices it.

`reliability/broken_versions.py` tries them. A break replaces attributes of modules and classes, by name, so
it does not depend on how the source is written. The variable BREAK_CHARLM names the function of one, for
tests/conftest.py: `BREAK_CHARLM=short_write python -m pytest tests/reliability/test_full_disks.py`.
"""

from __future__ import annotations

import functools
import hashlib
import io
import json
import math
import os
import pkgutil
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

__all__ = ["BREAKS", "Break", "break_charlm"]

_SITE = Path(__file__).with_name("broken")  # its sitecustomize.py breaks whatever Python has it on its path
_broken: list[str] = []


class Break(NamedTuple):
    """One way to break charlm."""

    what: str
    """What is wrong with the broken version."""
    apply: Callable[[], None]
    """Breaks charlm in this process; `BREAK_CHARLM` has its name."""
    test: str
    """What must fail, in its short form, as pytest takes it."""


BREAKS: list[Break] = []


def break_charlm(name: str | None) -> None:
    """Break charlm in this process and in all that it starts, in the way of that name; None: leave it whole.

    Raises:
        KeyError: there is no such way.
    """
    if name is None or name in _broken:
        return
    {broken.apply.__name__: broken for broken in BREAKS}[name].apply()
    _broken.append(name)

    def start(real: Any, self: object, *args: Any, env: Any = None, **options: Any) -> None:
        env = {**(os.environ if env is None else env), "BREAK_CHARLM": name}
        env["PYTHONPATH"] = os.pathsep.join(filter(None, [str(_SITE), env.get("PYTHONPATH")]))
        real(self, *args, env=env, **options)

    _replace("subprocess:Popen", "__init__", start)


def _replace(owner: str, name: str, new: Callable[..., Any]) -> None:
    """Replace a function by `new`, which gets the real one before its arguments.

    A function of the module `owner` itself is replaced in every module that has imported it by name, too. A
    method is replaced in its class, "module:Class".
    """
    real = getattr(pkgutil.resolve_name(owner), name)

    @functools.wraps(real)
    def broken(*args: Any, **options: Any) -> Any:
        return new(real, *args, **options)

    setattr(pkgutil.resolve_name(owner), name, broken)
    if real.__module__ == owner:
        for module in [module for key, module in sys.modules.items() if key.startswith("charlm.")]:
            if vars(module).get(name) is real:
                setattr(module, name, broken)


def _set(owner: str, name: str, change: Callable[[Any], Any]) -> None:
    """Give an attribute that is no function another value, made from the one that it has."""
    setattr(pkgutil.resolve_name(owner), name, change(getattr(pkgutil.resolve_name(owner), name)))


def _breaks(what: str, test: str) -> Callable[[Callable[[], None]], Callable[[], None]]:
    def add(apply: Callable[[], None]) -> Callable[[], None]:
        BREAKS.append(Break(what, apply, f"tests/{test}"))
        return apply

    return add


@_breaks(
    "a checkpoint is renamed into place before its files are synced",
    "reliability/test_power_loss.py::test_a_run_that_loses_power_has_every_save_that_returned",
)
def rename_before_sync() -> None:
    def write(real: Any, target: Path, *args: Any, **options: Any) -> Any:
        with mock.patch.object(os, "fsync", return_value=None):
            digests = real(target, *args, **options)
        for path in (*(target / name for name in digests), target, target.parent):
            descriptor = os.open(path, os.O_RDONLY)
            os.fsync(descriptor)
            os.close(descriptor)
        return digests

    _replace("charlm.files.atomic", "write_directory", write)


@_breaks(
    "the manifest is written first",
    "files/test_atomic.py::test_write_directory_returns_size_and_hash_of_every_file_and_seals_last",
)
def manifest_first() -> None:
    from charlm.files.atomic import FileDigest

    def fill(real: Any, directory: Path, files: Any, seal: Any = None) -> Any:
        files = {n: c if isinstance(c, bytes) else b"".join(c) for n, c in files.items()}
        digests = {n: FileDigest(len(c), hashlib.sha256(c).hexdigest()) for n, c in files.items()}
        return real(directory, files if seal is None else dict([seal(digests)]) | files)

    _replace("charlm.files.atomic", "_fill_new", fill)


@_breaks(
    "old checkpoints are deleted before the new one is written",
    "reliability/test_kills.py::test_a_run_killed_at_any_call_of_a_save_with_pruning_has_the_old_or_the_new",
)
def prune_first() -> None:
    from charlm.runs.checkpoint import list_checkpoints

    def write(real: Any, run: Any, identity: Any, *args: Any, **options: Any) -> Any:
        for info in list_checkpoints(run.path):
            if info.step <= identity.step:
                shutil.rmtree(info.path)
        return real(run, identity, *args, **options)

    _replace("charlm.runs.checkpoint", "write_checkpoint", write)


@_breaks(
    "a short write is taken for a whole one",
    "reliability/test_full_disks.py::test_files_cut_off_at_any_size_are_a_failed_save",
)
def short_write() -> None:
    def write(real: Any, descriptor: int, piece: Any) -> int:
        os.write(descriptor, piece)
        return memoryview(piece).nbytes

    _replace("charlm.files.atomic", "write_all", write)


@_breaks(
    "an fsync that failed is repeated",
    "reliability/test_full_disks.py"
    "::test_whichever_call_of_a_save_fails_the_last_one_is_intact_and_the_next_one_works",
)
def fsync_again() -> None:
    def write(real: Any, *args: Any) -> Any:
        fsync = os.fsync

        def again(descriptor: int) -> None:
            try:
                fsync(descriptor)
            except OSError:
                fsync(descriptor)

        with mock.patch.object(os, "fsync", again):
            return real(*args)

    _replace("charlm.files.atomic", "_write_new", write)


@_breaks(
    "what a killed save left is not removed",
    "reliability/test_kills.py::test_a_run_killed_at_any_call_of_a_save_with_pruning_has_the_old_or_the_new",
)
def leftovers_stay() -> None:
    _replace("charlm.runs.retention", "remove_leftovers", lambda real, run: None)


@_breaks(
    "a log is cut back in place",
    "reliability/test_kills.py::test_a_log_killed_at_any_call_loses_no_line_that_was_written",
)
def log_cut_in_place() -> None:
    def write(real: Any, path: Path, data: Any) -> None:
        descriptor = os.open(path, os.O_WRONLY | os.O_TRUNC)
        os.write(descriptor, b"".join(data))
        os.close(descriptor)

    _replace("charlm.files.log", "write_file", write)


@_breaks(
    "a file's hash is not compared",
    "reliability/test_damage.py::test_every_flipped_bit_is_found",
)
def hash_not_compared() -> None:
    from dataclasses import replace

    class Same(str):
        """Equals every hash."""

        __slots__ = ()
        __hash__ = str.__hash__

        def __eq__(self, other: object) -> bool:
            return True

        def __ne__(self, other: object) -> bool:
            return False

    def read(real: Any, *args: Any) -> Any:
        info = real(*args)
        files = {name: replace(digest, sha256=Same()) for name, digest in info.files.items()}
        return replace(info, files=files)

    _replace("charlm.runs.checkpoint", "_read_manifest", read)


@_breaks("a pipe is waited for", "reliability/test_strange_files.py")
def pipe_waited_for() -> None:
    _set("charlm.files.reading", "_FLAGS", lambda flags: flags & ~os.O_NONBLOCK)


@_breaks("a file of torch.save is unpickled", "reliability/test_strange_files.py")
def unpickled() -> None:
    import torch

    def parse(real: Any, data: bytes, *, path: str) -> Any:
        if data[:2] == b"PK":
            torch.load(io.BytesIO(data), weights_only=False)
        return real(data, path=path)

    _replace("charlm.files.safetensors", "parse_header", parse)


@_breaks(
    "tensors may overlap",
    "files/test_safetensors.py::test_files_out_of_order_are_refused_with_the_reason",
)
def overlapping_tensors() -> None:
    from charlm.errors import FileFormatError
    from charlm.files import safetensors

    def parse(real: Any, text: bytes, size: int, path: str) -> Any:
        try:
            return real(text, size, path)
        except FileFormatError as error:
            if "must begin tensor" not in str(error):
                raise
            refused = error
        entries, base = json.loads(text), len(text) + 8
        metadata, end = entries.pop("__metadata__", {}), base
        tensors = {name: safetensors._tensor_info(name, entry, base, path) for name, entry in entries.items()}
        for info in sorted(tensors.values(), key=lambda info: info.start):
            if info.start > end:
                raise refused  # a gap is still refused
            end = max(end, info.end)
        return safetensors.Header(tensors, metadata)

    _replace("charlm.files.safetensors", "_parse", parse)


@_breaks(
    "the lock is not taken",
    "reliability/test_races.py::test_of_trainers_that_begin_at_one_moment_exactly_one_wins",
)
def no_lock() -> None:
    _replace("charlm.runs.directory:RunDirectory", "lock", lambda real, run: None)


@_breaks(
    "`load` takes a checkpoint that was deleted meanwhile for a damaged one",
    "reliability/test_races.py::test_readers_never_see_half_a_checkpoint",
)
def deleted_is_damaged() -> None:
    def best(real: Any, run: Any) -> Any:
        with mock.patch.object(os.path, "lexists", return_value=True):
            return real(run)

    _replace("charlm.runs.choosing", "best_whole_checkpoint", best)


@_breaks(
    "the optimizers' moments are not restored",
    "reliability/test_resumes.py::test_a_run_that_is_stopped_and_resumed_is_the_same_bit_for_bit[gpt]",
)
def moments_not_restored() -> None:
    _replace("charlm.training.resume", "_moments", lambda real, *args, **options: [])


@_breaks(
    "a stop that is asked for does not save",
    "reliability/test_resumes.py::test_a_run_that_is_stopped_and_resumed_is_the_same_bit_for_bit[bigram]",
)
def stop_does_not_save() -> None:
    def save(real: Any, trainer: Any, **options: Any) -> None:
        if not trainer._interrupted:
            real(trainer, **options)

    _replace("charlm.training.trainer:Trainer", "_save_if_possible", save)


@_breaks(
    "dropout is seeded from the global generator",
    "reliability/test_undisturbed.py"
    "::test_neither_intervals_nor_callbacks_change_the_training[gpt with dropout and accumulation]",
)
def global_dropout() -> None:
    import torch

    def derive(real: Any, seed: int, *address: Any) -> int:
        return int(torch.randint(2**31, ())) if address[0] == "dropout" else real(seed, *address)

    _replace("charlm.training.step", "derive_seed", derive)


@_breaks(
    "the address of a batch lacks the micro-batch",
    "training/test_trainer.py::test_micro_batches_are_different_blocks_and_a_step_is_repeatable",
)
def one_micro_batch() -> None:
    def derive(real: Any, seed: int, *address: Any) -> int:
        return int(real(seed, *(address[:2] if address[0] == "data" else address)))

    _replace("charlm.training.step", "derive_seed", derive)


@_breaks(
    "a step that is not finite is taken",
    "reliability/test_nonfinite.py::test_a_step_that_is_not_finite_is_left_out_and_logged",
)
def nonfinite_taken() -> None:
    def judge(real: Any, *args: Any) -> str:
        verdict: str = real(*args)
        return "move" if verdict == "skip" else verdict

    _replace("charlm.training.guard:WaitingGuard", "judge", judge)


@_breaks(
    "the handlers of signals are not restored",
    "reliability/test_signals.py::test_a_process_that_is_signalled_again_and_again_goes_on_bit_for_bit",
)
def handlers_stay() -> None:
    def leave(real: Any, signals: Any, *error: Any) -> None:
        signals._before.clear()
        real(signals, *error)

    _replace("charlm.cli.signals:Signals", "__exit__", leave)


@_breaks(
    "a second Ctrl-C is ignored",
    "cli/test_processes.py::test_a_second_ctrl_c_ends_at_once_and_damages_nothing",
)
def second_ctrl_c() -> None:
    _set("charlm.cli.signals", "_SAME_KEYPRESS_SECONDS", lambda seconds: math.inf)


@_breaks(
    "a process draws the blocks of another's micro-batches",
    "training/test_reduction.py"
    "::test_every_world_that_divides_the_micro_batches_trains_alike_bit_for_bit[adamw]",
)
def blocks_of_another() -> None:
    def run(real: Any, stepper: Any, step: int, model: Any, micro: int, count: int) -> Any:
        rank = stepper._reduction._world.rank
        return real(stepper, step, model, micro if rank == 0 else 0, count)

    _replace("charlm.training.step:Stepper", "_backward", run)


@_breaks(
    "processes are added up in another order than the tree's",
    "training/test_reduction.py::test_gradients_and_losses_are_added_in_the_tree[8]",
)
def another_order() -> None:
    def added(real: Any, rows: Any) -> Any:
        for row in rows[1:]:
            rows[0].add_(row)
        return rows[0]

    _replace("charlm.training.reduction", "_added", added)


@_breaks(
    "every process saves",
    "training/test_agreement.py::test_a_stop_in_any_process_stops_all_and_is_saved_once[0]",
)
def all_save() -> None:
    def save(real: Any, trainer: Any, **options: Any) -> None:
        from charlm.runs.writer import RunWriter

        if trainer._writer is None and trainer.out_dir is not None:
            trainer._writer = RunWriter(trainer.out_dir)
        real(trainer, **options)

    _replace("charlm.training.trainer:Trainer", "_save_if_possible", save)


@_breaks(
    "a stop is not told to the other processes",
    "training/test_agreement.py::test_a_stop_in_any_process_stops_all_and_is_saved_once[1]",
)
def stop_is_not_told() -> None:
    def agree(real: Any, world: Any, own: Any) -> Any:
        return real(world, own)._replace(interrupted=own.interrupted)

    _replace("charlm.training.agreement", "agree", agree)
