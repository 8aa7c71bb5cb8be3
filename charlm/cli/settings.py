"""The settings of a training: preset, then file, then environment variables, then flags.

Each field of `GPTConfig` (but vocab_size, which the text decides) and of `TrainerConfig` has one name
everywhere: `learning_rate` in the file, `CHARLM_LEARNING_RATE`, `--learning-rate`. What comes as text is
turned into the field's type where that is possible; whether it is right is for the config classes to say,
and their sentences name the source. No torch here.
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
"""What `charlm train` trains unless it is told otherwise."""
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
    """What a training is to be, before the text is known."""

    preset: PresetName
    """Where the values began."""
    model: Mapping[str, object]
    """Every field of `GPTConfig` but vocab_size."""
    training: TrainerConfig
    """Complete and checked."""
    below: Mapping[str, object]
    """What a file and the variables set."""
    flags: Mapping[str, object]
    """What flags set, which wins."""

    @property
    def given(self) -> frozenset[str]:
        """Names of the fields that a file, a variable or a flag decided."""
        return frozenset({*self.below, *self.flags})

    def over(self, preset: PresetName, changes: Mapping[str, object] = MappingProxyType({})) -> Settings:
        """Return what was set on top of another preset.

        Args:
            preset: where the values begin.
            changes: which fields of the preset differ, by name.

        Raises:
            UsageError: a flag does not go together with the rest.
            ConfigError: the rest does not go together.
        """
        return _combined(preset, changes, self.below, self.flags)


FIELDS: Mapping[str, Field] = {
    name: field
    for table, cls in _TABLES.items()
    for name, field in fields_of(cls, table).items()
    if name != "vocab_size"
}
"""Every setting by its name: those of the model, then those of the training."""


def variable_of(name: str) -> str:
    """Return how a field is called among the environment variables."""
    return "CHARLM_" + name.upper()


def nearest_name(name: str) -> str | None:
    """Return the field that somebody who wrote `name` may have meant, knowing other libraries' names."""
    for cls in _TABLES.values():
        if name in cls._other_names:
            return cls._other_names[name]
    return nearest(name, FIELDS)


def preset_values(preset: PresetName) -> dict[str, object]:
    """Return every setting of a preset and its recipe."""
    return {**PRESETS[preset], **RECIPES[preset].to_dict()}


def gather(
    preset: PresetName | None,
    *,
    file: str | None,
    environment: Mapping[str, str],
    flags: Mapping[str, object],
) -> Settings:
    """Return the settings that preset, file, variables and flags make together.

    Args:
        preset: where the values begin. None: it is chosen later, by `Settings.over`; until then it is the
            first that goes together with the rest.
        file: path of a TOML file, or None.
        environment: the process's variables; only those of a field are looked at.
        flags: texts (a sequence of texts for a tuple; bools are bools) by field name.

    Raises:
        UsageError: a flag is wrong, or does not go together with the rest.
        ConfigError: the file or a variable is wrong. Either error lists all that is wrong anywhere.
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
    """Return the values of flags by field name; the texts are as `gather` takes them.

    Raises:
        UsageError: a value is wrong.
    """
    values = {name: _value(FIELDS[name], given) for name, given in flags.items()}
    if bad := _bad_values(values, flag_of):
        raise UsageError("; ".join(bad.values()))
    return values


def _value(field: Field, given: object) -> object:
    """Turn what was written into the field's type; what cannot be turned stays, and is refused later."""
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
    """Return the fields that a TOML file sets, flat or in the tables [model] and [training].

    Returns:
        The values by name, and what is wrong with the file in one sentence, if anything is.
    """
    name = quoted(str(path))
    try:
        data = path.read_bytes()
        from charlm.files.kinds import other_than_data  # noqa: PLC0415 - not for the help

        if kind := other_than_data(data):
            return {}, [f"{name} must be a TOML file in UTF-8, got {kind}"]
        content = tomllib.loads(data.decode("utf-8-sig"))
    except OSError as error:
        return {}, [f"{name} cannot be read: {error.strerror}; check the path"]
    except (ValueError, RecursionError) as error:  # no TOML, too many digits, nested too deep
        return {}, [f"{name} must be a TOML file in UTF-8: {error}"]
    found: dict[str, object] = {}
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
            found.update({k: v for k, v in inside.items() if k in FIELDS and FIELDS[k].table == key})
        else:
            found[key] = value
            problems += [] if key in FIELDS else [_unknown(key, "")]
    known = {key: value for key, value in found.items() if key in FIELDS}
    values = {
        key: None if FIELDS[key].optional and value == "none" else value for key, value in known.items()
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
    """Return what the config classes say against each value that is wrong, with the name that was used."""
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
    """Return the settings, or raise what does not go together."""
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
    """Return the error of fields that do not go together: against the flags, if it is due to them.

    Fields that are wrong themselves do not count.
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
    """Return a sentence for each pair of fields that do not go together."""
    right = {name: value for name, value in values.items() if name not in wrong}
    return [problem for table, cls in _TABLES.items() for problem in cls.check(_part(right, table))]
