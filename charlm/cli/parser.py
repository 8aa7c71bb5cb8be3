"""The parser of the command line: the subcommands, their options, and the messages for mistakes.

The options of a model, of training and of sampling are made from the settings classes: one for each field,
with the field's docstring as its help. torch is not imported, so `--help` is fast.
"""

from __future__ import annotations

import argparse
import os
import sys
import textwrap
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import Any, NamedTuple, NoReturn, get_args

from typing_extensions import override

from charlm import __version__
from charlm.cli.fields import Field, flag_of, sampling_fields
from charlm.cli.output import UsageError, as_word, refuse, shell_word
from charlm.cli.settings import DEFAULT_PRESET, FIELDS, nearest_name, preset_values
from charlm.errors import nearest, quoted
from charlm.models.config import PresetName
from charlm.runs.directory import SERVICE_FOLDERS

__all__ = ["COMMANDS", "parse", "text_argument"]

_PRESET_NAMES: tuple[PresetName, ...] = get_args(PresetName)

# Names of --from in other programs.
_FROM_ELSEWHERE = {"--init-from", "--init_from", "--finetune", "--fine-tune", "--pretrained", "--checkpoint"}
_LONGEST = 40  # characters of a value in a message

_EXAMPLES = """\
examples:
  charlm inspect my.txt
  charlm train my.txt -o runs/one --minutes 1
  charlm train tinyshakespeare -o runs/two --preset lecture --max-steps 500
  charlm generate runs/one -p "To be" -n 300
  charlm eval runs/one other.txt --html other.html
  charlm plot runs/one -o one.png
  charlm info runs/one
"""


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Return the options of a command line; `command` is the name of the subcommand.

    Raises:
        UsageError: the command line is wrong.
        SystemExit: after help or version was written.
    """
    early = _Parser(add_help=False)
    early.add_argument("--preset", choices=_PRESET_NAMES, default=DEFAULT_PRESET)
    preset: PresetName = DEFAULT_PRESET
    if "--help" in argv or "-h" in argv:  # the help of `train` shows the values of the preset
        preset = early.parse_known_args(argv)[0].preset
    parser, commands = _parsers(preset, argv)
    argv = _with_plain_resume(argv) if "train" in argv else argv
    try:
        args, extra = parser.parse_known_args(argv)
    except UsageError as error:
        raise UsageError(_with_way_out(str(error), argv)) from None
    for name in ("quiet", "verbose", "debug"):  # before the command or after it
        setattr(args, name, getattr(args, name, False))
    if args.command is None:
        raise UsageError(f"a command is needed: {', '.join(COMMANDS[:-1])} or {COMMANDS[-1]}")
    end = extra.index("--") if "--" in extra else len(extra)
    options = [word for word in extra[:end] if word.startswith("-") and word != "-"]
    refuse([_unknown_option(word, commands[args.command]) for word in options])
    del extra[end : end + 1]
    # argparse takes positional words before the first option or after the last, not both.
    if args.command in {"train", "prepare", "compress", "decompress"}:
        args.files += extra
    elif args.command == "plot":
        args.runs += extra
    elif args.command == "import":
        args.paths += extra
    elif args.command == "generate" and len(extra) == 1 and args.stdin is None:
        args.stdin = extra[0]
    elif extra:
        raise UsageError(f"unexpected argument '{extra[0]}'")
    return args


def _with_plain_resume(argv: Sequence[str]) -> list[str]:
    """Make "auto" the only value of --resume, since the word after it may be a FILE."""
    words = list(argv)
    for i, word in enumerate(words):
        if word == "--resume" and words[i + 1 : i + 2] == ["auto"]:
            words[i : i + 2] = ["--resume=auto"]
        elif word == "--resume":
            words[i] = "--resume="
    return words


def _separator(word: str) -> str:
    text = text_argument(word).replace(r"\n", "\n").replace(r"\t", "\t")
    if not text:
        raise argparse.ArgumentTypeError("must not be empty")
    return text


def _resume_word(word: str) -> str | bool:
    if word not in {"", "auto"}:
        raise argparse.ArgumentTypeError(f"must be auto or nothing, got {quoted(word, _LONGEST)}")
    return word or True


def _loggers(word: str) -> tuple[str, ...]:
    names = () if word == "none" else tuple(dict.fromkeys(word.split(",")))
    if unknown := [name for name in names if name not in SERVICE_FOLDERS]:
        raise argparse.ArgumentTypeError(
            f"must be of {', '.join(SERVICE_FOLDERS)}, got {quoted(unknown[0], _LONGEST)}"
        )
    return names


def text_argument(argument: str) -> str:
    """Return a word of the command line decoded as UTF-8, even if the locale is ASCII."""
    if sys.getfilesystemencoding() == "utf-8":
        return argument
    return os.fsencode(argument).decode("utf-8", errors="surrogateescape")


class _Formatter(argparse.HelpFormatter):
    """Options in one column: "-n, --long N", "--[no-]flag"; words with hyphens stay whole."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=28)

    @override
    def _format_action_invocation(self, action: argparse.Action) -> str:
        if isinstance(action, argparse.BooleanOptionalAction):
            return "--[no-]" + action.option_strings[0].removeprefix("--")
        if not action.option_strings or action.nargs == 0:
            return super()._format_action_invocation(action)
        names = ", ".join(action.option_strings)
        return f"{names} {self._format_args(action, self._get_default_metavar_for_optional(action))}"

    @override
    def _split_lines(self, text: str, width: int) -> list[str]:
        return textwrap.wrap(text, width, break_on_hyphens=False)

    @override
    def _fill_text(self, text: str, width: int, indent: str) -> str:
        if text == _EXAMPLES:
            return text
        words = " ".join(text.split())
        return textwrap.fill(
            words, width, initial_indent=indent, subsequent_indent=indent, break_on_hyphens=False
        )


class _Parser(argparse.ArgumentParser):
    """A parser that raises instead of ending the process."""

    def __init__(self, **given: object) -> None:
        defaults = {"formatter_class": _Formatter, "allow_abbrev": False}
        super().__init__(**{**defaults, **given})  # type: ignore[arg-type]  # argparse checks them

    @override
    def error(self, message: str) -> NoReturn:
        raise UsageError(message)

    @override
    def _get_values(self, action: argparse.Action, arg_strings: list[str]) -> Any:
        if arg_strings != ["--"] or not action.option_strings:
            return super()._get_values(action, arg_strings)
        value = self._get_value(action, "--")  # some versions lose that of --prompt=--
        self._check_value(action, value)
        return value


def _parsers(preset: PresetName, argv: Sequence[str]) -> tuple[_Parser, dict[str, argparse.ArgumentParser]]:
    """Return the parser of the command and those of the subcommands. The help shows the values of the preset.

    Only subcommands that occur among the words get their options: declaring all takes a tenth of the time of
    `charlm --help`.
    """
    common = _Parser(add_help=False)
    group = common.add_argument_group("messages")
    _add_switch(group, "-q --quiet", "only errors and warnings", default=argparse.SUPPRESS)
    _add_switch(group, "-v --verbose", "more details", default=argparse.SUPPRESS)
    text = "show where an error arose; CHARLM_DEBUG=1 does too"
    _add_switch(group, "--debug", text, default=argparse.SUPPRESS)
    parser = _Parser(
        prog="charlm",
        description="Character-level language models: from raw text to a trained model, to text again.",
        epilog=_EXAMPLES,
        parents=[common],
    )
    parser.add_argument("--version", action="version", version=f"charlm {__version__}")
    commands = parser.add_subparsers(
        dest="command", metavar="COMMAND", title="commands", parser_class=_Parser
    )
    for name, command in _COMMANDS.items():
        own = commands.add_parser(
            name,
            parents=[common],
            help=command.summary,
            usage=f"charlm {name} {command.usage} [options]",
            description=command.description,
        )
        if name in argv:
            command.declare(own, preset)
    return parser, dict(commands.choices)


def _with_way_out(message: str, argv: Sequence[str]) -> str:
    """Return the message of argparse, with advice for a value or path that begins with a hyphen."""
    names = message.removeprefix("argument ").removesuffix(": expected one argument").split("/")
    for option, value in pairwise(argv):
        if option in names and value.startswith("-"):
            shown = value if len(value) <= _LONGEST else f"{value[: _LONGEST - 1]}…"
            return f"{message}; a value that begins with a hyphen is given as {names[-1]}={shell_word(shown)}"
    if " required: " in message:
        message += next(filter(None, map(_if_a_path, argv)), "")
    return message


def _if_a_path(word: str) -> str:
    """Return advice for a path that was taken for an option, or "" if there is no such path."""
    is_path = word.startswith("-") and word != "-" and os.path.lexists(word)
    return f"; write the path {quoted(word)} as {as_word(word)}" if is_path else ""


def _unknown_option(word: str, parser: argparse.ArgumentParser) -> str:
    name = word.partition("=")[0]
    options = [option for action in parser._actions for option in action.option_strings]
    meant = nearest_name(name.lstrip("-").replace("-", "_"))
    if name in _FROM_ELSEWHERE and "--from" in options:
        return f"unknown option '{name}'; to begin with the model of a run: --from RUN"
    near = flag_of(meant) if meant and flag_of(meant) in options else nearest(name, options, cutoff=0.75)
    hint = f"did you mean {near}?" if near else f"`{parser.prog} --help` lists all"
    return f"unknown option '{name}'{_if_a_path(word) or f'; {hint}'}"


def _add(to: argparse._ActionsContainer, names: str, text: str, **options: Any) -> None:
    """Declare an argument by its names ("-n --long"), its help, and other options of argparse."""
    to.add_argument(*names.split(), help=text.replace("%", "%%"), **options)


def _add_switch(to: argparse._ActionsContainer, names: str, text: str, **options: Any) -> None:
    _add(to, names, text, action="store_true", **options)


# Arguments of several commands


def _add_run(to: argparse._ActionsContainer) -> None:
    _add(to, "run", "a run, one of its checkpoints, or a saved model", metavar="RUN")


def _add_no_mixture(to: argparse._ActionsContainer) -> None:
    text = "use only the trained GPT of a run, not its mixture with the n-gram model"
    _add(to, "--no-mixture", text, dest="mixture", action="store_false")


def _add_files(to: argparse._ActionsContainer, nargs: str, encoding: str | None = "utf-8") -> None:
    named = "'python-docs' or 'tinyshakespeare' are texts with a name"
    _add(
        to,
        "files",
        f"texts, which are joined, or a folder of `prepare`; - is standard input; {named}",
        nargs=nargs,
        metavar="FILE",
    )
    _add_encoding(to, "the texts", encoding)


def _add_encoding(to: argparse._ActionsContainer, what: str, default: str | None) -> None:
    text = f"of {what}, a name such as latin-1 or utf-16 (default: utf-8)"
    _add(to, "--encoding", text, default=default, metavar="E")


def _add_json(to: argparse._ActionsContainer, holding: str = "") -> None:
    _add_switch(to, "--json", f"write one JSON object{holding}")


def _add_device(to: argparse._ActionsContainer, default: str | None = "auto") -> None:
    text = "auto, cpu, cuda, cuda:N, mps, or one of a plug-in (default: auto)"
    _add(to, "--device", text, default=default, metavar="D")


def _add_weights(to: argparse._ActionsContainer) -> None:
    text = "round the matrices of a GPT to 16 or 8 bits for each weight (default: as saved)"
    _add(to, "--weights", text, choices=("float32", "bfloat16", "int8"))


def _add_val_fraction(to: argparse._ActionsContainer, default: float | None) -> None:
    text = "part of the text, at its end, for validation; 0: none (default: 0.1)"
    _add(to, "--val-fraction", text, type=float, default=default, metavar="X")


def _add_on_unknown(to: argparse._ActionsContainer, begin: str = "") -> None:
    text = f"{begin}leave out unknown characters, or replace them by the vocabulary's character for these"
    _add(to, "--on-unknown", text, choices=("skip", "replace"))


# The commands


def _declare_inspect(parser: argparse.ArgumentParser, preset: PresetName) -> None:
    _add_files(parser, "+")
    _add_json(parser)
    text = "length of the training for the estimate (default: 1)"
    _add(parser, "--minutes", text, type=float, default=1.0, metavar="M")
    _add_val_fraction(parser, 0.1)


def _declare_prepare(parser: argparse.ArgumentParser, preset: PresetName) -> None:
    text = "texts, which are joined: files, folders, patterns; or token files of nanoGPT or llm.c"
    _add(parser, "files", text, nargs="+", metavar="FILE")
    _add_encoding(parser, "the texts", "utf-8")
    _add(parser, "-o --out", "the folder to write, missing or empty", required=True, metavar="DATA")
    text = "one id per character of the text, or per byte of its UTF-8 (default: char)"
    _add(parser, "--tokenizer", text, choices=("char", "byte"), default="char")
    _add_val_fraction(parser, 0.1)


def _declare_train(parser: argparse.ArgumentParser, preset: PresetName) -> None:
    _add_files(parser, "*", None)
    _add(parser, "-o --out", "directory of the run, missing or empty", required=True, metavar="RUN")
    text = f"settings of model and training (default: by time, text and device; often {DEFAULT_PRESET})"
    _add(parser, "--preset", text, choices=_PRESET_NAMES)
    _add_setting(parser, FIELDS["minutes"], None)
    text = "number of passes over the training text, in place of --max-steps"
    _add(parser, "--epochs", text, type=float, metavar="X")
    text = (
        "begin with the model in OLD (a run, a checkpoint or a saved model): unknown characters are added, "
        "and the learning rate is a tenth of the preset's"
    )
    _add(parser, "--from", text, dest="parent", metavar="OLD")
    _add_on_unknown(parser, "with --from, keep the model's vocabulary: ")
    text = (
        "continue the run in RUN; FILE may be omitted; --max-steps moves the end. auto: begin the run if "
        "there is none, so give all options of a new run, too"
    )
    _add(parser, "--resume", text, nargs="?", metavar="auto", type=_resume_word, const=True, default=False)
    text = "repeat the finished run in OLD bit for bit, decisions by the clock included; FILE may be omitted"
    _add(parser, "--repeat", text, metavar="OLD")
    _add_switch(parser, "--overwrite", "delete the run in RUN first")
    text = "settings by field name (learning_rate = 0.001), flat or in the tables [model] and [training]"
    _add(parser, "--config", text, metavar="FILE.toml")
    text = "one id per character of the text, or per byte of its UTF-8 (default: char)"
    _add(parser, "--tokenizer", text, choices=("char", "byte"))
    _add_val_fraction(parser, None)
    text = "each FILE is a document: no block spans two of them, and each has its own part for validation"
    _add_switch(parser, "--by-file", text)
    text = r"this string in a FILE ends a document; \n and \t are a line feed and a tab"
    _add(parser, "--separator", text, type=_separator, metavar="STR")
    text = "train on this FILE W times as often; may be repeated; implies --by-file"
    _add(parser, "--weight", text, action="append", default=[], metavar="FILE=W")
    _add_device(parser, None)
    text = (
        "also log to tensorboard, wandb or both (tensorboard,wandb) (default: none, or as before for a run "
        "that is resumed)"
    )
    _add(parser, "--log-to", text, type=_loggers, metavar="NAMES")
    text = "do not count an n-gram model of the text, with which the losses are compared"
    _add(parser, "--no-baseline", text, dest="baseline", action="store_false")
    text = "do not mix the GPT with the n-gram model: the GPT is the result, and learns from the whole text"
    _add(parser, "--no-mixture", text, dest="mixture", action="store_false")
    # An option for each field of a model and a training; the help shows the values of the preset.
    values = preset_values(preset)
    text = f"Defaults are those of the preset {preset}; --preset P --help shows those of another."
    for table in ("model", "training"):
        group = parser.add_argument_group(table, text)
        for field in FIELDS.values():
            if field.table == table and field.name != "minutes":
                _add_setting(group, field, values[field.name])


def _add_setting(to: argparse._ActionsContainer, field: Field, default: object) -> None:
    """Declare the option of a field: `charlm.cli.settings` reads what is given, the default is only shown."""
    flag, text = flag_of(field.name), _help_of(field, default)
    if field.kind is bool:
        _add(to, flag, text, action=argparse.BooleanOptionalAction, default=argparse.SUPPRESS)
        return
    metavar: str | tuple[str, ...] = {int: "N", float: "X"}.get(field.kind, "")
    if field.choices:
        metavar = "{" + ",".join(field.choices) + "}"
    elif field.kind is tuple:
        metavar = ("X", "X")
    nargs = 2 if field.kind is tuple else None
    _add(to, flag, text, nargs=nargs, metavar=metavar, default=argparse.SUPPRESS)


def _help_of(field: Field, default: object) -> str:
    shown = str(default)
    if default is None or isinstance(default, bool):
        shown = {None: "none", True: "yes", False: "no"}[default]
    elif isinstance(default, tuple | list):
        shown = " ".join(f"{part:g}" for part in default)
    elif isinstance(default, float):
        shown = f"{default:g}"
    return f"{field.doc} (default: {shown})"


# Short form, metavar, and the command's default, which is the field's own but for temperature and overflow.
_SAMPLING: Mapping[str, tuple[Sequence[str], str | None, object]] = {
    "temperature": (("-t",), "X", 0.8),
    "top_k": ((), "K", None),
    "top_p": ((), "P", None),
    "min_p": ((), "P", None),
    "repetition_penalty": ((), "X", 1.0),
    "seed": ((), "S", None),
    "overflow": ((), None, "restart"),
}


def _declare_generate(parser: argparse.ArgumentParser, preset: PresetName) -> None:
    _add_run(parser)
    _add(parser, "stdin", "read the prompt from standard input", nargs="?", metavar="-")
    text = (
        "the text to continue, -p=TEXT if it begins with a hyphen (default: empty, which begins at a new "
        "line)"
    )
    _add(parser, "-p --prompt", text, type=text_argument, metavar="TEXT")
    _add(parser, "--prompt-file", "a file with that text", metavar="F")
    _add_encoding(parser, "these files", "utf-8")
    _add_on_unknown(parser)
    text = (
        "write by turns with the model: it shows what may come next, and goes on by itself where you let it; "
        "/help says how"
    )
    _add_switch(parser, "-i --interactive", text)
    text = "the most characters to add (bytes, with a byte tokenizer) (default: 500, with -i 100 at a time)"
    _add(parser, "-n --max-new-tokens", text, type=int, metavar="N")
    text = "how many texts, with a line of dashes between them (default: 1)"
    _add(parser, "--num-samples", text, type=int, default=1, metavar="N")
    text = "end before this string, --stop=STR if it begins with a hyphen; may be repeated"
    _add(parser, "--stop", text, action="append", type=text_argument, default=[], metavar="STR")
    _add_switch(parser, "--keep-stop", "end with that string instead")
    text = "the added text matches this regular expression of Python; not with --choice or --stop"
    _add(parser, "--regex", text, type=text_argument, metavar="RE")
    text = "the added text is one of the --choice texts; may be repeated"
    _add(parser, "--choice", text, action="append", type=text_argument, metavar="STR")
    text = "write the lines of F as continuations of the prompt, each with its log-probability in nats, the "
    _add(parser, "--rank", f"{text}likeliest first, instead of a text", metavar="F")
    text = "show how much of the text FILE contains in runs of 50 characters or more; FILE: the training text"
    _add(parser, "--verbatim", text, metavar="FILE")
    _add_json(parser, ": prompt, samples (each with its prompt), seed, settings")
    _add_no_mixture(parser)
    _add_device(parser)
    _add_weights(parser)
    group = _add_sampling(parser)
    text = (
        "let the run's n-gram baseline guess ahead: the same text, sooner if the model's weights exceed the "
        "processor's cache"
    )
    _add_switch(group, "--draft", text)


def _add_sampling(parser: argparse.ArgumentParser) -> argparse._ArgumentGroup:
    group = parser.add_argument_group("sampling")
    fields = sampling_fields()
    for name, (short, metavar, default) in _SAMPLING.items():
        field = fields[name]
        names = " ".join((*short, flag_of(name)))
        read, choices = _reader(field), field.choices or None
        text = _help_of(field, default)
        _add(group, names, text, type=read, choices=choices, default=default, metavar=metavar)
    text = "never write these characters, --ban=CHARS if they begin with a hyphen"
    _add(group, "--ban", text, type=text_argument, default="", metavar="CHARS")
    _add(group, "--allow", "write these characters alone", type=text_argument, metavar="CHARS")
    return group


def _reader(field: Field) -> Callable[[str], object]:
    """Return a function that converts a word to the field's type. argparse uses its name in messages."""

    def read(word: str) -> object:
        return None if field.optional and word.lower() == "none" else field.kind(word)

    read.__name__ = field.kind.__name__
    return read


def _declare_serve(parser: argparse.ArgumentParser, preset: PresetName) -> None:
    _add_run(parser)
    text = "where browsers find the page; 0: a free one (default: 0)"
    _add(parser, "--port", text, type=int, default=0, metavar="N")
    _add_no_mixture(parser)
    _add_device(parser)
    _add_weights(parser)
    _add_sampling(parser)


def _declare_eval(parser: argparse.ArgumentParser, preset: PresetName) -> None:
    _add_run(parser)
    _add_files(parser, "+")
    _add_on_unknown(parser)
    _add_json(parser)
    text = (
        "write the text first, each character coloured by its surprisal; without colours (NO_COLOR, no "
        "terminal) with its bits below it"
    )
    _add_switch(parser, "--show", text)
    text = "also write this as a page, with the likeliest candidates for each character"
    _add(parser, "--html", text, metavar="OUT.html")
    _add_no_mixture(parser)
    _add_device(parser)
    _add_weights(parser)


def _declare_plot(parser: argparse.ArgumentParser, preset: PresetName) -> None:
    text = (
        "a run, or several for one picture; with --attention or --bigram also a checkpoint or a saved model"
    )
    _add(parser, "runs", text, nargs="+", metavar="RUN")
    kind = parser.add_mutually_exclusive_group()
    text = "draw the attention of each layer and head of a GPT in this text"
    _add(kind, "--attention", text, type=text_argument, metavar="TEXT")
    _add_switch(kind, "--bigram", "draw the model's probability of each character after each other one")
    text = (
        "the picture, .png or .svg; an existing one is replaced (default: in the current directory, "
        "NAME.png, NAME-attention.png or NAME-bigram.png by the name of RUN, or runs.png for several runs)"
    )
    _add(parser, "-o --out", text, metavar="FILE")


def _declare_info(parser: argparse.ArgumentParser, preset: PresetName) -> None:
    _add_run(parser)
    _add_json(parser)
    _add_switch(parser, "--verify", "read and check every byte; the exit code is 1 if something is damaged")


def _declare_compress(parser: argparse.ArgumentParser, preset: PresetName) -> None:
    _declare_decompress(parser, preset)
    _add_switch(parser, "-d --decompress", "decompress, as charlm decompress does")


def _declare_decompress(parser: argparse.ArgumentParser, preset: PresetName) -> None:
    _add(parser, "files", "files; - is standard input, and then output", nargs="*", metavar="FILE")
    text = (
        "the model: a run, one of its checkpoints, or a saved model; or a text, from which an n-gram model "
        "is counted. Decompression needs the same model"
    )
    _add(parser, "-m --model", text, metavar="MODEL")
    _add_encoding(parser, "a text that is counted", "utf-8")
    _add_switch(parser, "-c --stdout", "write to standard output")
    _add_switch(parser, "-f --force", "overwrite files; write compressed bytes to a terminal")
    _add_switch(parser, "-k --keep", "keep the input (always done)")
    _add_switch(parser, "-l --list", "show the headers of compressed files; needs no model")
    text = "check compressed files and write nothing; without a model, only checksums are compared"
    _add_switch(parser, "-t --test", text)
    text = "write the whole blocks of a damaged file in order; the exit code is 1"
    _add_switch(parser, "--recover", text)


def _declare_export(parser: argparse.ArgumentParser, preset: PresetName) -> None:
    _add_run(parser)
    text = "format: transformers (safetensors and JSON), or onnx (needs the packages onnx and onnxscript)"
    _add(parser, "--to", text, choices=("transformers", "onnx"), required=True)
    _add(parser, "-o --out", "the folder to write, missing or empty", required=True, metavar="DIR")
    _add_switch(parser, "--overwrite", "replace an export of the same kind in DIR")


def _declare_import(parser: argparse.ArgumentParser, preset: PresetName) -> None:
    text = (
        "a folder of transformers; or the file (or folder) of nanoGPT's ckpt.pt or minGPT's model.pt, and "
        "after it the vocabulary: meta.pkl (or its folder), or the training texts"
    )
    _add(parser, "paths", text, nargs="+", metavar="PATH")
    _add(parser, "-o --out", "the folder to write, missing or empty", required=True, metavar="DIR")
    text = "number of heads of a minGPT, if there is no config.json beside it"
    _add(parser, "--n-head", text, type=int, metavar="N")
    _add_switch(parser, "--overwrite", "replace a saved model in DIR")


class _Command(NamedTuple):
    """A subcommand: its usage, a summary, a description, and the declaration of its arguments."""

    usage: str
    summary: str
    description: str
    declare: Callable[[argparse.ArgumentParser, PresetName], None]


_COMMANDS = {
    "inspect": _Command(
        "FILE...",
        "describe a text before training",
        "Describe a text before training: its characters, its line ends, how well the last one or two "
        "characters predict the next, whether validation repeats the training text, and the loss that a "
        "training may reach. Several files are joined; there is no --by-file here.",
        _declare_inspect,
    ),
    "prepare": _Command(
        "FILE... -o DATA",
        "prepare a large text on disk",
        "Write a text as files of ids, so that it need not fit into memory: `charlm train DATA` reads only "
        "the parts that a step needs. After an interruption, the same command continues.",
        _declare_prepare,
    ),
    "train": _Command(
        "FILE... -o RUN",
        "train a model on text",
        "Train a GPT on text. The settings are those of the preset, changed by the file, then by environment "
        "variables (CHARLM_LEARNING_RATE for --learning-rate), then by options. Ctrl-C saves and stops; "
        "--resume continues.",
        _declare_train,
    ),
    "generate": _Command(
        "RUN [-p TEXT | --prompt-file F | -] [-i]",
        "write text with a trained model",
        "Write text with the best checkpoint of a run, with one checkpoint, or with a saved model. The text "
        "goes to standard output.",
        _declare_generate,
    ),
    "serve": _Command(
        "RUN",
        "write by turns with a model, in a browser",
        "Show a page to browsers on this machine, under the address that is printed: a text that grows by "
        "turns, each character coloured by its surprisal, with the likeliest continuations. Ctrl-C ends it.",
        _declare_serve,
    ),
    "eval": _Command(
        "RUN FILE...",
        "measure how well a model predicts a text",
        "Score a text exactly: every character but the first is predicted once, and no random number is "
        "drawn. Several files are joined; there is no --by-file here.",
        _declare_eval,
    ),
    "plot": _Command(
        "RUN... [--attention TEXT | --bigram] [-o FILE]",
        "draw trainings or a model",
        "Draw the training of one or several runs: loss, learning rate and speed. Or draw a run's model at "
        "the best checkpoint: its probabilities of the next character, or its attention. Needs matplotlib.",
        _declare_plot,
    ),
    "info": _Command(
        "RUN",
        "describe a run or a model",
        "Describe the content of a directory: a run, a checkpoint or a saved model.",
        _declare_info,
    ),
    "export": _Command(
        "RUN --to FORMAT -o DIR",
        "write a GPT for transformers or ONNX",
        "Write the GPT of a run or a saved model and its vocabulary in a format of transformers, which needs "
        "no code of charlm to read it, or as an ONNX file. Only the GPT of a mixture is exported.",
        _declare_export,
    ),
    "import": _Command(
        "PATH... -o DIR",
        "read a model of transformers, nanoGPT or minGPT",
        "Convert a GPT of another library to a saved model, if its tokens are characters or bytes. No code "
        "in its files is executed.",
        _declare_import,
    ),
    "compress": _Command(
        "-m MODEL FILE...",
        "compress a text without loss",
        "Write FILE.clm for each FILE. The better the model predicts the text, the fewer bytes. "
        "Decompression needs the same model. The input stays, and no file is overwritten without -f.",
        _declare_compress,
    ),
    "decompress": _Command(
        "-m MODEL FILE.clm...",
        "decompress a text",
        "Write FILE for each FILE.clm, exactly as it was, or nothing. A model other than that of the "
        "compression is refused.",
        _declare_decompress,
    ),
}

COMMANDS = tuple(_COMMANDS)
"""The subcommands, each a module of this package with `run(args, console, signals, began)`. The module of
`import` has an underscore after its name."""
