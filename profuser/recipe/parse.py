"""Reads a recipe from a YAML file, with single keys set on the command line. jsonargparse does the parsing.

Whatever jsonargparse finds wrong is reported in one line. An unknown key is an error, and its message lists the known keys.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any, get_type_hints

import jsonargparse
import yaml

from profuser.errors import ConfigError
from profuser.recipe import schema
from profuser.recipe.places import DEFAULT_RECIPE
from profuser.recipe.schema import SCHEDULES, Recipe

# `--help` prints the texts under the fields of the recipe's dataclasses.
jsonargparse.set_parsing_settings(docstring_parse_attribute_docstrings=True)

RENAMED_KEYS = {"infer_weight": "inference_weight", "train_weight": "training_weight"}
"""Keys by their old names, each with its present name."""


@dataclass(kw_only=True)
class Run:
    """A recipe, its name, and the command's own options, such as `fresh`."""

    recipe: Recipe
    name: str
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def store_dir(self) -> Path:
        """The directory of the store."""
        return Path(self.recipe.store or f"runs/{self.name}-store")

    @property
    def output_dir(self) -> Path:
        """The directory of the run."""
        return Path(self.recipe.output or f"runs/{self.name}")


def parse_run(
    command: str, argv: Sequence[str], flags: Mapping[str, str] | None = None, description: str | None = None
) -> Run:
    """Reads a command line and returns its recipe. Without `--config` it is the bundled demo's.

    Args:
        command: the command's name, which the help shows.
        flags: the command's own switches, each with its help text.
        description: what the command does, for the help.

    Raises:
        ConfigError: a key is unknown, missing or of the wrong type, or keys contradict each other.
    """
    # The options: the recipe's path, the command's own switches, and every key of a recipe.
    flags = flags or {}
    parser = jsonargparse.ArgumentParser(
        prog=f"python -m profuser.{command}", description=description, exit_on_error=False
    )
    parser.add_argument("--config", action="config", help="a recipe (YAML); the bundled demo's if there is none")
    for flag, text in flags.items():
        parser.add_argument(f"--{flag}", action="store_true", help=text)
    parser.add_class_arguments(Recipe, None, as_group=False)

    # Find the recipe's path, given as `--config PATH` or `--config=PATH`. The run is named after it.
    argv = list(argv)
    config = next(
        (
            argument.split("=", 1)[1] if "=" in argument else following
            for argument, following in zip(argv, [*argv[1:], ""])
            if argument.split("=")[0] == "--config"
        ),
        None,
    )
    if argv and not argv[0].startswith("-"):
        raise ConfigError(f"a recipe is given as --config {argv[0]}, got {argv[0]} alone; add --config")
    if config is None:
        config, argv = str(DEFAULT_RECIPE), ["--config", str(DEFAULT_RECIPE), *argv]

    # Parse and check. jsonargparse raises AttributeError for a group of keys that is not a mapping.
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            namespace = parser.instantiate(parser.parse_args(argv))
    except (jsonargparse.ArgumentError, TypeError, AttributeError) as error:
        raise ConfigError(_one_line(str(error), config)) from None
    return Run(
        recipe=_recipe(namespace),
        name=Path(config).stem,
        options={flag: getattr(namespace, flag.replace("-", "_")) for flag in flags},
    )


def load_recipe(record: dict[str, Any]) -> Recipe:
    """Builds the recipe that a run.json records; `record` is the file's entry `recipe`.

    Raises:
        ConfigError: for the same reasons as in `parse_run`.
    """
    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(Recipe, None, as_group=False)
    try:
        namespace = parser.instantiate(parser.parse_object(record))
    except jsonargparse.ArgumentError as error:
        raise ConfigError(_one_line(str(error), "run.json")) from None
    return _recipe(namespace)


def _recipe(namespace: Any) -> Recipe:
    """Makes a recipe of what jsonargparse parsed. Making it checks it."""
    return Recipe(**{f.name: getattr(namespace, f.name) for f in fields(Recipe)})


def _one_line(message: str, config: str) -> str:
    """Turns jsonargparse's message into one line that gives the rule, the value and the fix."""
    hint = f" (recipe: {config}; `--help` lists every key)"
    # Where the file or a group is not a mapping at all, jsonargparse's message would not say so.
    if wrong := _no_mapping(config):
        return wrong + hint

    # The parts of the message: the key that it is about, the value that was given, and the types that would be right.
    key = found[1] if (found := re.match(r'Parser key "([^"]+)"', message)) else None
    value = re.split(r"(?:Given|Got) value: ", message)[-1].strip()
    types = dict.fromkeys(re.findall(r"Expected an? <class '(\w+)'>", message))
    message = "; ".join(line.strip() for line in message.splitlines() if line.strip())

    # One branch for each kind of mistake. A message of any other kind stays as it is.
    in_list = re.search(r"class_path 'profuser\.recipe\.schema\.(\w+)'.*Option '(\w+)' is not accepted", message)
    if in_list:
        message = _unknown_key(in_list[2], f"an entry of {key}", getattr(schema, in_list[1]))
    elif key == "schedule":
        message = f"schedule must be one of {', '.join(SCHEDULES)} or a list of stages, got {value}"
    elif key == "config":
        return f"--config must be an existing recipe, got {config}; fix the path"
    elif key and types:
        message = f"{key} must be {' or '.join(t.replace('NoneType', 'null') for t in types)}, got {value}"
    elif found := re.match(r"unrecognized arguments: (?:--)?([^\s=]+)", message):
        message = _unknown_dotted_key(found[1])
    elif found := re.match(r"Group '([^']+)' does not accept option '([^']+)'", message):
        message = _unknown_dotted_key(f"{found[1]}.{found[2]}")
    elif found := re.match(r"Option '([^']+)' is not accepted", message):
        message = _unknown_dotted_key(found[1])
    elif found := re.match(r"Problems parsing config: (.*)", message):
        reason = re.sub(r" in \"<unicode string>\",", "", found[1])
        message = f"the recipe must be YAML, got: {reason}"
    return message + hint


def _no_mapping(config: str) -> str | None:
    """Says what is wrong with a recipe, or a group of its keys, that is not a mapping; None where all of them are."""
    try:
        content = yaml.safe_load(Path(config).read_text())
    except (OSError, ValueError, yaml.YAMLError):
        return None
    if not isinstance(content, dict):
        return f"a recipe must be a mapping of keys such as sources and target, got {type(content).__name__}"
    groups = [name for name, kind in get_type_hints(Recipe).items() if is_dataclass(kind) and name in content]
    wrong = [name for name in groups if not isinstance(content[name], dict)]
    return f"{wrong[0]} must be a mapping of its keys, got {content[wrong[0]]!r}" if wrong else None


def _unknown_dotted_key(key: str) -> str:
    """The message for an unknown dotted key. It finds the dataclass of the key's group, whose fields are the known keys."""
    group, _, name = key.rpartition(".")
    config: Any = Recipe
    for part in group.split(".") if group else ():
        config = get_type_hints(config).get(part, Recipe)
    return _unknown_key(name, group or "the recipe", config, () if group else ("config",))


def _unknown_key(name: str, where: str, config: Any, others: Sequence[str] = ()) -> str:
    """The message for a key that the dataclass `config` does not have; `others` are known keys beside its fields."""
    if name in RENAMED_KEYS:
        return f"{name} is now called {RENAMED_KEYS[name]}; rename it in {where}"
    known = ", ".join([*others, *(f.name for f in fields(config))]) if is_dataclass(config) else ""
    return f"a key of {where} must be one of {known}; got {name}"
