"""What the command line understands: the subcommands, and how mistakes in it are answered.

The options of each are declared in `charlm.cli.options`. No torch here, so `--help` is quick.
"""

from __future__ import annotations

import argparse
import textwrap
from collections.abc import Sequence
from typing import NoReturn

from typing_extensions import override

from charlm import __version__
from charlm.cli import options
from charlm.cli.output import UsageError
from charlm.cli.settings import DEFAULT_PRESET, flag_of, nearest_name
from charlm.errors import nearest
from charlm.models.config import PresetName

__all__ = ["COMMANDS", "parse"]

COMMANDS = ("inspect", "train", "generate", "eval", "plot", "info")
"""The subcommands, each a module of this package with `run(args, console, signals, began)`."""


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
    """Return the options of a command line; `command` says which subcommand it is.

    Raises:
        UsageError: it is not understood.
        SystemExit: help or version was asked for, and is written.
    """
    early = _Parser(add_help=False)
    early.add_argument("--preset", choices=options.PRESET_NAMES, default=DEFAULT_PRESET)
    preset: PresetName = DEFAULT_PRESET
    if "--help" in argv or "-h" in argv:  # the help of `train` shows the values of the preset
        preset = early.parse_known_args(argv)[0].preset
    parser, commands = _parsers(preset)
    args, extra = parser.parse_known_args(argv)
    for name in ("quiet", "verbose", "debug"):  # may stand before the command or behind it
        setattr(args, name, getattr(args, name, False))
    if args.command is None:
        raise UsageError(f"a command is needed: {', '.join(COMMANDS[:-1])} or {COMMANDS[-1]}")
    for word in extra:
        if word.startswith("-") and word != "-":
            raise UsageError(_unknown_option(word, commands[args.command]))
    # argparse takes positional words before the first option or behind the last, not both.
    if args.command == "train":
        args.files += extra
    elif args.command == "generate" and len(extra) == 1 and args.stdin is None:
        args.stdin = extra[0]
    elif extra:
        raise UsageError(f"unexpected argument '{extra[0]}'")
    return args


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
        return textwrap.fill(
            " ".join(text.split()),
            width,
            initial_indent=indent,
            subsequent_indent=indent,
            break_on_hyphens=False,
        )


class _RawFormatter(_Formatter):
    """The same, with the lines of the examples as they are."""

    @override
    def _fill_text(self, text: str, width: int, indent: str) -> str:
        return text if text == _EXAMPLES else super()._fill_text(text, width, indent)


class _Parser(argparse.ArgumentParser):
    """A parser that raises instead of ending the process."""

    def __init__(self, **given: object) -> None:
        defaults = {"formatter_class": _Formatter, "allow_abbrev": False}
        super().__init__(**{**defaults, **given})  # type: ignore[arg-type]  # argparse checks them

    @override
    def error(self, message: str) -> NoReturn:
        raise UsageError(message)


def _parsers(preset: PresetName) -> tuple[_Parser, dict[str, argparse.ArgumentParser]]:
    common = _Parser(add_help=False)
    group = common.add_argument_group("messages")
    group.add_argument(
        "-q", "--quiet", action="store_true", default=argparse.SUPPRESS, help="only errors and warnings"
    )
    group.add_argument("-v", "--verbose", action="store_true", default=argparse.SUPPRESS, help="more details")
    group.add_argument(
        "--debug",
        action="store_true",
        default=argparse.SUPPRESS,
        help="show where an error arose; CHARLM_DEBUG=1 does too",
    )
    parser = _Parser(
        prog="charlm",
        description="Character-level language models: from raw text to a trained model, to text again.",
        epilog=_EXAMPLES,
        formatter_class=_RawFormatter,
        parents=[common],
    )
    parser.add_argument("--version", action="version", version=f"charlm {__version__}")
    commands = parser.add_subparsers(
        dest="command", metavar="COMMAND", title="commands", parser_class=_Parser
    )

    def add(name: str, usage: str, summary: str) -> argparse.ArgumentParser:
        return commands.add_parser(
            name,
            parents=[common],
            help=summary,
            usage=f"charlm {name} {usage} [options]",
            description=options.DESCRIPTIONS[name],
        )

    options.add_inspect(add("inspect", "FILE...", "show what to know of a text before training"))
    options.add_train(add("train", "FILE... -o RUN", "train a model on text"), preset)
    options.add_generate(
        add("generate", "RUN [-p TEXT | --prompt-file F | -]", "write text with a trained model")
    )
    options.add_eval(add("eval", "RUN FILE...", "measure how well a model predicts a text"))
    options.add_plot(add("plot", "RUN [--attention TEXT | --bigram] [-o FILE]", "draw a training or a model"))
    options.add_info(add("info", "RUN", "show what a run or a model is"))
    return parser, dict(commands.choices)


def _unknown_option(word: str, parser: argparse.ArgumentParser) -> str:
    name = word.partition("=")[0]
    known = [option for action in parser._actions for option in action.option_strings]
    meant = nearest_name(name.lstrip("-").replace("-", "_"))
    near = flag_of(meant) if meant and flag_of(meant) in known else nearest(name, known, cutoff=0.75)
    hint = f"did you mean {near}?" if near else f"`{parser.prog} --help` lists all"
    return f"unknown option '{name}'; {hint}"
