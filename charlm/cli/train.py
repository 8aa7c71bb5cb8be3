"""`charlm train`: what is to be trained, on which text, and where it goes.

All mistakes that can be seen without torch are reported here, before torch is loaded; the training itself is
`charlm.cli.fit`.
"""

from __future__ import annotations

import argparse
import os
import shlex
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from charlm.backends.host import is_under_torchrun
from charlm.cli.encoded import Encoded, encode_corpus
from charlm.cli.fields import flag_of
from charlm.cli.output import Console, UsageError, as_word, check_output, refuse
from charlm.cli.rundir import Origin, check_free, check_sources, read_record
from charlm.cli.settings import FIELDS, from_flags, gather, nearest_name, variable_of
from charlm.cli.signals import Signals
from charlm.errors import CheckpointError, ConfigError, CorpusError, quoted
from charlm.files.folders import cache_folder
from charlm.runs.directory import RECORD_FILE, RunDirectory

if TYPE_CHECKING:
    from charlm.backends.world import World

__all__ = ["run"]

_KEPT = ("preset", "config", "tokenizer", "val_fraction", "epochs")
_LENGTHS = {"max_steps", "minutes"}
_VAL_FRACTION = 0.1


def run(args: argparse.Namespace, console: Console, signals: Signals, began: float) -> int:
    """Train, or go on with a training; `began` is `time.perf_counter()` at the start of the command."""
    if not is_under_torchrun():
        return _run(args, console, signals, began, None)
    with signals.ending_at_once():
        from charlm.cli.together import together  # noqa: PLC0415 - it needs torch

    with together(args.device, console, signals) as world:
        return _run(args, console, signals, began, world)


def _run(
    args: argparse.Namespace, console: Console, signals: Signals, began: float, world: World | None
) -> int:
    flags = {name: vars(args)[name] for name in FIELDS if name in vars(args)}
    out = Path(args.out)
    is_first = world is None or world.is_first
    if args.resume == "auto":
        has_begun = not RunDirectory.is_free(out)
        args.resume = has_begun if world is None else world.tell(lambda: has_begun)
        if args.resume:
            _refuse_other_settings(args, flags)
            return _resume(args, None, console, signals, began, world=world)
    if args.resume:
        _refuse_beside("--resume", args, flags, kept=("max_steps",))
        max_steps = cast("int | None", from_flags(flags).get("max_steps"))
        return _resume(args, max_steps, console, signals, began, world=world)
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
        _mention_ignored_variables(console, "repeated")
    problems = []
    if not args.files:
        problems += ["FILE is needed: the path of a text, - for standard input, or python-docs"]
    if world is not None and "-" in args.files:
        problems += ["FILE must be a path for several processes: only one of them could read standard input"]
    val_fraction = _VAL_FRACTION if args.val_fraction is None else args.val_fraction
    if not 0 <= val_fraction < 1:
        problems += [f"--val-fraction must be at least 0 and below 1, got {val_fraction:g}"]
    try:
        if repeated is None:
            settings = gather(args.preset, file=args.config, environment=os.environ, flags=flags)
        else:
            settings = repeated.settings()
    except (ConfigError, UsageError) as error:
        if not problems:
            raise
        problems += [str(error)]
    if args.epochs is not None and not problems:
        beside = sorted(settings.given & _LENGTHS)
        problems += [f"--epochs is the length of the training, and so is {name}" for name in beside]
    refuse(problems)
    _mention_unknown_variables(console)
    check_sources(args.files)
    if is_first:
        check_free(out, overwrite=args.overwrite)
        _check_place(out)
    encoded = _encoded(
        world,
        lambda prepared: encode_corpus(
            args.files,
            args.encoding or "utf-8",
            args.tokenizer or "char",
            val_fraction,
            console=console,
            prepared=prepared,
        ),
        prepared=None if repeated is None else repeated.is_prepared or None,
    )
    if args.tokenizer not in {None, encoded.kind}:
        raise UsageError(f"--tokenizer must be {encoded.kind}, as the prepared corpus has it")
    signals.check()
    train_share = 1 - val_fraction if repeated is None else repeated.train_share(encoded.n_ids)
    if encoded.is_prepared and args.val_fraction is None:
        val_fraction, train_share = encoded.recorded_split
    if settings.training.compile:
        _keep_compiled_code()
    with signals.ending_at_once():
        from charlm.cli.fit import begin  # noqa: PLC0415 - torch takes seconds, and only now is needed

    return begin(
        args,
        settings,
        encoded,
        val_fraction=val_fraction,
        train_share=train_share,
        console=console,
        signals=signals,
        began=began,
        kept=repeated is not None,
    )


def _encoded(
    world: World | None, encode: Callable[[bool | None], Encoded], *, prepared: bool | None
) -> Encoded:
    """Return the ids; of several processes the first prepares a large text, and the others open it then."""
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
    args: argparse.Namespace,
    max_steps: int | None,
    console: Console,
    signals: Signals,
    began: float,
    *,
    world: World | None,
) -> int:
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
    encoded = _encoded(
        world,
        lambda prepared: encode_corpus(
            sources,
            args.encoding or origin.encoding,
            origin.tokenizer,
            origin.val_fraction,
            console=console,
            prepared=prepared,
        ),
        prepared=origin.is_prepared or None,
    )
    signals.check()
    training = origin.values.get("training")
    if isinstance(training, dict) and training.get("compile"):
        _keep_compiled_code()
    with signals.ending_at_once():
        from charlm.cli.fit import begin, resume  # noqa: PLC0415 - torch takes seconds, and only now is needed

    if RunDirectory.abandoned(out) is not None:
        console.complain(
            f"note: the run in {quoted(args.out)} ended before its first checkpoint, and begins anew"
        )
        args.files, args.device = sources, args.device or origin.device
        args.baseline = origin.values.get("baseline") is not None
        args.aside, args.aside_chars = origin.aside, origin.aside_chars
        args.log_to = origin.log_to if args.log_to is None else args.log_to
        return begin(
            args,
            origin.settings(max_steps),
            encoded,
            val_fraction=origin.val_fraction,
            train_share=origin.train_share(encoded.n_ids),
            console=console,
            signals=signals,
            began=began,
            kept=True,
        )
    return resume(
        args,
        origin,
        encoded,
        sources=sources,
        max_steps=max_steps,
        console=console,
        signals=signals,
        began=began,
    )


def _check_place(out: Path) -> None:
    """Refuse a place that cannot be written, or where a training goes on: found late otherwise."""
    check_output(out, directory=True)
    RunDirectory.refuse_if_training(out)


def _refuse_other_settings(args: argparse.Namespace, flags: dict[str, object]) -> None:
    """Refuse what differs from the run that --resume auto goes on with: the same words are to begin it."""
    refused = ["--overwrite"] if args.overwrite else []
    refused += ["--repeat"] if args.repeat is not None else []
    origin = read_record(Path(args.out))
    settings = gather(args.preset, file=args.config, environment=os.environ, flags=flags)
    given = {**settings.model, **settings.training.to_dict()}
    known: dict[str, Any] = {
        name: value
        for table in ("model", "training")
        for name, value in cast("dict[str, object]", origin.values[table]).items()
    }
    estimated = {"max_steps"} if settings.training.minutes is not None else set()
    refused += [
        f"{flag_of(name)} {given[name]} (it has {known[name]})"
        for name in sorted(settings.given - estimated)
        if name in known and known[name] != given[name]
    ]
    asked = {"preset": args.preset, "tokenizer": args.tokenizer, "val_fraction": args.val_fraction}
    refused += [
        f"{flag_of(name)} {value} (it has {origin.values.get(name)})"
        for name, value in asked.items()
        if value is not None and value != origin.values.get(name)
    ]
    if refused:
        raise UsageError(
            f"--resume auto goes on with the run in {quoted(args.out)}, which keeps its settings; so these "
            f"cannot be given: {', '.join(refused)}. To move its end: --resume --max-steps N"
        )


def _keep_compiled_code() -> None:
    """Let torch keep what it compiles beside the other downloads and caches: its own place is in /tmp."""
    try:
        folder = cache_folder()
    except CorpusError:  # no home: then torch's own place
        return
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(folder.absolute() / "compiled"))


def _refuse_beside(
    option: str, args: argparse.Namespace, flags: dict[str, object], *, kept: Sequence[str]
) -> None:
    """Refuse what would change a run that goes on, or is repeated."""
    refused = [flag_of(name) for name in _KEPT if getattr(args, name) is not None]
    refused += ["--overwrite"] if args.overwrite and args.resume else []
    refused += ["--repeat"] if args.repeat is not None and args.resume else []
    refused += [] if args.baseline or not args.resume else ["--no-baseline"]
    refused += [] if args.mixture else ["--no-mixture"]
    refused += [flag_of(name) for name in flags if name not in kept]
    if refused:
        kind, can = "resumed", "only --max-steps, --device and --log-to can"
        if not args.resume:
            kind, can = "repeated", "only --device, --log-to, --overwrite and --no-baseline can"
        raise UsageError(
            f"a {kind} run keeps its settings, so {', '.join(refused)} cannot be given with {option}; {can}"
        )


def _found_again(origin: Origin, args: argparse.Namespace) -> list[str]:
    """Return where the run's text came from, if it is there still."""
    if not origin.sources:
        raise UsageError(
            "the run was begun in Python, which has not said where its text lies; give it: "
            f"charlm train FILE --resume -o {as_word(args.out)}"
        )
    lost = [s for s in origin.sources if s == "-" or (Path(s).is_absolute() and not Path(s).exists())]
    if not lost:
        return list(origin.sources)
    came = " and ".join(
        "standard input" if source == "-" else f"{quoted(source)}, which is not there now" for source in lost
    )
    files = ["FILE" if source in lost else source for source in origin.sources]
    how = "--resume" if args.resume else f"--repeat {as_word(args.repeat)}"
    given = {"max_steps": getattr(args, "max_steps", None), "device": args.device, "encoding": args.encoding}
    words = [f"{flag_of(name)}={shlex.quote(value)}" for name, value in given.items() if value is not None]
    words += ["--overwrite"] if args.overwrite else []
    words += [] if args.baseline else ["--no-baseline"]
    command = " ".join(["charlm train", *map(as_word, files), how, "-o", as_word(args.out), *words])
    raise UsageError(f"the run's text came from {came}; give it again: {command}")


def _mention_ignored_variables(console: Console, kind: str) -> None:
    ignored = [variable_of(name) for name in FIELDS if variable_of(name) in os.environ]
    if ignored:
        console.complain(f"warning: a {kind} run keeps its settings; ignored: {', '.join(ignored)}")


def _mention_unknown_variables(console: Console) -> None:
    """Warn of variables that look like a misspelt setting."""
    known = {variable_of(name) for name in FIELDS} | _OTHER_VARIABLES
    for variable in os.environ:
        if variable.startswith("CHARLM_") and variable not in known:
            meant = nearest_name(variable.removeprefix("CHARLM_").lower())
            if meant is not None:
                console.complain(f"warning: {variable} is ignored; did you mean {variable_of(meant)}?")


_OTHER_VARIABLES = {"CHARLM_CACHE_DIR", "CHARLM_DATA_DIR", "CHARLM_DEBUG", "CHARLM_NATIVE"}
