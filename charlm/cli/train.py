"""`charlm train`: checks the options and reads the text; `charlm.cli.fit` trains.

All mistakes that can be found without torch are reported here, before torch is loaded.
"""

from __future__ import annotations

import argparse
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from charlm.backends.host import is_under_torchrun
from charlm.cli.encoded import Encoded, encode_corpus
from charlm.cli.fields import flag_of
from charlm.cli.output import Console, Invocation, UsageError, as_word, check_output, refuse, shell_word
from charlm.cli.reading import VAL_FRACTION, Reading, wrong_val_fraction
from charlm.cli.rundir import Origin, check_free, check_sources, read_record
from charlm.cli.settings import FIELDS, from_flags, gather, nearest_name, variable_of
from charlm.cli.signals import Signals
from charlm.data.documents import MOST_WEIGHT
from charlm.errors import CheckpointError, ConfigError, CorpusError, quoted
from charlm.files.folders import cache_folder
from charlm.plain import as_float
from charlm.runs.directory import RECORD_FILE, RunDirectory

if TYPE_CHECKING:
    from charlm.backends.world import World
    from charlm.cli.parent import Parent

__all__ = ["run"]

_ENDS = ("max_steps", "minutes")  # settings that a resume can change
_KEPT = ("preset", "config", "tokenizer", "val_fraction", "epochs")


def run(args: argparse.Namespace, console: Console, signals: Signals, began: float) -> int:
    """Train, or resume a training; `began` is `time.perf_counter()` at the start of the command."""
    call = Invocation(console, signals, began)
    if not is_under_torchrun():
        return _run(args, call, None)
    with signals.ending_at_once():
        from charlm.cli.together import together  # noqa: PLC0415 - it needs torch

    with together(args.device, console, signals) as world:
        return _run(args, call, world)


def _run(args: argparse.Namespace, call: Invocation, world: World | None) -> int:
    console, signals, _ = call
    flags = {name: vars(args)[name] for name in FIELDS if name in vars(args)}
    out = Path(args.out)
    is_first = world is None or world.is_first
    if args.resume == "auto":
        has_begun = not RunDirectory.is_free(out)
        args.resume = has_begun if world is None else world.tell(lambda: has_begun)
        if args.resume:
            _refuse_other_settings(args, flags)
            return _resume(args, call, {}, world)
    if args.resume:
        _refuse_beside("--resume", args, flags, kept=_ENDS)
        return _resume(args, call, from_flags(flags), world)
    repeated = None
    args.aside, args.aside_chars = None if args.mixture and args.baseline else 0, None
    if args.repeat is not None:
        _refuse_beside("--repeat", args, flags, kept=())
        repeated = read_record(Path(args.repeat))
        args.files = args.files or _found_again(repeated, args)
        args.tokenizer, args.val_fraction = repeated.tokenizer, repeated.val_fraction
        args.device = args.device or repeated.device
        args.encoding = args.encoding or repeated.encoding
        args.aside, args.aside_chars = repeated.aside, repeated.aside_chars
        args.parent = _path_of(repeated.parent)
        _mention_ignored_variables(console, "repeated")
    problems = []
    if not args.files:
        problems += ["FILE is needed: the path of a text, - for standard input, or python-docs"]
    if world is not None and "-" in args.files:
        problems += ["FILE must be a path for several processes: only one of them could read standard input"]
    weights = _weights(args.weight, args.files, problems)
    val_fraction = VAL_FRACTION if args.val_fraction is None else args.val_fraction
    problems += wrong_val_fraction(val_fraction)
    if args.on_unknown is not None and args.parent is None:
        problems += ["--on-unknown needs --from: without it the text makes the vocabulary, and all is known"]
    if args.parent is not None and Path(args.parent).resolve().is_relative_to(out.resolve()):
        problems += [f"--from must not lie in -o {quoted(args.out)}, which the new run replaces"]
        refuse(problems)
    parent = None if args.parent is None else _parent(args.parent, repeated, signals)
    try:
        if repeated is not None:
            settings = repeated.settings()
        elif parent is None:
            settings = gather(args.preset, file=args.config, environment=os.environ, flags=flags)
        else:
            preset = args.preset or parent.preset
            settings = parent.settings(gather(preset, file=args.config, environment=os.environ, flags=flags))
    except (ConfigError, UsageError) as error:
        if not problems:
            raise
        problems += [str(error)]
    if args.epochs is not None and not 0 < args.epochs < math.inf:
        problems += [f"--epochs must be above 0, got {args.epochs:g}"]
    if args.epochs is not None and not problems:
        beside = sorted(settings.given & set(_ENDS))
        problems += [f"--epochs is the length of the training, and so is {name}" for name in beside]
    if args.epochs is not None and (args.by_file or args.separator is not None or args.weight):
        problems += ["--epochs counts passes through one text; with documents give --max-steps or --minutes"]
    refuse(problems)
    _mention_unknown_variables(console)
    check_sources(args.files)
    if is_first:
        check_free(out, overwrite=args.overwrite)
        _check_place(out)
    reading = Reading(
        encoding=args.encoding or "utf-8",
        kind=args.tokenizer,
        tokenizer=None if parent is None else parent.tokenizer,
        extends=args.on_unknown is None,
        on_unknown=args.on_unknown or "error",
        val_fraction=val_fraction,
        by_file=args.by_file,
        separator=args.separator,
        weights=weights,
    )
    if repeated is not None:
        reading = replace(repeated.reading(), encoding=args.encoding)
    encoded = _encoded(
        world,
        lambda prepared: encode_corpus(args.files, reading, console=console, prepared=prepared),
        prepared=None if repeated is None else repeated.is_prepared or None,
    )
    if args.tokenizer not in {None, encoded.kind}:
        owner = "the prepared corpus" if parent is None else f"the model in {quoted(args.parent)}"
        raise UsageError(f"--tokenizer must be {encoded.kind}, as {owner} has it")
    signals.check()
    train_share = 1 - val_fraction if repeated is None else repeated.train_share(encoded.n_ids)
    if encoded.is_prepared and args.val_fraction is None:
        val_fraction, train_share = encoded.recorded_split
        train_share = 1 - val_fraction if reading.apart else train_share
    if settings.training.compile:
        _keep_compiled_code()
    with signals.ending_at_once():
        from charlm.cli.fit import begin  # noqa: PLC0415 - torch takes seconds, and only now is needed

    return begin(
        args,
        call,
        settings,
        encoded,
        reading=reading,
        val_fraction=val_fraction,
        train_share=train_share,
        kept=repeated is not None,
        parent=parent,
    )


def _weights(given: Sequence[str], files: Sequence[str], problems: list[str]) -> list[float] | None:
    """Return the weight of each file from FILE=W; None: no weight was given."""
    weights = dict.fromkeys(files, 1.0)
    for word in given:
        name, _, number = word.rpartition("=")
        try:
            weights[name] = float(number)
        except ValueError:
            weights[name] = 0.0
        if name not in files:
            problems.append(
                f"--weight must name a FILE of the command, as it stands there, got {quoted(word)}"
            )
        elif not MOST_WEIGHT**-1 <= weights[name] <= MOST_WEIGHT:
            problems.append(f"--weight must be FILE=W with a number from 1e-6 to 1e6, got {quoted(word)}")
    return [weights[name] for name in files] if given else None


def _path_of(parent: Mapping[str, object] | None) -> str | None:
    return None if parent is None else str(parent.get("path"))


def _parent(path: str, origin: Origin | None, signals: Signals) -> Parent:
    """Read the model that a training begins with; for an earlier training, it must be the same."""
    with signals.ending_at_once():
        from charlm.cli.parent import read_parent  # noqa: PLC0415 - it needs torch

    values = None if origin is None else origin.parent
    return read_parent(path, None if values is None else values.get("sha256"))


def _encoded(
    world: World | None, encode: Callable[[bool | None], Encoded], *, prepared: bool | None
) -> Encoded:
    """Return the ids; of several processes, the first prepares a large text, and then the others open it."""
    if world is None:
        return encode(prepared)
    own: Encoded | None = None

    def first() -> bool:
        nonlocal own
        own = encode(prepared)
        return own.is_prepared

    is_prepared = world.tell(first)
    return own or encode(is_prepared)


def _resume(
    args: argparse.Namespace, call: Invocation, end: Mapping[str, object], world: World | None
) -> int:
    console, signals, _ = call
    out = Path(args.out)
    if RunDirectory.is_free(out) and not (out / RECORD_FILE).is_file():
        raise CheckpointError(
            f"there is nothing in {quoted(args.out)} to go on with: begin a training, without --resume"
        )
    origin = read_record(out)
    if world is None or world.is_first:
        _check_place(out)
    sources = args.files or _found_again(origin, args)
    check_sources(sources)
    _mention_ignored_variables(console, "resumed")
    reading = replace(origin.reading(), encoding=args.encoding or origin.encoding)
    encoded = _encoded(
        world,
        lambda prepared: encode_corpus(sources, reading, console=console, prepared=prepared),
        prepared=origin.is_prepared or None,
    )
    signals.check()
    training = origin.values.get("training")
    if isinstance(training, dict) and training.get("compile"):
        _keep_compiled_code()
    with signals.ending_at_once():
        from charlm.cli.fit import begin, resume  # noqa: PLC0415 - torch takes seconds

    if RunDirectory.abandoned(out) is not None:
        console.complain(
            f"note: the run in {quoted(args.out)} ended before its first checkpoint, and is started again"
        )
        args.files, args.device = sources, args.device or origin.device
        args.baseline = origin.values.get("baseline") is not None
        args.aside, args.aside_chars = origin.aside, origin.aside_chars
        args.epochs = None if end else as_float(origin.values.get("epochs"))
        path = _path_of(origin.parent)
        args.log_to = origin.log_to if args.log_to is None else args.log_to
        return begin(
            args,
            call,
            origin.settings(end),
            encoded,
            reading=reading,
            val_fraction=origin.val_fraction,
            train_share=origin.train_share(encoded.n_ids),
            kept=True,
            parent=None if path is None else _parent(path, origin, signals),
        )
    return resume(args, call, origin, encoded, sources=sources, end=end)


def _check_place(out: Path) -> None:
    """Raise early if a directory cannot be written, or if a process trains there."""
    check_output(out, directory=True)
    RunDirectory.refuse_if_training(out)


def _refuse_other_settings(args: argparse.Namespace, flags: dict[str, object]) -> None:
    """Raise if an option of --resume auto differs from the run: the same command must be able to begin it."""
    refused = ["--overwrite"] if args.overwrite else []
    refused += ["--repeat"] if args.repeat is not None else []
    origin = read_record(Path(args.out))
    settings = gather(args.preset, file=args.config, environment=os.environ, flags=flags)
    given = {**settings.model, **settings.training.to_dict()}
    run_values: dict[str, Any] = {
        name: value
        for table in ("model", "training")
        for name, value in cast("dict[str, object]", origin.values[table]).items()
    }
    estimated = {"max_steps"} if settings.training.minutes is not None else set()
    refused += [
        f"{flag_of(name)} {given[name]} (it has {run_values[name]})"
        for name in sorted(settings.given - estimated)
        if name in run_values and run_values[name] != given[name]
    ]
    if args.parent is not None and str(Path(args.parent).absolute()) != _path_of(origin.parent):
        refused += [f"--from {args.parent} (it has {_path_of(origin.parent)})"]
    weights = _weights(args.weight, args.files, refused)
    refused += ["--by-file (it joins them)"] if args.by_file and not origin.reading().apart else []
    asked = {"preset": args.preset, "tokenizer": args.tokenizer, "val_fraction": args.val_fraction}
    asked |= {"separator": args.separator, "weight": weights, "on_unknown": args.on_unknown}
    asked |= {"epochs": args.epochs}
    kept = {**origin.values, "weight": origin.values.get("weights")}
    refused += [
        f"{flag_of(name)} {value} (it has {kept.get(name)})"
        for name, value in asked.items()
        if value is not None and value != kept.get(name)
    ]
    if refused:
        raise UsageError(
            f"--resume auto goes on with the run in {quoted(args.out)}, which keeps its settings; so these "
            f"cannot be given: {', '.join(refused)}. To move its end: --resume --max-steps N"
        )


def _keep_compiled_code() -> None:
    """Let torch store compiled code in the cache folder instead of /tmp."""
    try:
        folder = cache_folder()
    except CorpusError:  # no home directory: torch uses /tmp
        return
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(folder.absolute() / "compiled"))


def _refuse_beside(
    option: str, args: argparse.Namespace, flags: dict[str, object], *, kept: Sequence[str]
) -> None:
    """Raise if an option would change a run that is resumed or repeated."""
    others = {
        "--overwrite": args.overwrite and args.resume,
        "--repeat": args.repeat is not None and args.resume,
        "--from": args.parent is not None,
        "--on-unknown": args.on_unknown is not None,
        "--by-file": args.by_file,
        "--separator": args.separator is not None,
        "--weight": args.weight,
        "--no-baseline": args.resume and not args.baseline,
        "--no-mixture": not args.mixture,
    }
    refused = [flag_of(name) for name in _KEPT if getattr(args, name) is not None]
    refused += [flag for flag, is_given in others.items() if is_given]
    refused += [flag_of(name) for name in flags if name not in kept]
    if refused:
        kind, can = "resumed", "only --max-steps, --minutes, --device and --log-to can"
        if not args.resume:
            kind, can = "repeated", "only --device, --log-to, --overwrite and --no-baseline can"
        raise UsageError(
            f"a {kind} run keeps its settings, so {', '.join(refused)} cannot be given with {option}; {can}. "
            "A new run can begin with its model: charlm train FILE -o NEW --from "
            + as_word(args.out if args.resume else args.repeat)
        )


def _found_again(origin: Origin, args: argparse.Namespace) -> list[str]:
    """Return the sources of the run's text, if they still exist."""
    if not origin.sources:
        raise UsageError(
            "the run was begun in Python, without the path of its text. Give it: "
            f"charlm train FILE --resume -o {as_word(args.out)}"
        )
    lost = origin.lost_sources()
    if not lost:
        return list(origin.sources)
    came = " and ".join(
        "standard input" if source == "-" else f"{quoted(source)}, which is not there now" for source in lost
    )
    files = ["FILE" if source in lost else source for source in origin.sources]
    how = "--resume" if args.resume else f"--repeat {as_word(args.repeat)}"
    given = {"max_steps": getattr(args, "max_steps", None), "device": args.device, "encoding": args.encoding}
    words = [f"{flag_of(name)}={shell_word(value)}" for name, value in given.items() if value is not None]
    words += ["--overwrite"] if args.overwrite else []
    words += [] if args.baseline else ["--no-baseline"]
    command = " ".join(["charlm train", *map(as_word, files), how, "-o", as_word(args.out), *words])
    raise UsageError(f"the run's text came from {came}; give it again: {command}")


def _mention_ignored_variables(console: Console, kind: str) -> None:
    ignored = [variable_of(name) for name in FIELDS if variable_of(name) in os.environ]
    if ignored:
        console.complain(f"warning: a {kind} run keeps its settings; ignored: {', '.join(ignored)}")


def _mention_unknown_variables(console: Console) -> None:
    """Warn about variables that look like a misspelt setting."""
    variables = {variable_of(name) for name in FIELDS} | _OTHER_VARIABLES
    for variable in os.environ:
        if variable.startswith("CHARLM_") and variable not in variables:
            meant = nearest_name(variable.removeprefix("CHARLM_").lower())
            if meant is not None:
                console.complain(f"warning: {variable} is ignored; did you mean {variable_of(meant)}?")


_OTHER_VARIABLES = {"CHARLM_CACHE_DIR", "CHARLM_DATA_DIR", "CHARLM_DEBUG", "CHARLM_NATIVE"}
