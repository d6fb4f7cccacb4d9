"""Reads a recipe from a YAML file, with single keys set on the command line. jsonargparse does the parsing.

Whatever is wrong is reported in one line. `keys.py` looks for unknown keys and wrong types first, because its messages name the
key that is meant.
"""

from __future__ import annotations

import functools
import re
import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import jsonargparse
import yaml

from profuser.errors import ConfigError, ProfuserError, first_line
from profuser.recipe.checks import LARGEST
from profuser.recipe.data import SPLITS
from profuser.recipe.keys import Argument, argument_mistake, as_argument, completed, completed_argument, mistake
from profuser.recipe.places import DEFAULT_RECIPE, check_model, data_files
from profuser.recipe.schema import Recipe
from profuser.recipe.utf8 import read_utf8
from profuser.recipe.yaml_text import CHARACTERS, load_yaml

# `--help` prints the texts under the fields of the recipe's dataclasses.
jsonargparse.set_parsing_settings(docstring_parse_attribute_docstrings=True)

PRINT = "print_config"
"""jsonargparse's own switch, which prints the recipe with all its defaults."""


@dataclass(frozen=True, slots=True)
class OwnValue:
    """An option of a command itself, with a value: a number above 0, or one of a few words.

    help: what it means. kind: the type of a number. words: the words that there are, instead of a number.
    """

    help: str
    kind: type[int] | type[float] = int
    words: tuple[str, ...] = ()

    def parsed(self, name: str, text: str | None) -> int | float | str | None:
        """Returns the value of a text, None for None.

        Raises:
            ConfigError: it is none.
        """
        if text is None or text in self.words:
            return text
        if self.words:
            raise ConfigError(f"--{name} must be one of {', '.join(self.words)}, got {text}; name one")
        try:
            value = self.kind(text)
        except ValueError:
            value = 0
        if not 0 < value < LARGEST:
            number = "a number" if self.kind is float else "a whole number"
            raise ConfigError(f"--{name} must be {number} above 0 and below 2**63, got {text}; correct it")
        return value


@dataclass(kw_only=True)
class Run:
    """A recipe, its name, the files that it was read from, and the command's own options, such as `fresh`."""

    recipe: Recipe
    name: str
    files: list[Path] = field(default_factory=list)
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def store_dir(self) -> Path:
        """The directory of the store."""
        return Path(self.recipe.store or f"runs/{self.name}-store")

    @property
    def output_dir(self) -> Path:
        """The directory of the run."""
        return Path(self.recipe.output or f"runs/{self.name}")

    def check_places(self) -> None:
        """Raises DataError where a source, the target or the data is a local path at which there is nothing.

        Also raises ConfigError where the store or the run would lie in a folder of the data, which their files would be taken for.

        A command that opens all of them does this first, because opening them takes the imports of torch and transformers.
        """
        for model in (*self.recipe.sources, self.recipe.target_config):
            check_model(model.name, model.model)
        for split in SPLITS:
            location = self.recipe.data.location(split)
            for named in [] if location is None else location.paths:
                for key, directory in (("store", self.store_dir), ("output", self.output_dir)):
                    _check_outside(key, directory, data_files(named) or [])


def _check_outside(key: str, directory: Path, places: Sequence[str]) -> None:
    """Raises ConfigError where a directory lies in one of some places. `key` is the recipe's. The working directory is no place of data."""
    for place in places:
        if Path(place) != Path() and Path(place).is_dir() and directory.resolve().is_relative_to(Path(place).resolve()):
            raise ConfigError(
                f"{key} must lie outside of the data's folders, got {directory} in {place}; name another place, or the files in the folder"
            )


def parse_run(
    command: str,
    argv: Sequence[str],
    flags: Mapping[str, str] | None = None,
    description: str | None = None,
    values: Mapping[str, OwnValue] | None = None,
) -> Run:
    """Reads a command line and returns its recipe. Without `--config` it is the bundled demo's.

    Args:
        command: the command's name, which the help shows.
        flags: the command's own switches, each with its help text.
        description: what the command does, for the help.
        values: the command's own options with a value.

    Raises:
        ConfigError: a key is unknown, missing or of the wrong type, or keys contradict each other.
    """
    flags, values = flags or {}, values or {}
    own_values = ((option, "|".join(own.words) or "NUMBER", own.help) for option, own in values.items())
    parser = _command_parser(command, description, tuple(flags.items()), tuple(own_values))
    if {"-h", "--help"} & set(argv):
        parser.parse_args(["--help"])

    # Look for what no recipe may say, in the recipe and behind it. The run is named after the first recipe.
    given = list(_arguments(argv, flags))
    configs = [value for name, value in given if name == "config"]
    if not configs:
        configs, given = [str(DEFAULT_RECIPE)], [("config", Argument(DEFAULT_RECIPE)), *given]
    hint = f" (recipe: {configs[0]}; `--help` lists every key)"
    words = []
    for name, value in given:
        if name == "config":
            # jsonargparse gets the text, so that the file is read only once. A second recipe stands over the first.
            value = _checked_recipe(value or "", hint, over_another=any(word.startswith("--config=") for word in words))
        elif name in flags and value is not None:
            raise ConfigError(f"--{name} must stand alone, got the value {value}; leave it out")
        elif name in values:
            if value is None:
                raise ConfigError(f"--{name} must have a value behind it, got none; write --{name} VALUE")
            values[name].parsed(name, value)  # raises an error where it is wrong
        elif name not in (*flags, PRINT) and (wrong := argument_mistake(name, value, ["config", *flags, *values])):
            raise ConfigError(wrong + hint)
        elif value is not None:
            value = completed_argument(name, value)
        words.append(f"--{name}" if value is None else f"--{name}={value}")

    # Parse and check. What jsonargparse finds wrong now has not been looked for above.
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            namespace = parser.instantiate(parser.parse_args(words))
    except ProfuserError:
        raise
    except Exception as error:  # for what a text may hold, jsonargparse and PyYAML raise many kinds
        raise ConfigError(_one_line(error) + hint) from None
    return Run(
        recipe=_recipe(namespace),
        name=Path(configs[0] or "").stem,
        files=[Path(config) for config in configs if config],
        options={flag: getattr(namespace, flag.replace("-", "_")) for flag in flags}
        | {option: own.parsed(option, getattr(namespace, option)) for option, own in values.items()},
    )


def load_recipe(record: dict[str, Any]) -> Recipe:
    """Builds the recipe that a run.json records; `record` is the file's entry `recipe`.

    Raises:
        ConfigError: for the same reasons as in `parse_run`.
    """
    if wrong := mistake(record, Recipe):
        raise ConfigError(f"{wrong} (recipe: run.json)")
    parser = _record_parser()
    try:
        namespace = parser.instantiate(parser.parse_object(deepcopy(record)))  # it is changed there
    except (jsonargparse.ArgumentError, TypeError, AttributeError, ValueError) as error:
        raise ConfigError(f"{_one_line(error)} (recipe: run.json)") from None
    return _recipe(namespace)


# To find out what a recipe's keys are takes jsonargparse longer than to parse one.
@functools.lru_cache(maxsize=8)
def _command_parser(
    command: str,
    description: str | None,
    flags: tuple[tuple[str, str], ...],
    values: tuple[tuple[str, str, str], ...],
) -> jsonargparse.ArgumentParser:
    """Returns the parser of a command line: the recipe's path, the command's own switches, and every key of a recipe.

    Args:
        flags: the switches, each with its help text. values: the options with a value, each with what stands for it and its help.
    """
    parser = jsonargparse.ArgumentParser(
        prog=f"python -m profuser.{command}", description=description, exit_on_error=False
    )
    parser.add_argument("--config", action="config", help="a recipe (YAML); the bundled demo's if there is none")
    for flag, text in flags:
        parser.add_argument(f"--{flag}", action="store_true", help=text)
    for option, stands_for, text in values:
        parser.add_argument(f"--{option}", type=str, metavar=stands_for, help=text)
    parser.add_class_arguments(Recipe, None, as_group=False)
    return parser


@functools.cache
def _record_parser() -> jsonargparse.ArgumentParser:
    """Returns the parser of recorded recipes."""
    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(Recipe, None, as_group=False)
    return parser


def _arguments(argv: Sequence[str], flags: Collection[str]) -> Iterator[tuple[str, Argument | None]]:
    """Yields the arguments of a command line, written `--name value` or `--name=value`. A switch has no value."""
    waiting = list(argv)
    while waiting:
        word = waiting.pop(0)
        if not word.startswith("--"):
            raise ConfigError(
                f"an argument must be --config RECIPE or --KEY VALUE, got {word}; write --config {word} if it is a recipe, "
                "and a list as '[a, b]'"
            )
        name, equals, value = word[2:].partition("=")
        if equals:
            yield name, Argument(value)
        else:
            alone = name in (*flags, PRINT) or not waiting or waiting[0].startswith("--")
            yield name, None if alone else Argument(waiting.pop(0))


def _checked_recipe(config: str, hint: str, over_another: bool) -> Argument:
    """Reads the file of a recipe and returns its text, in which every key is known and every value has its type.

    Args:
        over_another: whether the recipe's values replace those of another one.
    """
    try:
        text = read_utf8(Path(config), CHARACTERS)
    except OSError:
        raise ConfigError(f"--config must be an existing recipe, got {config}; fix the path") from None
    except ValueError as error:
        raise ConfigError(f"the recipe {config} must be UTF-8, {error}") from None
    try:
        content = load_yaml(text)
    except (yaml.YAMLError, ValueError) as error:  # PyYAML raises a ValueError for a date that there is not
        mark = getattr(error, "problem_mark", None)
        where = f" in line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        reason = getattr(error, "problem", None) or first_line(error)
        raise ConfigError(f"the recipe {config} must be YAML, got: {reason}{where}; fix it there") from None
    if not isinstance(content, dict):
        kind = type(content).__name__
        raise ConfigError(f"a recipe must be a mapping of keys such as sources and target, got {kind}{hint}")
    if wrong := mistake(content, Recipe):
        raise ConfigError(wrong + hint)
    return as_argument(completed(content, Recipe)) if over_another else Argument(text)


def _recipe(namespace: Any) -> Recipe:
    """Makes a recipe of what jsonargparse parsed. Making it checks it."""
    return Recipe(**{f.name: getattr(namespace, f.name) for f in fields(Recipe)})


def _one_line(error: Exception) -> str:
    """Turns jsonargparse's message into one line, or takes that of our own error behind it.

    It wraps our errors where a group may be null: then it tries both, and lists what each came to.
    """
    behind: list[BaseException] = [error]  # errors can stand behind each other in a circle
    while (inner := behind[-1].__cause__ or behind[-1].__context__) is not None and inner not in behind:
        behind.append(inner)
    if own := [inner for inner in behind if isinstance(inner, ConfigError)]:
        return str(own[0])
    message = "; ".join(line.strip() for line in str(error).splitlines() if line.strip())
    if found := re.match(r"the following arguments are required: (.*)", message):
        return f"a recipe must have the keys {found[1]}, it lacks them; add them"
    if found := re.match(r"Parser key \"(\w+)\":; Unable to load config '(.*?)'", message):
        return f"{found[1]} must be a mapping of its keys, or a file that holds one, got {found[2]}; fix it"
    return message
