"""The options of each subcommand, and their help.

Those of `charlm train` for models and training are made from the config classes: one for each field, with the
field's docstring as its help. No torch here, so `--help` is quick.
"""

from __future__ import annotations

import argparse
import os
import sys
from typing import get_args

from charlm.cli.settings import DEFAULT_PRESET, FIELDS, Field, flag_of, preset_values
from charlm.models.config import PresetName

__all__ = [
    "DESCRIPTIONS",
    "PRESET_NAMES",
    "add_eval",
    "add_generate",
    "add_info",
    "add_inspect",
    "add_plot",
    "add_train",
    "text_argument",
]

PRESET_NAMES: tuple[PresetName, ...] = get_args(PresetName)

DESCRIPTIONS = {
    "inspect": """\
Show what to know of a text before training on it: its characters, its line ends, how well the last one or two
characters tell the next, whether validation repeats what is trained on, and what a training may come to.""",
    "train": """\
Train a GPT on text. The settings are those of the preset, changed by the file, then by environment variables
(CHARLM_LEARNING_RATE for --learning-rate), then by options. Ctrl-C saves and stops; --resume goes on.""",
    "generate": """\
Write text with the best checkpoint of a run, with one checkpoint, or with a saved model. The text goes to
standard output.""",
    "eval": """\
Score a text exactly: every character but the first is predicted once, and no random number is drawn.""",
    "plot": """\
Draw the training of a run: loss, learning rate and speed. Or draw what its model, at the best checkpoint,
expects after each character, or where it looks. Needs matplotlib.""",
    "info": "Show what lies in a directory: a run, a checkpoint or a saved model.",
}

_CORPORA = "'python-docs' or 'tinyshakespeare'"
_RUN = "a run, one of its checkpoints, or a saved model"
_DEVICE = "auto, cpu, cuda, cuda:N, mps, or one of a plug-in (default: auto)"


def text_argument(argument: str) -> str:
    """Return a word of the command line as the UTF-8 that it is, also where the locale says ASCII."""
    if sys.getfilesystemencoding() == "utf-8":
        return argument
    return os.fsencode(argument).decode("utf-8", errors="surrogateescape")


def add_train(parser: argparse.ArgumentParser, preset: PresetName) -> None:
    """Declare `charlm train`; the help shows the values of the preset."""
    parser.add_argument(
        "files",
        nargs="*",
        metavar="FILE",
        help=f"texts in UTF-8, joined; - is standard input; {_CORPORA} are texts with a name",
    )
    parser.add_argument(
        "-o", "--out", required=True, metavar="RUN", help="directory of the run, missing or empty"
    )
    parser.add_argument(
        "--preset",
        choices=PRESET_NAMES,
        help=f"model and recipe to start from (default: by time, text and device; often {DEFAULT_PRESET})",
    )
    _add_field(parser, FIELDS["minutes"], None)
    parser.add_argument(
        "--resume",
        action="store_true",
        help="go on with the run in RUN; FILE may be left out; --max-steps moves the end",
    )
    parser.add_argument(
        "--repeat",
        metavar="OLD",
        help="train as the ended run in OLD did, bit for bit, also where the clock decided; FILE may be left "
        "out",
    )
    parser.add_argument("--overwrite", action="store_true", help="delete the run in RUN first")
    parser.add_argument(
        "--config",
        metavar="FILE.toml",
        help="settings by field name (learning_rate = 0.001), flat or in the tables [model] and [training]",
    )
    parser.add_argument(
        "--tokenizer",
        choices=("char", "byte"),
        help="one id per character of the text, or per byte of its UTF-8 (default: char)",
    )
    parser.add_argument(
        "--val-fraction",
        type=float,
        metavar="X",
        help="the end of the text that is kept for validation; 0: none (default: 0.1)",
    )
    parser.add_argument("--device", metavar="D", help=_DEVICE)
    parser.add_argument(
        "--no-baseline",
        dest="baseline",
        action="store_false",
        help="do not count an n-gram model of the text first, which the losses are compared with",
    )
    values = preset_values(preset)
    for table in ("model", "training"):
        group = parser.add_argument_group(
            table, f"Defaults are those of the preset {preset}; --preset P --help shows another's."
        )
        for field in FIELDS.values():
            if field.table == table and field.name != "minutes":
                _add_field(group, field, values[field.name])


def _add_field(group: argparse._ActionsContainer, field: Field, default: object) -> None:
    text = f"{field.doc} (default: {_shown(default)})".replace("%", "%%")
    flag = flag_of(field.name)
    if field.kind is bool:
        group.add_argument(flag, action=argparse.BooleanOptionalAction, default=argparse.SUPPRESS, help=text)
        return
    metavar: str | tuple[str, ...] = {int: "N", float: "X"}.get(field.kind, "")
    if field.choices:
        metavar = "{" + ",".join(field.choices) + "}"
    elif field.kind is tuple:
        metavar = ("X", "X")
    group.add_argument(
        flag, nargs=2 if field.kind is tuple else None, metavar=metavar, default=argparse.SUPPRESS, help=text
    )


def _shown(default: object) -> str:
    if isinstance(default, bool):
        return "yes" if default else "no"
    if isinstance(default, tuple | list):
        return " ".join(f"{part:g}" for part in default)
    return "none" if default is None else f"{default:g}" if isinstance(default, float) else str(default)


def add_generate(parser: argparse.ArgumentParser) -> None:
    """Declare `charlm generate`."""
    parser.add_argument("run", metavar="RUN", help=_RUN)
    parser.add_argument("stdin", nargs="?", metavar="-", help="read the prompt from standard input")
    parser.add_argument(
        "-p",
        "--prompt",
        type=text_argument,
        metavar="TEXT",
        help="the text to continue, -p=TEXT if it begins with a hyphen (default: empty, which begins where "
        "a new line begins)",
    )
    parser.add_argument("--prompt-file", metavar="F", help="a file with that text")
    parser.add_argument(
        "-n",
        "--max-new-tokens",
        type=int,
        default=500,
        metavar="N",
        help="the most characters to add (bytes, with a byte tokenizer) (default: 500)",
    )
    parser.add_argument(
        "--num-samples",
        type=int,
        default=1,
        metavar="N",
        help="how many texts, with a line of dashes between them (default: 1)",
    )
    parser.add_argument(
        "--stop",
        action="append",
        type=text_argument,
        default=[],
        metavar="STR",
        help="end before this string; may be given several times (--stop=STR if it begins with a dash)",
    )
    parser.add_argument("--keep-stop", action="store_true", help="let the text end with that string instead")
    parser.add_argument(
        "--json",
        action="store_true",
        help="write one JSON object: prompt, samples (each with its prompt), seed, settings",
    )
    parser.add_argument("--device", default="auto", metavar="D", help=_DEVICE)
    group = parser.add_argument_group("sampling")
    group.add_argument(
        "-t",
        "--temperature",
        type=float,
        default=0.8,
        metavar="X",
        help="divides the logits; 0 always takes the likeliest character (default: 0.8)",
    )
    group.add_argument("--top-k", type=int, metavar="K", help="keep the K likeliest characters")
    group.add_argument(
        "--top-p",
        type=float,
        metavar="P",
        help="keep the likeliest characters that hold this probability together",
    )
    group.add_argument(
        "--min-p",
        type=float,
        metavar="P",
        help="keep characters at least this many times as likely as the likeliest",
    )
    group.add_argument(
        "--seed",
        type=int,
        metavar="S",
        help="the same seed gives the same text (default: a new one, which -v shows)",
    )
    group.add_argument(
        "--overflow",
        choices=("slide", "restart"),
        default="restart",
        help="past the block size, slide by one character or, much quicker, restart (default: restart)",
    )
    group.add_argument(
        "--draft",
        action="store_true",
        help="let the run's n-gram baseline guess ahead: the same text, sooner if the model's weights exceed "
        "the processor's cache",
    )


def add_eval(parser: argparse.ArgumentParser) -> None:
    """Declare `charlm eval`."""
    parser.add_argument("run", metavar="RUN", help=_RUN)
    parser.add_argument(
        "files",
        nargs="+",
        metavar="FILE",
        help=f"texts in UTF-8, joined; - is standard input; {_CORPORA} are texts with a name",
    )
    parser.add_argument("--json", action="store_true", help="write one JSON object")
    parser.add_argument(
        "--show",
        action="store_true",
        help="write the text first, each character coloured by its surprisal; without colours (NO_COLOR, no "
        "terminal) with its bits below it",
    )
    parser.add_argument(
        "--html",
        metavar="OUT.html",
        help="also write a page that shows it, with the likeliest candidates for each character",
    )
    parser.add_argument("--device", default="auto", metavar="D", help=_DEVICE)


def add_info(parser: argparse.ArgumentParser) -> None:
    """Declare `charlm info`."""
    parser.add_argument("run", metavar="RUN", help=_RUN)
    parser.add_argument("--json", action="store_true", help="write one JSON object")
    parser.add_argument(
        "--verify",
        action="store_true",
        help="read and check every byte; the exit code is 1 if something is damaged",
    )


def add_inspect(parser: argparse.ArgumentParser) -> None:
    """Declare `charlm inspect`."""
    parser.add_argument(
        "files",
        nargs="+",
        metavar="FILE",
        help=f"texts in UTF-8, joined; - is standard input; {_CORPORA} are texts with a name",
    )
    parser.add_argument("--json", action="store_true", help="write one JSON object")
    parser.add_argument(
        "--minutes",
        type=float,
        default=1.0,
        metavar="M",
        help="how long the training may take that is guessed at (default: 1)",
    )
    parser.add_argument(
        "--val-fraction",
        type=float,
        default=0.1,
        metavar="X",
        help="the end of the text that is kept for validation; 0: none (default: 0.1)",
    )


def add_plot(parser: argparse.ArgumentParser) -> None:
    """Declare `charlm plot`."""
    parser.add_argument(
        "run", metavar="RUN", help="a run; for a picture of its model also a checkpoint, or a saved model"
    )
    kind = parser.add_mutually_exclusive_group()
    kind.add_argument(
        "--attention",
        metavar="TEXT",
        type=text_argument,
        help="draw where each layer and head of a GPT looks while it reads this text",
    )
    kind.add_argument(
        "--bigram",
        action="store_true",
        help="draw how likely the model holds each character after each other one",
    )
    parser.add_argument(
        "-o",
        "--out",
        metavar="FILE",
        help="the picture, .png or .svg; one that is there is replaced (default: NAME.png, "
        "NAME-attention.png or NAME-bigram.png in the current directory, by the name of RUN)",
    )
