"""The settings of a training: from the preset, a file, environment variables and flags, in this order.

Each field of `GPTConfig` (but vocab_size, which the text decides) and of `TrainerConfig` has one name
everywhere: `learning_rate` in the file, `CHARLM_LEARNING_RATE`, `--learning-rate`. Text is converted to the
field's type if possible; the config classes check the values, and messages name the source. No torch here.
"""

from __future__ import annotations

import tomllib
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import cast

from charlm.cli.fields import Field, fields_of, flag_of
from charlm.cli.output import UsageError
from charlm.config import Config
from charlm.errors import ConfigError, nearest, quoted
from charlm.models.config import PRESETS, GPTConfig, PresetName
from charlm.training.config import TrainerConfig
from charlm.training.recipes import RECIPES

__all__ = [
    "DEFAULT_PRESET",
    "FIELDS",
    "Settings",
    "from_flags",
    "gather",
    "nearest_name",
    "preset_values",
    "variable_of",
]

DEFAULT_PRESET: PresetName = "cpu-1min"
"""The default preset of `charlm train`."""
_CHOSEN_AMONG: Sequence[PresetName] = (DEFAULT_PRESET, "cpu-10s", "cpu-5min")

_FROM = "; it is how new weights begin. To begin with those of a run or a model: --from RUN"
_YES_NO = dict.fromkeys(("true", "yes", "on", "1"), True) | dict.fromkeys(("false", "no", "off", "0"), False)
_CONVERTERS: Mapping[type, Callable[[str], object]] = {
    int: int,
    float: float,
    bool: lambda word: _YES_NO[word.lower()],
    str: str,
}
_TABLES: Mapping[str, type[Config]] = {"model": GPTConfig, "training": TrainerConfig}


@dataclass(frozen=True)
class Settings:
    """The settings of a training before the text is known."""

    preset: PresetName
    """The preset of the values."""
    model: Mapping[str, object]
    """Every field of `GPTConfig` but vocab_size."""
    training: TrainerConfig
    """The complete and checked config."""
    below: Mapping[str, object]
    """The settings of the file and the variables."""
    flags: Mapping[str, object]
    """The settings of flags, which win."""

    @property
    def given(self) -> frozenset[str]:
        """Names of the fields that a file, a variable or a flag set."""
        return frozenset({*self.below, *self.flags})

    def over(self, preset: PresetName, changes: Mapping[str, object] = MappingProxyType({})) -> Settings:
        """Return the same settings on top of another preset.

        Args:
            preset: the preset.
            changes: changed fields of the preset, by name.

        Raises:
            UsageError: a flag is in conflict with another setting.
            ConfigError: other settings are in conflict.
        """
        return _combined(preset, changes, self.below, self.flags)


FIELDS: Mapping[str, Field] = {
    name: field
    for table, cls in _TABLES.items()
    for name, field in fields_of(cls, table).items()
    if name != "vocab_size"
}
"""All settings by name: those of the model, then those of the training."""


def variable_of(name: str) -> str:
    """Return the environment variable of a field."""
    return "CHARLM_" + name.upper()


def nearest_name(name: str) -> str | None:
    """Return the field with a similar name, or the one that other libraries call so."""
    for cls in _TABLES.values():
        if name in cls._other_names:
            return cls._other_names[name]
    return nearest(name, FIELDS)


def preset_values(preset: PresetName) -> dict[str, object]:
    """Return all settings of a preset and its recipe."""
    return {**PRESETS[preset], **RECIPES[preset].to_dict()}


def gather(
    preset: PresetName | None,
    *,
    file: str | None,
    environment: Mapping[str, str],
    flags: Mapping[str, object],
) -> Settings:
    """Return the settings of preset, file, variables and flags together.

    Args:
        preset: the preset. None: `Settings.over` chooses it later; until then it is the first one without a
            conflict.
        file: path of a TOML file, or None.
        environment: the process's variables; those of fields are read.
        flags: texts (a sequence of texts for a tuple; bools are bools) by field name.

    Raises:
        UsageError: a flag is wrong, or in conflict with another setting.
        ConfigError: the file or a variable is wrong. Each error lists all problems of all sources.
    """
    in_file, problems = ({}, []) if file is None else _from_file(Path(file))
    in_environment = {
        name: _value(field, text.replace(",", " ").split() if field.kind is tuple else text)
        for name, field in FIELDS.items()
        if (text := environment.get(variable_of(name))) is not None
    }
    in_flags = {name: _value(FIELDS[name], given) for name, given in flags.items()}
    bad, bad_flags = _bad_values(in_environment, variable_of), _bad_values(in_flags, flag_of)
    problems += [*bad.values(), *bad_flags.values()]
    wrong = {*bad, *bad_flags, *_bad_values(in_file, str)}
    below = {**in_file, **in_environment}
    candidates = _CHOSEN_AMONG if preset is None else (preset,)
    refusals = [_refusal(candidate, {}, below, in_flags, wrong) for candidate in candidates]
    conflict = None if None in refusals else refusals[0]
    problems += [] if conflict is None else [str(conflict)]
    if bad_flags or isinstance(conflict, UsageError):
        raise UsageError("; ".join(problems))
    if problems:
        raise ConfigError("; ".join(problems), problems=problems)
    return _combined(candidates[refusals.index(None)], {}, below, in_flags)


def from_flags(flags: Mapping[str, object]) -> dict[str, object]:
    """Return the values of flags by field name; the texts are as for `gather`.

    Raises:
        UsageError: a value is wrong.
    """
    values = {name: _value(FIELDS[name], given) for name, given in flags.items()}
    if bad := _bad_values(values, flag_of):
        raise UsageError("; ".join(bad.values()))
    return values


def _value(field: Field, given: object) -> object:
    """Convert text to the field's type; text that cannot be converted stays, and is refused later."""
    if isinstance(given, str):
        text = given.strip()
        if field.optional and text.lower() == "none":
            return None
        try:
            return _CONVERTERS[field.kind](text)
        except (ValueError, KeyError):
            return given
    if field.kind is tuple and isinstance(given, Sequence):
        try:
            return [float(part) for part in given]
        except (ValueError, TypeError):
            return list(given)
    return given


def _from_file(path: Path) -> tuple[dict[str, object], list[str]]:
    """Return the fields of a TOML file (flat, or in the tables [model] and [training]) and its problem."""
    name = quoted(str(path))
    try:
        data = path.read_bytes()
        from charlm.files.kinds import other_than_data  # noqa: PLC0415 - not for the help

        if kind := other_than_data(data):
            return {}, [f"{name} must be a TOML file in UTF-8, got {kind}"]
        content = tomllib.loads(data.decode("utf-8-sig"))
    except OSError as error:
        return {}, [f"{name} cannot be read: {error.strerror}; check the path"]
    except (ValueError, RecursionError) as error:  # not TOML, too many digits, or nested too deep
        return {}, [f"{name} must be a TOML file in UTF-8: {error}"]
    fields: dict[str, object] = {}
    problems: list[str] = []
    for key, value in content.items():
        if key in _TABLES and isinstance(value, dict):
            inside = cast("dict[str, object]", value)
            problems += [
                _unknown(inner, f" in [{key}]")
                for inner in inside
                if inner not in FIELDS or FIELDS[inner].table != key
            ]
            problems += [f"{quoted(inner, 40)} stands there twice" for inner in inside if inner in content]
            fields.update({k: v for k, v in inside.items() if k in FIELDS and FIELDS[k].table == key})
        else:
            fields[key] = value
            problems += [] if key in FIELDS else [_unknown(key, "")]
    values = {
        key: None if FIELDS[key].optional and value == "none" else value
        for key, value in fields.items()
        if key in FIELDS
    }
    problems += _bad_values(values, str).values()
    return values, [f"{name}: {'; '.join(problems)}"] if problems else []


def _unknown(name: str, where: str) -> str:
    if name in FIELDS:
        return f"unknown field {quoted(name, 40)}{where}; it belongs into [{FIELDS[name].table}]"
    if name == "vocab_size":
        return "vocab_size cannot be set; it is that of the text"
    near = nearest_name(name)
    hint = f"did you mean {quoted(near)}?" if near else "`charlm train --help` lists the fields"
    return f"unknown field {quoted(name, 40)}{where}; {hint}"


def _bad_values(values: Mapping[str, object], called: Callable[[str], str]) -> dict[str, str]:
    """Return the problem of each wrong value, with its name in the source."""
    return {
        name: problem.replace(name, called(name), 1) + (_FROM if name == "init" else "")
        for name, value in values.items()
        for problem in _TABLES[FIELDS[name].table].check({name: value})
    }


def _combined(
    preset: PresetName,
    changes: Mapping[str, object],
    below: Mapping[str, object],
    flags: Mapping[str, object],
) -> Settings:
    """Return the settings, or raise their conflicts."""
    if refusal := _refusal(preset, changes, below, flags):
        raise refusal
    values = {**preset_values(preset), **changes, **below, **flags}
    training = TrainerConfig.from_dict(_part(values, "training"))
    return Settings(preset, _part(values, "model"), training, below, flags)


def _refusal(
    preset: PresetName,
    changes: Mapping[str, object],
    below: Mapping[str, object],
    flags: Mapping[str, object],
    wrong: Collection[str] = (),
) -> ConfigError | UsageError | None:
    """Return the error about conflicts between settings: a UsageError if flags cause them.

    Fields in `wrong` are ignored.
    """
    without_flags = {**preset_values(preset), **changes, **below}
    conflicts = _conflicts({**without_flags, **flags}, wrong)
    if not conflicts:
        return None
    message = "; ".join(conflicts)
    return ConfigError(message) if _conflicts(without_flags, wrong) else UsageError(message)


def _part(values: Mapping[str, object], table: str) -> dict[str, object]:
    return {name: values[name] for name, field in FIELDS.items() if field.table == table and name in values}


def _conflicts(values: Mapping[str, object], wrong: Collection[str]) -> list[str]:
    """Return a sentence for each conflict between fields."""
    right = {name: value for name, value in values.items() if name not in wrong}
    return [problem for table, cls in _TABLES.items() for problem in cls.check(_part(right, table))]
